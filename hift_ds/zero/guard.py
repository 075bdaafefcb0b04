"""What users do to a module while it trains: changes that cannot be followed, weights written, flags turned."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hift_ds.shards import UnitShard, full_numel, full_shape, is_partitioned

logger = logging.getLogger(__name__)


class ModuleGuard:
    """Compares a module with what it was at `initialize`; about 1 ms a step at 300 parameters, and no device work.

    Args:
        module: The user's.
        trained: Its trained parameters by name.
    """

    def __init__(self, module: torch.nn.Module, trained: dict[str, torch.nn.Parameter]) -> None:
        self._module, self._trained = module, trained
        self._known = set(module.parameters())
        self._facts = {param: _facts(param) for param in trained.values()}
        self._written = {param: _writes(param) for param in trained.values()}
        self._warned = self._renewed = False

    def fault(self) -> str | None:
        """What has been done to the module that its blocks cannot follow, as a sentence, or `None`."""
        present = {param: name for name, param in self._module.named_parameters()}
        for name, param in self._trained.items():
            if param not in present:
                return f"{name} is no longer a parameter of the module (resized or replaced?): {_ANEW}"
            if _facts(param) != self._facts[param]:
                was, now = (_described(facts) for facts in (self._facts[param], _facts(param)))
                return f"{name} was {was} at initialize and is {now} now: {_ANEW}"
        for added in present.keys() - self._known:
            return f"{present[added]} was added to the module after initialize and would never train: {_ANEW}"
        return None

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """An error of torch or ZeRO-3 inside is that of a changed parameter where there is one, or of `renew`."""
        try:
            yield
        except Exception as error:
            fault = self.fault()
            if fault is None and self._renewed and "modified by an inplace operation" in str(error):
                fault = _NEEDS_OLD
            if fault is None:
                raise
            raise RuntimeError(fault) from error

    def written(self, shard: UnitShard) -> list[int]:
        """Indices of parameters of a block whose weights the user has written since `note`; notes them."""
        found = [index for index, param in enumerate(shard.params) if _writes(param) != self._written[param]]
        self.note(shard)
        return found

    def note(self, shard: UnitShard) -> None:
        """The present weights of a block are its masters' (an update, a load)."""
        self._written.update((param, _writes(param)) for param in shard.params)

    def renew(self, shard: UnitShard) -> None:
        """A unit's weights are new while a backward goes on: where it still needs the old ones, torch says so."""
        self._renewed = True
        if shard.world == 1 or not is_partitioned(shard.params[0]):  # else backward has gathered copies of its own
            for param in shard.params:
                torch.autograd.graph.increment_version(param)
        self.note(shard)

    def stop_inactive(self, active: set[torch.nn.Parameter]) -> None:
        """Before a forward or a save: `requires_grad_(True)` on anything else would cost gradients that nobody uses."""
        stray = [param for param in self._known if param.requires_grad and param not in active]
        for param in stray:
            param.requires_grad_(False)
        if stray:
            self._warn("True", "only the active block has gradients")

    def warn_of_stopped(self, active: set[torch.nn.Parameter]) -> None:
        """At a step: `requires_grad_(False)` on the active block does not last."""
        if not all(param.requires_grad for param in active):
            self._warn("False", "a parameter that is never to train belongs into hift.frozen")

    def _warn(self, flag: str, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "requires_grad was set to %s from outside on parameters of the model: the rotation sets it anew at "
                "each turn (%s)", flag, why,
            )  # fmt: skip


_NEEDS_OLD = (
    "hift.update='backward': this backward needs weights that are updated already, because the update of this window "
    "is made (its last micro step has one backward: add losses up) or because the model uses a weight where it gets no "
    'gradient, as under detach(), too; for such a loop or model use "update": "step"'
)
_ANEW = "a run's blocks, state and shards are laid out once; call engine.destroy() and hift_ds.initialize again"


def _facts(param: torch.nn.Parameter) -> tuple[tuple[int, ...], torch.dtype, torch.device, bool]:
    held = getattr(param, "ds_tensor", param) if is_partitioned(param) else param
    return tuple(full_shape(param)), held.dtype, held.device, held.is_contiguous()


def _described(facts: tuple[tuple[int, ...], torch.dtype, torch.device, bool]) -> str:
    shape, dtype, device, contiguous = facts
    order = "" if contiguous else ", not contiguous"
    return f"{list(shape)} in {str(dtype).removeprefix('torch.')} on {device}{order}"


def _writes(param: torch.nn.Parameter) -> tuple[int, int]:
    """Changes when weights are written in place under torch's eyes (HiFT writes through `.data`), or replaced.

    At stage 3 `deepspeed.zero.GatheredParameters` writes what its modifier rank has changed into `ds_tensor`.
    """
    held = param.ds_tensor if is_partitioned(param) else param
    return param._version + held._version, held.data_ptr() if full_numel(param) else 0
