"""A run of many steps that is saved, killed, resumed and resharded at random, beside one that is not: `make soak`.

An era is a stretch on the same ranks at the same stage. Its checkpoint of the beginning is trained on from a second
time, in one go, and at its end every weight, master, moment and counter must be the same bits; where an era ends the
next one's load must have the same bits, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STEP_ROWS = 4
WARM_UP = 60  # steps until a process has taken what it needs
HIFT = {"order": "random", "lr_update": "cycle"}


def episode(
    folder: str, stage: int, until: int, saves: list[int], asynchronous: bool,
    dies: tuple[int, int, float] | None = None,
) -> tuple[dict[str, str], dict[str, str], list[float]]:
    """From the folder's newest checkpoint to a step, with saves on the way; on each rank.

    Args:
        dies: A rank, the step in which it gets SIGKILL, and after how many seconds of it.

    Returns:
        Fingerprints of all weights and state after the load and at the end; the process's MiB at each save.
    """
    import psutil
    from deepspeed import comm as dist
    from hift_testing.training import ds_config, engine_of
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1 if Path(folder, "latest").exists() else 0)  # a resumed run begins on other weights
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        use_cache=False, attn_implementation="eager", attention_dropout=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    rows = STEP_ROWS // dist.get_world_size()
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 4000, "warmup_num_steps": 9,
                                                     "warmup_max_lr": 0.002}}  # fmt: skip
    extra = {"train_micro_batch_size_per_gpu": rows, "gradient_clipping": 1.0, "scheduler": scheduler}
    engine = engine_of(ds_config(stage, "bf16", HIFT, **extra), LlamaForCausalLM(config))
    engine.load_checkpoint(folder)
    engine.train()
    begun, process = _state(engine), psutil.Process()
    used: list[float] = []
    for step in range(engine.global_steps, until):
        if dies is not None and dies[:2] == (dist.get_rank(), step):
            threading.Timer(dies[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 64, (STEP_ROWS, 10), generator=generator)
        mine = ids[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
        if step + 1 in saves or step + 1 == until:
            engine.save_checkpoint(folder, asynchronous=asynchronous and step + 1 != until)
            used.append(process.memory_info().rss / 2**20)
            if dist.get_rank() == 0:
                _keep_two(Path(folder))
    engine.finish_saving()
    ended = _state(engine)
    engine.destroy()
    return begun, ended, used


def _keep_two(folder: Path) -> None:
    from hift_ds.checkpoint.folder import prune

    prune(folder, 2)


def _state(engine: Any) -> dict[str, str]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from hift_testing.fingerprints import digest, weights_by_name

    found = weights_by_name(engine)
    for name, param in engine.module.named_parameters():
        parts = [safe_get_full_optimizer_state(param, slot) for slot in ("exp_avg", "exp_avg_sq")]
        found[f"{name} state"] = digest([safe_get_full_fp32_param(param), *parts])
    updates = [state.step for state in engine.optimizer.states]
    counters = (engine.global_steps, engine.hift.active_block, engine.get_lr(), updates)
    return {**found, "counters": repr(counters)}


@dataclass
class Found:
    """What has happened."""

    steps: int
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    differ: list[str] = field(default_factory=list)
    growth_mib: float = 0.0


def soak(steps: int, seed: int, root: Path, pools: dict[int, Any], mean: int = 50) -> Found:
    """Trains so many steps; something happens about every `mean`.

    Args:
        root: An empty folder.
        pools: RankPools by their number of ranks; they are killed.

    Raises:
        RankError: A rank did not end after another was killed, or a run could not go on.
    """
    draw, found = random.Random(seed), Found(steps, seed)
    live, begin = root / "live", 0
    last: dict[str, str] | None = None
    ranks, stage = 1, 0
    while begin < steps:
        ranks, stage = draw.choice([(r, s) for r in sorted(pools) for s in range(4) if (r, s) != (ranks, stage)])
        end = min(steps, begin + draw.randint(mean, 3 * mean))
        beside = root / "beside"
        shutil.rmtree(beside, ignore_errors=True)
        if live.exists():
            shutil.copytree(live, beside)
        begun = pools[ranks].run(episode, str(beside), stage, begin, [], False)[0][0]
        ended = _era(live, pools[ranks], stage, begin, end, draw, found, mean)
        if last is not None and begun != last:
            found.differ.append(f"the load at step {begin}, {ranks} ranks, stage {stage}")
        straight = pools[ranks].run(episode, str(beside), stage, end, list(range(begin, end, 10)), False, timeout_s=600)
        used = straight[0][2][WARM_UP // 10 :]
        found.growth_mib = max(found.growth_mib, used[-1] - used[0] if used else 0.0)
        if straight[0][1] != ended:
            found.differ.append(f"steps {begin} to {end}, {ranks} ranks, stage {stage}")
        found.counts["eras"] += 1
        begin, last = end, ended
    return found


def _era(
    live: Path, pool: Any, stage: int, begin: int, end: int, draw: random.Random, found: Found, mean: int
) -> dict[str, str]:
    """A stretch on the same ranks at the same stage: episodes, some of which are killed. What there is at its end."""
    at, ended = begin, None
    while at < end or ended is None:
        until = min(end, at + draw.randint(mean // 2, 3 * mean // 2))
        saves = sorted(draw.sample(range(at + 1, until + 1), min(until - at, draw.randint(1, 4))))
        dies = (draw.randrange(pool.world), draw.randrange(at, until), draw.random() * 0.1) if at < until else None
        dies = dies if draw.random() < 0.6 else None
        results = _maybe_killed(pool, found, str(live), stage, until, saves, draw.random() < 0.5, dies)
        at = _step_of(live)
        ended = None if results is None else results[0][1]
        found.counts["saves"] += 0 if results is None else len(results[0][2])
    return ended


def _step_of(live: Path) -> int:
    latest = live / "latest"
    return int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0


def _maybe_killed(pool: Any, found: Found, *args: Any) -> list[Any] | None:
    """An episode's results by rank; `None` where one of its ranks was killed meanwhile."""
    from hift_testing.ranks import RankError

    found.counts["episodes"] += 1
    try:
        results = pool.run(episode, *args, timeout_s=600)
    except RankError as error:
        if args[-1] is None or "no answer" in str(error) or "the process ended" not in str(error):
            raise
        found.counts["kills"] += 1
        return None
    if args[-1] is not None:
        pool.close()  # its timer still runs
    return results


def main() -> int:
    """`make soak`: writes what was found; the exit code is 0 if all bits were the same and memory stayed flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    from hift_testing.ranks import RankPool

    from hift_ds.recipes.results import provenance

    began = time.monotonic()
    pools = {world: RankPool(world) for world in (1, 2)}
    with tempfile.TemporaryDirectory() as root:
        found = soak(args.steps, args.seed, Path(root), pools)
    for pool in pools.values():
        pool.close()
    result = {
        **provenance(torch.device("cpu")), "steps": found.steps, "seed": found.seed, **found.counts,
        "differ": found.differ, "growth_mib": round(found.growth_mib, 1), "seconds": round(time.monotonic() - began),
        "cores": os.cpu_count(),
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if not found.differ and found.growth_mib < 8 else 1


if __name__ == "__main__":
    sys.exit(main())
