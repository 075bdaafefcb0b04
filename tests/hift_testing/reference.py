"""HiFT in plain torch, one process: the oracle that HiFT on ZeRO is held against.

Each rank's batch is run in turn on the same model; gradients are averaged as the ranks would; the update is
`torch.optim`'s on fp32 master weights, one optimizer per block. Nothing here comes from hift_ds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class ReferenceHiFT:
    """Trains one block per step.

    Args:
        model: Its parameters are the model weights (fp32 or bf16); trained in place.
        blocks: Lists of parameter names, each list a block.
        order: Block indices in visiting order.
        make_optimizer: (name, master) pairs of one block -> torch optimizer.
        rate: Learning rate at an optimizer step (counted from 0).
        clip: Largest gradient norm of the active block, 0 = off.
        steps_per_block: Optimizer steps of a turn.
        always: Names of parameters trained at every step.
        accumulate_before_reducing: Stages 0 and 1 sum micro steps on each rank and average once; 2 and 3 average every
            micro step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[Sequence[str]],
        order: Sequence[int],
        make_optimizer: Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer],
        rate: Callable[[int], float],
        clip: float = 0.0,
        steps_per_block: int = 1,
        always: Sequence[str] = (),
        accumulate_before_reducing: bool = False,
    ) -> None:
        self.model, self.order, self.rate, self.clip = model, list(order), rate, clip
        self.steps_per_block, self.accumulate_before_reducing = steps_per_block, accumulate_before_reducing
        self.params = dict(model.named_parameters())
        self.members = [list(names) for names in [*blocks, always]]
        self.masters = {
            name: self.params[name].detach().float().clone() for names in self.members for name in names
        }
        self.optimizers = [
            make_optimizer([(name, self.masters[name]) for name in names]) if names else None for names in self.members
        ]
        self.step_count = 0
        self.norms: list[float] = []

    def step(self, batches: Sequence[Sequence[dict[str, torch.Tensor]]]) -> None:
        """One optimizer step on `batches[rank][micro_step]`."""
        block = self.order[self.step_count // self.steps_per_block % len(self.order)]
        turns = [block] + ([len(self.members) - 1] if self.members[-1] else [])
        active = [name for turn in turns for name in self.members[turn]]
        for name, param in self.params.items():
            param.requires_grad_(name in active)
        grads = self._averaged_gradients(batches, active)
        norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt().item()
        self.norms.append(norm)
        scale = 1.0 / max(1.0, (norm + 1e-6) / self.clip) if self.clip else 1.0
        for turn in turns:
            optimizer = self.optimizers[turn]
            for name in self.members[turn]:
                self.masters[name].grad = grads[name] * scale
            for group in optimizer.param_groups:
                group["lr"] = self.rate(self.step_count)
            optimizer.step()
            with torch.no_grad():
                for name in self.members[turn]:
                    self.params[name].copy_(self.masters[name])
        self.step_count += 1

    def _averaged_gradients(self, batches, active: list[str]) -> dict[str, torch.Tensor]:
        world, micro_steps = len(batches), len(batches[0])
        dtype = next(iter(self.params.values())).dtype
        local = [[self._gradients(batch, active, micro_steps) for batch in rank] for rank in batches]
        accumulation = torch.float32 if micro_steps > 1 else dtype
        result = {}
        for name in active:
            if self.accumulate_before_reducing:
                sums = [sum(g[name].to(accumulation) for g in rank).to(dtype) for rank in local]
                result[name] = (_sum(sums) / world).float()
            else:
                means = [_sum([rank[micro][name] for rank in local]) / world for micro in range(micro_steps)]
                result[name] = _sum([mean.to(accumulation) for mean in means]).float()
        return result

    def _gradients(self, batch, active: list[str], micro_steps: int) -> dict[str, torch.Tensor]:
        for param in self.params.values():
            param.grad = None
        (self.model(**batch).loss / micro_steps).backward()
        zero = {name: torch.zeros_like(self.params[name]) for name in active if self.params[name].grad is None}
        return {name: zero.get(name, self.params[name].grad) for name in active}


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
