"""The cheapest change that makes a run fit: tried in order of what it costs, alone and then together."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hift_ds.chunked_loss import TILE_BYTES
from hift_ds.config.batch import ACCUMULATION, MICRO
from hift_ds.memory.figures import Forecast
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request
from hift_ds.state.unit_state import ring_limit
from hift_ds.zero.activations import recomputing_layers

SHORTEST = 128  # tokens
_STATE, _ZERO = ("hift", "state"), ("zero_optimization",)
RING_SIZES = tuple(1 << power for power in range(32, 24, -1))  # 4 GiB to 32 MiB


@dataclass(frozen=True)
class Change:
    """One thing to change.

    Attributes:
        what: In the words of the config or the command line.
        cost: What it costs the run.
        keys: Of the DeepSpeed config, each by its path; `None` removes a key.
        fields: Of the request.
    """

    what: str
    cost: str
    keys: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, request: Request) -> Request:
        """The changed request."""
        for path, value in self.keys.items():
            request = request.changed(*path, value=value)
        return replace(request, **self.fields)


@dataclass(frozen=True)
class Advice:
    """What to change, and the forecast that comes of it; no changes: nothing known makes it fit."""

    changes: tuple[Change, ...]
    forecast: Forecast | None


def room_for_activations(planner: Planner, forecast: Forecast) -> tuple[int, int] | None:
    """What memory is left for where a request fits that recomputes activations: layers that may keep theirs, the peak.

    `None` where there is none, or the request names such layers itself.
    """
    request, worst = forecast.request, forecast.blocks.index(forecast.worst)
    if not (request.checkpointing and forecast.fits and request.gpu_memory) or request.keep_layers:
        return None

    module = planner.layout(request).model.module
    names = {param: fqn for fqn, param in module.named_parameters()}
    layers = [names[next(layer.parameters())] for layer in recomputing_layers(module)]

    def peak(kept: int) -> int:
        """Of the worst block, or of that of the lowest layer that keeps its own, where it trains, too."""
        asked = replace(request, keep_layers=kept)
        layout = planner.layout(asked)
        lowest = [index for index, block in enumerate(layout.block_plan.blocks) if layers[-kept] in block.fqns]
        return max(planner.figures(asked, layout, index).peak for index in {worst, *lowest})

    kept = bisect_left(range(1, len(layers) + 1), True, key=lambda count: not request.card_holds(peak(count)))
    return (kept, peak(kept)) if kept else None


def advise(planner: Planner, forecast: Forecast) -> Advice:
    """The cheapest change, or set of changes, after which `forecast`'s request fits."""
    fits = partial(_seems_to_fit, planner, forecast)
    changes = [change for change in _changes(forecast.request) if _can(change, forecast.request)]
    for change in changes:
        if fits((change,)):
            found = planner.forecast(_applied(forecast.request, (change,)))
            if found.fits:  # of all blocks
                return Advice((change,), found)
    chosen: tuple[Change, ...] = ()
    for change in changes:
        chosen = (*chosen, change)
        if fits(chosen):
            break
    else:
        return Advice((), None)
    for change in reversed(chosen):  # the dearest first
        rest = tuple(other for other in chosen if other is not change)
        if rest and fits(rest):
            chosen = rest
    return Advice(chosen, planner.forecast(_applied(forecast.request, chosen)))


def _seems_to_fit(planner: Planner, forecast: Forecast, changes: tuple[Change, ...]) -> bool:
    """Whether the changed request fits, by the blocks that can be the worst: the old worst one and those at both ends.

    The forecast of the answer traces what it needs again.
    """
    try:
        request = _applied(forecast.request, changes)
        layout = planner.layout(request)
    except (ValueError, TypeError):  # not with this model or these settings
        return False
    if request.node_holds(layout.host_state() + layout.offloaded_weights) is False:
        return False
    without_activations = request.card_holds(layout.weights + layout.device_state)
    if without_activations is not True:  # it is plain, or the card's size is not given
        return without_activations is None
    return request.card_holds(planner.peak(request, forecast.blocks.index(forecast.worst))) is True


def _can(change: Change, request: Request) -> bool:
    """Whether `hift_ds.initialize` would take what comes of it."""
    try:
        return change.apply(request).config is not None
    except (ValueError, TypeError):
        return False


def _applied(request: Request, changes: tuple[Change, ...]) -> Request:
    for change in changes:
        request = change.apply(request)
    return request


def _changes(request: Request) -> Iterator[Change]:
    """What can be changed, from the cheapest on."""
    config, state = request.config, request.config.hift.state
    limits_host, shares = request.host_memory is not None, request.world > 1
    if request.attn_implementation == "eager":
        yield Change("attention by sdpa", "nothing: the same maths, and faster", {}, {"attn_implementation": "sdpa"})
    if state.residency != "stream":
        what = '"residency": "stream" in hift.state'
        yield Change(what, "state crosses the bus, mostly hidden", {(*_STATE, "residency"): None})
    if config.hift.layers_per_block not in (None, 1):
        what = '"layers_per_block": 1'
        yield Change(what, "nothing per step; a cycle has more steps", {("hift", "layers_per_block"): 1})
    if shares and config.stage < 2:
        yield Change("ZeRO stage 2", "little: the ranks share gradients and state", {(*_ZERO, "stage"): 2})
    if limits_host and config.precision == "bf16" and state.master == "fp32":
        what = '"master": "split16" in hift.state'
        yield Change(what, "nothing: the same bits (by the fused kernels)", {(*_STATE, "master"): "split16"})
    for size in RING_SIZES if state.residency == "stream" else ():
        if size < (state.ring_bytes or ring_limit(request.gpu_memory)):
            what = f'"ring_bytes": {size} in hift.state'
            yield Change(what, "less of the copies is hidden", {(*_STATE, "ring_bytes"): size})
    for kept in (*_halves(request.keep_layers, 1), 0) if request.keep_layers else ():
        yield Change(f"--keep_layers {kept}", "more layers are recomputed", {}, {"keep_layers": kept})
    if request.loss_tile is None:
        yield Change("loss in chunks (--loss chunked)", "the head's product once more", {}, {"loss_tile": TILE_BYTES})
    elif request.loss_tile > TILE_BYTES:
        what = f"--loss_tile {TILE_BYTES >> 20}MiB"
        yield Change(what, "the head is read more often", {}, {"loss_tile": TILE_BYTES})
    if not request.checkpointing:
        yield Change("activation checkpointing", "about one more forward a step", {}, {"checkpointing": True})
    for rows in _halves(config.micro_batch, 1):
        if config.micro_batch % rows == 0:
            what = f"micro batch {rows} and as many more micro steps"
            steps = config.micro_steps * config.micro_batch // rows
            yield Change(what, "smaller products, a little slower", {(ACCUMULATION,): steps, (MICRO,): rows})
    if shares and config.stage < 3:
        cost = "weights cross the network in every forward and backward"
        yield Change("ZeRO stage 3", cost, {(*_ZERO, "stage"): 3})
    if limits_host and state.moments == "fp32":
        what = '"moments": "bf16" in hift.state'
        yield Change(what, "stochastic rounding (by the fused kernels)", {(*_STATE, "moments"): "bf16"})
    if config.precision == "fp32":
        yield Change("bf16 weights with fp32 masters", "products in 16 bits", {("bf16",): {"enabled": True}})
    if not config.offloads_params:
        what = 'ZeRO stage 3 with "offload_param": {"device": "cpu"}'
        cost = "weights cross the bus in every forward and backward"
        yield Change(what, cost, {(*_ZERO, "stage"): 3, (*_ZERO, "offload_param"): {"device": "cpu"}})
    for length in _halves(request.seq, SHORTEST):
        yield Change(f"rows of {length} tokens", "another task: shorter rows", {}, {"seq": length})


def _halves(number: int, least: int) -> Iterator[int]:
    while (number := number // 2) >= least:
        yield number
