"""Seconds of a step: the ring's own events on a clock, against sums by hand."""

import pytest
from transformers import LlamaConfig

from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request
from hift_ds.memory.timing import CARDS, Speeds, forward_operations, timing
from hift_ds.recipes.arguments import CARD_NAMES

SEQ, ROWS = 16, 2
SIZES = dict(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64,
)  # fmt: skip
LAYER = 4 * 64 * 64 + 3 * 64 * 160  # elements of a layer's matrices
HEAD = 512 * 64
PRODUCTS = 2 * ROWS * SEQ * (4 * LAYER + HEAD)  # operations of a forward
FAST = 1e30


@pytest.fixture(scope="module")
def planner():
    return Planner(LlamaConfig(**SIZES))


def step_of(planner, bus=FAST, products=1e9, bandwidth=FAST, checkpointing=False, zero=(), micro_steps=1, **hift):
    config = {
        "train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": micro_steps, "gradient_clipping": 0.0,
        "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}, "zero_optimization": dict(zero),
        "hift": {"enabled": True, **hift},
    }  # fmt: skip
    layout = planner.layout(Request(config, SEQ, None, checkpointing))
    return timing(layout, SEQ, checkpointing, Speeds(bus, products, bandwidth)), layout


def test_a_forward_s_operations_are_two_for_each_element_of_a_matrix_and_token(planner):
    _, layout = step_of(planner)
    assert forward_operations(layout, ROWS, SEQ) == pytest.approx(PRODUCTS, rel=0.02)


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 3), (True, 4)])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_one_block_takes_three_forwards_and_a_fourth_to_recompute(planner, update, checkpointing, times):
    found, layout = step_of(planner, checkpointing=checkpointing, update=update, layers_per_block=100)
    assert found.step == pytest.approx(times * forward_operations(layout, ROWS, SEQ) / 1e9)
    assert found.exposed == pytest.approx(0.0, abs=1e-12) and found.tokens == ROWS * SEQ


def test_micro_steps_are_forwards_and_backwards_with_one_update(planner):
    bus = 1e6
    one, three = (step_of(planner, bus, layers_per_block=100, micro_steps=count)[0] for count in (1, 3))
    assert three.compute == pytest.approx(3 * one.compute)
    assert three.copies == pytest.approx(one.copies)
    assert three.tokens == 3 * one.tokens


def test_a_rotation_s_mean_step_goes_backward_only_as_far_as_its_block(planner):
    found, layout = step_of(planner)
    forward = forward_operations(layout, ROWS, SEQ) / 1e9
    layer, head = LAYER / (4 * LAYER + HEAD), HEAD / (4 * LAYER + HEAD)
    # embedding: all above; then each layer trains and carries what is above it; then the head alone
    carried = [head + 4 * layer] + [head + (3 - i) * layer + 2 * layer for i in range(4)] + [2 * head]
    assert found.step == pytest.approx(forward * (1 + sum(carried) / 6), rel=1e-6)


def test_copies_take_their_bytes_over_the_bus_and_what_compute_cannot_hide_is_exposed(planner):
    slow, layout = step_of(planner, bus=1e5, products=FAST, update="backward", layers_per_block=100)
    state = sum(map(layout.state_bytes, layout.units))
    assert slow.copies == pytest.approx(state / 1e5, rel=0.02)
    assert 0.999 * slow.copies <= slow.step <= 1.5 * slow.copies, "both ways at once, but for the ends"
    assert slow.exposed == pytest.approx(slow.step)
    hidden, _ = step_of(planner, bus=1e9, products=1e6, update="backward", layers_per_block=100)
    assert hidden.exposed < 0.02 * hidden.step and hidden.copies > 0


def test_updates_in_backward_hide_copies_that_updates_after_it_do_not(planner):
    """In a ring that holds a layer's state, and a fifth of the block's."""
    small = {"layers_per_block": 100, "state": {"ring_bytes": 14 * LAYER}}
    together, apart = (
        step_of(planner, bus=2e7, products=2e8, update=update, **small)[0] for update in ("backward", "step")
    )
    assert together.compute == pytest.approx(apart.compute)
    assert together.exposed < 0.8 * apart.exposed


def test_more_of_the_ring_hides_more(planner):
    rings = [{"ring_bytes": size} for size in (40_000, 10**6)]
    steps = [step_of(planner, bus=2e7, products=2e8, state=state)[0].step for state in rings]
    assert steps[1] < steps[0]


def test_resident_state_is_not_copied_and_updates_on_the_host_have_no_model(planner):
    resident, _ = step_of(planner, bus=1.0, state={"residency": "device"})
    assert resident.copies == 0 and resident.exposed == pytest.approx(0.0, abs=1e-12)
    on_host, _ = step_of(planner, zero={"offload_optimizer": {"device": "cpu"}})
    assert on_host is None


def test_every_card_of_the_command_line_has_its_figures():
    assert tuple(CARDS) == CARD_NAMES
