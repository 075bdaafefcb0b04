"""From the command line to what a run needs: model, tokenizer, data, DeepSpeed config; and how a run fails."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EPOCHS = 3  # of a run without --max_steps
RANDOM_STEPS = 100  # of the rate's schedule, for a random model without --max_steps
FAILED, OUT_OF_MEMORY = 2, 3  # exit codes
_HELD: list[Any] = []  # files that stay open as long as the process lives


@dataclass
class Run:
    """What one training run works with.

    Attributes:
        start_step: Where it goes on: optimizer steps that are made.
        start: Micro steps whose rows have been seen.
    """

    model: Any
    tokenizer: Any
    data: Any
    ds_config: dict[str, Any]
    micro_batch: int
    max_steps: int
    start_step: int = 0
    start: int = 0


def prepare_process(verbose: bool) -> None:
    """Threads and log levels of this rank. Call it before torch and DeepSpeed are imported: they look only then."""
    world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or
                os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)  # fmt: skip
    # Ranks that each use every core of a machine slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("DS_LOG_LEVEL", "warning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


def load_run(args: argparse.Namespace, random: bool = False) -> Run:
    """Loads everything; the same on every rank. Collective.

    Args:
        random: Random weights from the model's config, no tokenizer and no data; `max_steps` as it is asked for, or 0.

    Raises:
        ValueError, TypeError, OSError: In one sentence, what is wrong with an argument, the config, the data.
        RuntimeError: The same of another rank.
    """
    from transformers.utils import logging as hf_logging

    from hift_ds.config.resolve import stage_of
    from hift_ds.distributed import agree, require_alike

    hf_logging.disable_progress_bar()  # one bar per rank: they would garble each other and the run's own
    if not args.verbose:
        quiet()
    # At stage 3 loading a model is collective: a rank that fails before must be heard before.
    run, config = agree(lambda: _without_model(args, random))
    rows = () if random else (len(run.data.train), len(run.data.eval))
    # Else some rank would wait for ever at the end.
    require_alike("rows of the data set or steps", (*rows, run.micro_batch, run.max_steps))
    if stage_of(run.ds_config) == 3:  # loading issues collectives: another in the place of one of them would never end
        run.model = _load_model(args, run, config)
    else:
        run.model = agree(lambda: _load_model(args, run, config))
    return run


def own_folder(output_dir: str) -> Path:
    """The folder that a run writes into, which is its own until this process ends; made where it is not there.

    Raises:
        ValueError: It cannot be made, or another run has it.
    """
    from hift_ds.checkpoint.folder import hold

    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _HELD.append(hold(folder / ".running"))
    except BlockingIOError:
        raise ValueError(f"--output_dir {output_dir!r}: another run writes there; wait, or name another one") from None
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir!r}: {error.strerror}; name another folder") from None
    return folder


def _without_model(args: argparse.Namespace, random: bool) -> tuple[Run, Any]:
    """The run but for its model, and the config of a random one."""
    import torch
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    from hift_ds.compiled_layers import require_compiler, require_stage_without_hooks
    from hift_ds.config.batch import batch_sizes
    from hift_ds.config.resolve import resolve, stage_of
    from hift_ds.memory.model_names import load_config
    from hift_ds.recipes.arguments import build_ds_config, check_pairs
    from hift_ds.recipes.datasets import load_text_dataset
    from hift_ds.recipes.models import load_tokenizer, source_of

    world = dist.get_world_size()
    check_pairs(args)
    ds_config = build_ds_config(args)
    resolve(ds_config, world=world, device_type=get_accelerator().device_name())  # a typo is found before the loading
    if args.compile:
        require_stage_without_hooks(stage_of(ds_config))
        require_compiler(torch.device(get_accelerator().current_device_name()))
    micro_batch, accumulation = batch_sizes(ds_config, world)
    if random:
        steps = args.max_steps or 0
        run = Run(None, None, None, build_ds_config(args, steps or RANDOM_STEPS), micro_batch, steps)
        return run, load_config(source_of(args.model_name_or_path))
    if dist.get_rank() == 0:
        own_folder(args.output_dir)
    tokenizer = load_tokenizer(args.model_name_or_path)
    data = load_text_dataset(args.dataset, tokenizer, seq_len=args.seq_len, pack=args.pack, seed=args.seed)
    steps = args.max_steps or max(1, EPOCHS * len(data.train) // (micro_batch * accumulation * world))
    return Run(None, tokenizer, data, build_ds_config(args, steps), micro_batch, steps), None


def _load_model(args: argparse.Namespace, run: Run, config: Any) -> Any:
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations import HfDeepSpeedConfig

    from hift_ds.chunked_loss import use_chunked_loss
    from hift_ds.compiled_layers import compile_layers
    from hift_ds.config.resolve import DTYPES, precision_of, stage_of
    from hift_ds.recipes.arguments import loss_tile_of
    from hift_ds.recipes.models import load_model, random_model
    from hift_ds.zero.activations import keep_activations

    # While this object lives, transformers partitions each parameter as it is created.
    kept = HfDeepSpeedConfig(run.ds_config) if stage_of(run.ds_config) == 3 else None
    options: dict[str, Any] = {
        "dtype": DTYPES[precision_of(run.ds_config)], "attn_implementation": args.attn_implementation
    }  # fmt: skip
    if config is not None:
        model = random_model(config, device=get_accelerator().current_device_name(), seed=args.seed, **options)
        model.config.use_cache = False
    else:
        model = load_model(args.model_name_or_path, **options)
    del kept
    tile = loss_tile_of(args)
    if tile is not None:
        use_chunked_loss(model, tile)
    if args.compile:
        compile_layers(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        keep_activations(model, args.keep_layers)
        model.config.use_cache = False
    return model


def quiet() -> None:
    """Leaves out what DeepSpeed and transformers say of every run."""
    from deepspeed.utils import logger
    from transformers.utils import logging as hf_logging

    logger.setLevel(logging.WARNING)
    # DeepSpeed's schedulers say this of every run, from their own constructors (runtime/lr_schedules.py).
    logger.addFilter(lambda record: "before it has started" not in record.getMessage())
    hf_logging.set_verbosity_error()


def run_script(
    work: Callable[[argparse.Namespace], Any], description: str | None, default_config: Path, *options: Callable
) -> int:
    """Reads the command line of a launch script, runs its work on this rank and ends its part in the process group.

    Returns the exit code. Collective where the work is.

    Args:
        work: Is given the options.
        options: What the script has beside the options that all share, each a function of the parser.
    """
    prepare_process("--verbose" in sys.argv)
    from hift_ds.recipes.arguments import add_arguments

    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, default_config)
    for add in options:
        add(parser)
    args = parser.parse_args()
    import torch
    from deepspeed import comm as dist

    from hift_ds.extras import needs_recipes

    try:
        with needs_recipes():
            work(args)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return fail(error, args.verbose, OUT_OF_MEMORY)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return fail(error, args.verbose)
    dist.destroy_process_group()  # NCCL warns otherwise
    return 0


def refuse(program: str, error: Exception) -> int:
    """Prints an error of a program that is no rank as one sentence; returns the exit code."""
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    return FAILED


def fail(error: Exception, verbose: bool, code: int = FAILED) -> int:
    """Prints an error as one sentence (with `verbose`, where it came from); returns the exit code.

    One of several ranks ends here at once: gloo's threads may abort a process that shuts down in order after the others
    have gone, and its exit code would be another. (MPI's ranks must shut down in order.)
    """
    if verbose:
        traceback.print_exception(error)
    print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        from hift_ds.distributed import MPI_VARIABLES

        if not any(name in os.environ for name in MPI_VARIABLES):
            sys.stdout.flush()
            os._exit(code)
    return code
