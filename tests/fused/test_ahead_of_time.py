"""What the compiler makes of the kernels for sm_80, 86, 89 and 90, on a machine without a GPU.

By default each kernel in each form for sm_86; the slow run compiles all cases and reads the machine code.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500
ELEMENTWISE = ("adamw-", "sgd-", "lion-", "adagrad-", "adafactor-", "variance")
REDUCTIONS = ("squares", "update_square", "weight_square", "sum_of_squares")
# fp32 streams of one step besides 16-bit ones: loads, stores (a 128-bit access is 4 fp32, a 64-bit one 4 of 16 bits)
STREAMS = {
    "adamw-plain": (3, 3, 1, 0), "adamw-fp32": (3, 3, 1, 1), "adamw-split16": (2, 2, 3, 2), "adamw-none": (2, 2, 2, 1),
    "adamw-fp32-fp32_grad": (4, 3, 0, 1), "adamw-fp32-fp16_grad": (3, 3, 1, 1),
    "adamw-split16-bf16_moments": (0, 0, 5, 4),
    **{f"{rule}-{form}": streams for rule in ("sgd", "lion", "adagrad") for form, streams in {
        "plain": (2, 2, 1, 0), "fp32": (2, 2, 1, 1), "split16": (1, 1, 3, 2), "none": (1, 1, 2, 1),
    }.items()},
    # One of the loads is of the columns' moments.
    "adafactor-plain": (2, 1, 1, 0), "adafactor-fp32": (2, 1, 1, 1), "adafactor-fp32-batched": (2, 1, 1, 1),
    "adafactor-fp32-1d": (2, 1, 1, 1), "adafactor-split16": (1, 0, 3, 2), "adafactor-none": (1, 0, 2, 1),
    "variance": (1, 1, 1, 0),
}  # fmt: skip
FLUSHES = version("triton").startswith("3.4.")  # its division and root take subnormal numbers for 0
UNEVEN = ("adafactor-ones", "adamw-fp32-odd_length")  # lengths that 16 does not divide


@pytest.fixture(scope="module", params=["sm_86", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests")])
    command = [sys.executable, "-m", "hift_testing.ahead_of_time", request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) > {"sm_86": 40, "all": 80}[request.param]
    return found


def test_no_kernel_spills_or_uses_local_memory(compiled):
    for name, facts in compiled.items():
        assert (facts["stack"], facts["local"], facts["spills"]) == (0, 0, 0), name


def test_elementwise_kernels_use_at_most_56_registers_and_no_shared_memory(compiled):
    """56 registers of 128 threads: 9 tiles, 36 of the 48 warps of an sm_86 (44 in most cases; 52 with Triton 3.7)."""
    for name, facts in compiled.items():
        if name.startswith(ELEMENTWISE):
            assert facts["registers"] <= 56, (name, facts)
            assert (facts["shared"], facts["barriers"]) == (0, 0), (name, facts)
    assert max(facts["registers"] for name, facts in compiled.items() if "int8" in name) <= 80
    assert max(facts["registers"] for name, facts in compiled.items() if name.startswith("add_partials")) <= 80


def test_reductions_use_at_most_64_registers(compiled):
    """Of 256 threads (128 in `squares`): 4 (8) tiles, 32 warps of an sm_86; 8 (16) elements a thread."""
    found = [facts["registers"] for name, facts in compiled.items() if name.startswith(REDUCTIONS)]
    assert len(found) >= 7 and max(found) <= 64


def test_every_stream_is_as_wide_as_it_can_be(compiled):
    for key, facts in compiled.items():
        name = key.split("@")[0]
        if name.startswith(ELEMENTWISE) and name not in UNEVEN:
            loads, stores, narrow_loads, narrow_stores = STREAMS[name]
            assert facts["loads"] == {"64": narrow_loads, "128": loads}, (name, facts)
            assert facts["stores"] == {"64": narrow_stores, "128": stores}, (name, facts)
        if key.startswith(REDUCTIONS) and not key.startswith(("squares-small", "squares-one")):
            assert facts["loads"]["128"], key


def test_a_length_that_16_does_not_divide_would_make_every_access_scalar(compiled):
    """Why shards are padded: this is the reason for ALIGNMENT."""
    facts = compiled["adamw-fp32-odd_length@86"]
    assert facts["loads"] == facts["stores"] == {"64": 0, "128": 0}


def test_arithmetic_is_ieee_and_nothing_is_contracted(compiled):
    for name, facts in compiled.items():
        if name.startswith(ELEMENTWISE):
            assert not facts["fused_multiply_add"], name
        if name.startswith(("adamw", "adagrad", "adafactor-")):
            assert facts["exact_division"] and facts["exact_root"], name
            assert not facts["flushes_subnormals"] or FLUSHES, name
