"""`python -m hift_ds.run train.py ...`: the script as it is, with `deepspeed.initialize` honouring a "hift" section."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import types
import zipfile

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
        _new_main()
        runpy._run_module_as_main(target[0])  # type: ignore[attr-defined]  # what `python -m` calls
        return
    path = os.path.abspath(target[0])
    if not getattr(sys.flags, "safe_path", False):  # where `-m` has put the working directory
        sys.path[0] = path if _is_package(path) else os.path.dirname(os.path.realpath(path))
    if _is_package(path):
        _new_main()
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(_new_main(path)))


def _is_package(path: str) -> bool:
    """Whether it is a folder or an archive with a `__main__.py`."""
    return os.path.isdir(path) or zipfile.is_zipfile(path)


def _new_main(path: str | None = None) -> types.ModuleType:
    """A `__main__` for the target, which stays: its classes are pickled by that name, also while Python ends."""
    main_module = types.ModuleType("__main__")
    if path is not None:
        main_module.__file__, main_module.__package__ = path, None
    main_module.__dict__["__builtins__"] = builtins
    sys.modules["hift_ds.run"] = sys.modules["__main__"]
    sys.modules["__main__"] = main_module
    if "__mp_main__" in sys.modules:
        sys.modules["__mp_main__"] = main_module
    return main_module


if __name__ == "__main__":
    main(sys.argv[1:])
