"""`deepspeed.utils.safe_get_full_fp32_param` and its kin for every trained parameter, active or not.

DeepSpeed looks at `param._z3_optimizer` at stage 3 and at `param._hp_mapping` with methods on the parameter below it
(deepspeed/utils/tensor_fragment.py). Here one object answers for all stages, so stage 0 answers too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from deepspeed import comm as dist
from torch.nn import Parameter

from hift_ds.shards import UnitShard, is_partitioned, slice_numel
from hift_ds.state.unit_state import UnitState

_NAMES = (
    "_z3_optimizer", "_hp_mapping", "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad",
)  # fmt: skip


class Fragments:
    """What `deepspeed.utils` calls. Whole tensors are collective: call on every rank, in the same order.

    A gradient is there from the last backward of a window to `step()`, for the active block alone (else `None`); as in
    DeepSpeed it still carries the loss scale. Setting a master weight sets the model weight too: an inactive block
    would otherwise take it only at the end of its next turn.

    Args:
        states: Of every trained parameter.
        device: Where tensors are given out.
        group: The data-parallel process group.
        settle: Called before a state is read or written: brings it up to date on the host.
        averaged: A block's averaged gradient shard, or `None` where there is none.
    """

    def __init__(
        self,
        states: Iterable[UnitState],
        device: torch.device,
        group: object,
        settle: Callable[[UnitState], None],
        averaged: Callable[[UnitShard], torch.Tensor | None],
    ) -> None:
        self._device, self._group, self._settle, self._averaged_of = device, group, settle, averaged
        self._place = {param: (s, i) for s in states for i, param in enumerate(s.shard.params)}

    def attach(self) -> None:
        """Puts on the parameters what DeepSpeed's functions look for."""
        for param in self._place:
            if is_partitioned(param):
                param._z3_optimizer = self
                continue
            vars(param).update(
                _hp_mapping=self,
                get_full_hp_param=partial(self.get_full_hp_param, param),
                set_full_hp_param=lambda value, key=None, param=param: self.set_full_hp_param(value, param, key),
                get_full_hp_grad=partial(self.get_fp32_grad_for_param, param),
                set_full_hp_grad=partial(self.set_fp32_grad_for_param, param=param),
            )

    def detach(self) -> None:
        """Takes it off again."""
        for param in self._place:
            for name in _NAMES:
                vars(param).pop(name, None)

    def get_full_hp_param(self, param: Parameter, optim_state_key: str | None = None) -> torch.Tensor:
        """The whole fp32 master weight, or one slot of the state, on the device. Collective."""
        return self._gathered(param, self.get_local_fp32_param(param, optim_state_key))

    @torch.no_grad()
    def set_full_hp_param(self, value: torch.Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Writes a whole master weight (and model weight) or a whole slot; every rank passes the same `value`."""
        self.set_local_hp_param(self._mine(param, value), param, optim_state_key)
        if optim_state_key is None and param.numel():  # at stage 3, where it is gathered now
            param.data.copy_(self._place[param][0].rounded(value).view(param.shape))

    def get_fp32_grad_for_param(self, param: Parameter) -> torch.Tensor | None:
        """The whole averaged gradient of an active parameter, in fp32; `None` where there is none. Collective."""
        local = self.get_local_fp32_grad_for_param(param)
        return None if local is None else self._gathered(param, local)

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: Parameter) -> None:
        """Overwrites the reduced gradient; every rank passes the same whole `value`."""
        self.set_local_grad_for_param(self._mine(param, value), param)

    def get_local_fp32_param(self, param: Parameter, optim_state_key: str | None = None) -> torch.Tensor:
        """This rank's slice of the master weight or of a slot: fp32, 1-D, without padding."""
        state, index = self._settled(param)
        return state.read(index, optim_state_key).to(self._device, torch.float32, copy=True)

    @torch.no_grad()
    def set_local_hp_param(self, value: torch.Tensor, param: Parameter, optim_state_key: str | None = None) -> None:
        """Overwrites this rank's slice; of the model weight too."""
        state, index = self._settled(param)
        state.write(index, optim_state_key, value)

    def _settled(self, param: Parameter) -> tuple[UnitState, int]:
        state, index = self._place[param]
        self._settle(state)
        return state, index

    def get_local_fp32_grad_for_param(self, param: Parameter) -> torch.Tensor | None:
        """This rank's slice of the averaged gradient, or `None`."""
        averaged = self._averaged(param)
        return None if averaged is None else averaged.to(torch.float32, copy=True)

    def set_local_grad_for_param(self, value: torch.Tensor, param: Parameter) -> None:
        """Overwrites this rank's slice of the gradient."""
        averaged = self._averaged(param)
        if averaged is None:
            raise RuntimeError(
                "no gradient to set: it is there from the window's last backward to engine.step(), and with "
                "hift.update 'backward' its update is made by then"
            )
        averaged.copy_(value.view(-1))

    def update_fp32_grad_for_param_vectorized(self, update: Callable, params: Iterable[Parameter]) -> None:
        """Replaces each gradient by `update(gradient, param)`. Collective."""
        for param in params:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update(gradient, param), param)

    def _averaged(self, param: Parameter) -> torch.Tensor | None:
        state, _ = self._place[param]
        averaged = self._averaged_of(state.shard)
        return None if averaged is None else self._slot(param, averaged)

    def _slot(self, param: Parameter, flat: torch.Tensor) -> torch.Tensor:
        state, index = self._place[param]
        segment = state.shard.segments[index]
        return flat[segment.offset : segment.offset + segment.numel]

    def _mine(self, param: Parameter, value: torch.Tensor) -> torch.Tensor:
        state, index = self._place[param]
        segment = state.shard.segments[index]
        return value.reshape(segment.shape).view(-1)[segment.start : segment.start + segment.numel]

    def _gathered(self, param: Parameter, local: torch.Tensor) -> torch.Tensor:
        state, index = self._place[param]
        shape, world = state.shard.segments[index].shape, state.shard.world
        if world == 1:
            return local.view(shape)
        padded = local.new_zeros(slice_numel(shape.numel(), world))
        padded[: local.numel()] = local
        whole = local.new_empty(world * padded.numel())
        dist.all_gather_into_tensor(whole, padded, group=self._group)
        return whole[: shape.numel()].view(shape)
