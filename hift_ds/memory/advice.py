"""The cheapest change that makes a run fit: tried in order of what it costs, alone and then together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from hift_ds.memory.figures import Plan
from hift_ds.memory.plan import Planner
from hift_ds.memory.request import RESERVE_BYTES, Request
from hift_ds.state.block_state import ring_limit

SHORTEST = 128  # tokens
RING_SIZES = tuple(1 << power for power in range(32, 24, -1))  # 4 GiB to 32 MiB


@dataclass(frozen=True)
class Change:
    """One thing to change.

    Attributes:
        what: In the words of the config or the command line.
        cost: What it costs the run.
        apply: The changed request; `None` where there is nothing to change.
    """

    what: str
    cost: str
    apply: Callable[[Request], Request | None]


@dataclass(frozen=True)
class Advice:
    """What to change, and the plan that comes of it; no changes: nothing known makes it fit."""

    changes: tuple[Change, ...]
    plan: Plan | None


def advise(planner: Planner, plan: Plan) -> Advice:
    """The cheapest change, or set of changes, after which `plan`'s request fits."""
    probe = _Probe(planner, plan)
    changes = [change for change in _changes(plan.request) if _can(change, plan.request)]
    for change in changes:
        if probe.fits((change,)):
            found = planner.plan(_applied(plan.request, (change,)))
            if found.fits:  # of all blocks
                return Advice((change,), found)
    chosen: tuple[Change, ...] = ()
    for change in changes:
        chosen = (*chosen, change)
        if probe.fits(chosen):
            break
    else:
        return Advice((), None)
    for change in reversed(chosen):  # the dearest first
        rest = tuple(other for other in chosen if other is not change)
        if rest and probe.fits(rest):
            chosen = rest
    return Advice(chosen, planner.plan(_applied(plan.request, chosen)))


class _Probe:
    """Whether a changed request fits, by the blocks that can be the worst.

    Those are the old worst one, the first and the last two. The plan of the answer traces what it needs again.
    """

    def __init__(self, planner: Planner, plan: Plan) -> None:
        self._planner, self._plan = planner, plan
        last = len(plan.blocks) - 1
        self._indices = sorted({plan.blocks.index(plan.worst), 0, 1, max(0, last - 1), last})

    def fits(self, changes: tuple[Change, ...]) -> bool:
        try:
            request = _applied(self._plan.request, changes)
            layout = self._planner.layout(request)
        except (ValueError, TypeError):  # not with this model or these settings
            return False
        limit = request.host_memory
        if limit is not None and (layout.host_state() + layout.offloaded_weights) * request.gpus > limit:
            return False
        limit = request.gpu_memory
        if limit is None:
            return True
        if layout.weights + layout.device_state + RESERVE_BYTES > limit:
            return False  # without a look at activations
        return self._planner.peak(request, self._indices) + RESERVE_BYTES <= limit


def _can(change: Change, request: Request) -> bool:
    """Whether there is something to change, and `hift_ds.initialize` would take what comes of it."""
    changed = change.apply(request)
    try:
        return changed is not None and changed.config is not None
    except (ValueError, TypeError):
        return False


def _applied(request: Request, changes: tuple[Change, ...]) -> Request:
    for change in changes:
        request = change.apply(request) or request
    return request


def _changes(request: Request) -> Iterator[Change]:
    """From the cheapest on."""
    yield Change("attention by sdpa", "nothing: the same maths, and faster", _sdpa)
    yield Change('"residency": "stream" in hift.state', "state crosses the bus, mostly hidden", _stream)
    yield Change('"layers_per_block": 1', "nothing per step; a cycle has more steps", _smallest_blocks)
    yield Change("ZeRO stage 2", "little: the ranks share gradients and state", _stage_2)
    yield Change('"master": "split16" in hift.state', "nothing: the same bits (by the fused kernels)", _split16)
    for size in RING_SIZES:
        yield Change(f'"ring_bytes": {size} in hift.state', "less of the copies is hidden", partial(_ring, size=size))
    yield Change("activation checkpointing", "about one more forward a step", _checkpointing)
    rows = request.config.micro_batch // 2
    while rows >= 1:
        what = f"micro batch {rows} and as many more micro steps"
        yield Change(what, "smaller products, a little slower", partial(_micro_batch, rows=rows))
        rows //= 2
    yield Change("ZeRO stage 3", "weights cross the network in every forward and backward", _stage_3)
    yield Change('"moments": "bf16" in hift.state', "stochastic rounding (by the fused kernels)", _bf16_moments)
    yield Change("bf16 weights with fp32 masters", "products in 16 bits", _bf16)
    what = 'ZeRO stage 3 with "offload_param": {"device": "cpu"}'
    yield Change(what, "weights cross the bus in every forward and backward", _offload)
    length = request.seq // 2
    while length >= SHORTEST:
        yield Change(f"rows of {length} tokens", "another task: shorter rows", partial(_shorter, length=length))
        length //= 2


def _sdpa(request: Request) -> Request | None:
    return replace(request, attn_implementation="sdpa") if request.attn_implementation == "eager" else None


def _checkpointing(request: Request) -> Request | None:
    return None if request.checkpointing else replace(request, checkpointing=True)


def _stream(request: Request) -> Request | None:
    streams = request.config.hift.state.residency == "stream"
    return None if streams else request.changed("hift", "state", "residency", value=None)


def _smallest_blocks(request: Request) -> Request | None:
    one = (request.config.hift.layers_per_block or 1) == 1
    return None if one else request.changed("hift", "layers_per_block", value=1)


def _stage_2(request: Request) -> Request | None:
    if request.world == 1 or request.config.stage >= 2:
        return None
    return request.changed("zero_optimization", "stage", value=2)


def _stage_3(request: Request) -> Request | None:
    if request.world == 1 or request.config.stage == 3:
        return None
    return request.changed("zero_optimization", "stage", value=3)


def _split16(request: Request) -> Request | None:
    if request.config.precision != "bf16" or request.config.hift.state.master != "fp32" or request.host_memory is None:
        return None
    return request.changed("hift", "state", "master", value="split16")


def _ring(request: Request, size: int) -> Request | None:
    state = request.config.hift.state
    if state.residency != "stream" or size >= (state.ring_bytes or ring_limit(request.gpu_memory)):
        return None
    return request.changed("hift", "state", "ring_bytes", value=size)


def _micro_batch(request: Request, rows: int) -> Request | None:
    if request.config.micro_batch % rows or rows >= request.config.micro_batch:
        return None
    steps = request.config.micro_steps * request.config.micro_batch // rows
    changed = request.changed("gradient_accumulation_steps", value=steps)
    return changed.changed("train_micro_batch_size_per_gpu", value=rows)


def _bf16_moments(request: Request) -> Request | None:
    if request.host_memory is None or request.config.hift.state.moments != "fp32":
        return None
    return request.changed("hift", "state", "moments", value="bf16")


def _bf16(request: Request) -> Request | None:
    return request.changed("bf16", value={"enabled": True}) if request.config.precision == "fp32" else None


def _offload(request: Request) -> Request | None:
    if request.config.offloads_params:
        return None
    staged = request.changed("zero_optimization", "stage", value=3)
    return staged.changed("zero_optimization", "offload_param", value={"device": "cpu"})


def _shorter(request: Request, length: int) -> Request | None:
    return replace(request, seq=length) if length < request.seq else None
