"""A training step of the scripts over rows of unlike lengths: the gradient of one big batch."""

import pytest
import torch
from deepspeed import comm as dist
from hift_testing import tolerances
from hift_testing.selection import OWN_WINDOWS_ARE_RIGHT
from hift_testing.training import ds_config, engine_of, largest_difference, small_llama, whole_weights

from hift_ds.recipes.datasets import IGNORED, TextData, TokenRows
from hift_ds.recipes.training import optimizer_step

pytestmark = pytest.mark.multi_rank

RATE = 0.1
LENGTHS = (3, 24, 7, 12)  # tokens; of the first third none counts in the loss
MICRO_STEPS = 2


def rows():
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        ids = torch.randint(0, 90, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = IGNORED
        yield ids, labels


def one_window(stage, hift):
    """Two micro steps on each rank, a row a time; against plain torch on the same rows at once. Collective."""
    data = TextData("rows", "chat", TokenRows(list(rows())), TokenRows([]), 95)
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = [data.collate([data.train[micro * world + rank]]) for micro in range(MICRO_STEPS)]
    batch = data.collate([data.train[i] for i in range(MICRO_STEPS * world)])

    right = small_llama()
    loss = right(**batch).loss
    loss.backward()
    with torch.no_grad():
        for param in right.parameters():
            param -= RATE * param.grad

    config = ds_config(
        stage, hift={"layers_per_block": 6} if hift else None, gradient_accumulation_steps=MICRO_STEPS,
        optimizer={"type": "SGD", "params": {"lr": RATE}}, train_micro_batch_size_per_gpu=1,
    )  # fmt: skip
    engine = engine_of(config)
    sums = optimizer_step(engine, iter(mine))
    dist.all_reduce(sums)
    mean, tokens = sums.tolist()
    assert mean == pytest.approx(loss.item(), rel=1e-6)
    assert tokens == sum(LENGTHS[: MICRO_STEPS * world])
    found = largest_difference(whole_weights(engine), dict(right.named_parameters()))
    assert found <= tolerances.ONE_BIG_BATCH.bound, (found, tolerances.ONE_BIG_BATCH.reason)


@pytest.mark.parametrize("stage", (0, 2))
@pytest.mark.parametrize("pool", ("one_rank", "two_ranks"))
def test_rows_of_unlike_lengths_step_as_one_big_batch(request, pool, stage):
    request.getfixturevalue(pool).run(one_window, stage, True)


@pytest.mark.skipif(not OWN_WINDOWS_ARE_RIGHT, reason="this DeepSpeed divides two micro steps twice")
def test_full_fine_tuning_weighs_tokens_alike_too(two_ranks):
    two_ranks.run(one_window, 0, False)
