"""On a GPU: the planner's peaks against the bytes requested of torch's allocator around real steps, within 5 %."""

import pytest
from hift_testing import gpu_cases as cases

pytestmark = pytest.mark.gpu
# Large enough that what an operation takes for itself is within 5 %: 0.4 B parameters.
LLAMA = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
    max_position_embeddings=2048,
)  # fmt: skip
TOLERANCE = 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_forecast_is_what_is_requested_of_the_card(fresh_rank, stage, precision, checkpointing):
    (found,) = fresh_rank.run(cases.peaks, stage, precision, checkpointing, LLAMA, 2, 1024, timeout_s=300)
    measured, forecast = found
    assert sorted(measured) == list(range(len(forecast)))
    wrong = {b: (forecast[b], peak) for b, peak in measured.items() if abs(forecast[b] - peak) > TOLERANCE * peak}
    assert wrong == {}
