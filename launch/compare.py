#!/usr/bin/env python3
"""HiFT beside full fine-tuning, with and without ZeRO, in fp32, bf16 and fp16, on one and many GPUs.

    python launch/compare.py                               # the whole matrix, on all GPUs here (or 2 CPU ranks)
    python launch/compare.py --experiment memory           # memory profile, HiFT against full fine-tuning
    python launch/compare.py --experiment speed --rounds 3 # step times, the two in turn
    python launch/compare.py --experiment blocks           # ablation over block sizes
    python launch/compare.py --experiment rotation         # convergence over rotation frequencies and orders
    python launch/compare.py --stages 2 3 --precisions bf16 --gpus 1 4 -- --random --model_name_or_path config.json

Each cell is a process of its own under the deepspeed launcher: launch/benchmark_memory.py with the same model, data and
seed; what follows `--` goes to it. A cell that runs out of memory, is refused or crashes is a row like any other. Stop
and start again at will: finished cells are kept. Results: DIR/results.csv, results.md and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]  # a checkout need not be installed
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "memory": {"stages": [0, 2, 3], "precisions": ["fp32", "bf16"]},
    "speed": {"stages": [2], "precisions": ["bf16"], "seq_lens": [128]},
    "blocks": {"methods": ["full", "hift"], "stages": [2], "precisions": ["bf16"], "layers_per_block": [1, 2, 4, 8]},
    "rotation": {
        "methods": ["full", "hift"], "stages": [2], "precisions": ["bf16"], "steps_per_block": [1, 4, 16],
        "orders": ["bottom2up", "top2down", "random"],
    },
}  # fmt: skip


# What cells start with. Not what prepare_process() sets for this process alone: its threads would be every rank's.
INHERITED = dict(os.environ)


def main() -> int:
    args = _arguments()
    from hift_ds.recipes.comparison import flat_row, in_rounds, write_tables
    from hift_ds.recipes.display import Display
    from hift_ds.recipes.results import join_rounds
    from hift_ds.recipes.setup import own_folder, prepare_process, refuse

    prepare_process(verbose=False)
    import torch

    if torch.cuda.device_count() == 0:
        for environment in (os.environ, INHERITED):
            environment.setdefault("DS_ACCELERATOR", "cpu")
    display = Display(0)
    try:
        matrix, base = _matrix(args), _base_config(args)
        folder = own_folder(args.output_dir)
    except (ValueError, TypeError, OSError) as error:
        return refuse("compare.py", error)
    cells = matrix.cells()
    runs = in_rounds(cells, args.rounds)
    found: dict[Any, list[dict[str, Any]]] = {}
    title = f"{args.experiment or 'comparison'}: {len(cells)} cells"
    display.print(f"{title}, results in {folder}", markup=False)
    with display.cells(len(runs)) as progress:
        for cell, number in runs:
            progress.start(cell.name)
            mine = found.setdefault(cell, [])
            if not mine or mine[0]["status"] == "ok":  # what fails in the first round is not tried in the others
                mine.append(run_cell(args, cell, base, number))
            results = [(each, join_rounds(rounds)) for each, rounds in found.items()]
            write_tables([flat_row(*one) for one in results], folder, title)
            row = flat_row(cell, mine[-1])
            progress.finish(cell.name, row["status"], row["peak_mib"], row["step_ms_p50"])
    from hift_ds.recipes.pictures import draw_all

    for path in draw_all(results, folder):
        display.print(f"wrote {path}", markup=False, soft_wrap=True)
    display.print(f"wrote {folder / 'results.csv'} and results.md", markup=False, soft_wrap=True)
    return 0


def run_cell(args: argparse.Namespace, cell: Any, base: dict[str, Any], number: int = 1) -> dict[str, Any]:
    """The cell's result in round `number`, from its file if it is there, else from a run."""
    from hift_ds.memory.peaks import write_json
    from hift_ds.recipes.comparison import config_of, signature

    config = config_of(cell, base)
    sign = signature(cell, config, args.options)
    place = Path(args.output_dir, "cells")
    name = cell.name if number == 1 else f"{cell.name}.round{number}"
    path = place / f"{name}.json"
    if path.is_file() and not args.again:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("signature") == sign and (kept["status"] == "ok" or not args.retry_failed):
            return kept
    config_path = place / f"{cell.name}.config.json"
    write_json(config_path, config)
    path.unlink(missing_ok=True)
    result = _run(args, cell, config_path, path, place / f"{name}.log")
    result["signature"] = sign
    written = path.with_suffix(".part")  # whole or not at all: a cut run leaves no half of a result
    write_json(written, result)
    written.replace(path)
    return result


def _run(args: argparse.Namespace, cell: Any, config: Path, path: Path, log: Path) -> dict[str, Any]:
    command = [*_launcher(cell.gpus), str(HERE / "benchmark_memory.py"), "--deepspeed_config", str(config)]
    command += ["--seq_len", str(cell.seq_len), "--results", str(path), *args.options]
    command += ["--hift"] if cell.method == "hift" else []
    command += ["--gradient_checkpointing"] if cell.checkpointing else []
    path_first = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{INHERITED.get('PATH', '')}"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**INHERITED, **path_first}
        )
        try:
            code = process.wait(args.cell_timeout)
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:  # Ctrl-C, SIGTERM: the ranks must not outlive their comparison
            _end(process)
            raise
    if code != 0:
        _end(process)
        return {"status": _status(code, log, args.cell_timeout)}
    return json.loads(path.read_text(encoding="utf-8"))


def _end(process: subprocess.Popen) -> None:
    """Ends the launcher and all of its ranks."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    # Not process.wait(): if the signal came within another wait(), that one's lock stays taken for ever.
    with suppress(ChildProcessError):  # it has ended before the others of its group
        os.waitpid(process.pid, 0)


def _status(code: int | None, log: Path, timeout_s: float) -> str:
    """Why there is no result, as the row says it."""
    from hift_ds.recipes.setup import OUT_OF_MEMORY

    text = log.read_text(encoding="utf-8", errors="replace")
    if code is None:
        return f"no end within {timeout_s:.0f} s"
    if code == OUT_OF_MEMORY or re.search(r"out of memory", text, re.IGNORECASE):
        return "out of memory"
    error = re.search(r"\[rank \d+\] error: (.*?)(?=\[rank \d+\] error: |$)", text, re.MULTILINE)
    if error:  # the launcher does not hand every exit code on
        trained = re.search(r"^step \d+/", text, re.MULTILINE)
        return f"{'failed' if trained else 'refused'}: {error[1]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]+(Error|Exception)\b", line)]
    return f"failed ({code}): {(raised or lines or ['no output'])[-1][:200]}"


def _launcher(gpus: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    beside = Path(sys.executable).with_name("deepspeed")  # of this environment, whatever PATH says
    launcher = str(beside) if beside.exists() else "deepspeed"
    return [launcher, "--quiet", "--num_accelerators", str(gpus), "--master_port", str(port)]


def _matrix(args: argparse.Namespace) -> Any:
    from hift_ds.recipes.comparison import Matrix

    values = dict(EXPERIMENTS.get(args.experiment, {}))
    given = {field.name: getattr(args, field.name) for field in fields(Matrix)}
    values |= {name: value for name, value in given.items() if value is not None}
    values.setdefault("gpus", _default_gpus(args))
    return Matrix(**values)


def _default_gpus(args: argparse.Namespace) -> list[int]:
    """1, 2, 4 ... and all; for the experiments all alone."""
    import torch

    found = torch.cuda.device_count()
    if found == 0:
        return [2]
    powers = [2**k for k in range(found.bit_length()) if 2**k < found]
    return [found] if args.experiment else [*powers, found]


def _base_config(args: argparse.Namespace) -> dict[str, Any]:
    from hift_ds.recipes.arguments import read_ds_config

    config = read_ds_config(args.deepspeed_config)
    for option in args.options:
        if option in ("--hift", "--seq_len", "--results", "--deepspeed_config", "--gradient_checkpointing"):
            raise ValueError(f"{option} after --: compare.py sets it for each cell; use its own options")
    return config


def _arguments() -> argparse.Namespace:
    from hift_ds.recipes.arguments import positive

    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--experiment", choices=sorted(EXPERIMENTS), help="a ready matrix; the options below change it")
    add("--methods", nargs="+", choices=("full", "offload", "hift"), help="offload: DeepSpeed's, of optimizer state")
    add("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), help="0 = without ZeRO")
    add("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"))
    add("--gpus", nargs="+", type=int, metavar="N", help="numbers of ranks (default: 1, 2, 4 ... and all)")
    add("--optimizers", nargs="+", metavar="NAME", help="AdamW, SGD, SGDM, Adagrad, Adafactor, Lion")
    add("--gradient_checkpointing", nargs="+", type=_yes_or_no, metavar="yes|no", help="activation checkpointing")
    add("--seq_lens", nargs="+", type=int, metavar="S")
    add("--layers_per_block", nargs="+", type=int, metavar="M")
    add("--orders", nargs="+", choices=("bottom2up", "top2down", "random"))
    add("--steps_per_block", nargs="+", type=int, metavar="K")
    add("--updates", nargs="+", choices=("step", "backward"), help="where HiFT updates")
    add("--deepspeed_config", default=str(HERE / "demo.json"), metavar="JSON", help="what all cells share")
    add("--rounds", type=positive, default=1, metavar="N",
        help="run HiFT and full fine-tuning in turn, N times each; step times are over all rounds")  # fmt: skip
    add("--output_dir", default="outputs/compare", metavar="DIR")
    add("--cell_timeout", type=float, default=3600, metavar="SECONDS")
    add("--again", action="store_true", help="run finished cells again, too")
    add("--retry_failed", action="store_true", help="run cells again that ended without a result")
    add("options", nargs="*", help="after --: options of launch/benchmark_memory.py")
    own, passed = _split(sys.argv[1:])
    args = parser.parse_args(own)
    if args.options:
        parser.error(f"{args.options[0]!r}: options of the cells go after --")
    args.options = passed
    return args


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Its own arguments, and those for the cells."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be yes or no")
    return text == "yes"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: an exception, that ends the ranks
    sys.exit(main())
