"""Forms of masters and moments: what is stored is what comes back."""

import numpy as np
import pytest
import torch

from hift_ds.state.formats import GROUP, decode_int8, join_split16, split_master

BITS = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)


def test_a_split_master_joins_to_the_same_fp32_bits():
    special = np.array([0, 1, 0x8000, 0x7FFF, 0x80000000, 0x00800000, 0x3F7F8000, 0x3F80FFFF], dtype=np.uint32)
    bits = np.concatenate([special, BITS[(BITS >> 23) & 0xFF != 0xFF]])
    master = torch.from_numpy(bits.view(np.float32).copy())
    weight, remainder = split_master(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert np.array_equal(join_split16(weight, remainder).numpy().view(np.uint32), bits)


def test_the_weight_of_a_split_master_is_the_nearest_bf16():
    master = torch.from_numpy(np.random.default_rng(1).normal(size=100_000).astype(np.float32))
    weight, _ = split_master(master)
    nearest = master.to(torch.bfloat16)
    different = weight != nearest
    ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert bool((different <= ties).all())


@pytest.mark.parametrize("signed", [True, False])
def test_int8_codes_are_read_as_the_kernel_reads_them(signed):
    """Against the definition of hift_kernels.quantize: decade i holds 10^(i-6) (0.1 + 0.9 t / 2^i), t = 1..2^i."""
    extra = 0 if signed else 1
    table = [0.0]
    for decade in range(7):
        codes = 2 ** (decade + extra)
        table += [10.0 ** (decade - 6) * (0.1 + 0.9 * t / codes) for t in range(1, codes + 1)]
    codes = torch.arange(len(table), dtype=torch.uint8)
    values = decode_int8(codes, torch.tensor([2.0]), 0, signed)
    assert values.tolist() == pytest.approx([2 * value for value in table], rel=1e-6)
    if signed:
        assert decode_int8(codes | 128, torch.tensor([2.0]), 0, True).tolist() == pytest.approx((-values).tolist())


def test_int8_codes_take_the_scale_of_their_group():
    codes = torch.full((300,), 127, dtype=torch.uint8)
    first = 200
    values = decode_int8(codes, torch.tensor([1.0, 2.0]), first, True)
    assert values.tolist() == pytest.approx([1.0] * (GROUP - first) + [2.0] * (300 - GROUP + first))
