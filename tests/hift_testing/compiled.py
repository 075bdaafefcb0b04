"""DeepSpeed's C++ operators, compiled before anything waits for them.

torch leaves a lock in an operator's folder while it compiles. A process that is ended meanwhile (a rank beside one that
has failed) leaves it for ever, and whoever needs the operator next waits as long. So tests have them made here first,
by one process at a time that nobody ends: a lock that it finds is of no use.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory

BUILDERS = {
    "cpu_adam": "CPUAdamBuilder", "cpu_adagrad": "CPUAdagradBuilder", "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder",
}  # fmt: skip
_LOAD = "import sys; from deepspeed.accelerator import get_accelerator as a; a().create_op_builder(sys.argv[1]).load()"


def compile_operator(name: str) -> None:
    """Makes one of `BUILDERS`, two minutes of a CPU core where it is not there yet."""
    folder = Path(_get_build_directory(name, False))
    with FileLock(folder.with_suffix(".tests_lock")):
        (folder / "lock").unlink(missing_ok=True)
        subprocess.run([sys.executable, "-c", _LOAD, BUILDERS[name]], check=True, capture_output=True, timeout=900)
