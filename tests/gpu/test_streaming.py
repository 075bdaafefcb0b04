"""On a CUDA device (`make gpu`): real streams, real page-locking, and torch's own alarm for every wait."""

import pytest
import torch
from hift_testing import gpu_cases as cases

from hift_ds.config.keys import StateConfig

pytestmark = pytest.mark.gpu
TURNS = [0, 1, 2, 0, 1, 1, 1, 2, 2, 0, 0, 1]
SMALLEST = 3 * 3 * 4 * 1024


def same(found, wanted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("form", [StateConfig(), StateConfig("split16", "bf16"), StateConfig("none", "int8")], ids=str)
@pytest.mark.parametrize("ring_bytes", [SMALLEST, 10 * SMALLEST, None])
def test_streamed_state_has_the_bits_of_resident_state(form, ring_bytes):
    """With random rounding, too: it is drawn by position in the shard, and tiles are cut alike."""
    for _ in range(5):
        streamed = cases.trained(form, True, TURNS, ring_bytes)
        assert same(streamed, cases.trained(form, True, TURNS, ring_bytes))
    if form.master == "fp32" and form.moments == "fp32":
        assert same(streamed, cases.trained(form, False, TURNS))


def test_state_takes_no_more_of_the_device_than_the_ring():
    facts = cases.device_bytes_of_state(SMALLEST)
    assert facts["ring"] <= facts["allowed"]
    assert facts["state"] <= facts["allowed"] + 64 * 1024, facts  # scalars and allocator's rounding


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("hift", [{}, {"state": {"master": "split16"}}, {"always_active": ["norm"]}], ids=str)
def test_a_fused_step_never_waits_for_the_device(one_rank, stage, hift):
    """At stage 3 DeepSpeed itself waits where it gathers persistent parameters."""
    hift = {**hift, "kernel": "triton"}
    (facts,) = one_rank.run(cases.engine_steps, stage, "bf16", hift, 13, strict=stage < 3)
    assert facts["pinned"]


@pytest.mark.parametrize("reads", [False, True], ids=["", "loss.item()"])
def test_the_compute_stream_does_not_wait_until_state_is_on_the_host(one_rank, reads):
    """Copies in one direction are made one after the other, whatever their streams: 0.8 GB take 15 ms of the bus."""
    (found,) = one_rank.run(cases.copies_out_behind_a_step, 4096, 8, reads)
    assert found[2:] == [True] * 6  # the first compile


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("stage", range(4))
def test_streaming_trains_as_resident_state_does(one_rank, stage, kernel):
    runs = []
    for residency in ("stream", "device"):
        hift = {"kernel": kernel, "state": {"residency": residency}}
        runs += one_rank.run(cases.engine_steps, stage, "fp32", hift, 13, strict=False)
    for name, weight in runs[0]["weights"].items():
        assert torch.equal(weight, runs[1]["weights"][name]), name
