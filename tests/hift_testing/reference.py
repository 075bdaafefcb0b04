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
        rate: Learning rate at an optimizer step (counted from 0); `None` = each param group keeps its own.
        clip: Largest gradient norm of the active block, 0 = off.
        steps_per_block: Optimizer steps of a turn.
        always: Names of parameters trained at every step.
        accumulate_before_reducing: Stages 0 and 1 sum micro steps on each rank and average once; 2 and 3 average every
            micro step.
        reset: Forget a block's state at each of its turns (`inactive_state: reset`).
        communication_dtype: dtype in which gradients are summed over ranks; `None` = the weights'.
        accumulation_dtype: dtype in which micro steps are summed; `None` = fp32, or the weights' for a single one.
        predivide: Divide by it before the sum over ranks, by the rest after (`gradient_predivide_factor`).
        mean: False = a sum over ranks (`gradient_allreduce_op: sum`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[Sequence[str]],
        order: Sequence[int],
        make_optimizer: Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer],
        rate: Callable[[int], float] | None,
        clip: float = 0.0,
        steps_per_block: int = 1,
        always: Sequence[str] = (),
        accumulate_before_reducing: bool = False,
        reset: bool = False,
        communication_dtype: torch.dtype | None = None,
        accumulation_dtype: torch.dtype | None = None,
        predivide: float = 1.0,
        mean: bool = True,
    ) -> None:
        self.model, self.order, self.rate, self.clip = model, list(order), rate, clip
        self.reset, self.predivide, self.mean = reset, predivide, mean
        self.communication_dtype, self.accumulation_dtype = communication_dtype, accumulation_dtype
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
        if self.reset and self.step_count % self.steps_per_block == 0:
            self.optimizers[block].state.clear()
        for turn in turns:
            optimizer = self.optimizers[turn]
            for name in self.members[turn]:
                self.masters[name].grad = grads[name] * scale
            if self.rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(self.step_count)
            optimizer.step()
            with torch.no_grad():
                for name in self.members[turn]:
                    self.params[name].copy_(self.masters[name])
        self.step_count += 1

    def _averaged_gradients(
        self, batches: Sequence[Sequence[dict[str, torch.Tensor]]], active: list[str]
    ) -> dict[str, torch.Tensor]:
        world, micro_steps = len(batches), len(batches[0])
        dtype = next(iter(self.params.values())).dtype
        local = [[self._gradients(batch, active, micro_steps) for batch in rank] for rank in batches]
        accumulation = self.accumulation_dtype or (torch.float32 if micro_steps > 1 else dtype)
        # One rank sends nothing, so nothing is rounded for the wire.
        wire = accumulation if world == 1 else self.communication_dtype or dtype
        result = {}
        for name in active:
            grads = [[micro[name] for micro in rank] for rank in local]
            if self.accumulate_before_reducing:
                averaged = self._average([_sum(rank, accumulation).to(wire) for rank in grads]).to(accumulation)
            else:
                by_micro = [self._average([rank[micro].to(wire) for rank in grads]) for micro in range(micro_steps)]
                averaged = _sum(by_micro, accumulation)
            result[name] = averaged.float()
        return result

    def _average(self, by_rank: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self.mean:
            return _sum(by_rank, by_rank[0].dtype)
        before, after = 1.0 / self.predivide, self.predivide / len(by_rank)
        return _sum([grad * before for grad in by_rank], by_rank[0].dtype) * after

    def _gradients(
        self, batch: dict[str, torch.Tensor], active: list[str], micro_steps: int
    ) -> dict[str, torch.Tensor]:
        for param in self.params.values():
            param.grad = None
        loss = self.model(**batch).loss / micro_steps
        if loss.requires_grad:  # a batch may reach no parameter of the block
            loss.backward()
        zero = {name: torch.zeros_like(self.params[name]) for name in active if self.params[name].grad is None}
        return {name: zero.get(name, self.params[name].grad) for name in active}


def _sum(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """One after the other, each sum computed in fp32 and rounded to `dtype`."""
    total = tensors[0].to(dtype)
    for tensor in tensors[1:]:
        total = (total.float() + tensor.float()).to(dtype)
    return total


class LionByHand(torch.optim.Optimizer):
    """Lion, element by element in the paper's order: torch.optim has none.

    Source: arXiv 2302.06675, Algorithm 2.
    """

    def __init__(
        self, params: Sequence[torch.Tensor], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                direction = torch.sign(beta1 * momentum + (1 - beta1) * param.grad)
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)
                momentum.copy_(beta2 * momentum + (1 - beta2) * param.grad)
