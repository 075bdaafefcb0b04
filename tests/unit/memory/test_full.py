"""Full fine-tuning's figures, by hand over hand-made events."""


import pytest
from hift_testing.layouts import three

from hift_ds.memory import full as full_module
from hift_ds.memory.full import full_figures
from hift_ds.memory.trace import END, GRADIENT, Event

FULL_EVENTS = [
    Event(END, (), peak=90_000, current=80_000, forward=True),
    Event(GRADIENT, ("large",), peak=95_000, current=70_000, forward=False, gradient=10_000),
    Event(GRADIENT, ("small",), peak=71_000, current=300, forward=False, gradient=60),
    Event(GRADIENT, ("norm",), peak=400, current=200, forward=False, gradient=14),
    Event(END, (), peak=200, current=0, forward=False),
]
NUMEL = 5037
BUCKET = 1000  # elements of `reduce_bucket_size`


GPU, HOST = False, True  # whether the ranks train on CPUs


def full_of(stage, world, **keywords):
    zero = {"reduce_bucket_size": BUCKET, "overlap_comm": False, **keywords.pop("zero", {})}
    layout = three(stage, world, zero=zero, **keywords)
    figures, host = full_figures(layout, FULL_EVENTS)
    assert figures.numel == NUMEL
    return layout, figures, host


@pytest.mark.parametrize("stage", [0, 1])
def test_full_fine_tuning_keeps_every_gradient_below_stage_2(stage):
    layout, figures, host = full_of(stage, 4)
    # At the peak the largest gradient is in the making, the first, and no bucket is there yet; afterwards it stays, and
    # fewer activations with it.
    assert (figures.gradients, figures.activations, figures.phase) == (10_000, 85_000, "backward")
    assert figures.weights == layout.weights == 2 * NUMEL
    assert figures.state == 12 * NUMEL // (4 if stage else 1)
    assert host == figures.host_state == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_shards_gradients_from_stage_2_on(stage):
    layout, figures, _ = full_of(stage, 4)
    there_before = 0 if stage == 2 else 2 * NUMEL // 4 + 2 * BUCKET  # stage 3 never lets its part go
    assert figures.gradients == there_before + 10_000
    assert figures.activations == 85_000
    assert figures.state == 12 * NUMEL // 4
    assert figures.weights == layout.weights


def test_full_fine_tuning_ends_with_all_gradients():
    quiet = [Event(END, (), peak=10, current=0, forward=True), *(
        Event(GRADIENT, (name,), peak=10, current=0, forward=False) for name in ("large", "small", "norm")
    ), Event(END, (), peak=0, current=0, forward=False)]  # fmt: skip
    figures, _ = full_figures(three(), quiet)
    assert (figures.gradients, figures.phase) == ((2 + 4 + 4) * NUMEL, "update"), "copied to fp32, and flattened"
    flattened, _ = full_figures(three(precision="fp32"), quiet)
    assert (flattened.gradients, flattened.activations, flattened.phase) == (8 * NUMEL, 0, "backward")
    shared, _ = full_figures(three(2, 4, zero={"reduce_bucket_size": BUCKET, "overlap_comm": False}), quiet)
    assert shared.gradients == (2 + 2 + 4) * (NUMEL // 4), "those of a rank, flattened, and copied to fp32"


# Gradients that stay, before each of FULL_EVENTS: the end of forward; large, small and norm, 5000, 30 and 7; the end.
PART = 2 * (NUMEL // 4)


@pytest.mark.parametrize(
    ("stage", "micro_steps", "zero", "held", "end"),
    [
        (0, 1, {}, [0, 0, 10_000, 10_060, 10_074], 2 * 10_074),  # flattened for the reduction
        (0, 2, {}, [10_074] * 5, 2 * 10_074),  # what the first micro step has left is added to
        (1, 1, {}, [0, 0, 12_000, 12_060, 12_074], 12_074 + PART),  # reduced after backward
        (1, 1, {"overlap_comm": True}, [0, 0, 4000, 4000 + PART, 4000 + PART], 4000 + PART),  # at once, then gone
        (1, 2, {}, [12_074] * 5, 12_074 + PART),
        (2, 1, {}, [0, 0, 2000, 2000 + PART, 2000 + PART], 2000 + PART),
        (2, 2, {}, [PART, PART, 2000 + PART, *[2000 + 2 * PART] * 2], 2000 + 2 * PART),  # beside what is added up
        (2, 1, {"reduce_bucket_size": 10**4}, [0, 0, *[20_000] * 3], 20_000 + PART),  # one bucket holds all
        (2, 1, {"offload_optimizer": {"device": "cpu"}}, [0, 0, *[2000] * 3], 2000),
        (3, 2, {}, [PART + 2000] * 5, PART + 2000 + 2 * 37),  # the last bucket's copy
    ],
)
def test_gradients_that_full_fine_tuning_holds(stage, micro_steps, zero, held, end):
    zero = {"reduce_bucket_size": BUCKET, "overlap_comm": False, **zero}
    layout = three(stage, 4, micro_steps=micro_steps, zero=zero)
    found = full_module._held(layout, FULL_EVENTS, NUMEL)
    assert [before for before, _ in found[0]] == held
    assert found[1] == end
    assert all(after >= later for (_, after), later in zip(found[0], held[1:], strict=False))


def test_a_full_bucket_is_copied_at_stage_3_unless_a_lone_gradient_is_in_it():
    """Beside the gradient that did not fit any more."""
    names = ("small", "norm", "large")
    events = [Event(GRADIENT, (name,), peak=0, current=0, forward=False) for name in names]
    stays = PART + 2 * BUCKET
    found, end = full_module._held(three(3, 4, zero={"reduce_bucket_size": BUCKET}), events, NUMEL)
    assert found[2] == (stays, stays + 2 * 37 + 2 * 5000)
    assert end == stays, "large alone"
    lone, _ = full_module._held(three(3, 4, zero={"reduce_bucket_size": BUCKET}), FULL_EVENTS, NUMEL)
    assert lone[2] == (stays, stays + 2 * 30)
    one_rank, _ = full_module._held(three(3, 1, zero={"reduce_bucket_size": BUCKET}), events, NUMEL)
    assert one_rank[2][1] == 2 * NUMEL + 2 * BUCKET + 2 * 5000


@pytest.mark.parametrize(
    ("stage", "on_cpu", "kind", "params", "precision", "update"),
    [  # bytes for each element of the whole model, or of a rank's part
        (0, GPU, "AdamW", {}, "bf16", 2 + 4 + 4),
        (0, GPU, "AdamW", {"torch_adam": True}, "bf16", 2 + 4 + 4),  # the square root of all second moments
        (0, GPU, "AdamW", {"torch_adam": True, "fused": True}, "bf16", 2 + 4),
        (0, GPU, "AdamW", {"torch_adam": True}, "fp32", 4 + 4),
        (0, GPU, "SGD", {"momentum": 0.9}, "bf16", 2 + 4),
        (0, GPU, "SGD", {"weight_decay": 0.1}, "bf16", 2 + 4 + 4),
        (0, GPU, "Adagrad", {}, "fp32", 4 + 8),
        (0, GPU, "Adagrad", {"weight_decay": 0.1}, "fp32", 4 + 8),
        (2, GPU, "AdamW", {}, "bf16", 2 + 2 + 4),
        (2, GPU, "AdamW", {"torch_adam": True}, "bf16", 4 + 4),  # its part is let go before
        (2, HOST, "AdamW", {"torch_adam": True}, "bf16", 4 + 8),
        (1, GPU, "AdamW", {}, "fp32", 4 + 4),
        (2, HOST, "Adagrad", {}, "fp32", 4 + 4),
        (2, HOST, "Adagrad", {"weight_decay": 0.1}, "fp32", 4 + 8),
    ],
)
def test_update_of_full_fine_tuning(stage, on_cpu, kind, params, precision, update):
    assert update_of(stage, on_cpu, kind, params, precision) == update * (NUMEL if stage == 0 else NUMEL // 4)


def test_stage_2_holds_a_second_part_of_the_gradients_in_the_update_after_several_micro_steps():
    one, several = (update_of(2, GPU, "AdamW", {}, "bf16", micro_steps=steps) for steps in (1, 2))
    assert several - one == PART


def update_of(stage, on_cpu, kind, params, precision, zero=None, micro_steps=1):
    zero = {"reduce_bucket_size": BUCKET, "overlap_comm": False, **(zero or {})}
    layout = three(stage, 4, micro_steps, optimizer=kind, params=params, precision=precision, zero=zero, on_cpu=on_cpu)
    *_, update = full_module.full_moments(layout, FULL_EVENTS, layout.gathered(FULL_EVENTS))
    assert update.phase == "update"
    return update.gradients


def test_update_on_a_cpu_goes_tensor_by_tensor_where_nothing_is_flattened():
    assert update_of(0, HOST, "AdamW", {"torch_adam": True}, "bf16") == (2 + 4) * NUMEL + 8 * 5000
    assert update_of(0, HOST, "Adagrad", {}, "bf16") == (2 + 4) * NUMEL + 4 * 5000


def test_update_at_stage_3_takes_a_sub_group_at_a_time_beside_what_stays():
    stays = PART + 2 * BUCKET
    assert update_of(3, GPU, "AdamW", {}, "bf16") == stays + (2 + 4) * (NUMEL // 4)
    assert update_of(3, GPU, "AdamW", {}, "bf16", {"sub_group_size": 100}) == stays + (2 + 4) * 100
    assert update_of(3, HOST, "AdamW", {"torch_adam": True}, "bf16", {"sub_group_size": 100}) == stays + (4 + 8) * 100
    assert update_of(3, GPU, "AdamW", {}, "bf16", {"offload_optimizer": {"device": "cpu"}}) == 2 * BUCKET


def test_adagrads_sums_of_the_weights_that_it_was_given_stay():
    assert full_of(2, 4, optimizer="Adagrad")[1].state == 2 * NUMEL + 8 * NUMEL // 4
    assert full_of(0, 1, optimizer="Adagrad", precision="fp32")[1].state == 4 * NUMEL


def test_full_fine_tuning_of_one_rank_shards_nothing():
    for stage in (0, 2):
        _, figures, _ = full_of(stage, 1)
        assert figures.state == 12 * NUMEL
        assert figures.network == 0


@pytest.mark.parametrize(
    ("optimizer", "precision", "each"), [("AdamW", "bf16", 12), ("AdamW", "fp32", 8), ("SGD", "bf16", 4),
                                         ("Adagrad", "fp32", 4)]
)  # fmt: skip
def test_full_fine_tunings_state_is_masters_and_moments(optimizer, precision, each):
    _, figures, _ = full_of(0, 1, optimizer=optimizer, precision=precision)
    assert figures.state == each * NUMEL


def test_full_fine_tuning_keeps_factored_moments_whole():
    factored = 4 * (100 + 50 + 10 + 3 + 7)
    assert full_of(2, 4, optimizer="Adafactor")[1].state == 4 * NUMEL // 4 + factored


def test_full_fine_tuning_with_updates_on_the_host_keeps_state_there():
    _, figures, host = full_of(2, 4, zero={"offload_optimizer": {"device": "cpu"}})
    assert figures.state == 0
    assert host == figures.host_state == 12 * NUMEL // 4
    assert figures.to_device == figures.to_host == 2 * (NUMEL // 4)


@pytest.mark.parametrize(("stage", "network"), [(0, 2 * NUMEL), (1, 2 * NUMEL * 2), (2, 2 * NUMEL * 3), (3, 4 * NUMEL)])
def test_full_fine_tunings_network_of_two_micro_steps(stage, network):
    """Gradients once (stage 0), and new weights (1), gradients twice and new weights (2), gradients twice (3)."""
    assert full_of(stage, 4, micro_steps=2)[1].network == network
