"""The memory meter: what it finds are the tensors that exist, on every rank, by block, phase and role."""

from __future__ import annotations

import pytest
from hift_testing import meter_cases as cases

pytestmark = pytest.mark.multi_rank
ROLES = ("weights", "gradients", "state", "activations", "other")


@pytest.fixture(scope="module")
def metered(two_ranks):
    """Results by (stage, dtype, hift), each trained once."""
    found = {}

    def of(stage, dtype, hift):
        key = (stage, dtype, hift)
        if key not in found:
            found[key] = two_ranks.run(cases.metered, stage, dtype, {} if hift else None)
        return found[key]

    return of


@pytest.mark.parametrize(("stage", "dtype"), [(2, "bf16"), (3, "fp32")])
def test_roles_add_up_to_the_peak_and_weights_and_state_are_the_tensors(metered, stage, dtype):
    for facts in metered(stage, dtype, True):
        for sample in facts["samples"]:
            assert sum(sample[role] for role in ROLES) == sample["allocated"]
            assert sample["state"] == facts["state"]
            assert sample["activations"] > 0 and sample["gradients"] >= 0
        assert all(sample["gradients"] > 0 for sample in facts["samples"] if sample["phase"] == "backward")
        beside = {s["weights"] - facts["weights"] for s in facts["samples"] if s["phase"] == "update"}
        assert beside == {0}  # at stage 3 the next forward, not the update, gathers the small parameters


@pytest.mark.parametrize(("stage", "dtype"), [(2, "bf16"), (3, "fp32")])
def test_peaks_of_every_block_are_those_of_the_forecast(metered, stage, dtype):
    results = metered(stage, dtype, True)
    forecast = results[0]["forecast"]
    assert sorted(results[0]["peaks"]) == list(range(len(forecast)))
    for block, peak in results[0]["peaks"].items():
        assert abs(peak - forecast[block]) <= 0.02 * peak


def test_every_rank_gets_the_peaks_of_all_ranks_and_each_block_and_phase_has_one(metered):
    results = metered(2, "bf16", True)
    assert results[0]["report"] == results[1]["report"]
    ranks = results[0]["report"]["ranks"]
    assert [record["rank"] for record in ranks] == [0, 1]
    for record in ranks:
        found = [(sample["block"], sample["phase"]) for sample in record["samples"]]
        assert sorted(found) == sorted({(b, p) for b in range(6) for p in ("forward", "backward", "update")})
    assert results[0]["report"]["peak_allocated"] == max(s["allocated"] for r in ranks for s in r["samples"])


def test_a_cpu_s_figures_are_never_called_gpu_memory(metered):
    report, table = metered(2, "bf16", True)[0]["report"], metered(2, "bf16", True)[0]["table"]
    assert "not GPU memory" in report["kind"] and "not GPU memory" in table
    assert max(map(len, table.splitlines())) <= 80


def test_full_fine_tuning_is_measured_too_and_takes_more(metered):
    full, hift = metered(2, "bf16", False)[0], metered(2, "bf16", True)[0]
    assert {sample["block"] for sample in full["samples"]} == {-1}
    # One memory on a CPU: what HiFT saves there is gradients.
    assert full["report"]["peak_allocated"] > hift["report"]["peak_allocated"]
    numel = full["weights"] // 2  # in bf16; the few rotary frequencies make the difference
    assert all(abs(sample["state"] - 12 * numel // 2) < 2048 for sample in full["samples"])


def test_the_engine_is_as_before_after_the_meter_and_tensorboard_and_json_have_the_peaks(two_ranks, tmp_path):
    results = two_ranks.run(cases.metered, 1, "bf16", {}, str(tmp_path))
    assert all(facts["restored"] and facts["same"] for facts in results)
    assert len(results[0]["events"]) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    peaks = [event.value for event in events.Scalars("Memory/peak_allocated_bytes")]
    assert len(peaks) == 2 * 6
    assert max(peaks) == pytest.approx(max(s["allocated"] for s in results[0]["samples"]), rel=1e-6)
