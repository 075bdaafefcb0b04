"""Calls in an order that nobody has planned leave the weights of an oracle in plain torch; a seed draws them.

`drawn` settles a run and its calls; `trained` makes them on an engine and on the oracle and compares whole weights
after each. What a call is right to do stands beside it, on the oracle.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from hift_testing.contestants import TorchHiFT, adamw, blocks_of, config_of, data, distance, loss_of
from hift_testing.disturbed import Fused, OutOfMemory
from hift_testing.messages import error_of, is_clear
from hift_testing.training import DEVICE, whole_weights

import hift_ds

pytestmark = pytest.mark.multi_rank

EACH = 4  # seeds of a case: every stage
QUICK = 2  # the rest is slow


@dataclass
class Setting:
    """A run: what `initialize` is given, and its calls with a number that each makes of what it likes."""

    stage: int
    dtype: str
    gas: int
    hift: dict[str, Any]
    client: bool
    overlap: bool
    calls: list[tuple[str, int]] = field(default_factory=list)


# How often a call is drawn.
OFTEN = {
    "micro_step": 30, "two_outputs": 2, "two_backwards": 1, "not_finite": 2, "dropped": 5, "zero_grad": 2,
    "looked_at": 5, "failed_backward": 4, "failed_step": 3, "empty_step": 2, "refused": 3, "written": 3, "rate": 2,
    "requires_grad": 2, "offloaded": 2, "save": 3, "load": 4, "again": 2, "copied": 1,
}  # fmt: skip


def drawn(seed: int, length: int = 40) -> Setting:
    """The same on every rank."""
    pick = random.Random(seed)
    setting = Setting(
        stage=seed % 4, dtype=pick.choice(["fp32", "fp32", "bf16"]), gas=pick.choice([1, 2, 3]),
        hift={
            "layers_per_block": pick.choice([1, 1, 2]), "order": pick.choice(["bottom2up", "top2down", "random"]),
            "lr_update": "step", "state": {"residency": pick.choice(["stream", "device"])},
            "kernel": pick.choice(["torch", "torch", "torch", "triton"]),
        },
        client=pick.random() < 0.4, overlap=pick.random() < 0.5,
    )  # fmt: skip
    names = [name for name, often in OFTEN.items() for _ in range(often)]
    setting.calls = [(pick.choice(names), pick.randrange(10**6)) for _ in range(length)]
    return setting


# Of `distance`, where a lost update is 1. bf16: torch accumulates in bf16, so the sign of a gradient near 0, which is
# all of Adam's first step, may differ.
BOUNDS = {"fp32": 1e-3, "bf16": 0.6}


class Oracle(TorchHiFT):
    """`TorchHiFT` of which gradients that are not finite change nothing, and that can be put back."""

    def update(self) -> None:
        active = self.blocks[self.turn % len(self.blocks)]
        grads = [self.named[name].grad for name in active if self.named[name].grad is not None]
        bad = torch.tensor(float(not all(grad.isfinite().all() for grad in grads)), device=DEVICE)
        dist.all_reduce(bad)
        if bad and self.passes_bad_steps:  # the fused kernels' host hears of it a step later
            self.turn += 1
        if bad:
            self.zero_grad()
            self._activate()
        else:
            super().update()

    passes_bad_steps = False

    def end_window(self) -> None:
        self.zero_grad()
        self.micro += -self.micro % self.gas

    @property
    def begins(self) -> bool:
        return self.micro % self.gas == 0

    def position(self) -> Any:
        return copy.deepcopy((whole_weights(self), self.masters, [rule.state_dict() for rule in self.rules], self.turn))

    def go_to(self, position: Any) -> None:
        """Where it was; rates are those of then, too."""
        weights, masters, states, self.turn = copy.deepcopy(position)
        with torch.no_grad():
            for name, param in self.named.items():
                param.copy_(weights[name])
                self.masters[name].copy_(masters[name])
        for rule, state in zip(self.rules, states, strict=True):
            rule.load_state_dict(state)
        self.end_window()
        self._activate()

    def forget(self) -> None:
        """As a new engine on the present weights begins."""
        for name, param in self.named.items():
            self.masters[name].copy_(param.detach())
        self.rules = [adamw([self.masters[name] for name in block]) for block in self.blocks]
        self.turn = 0
        self.end_window()
        self._activate()


LEAVES_GATHERED = {"looked_at", "dropped", "failed_backward", "failed_step"}
ENDS_WINDOW = {"micro_step", "two_outputs", "two_backwards", "load", "again"}


class Pair:
    """An engine and its oracle; each method is a call, made on both."""

    def __init__(self, setting: Setting, folder: str) -> None:
        self.setting, self.folder = setting, Path(folder)
        self.engine, self.optimizer = self.initialize(Fused(1))
        self.oracle = Oracle(Fused(1), blocks_of(self.engine), setting.dtype, setting.gas)
        self.oracle.passes_bad_steps = setting.hift["kernel"] == "triton"
        self.saved: Any = None
        self.gathers = True  # stage 3 "cannot free" a parameter that a forward without a backward has left gathered

    def initialize(self, module: Any, **hift: Any) -> Any:
        s = self.setting
        config = config_of(s.stage, s.dtype, {**s.hift, **hift}, s.gas, zero_optimization={"overlap_comm": s.overlap})
        client = {}
        if s.client:
            del config["optimizer"]
            client = {"optimizer": adamw(module.parameters())}
        return hift_ds.initialize(model=module, config=config, **client)[:2]

    def both(self, make: Callable[[Any], Any]) -> None:
        """A micro step with the loss that `make` gets of either."""
        for contestant in (self.engine, self.oracle):
            contestant.backward(make(contestant))
            contestant.step()

    # Calls. `n` tells batches and ways apart.
    def micro_step(self, n: int) -> None:
        self.both(lambda c: loss_of(c(data(n))))

    def two_outputs(self, n: int) -> None:
        self.both(lambda c: (loss_of(c(data(n))) + loss_of(c(data(n + 1)))) / 2)

    def two_backwards(self, n: int) -> None:
        for contestant in (self.engine, self.oracle):
            for seed in (n, n + 1):
                contestant.backward(loss_of(contestant(data(seed))))
            contestant.step()

    def not_finite(self, n: int) -> None:
        worst = dist.get_rank() == n % dist.get_world_size() or n % 3 == 0
        self.both(lambda c: loss_of(c(data(n))) * (float("nan") if worst else 1.0))

    def dropped(self, n: int) -> None:
        self.engine.backward(1e3 * loss_of(self.engine(data(n))))
        self.zero_grad(n)

    def zero_grad(self, n: int) -> None:
        (self.engine, self.engine.module, self.optimizer)[n % 3].zero_grad()
        self.oracle.zero_grad()

    def looked_at(self, n: int) -> None:
        """Forwards without a backward."""
        engine = self.engine
        if n % 4 == 0:
            engine(data(n))
        elif n % 4 == 1:
            engine.eval()
            engine(data(n))
            engine.train()
        else:
            with torch.no_grad() if n % 4 == 2 else torch.inference_mode():
                engine(data(n))

    def failed_backward(self, n: int) -> None:
        """With the active block above the place where it fails it does not: a bad batch, then."""
        self.engine.module.switch[0] = True
        failed = error_of(lambda: self.engine.backward(1e3 * loss_of(self.engine(data(n)))))
        self.engine.module.switch[0] = False
        if not failed or n % 2:
            self.zero_grad(n)
        if failed:
            self.oracle.end_window()

    def failed_step(self, n: int) -> None:
        """Out of memory: nothing has changed, or a new engine is needed. Within a window a step needs none."""
        self.engine.backward(loss_of(self.engine(data(n))))
        with OutOfMemory(1 + n % 5):
            error = error_of(self.engine.step)
        if error:
            assert error.startswith("OutOfMemoryError"), error
            self.oracle.end_window()
            if "half way" in error_of(lambda: self.engine(data(n))):
                self.again(1)
                self.adopt()
        else:
            self.oracle.backward(loss_of(self.oracle(data(n))))
            self.oracle.step()

    def empty_step(self, n: int) -> None:
        """Where a window would end without any gradient it is an error (by the fused kernels a step later)."""
        oracle = self.oracle
        if self.setting.hift["kernel"] == "triton" or self.engine.optimizer.interrupted:
            return
        ends = (oracle.micro + 1) % oracle.gas == 0
        if ends and all(param.grad is None for param in oracle.named.values()):
            error = error_of(self.engine.step)
            assert is_clear(error), f"no error: {error}"
            oracle.end_window()
        else:
            self.engine.step()
            oracle.step()

    def refused(self, n: int) -> None:
        assert error_of(lambda: self.initialize(self.engine.module, order="sideways"))

    def written(self, n: int) -> None:
        """A user's write into every other element of a weight."""
        if not self.gathers:
            return
        module, name = self.engine.module, list(self.oracle.named)[n % len(self.oracle.named)]
        param = module.get_parameter(name)
        values = whole_weights(self.oracle)[name]
        values.view(-1)[::2] += 0.125
        if self.setting.stage == 3:
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
                param.view(-1)[::2] += 0.125
        else:
            with torch.no_grad():
                param.view(-1)[::2] += 0.125
        with torch.no_grad():
            self.oracle.named[name].copy_(values)
            master = self.oracle.masters[name]
            master.copy_(torch.where(master.to(values.dtype) == values, master, values.float()))

    def rate(self, n: int) -> None:
        rate = (1e-2, 5e-3, 2e-2)[n % 3]
        for group in [*self.optimizer.param_groups, *(g for rule in self.oracle.rules for g in rule.param_groups)]:
            group["lr"] = rate

    def requires_grad(self, n: int) -> None:
        """At stage 3 a forward under inference mode leaves what refuses it, with plain DeepSpeed too."""
        if not any(param.is_inference() for param in self.engine.module.parameters()):
            self.engine.module.requires_grad_(True)

    def offloaded(self, n: int) -> None:
        self.engine.offload_states()
        self.engine.reload_states()

    def save(self, n: int) -> None:
        if self.oracle.begins:  # within a window the micro step would be counted in one and lost in the other
            self.engine.save_checkpoint(str(self.folder), tag="t")
            self.saved = self.oracle.position()

    def load(self, n: int) -> None:
        if self.saved is None:
            return self.micro_step(n)
        if n % 2:
            self.engine.destroy()
            self.engine, self.optimizer = self.initialize(Fused(1))
        self.engine.load_checkpoint(str(self.folder), tag="t")
        self.oracle.go_to(self.saved)

    def again(self, n: int) -> None:
        """A second engine on the module, with or without an end of the first."""
        module = self.engine.module
        if n % 2:
            self.engine.destroy()
        self.engine, self.optimizer = self.initialize(module)
        self.oracle.forget()

    def adopt(self) -> None:
        """The oracle goes on with the engine's weights, a part of which may be a step ahead."""
        for name, values in whole_weights(self.engine).items():
            with torch.no_grad():
                self.oracle.named[name].copy_(values)
                self.oracle.masters[name].copy_(values.float())

    def copied(self, n: int) -> None:
        """Training a copy leaves the original alone."""
        if self.setting.stage < 3:
            other = copy.deepcopy(self.engine.module)
            loss_of(other(data(n))).backward()
            assert all(param.grad is not None for param in other.parameters() if param.requires_grad)

    def fault_of(self, name: str, n: int) -> str:
        """Makes a call, and what is wrong then: an error, or the distance from the oracle."""
        error = error_of(lambda: getattr(self, name)(n))
        if self.setting.stage == 3:
            gathers = name in ENDS_WINDOW or (self.gathers and name not in LEAVES_GATHERED)
            self.gathers = gathers and self.oracle.begins
        if error or not self.gathers:
            return error
        far = distance(whole_weights(self.engine), whole_weights(self.oracle), self.oracle.start)
        return f"distance {far}" if far > BOUNDS[self.setting.dtype] else ""


def trained(folder: str, seeds: Sequence[int], length: int = 40) -> list[str]:
    """What went wrong, by seed: at which call, and how. Collective."""
    found = []
    for seed in seeds:
        pair = Pair(drawn(seed, length), f"{folder}/{seed}")
        for place, call in enumerate(pair.setting.calls):
            fault = pair.fault_of(*call)
            if fault:
                before = [name for name, _ in pair.setting.calls[: place + 1]]
                found.append(f"seed {seed}, stage {pair.setting.stage}, {before[-6:]}: {fault}")
                break
        pair.engine.destroy()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(pair.folder, ignore_errors=True)
    return found


@pytest.mark.parametrize(
    "first", [pytest.param(EACH * (i + 1), marks=() if i < QUICK else pytest.mark.slow) for i in range(30)]
)
def test_any_order_of_calls_trains_as_the_oracle(ranks, tmp_path, first):
    found = ranks.run(trained, str(tmp_path), range(first, first + EACH), timeout_s=300)
    assert not any(found), found
