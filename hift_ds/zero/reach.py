"""Which parameters have had gradients: blocks that a batch does not reach, and parameters that no batch ever does."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from deepspeed import comm as dist

from hift_ds.distributed import of_all_ranks
from hift_ds.rotation.blocks import BlockPlan
from hift_ds.shards import UnitShard

logger = logging.getLogger(__name__)
TURNS = 2  # whole turns without any gradient after which a parameter is taken for one that never gets any


class Reach:
    """Keeps account of gradients by parameter.

    Args:
        plan: Names the blocks.
        no_gradient: `hift.no_gradient`: `error`, or `skip` = such a turn passes without an update.

    Attributes:
        skipped: Turns that passed without an update, by block.
    """

    def __init__(self, plan: BlockPlan, no_gradient: str) -> None:
        self.plan, self.skips = plan, no_gradient == "skip"
        self.skipped: Counter[int] = Counter()
        self._reported: Counter[int] = Counter()
        self._seen: set[torch.nn.Parameter] = set()
        self._silent: Counter[torch.nn.Parameter] = Counter()
        self._warned: set[int] = set()

    def note(self, shard: UnitShard, touched: set[torch.nn.Parameter], turn_ends: bool) -> int:
        """Counts a step's gradients of one block.

        Args:
            shard: The block's.
            touched: Its parameters that had a gradient on this rank.
            turn_ends: This is the last step of its turn.

        Returns:
            How many of its parameters seem never to get any on this rank.
        """
        self._seen |= touched
        unseen = [param for param in shard.params if param not in self._seen]
        if turn_ends and (touched or not self.skips):  # turns that are skipped whole are counted by `skip`
            self._silent.update(unseen)
            if self.skips:
                self._warn_of_silent(shard, [param for param in unseen if self._silent[param] == TURNS])
        return 0 if self.skips else sum(self._silent[param] >= TURNS for param in unseen)

    def _warn_of_silent(self, shard: UnitShard, params: list[torch.nn.Parameter]) -> None:
        if params:
            logger.warning(
                "%s received no gradient on this rank in %d whole turns: either batches reach it rarely, or it never "
                "trains (reentrant activation checkpointing cuts parameters off: pass use_reentrant=False)",
                _some([shard.fqns[shard.position[param]] for param in params]), TURNS,
            )  # fmt: skip

    def check(self, shards: list[UnitShard]) -> None:
        """Called on every rank when one has counted such parameters of the blocks that train. Collective.

        Raises:
            RuntimeError: A parameter has had no gradient on any rank; on every rank.
        """
        named = [(fqn, param) for shard in shards for fqn, param in zip(shard.fqns, shard.params, strict=True)]
        silent = [fqn for fqn, param in named if param not in self._seen and self._silent[param] >= TURNS]
        everywhere = of_all_ranks(silent)
        common = [fqn for fqn in everywhere[0] if all(fqn in names for names in everywhere)]
        if common:
            raise RuntimeError(
                f"{_some(common)} received no gradient on any rank in {TURNS} whole turns and would never train: "
                "either the loss does not depend on it (add it to hift.frozen), or reentrant activation checkpointing "
                'cut it off (pass use_reentrant=False), or batches reach it rarely (set "no_gradient": "skip" in the '
                '"hift" section)'
            )
        self._seen.update(param for fqn, param in named if fqn in silent)  # another rank's batches reach it

    def skip(self, block: int, cycle_ends: bool) -> None:
        """Counts a turn's step that passes without an update; reports at most once a cycle."""
        self.skipped[block] += 1
        if cycle_ends or not self._reported:
            self.report()

    def report(self) -> None:
        """Warns of what was skipped since the last report."""
        new = self.skipped - self._reported
        if new and dist.get_rank() == 0:
            logger.warning("no gradient on any rank, steps without an update: %s", self.summary(new))
        self._reported = Counter(self.skipped)

    def summary(self, skipped: Counter[int] | None = None) -> str:
        """Skipped steps by block; empty if there are none."""
        counts = self.skipped if skipped is None else skipped
        return ", ".join(f"block {b} ({self.plan.blocks[b].name}) {n}" for b, n in sorted(counts.items()))

    def warn_partial(self, block: int, shards: list[UnitShard], touched: set[torch.nn.Parameter]) -> None:
        """Says once for each block that a part of it had no gradient on this rank."""
        named = [pair for shard in shards for pair in zip(shard.fqns, shard.params, strict=True)]
        missing = [fqn for fqn, param in named if param not in touched]
        if missing and touched and block not in self._warned:
            self._warned.add(block)
            logger.warning(
                "block %d (%s): no gradient for %s on this rank in this step; it counts as zero",
                block, self.plan.blocks[block].name, _some(missing),
            )  # fmt: skip

    def message(self, block: int) -> str:
        """Why a step of a block cannot be made, and what to do."""
        return (
            f"block {block} ({self.plan.blocks[block].name}) received no gradient on any rank, so its update would be "
            "lost: either the loss does not depend on it (add it to hift.frozen), or reentrant activation "
            "checkpointing cut it off (pass use_reentrant=False), or this batch does not reach it (set "
            '"no_gradient": "skip" in the "hift" section)'
        )


def _some(fqns: list[str]) -> str:
    return ", ".join(fqns[:3]) + (f" and {len(fqns) - 3} more" if len(fqns) > 3 else "")
