"""The rate of a cycle: of its own steps, inside the run, never 0 where the schedule is not, the same on all ranks."""

import itertools
import logging
import os

import pytest
import torch
from deepspeed.runtime import lr_schedules
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from hift_ds.rotation.schedule import DelayedRate, middle_of_run

LR = torch.optim.lr_scheduler
# "step() before optimizer.step()": there is no optimizer step here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def holder(lr=1e-2, groups=1):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    return torch.optim.AdamW([{"params": [p], "lr": lr * (index + 1)} for index, p in enumerate(params)], lr=lr)


def alone(check):
    """`agree` of one rank."""
    check()


def rates_in_force(make_scheduler, cycle, steps):
    """What the update uses at each step, driven in the engine's order."""
    optimizer = holder()
    scheduler = make_scheduler(optimizer)
    rate = DelayedRate(optimizer.param_groups, "cycle", cycle)
    rate.try_look_ahead(scheduler, alone)
    rates = []
    for step in range(steps):
        rates += rate.update(step, scheduler)
        scheduler.step()
    return rates


def schedule_at(make_scheduler, steps):
    """The user's own schedule: the rate at each step."""
    optimizer = holder()
    scheduler = make_scheduler(optimizer)
    rates = []
    for step in range(steps):
        if step:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def linear(steps, warm_up=0):
    return lambda optimizer: get_linear_schedule_with_warmup(optimizer, warm_up, steps)


@pytest.mark.parametrize(
    ("rates", "middle"),
    [
        ([5, 4, 3, 2, 1], 3),
        ([6, 5, 4, 3, 2, 1], 3),
        ([7], 7),
        ([0], 0),
        ([0, 0, 0], 0),
        ([4, 3, 2, 1, 0, 0, 0, 0, 0], 2),  # the run ends after 4 of 9 steps
        ([1, 0, 0, 0], 1),
        ([0, 1, 2, 3], 2),
        ([0, 0, 0, 1], 1),  # a warm-up beyond the middle
        ([0, 0, 5, 0, 0, 0], 5),
        ([4, 3, 2, 1, 0, 1, 2, 3, 4], 2),  # a cosine rises again past its end
        ([1, 0, 1, 0, 1], 1),
    ],
)
def test_the_rate_of_a_cycle_is_the_middle_one_of_what_is_left_of_the_run(rates, middle):
    assert middle_of_run(rates) == middle


def test_the_rate_of_a_cycle_is_0_only_if_its_schedule_is_0_at_every_step():
    for rates in itertools.product([0.0, 1.0, 2.0], repeat=7):
        assert (middle_of_run(list(rates)) > 0) == any(rates)


RUNS = {
    "linear": lambda steps: linear(steps),
    "linear_warm_up": lambda steps: linear(steps, steps // 4),
    "cosine": lambda steps: lambda o: get_cosine_schedule_with_warmup(o, steps // 4, steps),
    "torch_linear": lambda steps: lambda o: LR.LinearLR(o, 1.0, 0.0, total_iters=steps),
    "torch_cosine": lambda steps: lambda o: LR.CosineAnnealingLR(o, T_max=steps),
    "one_cycle": lambda steps: lambda o: LR.OneCycleLR(o, max_lr=1.0, total_steps=steps),
    "one_cycle_linear": lambda steps: lambda o: LR.OneCycleLR(o, 1.0, steps, anneal_strategy="linear"),
    # It begins one step late.
    "ds": lambda steps: lambda o: lr_schedules.WarmupDecayLR(o, steps, 0.0, 1e-2, max(1, steps // 4), "linear"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("cycle", [1, 2, 5, 8, 20, 50])
@pytest.mark.parametrize("steps", [4, 9, 16, 33])
def test_no_cycle_of_a_run_of_any_length_trains_at_rate_0_and_all_at_a_rate_of_its_own_steps(name, cycle, steps):
    own = schedule_at(RUNS[name](steps), steps + 1)  # DeepSpeed's and OneCycleLR have one step more
    rates = rates_in_force(RUNS[name](steps), cycle, steps)
    for at, rate in enumerate(rates):
        of_cycle = own[at // cycle * cycle : at // cycle * cycle + cycle]
        assert rate in of_cycle
        assert rate > 0 or not any(of_cycle)


@pytest.mark.parametrize("steps", [10, 20, 29])
def test_a_run_shorter_than_a_cycle_trains_at_the_rate_of_its_middle(steps):
    rates = rates_in_force(linear(steps), 34, steps)
    assert rates == [pytest.approx(1e-2 * (steps - steps // 2) / steps)] * steps


def test_the_last_cycle_has_the_rate_of_the_middle_of_what_is_left():
    rates = rates_in_force(linear(23), 10, 23)
    assert rates == pytest.approx([1e-2 * (23 - at) / 23 for at in [5] * 10 + [15] * 10 + [21] * 3])


def test_each_group_has_its_own_end_and_its_own_beginning():
    optimizer = holder(lr=1.0, groups=4)
    ends = [lambda s: max(0, 3 - s), lambda s: max(0, s - 5), lambda s: 0.0, lambda s: 1.0]
    rate = DelayedRate(optimizer.param_groups, "cycle", 8)
    assert rate.update(0, LR.LambdaLR(optimizer, ends)) == [1.0 * 2, 2.0 * 1, 0.0, 4.0]


def generator_driven(values):
    """A scheduler whose position is in a generator, which nothing can put back."""
    values = (value for value in values)
    return lambda optimizer: LR.LambdaLR(optimizer, lambda step: next(values))


def test_a_scheduler_that_cannot_be_looked_ahead_is_read_at_each_cycle_s_start_and_again_while_it_is_0(caplog):
    with caplog.at_level(logging.WARNING):
        rates = rates_in_force(generator_driven([0, 0, 1, 2, 3, 4, 5, 6, 7]), 4, 8)
    assert rates == pytest.approx([1e-2 * factor for factor in [0, 0, 1, 1, 3, 3, 3, 3]])
    (note,) = caplog.messages
    assert "LambdaLR" in note
    assert "it holds a generator" in note


def test_a_scheduler_that_becomes_one_that_cannot_be_looked_ahead_is_read_from_then_on(caplog):
    def make(optimizer):
        scheduler = LR.LambdaLR(optimizer, lambda step: 1 + step)
        own_step = scheduler.step

        def step():
            own_step()
            if scheduler.last_epoch == 6:
                scheduler.left = (factor for factor in [1])

        scheduler.step = step
        return scheduler

    rates = rates_in_force(make, 4, 12)
    assert rates == pytest.approx([1e-2 * factor for factor in [3] * 4 + [7] * 4 + [9] * 4])
    assert len(caplog.messages) == 1
    assert "it holds a generator" in caplog.text


def test_a_count_that_nothing_shows_is_found_by_looking_twice(caplog):
    """Kept by the system: no object of this process changes."""
    reads, writes = os.pipe()
    os.write(writes, bytes(range(100, 200)))
    rates = rates_in_force(lambda o: LR.LambdaLR(o, lambda step: os.read(reads, 1)[0]), 4, 8)
    assert "asked twice" in caplog.text
    assert rates == pytest.approx([1.0] * 4 + [1.1] * 4)  # six steps were lost by looking


def test_if_one_rank_cannot_look_ahead_none_does(caplog):
    def another_fails(check):
        check()
        raise RuntimeError("rank 1 failed: NotRestorable: scheduler.log is a _io.TextIOWrapper")

    optimizer = holder()
    scheduler = LR.LambdaLR(optimizer, lambda step: 1 + step)
    rate = DelayedRate(optimizer.param_groups, "cycle", 4)
    rate.try_look_ahead(scheduler, another_fails)
    assert rate.update(0, scheduler) == [1e-2]
    assert "rank 1 failed" in caplog.text


@pytest.mark.parametrize(("lr_update", "cycle"), [("paper", 4), ("step", 4), ("cycle", 1)])
def test_a_scheduler_that_needs_no_looking_ahead_is_not_looked_at(lr_update, cycle, caplog):
    optimizer = holder()
    rate = DelayedRate(optimizer.param_groups, lr_update, cycle)
    scheduler = generator_driven([1, 2, 3])(optimizer)
    rate.try_look_ahead(scheduler, lambda check: pytest.fail("a collective that is not needed"))
    assert rate.update(0, scheduler) == [1e-2]
    assert caplog.messages == []


def test_a_scheduler_that_needs_a_metric_and_begins_at_0_is_read_until_it_does_not():
    class Metric:
        def step(self, metric):
            optimizer.param_groups[0]["lr"] += metric

    optimizer = holder(lr=0.0)
    rate, scheduler, rates = DelayedRate(optimizer.param_groups, "cycle", 4), Metric(), []
    rate.try_look_ahead(scheduler, alone)
    for at in range(6):
        rates += rate.update(at, scheduler)
        scheduler.step(float(at > 0))
    assert rates == [0.0, 0.0, 1.0, 1.0, 3.0, 3.0]


def never_zero(optimizer):
    return LR.LambdaLR(optimizer, lambda step: 1 - 0.01 * step)


@pytest.mark.parametrize(("total", "rates"), [(None, [0.83] * 20), (20, [0.90] * 20), (50, [0.83] * 34 + [0.58] * 16)])
def test_a_run_whose_length_is_told_has_the_rate_of_the_middle_of_what_is_left(total, rates):
    """Of a schedule that does not say by a 0 where the run ends."""
    optimizer = holder(1.0)
    scheduler = never_zero(optimizer)
    rate = DelayedRate(optimizer.param_groups, "cycle", 34)
    rate.total_steps = total
    seen = []
    for step in range(len(rates)):
        seen += rate.update(step, scheduler)
        scheduler.step()
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize(("lr_update", "warns"), [("cycle", True), ("paper", True), ("step", False)])
def test_a_scheduler_that_the_engine_does_not_know_is_said_once(caplog, lr_update, warns):
    optimizer = holder()
    scheduler = never_zero(optimizer)
    rate = DelayedRate(optimizer.param_groups, lr_update, 4)
    for step in range(9):
        rate.update(step, None)
        scheduler.step()
    found = [record for record in caplog.records if "a scheduler that the engine does not step" in record.getMessage()]
    assert len(found) == warns
