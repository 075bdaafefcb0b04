"""The states of a run: of every unit and of what is always active, with the ring, and whether they can be read now."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterable, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.config.resolve import ResolvedConfig
from hift_ds.distributed import agree, of_all_ranks
from hift_ds.rotation.blocks import BlockPlan
from hift_ds.rotation.param_groups import group_indices
from hift_ds.shards import UnitShard
from hift_ds.state.host_memory import available_bytes, require_host_memory
from hift_ds.state.unit_state import MIN_SLOTS, Storage, UnitState, card_bytes, make_states
from hift_ds.zero.offload import WEIGHTS, Offloaded


def turns(shards: Sequence[Sequence[UnitShard]], config: ResolvedConfig) -> list[list[UnitShard]]:
    """The units of all blocks, those together whose updates come right after one another: what the ring can hold."""
    if config.hift.update == "backward":
        return [[shard] for of_block in shards for shard in of_block]
    return [list(of_block) for of_block in shards]


def least_slots(config: ResolvedConfig) -> int:
    """Of the ring: in backward one unit's state comes while another's is updated and a third's goes."""
    return MIN_SLOTS if config.hift.update == "backward" else 1


class States:
    """Masters and moments.

    Args:
        plan: Blocks and always-active parameters.
        params: Every trained parameter by name.
        param_groups: The hyper-parameter holder's.
        config: The run's.
        device: Where updates run.
        group: The data-parallel process group.

    Attributes:
        blocks: Of each block by index, its units' in the order in which they are updated: as backward comes to them.
        units: Of all blocks.
        always: Of the always-active parameters, on the device; `None` without any.
        ring: What streams through it; `None` where nothing does.
    """

    def __init__(
        self, plan: BlockPlan, params: dict[str, torch.nn.Parameter], param_groups: list[dict], config: ResolvedConfig,
        device: torch.device, group: object,
    ) -> None:  # fmt: skip
        group_of = group_indices(param_groups, params)
        rank = dist.get_rank(group=group) if config.shard_world > 1 else 0

        def shard(fqns: tuple[str, ...]) -> UnitShard:
            return UnitShard([(fqn, params[fqn]) for fqn in fqns], group_of, config.shard_world, rank)

        shards = [[shard(unit.fqns) for unit in reversed(block.units)] for block in plan.blocks]
        storage = Storage.of(config, device)
        if storage.memory is not None or device.type == "cpu":
            needed = sum(storage.num_bytes(each, config.rule, param_groups) for units in shards for each in units)
            require_host_memory(of_all_ranks((socket.gethostname(), needed, available_bytes())))
        self.units, self.ring = agree(
            lambda: make_states(
                turns(shards, config), config.rule, param_groups, storage, config.hift.state.ring_bytes,
                card_bytes(device), least_slots(config),
            )
        )  # fmt: skip
        of_shard = {id(state.shard): state for state in self.units}
        self.blocks = [[of_shard[id(shard)] for shard in of_block] for of_block in shards]
        self.always: UnitState | None = None
        if plan.always_active:
            on_device = Storage(device, config.hift.state)
            self.always = UnitState(shard(plan.always_active), config.rule, param_groups, on_device)
        self.offloaded = Offloaded(device)
        self._device = device

    def clear(self) -> None:
        """Frees everything."""
        self.blocks, self.units, self.always, self.ring = [], [], None, None

    @property
    def all(self) -> list[UnitState]:
        """Of the units, then of what is always active."""
        return self.units if self.always is None else [*self.units, self.always]

    def training(self, block: int) -> list[UnitState]:
        """Of what trains in a block's turn: its units, then what is always active."""
        return self.blocks[block] if self.always is None else [*self.blocks[block], self.always]

    def require_here(self, *kinds: str) -> None:
        """Raises RuntimeError while one of these kinds, or any without them, is offloaded."""
        if self.offloaded.kinds.intersection(kinds or self.offloaded.kinds):
            raise RuntimeError("states are offloaded (engine.offload_states): call engine.reload_states() first")

    def require_whole(self) -> None:
        """Raises RuntimeError where an update has ended with an error half way (out of memory)."""
        for state in self.all:
            if state.torn:
                index = next((index for index, states in enumerate(self.blocks) if state in states), None)
                block = "what is always active" if index is None else f"block {index}"
                raise RuntimeError(
                    f"the update of {block} ended with an error half way, so its masters, moments and weights do not "
                    "belong together: load a checkpoint, or call engine.destroy() and hift_ds.initialize again, which "
                    "goes on from the weights as they are, some of them a step ahead"
                )

    def settle(self) -> None:
        """Until all updates have landed where the states are at home."""
        if self.ring is not None:
            self.ring.settle()
        if self._device.type == "cuda":  # extra tensors go back to the host with the update itself
            torch.cuda.current_stream(self._device).synchronize()

    def offload(self, kinds: set[str], weights: Iterable[torch.Tensor], pin_memory: bool) -> None:
        """What of some kinds is on the device goes to the host, until `offloaded.reload`.

        Args:
            kinds: Of `OffloadStateTypeEnum`, that are not there already.
            weights: The model's, for their kind.
        """
        resident = [state for state in self.all if not state.streams]
        if "hp_params" in kinds:
            masters = [state.master for state in resident if state.master is not None]
            self.offloaded.take_states("hp_params", masters, pin_memory)
        if "optim_states" in kinds:
            moments = [tensor for state in resident for tensor in (*state.slots.values(), *state.extra.values())]
            ring = [] if self.ring is None else [self.ring.buffer]
            self.offloaded.take_states("optim_states", [*moments, *ring], pin_memory)
        if WEIGHTS in kinds:
            self.offloaded.take_weights(weights, pin_memory)
        gc.collect()
        get_accelerator().empty_cache()


