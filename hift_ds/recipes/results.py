"""What every results file says about where its figures come from."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def provenance(device: Any) -> dict[str, Any]:
    """Date, commit, device and versions of this run."""
    import deepspeed
    import torch
    import transformers

    versions = {"torch": torch, "deepspeed": deepspeed, "transformers": transformers}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}: {_processor()}",
        "driver": _driver() if device.type == "cuda" else "",
        "versions": {"python": platform.python_version(), **{k: v.__version__ for k, v in versions.items()}},
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes a results file as JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.splitlines()[0].strip() if found.stdout else "unknown"


def _commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git, as in many containers
        return "unknown"
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()
