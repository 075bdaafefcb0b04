"""Will it fit: peak device memory of every block, host memory and traffic, before anyone rents a card."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.memory.fake_model import FakeModel
from hift_ds.memory.figures import Figures, Forecast, Moment
from hift_ds.memory.full import full_figures
from hift_ds.memory.gathering import Gathered
from hift_ds.memory.layout import GradientBytes, Layout
from hift_ds.memory.request import Request
from hift_ds.memory.trace import FETCH, GRADIENT, Event, trace_micro_step, uncounted

# Between two traced blocks of the same shape the peak is linear in the number of layers above; this share of it may be
# missing (at stage 3 what is prefetched varies from layer to layer).
TOLERANCE = 1e-3


class Planner:
    """Plans requests for one model; traces are kept, so that a request like the last one is quick.

    Args:
        config: transformers' config.
        model_class: `None` = that of the config.
        frozen: Parameters (fqns) that are never trained, beside those that a config's "hift" section names.
    """

    def __init__(self, config: Any, model_class: type | None = None, frozen: Collection[str] = ()) -> None:
        self.config, self._model_class, self._frozen = config, model_class, frozenset(frozen)
        self._models: dict[tuple, FakeModel] = {}
        self._traces: dict[tuple, list[Event]] = {}

    @classmethod
    def of(cls, module: Any, frozen: Collection[str] = ()) -> Planner:
        """The planner of a transformers model that is there; only its class and its config are looked at."""
        return cls(copy.deepcopy(module.config), type(module), frozen)

    def forecast(self, request: Request, every_block: bool = False) -> Forecast:
        """The forecast.

        Args:
            every_block: Trace each block, not only as many as the others follow from.

        Raises:
            ValueError, TypeError: The model cannot be traced, or `hift_ds.initialize` would refuse the config.
        """
        layout = self.layout(request)
        if every_block:
            return self._forecast(request, layout, self._of(request, layout, range(len(layout.block_plan.blocks))))
        return self._forecast(
            request, layout, _Interpolation(lambda index: self._traced(request, layout, index), layout).all()
        )

    def forecast_of_ends(self, request: Request) -> Forecast:
        """The forecast of the first and the last two blocks alone, which is quick."""
        layout = self.layout(request)
        return self._forecast(request, layout, self._of(request, layout, _ends(layout)))

    def _of(self, request: Request, layout: Layout, indices: Iterable[int]) -> tuple[Figures, ...]:
        return tuple(self.figures(request, layout, index) for index in indices)

    def _forecast(self, request: Request, layout: Layout, blocks: tuple[Figures, ...]) -> Forecast:
        events = self.events(request, layout.trained)
        reached = {name for event in events if event.kind == GRADIENT for name in event.names}
        unreached = [block for block in layout.block_plan.blocks if reached.isdisjoint(block.fqns)]
        names = {fqn for block in unreached for fqn in block.fqns}
        events = [*events[:-1], *uncounted(layout.model.module, names, events[-1].current), events[-1]]
        full = full_figures(layout, events)
        offloaded = layout.offloaded_weights
        return Forecast(
            request, type(layout.model.module).__name__, blocks, full[0],
            host=layout.host_state() + offloaded, full_host=full[1] + offloaded,
            uncounted=tuple(block.name for block in unreached),
        )  # fmt: skip

    def layout(self, request: Request) -> Layout:
        """The layout that the request's config makes."""
        return Layout(self._model(request), request.config, self._frozen, request.gpu_memory)

    def peak(self, request: Request, besides: int = 0) -> int:
        """Highest peak of the first and the last two blocks, and of block `besides`, if there are as many."""
        layout = self.layout(request)
        indices = {*_ends(layout), min(besides, len(layout.block_plan.blocks) - 1)}
        return max(figures.peak for figures in self._of(request, layout, indices))

    def figures(self, request: Request, layout: Layout, index: int) -> Figures:
        """Of one block, traced."""
        return self._traced(request, layout, index).figures(layout, index)

    def _traced(self, request: Request, layout: Layout, index: int) -> Traced:
        block = layout.block_plan.blocks[index]
        events = self.events(request, (*block.fqns, *layout.block_plan.always_active))
        order = [name for event in events if event.kind == GRADIENT for name in event.names]
        gradients = layout.gradient_bytes(index, order)
        gathered = layout.gathered(events)
        moments = {"update": Moment("update", gradients=gradients.update.gradients, made=gradients.update.made)}
        for moment in _moments(events, gradients, gathered):
            if moment.phase not in moments or moment.nbytes > moments[moment.phase].nbytes:
                moments[moment.phase] = moment
        return Traced(moments, gradients.sent, gathered.sent)

    def events(self, request: Request, trained: tuple[str, ...]) -> list[Event]:
        """The traced micro step in which the parameters `trained` have gradients."""
        modules = request.config.stage == 3
        workload = (request.config.micro_batch, request.seq, request.padded, modules)
        key = (*self._key(request), *workload, trained)
        if key not in self._traces:
            self._traces[key] = trace_micro_step(self._model(request), set(trained), *workload)
        return self._traces[key]

    def _model(self, request: Request) -> FakeModel:
        key = self._key(request)
        if key not in self._models:
            self._models[key] = FakeModel(
                self.config, request.config.dtype, request.attn_implementation, request.checkpointing,
                request.checkpoint_frozen, request.keep_layers, request.loss_tile, self._model_class,
            )  # fmt: skip
        return self._models[key]

    def _key(self, request: Request) -> tuple:
        return (
            request.config.precision, request.attn_implementation, request.checkpointing, request.checkpoint_frozen,
            request.keep_layers, request.loss_tile,
        )  # fmt: skip


def _ends(layout: Layout) -> list[int]:
    """The first and the last two blocks, which have the highest peaks of most models."""
    last = len(layout.block_plan.blocks) - 1
    return sorted({0, min(1, last), max(0, last - 1), last})


@dataclass(frozen=True)
class Traced:
    """One block's worst moment of each phase, and bytes sent per micro step: to reductions, to stage 3's gathers."""

    moments: dict[str, Moment]
    reduced: int
    gathered: int

    def figures(self, layout: Layout, index: int) -> Figures:
        """With what the layout says of the block."""
        block, shards = layout.block_plan.blocks[index], layout.shards[index]
        worst = max(self.moments.values(), key=lambda moment: moment.nbytes)
        micro_steps = layout.config.micro_steps
        network = layout.published_bytes(index)
        if layout.config.world > 1:
            network += self.reduced * (micro_steps if layout.config.stage >= 2 else 1) + self.gathered * micro_steps
        to_device, to_host = map(sum, zip(*map(layout.bus_bytes, shards), strict=True))
        if layout.config.offloads_params:
            to_device += self.gathered // layout.config.world * micro_steps
            to_host += sum(shard.numel * shard.dtype.itemsize for shard in shards)
        return Figures(
            block.name, block.numel, layout.weights + worst.weights, layout.device_state + worst.made, worst.gradients,
            worst.activations, worst.phase,
            0 if layout.config.home == "device" else sum(map(layout.state_bytes, shards)), to_device, to_host, network,
        )  # fmt: skip


def _moments(events: Sequence[Event], gradients: GradientBytes, gathered: Gathered) -> Iterator[Moment]:
    held, weights, taken = gradients.before, 0, iter(zip(gradients.events, gradients.updates, strict=True))
    for index, event in enumerate(events):
        phase = "forward" if event.forward else "backward"
        yield Moment(phase, weights, held + event.gradient, event.peak - event.gradient)
        if event.kind == GRADIENT:
            (during, held), update = next(taken)
            yield Moment(phase, weights, during, event.current)
            if update.nbytes:
                yield Moment(phase, weights, update.gradients, event.current, update.made)
        elif event.kind == FETCH:
            yield Moment(phase, gathered.during[index], held, event.current)
        weights = gathered.after[index]
    yield Moment("backward", weights, gradients.finish, events[-1].current)


class _Interpolation:
    """Figures of all blocks from a few traced ones.

    In a run of blocks of the same shape every moment's bytes are linear in the number of layers above, and a phase's
    peak, the largest of them, is convex. So it lies on the lines through its first two and its last two blocks if it
    meets them where they cross. The block in the middle is looked at too: layers that alternate are not convex.
    """

    def __init__(self, trace: Callable[[int], Traced], layout: Layout) -> None:
        self._trace, self._layout = trace, layout
        self._known: dict[int, Traced] = {}
        self._guessed: set[int] = set()

    def all(self) -> tuple[Figures, ...]:
        blocks = self._layout.block_plan.blocks
        first = 0
        while first < len(blocks):
            last = first
            while last + 1 < len(blocks) and self._shape(last + 1) == self._shape(first):
                last += 1
            self._fill(first, last)
            first = last + 1
        while (worst := max(range(len(blocks)), key=lambda index: self._figures(index).peak)) in self._guessed:
            self._known[worst] = self._trace(worst)
            self._guessed.discard(worst)
        return tuple(map(self._figures, range(len(blocks))))

    def _figures(self, index: int) -> Figures:
        return self._known[index].figures(self._layout, index)

    def _shape(self, index: int) -> list[tuple]:
        """What makes blocks alike: shapes, and the kind of each layer (local or global attention)."""
        fqns, params = self._layout.block_plan.blocks[index].fqns, self._layout.params
        kinds = self._layout.layer_types
        return [(re.sub(r"\d+", "#", fqn), params[fqn].shape, _kind(fqn, kinds)) for fqn in fqns]

    def _at(self, index: int) -> Traced:
        if index not in self._known:
            self._known[index] = self._trace(index)
        return self._known[index]

    def _fill(self, first: int, last: int) -> None:
        if last - first <= 4:
            for index in range(first, last + 1):
                self._at(index)
            return
        ends = (first, first + 1, last - 1, last)
        lines = _Lines(first, last, *map(self._at, ends))
        middle = (first + last) // 2
        looked_at = {middle, *lines.crossings()} - set(ends)
        if all(self._agree(self._at(index), lines.at(index)) for index in looked_at):
            guessed = {index: lines.at(index) for index in range(first, last + 1) if index not in self._known}
            self._known.update(guessed)
            self._guessed.update(guessed)
        else:
            self._fill(first, middle)
            self._fill(middle, last)

    def _agree(self, found: Traced, line: Traced) -> bool:
        whole = self._layout.weights
        return all(
            abs(moment.nbytes - line.moments[phase].nbytes) <= TOLERANCE * (whole + moment.nbytes)
            for phase, moment in found.moments.items()
        )


def _kind(fqn: str, kinds: Sequence[str]) -> str | None:
    number = re.search(r"\.(\d+)\.", fqn)
    return kinds[int(number[1])] if number and int(number[1]) < len(kinds) else None


@dataclass(frozen=True)
class _Lines:
    """For each phase, the higher of the line through a run's first two blocks and the line through its last two."""

    first: int
    last: int
    low: Traced
    second: Traced
    second_last: Traced
    high: Traced

    def at(self, index: int) -> Traced:
        moments = {
            phase: max(self._of(phase, index), key=lambda moment: moment.nbytes) for phase in self.low.moments
        }  # fmt: skip
        reduced = _along(self.low.reduced, self.second.reduced, index - self.first)
        return Traced(moments, reduced, _along(self.low.gathered, self.second.gathered, index - self.first))

    def crossings(self) -> set[int]:
        """The blocks on both sides of where the two lines of a phase cross, inside the run."""
        found = set()
        for phase in self.low.moments:
            sides = [
                [moment.nbytes for moment in self._of(phase, index)] for index in range(self.first, self.last + 1)
            ]  # fmt: skip
            for place in range(len(sides) - 1):
                (left, right), (next_left, next_right) = sides[place], sides[place + 1]
                if (left - right) * (next_left - next_right) < 0 or (left == right) != (next_left == next_right):
                    found |= {self.first + place, self.first + place + 1}
        return found

    def _of(self, phase: str, index: int) -> tuple[Moment, Moment]:
        def along(start: Traced, step: Traced, count: int) -> Moment:
            a, b = start.moments[phase], step.moments[phase]
            keys = ("weights", "gradients", "activations", "made")
            return Moment(phase, *(_along(getattr(a, key), getattr(b, key), count) for key in keys))

        left = along(self.low, self.second, index - self.first)
        return left, along(self.high, self.second_last, self.last - index)


def _along(start: int, step: int, count: int) -> int:
    return start + (step - start) * count
