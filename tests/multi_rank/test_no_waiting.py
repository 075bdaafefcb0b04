"""A fused step leaves norm, clipping and the checks on the device: the host hears of them one step later."""

import copy
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hift_testing.disturbed import branch_steps, poisoned_run, ranks_disagree, stopped_run
from hift_testing.parity import RULES
from hift_testing.selection import slow
from hift_testing.training import batch_of, ds_config, engine_of

pytestmark = pytest.mark.multi_rank

FUSED = {"kernel": "triton"}
STEPS = 6  # two rotations of three blocks
# Each of these brings a value to the host (or, on a CUDA device, a host value there) and waits for the device.
OF_TENSORS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__",
)  # fmt: skip
OF_TORCH = ("tensor", "as_tensor", "from_numpy", "equal", "allclose", "nonzero")


@contextmanager
def waits() -> Iterator[list[tuple[str, torch.Tensor | None, str]]]:
    """Calls that would wait for a CUDA device: name, tensor, where from. Triton's interpreter, which stands in for the
    device here, is not counted."""
    found: list[tuple[str, torch.Tensor | None, str]] = []

    def counting(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack()[:-1]
            if not any("/triton/" in frame.filename for frame in stack):
                tensor = args[0] if owner is torch.Tensor else None
                found.append((name, tensor, f"{stack[-1].filename}:{stack[-1].lineno}"))
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with ExitStack() as stack:
        for owner, names in ((torch.Tensor, OF_TENSORS), (torch, OF_TORCH)):
            for name in names:
                stack.enter_context(counting(owner, name))
        yield found


def waits_of_steps(stage: int, dtype: str, hift: dict[str, Any], rule: str = "adamw") -> tuple[list[str], int]:
    """Two rotations of three blocks: where the steps waited, but for the reading of what the step before has left on
    the host; and how often that was read."""
    section = {"layers_per_block": 2, **hift}
    clip = 0.0 if section.get("update") == "backward" else 0.5
    config = ds_config(stage, dtype, section, gradient_clipping=clip, optimizer=copy.deepcopy(RULES[rule][0]))
    engine = engine_of(config)
    found: list[str] = []
    read = 0
    for step in range(STEPS):
        optimizer = engine.optimizer
        loss = engine(**batch_of(step, 0, torch.distributed.get_rank())).loss
        if section.get("update") != "backward":
            engine.backward(loss)
        earlier = {id(check._host) for check, *_ in optimizer._step.unread}
        with waits() as calls:
            if section.get("update") == "backward":
                engine.backward(loss)
            optimizer.step()
        read += any(id(tensor) in earlier for _, tensor, _ in calls)
        found += [f"{name} {place}" for name, tensor, place in calls if id(tensor) not in earlier]
    assert len(engine.hift.blocks) == STEPS // 2
    return found, read


@pytest.mark.parametrize(
    ("stage", "dtype", "hift", "rule"),
    [
        (0, "fp32", {}, "adamw"), slow(1, "bf16", {}, "adafactor"),
        (2, "bf16", {"state": {"master": "split16"}}, "adamw"),
        (3, "bf16", {"always_active": ["norm"], "state": {"moments": "int8"}}, "adamw"),
        slow(2, "fp32", {}, "adafactor"), (2, "bf16", {"update": "backward"}, "adamw"),
        slow(0, "fp32", {"update": "backward"}, "adamw"), slow(3, "bf16", {"update": "backward"}, "adamw"),
    ],
)  # fmt: skip
def test_a_fused_step_never_waits_for_the_device(two_ranks, stage, dtype, hift, rule):
    for result in two_ranks.run(waits_of_steps, stage, dtype, {**FUSED, **hift}, rule):
        assert result == ([], STEPS - 1)


def test_an_eager_step_is_seen_to_wait_once(two_ranks):
    for waits, _ in two_ranks.run(waits_of_steps, 2, "bf16", {"kernel": "torch"}):
        assert len(waits) == STEPS, waits


@pytest.mark.parametrize(
    ("stage", "dtype", "value"), [(0, "fp32", "inf"), (1, "bf16", "nan"), (2, "fp32", "-inf"), (3, "bf16", "nan")]
)
def test_a_bad_gradient_leaves_the_update_out_and_is_reported_while_the_turn_passes(two_ranks, stage, dtype, value):
    results = two_ranks.run(poisoned_run, stage, dtype, float(value), steps=5, poisoned=2, hift=FUSED)
    for result in results:
        assert result["changed"] == [["0", "state 0"], ["1", "state 1"], [], ["3", "state 3"], ["4", "state 4"]]
        assert result["blocks"] == [1, 2, 3, 4, 5]
        assert result["counts"] == [1, 1, 0, 1, 1, 0]
        assert result["digest"] == results[0]["digest"] and result["skipped"] == 1
        (warning,) = result["warnings"]
        assert warning == "the gradient of block 2 (model.layers.1) was not finite; its update was left out"


@pytest.mark.parametrize("stage", range(4))
def test_ranks_that_disagree_change_nothing_and_raise_at_the_next_reading(two_ranks, stage):
    two_ranks.run(ranks_disagree, stage, FUSED)


@pytest.mark.parametrize(("stage", "steps"), [(0, 2), (1, 3), (2, 2), (3, 3)])
def test_a_block_without_any_gradient_is_left_as_it_is_and_raises_a_step_later(two_ranks, stage, steps):
    for result in two_ranks.run(branch_steps, stage, branches=(2, 2), steps=steps, hift=FUSED):
        assert result["error"].startswith("RuntimeError: block 1 (^layers.1) received no gradient on any rank")
        assert result["changed"] == ["0"]
        assert result["counts"] == [1, 0, 0]


@pytest.mark.parametrize(
    ("stage", "dtype", "hift", "late"),
    [(2, "bf16", FUSED, 1), (0, "fp32", {"kernel": "torch"}, 0), slow(3, "bf16", {"kernel": "torch"}, 0),
     (2, "fp32", {"update": "backward", "kernel": "torch"}, 0)],
)  # fmt: skip
def test_a_run_that_is_to_stop_at_a_bad_gradient_stops_on_every_rank_and_loses_nothing(
    two_ranks, stage, dtype, hift, late
):
    for errors, moved, skipped in two_ranks.run(stopped_run, stage, dtype, hift):
        assert [bool(error) for error in errors] == [False, False, late == 0, late == 1, False], errors
        error = errors[2 + late]
        assert error.startswith("RuntimeError: hift.not_finite='stop': the gradient"), error
        assert "block 2 (model.layers.1) was not finite (inf or nan in the loss" in error
        assert all(not blocks for blocks in moved), moved
        assert skipped in (0, 1)
