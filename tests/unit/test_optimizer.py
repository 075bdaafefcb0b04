"""The parts of the optimizer that need no ranks."""

import torch

from hift_ds.optimizer import NORM_ROW, _sum_of_squares


def test_sum_of_squares_of_a_large_shard_keeps_six_digits():
    flat = torch.randn(NORM_ROW * 1500 + 37, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = flat.double().square().sum().item()
    assert abs(_sum_of_squares(flat).item() - exact) < 1e-6 * exact


def test_sum_of_squares_of_few_or_no_elements_is_exact():
    assert _sum_of_squares(torch.tensor([3.0, 4.0])).item() == 25.0
    assert _sum_of_squares(torch.empty(0)).item() == 0.0


def test_sum_of_squares_shows_a_single_inf_or_nan():
    for value in (float("inf"), float("nan")):
        for place in (0, NORM_ROW, NORM_ROW + 3):
            flat = torch.ones(NORM_ROW + 5)
            flat[place] = value
            assert not torch.isfinite(_sum_of_squares(flat))
