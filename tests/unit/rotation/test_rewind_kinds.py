"""The many kinds of objects that a user's scheduler may keep its state in: each comes back, or is named."""

import array
import collections
import ctypes
import dataclasses
import enum
import functools
import itertools
import logging
import queue
import random
import sys
import types
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch

from hift_ds.rotation.rewind import CannotRewind, Rewind
from hift_ds.rotation.schedule import DelayedRate, look_ahead

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TABLE = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1, 0.05, 0.04, 0.03] * 4
State = collections.namedtuple("State", "count")
logger = logging.getLogger("user")
logger.addHandler(logging.StreamHandler())
users_module = sys.modules["users_module"] = types.ModuleType("users_module")
LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(3 << 20, 1)))


class Phase(enum.Enum):
    WARM = 1
    DECAY = 2


class Scheduler:
    """A user's scheduler: `begin` makes its state, `rate` moves it and gives the next rate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.begin()

    def begin(self):
        self.count = 0

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()

    def rate(self):
        self.count += 1
        return TABLE[self.count]


def of(begin, rate, **names):
    """A scheduler of its own class."""
    return type("Users", (Scheduler,), {"begin": begin, "rate": rate, **names})


def counting():
    count = 0

    def rate(*_):
        nonlocal count
        count += 1
        return TABLE[count]

    return rate


def hold(**state):
    return lambda self: vars(self).update({name: make() for name, make in state.items()})


def up(container, key=0):
    container[key] += 1
    return TABLE[int(container[key])]


class MapOverItself(Scheduler):
    """Its iterator holds a method of the scheduler that holds it, and a model."""

    def begin(self):
        self.count, self.model = 0, torch.nn.Linear(2, 2)
        self.rates = map(self.at, itertools.count())

    def at(self, _):
        self.count += 1
        return TABLE[self.count]

    def rate(self):
        return next(self.rates) * (1 + self.count)


class CountsInItsClass(Scheduler):
    """The count is not there before the first step."""

    def begin(self):
        if "total" in vars(type(self)):
            del type(self).total

    def rate(self):
        type(self).total = getattr(type(self), "total", 0) + 1
        return TABLE[type(self).total]


class InModule(Scheduler):
    def begin(self):
        users_module.count = 0

    def rate(self):
        users_module.count += 1
        return TABLE[users_module.count]


class InImportedModule(InModule):
    def rate(self):
        import users_module

        users_module.count += 1
        return TABLE[users_module.count]


class Descriptor:
    def __init__(self):
        self.count = 0

    def __get__(self, instance, owner=None):
        self.count += 1
        return TABLE[self.count]


class InProperty(Scheduler):
    @property
    def next(self):
        users_module.seen[0] += 1
        return TABLE[users_module.seen[0]]

    def begin(self):
        users_module.seen = [0]

    def rate(self):
        return self.next


class Delegates(Scheduler):
    def __getattr__(self, name):
        raise RuntimeError(name)


class RaisesWhenRead:
    __slots__ = ("unset",)
    zero_grad = None

    def __getattr__(self, name):
        raise RuntimeError(name)


class GetsAndSetsState(Scheduler):
    def get_state(self):
        return vars(self)

    def set_state(self, state):
        vars(self).update(state)


class Logs(Scheduler):
    def rate(self):
        logger.debug("a step")
        return super().rate()


class AsksALoader(Scheduler):
    def rate(self):
        self.count += 1
        return 1 - self.count / len(LOADER)


class DrivesASecondOptimizer(Scheduler):
    def begin(self):
        self.other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def rate(self):
        (group,) = self.other.param_groups
        group["lr"] *= 0.9
        return group["lr"]


class GrowingList(Scheduler):
    """Its iterator runs over a list that it appends to."""

    def begin(self):
        self.rates = TABLE[:2]
        self.next = iter(self.rates)

    def rate(self):
        self.rates.append(TABLE[len(self.rates)])
        return next(self.next)


class ManyIterators(Scheduler):
    """Two share a third."""

    def begin(self):
        self.cycle, self.sum = itertools.cycle([1.0, 0.7, 0.5]), itertools.accumulate(TABLE)
        self.one = iter(TABLE)
        self.two = map(float, self.one)
        self.rates = deque(TABLE)
        self.three = iter(self.rates)
        self.pairs, self.numbered = zip(*[iter(TABLE)] * 2), enumerate(TABLE)  # noqa: B905

    def rate(self):
        own = next(self.cycle) + next(self.sum) + next(self.one) + 2 * next(self.two)
        return own + 3 * next(self.three) + next(self.pairs)[1] + next(self.numbered)[0]


COME_BACK = {
    "namedtuple": of(hold(state=lambda: State([0])), lambda self: up(self.state.count)),
    "OrderedDict": of(
        hold(rates=lambda: OrderedDict(enumerate(TABLE))), lambda self: self.rates.popitem(last=False)[1]
    ),
    "mapping proxy": of(hold(state=lambda: types.MappingProxyType({"n": [0]})), lambda self: up(self.state["n"])),
    "enumeration": of(
        lambda self: vars(self).update(count=0, phase=Phase.WARM),
        lambda self: Scheduler.rate(self) * Phase(1 + (self.count > 3)).value,
    ),
    "array.array": of(hold(counts=lambda: array.array("l", [0])), lambda self: up(self.counts)),
    "frozen dataclass": of(
        hold(state=lambda: dataclasses.make_dataclass("F", ["n"], frozen=True, slots=True)([0])),
        lambda self: up(self.state.n),
    ),
    "queue": of(
        hold(rates=queue.Queue), lambda self: (self.rates.put(0), TABLE[self.rates.qsize()])[1]
    ),
    "bound popleft": of(hold(next=lambda: deque(TABLE).popleft), lambda self: self.next()),
    "bound random": of(hold(next=lambda: random.Random(1).random), lambda self: self.next()),
    "bit generator": of(hold(bits=lambda: np.random.PCG64(1)), lambda self: float(self.bits.random_raw() % 97)),
    "map over a closure": of(hold(next=lambda: map(counting(), itertools.count())), lambda self: next(self.next)),
    "partial": of(hold(next=lambda: functools.partial(counting())), lambda self: self.next()),
    "large table": of(
        lambda self: vars(self).update(count=0, rates=[1 / (1 + at) for at in range(20_000)]),
        lambda self: self.rates[int(Scheduler.rate(self) * 100)],
    ),
    "read-only array": of(
        lambda self: vars(self).update(count=0, rates=np.broadcast_to(np.float64(2), 3)),
        lambda self: float(self.rates[0]) * Scheduler.rate(self),
    ),
    "its own param_groups": of(
        lambda self: vars(self).update(count=0, param_groups=self.optimizer.param_groups), Scheduler.rate
    ),
    "inner param_groups": of(
        lambda self: vars(self).update(inner=types.SimpleNamespace(param_groups=self.optimizer.param_groups, n=[0])),
        lambda self: up(self.inner.n),
    ),
    "optimizer's defaults": of(
        lambda self: self.optimizer.defaults.update(n=0), lambda self: up(self.optimizer.defaults, "n")
    ),
    "model's attribute": of(
        lambda self: vars(self).update(model=torch.nn.Linear(1, 1)),
        lambda self: (setattr(self.model, "n", getattr(self.model, "n", 0) + 1), TABLE[self.model.n])[1],
    ),
    "frozen parameters": of(
        lambda self: vars(self).update(count=0, held=torch.nn.Parameter(torch.zeros(3 << 20), requires_grad=False)),
        Scheduler.rate,
    ),
    "descriptor": of(lambda self: vars(vars(type(self))["d"]).update(count=0), lambda self: self.d, d=Descriptor()),
    **{cls.__name__: cls for cls in (
        MapOverItself, CountsInItsClass, InModule, InImportedModule, InProperty, Delegates, GetsAndSetsState, Logs,
        AsksALoader, DrivesASecondOptimizer, GrowingList, ManyIterators,
    )},
}  # fmt: skip


def optimizer_of():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)


def rates_seen(make, ahead):
    optimizer = optimizer_of()
    scheduler, seen, foreseen = make(optimizer), [], []
    for _ in range(12):
        if ahead:
            foreseen += look_ahead(scheduler, optimizer.param_groups, ahead + 1)[-1]
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return seen, foreseen


@pytest.mark.parametrize("kind", COME_BACK)
def test_looking_ahead_says_what_comes_and_changes_nothing(kind):
    plain, _ = rates_seen(COME_BACK[kind], 0)
    looked, foreseen = rates_seen(COME_BACK[kind], 4)
    assert looked == plain
    assert foreseen[:8] == plain[4:]
    assert len(set(plain)) > 2, "a schedule that does not move proves nothing"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: iter(TABLE).__next__, "list_iterator"),
        (lambda: itertools.tee(TABLE)[0], "_tee_dataobject"),
        (lambda: ctypes.c_int(0), "ctypes.c_int"),
        (queue.SimpleQueue, "_queue.SimpleQueue"),
        (random.SystemRandom, "NotImplementedError"),
        (lambda: np.array([None]), "ndarray of object"),
        (lambda: np.ma.array([0.0]), "MaskedArray"),
        (lambda: torch.ones(1).expand(5), "expanded"),
        (lambda: torch.ones(2).to_sparse(), "sparse"),
        (RaisesWhenRead, "RuntimeError"),
    ],
)
def test_what_is_not_known_to_come_back_is_refused(make, reason):
    optimizer = optimizer_of()
    scheduler = Scheduler(optimizer)
    scheduler.held = make()
    with pytest.raises(CannotRewind, match=reason):
        look_ahead(scheduler, optimizer.param_groups, 3)
    assert (scheduler.count, optimizer.param_groups[0]["lr"]) == (0, 1.0)


def prints(step):
    print(step)
    return TABLE[step]


def writes(step):
    with open("/dev/null", "w") as file:
        file.write(str(step))
    return TABLE[step]


@pytest.mark.parametrize(("function", "reason"), [(prints, r"calls print\(\)"), (writes, r"calls open\(\)")])
def test_what_cannot_be_taken_back_is_not_done_ahead(function, reason):
    optimizer = optimizer_of()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, function)
    with pytest.raises(CannotRewind, match=reason):
        look_ahead(scheduler, optimizer.param_groups, 4)


@pytest.mark.parametrize("refused", [False, True])
def test_loggers_are_silent_while_a_scheduler_is_asked_and_only_then(caplog, refused):
    def rate(scheduler):
        logger.warning("now")
        return 1.0

    optimizer = optimizer_of()
    scheduler = of(lambda scheduler: None, rate)(optimizer)
    if refused:
        scheduler.left = types.SimpleNamespace(inner=(step for step in TABLE))  # found after the logger
    try:
        look_ahead(scheduler, optimizer.param_groups, 4)
    except CannotRewind:
        assert refused
    assert caplog.messages == []
    scheduler.step()
    assert set(caplog.messages) == {"now"}


def test_attributes_of_modules_inside_a_module_come_back():
    def rate(scheduler):
        scheduler.model[1].p *= 0.5
        scheduler.model.eval()
        return scheduler.model[1].p

    def begin(scheduler):
        scheduler.model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.8))

    optimizer = optimizer_of()
    scheduler = of(begin, rate)(optimizer)
    rows = look_ahead(scheduler, optimizer.param_groups, 3)
    assert [row[0] for row in rows[1:]] == [0.4, 0.2]
    assert scheduler.model[1].p == 0.8
    assert all(module.training for module in scheduler.model.modules())


def test_an_attribute_written_by_a_step_that_raises_comes_back():
    class Ends(Scheduler):
        def rate(self):
            self.count += 1
            if self.count == 2:
                self.broken = True
                raise ValueError
            return 0.5

    optimizer = optimizer_of()
    scheduler = Ends(optimizer)
    assert look_ahead(scheduler, optimizer.param_groups, 9) == [[1.0], [0.5]]
    assert vars(scheduler) == {"optimizer": optimizer, "count": 0}


def test_a_rate_of_0_is_read_again_where_the_scheduler_only_its_caller_can_step():
    class NeedsAMetric(Scheduler):
        def step(self, metric):
            self.optimizer.param_groups[0]["lr"] = metric

    optimizer = optimizer_of()
    optimizer.param_groups[0]["lr"] = 0.0
    scheduler, seen = NeedsAMetric(optimizer), []
    rate = DelayedRate(optimizer.param_groups, "cycle", 4)
    for step in range(4):
        seen += rate.update(step, scheduler)
        scheduler.step(1.0 + step)
    assert seen == [0.0, 1.0, 1.0, 1.0]


def test_global_random_states_come_back():
    def drawn():
        return random.random(), np.random.random(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    plain = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    rewind = Rewind([])
    drawn()
    rewind.back()
    assert drawn() == plain
