"""The command `hift-ds`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.recipes.arguments import CARD_NAMES, above_nothing, add_activations, positive

if TYPE_CHECKING:
    from hift_ds.memory.figures import Forecast
    from hift_ds.memory.planner import Planner
    from hift_ds.memory.request import Request

ATTENTIONS = ("sdpa", "eager")
PICTURES = (".png", ".pdf", ".svg")
_PLAN = """Says, without a GPU and without weights, whether a model trains on a card: peak memory of every block, host
memory, traffic, full fine-tuning beside, and the cheapest change that makes it fit.

    hift-ds plan --model config.json --micro_batch 1 --seq_len 1024 --gpu_memory 24GiB
    hift-ds plan --model FOLDER_OR_HUB_NAME --deepspeed_config ds_configs/zero3_bf16.json --gpus 8 --nodes 2 \\
        --seq_len 2048
"""

_EXPORT = """Writes the weights of a checkpoint, of any ranks and ZeRO stage, as a folder that transformers'
from_pretrained loads. One process, no GPU, memory of a few chunks.

    hift-ds export outputs/train/checkpoints exported
    hift-ds export outputs/train/checkpoints/global_step100 exported --dtype fp32
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 if a plan does not fit, 2 for an error."""
    parser = argparse.ArgumentParser(prog="hift-ds", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    shown: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    add_plan_arguments(commands.add_parser("plan", help="will it fit?", description=_PLAN, **shown))
    add_export_arguments(
        commands.add_parser("export", help="a checkpoint for from_pretrained", description=_EXPORT, **shown)
    )
    args = parser.parse_args(arguments)
    from hift_ds.recipes.setup import prepare_process, refuse

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing runs on a device, and DeepSpeed would warn of none
    prepare_process(verbose=False)
    try:
        return run_plan(args) if args.command == "plan" else run_export(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return refuse(f"hift-ds {args.command}", error)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hift-ds export`."""
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="the folder that save_checkpoint was given (its newest), or one of its tags")
    add("out", metavar="OUT", help="the folder to write; it must be empty or new")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the model's own")


def run_export(args: argparse.Namespace) -> int:
    """Writes the folder; returns 0."""
    from hift_ds.checkpoint.export import export

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{args.out!r} is not empty: name a new folder")
    for path in export(Path(args.checkpoint), out, args.dtype):
        print(f"wrote {path}")
    print(f"AutoModelForCausalLM.from_pretrained({args.out!r}) loads it, or the class that it was; without a tokenizer")
    return 0


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hift-ds plan`."""
    add = parser.add_argument
    add("--model", required=True, help="hub name, folder, config.json, or smollm2-135m (the sample)")
    add("--deepspeed_config", metavar="JSON", help='with or without a "hift" section (default: AdamW, bf16)')
    add("--gpus", type=positive, default=1, metavar="N", help="GPUs of a node")
    add("--nodes", type=positive, default=1, metavar="M", help="nodes")
    add("--gpu_memory", metavar="SIZE", help="of one card, as 24GiB (default: the card found here, if any)")
    add("--card", choices=CARD_NAMES, metavar="NAME",
        help=f"published memory and speeds of one, for seconds too: {', '.join(CARD_NAMES)}")  # fmt: skip
    add("--bus_gb_per_s", type=above_nothing, metavar="G", help="of copies each way, instead of the card's")
    add("--tflops", type=above_nothing, metavar="T", help="that large products reach (default: the card's)")
    add("--host_memory", metavar="SIZE", help="of one node, as 256GiB (default: not checked)")
    add("--micro_batch", type=positive, metavar="B", help="rows per GPU and forward (default: the config's, or 1)")
    add("--seq_len", type=positive, default=512, metavar="N", help="tokens of a row (default: %(default)s)")
    add("--optimizer", metavar="NAME", help="AdamW, SGD, ... with defaults, instead of the config's")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="instead of the config's")
    add("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage, instead of the config's")
    add("--layers_per_block", type=positive, metavar="M", help="instead of the config's (default: 1)")
    add("--attn_implementation", choices=ATTENTIONS, help="attention (default: transformers' choice, mostly sdpa)")
    add_activations(parser)
    add("--compile", action="store_true", help="layers are compiled: for the seconds, memory is counted as if not")
    add("--checkpoint_frozen", choices=("yes", "no"), default="yes",
        help="no: layers in which nothing is trained keep their activations, as with LlamaFactory")  # fmt: skip
    add("--padded", action="store_true", help="rows have padding (default: they are full, as packed rows are)")
    add("--every_block", action="store_true", help="trace each block: slower; by default alike blocks are interpolated")
    add("--json", nargs="?", const="-", metavar="FILE", help="everything in bytes, to a file or instead of the table")
    add("--plot", metavar="PNG", help="the picture: a bar for each block")
    # Earlier names.
    add("--seq", dest="seq_len", type=positive, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--attn", dest="attn_implementation", choices=ATTENTIONS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--activation_checkpointing", dest="gradient_checkpointing", action="store_true", help=argparse.SUPPRESS)


def run_plan(args: argparse.Namespace) -> int:
    """Plans and shows it."""
    from rich.console import Console

    from hift_ds.memory import report
    from hift_ds.memory.advice import advise, room_for_activations
    from hift_ds.memory.model_names import load_config
    from hift_ds.memory.peaks import write_json
    from hift_ds.memory.planner import Planner
    from hift_ds.memory.timing import timing
    from hift_ds.recipes.models import source_of
    from hift_ds.recipes.planning import request_of, speeds_of

    _check_outputs(args)
    speeds = speeds_of(args)
    request = request_of(args)
    planner = Planner(load_config(source_of(args.model)))
    if request.config.hift.layers_per_block is None and request.config.hift.blocks is None:
        request = _with_chosen_blocks(planner, request)
    forecast = planner.forecast(request, args.every_block)
    seconds = None
    if speeds is not None and args.tflops is None and request.config.precision == "fp32":
        print(f"--card {args.card}: its rate is of 16-bit products; for seconds in fp32 give --tflops", file=sys.stderr)
    elif speeds is not None:
        seconds = timing(planner.layout(request), request.seq, speeds, request.padded, request.compiled)
    advice = None if forecast.fits in (None, True) else advise(planner, forecast)
    room = room_for_activations(planner, forecast)
    if args.json != "-":
        width = None if sys.stdout.isatty() else 80
        Console(width=width, highlight=False, emoji=False).print(report.render(forecast, advice, seconds, room))
    if args.json is not None:
        found = report.to_json(forecast, advice, _as_the_paper_counts(planner, forecast), seconds, room)
        write_json(None if args.json == "-" else Path(args.json), found)
    if args.plot is not None:
        report.plot(forecast, Path(args.plot))
    return 1 if forecast.fits is False else 0


def _with_chosen_blocks(planner: Planner, request: Request) -> Request:
    """`"layers_per_block": null`, as the run would choose on a card of the size given."""
    from hift_ds.memory.choose import largest_blocks

    if request.gpu_memory is None:
        raise ValueError("hift.layers_per_block=null: the choice needs the size of a card; add --gpu_memory")
    choice = largest_blocks(planner, request, request.gpu_memory)
    print(f"layers_per_block: {choice.note}", file=sys.stderr)
    return request.changed("hift", "layers_per_block", value=choice.layers_per_block)


def _check_outputs(args: argparse.Namespace) -> None:
    """Before minutes of tracing, not after them."""
    if args.plot is not None and Path(args.plot).suffix not in PICTURES:
        raise ValueError(f"--plot {args.plot!r}: must end in one of {', '.join(PICTURES)}")
    for option, name in (("--plot", args.plot), ("--json", args.json)):
        if name not in (None, "-") and not Path(name).resolve().parent.is_dir():
            raise ValueError(f"{option} {name!r}: no such folder; make it first, or name another")


def _as_the_paper_counts(planner: Planner, forecast: Forecast) -> dict[str, Any]:
    from dataclasses import asdict

    from hift_ds.memory.paper import PRECISIONS, count

    layout = planner.layout(forecast.request)
    blocks = [[(fqn, layout.params[fqn].shape) for fqn in block.fqns] for block in layout.block_plan.blocks]
    group = layout.groups[0]
    rows = {f"full, {p}": count(blocks, layout.rule, group, p, hift=False) for p in PRECISIONS[:2]}
    rows |= {f"hift, {p}": count(blocks, layout.rule, group, p, hift=True) for p in PRECISIONS}
    return {name: asdict(row) for name, row in rows.items()}


if __name__ == "__main__":
    sys.exit(main())
