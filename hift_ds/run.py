"""`python -m hift_ds.run train.py ...`: the script as it is, with `deepspeed.initialize` honouring a "hift" section."""

from __future__ import annotations

import os
import runpy
import sys

USAGE = """usage: python -m hift_ds.run SCRIPT [arguments of its own]
       python -m hift_ds.run -m MODULE [arguments of its own]"""
HELP = f"""{USAGE}

Runs a script or a module as python would, but its DeepSpeed config may have a
"hift" section: deepspeed.initialize then trains with HiFT, whoever calls it
(Trainer, Accelerate, TRL, a loop of your own). Under a launcher:

    torchrun --nproc_per_node 2 -m hift_ds.run train.py ...
    deepspeed --module hift_ds.run train.py ...
    accelerate launch -m hift_ds.run train.py ..."""


def main(argv: list[str]) -> None:
    """Enables HiFT, then runs a script, or a module after `-m`, as Python would have.

    Args:
        argv: The target and its arguments. `--local_rank=N` before it, where the `deepspeed` launcher writes it, goes
            to the target.
    """
    ahead = []
    while argv and argv[0].startswith(("--local_rank=", "--local-rank=")):
        ahead.append(argv[0])
        argv = argv[1:]
    as_module = argv[:1] == ["-m"]
    target, rest = argv[as_module : as_module + 1], argv[as_module + 1 :]
    if not target or target[0] in ("-h", "--help"):
        print(HELP if target else USAGE, file=sys.stdout if target else sys.stderr)
        raise SystemExit(0 if target else 2)
    if not as_module and not os.path.exists(target[0]):
        print(f"hift_ds.run: {target[0]!r}: no such script; name a file, or a module after -m", file=sys.stderr)
        raise SystemExit(2)
    from hift_ds.enabling import enable

    enable()
    sys.argv = [target[0], *ahead, *rest]
    if as_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(target[0]))  # where `-m` has put the working directory
    runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
