"""What every update rule offers, and the checks of hyper-parameters that they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hift_ds.shards import Segment

if TYPE_CHECKING:
    from hift_kernels.launching import Weights

Group = Mapping[str, Any]  # a torch param group
Tensors = Mapping[str, Tensor]  # state tensors by name
AllReduce = Callable[[Tensor], Any]
# Given whether tiles will be changed: each tile's first element in the run, and its master weights, or with them its
# model weights.
Visit = Callable[[bool], Iterator[tuple[int, Tensor]]]
VisitWeights = Callable[[bool], "Iterator[tuple[int, Weights]]"]
_WHERE = "change it in the config's optimizer.params or in the optimizer's param group"


class Rule(ABC):
    """The maths of one optimizer on a flat fp32 shard.

    A rule holds no tensors and no hyper-parameters that a param group holds: it may serve every block and group.

    Attributes:
        name: as in the config, in lower case.
        elementwise: True: `update()` may be called on any sub-range of the shard (a tile). False: only
            `update_run()` on a whole run, in the same order on every rank.
        moments: What `hift.state.moments` may be.
    """

    name: str
    elementwise: bool = True
    moments: tuple[str, ...] = ("fp32", "bf16")

    @abstractmethod
    def slots(self, group: Group) -> tuple[str, ...]:
        """Names (torch's) of the fp32 state tensors as long as the shard: 4 bytes a parameter each."""

    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """Hyper-parameters of a param group (torch's names, with "lr") as DeepSpeed gives them for empty "params"."""

    @abstractmethod
    def check_group(self, group: Group) -> None:
        """Refuse what this rule cannot do. A key that is absent has its default.

        Raises:
            TypeError: a hyper-parameter has the wrong type.
            ValueError: a hyper-parameter is impossible or not supported.
        """

    def update(self, master: Tensor, grad: Tensor, state: Tensors, group: Group, *, lr: float, step: int) -> None:
        """Update a tile's `master` and `state` in place. Of an elementwise rule. Not collective.

        Args:
            master: fp32, 1-D; padding is 0 and stays 0.
            grad: fp32, as long as `master`, unscaled, averaged and clipped. Overwritten.
            state: one tensor like `master` for each of `slots(group)`.
            group: its "lr" is not read.
            lr: the rate to use.
            step: counts this block's updates, this one included: 1 at the first.
        """
        raise NotImplementedError(f"{self.name} is updated by whole runs")

    def update_run(
        self, visit: Visit, grad: Tensor, group: Group, *, lr: float, step: int, segments: Sequence[Segment],
        extra: dict[str, Tensor], all_reduce: AllReduce,
    ) -> None:  # fmt: skip
        """`update` of a whole run, of a rule that is not elementwise. Collective: call on every rank.

        Args:
            visit: The run's tiles of master weights; may be visited more than once.
            grad: As for `update`, of the whole run.
            segments: What lies in the run.
            extra: What `init_extra()` returned, on any device; updated in place.
            all_reduce: Sums a tensor in place over the ranks that share the parameters.
        """
        raise NotImplementedError(f"{self.name} is updated tile by tile")

    def update_run_fused(
        self, visit: VisitWeights, grad: Tensor, group: Group, scalars: Tensor, *, seed: int, **options: Any
    ) -> None:
        """`update_run`, whose keywords `options` are, by the fused kernels; the rest is as of `update_fused`."""
        raise NotImplementedError(f"{self.name} is updated tile by tile")

    def prepared(self, group: Group) -> dict[str, Any]:
        """The hyper-parameters that `hift_kernels.grad_norm.prepare` takes into the kernel's vector of scalars."""
        return self.numbers(group, "weight_decay")

    def fused(self, group: Group, int8: bool) -> Callable[..., None]:
        """The launcher of the rule's kernel, for moments in 8 bits or wider, with the group's hyper-parameters."""
        raise NotImplementedError(f"{self.name} is updated by whole runs")

    def update_fused(
        self, grad: Tensor, weights: Weights, state: Tensors, group: Group, scalars: Tensor, seed: int = 0
    ) -> None:
        """`update` by the fused kernel: unscaling, clipping and the new model weights are in the same pass.

        Of an elementwise rule. Not collective.

        Args:
            grad: As reduced: any float dtype, scaled, not clipped. Left as it is.
            weights: Master and model weights in one of the kernels' forms.
            state: one tensor like `grad` for each of `slots(group)`, and the scales of 8-bit ones.
            scalars: from `hift_kernels.grad_norm.prepare` with `prepared(group)` and the rate to use.
            seed: draws stochastic rounding, where a form or a moment needs it.
        """
        slots = self.slots(group)
        moments: list[Any] = [state[slot] for slot in slots] or [None]  # SGD without momentum
        int8 = any(tensor.dtype == torch.uint8 for tensor in state.values())
        scales = [state[f"{slot}_scale"] for slot in slots] if int8 else []
        self.fused(group, int8)(grad, weights, *moments, *scales, scalars, seed=seed)

    def initial_value(self, slot: str, group: Group) -> float:
        """The value that fills a new state tensor."""
        return 0.0

    def init_extra(self, segments: Sequence[Segment], group: Group) -> dict[str, Tensor]:
        """State that does not follow the shard's elements: whole on every rank, CPU, fp32, keyed "<fqn>.<slot>"."""
        return {}

    def read(self, group: Group, key: str) -> Any:
        """The group's hyper-parameter, or its default where the optimizer that made the group has no such key."""
        return group[key] if key in group else self.defaults()[key]

    def number(self, group: Group, key: str) -> float:
        """The same of a number, which may be a one-element tensor."""
        return float(self.read(group, key))

    def numbers(self, group: Group, *keys: str) -> dict[str, Any]:
        """Several of them by name."""
        return {key: self.number(group, key) for key in keys}


def check_number(
    key: str, value: Any, *, low: float = 0.0, high: float = math.inf, open_low: bool = False, open_high: bool = False
) -> None:
    """Refuse a value that is not a finite number (or one-element tensor) between `low` and `high`.

    Raises:
        TypeError: not a number.
        ValueError: not finite, or outside the bounds.
    """
    bounds = []
    if low > -math.inf:
        bounds.append(f"{'>' if open_low else '>='} {low:g}")
    if high < math.inf:
        bounds.append(f"{'<' if open_high else '<='} {high:g}")
    allowed = f"a number {' and '.join(bounds)}" if bounds else "a finite number"
    is_scalar_tensor = isinstance(value, Tensor) and value.numel() == 1
    if not is_scalar_tensor and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{key}={value!r}: must be {allowed}; {_WHERE}.")
    number = float(value)
    too_low = number <= low if open_low else number < low
    too_high = number >= high if open_high else number > high
    if not math.isfinite(number) or too_low or too_high:
        raise ValueError(f"{key}={value!r}: must be {allowed}; {_WHERE}.")


def check_pair(key: str, value: Any) -> tuple[Any, Any]:
    """The two members of a list or tuple, unchecked.

    Raises:
        TypeError: not a list or tuple of two.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{key}={value!r}: must be a list of 2 numbers; {_WHERE}.")
    return value[0], value[1]


def check_betas(value: Any) -> None:
    """Refuse betas that are not two numbers in [0, 1).

    Raises:
        TypeError: not two numbers.
        ValueError: outside [0, 1).
    """
    for index, beta in enumerate(check_pair("betas", value)):
        check_number(f"betas[{index}]", beta, high=1.0, open_high=True)


def check_bool(key: str, value: Any) -> None:
    """Refuse a value that is not true or false (or 0 or 1, as DeepSpeed's optimizers store it).

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise TypeError(f"{key}={value!r}: must be true or false; {_WHERE}.")


def refuse_flags(group: Group, *keys: str) -> None:
    """Refuse variants of torch's optimizers that no rule implements.

    Raises:
        TypeError: a flag is neither true nor false.
        ValueError: a flag is on.
    """
    for key in keys:
        value = group.get(key)
        if value is not None:
            check_bool(key, value)
        if value:
            raise ValueError(f"{key}={value!r}: HiFT does not support it, only false; {_WHERE}.")
