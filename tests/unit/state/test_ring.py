"""The ring: whatever the speed of its three queues, every update reads what the last one has written."""

from itertools import permutations

import pytest
import torch
from hift_testing.delayed_lanes import drain, lazy_copies, queued

from hift_ds.state import ring as ring_module
from hift_ds.state.ring import TURN_BYTES, CudaLane, Lanes, Ring, Tile, slot_bytes

CPU = torch.device("cpu")
LANES = ("copy_in", "update", "copy_out")
NUMEL = 8  # elements of a tile


def blocks_of(counts: list[int]) -> list[list[Tile]]:
    """Blocks of so many tiles, each of an fp32 and an int16 tensor; every element is different."""
    blocks, value = [], 0
    for count in counts:
        wide = torch.arange(value, value + count * NUMEL, dtype=torch.float32)
        narrow = torch.arange(value, value + count * NUMEL).to(torch.int16)
        value += count * NUMEL
        spans = [slice(index * NUMEL, (index + 1) * NUMEL) for index in range(count)]
        initial = {"narrow": 5}
        blocks.append([Tile(0, span, {"wide": wide[span], "narrow": narrow[span]}, initial) for span in spans])
    return blocks


def update(tensors: dict[str, torch.Tensor], step: int) -> None:
    tensors["wide"].mul_(2).add_(step)
    tensors["narrow"].mul_(3).sub_(step)


def contents(blocks: list[list[Tile]]) -> list[list[torch.Tensor]]:
    return [[tensor.clone() for tile in tiles for tensor in tile.home.values()] for tiles in blocks]


def run(blocks, turns, num_slots, lanes, writes=None, prefetch=True, fresh=(), foreseen=None) -> Ring:
    """One turn after the other, all of it only queued; `fresh`: steps before which state begins anew, `foreseen`: at
    which the ring is told so in advance (by default the same)."""
    ring = Ring(num_slots, slot_bytes((4 * NUMEL, 2 * NUMEL)), CPU, lanes)
    foreseen = fresh if foreseen is None else foreseen
    for step, block in enumerate(turns):
        for _, tensors in ring.visit(blocks[block], writes is None or writes[step], step in fresh):
            lanes.update.run(lambda tensors=tensors, step=step: update(tensors, step))
        if prefetch and step + 1 < len(turns):
            ring.prefetch(blocks[turns[step + 1]], step + 1 in foreseen)
    return ring


def expected(counts, turns, writes=None, fresh=()):
    blocks = blocks_of(counts)
    for step, block in enumerate(turns):
        for tile in blocks[block]:
            for name, value in tile.initial.items() if step in fresh else ():
                tile.home[name].fill_(value)
            if writes is None or writes[step]:
                update(tile.home, step)
    return contents(blocks)


def same(found, wanted) -> bool:
    return all(torch.equal(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))


PROGRAMS = [
    ([3, 3, 3], [0, 1, 2, 0, 1, 2]),
    ([5, 1, 2], [0, 1, 2, 2, 1, 0, 0]),
    ([2], [0, 0, 0, 0]),  # one block: its next turn begins before its last copies out have landed
    ([2, 3], [0, 0, 0, 1, 1, 1, 0]),
]


@pytest.mark.parametrize("order", list(permutations(LANES)), ids="-".join)
@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("counts", "turns"), PROGRAMS)
def test_state_is_that_of_updates_one_after_the_other_however_slow_a_queue_is(counts, turns, num_slots, order):
    for prefetch in (True, False):
        blocks, lanes = blocks_of(counts), queued()
        run(blocks, turns, num_slots, lanes, prefetch=prefetch)
        drain(lanes, order)
        assert same(contents(blocks), expected(counts, turns))


@pytest.mark.parametrize("order", list(permutations(LANES)), ids="-".join)
def test_a_visit_that_does_not_write_leaves_the_host_as_it_was(order):
    turns, writes = [0, 0, 1, 1, 0, 0], [False, True, False, True, False, True]
    blocks, lanes = blocks_of([3, 2]), queued()
    run(blocks, turns, 4, lanes, writes)
    drain(lanes, order)
    assert same(contents(blocks), expected([3, 2], turns, writes))


@pytest.mark.parametrize("order", list(permutations(LANES)), ids="-".join)
@pytest.mark.parametrize("num_slots", [1, 3, 7])
@pytest.mark.parametrize("foreseen", [None, (), (1, 2, 4)])
def test_a_fresh_state_is_filled_on_the_device_whatever_was_loaded_ahead(num_slots, order, foreseen):
    counts, turns, fresh = [5, 2], [0, 0, 1, 1, 0, 0], (0, 2, 4)
    for prefetch in (True, False):
        blocks, lanes = blocks_of(counts), queued()
        run(blocks, turns, num_slots, lanes, prefetch=prefetch, fresh=fresh, foreseen=foreseen)
        drain(lanes, order)
        assert same(contents(blocks), expected(counts, turns, fresh=fresh))


def test_of_a_fresh_state_only_masters_are_copied_to_the_device(monkeypatch):
    copied, original = [], ring_module._copy
    monkeypatch.setattr(ring_module, "_copy", lambda s, t: (copied.append(sorted(s)), original(s, t)))
    blocks, lanes = blocks_of([2]), queued()
    run(blocks, [0], 2, lanes, fresh=(0,))
    drain(lanes, ("copy_in", "update", "copy_out"))
    assert sorted(copied) == [["narrow", "wide"]] * 2 + [["wide"]] * 2, "and both back"


def test_the_copies_streams_keep_the_buffer_from_other_owners():
    lanes = queued()
    ring = Ring(2, 256, CPU, lanes)
    for lane in (lanes.copy_in, lanes.copy_out):
        (used,) = lane.used
        assert used is ring.buffer


def corrupted(lanes: Lanes, num_slots: int, writes=None) -> bool:
    """Whether some order of the queues gives another state."""
    counts, turns = [2, 3], [0, 0, 1, 1, 0, 0]
    found = []
    for order in permutations(LANES):
        blocks, fresh = blocks_of(counts), queued({lane.name: lane.deaf_to for lane in vars(lanes).values()})
        run(blocks, turns, num_slots, fresh, writes)
        drain(fresh, order)
        found.append(same(contents(blocks), expected(counts, turns, writes)))
    return not all(found)


@pytest.mark.parametrize("num_slots", [2, 3, 4])
def test_nothing_is_corrupted_with_all_events(num_slots):
    assert not corrupted(queued(), num_slots)
    assert not corrupted(queued(), num_slots, writes=[False, True] * 3)


def test_without_the_event_of_a_copy_in_an_update_reads_too_early():
    assert corrupted(queued({"update": ["copy_in"]}), 3)


def test_without_the_event_of_an_update_a_copy_out_takes_old_values():
    assert corrupted(queued({"copy_out": ["update"]}), 3)


def test_without_the_event_of_a_copy_out_a_copy_in_overtakes_it():
    assert corrupted(queued({"copy_in": ["copy_out"]}), 3)


def test_without_the_event_of_an_update_a_copy_in_takes_a_slot_that_is_still_read():
    assert corrupted(queued({"copy_in": ["update"]}), 2, writes=[False, True] * 3)


def test_without_the_event_of_its_last_copy_out_a_tile_is_read_too_early(monkeypatch):
    monkeypatch.setattr(Tile, "written", property(lambda self: None, lambda self, event: None), raising=False)
    assert corrupted(queued(), 4)


def test_without_the_event_that_frees_a_slot_it_is_overwritten(monkeypatch):
    monkeypatch.setattr(ring_module._Slot, "free", property(lambda self: self.first, keep_first), raising=False)
    assert corrupted(queued(), 3)


def keep_first(slot, event) -> None:
    if not hasattr(slot, "first"):
        slot.first = event


def test_settle_brings_the_host_up_to_date_and_forgets_what_was_loaded_ahead():
    blocks, lanes = blocks_of([3, 3]), lazy_copies()
    ring = run(blocks, [0], 3, lanes)
    ring.prefetch(blocks[1])
    ring.settle()
    assert same(contents(blocks), expected([3, 3], [0]))
    for tile in blocks[1]:
        tile.home["wide"].zero_()  # a checkpoint is loaded
    for tile, tensors in ring.visit(blocks[1]):
        assert torch.equal(tensors["wide"], torch.zeros(NUMEL)), tile
    ring.settle()


def test_loads_run_ahead_as_far_as_there_are_slots():
    blocks, lanes = blocks_of([5]), queued()
    ring = Ring(3, slot_bytes((4 * NUMEL, 2 * NUMEL)), CPU, lanes)
    loads = lambda: sum(callable(item) for item in lanes.copy_in.items)  # noqa: E731
    ring.prefetch(blocks[0])
    assert loads() == 3
    ahead = []
    for _ in ring.visit(blocks[0]):
        ahead.append(loads())
    assert ahead == [3, 4, 5, 5, 5]


def test_the_ring_takes_one_allocation_and_no_more():
    blocks, lanes = blocks_of([6]), queued()
    ring = run(blocks, [0, 0], 2, lanes)
    assert ring.nbytes == 2 * slot_bytes((4 * NUMEL, 2 * NUMEL))
    storages = {
        tensor.untyped_storage().data_ptr() for _, tensors in ring.visit(blocks[0]) for tensor in tensors.values()
    }
    assert storages == {ring.buffer.untyped_storage().data_ptr()}


def test_a_ring_tells_its_lanes_what_they_have_copied():
    lanes, blocks = queued(), blocks_of([3, 2])
    run(blocks, [0, 1, 0], 2, lanes, writes=[True, False, True])
    sizes = [sum(tile.nbytes for tile in tiles) for tiles in blocks]
    assert lanes.copy_in.copied_bytes == 2 * sizes[0] + sizes[1]
    assert lanes.copy_out.copied_bytes == 2 * sizes[0]
    assert lanes.update.copied_bytes == 0


def test_a_lane_of_the_device_gives_others_a_turn_after_so_many_bytes():
    lane = CudaLane.__new__(CudaLane)  # without a device
    lane._since, lane._turn, lane.run = 0, torch.zeros(1), lambda work: work()
    given = []
    for nbytes in (TURN_BYTES - 1, 1, TURN_BYTES // 2, TURN_BYTES // 2, 3 * TURN_BYTES, 5):
        lane.copied(nbytes)
        given.append(lane._turn.item())
    assert given == [0, 1, 1, 2, 3, 3]
