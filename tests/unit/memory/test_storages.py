"""The meter of storages, against sums by hand."""

import gc

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.memory.storages import StorageMeter


def test_views_of_one_storage_count_once():
    meter = StorageMeter()
    with meter:
        base = torch.empty(4, 5)
        views = [base[1:], base.t(), base.view(-1), base.detach(), base.unsqueeze(0).expand(7, 4, 5)]
    assert (meter.current, meter.peak) == (80, 80)
    del base
    assert meter.current == 80, "a view keeps the storage"
    views.clear()
    assert (meter.current, meter.peak) == (0, 80)


def test_a_view_counts_its_whole_storage():
    meter, made_before = StorageMeter(), torch.empty(100)
    with meter:
        part = made_before[:2]
    assert part.nbytes == 8
    assert meter.current == 400


def test_operations_in_place_make_nothing():
    meter = StorageMeter()
    with meter:
        tensor = torch.zeros(6, dtype=torch.float64)
        tensor.add_(1).mul_(2)
        torch.add(tensor, 1, out=tensor)
    assert (meter.current, meter.peak) == (48, 48)


def test_peak_holds_what_was_alive_together_and_not_the_sum():
    meter = StorageMeter()
    with meter:
        first = torch.empty(10)
        del first
        second = torch.empty(30)
        third = torch.empty(5)
        del third
    assert (meter.current, meter.peak) == (120, 140)
    del second
    assert (meter.current, meter.peak) == (0, 140)


def test_temporaries_of_an_expression_are_in_the_peak():
    a = torch.ones(8)
    meter = StorageMeter()
    with meter:
        result = (a + 1) * (a + 2)  # two terms, then the product beside them
    assert (meter.current, meter.peak) == (32, 96)
    assert result.nbytes == 32


def test_all_tensors_of_a_result_count():
    meter = StorageMeter()
    with meter:
        values, indices = torch.arange(5.0).sort()
        pair = {"values": values, "indices": indices}
    assert meter.current == sum(tensor.nbytes for tensor in pair.values()) == 5 * 4 + 5 * 8


def test_meta_tensors_take_nothing():
    meter = StorageMeter()
    with meter:
        shape_only = torch.empty(100, device="meta")
        real = torch.empty_like(shape_only, device="cpu")
    assert meter.current == real.nbytes == 400


def test_after_restart_a_new_peak_begins_at_what_is_alive():
    meter = StorageMeter()
    with meter:
        kept = torch.empty(10)
        torch.empty(1000)
        meter.restart()
        assert meter.peak == 40
        small = torch.empty(1)
    assert meter.peak == 44
    assert kept.nbytes + small.nbytes == meter.current


def test_ignored_tensors_and_their_views_are_not_counted():
    weight = torch.ones(3, 4)
    meter = StorageMeter([weight])
    with meter:
        view = weight.t()
        weight.add_(1)
        product = view @ weight
    assert meter.current == product.nbytes == 64
    assert meter.made_at(weight) == 0, "made before everything"
    del weight, view
    assert meter.current == 64, "freeing what was never counted takes nothing off"


def test_add_counts_what_was_made_outside_once():
    batch = torch.empty(12, dtype=torch.int64)
    meter = StorageMeter()
    meter.add(batch)
    meter.add(batch[2:])
    meter.add(torch.empty(0))
    with meter:
        view = batch[1:]
    assert meter.current == 96
    del batch, view
    assert (meter.current, meter.peak) == (0, 96)


def test_made_at_and_peak_clock_tell_what_was_alive_at_the_peak():
    meter = StorageMeter()
    with meter:
        before = torch.empty(1)
        highest = torch.empty(100)
        kept = highest[:5].clone()  # the peak
        del highest
        after = torch.empty(2)
    assert [meter.made_at(tensor) for tensor in (before, kept, after)] == [1, 3, 4]
    assert meter.peak_clock == 3
    assert meter.made_at(kept[1:]) == 3, "a view is as old as its storage"
    assert meter.made_at(kept) <= meter.peak_clock < meter.made_at(after)


def test_a_peak_that_is_only_reached_again_keeps_its_first_time():
    meter = StorageMeter()
    with meter:
        first = torch.empty(10)
        clock = meter.peak_clock
        del first
        second = torch.empty(10)
    assert (meter.peak, meter.peak_clock) == (40, clock)
    assert meter.made_at(second) > clock


def test_restart_moves_the_peak_to_now():
    meter = StorageMeter()
    with meter:
        kept = [torch.empty(10), torch.empty(20)]
        torch.empty(100)
        meter.restart()
    assert meter.peak_clock == 3
    assert [meter.made_at(tensor) for tensor in kept] == [1, 2]


def test_gradients_of_a_backward_are_counted():
    weight = torch.ones(3, 4, requires_grad=True)
    meter = StorageMeter([weight])
    with meter:
        weight.square().sum().backward()
    gc.collect()
    assert meter.current == weight.grad.nbytes == 48
    weight.grad = None
    assert meter.current == 0


def test_fake_tensors_count_what_real_ones_would():
    def work() -> list[int]:
        meter, seen = StorageMeter(), []
        with meter:
            hidden = torch.ones(5, 7).softmax(-1)
            seen.append(meter.current)
            hidden = hidden @ torch.ones(7, 2, dtype=torch.float32)
            seen += [meter.current, meter.peak]
            return [*seen, hidden.nbytes]

    with FakeTensorMode():
        fake = work()
    assert fake == work() == [140, 40, 140 + 140, 40]
