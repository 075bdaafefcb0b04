"""How master weights and moments are stored, and what they are in fp32.

| | bytes per parameter on the host | |
|---|---|---|
| master `fp32` | 4 | nothing where the model weights are fp32: they are their own master |
| master `split16` | 2 | the low 16 bits beside the bf16 model weight; together the fp32 master, bit by bit |
| master `none` | 0 | the bf16 model weight alone, rounded stochastically |
| moments `fp32`, `bf16`, `int8` | 4, 2, 1 + 1/64 each | bf16 rounded stochastically; int8 with a scale a group |
"""

from __future__ import annotations

import torch

GROUP = 256  # elements of an int8 moment that share a scale, as in hift_kernels.quantize
SCALE_SUFFIX = "_scale"
MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
_MASTER_DTYPES = {"fp32": torch.float32, "split16": torch.int16}


def master_dtype(master: str, weight_dtype: torch.dtype) -> torch.dtype | None:
    """dtype of the tensor that `hift.state.master` needs beside model weights of `weight_dtype`, or `None`."""
    return None if weight_dtype == torch.float32 else _MASTER_DTYPES.get(master)


def join_split16(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 weight and its int16 remainder."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 weight (rounded half up) and int16 remainder of an fp32 master: the inverse of `join_split16`."""
    bits = master.float().contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def decode_int8(codes: torch.Tensor, scales: torch.Tensor, first: int, signed: bool) -> torch.Tensor:
    """fp32 of codes that begin at element `first` of their first group.

    Source: hift_kernels.quantize, `decode`.
    """
    extra = 0 if signed else 1
    magnitude = (codes & 127 if signed else codes).to(torch.float64)
    exponent = torch.floor(torch.log2(magnitude + ((1 << extra) - 1)).clamp(min=0))
    place = (magnitude + (1 << extra)) / 2**exponent - 1  # t / 2^exponent, t = 1 at the decade's first code
    value = torch.where(magnitude > 0, 10.0 ** (exponent - extra - 6) * (0.1 + 0.9 * place), 0.0)
    value = torch.where(codes > 127, -value, value) if signed else value
    group = (torch.arange(codes.numel(), device=codes.device) + first) // GROUP
    return (value * scales[group]).float()


def encode_int8(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes of fp32 values that begin with a group, and a scale a group: the inverse of `decode_int8`."""
    groups = torch.nn.functional.pad(values, (0, -values.numel() % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(1)
    steps = decode_int8(torch.arange(128 if signed else 255), torch.ones(1), 0, signed)
    fractions = groups.abs() / torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    codes = torch.bucketize(fractions, (steps[1:] + steps[:-1]) / 2).to(torch.uint8)
    if signed:
        codes |= (groups < 0).to(torch.uint8) << 7
    return codes.view(-1)[: values.numel()], scales
