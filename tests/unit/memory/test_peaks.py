"""What the allocator alone knows: active, reserved and requested bytes beside allocated ones, and never on a CPU."""

import io

import torch
from rich.console import Console

from hift_ds.memory.peak_meter import _CudaProbe
from hift_ds.memory.peaks import ON_CPU, ON_CUDA, RankRecord, Report, Sample

MIB = 1 << 20


def sample(allocated, block=0, phase="backward", **of_allocator):
    return Sample(block, phase, allocated, allocated, 0, 0, 0, 0, **of_allocator)


def report_of(kind, *ranks):
    return Report(tuple(RankRecord(i, "node", "card", kind, samples) for i, samples in enumerate(ranks)), ("a", "b"))


def on_cuda():
    low = (sample(3 * MIB, active=5 * MIB, reserved=8 * MIB, requested=2 * MIB),)
    high = (
        sample(4 * MIB, active=4 * MIB, reserved=6 * MIB, requested=3 * MIB),
        sample(1 * MIB, 1, active=7 * MIB, reserved=6 * MIB, requested=1 * MIB),
    )
    return report_of(ON_CUDA, low, high)


def rows_of(report):
    console = Console(file=io.StringIO(), width=80)
    console.print(report.table())
    return {line.split()[0]: line.split()[1:] for line in console.file.getvalue().splitlines() if line.strip()}


def test_the_probe_asks_the_allocator_for_peaks_that_torch_documents(monkeypatch):
    peaks = {"allocated": 4, "active": 5, "reserved": 6, "requested": 3}
    statistics = {f"{name}_bytes.all.peak": peak for name, peak in peaks.items()}
    statistics |= {f"{name}_bytes.all.current": 0 for name in peaks}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: statistics)
    assert _CudaProbe(torch.device("cuda")).read() == peaks
    for name in peaks:
        assert f'"{name}_bytes.{{all,' in torch.cuda.memory.memory_stats.__doc__


def test_of_two_turns_the_higher_stays_with_the_most_of_each_figure_of_the_allocator():
    first = sample(4, active=9, reserved=10, requested=3)
    second = sample(5, active=6, reserved=12, requested=4)
    assert first.joined(second) == second.joined(first) == sample(5, active=9, reserved=12, requested=4)
    assert sample(4).joined(sample(5)) == sample(5)


def test_a_report_has_the_most_of_each_on_any_rank_and_block():
    report = on_cuda()
    assert report.of_allocator() == {"active": 7 * MIB, "reserved": 8 * MIB, "requested": 3 * MIB}
    assert report.block_peaks("requested") == {0: 3 * MIB, 1: 1 * MIB}
    content = report.to_json()
    assert (content["peak_active"], content["peak_reserved"], content["peak_requested"]) == (7 * MIB, 8 * MIB, 3 * MIB)
    assert Report.from_json(content) == report


def test_the_table_shows_active_and_reserved_beside_allocated():
    rows = rows_of(on_cuda())
    assert rows["allocated"] == ["3.0", "3.5", "4.0", "1", "a"]
    assert rows["active"] == ["5.0", "6.0", "7.0", "1", "b"]
    assert rows["reserved"] == ["6.0", "7.0", "8.0", "0", "a"]


def test_without_an_allocator_to_ask_there_is_nothing_in_their_place():
    report = report_of(ON_CPU, (sample(3 * MIB),))
    assert report.of_allocator() == {"active": None, "reserved": None, "requested": None}
    assert report.to_json()["peak_reserved"] is None
    assert not {"active", "reserved"} & rows_of(report).keys()


def test_a_report_from_before_there_were_these_figures_is_read():
    content = on_cuda().to_json()
    for record in content["ranks"]:
        for one in record["samples"]:
            del one["active"], one["requested"]
    report = Report.from_json(content)
    assert report.of_allocator() == {"active": None, "reserved": 8 * MIB, "requested": None}
