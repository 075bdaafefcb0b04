"""Batch sizes: what follows from what, as DeepSpeed has it, and what is refused by name."""

import pytest

from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN, batch_sizes


@pytest.mark.parametrize(
    ("sizes", "world", "expected"),
    [
        ({MICRO: 4}, 2, (4, 1)),
        ({MICRO: 4, ACCUMULATION: 3}, 2, (4, 3)),
        ({MICRO: 4, TRAIN: 16}, 2, (4, 2)),
        ({ACCUMULATION: 4, TRAIN: 16}, 2, (2, 4)),
        ({TRAIN: 16}, 2, (8, 1)),
        ({MICRO: 2, ACCUMULATION: 4, TRAIN: 8}, 1, (2, 4)),
    ],
)
def test_batch_sizes_follow_from_each_other(sizes, world, expected):
    assert batch_sizes(sizes, world) == expected


@pytest.mark.parametrize("sizes", [{MICRO: 4}, {MICRO: 4, TRAIN: 16}, {ACCUMULATION: 4, TRAIN: 16}, {TRAIN: 16}])
def test_batch_sizes_are_those_that_deepspeed_would_find(sizes):
    from deepspeed.runtime.config import DeepSpeedConfig

    theirs = DeepSpeedConfig(dict(sizes))
    assert batch_sizes(dict(sizes), 1) == (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, r"^train_micro_batch_size_per_gpu: missing; put it into the config \(in the scripts: --micro_batch\)$"),
        ({ACCUMULATION: 2}, r"^train_micro_batch_size_per_gpu: missing"),
        ({MICRO: "auto"}, r"^train_micro_batch_size_per_gpu='auto': must be a whole number, 1 or more"),
        ({MICRO: 0}, r"^train_micro_batch_size_per_gpu=0: must be"),
        ({MICRO: 1, ACCUMULATION: True}, r"^gradient_accumulation_steps=True: must be"),
        ({MICRO: 4, TRAIN: 9}, r"^train_batch_size=9: must be .* x 2 ranks, here 4 x 1 x 2; change one"),
        ({MICRO: 4, TRAIN: 4}, r"^train_batch_size=4: must be .*, here 4 x 0 x 2"),
        ({TRAIN: 1}, r"^train_batch_size=1: must be .*, here 0 x 1 x 2"),
        ({MICRO: 1, ACCUMULATION: 1, TRAIN: 4}, r"^train_batch_size=4: must be .*, here 1 x 1 x 2"),
    ],
)
def test_batch_sizes_that_cannot_be_are_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        batch_sizes(dict(sizes), 2)


