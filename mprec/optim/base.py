"""What the optimizers share: taking over tables, their states, and handing gradients to the native pass."""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mprec import huge_pages
from mprec.bags import Bags
from mprec.ops import fused
from mprec.ops._common import NATIVE_TABLES, mutated
from mprec.ops._updates import count_steps, update_tables

__all__ = ["ROUNDINGS", "TableOptimizer", "non_negative"]

#: Options of torch's optimizers that would change an update here. Its weight decay is another one: of every
#: row, or part of the gradient.
_UNSUPPORTED = {"weight_decay", "maximize", "momentum", "nesterov", "amsgrad", "dampening"}
#: Options that have no meaning here.
_IGNORED = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
#: How rows of 16 bits are rounded.
ROUNDINGS = ("stochastic", "nearest")


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


def non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value


class TableOptimizer(torch.optim.Optimizer):
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
            non_negative(name, defaults.get(name, 0.0))
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
