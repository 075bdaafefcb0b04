"""Do the kernels run here, and with the right bits: asked before `kernel: null` takes them.

Three steps of AdamW on a small shard, beside the same arithmetic on the CPU, where torch rounds each fp32 operation
once. A machine that has passed is remembered in a file; one that has not is asked again at the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton

from hift_kernels.adamw import adamw_step
from hift_kernels.grad_norm import prepare, sum_of_squares
from hift_kernels.launching import NUM_SCALARS, Weights
from hift_kernels.scalars import DECAY, INV_SQRT_BC2, NORM, SCALE, STEP_SIZE

NUMEL, STEPS = 2051, 3  # not whole tiles
LOSS_SCALE, MAX_NORM, LR = 8.0, 1.0, 1e-3
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01


def missing_tools() -> str | None:
    """What Triton needs to build its launchers and does not find, as a clause; `None` if nothing is missing."""
    compiler = os.environ.get("CC")  # as triton/runtime/build.py looks for it
    if not any(shutil.which(name) for name in ((compiler,) if compiler else ("gcc", "clang"))):
        named = f"CC={compiler!r} is no command" if compiler else "neither gcc nor clang is on PATH"
        return f"Triton needs a C compiler at run time, and {named}"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    folders = [sysconfig.get_paths(scheme=scheme)["include"]]
    folders += [folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return f"Triton needs Python.h at run time, and {folders[0]!r} has none (python3-dev, python3-devel)"
    return None


def trouble(device: torch.device) -> str | None:
    """Why the kernels should not be used on `device`, as a clause; `None` if they give the right bits there."""
    machine = _machine(device)
    file = _cache_file(machine)
    if file is not None:
        with suppress(OSError, ValueError):
            if file.read_text(encoding="utf-8") == machine:
                return None
    try:
        wrong = _wrong_bits(device)
    except Exception as error:  # whatever the compiler, its subprocess or the driver raises
        first = str(error).strip().partition("\n")[0]
        return f"a probe of the fused kernels failed ({type(error).__name__}: {first})"
    if wrong:
        return f"a probe of the fused kernels gave wrong bits in {', '.join(wrong)}"
    if file is not None:
        _remember(file, machine)
    return None


def _wrong_bits(device: torch.device) -> list[str]:
    """The results that are not those of the CPU."""
    found, expected = _by_kernels(device), _on_the_cpu()
    return [name for name, value in expected.items() if not torch.equal(_bits(found[name]), _bits(value))]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def _start() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """fp32 master weights, and each step's bf16 gradient: eighths up to 4, so that its squares add up exactly."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(NUMEL, generator=generator)
    return master, [(torch.randint(-32, 33, (NUMEL,), generator=generator) / 8).bfloat16() for _ in range(STEPS)]


def _by_kernels(device: torch.device) -> dict[str, torch.Tensor]:
    master, gradients = _start()
    master = master.to(device)
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    weights = Weights("fp32", torch.zeros_like(master, dtype=torch.bfloat16), master)
    scalars = torch.zeros(NUM_SCALARS, device=device)
    square = torch.zeros(1, dtype=torch.float64, device=device)
    divisor = torch.full_like(square, LOSS_SCALE)
    for gradient in gradients:
        gradient = gradient.to(device)
        sum_of_squares(gradient, square)
        prepare(square, divisor, scalars, lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY,
                max_norm=MAX_NORM, bias_correction=True)  # fmt: skip
        adamw_step(gradient, weights, exp_avg, exp_avg_sq, scalars, beta1=BETAS[0], beta2=BETAS[1], eps=EPS,
                   weight_decay=WEIGHT_DECAY)  # fmt: skip
    return {
        "norm": scalars[NORM.value : NORM.value + 1], "weights": weights.weight, "masters": master, "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }  # fmt: skip


def _on_the_cpu() -> dict[str, torch.Tensor]:
    master, gradients = _start()
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    for step, gradient in enumerate(gradients, start=1):
        scalars = _scalars(gradient.double().square().sum().item(), step)
        gradient = gradient.float() * scalars[SCALE.value]
        master = master * scalars[DECAY.value]
        exp_avg = exp_avg + (gradient - exp_avg) * (1 - BETAS[0])
        exp_avg_sq = exp_avg_sq + (gradient * gradient - exp_avg_sq) * (1 - BETAS[1])
        root = exp_avg_sq.double().sqrt().float()  # torch's fp32 square root is not always rounded correctly
        master = master - exp_avg / (root * scalars[INV_SQRT_BC2.value] + EPS) * scalars[STEP_SIZE.value]
    return {
        "norm": scalars[NORM.value : NORM.value + 1], "weights": master.bfloat16(), "masters": master,
        "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq,
    }  # fmt: skip


def _scalars(square: float, step: int) -> torch.Tensor:
    """What `prepare` leaves and AdamW reads: fp64, rounded to fp32."""
    norm = square**0.5 / LOSS_SCALE
    scalars = torch.zeros(NUM_SCALARS)
    scalars[SCALE.value] = 1 / (LOSS_SCALE * max((norm + 1e-6) / MAX_NORM, 1.0))
    scalars[STEP_SIZE.value] = LR / (1 - BETAS[0] ** step)
    scalars[INV_SQRT_BC2.value] = 1 / (1 - BETAS[1] ** step) ** 0.5
    scalars[DECAY.value] = 1 - LR * WEIGHT_DECAY
    scalars[NORM.value] = norm
    return scalars


def _machine(device: torch.device) -> str:
    """What decides about a kernel's bits and whether it can be built, as JSON."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    facts: dict[str, Any] = {
        "device": str(device.type), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "hip": torch.version.hip, "triton": triton.__version__,
        "kernels": hashlib.sha256(sources).hexdigest(),
    }  # fmt: skip
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["capability"] = torch.cuda.get_device_capability(device)
    return json.dumps(facts)


def _cache_file(machine: str) -> Path | None:
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # the XDG specification: such a value is ignored
        folder = os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):  # no home
        return None
    return Path(folder, "hift_ds", f"kernels-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json")


def _remember(file: Path, machine: str) -> None:
    """Whole or not at all, whoever else writes; a folder that cannot be written to costs the next start a probe."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as temporary:
                temporary.write(machine)
            os.replace(name, file)
        except OSError:
            os.unlink(name)
            raise
