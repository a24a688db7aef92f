"""Optimizers for embedding tables, applied during the backward pass.

The gradient of a table is a few rows. torch lays it out as a sparse tensor, coalesces it and then walks it
again to update the rows; here one native pass sorts the IDs, sums each row's gradient in registers and
updates the row (see ``csrc/gradient/README.md``). Nothing of the table's size is ever written. Tables on
CUDA: SGD and RowWiseAdagrad, by Triton kernels.

An optimizer of this module takes over the tables that it is given: from then on ``loss.backward()`` updates
them, their ``.grad`` stays ``None`` and ``step()`` has nothing left to do for them. So a backward pass is a
step: one for each table, however often the pass met it. Gradients are not accumulated over several passes
(a pass within a pass, as of reentrant checkpointing, is one of its own), and cannot be clipped or scaled in
between. ``torch.nn.utils.clip_grad_norm_`` cannot tell: it passes by parameters without ``.grad``, so these
tables have been updated by all of their gradient, the others are clipped by the norm of the others, and the
norm of tables alone is 0.0. ``torch.autograd.grad`` updates nothing. The results are those of torch's
optimizer of the same name with ``sparse=True`` gradients, to rounding, and do not depend on the number of
threads.

With ``in_backward=False`` the gradient goes to ``.grad`` as any other's does, and ``step()`` updates the
table by the same kernels: for gradient accumulation, clipping, ``torch.amp.GradScaler``, hooks, and for
replicas whose gradients ``DistributedDataParallel`` exchanges. A sparse gradient (modules with
``sparse=True``) updates the rows that it has, a dense one every row, with zeros for those that no batch met.

``weight_decay=λ`` is decoupled (Loshchilov and Hutter 2019): a row is multiplied by ``1 - lr·λ`` in each step
that has a gradient for it, and its gradient is as without. Rows that no batch meets do not decay, as in
FBGEMM: to let them, every step would have to write every row. For tables on the CPU.

Tables of float16 and bfloat16, on the CPU, are updated in float32: the row is read, its gradient is summed
and the step is taken in float32, states are float32, and the row is rounded once, when it is written.
``rounding="stochastic"``, the default, takes one of the two neighbours, the nearer one the more often, so
that the mean is the float32 number: of updates far below a weight's last place as much arrives as should.
``rounding="nearest"`` is torch's cast, which loses all of those. As in that, infinity stands where the number
after the largest finite one would: what is further out becomes infinite, so that a table that has outgrown
its type is seen. NaN stays NaN. Below 2⁻¹⁴ the mean in float16 is right to 2⁻³⁸. A gradient that goes to
``.grad`` is rounded to the table's type there, as any parameter's; ``torch.amp.GradScaler`` refuses those of
float16.

The noise is a function of ``seed``, the table's place among the optimizer's, its step, row and column, and of
nothing else: results do not depend on the number of threads, replicas round alike, and a training that goes
on from a state_dict, which holds seeds and steps, equals one that was not cut off.

Gradients that backward passes apply are not exchanged between processes. Where ``torch.distributed`` runs
with more than one, such a pass raises ``RuntimeError`` rather than let replicas drift apart;
``sharded=True`` says that each process holds tables of its own.

    model = DLRM(...)
    tables, rest = mprec.optim.split_parameters(model)
    optimizers = [RowWiseAdagrad(tables, lr=0.02), torch.optim.Adam(rest)]
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mprec import huge_pages
from mprec.bags import Bags
from mprec.ops import fused
from mprec.ops._common import NATIVE_TABLES, mutated
from mprec.ops._updates import count_steps, update_tables

__all__ = ["SGD", "Adagrad", "Adam", "RowWiseAdagrad", "split_parameters"]

#: Options of torch's optimizers that would change an update here. Its weight decay is another one: of every
#: row, or part of the gradient.
_UNSUPPORTED = {"weight_decay", "maximize", "momentum", "nesterov", "amsgrad", "dampening"}
#: Options that have no meaning here.
_IGNORED = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
#: How rows of 16 bits are rounded.
ROUNDINGS = ("stochastic", "nearest")


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a module as (embedding tables, everything else), each once."""
    tables = {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, nn.EmbeddingBag) or getattr(child, "is_embedding_table", False)
    }
    parameters = list(module.parameters())
    return [p for p in parameters if id(p) in tables], [p for p in parameters if id(p) not in tables]


def _zeros(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """New state of a table: in huge pages if it fills some, for it is read as randomly as the table."""
    if weight.device.type == "cpu" and 4 * math.prod(shape) >= huge_pages.PAGE and huge_pages.supported():
        with contextlib.suppress(OSError):  # torch says what it could not allocate
            return huge_pages.empty(*shape)
    return torch.zeros(shape, dtype=torch.float32, device=weight.device)


def _is_narrow(weight: Tensor) -> bool:
    return weight.dtype != torch.float32


def _check_rounding(group: dict) -> None:
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {group['rounding']!r}")
    seed = group["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int in [0, 2^63), got {seed!r}")


def _noise_key(seed: int, step: int) -> int:
    """The first of as many keys as there are tables; far from those of other steps and seeds."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _check_device(weight: Tensor, group: dict) -> None:
    """A module, and its tables with it, can be moved after the optimizer was made."""
    if weight.is_cuda and _is_narrow(weight):
        raise ValueError(f"params: expected a float32 table on {weight.device}, got {weight.dtype}")
    if group["weight_decay"] and weight.is_cuda:
        raise ValueError(
            f"weight_decay: expected 0 for a table on {weight.device}, got {group['weight_decay']}: decay is "
            "for tables on the CPU"
        )


def _non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value


class _TableOptimizer(torch.optim.Optimizer):
    """What the optimizers share: taking over tables, and handing gradients to the native pass."""

    _rule: str
    _states: tuple[str, ...] = ()
    #: Whether a step's size depends on how many there were.
    _counts_steps = True
    #: Its operator for CUDA tables, with the names of its hyperparameters; None: it has none.
    _on_device: tuple[str, tuple[str, ...]] | None = None

    def __init__(self, params: Iterable, defaults: dict, sharded: bool, in_backward: bool):
        self.sharded, self.in_backward = sharded, in_backward
        for name in ("lr", "eps", "weight_decay"):
            _non_negative(name, defaults.get(name, 0.0))
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_rounding(group)
            for weight in group["params"]:
                self._check(weight)
                _check_device(weight, group)
            for weight in group["params"]:
                fused.attach(weight, self)
        except ValueError:
            self.param_groups.pop()
            for weight in group["params"]:
                fused.detach(weight, self)
            raise
        for weight in group["params"]:
            self._init_state(weight, group)

    def release(self) -> None:
        """Give the tables back: backward passes update them no more, and another optimizer may have them."""
        for group in self.param_groups:
            for weight in group["params"]:
                fused.detach(weight, self)

    @classmethod
    def _check(cls, weight: Tensor) -> None:
        dtypes = {"cpu": NATIVE_TABLES} | ({} if cls._on_device is None else {"cuda": (torch.float32,)})
        if weight.dim() != 2 or weight.dtype not in dtypes.get(weight.device.type, ()):
            on_cuda = " or of float32 on cuda" if "cuda" in dtypes else ""
            raise ValueError(
                f"params: {cls.__name__} expects tables [rows, dim] of float32, float16 or bfloat16 on cpu"
                f"{on_cuda}, got {tuple(weight.shape)} {weight.dtype} on {weight.device}; "
                "mprec.optim.split_parameters(model) tells tables from other parameters"
            )
        if is_traceable_wrapper_subclass(weight):
            raise ValueError(
                f"params: expected tables that lie in memory as they are, got {type(weight).__name__}: what "
                "torch.distributed shards is for torch.optim"
            )
        if not weight.is_contiguous():
            raise ValueError(f"params: expected contiguous tables, got strides {weight.stride()}")

    def _init_state(self, weight: Tensor, group: dict) -> None:
        self.state[weight]["step"] = torch.zeros((), dtype=self._step_dtype(weight))
        for name in self._states:
            self.state[weight][name] = _zeros(weight, self._state_shape(weight))

    def _state_shape(self, weight: Tensor) -> tuple[int, int]:
        return tuple(weight.shape)

    @staticmethod
    def _step_dtype(weight: Tensor) -> torch.dtype:
        """torch's float32 ends at 2^24 steps; from there on every step would round by the same noise."""
        return torch.int64 if _is_narrow(weight) else torch.float32

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's. Takes the state of torch's optimizer of the same name too, and a table without state
        starts anew.

        Raises:
            ValueError: a state that this optimizer needs is missing, or not of the table's shape; nothing
                has been loaded then.
        """
        before = super().state_dict()
        self._load(state_dict)
        try:
            for group in self.param_groups:
                self._adopt_options(group)
                for weight in group["params"]:
                    self._adopt_state(weight, group)
        except ValueError:
            self._load(before)
            raise

    def _load(self, state_dict: dict) -> None:
        """torch's, which casts states to the table's dtype; those of 16-bit tables are taken as they came."""
        taken: list[dict] = []  # what hooks have made of it
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: taken.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved = [key for group in taken[0]["param_groups"] for key in group["params"]]
        for weight, key in zip(self._tables(), saved, strict=True):
            if _is_narrow(weight):
                of_table = taken[0]["state"].get(key, {})
                self.state[weight].update({name: of_table[name] for name in self._states if name in of_table})

    def _tables(self) -> list[Tensor]:
        """In the order of the groups, as a state_dict counts them."""
        return [weight for group in self.param_groups for weight in group["params"]]

    def _adopt_options(self, group: dict) -> None:
        """A loaded group's options, ours or those of torch's optimizer of the same name."""
        from_torch = not _IGNORED.isdisjoint(group) or "maximize" in group
        for name in sorted(_UNSUPPORTED & group.keys()):
            if group[name] and (from_torch or name not in self.defaults):
                raise ValueError(f"state_dict: {name}={group[name]} is not supported")
        for name in (_UNSUPPORTED | _IGNORED) - self.defaults.keys():
            group.pop(name, None)
        group.update({name: value for name, value in self.defaults.items() if name not in group})
        _check_rounding(group)
        for weight in group["params"]:
            _check_device(weight, group)

    def _adopt_state(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            self._init_state(weight, group)
            return
        shapes = {"step": (), **dict.fromkeys(self._states, self._state_shape(weight))}
        for name, shape in shapes.items():
            if name not in state:
                raise ValueError(
                    f"state_dict: no {name!r} for the table {tuple(weight.shape)}; "
                    f"{type(self).__name__} needs {', '.join(shapes)}"
                )
            dtype = self._step_dtype(weight) if name == "step" else torch.float32
            device = "cpu" if name == "step" else None
            value = torch.as_tensor(state[name], dtype=dtype, device=device)
            if value.shape != shape:
                raise ValueError(
                    f"state_dict: {name!r} of the table {tuple(weight.shape)}: expected shape {shape}, got "
                    f"{tuple(value.shape)}"
                )
            state[name] = value.contiguous()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "sharded": self.sharded, "in_backward": self.in_backward}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``torch.amp.GradScaler`` asks when it is to make a step; it knows no other question.

        Raises:
            RuntimeError: there is no gradient that it could have unscaled.
        """
        if self.in_backward and all(weight.grad is None for weight in self._tables()):
            raise RuntimeError(
                f"mprec.optim.{type(self).__name__} updates tables in the backward pass, where gradients are "
                "still scaled: torch.amp.GradScaler needs in_backward=False"
            )
        return False

    def check_ranks(self) -> None:
        """``RuntimeError`` if other processes train replicas of the tables that would not see an update."""
        ranks = torch.distributed
        if self.sharded or not ranks.is_available() or not ranks.is_initialized():
            return
        if (size := ranks.get_world_size()) > 1:
            raise RuntimeError(
                f"mprec.optim.{type(self).__name__} updates tables from gradients of its own process, and "
                f"torch.distributed runs {size}: replicas would drift apart. Give replicated tables "
                "in_backward=False, then DistributedDataParallel exchanges their gradients; or sharded=True "
                "if each process holds tables of its own"
            )

    def _hyperparameters(self, group: dict, step: int) -> tuple[float, float, float, float]:
        """(lr, eps, beta1, beta2) of the native update at the given step, counted from 1."""
        return self._rate(group, step), group.get("eps", 0.0), 0.0, 0.0

    def _rate(self, group: dict, step: int) -> float:
        """The learning rate at the given step."""
        return group["lr"]

    def apply_bags(
        self,
        weights: Sequence[Tensor],
        bags: Bags,
        grad: Tensor,
        columns: Sequence[int] | None = None,
    ) -> None:
        """Update ``weights`` with the gradient ``grad`` ``[B, total]`` of their pooled output.

        ``bags`` are those of the forward pass; on CUDA they may hold other features too. Table t's gradient
        stands at columns ``columns[t]`` and on (side by side if None), in float32 or the tables' type. Called
        by the backward pass of ``mprec.ops``. All tables must belong to one parameter group and, if a step's
        size or noise depends on it, have taken equally many steps; ``mprec.ops.fused`` sees to that.
        """
        group = self._group_of(weights[0])
        if weights[0].is_cuda:
            for weight in weights:
                _check_device(weight, group)
        states = [self.state[weight] for weight in weights]
        count_steps([state["step"] for state in states])
        step = int(states[0]["step"].item())
        lr, eps, *betas = self._hyperparameters(group, step)
        kinds = [[state[key] for state in states] for key in self._states]
        if weights[0].is_cuda:
            name, hyperparameters = self._on_device
            bags = bags.with_last_offset()
            getattr(torch.ops.mprec, name)(
                weights, *kinds, grad, bags.indices, bags.offsets, bags.mode, bags.per_sample_weights,
                bags.padding_idx, bags.served(len(weights)), bags.num_features, columns or [0],
                *({"lr": lr, "eps": eps}[key] for key in hyperparameters),
            )  # fmt: skip
            return
        keep = 1 - self._rate(group, step) * group["weight_decay"]
        noise = self._noise(weights, group, step)
        update_tables(self._rule, weights, kinds, bags, grad, columns, lr, eps, tuple(betas), keep, noise)
        mutated(*weights)

    def _noise(self, weights: Sequence[Tensor], group: dict, step: int) -> list[int] | None:
        """A key for each table; None where nothing is rounded stochastically."""
        if group["rounding"] != "stochastic" or {weight.dtype for weight in weights} == {torch.float32}:
            return None
        places = {id(weight): place for place, weight in enumerate(self._tables())}
        first = _noise_key(group["seed"], step)
        return [first + places[id(weight)] for weight in weights]

    def group_key(self, weight: Tensor) -> tuple[int, torch.dtype, int]:
        """Tables of equal keys can be updated by one call."""
        dtype = weight.dtype
        counts = self._counts_steps or dtype is not torch.float32
        step = int(self.state[weight]["step"].item()) if counts else 0
        return id(self._group_of(weight)), dtype, step

    def _group_of(self, weight: Tensor) -> dict:
        if len(self.param_groups) == 1:
            return self.param_groups[0]
        for group in self.param_groups:
            if any(weight is p for p in group["params"]):
                return group
        raise ValueError(f"the table {tuple(weight.shape)} does not belong to this optimizer")

    @torch.no_grad()
    def step(self, closure=None):
        """Apply the gradients in ``.grad``: those of ``in_backward=False``, and what came there by another
        way (under ``torch.compile``). Otherwise there are none: the backward pass has applied them.

        Sparse gradients update their rows, dense ones every row.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if weight.grad.is_sparse:
                    rows, values = weight.grad._indices()[0], weight.grad._values()
                else:
                    rows, values = torch.arange(len(weight), device=weight.device), weight.grad
                each = torch.arange(len(rows), device=weight.device)
                bags = Bags(rows.contiguous(), each, include_last_offset=False)
                self.apply_bags([weight], bags, values.contiguous())
        return loss


class SGD(_TableOptimizer):
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


class Adagrad(_TableOptimizer):
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
        _non_negative("lr_decay", lr_decay)
        _non_negative("initial_accumulator_value", initial_accumulator_value)
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


class RowWiseAdagrad(_TableOptimizer):
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


class Adam(_TableOptimizer):
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
