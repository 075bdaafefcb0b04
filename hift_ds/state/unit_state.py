"""Master weights and optimizer state of one layer unit's shard: on the host and streamed, or on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hift_ds.config.keys import StateConfig
from hift_ds.config.resolve import ResolvedConfig
from hift_ds.rules import Rule
from hift_ds.shards import UnitShard
from hift_ds.state.formats import (
    GROUP,
    MOMENT_DTYPES,
    SCALE_SUFFIX,
    decode_int8,
    encode_int8,
    join_split16,
    master_dtype,
    split_master,
)
from hift_ds.state.host_memory import HostMemory, Shapes
from hift_ds.state.ring import Ring, Tile, slot_bytes

TILE_NUMEL = 1 << 23  # elements of an update in one memory: bounds the fp32 copy of the gradient that eager rules make
TILE_BYTES = 32 << 20  # of a tile in a small ring: long enough for the bus
LARGEST_TILE_BYTES = 128 << 20  # where the ring has room for several: each costs the host some 0.1 ms of Python
RING_BYTES = 128 << 20  # the least that null allows for
TILE_MULTIPLE = 1024  # elements: whole groups of int8 moments, aligned for every dtype
MIN_SLOTS = 3  # one on its way in, one being updated, one on its way out
EXTRA_COPIES = 3  # of a block's factored moments on the device: this gradient's sums, those kept, those that result


@dataclass(frozen=True)
class Storage:
    """Where and how the state of units is kept.

    Attributes:
        device: Where updates run.
        state: How masters and moments are stored.
        memory: Allocates on the host; `None` = the device's memory is the home (a CPU run, `residency: device`).
        own_master: Keep an fp32 master even where the model weights are fp32 (updates on the host).
    """

    device: torch.device
    state: StateConfig = StateConfig()  # noqa: RUF009
    memory: HostMemory | None = None
    own_master: bool = False

    @classmethod
    def of(cls, config: ResolvedConfig, device: torch.device, planned: bool = False) -> Storage:
        """Of the units' state in a run; `planned`: for sizes alone, nothing is ever allocated."""
        if config.home == "device" or planned:
            return cls(device, config.hift.state, own_master=config.home == "host")
        return cls(device, config.hift.state, host_memory(config, device), own_master=config.home == "host")

    def shapes(self, shard: UnitShard, rule: Rule, param_groups: list[dict]) -> Shapes:
        """The state tensors of a unit, `master` first, then the rule's slots."""
        shapes: dict[str, tuple[int, torch.dtype]] = {}
        mixed = any(param.dtype != shard.dtype for param in shard.params)
        master = torch.float32 if self.own_master or mixed else master_dtype(self.state.master, shard.dtype)
        if master is not None:
            shapes["master"] = (shard.numel, master)
        slots = dict.fromkeys(slot for run in shard.runs for slot in rule.slots(param_groups[run.group]))
        for slot in slots:
            shapes[slot] = (shard.numel, MOMENT_DTYPES[self.state.moments])
            if self.state.moments == "int8":
                shapes[slot + SCALE_SUFFIX] = (-(-shard.numel // GROUP) + len(shard.runs), torch.float32)
        return shapes

    def num_bytes(self, shard: UnitShard, rule: Rule, param_groups: list[dict]) -> int:
        """Of the state of a unit."""
        extra = sum(tensor.nbytes for tensor in initial_extra(shard, rule, param_groups).values())
        return extra + sum(numel * dtype.itemsize for numel, dtype in self.shapes(shard, rule, param_groups).values())


def host_memory(config: ResolvedConfig, device: torch.device) -> HostMemory:
    """Page-locked where the config has it so and there is CUDA."""
    return HostMemory.pinned() if config.pin_memory and device.type == "cuda" else HostMemory()


class UnitState:
    """State of one layer unit: its tensors, small extra tensors, and `step`, the number of this unit's updates.

    What is always active has one, too.

    `torn`: an update has begun and not ended; masters, moments and model weights do not belong together.

    Args:
        shard: The unit's layout.
        rule: The update rule.
        param_groups: The hyper-parameter holder's param groups.
        storage: Where and how.
        tile_numel: Most elements of one tile.
    """

    def __init__(
        self,
        shard: UnitShard,
        rule: Rule,
        param_groups: list[dict],
        storage: Storage,
        tile_numel: int | None = None,
    ) -> None:
        self.shard, self.rule, self.storage = shard, rule, storage
        self._groups = param_groups
        shapes = storage.shapes(shard, rule, param_groups)
        if storage.memory is not None:
            self.tensors = storage.memory.arena(shapes)
        else:
            self.tensors = {n: torch.empty(s, dtype=dtype, device=storage.device) for n, (s, dtype) in shapes.items()}
        self.extra = self._allocated(initial_extra(shard, rule, param_groups))
        self.step = 0
        self.forgotten = False
        self.torn = False
        self.tiles = list(self._cut(TILE_NUMEL if tile_numel is None else tile_numel))
        self.refresh_master()
        self.reset()

    @property
    def master(self) -> torch.Tensor | None:
        """fp32 master weights, or the int16 remainders of `split16`; `None` where the model weights are the masters."""
        return self.tensors.get("master")

    @property
    def weights_count(self) -> bool:
        """Whether the model weights are the masters, or a part of them."""
        return self.master is None or self.master.dtype != torch.float32

    @property
    def slots(self) -> dict[str, torch.Tensor]:
        """The rule's state tensors by torch's names, and the scales of int8 moments."""
        return {name: tensor for name, tensor in self.tensors.items() if name != "master"}

    @property
    def streams(self) -> bool:
        """Whether the home is another memory than the device's."""
        return self.storage.memory is not None

    def reset(self) -> None:
        """Forgets moments and step count; the master weights stay."""
        self.step = 0
        for name, tensor in initial_extra(self.shard, self.rule, self._groups).items():
            self.extra[name].copy_(tensor)
        for name, tensor in self.tensors.items():
            if name.endswith(SCALE_SUFFIX):
                tensor.zero_()
        for tile in self.tiles:
            for name, value in tile.initial.items():
                tile.home[name].fill_(value)

    @contextmanager
    def counted(self) -> Iterator[bool]:
        """Around an update: counts it, and not if it ends with an error before it has touched anything.

        Yields:
            Whether moments begin anew (`forget`).
        """
        step, fresh = self.step, self.forgotten
        self.step, self.forgotten = step + 1, False
        try:
            yield fresh
        except BaseException:
            if not self.torn:
                self.step, self.forgotten = step, fresh
            raise

    def forget(self) -> None:
        """`reset` by the next update, which finds fresh moments in the ring; until then the host has the old ones.

        For a rule that visits each tile once: a second visit would find them fresh again.
        """
        self.step, self.forgotten = 0, True

    def refresh_master(self) -> None:
        """Takes the master weights anew from the model weights."""
        if self.master is None:
            return
        if self.master.dtype == torch.float32:
            self.shard.read_weights(self.master)
        else:
            self.master.zero_()

    def tile_of(self, run: int, span: slice) -> dict[str, torch.Tensor]:
        """The part of every tensor that belongs to a range of a run; it begins at a group of the run."""
        parts = {}
        start = self.shard.runs[run].start
        first = -(-start // GROUP) + run + (span.start - start) // GROUP  # no two runs share a group
        for name, tensor in self.tensors.items():
            if name.endswith(SCALE_SUFFIX):
                parts[name] = tensor[first : first + -(-(span.stop - span.start) // GROUP)]
            else:
                parts[name] = tensor[span]
        return parts

    def read(self, index: int, key: str | None) -> torch.Tensor:
        """One parameter's slice in fp32, without padding, 1-D: the master weight (`None`) or a slot.

        Raises:
            ValueError: No such slot.
        """
        self._check_key(key)
        here, weight = self._slice(index), self.shard.weight_slice(index)
        if key is None:
            if self.master is None:
                return weight.float()
            if self.master.dtype == torch.int16:
                return join_split16(weight, self.master[here].to(weight.device))
            return self.master[here]
        values = self.tensors[key][here]
        if values.dtype != torch.uint8:
            return values.float()
        run_index, run = next((i, r) for i, r in enumerate(self.shard.runs) if r.start <= here.start < r.stop)
        scales = self.tile_of(run_index, slice(run.start, run.stop))[key + SCALE_SUFFIX]
        return decode_int8(values, scales, here.start - run.start, signed=key != "exp_avg_sq")

    @torch.no_grad()
    def write(self, index: int, key: str | None, value: torch.Tensor) -> None:
        """The inverse of `read`; a master weight becomes the model weight of this rank's slice too.

        Raises:
            ValueError: No such slot, or one of 8-bit codes.
        """
        self._check_key(key)
        here, value = self._slice(index), value.view(-1)
        if key is None:
            self.write_master(index, 0, value)
            self.shard.weight_slice(index).copy_(self.rounded(value))
        elif self.tensors[key].dtype == torch.uint8:
            raise ValueError(f"optim_state_key={key!r}: hift.state.moments 'int8' can be read, not set; use 'bf16'")
        else:
            self.tensors[key][here].copy_(value)

    def write_master(self, index: int, first: int, value: torch.Tensor) -> None:
        """Elements of a parameter's slice from `first` on, in fp32; the model weight is the caller's."""
        start = self.shard.segments[index].offset + first
        if self.master is not None:
            part = split_master(value)[1] if self.master.dtype == torch.int16 else value
            self.master[start : start + value.numel()].copy_(part)

    def encode(self, slot: str, values: torch.Tensor) -> None:
        """A slot of 8-bit codes, all of it, from fp32 values of the shard's length."""
        for index, run in enumerate(self.shard.runs):
            span = slice(run.start, run.stop)
            codes, scales = encode_int8(values[span], signed=slot != "exp_avg_sq")
            home = self.tile_of(index, span)
            home[slot].copy_(codes)
            home[slot + SCALE_SUFFIX].copy_(scales)

    def rounded(self, master: torch.Tensor) -> torch.Tensor:
        """fp32 master weights as the model's, where copying them there would round otherwise than the update does."""
        return split_master(master)[0] if self.master is not None and self.master.dtype == torch.int16 else master

    @torch.no_grad()
    def adopt(self, index: int) -> None:
        """Takes over what has been written into a parameter's model weights: masters that do not round to them."""
        if self.master is None or self.weights_count:
            return
        weight, master = self.shard.weight_slice(index).to(self.master.device), self.master[self._slice(index)]
        torch.where(master.to(weight.dtype) == weight, master, weight.float(), out=master)

    @property
    def host_bytes(self) -> int:
        """Bytes that this state keeps on the host (0 for one that lives on an accelerator)."""
        return sum(tensor.nbytes for tensor in self.all_tensors() if tensor.device.type == "cpu")

    def all_tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state."""
        return [*self.tensors.values(), *self.extra.values()]

    def _allocated(self, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.storage.memory is None:
            return {name: tensor.to(self.storage.device, copy=True) for name, tensor in like.items()}
        arena = self.storage.memory.arena({name: (tensor.numel(), tensor.dtype) for name, tensor in like.items()})
        return {name: arena[name].view(tensor.shape) for name, tensor in like.items()}

    def _check_key(self, key: str | None) -> None:
        keys = [name for name in self.slots if not name.endswith(SCALE_SUFFIX)]
        if key is not None and key not in keys:
            raise ValueError(f"optim_state_key={key!r}: {self.rule.name} keeps {', '.join(keys) or 'no state'}")

    def _slice(self, index: int) -> slice:
        segment = self.shard.segments[index]
        return slice(segment.offset, segment.offset + segment.numel)

    def _cut(self, tile_numel: int) -> Iterator[Tile]:
        scales = {name: 0.0 for name in self.tensors if name.endswith(SCALE_SUFFIX)}
        for index, span in self.shard.tiles(tile_numel):
            group = self._groups[self.shard.runs[index].group]
            initial = {name: self.rule.initial_value(name, group) for name in self.rule.slots(group)}
            yield Tile(index, span, self.tile_of(index, span), scales | initial)


def part_of(tensors: Mapping[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
    """The part of a tile's tensors from an element to another; it begins with a group."""
    return {
        name: tensor[first // GROUP : -(-last // GROUP)] if name.endswith(SCALE_SUFFIX) else tensor[first:last]
        for name, tensor in tensors.items()
    }


def layout_fault(rule: Rule, param_groups: list[dict], states: Iterable[UnitState]) -> str | None:
    """What has been changed in the param groups during a run that the rule or the state's layout cannot follow."""
    try:
        for group in param_groups:
            rule.check_group(group)
    except (TypeError, ValueError) as error:
        return f"a param group was changed during the run: {error}"
    for state in states:
        for run in state.shard.runs:
            for slot in rule.slots(param_groups[run.group]):
                if slot not in state.slots:
                    return (
                        f"param group {run.group} was changed during the run and {rule.name} would need {slot!r} now, "
                        "which its state was laid out without: set it before hift_ds.initialize"
                    )
    return None


def initial_extra(shard: UnitShard, rule: Rule, param_groups: list[dict]) -> dict[str, torch.Tensor]:
    """A unit's state that is not shaped like its shard (Adafactor's factored moments), before the first update."""
    found: dict[str, torch.Tensor] = {}
    for run in shard.runs:
        found.update(rule.init_extra(run.segments, param_groups[run.group]))
    return found


def extra_bytes(extras: Iterable[dict[str, torch.Tensor]]) -> int:
    """Most bytes that such state, kept on the host, takes on the device during an update of any one unit."""
    return EXTRA_COPIES * max((sum(tensor.nbytes for tensor in extra.values()) for extra in extras), default=0)


@dataclass(frozen=True)
class RingSizes:
    """Sizes of a ring: `tile_numel` elements of state in a slot of `slot_bytes`, `num_slots` of them."""

    tile_numel: int
    slot_bytes: int
    num_slots: int


def card_bytes(device: torch.device) -> int | None:
    """Bytes of the card's memory, or of its part where `set_per_process_memory_fraction` sets one; `None` on a CPU."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def ring_limit(card_bytes: int | None) -> int:
    """Most bytes of the ring where `hift.state.ring_bytes` is null: a tenth of the card, never under 128 MiB.

    Args:
        card_bytes: Of the card's memory; `None` = not known, or there is none.
    """
    return max(RING_BYTES, (card_bytes or 0) // 10)


def size_ring(
    turns: Sequence[Sequence[tuple[UnitShard, Shapes]]], ring_bytes: int | None, beside: int = 0,
    card_bytes: int | None = None, least_slots: int = 1,
) -> RingSizes:  # fmt: skip
    """As large as what is updated at a time, at most: its slots serve what comes next, too; more would hide nothing.

    Args:
        turns: What streams: the units that are updated one right after the other, each with its state tensors.
        ring_bytes: `hift.state.ring_bytes`; `None` = `ring_limit`.
        beside: Bytes of it that state takes outside the ring (`extra_bytes`).
        card_bytes: As of `ring_limit`.
        least_slots: Slots that there are where the limit allows, however few tiles a turn has.

    Raises:
        ValueError: `ring_bytes` cannot hold three of the smallest tiles and what is beside them.
    """
    all_shapes = [unit for units in turns for unit in units]
    smallest = max((bytes_of_tile(shapes, TILE_MULTIPLE) for _, shapes in all_shapes), default=0)
    least = MIN_SLOTS * smallest
    limit = max(ring_limit(card_bytes) - beside, least) if ring_bytes is None else ring_bytes - beside
    if limit < least:
        raise ValueError(
            f"hift.state.ring_bytes={ring_bytes}: must be {least + beside} or more, three tiles of "
            f"{TILE_MULTIPLE} elements{f' and {beside} bytes of factored moments' if beside else ''}; null chooses "
            f"{ring_limit(card_bytes)} at most"
        )
    if smallest == 0:  # no state that streams: a rule without any, or Adafactor, on fp32 weights
        return RingSizes(TILE_NUMEL, 0, 0)
    largest = max(sum(bytes_of_tile(shapes, shard.numel) for shard, shapes in units) for units in turns)
    tile_bytes = max(min(TILE_BYTES, limit // MIN_SLOTS), min(LARGEST_TILE_BYTES, min(limit, largest) // 4))
    tile_numel = max(tile_bytes // smallest, 1) * TILE_MULTIPLE
    longest = max(run.stop - run.start for shard, _ in all_shapes for run in shard.runs)
    # Where all tiles have a slot, they are of one length: a last one half empty would take a whole slot.
    even = -(-longest // (-(-longest // tile_numel) * TILE_MULTIPLE)) * TILE_MULTIPLE
    for numel in (even, tile_numel):
        slot_bytes = max(bytes_of_tile(shapes, min(numel, longest)) for _, shapes in all_shapes)
        most_tiles = max(
            sum(-(-(run.stop - run.start) // numel) for shard, _ in units for run in shard.runs) for units in turns
        )
        if most_tiles * slot_bytes <= limit:
            break
    return RingSizes(numel, slot_bytes, min(limit // slot_bytes, max(most_tiles, least_slots)))


def ring_sizes(
    turns: Sequence[Sequence[UnitShard]],
    rule: Rule,
    param_groups: list[dict],
    storage: Storage,
    ring_bytes: int | None,
    card_bytes: int | None = None,
    least_slots: int = 1,
) -> RingSizes:
    """`size_ring` for units that are updated one right after the other.

    Raises:
        ValueError: As `size_ring`.
    """
    beside = extra_bytes(initial_extra(shard, rule, param_groups) for shards in turns for shard in shards)
    shapes = [[(shard, storage.shapes(shard, rule, param_groups)) for shard in shards] for shards in turns]
    return size_ring(shapes, ring_bytes, beside, card_bytes, least_slots)


def make_states(
    turns: Sequence[Sequence[UnitShard]],
    rule: Rule,
    param_groups: list[dict],
    storage: Storage,
    ring_bytes: int | None,
    card_bytes: int | None = None,
    least_slots: int = 1,
) -> tuple[list[UnitState], Ring | None]:
    """The states of units, in their order, and the ring that they stream through where they do.

    Raises:
        ValueError: As `size_ring`.
    """
    streams = storage.memory is not None and not storage.own_master
    sizes = RingSizes(TILE_NUMEL, 0, 0)
    if streams:
        sizes = ring_sizes(turns, rule, param_groups, storage, ring_bytes, card_bytes, least_slots)
    states = [UnitState(shard, rule, param_groups, storage, sizes.tile_numel) for shards in turns for shard in shards]
    return states, Ring(sizes.num_slots, sizes.slot_bytes, storage.device) if sizes.num_slots else None


def bytes_of_tile(shapes: Shapes, numel: int) -> int:
    """Bytes of a tile of so many elements in the ring."""
    groups = -(-numel // GROUP)
    return slot_bytes(
        (groups if name.endswith(SCALE_SUFFIX) else numel) * dtype.itemsize for name, (_, dtype) in shapes.items()
    )
