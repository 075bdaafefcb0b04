"""The delayed learning rate: predictions leave no trace, and the rate in force is the right one."""

import copy
import math

import pytest
import torch
from deepspeed.runtime import lr_schedules
from transformers import get_cosine_schedule_with_warmup

from hift_ds.rotation.rotation import Rotation
from hift_ds.rotation.schedule import CycleScheduler, DelayedRate, look_ahead

LR = torch.optim.lr_scheduler
# "step() before optimizer.step()": there is no optimizer step here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def holder(lr=1e-2, groups=2):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    return torch.optim.AdamW([{"params": [p], "lr": lr * (index + 1)} for index, p in enumerate(params)], lr=lr)


def _sequential(optimizer):
    parts = [LR.LinearLR(optimizer, 0.1, total_iters=5), LR.CosineAnnealingLR(optimizer, T_max=20)]
    return LR.SequentialLR(optimizer, parts, milestones=[5])


SCHEDULERS = {
    "LambdaLR": lambda o: LR.LambdaLR(o, [lambda s: 1 / (1 + s), lambda s: 0.9**s]),
    "LinearLR": lambda o: LR.LinearLR(o, 0.01, total_iters=12),
    "CosineAnnealingLR": lambda o: LR.CosineAnnealingLR(o, T_max=15, eta_min=1e-5),
    "CosineAnnealingWarmRestarts": lambda o: LR.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "MultiStepLR": lambda o: LR.MultiStepLR(o, [3, 7], gamma=0.5),
    "CyclicLR": lambda o: LR.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: LR.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=30),
    "SequentialLR": _sequential,
    "ChainedScheduler": lambda o: LR.ChainedScheduler([LR.ConstantLR(o, 0.5, 4), LR.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: LR.ReduceLROnPlateau(o, patience=2),
    "WarmupLR": lambda o: lr_schedules.WarmupLR(o, 0.0, 1e-2, 10),
    "WarmupDecayLR": lambda o: lr_schedules.WarmupDecayLR(o, 25, 0.0, 1e-2, 10),
    "WarmupCosineLR": lambda o: lr_schedules.WarmupCosineLR(o, 25, warmup_num_steps=6),
    "OneCycle": lambda o: lr_schedules.OneCycle(o, 1e-4, 1e-2, cycle_first_step_size=7),
    "LRRangeTest": lambda o: lr_schedules.LRRangeTest(o, 1e-4, 4),
    "hf_cosine_with_warmup": lambda o: get_cosine_schedule_with_warmup(o, 6, 25),
}


def step(scheduler):
    """One step as a training loop makes it; the plateau's metric never improves."""
    if isinstance(scheduler, LR.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def state_of(scheduler):
    """Everything that a scheduler and the schedulers inside it know, by value."""
    inner = getattr(scheduler, "_schedulers", [])
    own = {k: v for k, v in vars(scheduler).items() if k not in ("optimizer", "_schedulers") and not callable(v)}
    functions = own.pop("lr_lambdas", [])  # compared by identity
    return [copy.deepcopy((scheduler.state_dict() if not functions else None, own)), functions, *map(state_of, inner)]


def entries_of(optimizer):
    return [{key: copy.deepcopy(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]


@pytest.mark.parametrize("ahead", [1, 3, 8])
@pytest.mark.parametrize("taken", [0, 1, 4, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_look_ahead_predicts_what_comes_and_leaves_no_trace(name, taken, ahead):
    optimizer = holder()
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(taken):
        step(scheduler)
    before_state, before_entries = state_of(scheduler), entries_of(optimizer)

    predicted = look_ahead(scheduler, optimizer.param_groups, ahead + 1)[-1]

    assert state_of(scheduler) == before_state
    assert entries_of(optimizer) == before_entries
    if name == "ReduceLROnPlateau":  # only the caller knows the metric
        assert predicted == [group["lr"] for group in optimizer.param_groups]
        return
    for _ in range(ahead):
        step(scheduler)
    assert predicted == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
def test_looking_ahead_at_every_step_does_not_change_the_schedule(name):
    rates = []
    for looks in (False, True):
        optimizer = holder()
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for _ in range(20):
            if looks:
                look_ahead(scheduler, optimizer.param_groups, 4)
            step(scheduler)
            seen.append([group["lr"] for group in optimizer.param_groups])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len({tuple(rate) for rate in rates[0]}) > 1, "a schedule that does not move proves nothing"


def test_look_ahead_past_a_schedule_s_end_gives_its_last_rate():
    optimizer = holder(groups=1)
    scheduler = LR.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    predicted = look_ahead(scheduler, optimizer.param_groups, 50)[-1]
    assert scheduler.last_epoch == 0
    with pytest.raises(ValueError, match="Tried to step"):
        for _ in range(50):
            scheduler.step()
    assert predicted == [optimizer.param_groups[0]["lr"]]

    table = [1.0, 0.5, 0.25]
    optimizer = holder(groups=2)
    scheduler = LR.LambdaLR(optimizer, lambda s: table[s])
    assert look_ahead(scheduler, optimizer.param_groups, 50)[-1] == [1e-2 * 0.25, 2e-2 * 0.25]
    assert scheduler.last_epoch == 0
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-2]


def test_a_tensor_rate_is_the_same_tensor_with_the_same_value_afterwards():
    rate = torch.tensor(1e-2, dtype=torch.float64)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=rate, foreach=False)
    scheduler = LR.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    held = optimizer.param_groups[0]["lr"]
    predicted = look_ahead(scheduler, optimizer.param_groups, 4)[-1]
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 1e-2
    assert predicted == [pytest.approx(1e-2 / 4)]
    assert type(predicted[0]) is float
    for _ in range(3):
        scheduler.step()
    assert predicted == [float(optimizer.param_groups[0]["lr"])]


def test_entries_that_a_scheduler_adds_are_gone_afterwards():
    class Adds:
        def __init__(self, optimizer):
            self.optimizer, self.log = optimizer, []

        def step(self):
            self.log.append(1)
            self.extra = True
            self.optimizer.param_groups[0].update(lr=0.5, note="new")

    optimizer = holder(groups=1)
    scheduler = Adds(optimizer)
    assert look_ahead(scheduler, optimizer.param_groups, 3)[-1] == [0.5]
    assert "note" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert vars(scheduler) == {"optimizer": optimizer, "log": []}


def rates_in_force(lr_update, make_scheduler, num_blocks, steps, steps_per_block=1):
    """What the update uses at each step, driven in the engine's order: rate, rotation, scheduler."""
    optimizer = holder(groups=1)
    rotation = Rotation(num_blocks, steps_per_block=steps_per_block)
    scheduler = make_scheduler(optimizer)
    if lr_update == "paper":
        scheduler = CycleScheduler(scheduler, rotation)
    rate = DelayedRate(optimizer.param_groups, lr_update, rotation.steps_per_cycle)
    rates = []
    for _ in range(steps):
        rates += rate.update(rotation.step, scheduler)
        rotation.advance()
        scheduler.step()
    return rates


def schedule_at(make_scheduler, steps):
    """The user's own schedule: the rate at each step."""
    optimizer = holder(groups=1)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def warm_up_and_decay(optimizer):
    return get_cosine_schedule_with_warmup(optimizer, 6, 24)


@pytest.mark.parametrize(("num_blocks", "steps_per_block"), [(4, 1), (3, 2), (1, 1), (5, 1)])
def test_cycle_holds_the_schedule_s_rate_at_the_cycle_s_middle_step(num_blocks, steps_per_block):
    cycle = num_blocks * steps_per_block
    own = schedule_at(warm_up_and_decay, 24 + cycle)
    rates = rates_in_force("cycle", warm_up_and_decay, num_blocks, 24, steps_per_block)
    assert rates == [own[at // cycle * cycle + cycle // 2] for at in range(24)]


def test_cycle_trains_no_block_with_rate_0_during_warm_up():
    rates = rates_in_force("cycle", warm_up_and_decay, 4, 24)
    assert schedule_at(warm_up_and_decay, 1) == [0.0]
    assert min(rates) > 0
    # The peak is reached in the cycle in which the user's warm-up ends, and the last cycle is the schedule's last.
    assert max(rates) == rates[4] == 1e-2
    assert rates[-1] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 16 / 18)))


def test_paper_advances_the_schedule_once_per_cycle():
    own = schedule_at(warm_up_and_decay, 8)
    assert rates_in_force("paper", warm_up_and_decay, 3, 24) == [own[at // 3] for at in range(24)]


def test_step_follows_the_schedule_without_delay():
    assert rates_in_force("step", warm_up_and_decay, 3, 24) == schedule_at(warm_up_and_decay, 24)


def test_each_param_group_has_its_own_rate():
    optimizer = holder(lr=1.0, groups=3)
    scheduler = LR.LambdaLR(optimizer, [lambda s: 1.0, lambda s: 0.5**s, lambda s: s])
    rate = DelayedRate(optimizer.param_groups, "cycle", 4)
    assert rate.update(0, scheduler) == [1.0, 2.0 * 0.25, 3.0 * 2]


@pytest.mark.parametrize("lr_update", ["cycle", "paper"])
def test_a_rate_that_the_caller_drives_is_latched_at_the_cycle_s_start(lr_update):
    optimizer = holder(groups=1)
    (group,) = optimizer.param_groups
    rate = DelayedRate(optimizer.param_groups, lr_update, 3)
    rates = []
    for at in range(7):
        group["lr"] = 1.0 + at
        rates += rate.update(at, None)
    assert rates == [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 7.0]


def test_a_rate_that_the_caller_drives_is_latched_again_while_it_is_0():
    optimizer = holder(groups=2)
    rate = DelayedRate(optimizer.param_groups, "cycle", 4)
    rates = []
    for at in range(8):
        for group in optimizer.param_groups:
            group["lr"] = max(0, at - 1) / 10
        rates.append(rate.update(at, None)[0])
    # 0, still 0, then 0.1 for the rest of the cycle, then the next cycle's.
    assert rates == [0.0, 0.0, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3]


def test_a_caller_s_rate_of_0_is_read_again_in_its_group_alone():
    optimizer = holder(groups=2)
    warming, trained = optimizer.param_groups
    rate = DelayedRate(optimizer.param_groups, "cycle", 4)
    warming["lr"], trained["lr"] = 0.0, 1.0
    assert rate.update(0, None) == [0.0, 1.0]
    warming["lr"], trained["lr"] = 5.0, 6.0
    assert rate.update(1, None) == [5.0, 1.0]
    warming["lr"] = 7.0
    assert rate.update(1, None) == [5.0, 1.0]


def test_a_tensor_rate_is_latched_as_a_number():
    rate_tensor = torch.tensor(0.25)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=rate_tensor, foreach=False)
    rate = DelayedRate(optimizer.param_groups, "cycle", 2)
    assert rate.update(0, None) == [0.25]
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert rate.update(1, None) == [0.25]
    assert type(rate.rates[0]) is float


def test_the_groups_are_never_written():
    optimizer = holder(groups=2)
    before = entries_of(optimizer)
    rate = DelayedRate(optimizer.param_groups, "cycle", 4)
    for at in range(8):
        rate.update(at, None)
    assert entries_of(optimizer) == before


def test_the_first_update_latches_even_inside_a_cycle():
    """As after a resume from a checkpoint without rates."""
    optimizer = holder(groups=1)
    assert DelayedRate(optimizer.param_groups, "cycle", 4).update(1, None) == [1e-2]


def test_cycle_scheduler_is_the_user_s_scheduler_but_for_step():
    optimizer = holder(groups=1)
    inner = LR.StepLR(optimizer, step_size=1, gamma=0.5)
    rotation = Rotation(3)
    scheduler = CycleScheduler(inner, rotation)
    for _ in range(6):
        rotation.advance()
        scheduler.step()
    assert inner.last_epoch == 2
    assert scheduler.get_last_lr() == inner.get_last_lr() == [1e-2 * 0.25]
    assert scheduler.state_dict() == inner.state_dict()
    scheduler.load_state_dict({**inner.state_dict(), "last_epoch": 9})
    assert inner.last_epoch == 9
    with pytest.raises(AttributeError):
        scheduler.nothing_of_that_name  # noqa: B018
    assert copy.copy(scheduler).scheduler is inner


def test_cycle_scheduler_passes_a_metric_on():
    optimizer = holder(groups=1)
    rotation = Rotation(2)
    scheduler = CycleScheduler(LR.ReduceLROnPlateau(optimizer, patience=0, factor=0.5), rotation)
    for _ in range(4):
        rotation.advance()
        scheduler.step(1.0)
    # Two cycles: the first sets the best value, the second sees no improvement.
    assert optimizer.param_groups[0]["lr"] == 5e-3
