"""The norm of a step's gradients and the checks of the rotation, in one all-reduce; read at once or a step later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.state.ring import Lane

NORM_ROW = 4096  # elements summed in fp32 at a time
NORM_TILE = 1 << 23  # elements whose rows are summed at a time
_NUM_FACTS = 7


@dataclass(frozen=True)
class Verdict:
    """What the ranks have found out together.

    Attributes:
        norm: Global gradient norm, times the loss scale; nan or inf where an element is.
        finite: Every element on every rank is.
        reached: Parameters with a gradient, over all ranks; 0 = the update would be lost.
        agreed: All ranks train the same block.
        silent: Parameters that seem never to get a gradient, over all ranks, each counted on its own.
        faults: Ranks that cannot make the step.
        good: Whether the kernels have made the update.
    """

    norm: float
    finite: bool
    reached: int
    agreed: bool
    silent: int
    faults: int
    good: bool


class StepCheck:
    """The norm and the checks of one step. Making it is collective; nothing in it waits for the device but `verdict`.

    Args:
        grads: Averaged gradient shards of everything that trains, scaled.
        reached: Parameters of the active block that had a gradient on this rank.
        must_reach: Without any on any rank the update must be left out.
        silent: Parameters that seem never to get one on this rank.
        faults: 1 if this rank cannot make the step.
        block: The active block.
        stage: ZeRO stage.
        world: Ranks.
        group: Their process group.
        fused: By the kernel of `hift_kernels.grad_norm` instead of torch.

    Attributes:
        total: fp64, one element, on the device: the sum of squares over all ranks, not finite where an element is not.
        square: The same; nan where the update must be left out, for whatever reason.
    """

    def __init__(
        self, grads: list[torch.Tensor], *, reached: int, must_reach: bool, silent: int, faults: int, block: int,
        stage: int, world: int, group: object, fused: bool,
    ) -> None:  # fmt: skip
        total = _fused_sum(grads) if fused else _eager_sum(grads)
        facts = total.new_zeros(_NUM_FACTS)
        facts[0:1].copy_(total)
        facts[1:2].copy_(~torch.isfinite(total))
        for place, value in enumerate((reached, block, block * block, silent, faults), start=2):
            facts[place].fill_(value)  # not torch.tensor(value), which waits for the device
        if world > 1:
            dist.all_reduce(facts, group=group)
        if stage == 0:
            facts[0].div_(world)  # every rank has measured the whole gradient
        self._facts, self._world = facts, world
        good = (facts[1] == 0) & (facts[4] * world == facts[3] * facts[3]) & (facts[6] == 0)
        if must_reach:
            good &= facts[2] > 0
        self._must_reach = must_reach
        self.total = facts[0:1]
        self.square = self.total.masked_fill(~good, torch.nan)  # torch.where would bring its scalar there, and wait
        self._host, self._sent = facts, None

    def send(self, lane: Lane) -> None:
        """Begins to copy the facts to the host, so that a later `verdict` finds them there.

        Before the update, and on a lane of its own: copies in one direction are made in the order in which they are
        ready, whatever their streams, so behind a block's state on its way out these bytes would hold up the whole lane
        that they are on, and the next forward with it.
        """
        if self._facts.device.type == "cuda":
            self._host = torch.empty(_NUM_FACTS, dtype=torch.float64, pin_memory=True)
            lane.wait(torch.cuda.current_stream(self._facts.device).record_event())
            lane.run(lambda: self._host.copy_(self._facts, non_blocking=True))
            lane.uses(self._facts)
            self._sent = lane.record()

    def verdict(self) -> Verdict:
        """Waits until the facts are on the host."""
        if self._sent is not None:
            self._sent.synchronize()
        square, non_finite, reached, block_sum, block_square_sum, silent, faults = self._host.tolist()
        finite, agreed = non_finite == 0, block_square_sum * self._world == block_sum * block_sum
        return Verdict(
            norm=square**0.5,
            finite=finite,
            reached=int(reached),
            agreed=agreed,
            silent=int(silent),
            faults=int(faults),
            good=finite and agreed and not faults and (reached > 0 or not self._must_reach),
        )


def sum_of_squares(flat: torch.Tensor) -> torch.Tensor:
    """In fp32 along short rows and in fp64 between them: one fp32 sum over 8 M elements is off by 1e-3 on a CPU."""
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return rows.double().square().sum() + rest.double().square()


def _eager_sum(grads: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(1, dtype=torch.float64, device=grads[0].device)
    for grad in grads:
        for tile in grad.split(NORM_TILE):
            total += sum_of_squares(tile)
    return total


def _fused_sum(grads: list[torch.Tensor]) -> torch.Tensor:
    from hift_kernels.grad_norm import sum_of_squares as fused_sum

    total: Any = torch.zeros(1, dtype=torch.float64, device=grads[0].device)
    for grad in grads:
        fused_sum(grad, total, accumulate=True)
    return total
