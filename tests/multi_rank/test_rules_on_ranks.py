"""Every update rule on ZeRO, from the config and from a client optimizer, against torch.optim per block.

Rules are held bitwise alone (tests/unit/rules); Adafactor alone communicates, so it meets every way to shard.
"""

import pytest
from hift_testing import tolerances
from hift_testing.parity import RULES, agree
from hift_testing.selection import diagonal, slow

pytestmark = pytest.mark.multi_rank

STAGES = (0, 2, 3)
PAIR = {"layers_per_block": 3}
ELEMENTWISE = tuple(rule for rule in RULES if rule != "adafactor")
# DeepSpeed's Lion classes compile an operator when they are made, and torch.optim has none.
CLIENTS = tuple(rule for rule in RULES if rule != "lion")


def tolerance_of(rule, stage):
    if rule == "adafactor":
        return tolerances.ADAFACTOR
    return tolerances.STAGE3 if stage == 3 else tolerances.EXACT


@pytest.mark.parametrize(("rule", "stage"), [*diagonal(ELEMENTWISE, STAGES), *(("adafactor", s) for s in STAGES)])
def test_a_rule_from_the_config_equals_torch_per_block(two_ranks, stage, rule):
    agree(two_ranks, stage, "fp32", PAIR, weights=tolerance_of(rule, stage), moved=1e-3, rule=rule)


@pytest.mark.parametrize(
    ("rule", "stage"),
    [
        (rule, stage) if (rule, stage) in {("adamw", 0), ("sgd_momentum", 2), ("adafactor", 3)} else slow(rule, stage)
        for rule in CLIENTS for stage in STAGES
    ],
)  # fmt: skip
def test_a_client_optimizer_equals_torch_per_block(two_ranks, stage, rule):
    agree(two_ranks, stage, "fp32", PAIR, weights=tolerance_of(rule, stage), moved=1e-3, rule=rule, client=True)


@pytest.mark.parametrize("rule", ("adafactor", "lion"))
def test_a_rule_that_is_not_elementwise_in_bf16_keeps_fp32_masters(two_ranks, rule):
    norm = tolerances.TURNED_NORM if rule == "lion" else tolerances.NORM
    agree(two_ranks, 2, "bf16", PAIR, share=tolerances.CLIPPED_BF16_SHARE, norm=norm, moved=1e-3, rule=rule)
