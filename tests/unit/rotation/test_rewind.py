"""A scheduler that was asked what it will do goes on as if it had not been asked, wherever its state is."""

import functools
import itertools
import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hift_ds.rotation.rewind import CannotRewind, Rewind
from hift_ds.rotation.schedule import DelayedRate, look_ahead

LR = torch.optim.lr_scheduler
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TABLE = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1, 0.05, 0.04, 0.03] * 4
CALLS = [0]
WRITTEN = 0


class Base:
    """A user's scheduler: `next_rate` says the rest."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.begin()

    def begin(self):
        pass

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = self.next_rate()


class Nested(Base):
    def begin(self):
        self.state = SimpleNamespace(inner=SimpleNamespace(count=0))

    def next_rate(self):
        self.state.inner.count += 1
        return TABLE[self.state.inner.count]


class InDict(Base):
    def begin(self):
        self.state = {"deep": {"count": [0]}}

    def next_rate(self):
        self.state["deep"]["count"][0] += 1
        return TABLE[self.state["deep"]["count"][0]]


class InDeque(Base):
    def begin(self):
        self.left = deque(TABLE)

    def next_rate(self):
        return self.left.popleft()


class InTensor(Base):
    def begin(self):
        self.count = torch.zeros((), dtype=torch.long)

    def next_rate(self):
        self.count += 1
        return TABLE[self.count]


class InArray(Base):
    def begin(self):
        self.count = np.zeros(1, dtype=int)

    def next_rate(self):
        self.count[0] += 1
        return TABLE[self.count[0]]


class InIterator(Base):
    def begin(self):
        self.rates = {"of": [iter(TABLE), itertools.count()]}

    def next_rate(self):
        return next(self.rates["of"][0]) / (1 + next(self.rates["of"][1]))


class InSlots(Base):
    class Counter:
        __slots__ = ("__hidden", "count")

        def __init__(self):
            self.count, self.__hidden = 0, 0

        def up(self):
            self.count += 1
            self.__hidden += 1
            return TABLE[self.count] + self.__hidden

    def begin(self):
        self.counter = self.Counter()

    def next_rate(self):
        return self.counter.up()


class InOwnIterator(Base):
    class Rates:
        def __init__(self):
            self.count = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            return TABLE[self.count]

    def begin(self):
        self.rates = self.Rates()

    def next_rate(self):
        return next(self.rates)


class InClass(Base):
    count = 0

    def begin(self):
        InClass.count = 0

    def next_rate(self):
        InClass.count += 1
        return TABLE[InClass.count]


class InGlobal(Base):
    def begin(self):
        CALLS[0] = 0

    def next_rate(self):
        CALLS[0] += 1
        return TABLE[CALLS[0]]


class InRandom(Base):
    def begin(self):
        self.random, self.generator = random.Random(1), torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)

    def next_rate(self):
        return self.random.random() + torch.rand((), generator=self.generator).item() + self.numpy.random()


class InWorld(Base):
    def begin(self):
        random.seed(1), torch.manual_seed(1), np.random.seed(1)

    def next_rate(self):
        return random.random() + torch.rand(()).item() + np.random.random()


class WithModel(Base):
    def begin(self):
        self.model, self.count = torch.nn.Linear(3, 3), 0

    def next_rate(self):
        self.count += 1
        return TABLE[self.count]


class Counting:
    """A LambdaLR's function that counts for itself."""

    def __init__(self):
        self.count = 0

    def __call__(self, epoch):
        self.count += 1
        return TABLE[self.count]

    def method(self, epoch, scale=1.0):
        return scale * self(epoch)


def closure():
    count = 0

    def rate(epoch):
        nonlocal count
        count += 1
        return TABLE[count]

    return rate


def default_argument(epoch, seen=[0]):  # noqa: B006
    seen[0] += 1
    return TABLE[seen[0]]


def writes_a_global(epoch):
    global WRITTEN
    WRITTEN += 1
    return TABLE[WRITTEN]


def lambda_lr(make):
    def of(optimizer):
        global WRITTEN
        WRITTEN = 0
        default_argument.__defaults__[0][0] = 0
        return LR.LambdaLR(optimizer, [make() for _ in optimizer.param_groups])

    return of


SCHEDULERS = {
    **{cls.__name__: cls for cls in (
        Nested, InDict, InDeque, InTensor, InArray, InIterator, InSlots, InOwnIterator, InClass, InGlobal, InRandom,
        InWorld, WithModel,
    )},
    "callable": lambda_lr(Counting),
    "bound method": lambda_lr(lambda: Counting().method),
    "partial": lambda_lr(lambda: functools.partial(Counting().method, scale=0.5)),
    "closure": lambda_lr(closure),
    "closure in a lambda": lambda_lr(lambda: (lambda f: lambda epoch: f(epoch))(closure())),
    "default argument": lambda_lr(lambda: default_argument),
    "written global": lambda_lr(lambda: writes_a_global),
    "in a chain": lambda o: LR.ChainedScheduler([LR.LambdaLR(o, closure()), LR.ExponentialLR(o, 0.9)]),
    "in a sequence": lambda o: LR.SequentialLR(o, [LR.LambdaLR(o, Counting()), LR.ExponentialLR(o, 0.9)], [3]),
}  # fmt: skip


def optimizer_of(groups=2):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    return torch.optim.AdamW([{"params": [p], "lr": 1.0 + index} for index, p in enumerate(params)], lr=1.0)


def rates_seen(make, ahead):
    """The rates of 12 steps, with a look at what comes before each."""
    optimizer = optimizer_of()
    scheduler, seen, foreseen = make(optimizer), [], []
    for _ in range(12):
        if ahead:
            foreseen.append(look_ahead(scheduler, optimizer.param_groups, ahead + 1)[-1])
        seen.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    return seen, foreseen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_looking_ahead_says_what_comes_and_changes_nothing(name):
    plain, _ = rates_seen(SCHEDULERS[name], 0)
    looked, foreseen = rates_seen(SCHEDULERS[name], 4)
    assert looked == plain
    assert foreseen[:8] == plain[4:]
    assert len({tuple(rates) for rates in plain}) > 4, "a schedule that does not move proves nothing"


def generator():
    yield from TABLE


def with_attribute(name, value):
    def of(optimizer):
        scheduler = Nested(optimizer)
        setattr(scheduler, name, value)
        return scheduler

    return of


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_attribute("rates", generator()), "holds a generator"),
        (with_attribute("rates", map(float, generator())), "holds a generator that cannot be copied"),
        (with_attribute("log", open(__file__)), "holds a TextIOWrapper"),  # noqa: SIM115
        (with_attribute("table", torch.zeros(2 << 20)), "tensors of 2097152 elements"),
    ],
)
def test_what_cannot_be_put_back_is_named_before_anything_is_tried(make, reason):
    optimizer = optimizer_of()
    scheduler = make(optimizer)
    rate = optimizer.param_groups[0]["lr"]
    with pytest.raises(CannotRewind, match=reason):
        look_ahead(scheduler, optimizer.param_groups, 3)
    assert optimizer.param_groups[0]["lr"] == rate


def test_a_scheduler_that_cannot_be_asked_is_read_at_a_cycle_s_start_with_one_note(caplog):
    optimizer = optimizer_of(1)
    scheduler = with_attribute("rates", generator())(optimizer)
    rate = DelayedRate(optimizer.param_groups, "cycle", 3)
    seen = []
    optimizer.param_groups[0]["lr"] = 0.0  # a warm-up
    for step in range(9):
        seen.append(rate.update(step, scheduler)[0])
        scheduler.step()
    assert seen == [0.0, TABLE[1], TABLE[1], *[TABLE[3]] * 3, *[TABLE[6]] * 3]
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == 1 and "Nested" in notes[0] and "generator" in notes[0]


def test_objects_are_the_same_ones_afterwards():
    held = {"list": [1, {"deep": deque([2])}], "set": {3}, "bytes": bytearray(b"4")}
    inner = held["list"][1]["deep"]
    rewind = Rewind(held)
    held["list"].append(5), inner.append(6), held["set"].clear(), held["bytes"].extend(b"7"), held.pop("set")
    rewind.back()
    assert held == {"list": [1, {"deep": deque([2])}], "set": {3}, "bytes": bytearray(b"4")}
    assert held["list"][1]["deep"] is inner


CYCLE = 4


def rates_in_force(schedule, steps, cycle=CYCLE, groups=1):
    """The rates that cycles get, from a LambdaLR stepped by the engine."""
    optimizer = optimizer_of(groups)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    scheduler = LR.LambdaLR(optimizer, schedule)
    rate = DelayedRate(optimizer.param_groups, "cycle", cycle)
    found = []
    for step in range(steps):
        found.append(list(rate.update(step, scheduler)))
        scheduler.step()
    return found


def decay(total):
    return lambda step: max(0.0, (total - step) / total)


def test_a_run_shorter_than_half_a_cycle_has_the_rate_of_its_own_middle():
    assert rates_in_force(decay(5), 5, cycle=34) == [[3 / 5]] * 5


def test_the_last_cycle_has_the_rate_of_the_middle_of_what_is_left_of_the_run():
    total = 2 * CYCLE + 2  # two whole cycles and half a one
    found = rates_in_force(decay(total), 3 * CYCLE)
    expected = [decay(total)(CYCLE // 2), decay(total)(CYCLE + CYCLE // 2), decay(total)(2 * CYCLE + 1)]
    assert found == [[rate] for rate in expected for _ in range(CYCLE)]


@pytest.mark.parametrize("total", range(1, 14))
@pytest.mark.parametrize("warm_up", range(4))
def test_no_step_has_rate_0_where_the_schedule_has_not(total, warm_up):
    def schedule(step):
        return step / warm_up if step < warm_up else decay(total)(step - warm_up)

    for step, (rate,) in enumerate(rates_in_force(schedule, total + warm_up)):
        assert rate != 0 or schedule(step) == 0


def test_a_zero_in_the_middle_of_a_cycle_gives_way_to_the_nearest_rate():
    dip = [1.0, 0.5, 0.0, 0.25]
    assert rates_in_force(lambda step: dip[step % 4], 8) == [[0.5]] * 8


def test_each_group_has_the_middle_of_its_own_run():
    short, long = decay(2), decay(40)
    found = rates_in_force([short, long], CYCLE, groups=2)
    assert found == [[short(1), long(2)]] * CYCLE


def test_a_cycle_after_the_schedule_s_end_trains_with_its_rate_of_0():
    assert rates_in_force(decay(4), 8)[4:] == [[0.0]] * 4
