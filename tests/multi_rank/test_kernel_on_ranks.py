"""`kernel: triton` through the engine, interpreted: the same training as `kernel: torch`, and numpy's bits."""

import pytest
from hift_testing import kernel_cases, parity_cases
from hift_testing.selection import slow

from hift_ds.config.kernels import KernelChoice

pytestmark = pytest.mark.multi_rank

TORCH, TRITON, WRONG = KernelChoice("torch"), KernelChoice("triton"), KernelChoice("torch", "wrong bits")


@pytest.mark.parametrize(
    ("choices", "kernel", "warning"),
    [
        ([TRITON, TRITON], "triton", None), ([TORCH, TORCH], "torch", None), ([TRITON, WRONG], "torch", 1),
        ([WRONG, TRITON], "torch", 0), ([WRONG, WRONG], "torch", 0),
    ],
)  # fmt: skip
def test_all_ranks_run_the_same_kernel_and_rank_0_says_once_why_not_the_fused(two_ranks, choices, kernel, warning):
    first, second = two_ranks.run(kernel_cases.agreed_kernels, choices)
    assert first["kernel"] == second["kernel"] == kernel
    said = [] if warning is None else [f"hift.kernel=null: updates run in eager torch: rank {warning}: wrong bits"]
    assert (first["warnings"], second["warnings"]) == (said, [])


def test_a_kernel_that_one_rank_refuses_is_an_error_on_all(two_ranks):
    first, second = two_ranks.run(kernel_cases.agreed_kernels, [TRITON, TRITON], refuses=True)
    assert second["error"] == "hift.kernel='triton': no compiler"
    assert first["error"] == "rank 1 failed: ValueError: hift.kernel='triton': no compiler"


NUMPY_RULES = tuple(rule for rule in parity_cases.RULES if rule != "adafactor")


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        (0, "adamw"), (2, "sgd_momentum"), (3, "adafactor"), slow(0, "sgd_momentum"), slow(0, "adafactor"),
        slow(2, "adamw"), slow(2, "adafactor"), slow(3, "adamw"), slow(3, "sgd_momentum"),
    ],
)  # fmt: skip
def test_fused_training_in_fp32_equals_eager_training_to_the_last_bits(two_ranks, stage, rule):
    """Two turns of each block. The rules differ in their last bits (torch's CPU square root is not correctly rounded;
    the order of operations), the next gradients then differ in theirs, and where a gradient is nearly 0 Adam's
    quotient enlarges that."""
    for facts in two_ranks.run(kernel_cases.kernels_agree, stage, "fp32", rule):
        assert facts["beyond"] < 0.02, facts
        assert facts["largest"] < 1e-6, facts
        assert facts["losses"] < 1e-5, facts
        assert facts["moved"] > 1e-4, facts


@pytest.mark.parametrize("rule", ["adamw", slow("adafactor")])  # the others have numpy's bits, below
def test_fused_training_in_bf16_with_clipping_equals_eager_training(two_ranks, rule):
    """fp32 masters that differ in a last bit round to the same bf16, but for a few at the edge between two."""
    for facts in two_ranks.run(kernel_cases.kernels_agree, 2, "bf16", rule, 0.5):
        assert facts["share"] < 2e-3, facts
        assert facts["moved"] > 1e-4, facts


@pytest.mark.parametrize("rule", NUMPY_RULES)
def test_every_update_has_the_bits_of_numpy_s(two_ranks, rule):
    for facts in two_ranks.run(kernel_cases.engine_against_numpy, rule):
        assert facts["wrong"] == 0, facts
        assert facts["checked"] > 10_000, facts


def test_every_update_of_a_split_master_has_the_bits_of_numpy_s_fp32(two_ranks):
    for facts in two_ranks.run(kernel_cases.engine_against_numpy, "adamw", {"master": "split16"}):
        assert facts["wrong"] == 0, facts
        assert facts["checked"] > 10_000, facts


LOSSY = [
    ("adamw", {"moments": "int8"}), ("adamw", {"master": "split16", "moments": "bf16"}), ("lion", {"moments": "bf16"}),
    ("sgd_momentum", {"master": "none", "moments": "bf16"}), ("adagrad", {"moments": "bf16"}),
    ("sgd_momentum", {"moments": "int8"}), ("lion", {"master": "split16", "moments": "int8"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "state"), LOSSY)
def test_compact_state_trains_as_fp32_state_does_but_for_its_rounding(two_ranks, rule, state):
    """Two turns of each block: the error of a moment (8-bit codes are off by some per cent) times the way that weights
    have gone."""
    for facts in two_ranks.run(kernel_cases.forms_agree, 2, rule, state):
        assert facts["off"] < 0.15, facts
        assert facts["moved"] > 1e-5, facts
        assert facts["bytes"] < 0.9 * facts["fp32_bytes"], facts
