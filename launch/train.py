#!/usr/bin/env python3
"""Fine-tunes a causal language model with HiFT on DeepSpeed, or fully with plain DeepSpeed.

    deepspeed launch/train.py --hift                       # HiFT on the sample model and data
    deepspeed launch/train.py                              # the same run, full fine-tuning
    deepspeed launch/train.py --hift --deepspeed_config ds_configs/zero2_bf16.json --model_name_or_path FOLDER \\
        --dataset data.jsonl --max_steps 1000
    torchrun --nproc_per_node 2 launch/train.py --hift     # or mpirun -np 2 python launch/train.py --hift
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKPOINTS = "checkpoints"  # in the output folder
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]  # a checkout need not be installed


def main() -> int:
    from hift_ds.recipes.setup import run_script

    return run_script(train, __doc__, HERE / "demo.json")


def train(args: argparse.Namespace) -> None:
    """One run: load, evaluate, train, evaluate, save. Collective."""
    import hift_ds
    from hift_ds.distributed import agree
    from hift_ds.memory import MemoryMeter
    from hift_ds.memory.figures import mib
    from hift_ds.recipes import training
    from hift_ds.recipes.display import Display
    from hift_ds.recipes.packing import check_apart
    from hift_ds.recipes.resuming import require_same
    from hift_ds.recipes.setup import load_run

    hift_ds.init_distributed()
    display = Display(int(os.environ["RANK"]))
    run = load_run(args)
    folder = Path(args.output_dir, CHECKPOINTS)
    if args.resume and not args.allow_changed:
        agree(lambda: require_same(folder, of_run(run, args)))
    if not args.resume and (folder / "latest").is_file():
        display.print(f"{folder} has checkpoints of an earlier run; --resume would go on from them", markup=False)
    display.print(
        f"model {args.model_name_or_path}, data {run.data.name}: {len(run.data.train)} rows to train on, "
        f"{len(run.data.eval)} held out; {run.max_steps} steps", markup=False,
    )  # fmt: skip
    engine, _, _, _ = hift_ds.initialize(model=run.model, model_parameters=run.model.parameters(), config=run.ds_config)
    if run.data.packed:
        check_apart(engine, len(run.tokenizer))
    plans: dict[str, Any] = {}
    if args.hift:
        display.print(engine.hift.summary())
        plans = show_memory(engine, run, args, display)
    if args.resume:
        resume(engine, run, args, display)
    load = os.getloadavg()[0]
    before = evaluate(engine, run, args, display, "before training", 1)
    began = time.monotonic()
    with MemoryMeter(engine) if args.measure_memory else nullcontext() as meter:
        curve, stopped = steps(engine, run, args, display)
        if args.hift:
            engine.optimizer.settle()
            engine.finish_saving()
            drop_old(args, display)
    if stopped:
        display.print(f"SIGTERM: saved at step {engine.global_steps}, go on with --resume", markup=False)
        return
    seconds = time.monotonic() - began
    if engine.skipped_steps:
        display.print(f"{engine.skipped_steps} steps were left out: their gradients were not finite", markup=False)
    after = evaluate(engine, run, args, display, "after training", args.answers)
    if before and after:
        display.print(f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f}")
    folder = Path(args.output_dir) / "model"
    training.save_model(engine, run.tokenizer, folder)
    results = {
        "held_out_loss": [found and found["loss"] for found in (before, after)], "curve": curve,
        "training_seconds": round(seconds, 1), "load_average_before": round(load, 1),
        "skipped_steps": engine.skipped_steps,
        "answers": {"before": before and before["answers"], "after": after and after["answers"]}, **plans,
    }  # fmt: skip
    if meter is not None:
        report = meter.gather()
        results["measured_peak"] = report.peak
        display.print(f"peak memory of a rank: {mib(report.peak)} MiB of tensors, measured ({report.kind})")
    save_summary(engine, run, args, display, results)
    display.print(f"saved: AutoModelForCausalLM.from_pretrained({str(folder)!r})", markup=False, soft_wrap=True)


def evaluate(
    engine: Any, run: Any, args: argparse.Namespace, display: Any, when: str, num_questions: int
) -> dict[str, Any] | None:
    """Held-out loss, and answers to the first held-out questions. Collective."""
    from hift_ds.recipes import training

    loss = training.held_out_loss(engine, run.data, run.micro_batch)
    if loss is None:
        return None
    display.print(f"[bold]{when}[/]: held-out loss {loss:.3f}")
    asked = run.data.held_out[:num_questions]
    if not asked:
        return {"loss": loss, "answers": []}
    replies = training.answers(engine, run.tokenizer, asked, engine.device, args.answer_tokens)
    found = [
        {"question": one.question, "answer": one.answer, "reply": reply,
         "right": training.same_answer(reply, one.answer)}
        for one, reply in zip(asked, replies, strict=True)
    ]  # fmt: skip
    display.print(f"  Q: {found[0]['question']}\n  A: {found[0]['reply']}\n", markup=False)
    if len(found) > 1:
        display.print(f"  right: {sum(one['right'] for one in found)} of {len(found)} held-out questions\n")
    return {"loss": loss, "answers": found}


def steps(engine: Any, run: Any, args: argparse.Namespace, display: Any) -> tuple[list[dict[str, Any]], bool]:
    """The training loop, from where the engine is on. Collective.

    Returns:
        The held-out losses on the way, and whether a signal has ended it.
    """
    import torch
    from deepspeed import comm as dist

    from hift_ds.recipes import training
    from hift_ds.recipes.resuming import Stop

    stop, curve, done = Stop(args.save_on_signal), [], engine.global_steps
    stream = training.batches(run.data, run.micro_batch, args.seed, run.start, engine.device)
    engine.train()
    with display.progress(run.max_steps, done) as progress:
        for step in range(done, run.max_steps):
            began = time.monotonic()
            block = engine.hift.blocks[engine.hift.active_block].name if args.hift else ""
            sums = training.optimizer_step(engine, stream)
            sums = torch.cat((sums, sums.new_tensor([stop.asked])))
            dist.all_reduce(sums)
            mean, tokens, asked = sums.tolist()
            progress.update(mean, engine.get_lr()[0], block, tokens / (time.monotonic() - began))
            if engine.monitor.enabled:
                engine.monitor.write_events([("Train/loss", mean, step + 1)])
            if args.eval_every and (step + 1) % args.eval_every == 0 and len(run.data.eval):
                held_out = training.held_out_loss(engine, run.data, run.micro_batch)
                curve.append({"step": step + 1, "held_out_loss": held_out})
                display.print(f"step {step + 1}: held-out loss {held_out:.3f}")
                if engine.monitor.enabled:
                    engine.monitor.write_events([("Eval/loss", held_out, step + 1)])
            if asked or (args.save_every and (step + 1) % args.save_every == 0):
                save(engine, run, args, display)
            if asked:
                return curve, True
    return curve, False


def save(engine: Any, run: Any, args: argparse.Namespace, display: Any) -> None:
    """A checkpoint, and what the run is. Collective."""
    from hift_ds.checkpoint.folder import write_text
    from hift_ds.recipes.resuming import RUN

    folder = Path(args.output_dir, CHECKPOINTS)
    micro_steps = run.start + (engine.global_steps - run.start_step) * engine.gradient_accumulation_steps()
    rows = run.micro_batch * engine.dp_world_size
    engine.save_checkpoint(str(folder), client_state={"rows": micro_steps * rows})
    if display.active:
        write_text(folder / RUN, json.dumps(of_run(run, args), indent=1))
    drop_old(args, display)


def drop_old(args: argparse.Namespace, display: Any) -> None:
    """Removes all checkpoints but the last. Rank 0 does."""
    from hift_ds.checkpoint.folder import prune

    folder = Path(args.output_dir, CHECKPOINTS)
    if args.keep_last and display.active and folder.is_dir():
        prune(folder, args.keep_last)


def of_run(run: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same where it goes on."""
    from deepspeed import comm as dist

    from hift_ds.config.batch import batch_sizes
    from hift_ds.recipes.resuming import described

    world = dist.get_world_size()
    micro_batch, accumulation = batch_sizes(run.ds_config, world)
    return described(args, run.ds_config, micro_batch * accumulation * world)


def resume(engine: Any, run: Any, args: argparse.Namespace, display: Any) -> None:
    """Loads the newest checkpoint; the data goes on behind the rows that it has seen. Collective."""
    folder = Path(args.output_dir, CHECKPOINTS)
    path, state = engine.load_checkpoint(str(folder))
    if path is None:
        raise FileNotFoundError(f"--resume: no checkpoint in {str(folder)!r}; train with --save_every first")
    run.start_step, run.start = engine.global_steps, state["rows"] // (run.micro_batch * engine.dp_world_size)
    display.print(f"resumed at step {engine.global_steps} from {path}", markup=False)


def save_summary(engine: Any, run: Any, args: argparse.Namespace, display: Any, results: dict[str, Any]) -> None:
    """Writes what was run and what came of it into summary.json. Rank 0 writes."""
    from hift_ds.memory.peaks import write_json
    from hift_ds.recipes.results import provenance

    if not display.active:
        return
    what = {"model": args.model_name_or_path, "dataset": args.dataset, "steps": run.max_steps, "hift": args.hift}
    config = {key: value for key, value in run.ds_config.items() if key != "tensorboard"}
    path = Path(args.output_dir) / "summary.json"
    where = {**provenance(engine.device), "ranks": engine.dp_world_size}
    write_json(path, {**where, **what, **results, "config": config})


def show_memory(engine: Any, run: Any, args: argparse.Namespace, display: Any) -> dict[str, Any]:
    """The forecast of the run, by role, beside full fine-tuning's; returns its peaks for the summary. On rank 0."""
    from hift_ds.memory.figures import mib
    from hift_ds.memory.report import compared_table
    from hift_ds.recipes.planning import forecasts_of_run

    if not display.active:
        return {}
    here = ("cpu",) if engine.device.type == "cpu" else ()
    forecasts = forecasts_of_run(engine, run.ds_config, args.seq_len, "cuda", *here, ends_alone=True)
    if isinstance(forecasts, str):
        display.print(f"no forecast of memory: {forecasts}", markup=False)
        return {}
    card = forecasts[0]
    display.print(compared_table(card, "Peak memory of a rank, MiB: forecast for a card", mib))
    found = {"forecast_on_a_card": {"hift": card.worst.peak, "full": card.full.peak, "host": card.host}}
    for cpu in forecasts[1:]:
        found["forecast_on_this_cpu"] = {"hift": cpu.worst.peak, "full": cpu.full.peak}
        display.print(
            f"Here, on a CPU, host and device are one memory, in which all masters and moments stay: "
            f"{mib(cpu.worst.peak)} beside {mib(cpu.full.peak)} MiB ({cpu.saved})."
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
