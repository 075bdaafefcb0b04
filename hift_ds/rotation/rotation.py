"""Which block trains at which step: order and cycle. Pure Python but for the draw of a random order."""

from __future__ import annotations

import random


class Rotation:
    """The position in the queue of blocks.

    Source: HiFT, arXiv 2401.15207, Algorithm 1: the queue is fixed once by the order; the block just trained goes to
    its end. Because state of the queue is a function of the number of steps, only that number is kept.

    Args:
        num_blocks: k, the number of blocks.
        order: `bottom2up`, `top2down` or `random`.
        seed: Draws the random order; the same seed gives the same order on every rank, machine and Python version.
        steps_per_block: Optimizer steps before the next block's turn.
    """

    def __init__(self, num_blocks: int, order: str = "bottom2up", seed: int = 42, steps_per_block: int = 1) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: must be 1 or more")
        indices = list(range(num_blocks))
        if order == "top2down":
            indices.reverse()
        elif order == "random":
            random.Random(seed).shuffle(indices)
        elif order != "bottom2up":
            raise ValueError(f"order={order!r}: must be 'bottom2up', 'top2down' or 'random'")
        self.order = tuple(indices)
        self.steps_per_block = steps_per_block
        self.step = 0

    @property
    def num_blocks(self) -> int:
        return len(self.order)

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps in which every block is active once."""
        return self.num_blocks * self.steps_per_block

    @property
    def cycle(self) -> int:
        """Completed cycles."""
        return self.step // self.steps_per_cycle

    @property
    def active_block(self) -> int:
        """Index of the block that trains at the coming step."""
        return self.order[self.step // self.steps_per_block % self.num_blocks]

    @property
    def at_turn_start(self) -> bool:
        """True when the coming step is the first of its block's turn."""
        return self.step % self.steps_per_block == 0

    @property
    def at_cycle_start(self) -> bool:
        """True when the coming step is the first of a cycle."""
        return self.step % self.steps_per_cycle == 0

    @property
    def at_turn_end(self) -> bool:
        """True when the coming step is the last of its block's turn."""
        return (self.step + 1) % self.steps_per_block == 0

    @property
    def at_cycle_end(self) -> bool:
        """True when the coming step is the last of a cycle."""
        return (self.step + 1) % self.steps_per_cycle == 0

    def advance(self) -> bool:
        """Counts one optimizer step that was applied (never a skipped one, never a micro step).

        Returns:
            True when another block is active from now on.
        """
        before = self.active_block
        self.step += 1
        return self.active_block != before
