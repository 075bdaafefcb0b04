"""Every update rule on ZeRO, from the config and from a client optimizer, against torch.optim per block.

Rules are held bitwise alone (tests/unit/rules); Adafactor alone communicates, so it meets every way to shard.
"""

import pytest
from hift_testing import tolerances
from hift_testing.parity import RULES, parity
from hift_testing.selection import diagonal, slow

pytestmark = pytest.mark.multi_rank

STAGES = (0, 2, 3)
ELEMENTWISE = tuple(rule for rule in RULES if rule != "adafactor")
# DeepSpeed's Lion classes compile an operator when they are made, and torch.optim has none.
CLIENTS = tuple(rule for rule in RULES if rule != "lion")


def agree(pool, stage, rule, client):
    if rule == "adafactor":
        tolerance = tolerances.ADAFACTOR
    else:
        tolerance = tolerances.STAGE3 if stage == 3 else tolerances.EXACT
    for facts in pool.run(parity, stage, "fp32", {"layers_per_block": 3}, rule=rule, client=client):
        assert facts["weights"] <= tolerance.bound, (facts, tolerance.reason)
        assert facts["moved"] > 1e-3, facts
        assert facts["blocks"] == 2, facts


@pytest.mark.parametrize(("rule", "stage"), [*diagonal(ELEMENTWISE, STAGES), *(("adafactor", s) for s in STAGES)])
def test_a_rule_from_the_config_equals_torch_per_block(two_ranks, stage, rule):
    agree(two_ranks, stage, rule, client=False)


@pytest.mark.parametrize(
    ("rule", "stage"),
    [
        (rule, stage) if (rule, stage) in {("adamw", 0), ("sgd_momentum", 2), ("adafactor", 3)} else slow(rule, stage)
        for rule in CLIENTS for stage in STAGES
    ],
)  # fmt: skip
def test_a_client_optimizer_equals_torch_per_block(two_ranks, stage, rule):
    agree(two_ranks, stage, rule, client=True)


@pytest.mark.parametrize("rule", ("adafactor", "lion"))
def test_a_rule_that_is_not_elementwise_in_bf16_keeps_fp32_masters(two_ranks, rule):
    for facts in two_ranks.run(parity, 2, "bf16", {"layers_per_block": 3}, rule=rule):
        assert facts["share"] <= tolerances.CLIPPED_BF16_SHARE.bound, facts
        assert facts["moved"] > 1e-3, facts
