"""The rules by which a row is updated."""

import math
from collections.abc import Iterable

from torch import Tensor

from mprec.optim.base import TableOptimizer, non_negative

__all__ = ["SGD", "Adagrad", "Adam", "RowWiseAdagrad"]


class SGD(TableOptimizer):
    """Stochastic gradient descent, ``w -= lr·g``; as ``torch.optim.SGD`` without momentum."""

    _rule = "sgd"
    _counts_steps = False
    _on_device = "table_sgd_", ("lr",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
        sharded: bool = False,
        in_backward: bool = True,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults, sharded, in_backward)


class Adagrad(TableOptimizer):
    """Adagrad (Duchi et al. 2011) with state per element, as ``torch.optim.Adagrad``.

    Like there, ``lr`` is divided by ``1 + (step - 1)·lr_decay``. State: ``sum`` [rows, dim] float32.
    """

    _rule = "adagrad"
    _states = ("sum",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
        sharded: bool = False,
        in_backward: bool = True,
    ):
        non_negative("lr_decay", lr_decay)
        non_negative("initial_accumulator_value", initial_accumulator_value)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "seed": seed,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults, sharded, in_backward)

    def _init_state(self, weight: Tensor, group: dict) -> None:
        super()._init_state(weight, group)
        self.state[weight]["sum"].fill_(group["initial_accumulator_value"])

    def _rate(self, group: dict, step: int) -> float:
        return group["lr"] / (1 + (step - 1) * group["lr_decay"])


class RowWiseAdagrad(TableOptimizer):
    """Adagrad with one accumulator a row: ``s += mean(g²); w -= lr·g / (√s + eps)``.

    FBGEMM's ``EXACT_ROWWISE_ADAGRAD``, the usual choice for recommendation models: its state is a dim-th of
    the table. State: ``sum`` [rows, 1] float32.
    """

    _rule = "rowwise_adagrad"
    _counts_steps = False
    _states = ("sum",)
    _on_device = "table_rowwise_adagrad_", ("lr", "eps")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
        sharded: bool = False,
        in_backward: bool = True,
    ):
        defaults = {
            "lr": lr, "eps": eps, "weight_decay": weight_decay, "rounding": rounding, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults, sharded, in_backward)

    def _state_shape(self, weight: Tensor) -> tuple[int, int]:
        return len(weight), 1


class Adam(TableOptimizer):
    """Adam (Kingma and Ba 2015) on the rows that a batch uses, as ``torch.optim.SparseAdam``.

    The moments of other rows are left alone. With ``weight_decay`` it is AdamW on those rows. State:
    ``exp_avg`` and ``exp_avg_sq`` [rows, dim] float32.
    """

    _rule = "adam"
    _states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
        sharded: bool = False,
        in_backward: bool = True,
    ):
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, got {beta}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rounding": rounding,
            "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults, sharded, in_backward)

    def _hyperparameters(self, group: dict, step: int) -> tuple[float, float, float, float]:
        beta1, beta2 = group["betas"]
        lr = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return lr, group["eps"], beta1, beta2
