"""Cases for a CUDA device that a CPU can run too, so that they are known to work before there is a device."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from hift_testing.training import DEVICE, batch_of, ds_config, engine_of, whole_weights

from hift_ds.config.keys import StateConfig
from hift_ds.config.optimizers import rule_from_config
from hift_ds.shards import UnitShard
from hift_ds.state.host_memory import HostMemory
from hift_ds.state.unit_state import Storage, UnitState, make_states
from hift_ds.zero.update import Scaling, UnitUpdate
from hift_ds.zero.weights import OwnWeights

BLOCKS, NUMEL, STEPS = 3, 100_003, 12
_made: list[Any] = []  # the engine whose peaks were measured in this process


def states_of(form: StateConfig, streams: bool, ring_bytes: int | None = None) -> tuple[list[UnitState], UnitUpdate]:
    """Three blocks of bf16 weights under AdamW, and what updates them with the fused kernels."""
    rule, defaults = rule_from_config("AdamW", {"lr": 1e-2, "weight_decay": 0.01})
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(NUMEL, generator=generator).bfloat16().to(DEVICE)) for _ in range(BLOCKS)]
    shards = [UnitShard([("weight", param)], {"weight": 0}, 1, 0) for param in params]
    groups = [{**defaults, "params": params}]
    memory = (HostMemory.pinned() if DEVICE.type == "cuda" else HostMemory()) if streams else None
    states, ring = make_states([[shard] for shard in shards], rule, groups, Storage(DEVICE, form, memory), ring_bytes)
    return states, UnitUpdate(rule, groups, DEVICE, lambda tensor: tensor, "triton", ring, seed=5)


def trained(form: StateConfig, streams: bool, turns: list[int], ring_bytes: int | None = None) -> list[torch.Tensor]:
    """Every state tensor and weight after updates of blocks in `turns`, with the next block's tiles prefetched."""
    states, update = states_of(form, streams, ring_bytes)
    square = torch.ones(1, dtype=torch.float64, device=DEVICE)
    for step, block in enumerate(turns):
        state = states[block]
        grad = torch.randn(state.shard.numel, generator=torch.Generator().manual_seed(step)).bfloat16().to(DEVICE)
        update.run(state, grad, OwnWeights(state.shard, DEVICE), Scaling(1.0, 0.0, None, square), [1e-2], block)
        if update.ring is not None and step + 1 < len(turns):
            update.ring.prefetch(states[turns[step + 1]].tiles)
    if update.ring is not None:
        update.ring.settle()
    kept = [tensor.cpu() for state in states for tensor in state.tensors.values()]
    return kept + [param.detach().cpu() for state in states for param in state.shard.params]


@contextmanager
def waiting_is_an_error():
    """torch raises at every operation that waits for the CUDA device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def engine_steps(stage: int, dtype: str, hift: dict[str, Any], steps: int, strict: bool) -> dict[str, Any]:
    """Steps of an engine.

    Args:
        strict: Waiting for the device inside `optimizer.step` is an error, from the second step on.

    Returns:
        `losses`, `weights` (whole, on the CPU), `pinned`: whether the host's state is.
    """
    engine = engine_of(ds_config(stage, dtype, hift))
    losses = []
    for step in range(steps):
        loss = engine(**batch_of(step, 0, 0)).loss
        losses.append(loss.item())
        engine.backward(loss)
        with waiting_is_an_error() if strict and step > 0 else nullcontext():
            engine.optimizer.step()
        engine.optimizer.zero_grad()
    engine.optimizer.settle()
    tensors = [tensor for state in engine.optimizer.states for tensor in state.tensors.values()]
    return {
        "losses": losses,
        "weights": {name: weight.float().cpu() for name, weight in whole_weights(engine).items()},
        "pinned": all(tensor.is_pinned() for tensor in tensors) if engine.device.type == "cuda" else None,
    }


class Wide(torch.nn.Module):
    """Layers whose state takes the bus longer than anything else in a step takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4))) for _ in range(3))
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def copies_out_behind_a_step(width: int, steps: int, reads: bool) -> list[bool | None]:
    """After each step, when all work of the compute stream is done, with `reads` the user's `loss.item()`, too: whether
    state is still on its way to the host (`None`: a CPU). What goes to the host on that stream did not wait for it."""
    engine = engine_of(ds_config(0, "bf16", {"kernel": "triton"}, gradient_clipping=1.0), Wide(width))
    found: list[bool | None] = []
    x = torch.ones(1, width, device=engine.device, dtype=torch.bfloat16)
    for _ in range(steps):
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        if reads:
            loss.item()
        if engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
            found.append(not engine.optimizer.ring.lanes.copy_out._stream.query())
        else:
            found.append(None)
    return found


def device_bytes_of_state(ring_bytes: int) -> dict[str, int]:
    """Most bytes that an update allocates beside gradient and new weights, the ring included (CUDA only)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    states, update = states_of(StateConfig(), True, ring_bytes)
    weights = sum(param.nbytes for state in states for param in state.shard.params)
    grad = torch.randn(states[0].shard.numel, device=DEVICE).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    square = torch.ones(1, dtype=torch.float64, device=DEVICE)
    update.run(states[0], grad, OwnWeights(states[0].shard, DEVICE), Scaling(1.0, 0.0, None, square), [1e-2], 0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - weights - grad.nbytes - states[0].shard.numel * 2
    return {"state": peak, "ring": update.ring.nbytes, "allowed": ring_bytes}


def peaks(
    stage: int, precision: str, checkpointing: bool, llama: dict[str, Any], rows: int, seq: int
) -> tuple[dict[int, int], list[int]]:
    """Each block's peak, measured in its second turn at the latest by the memory meter, and forecast by the planner.

    On CUDA in bytes requested, beyond those before there is an engine; on a CPU in bytes of tensors.

    Raises:
        RuntimeError: This process has measured before. Engines are never freed: the earlier one would be in the peaks.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from hift_ds.config.resolve import DTYPES
    from hift_ds.memory import MemoryMeter
    from hift_ds.memory.planner import Planner
    from hift_ds.memory.request import Request
    from hift_ds.recipes.planning import complete_config
    from hift_ds.state.unit_state import card_bytes

    if _made:
        raise RuntimeError("peaks() is measured once in a process; give each case a `fresh_rank`")
    before = bytes_before(DTYPES[precision])
    config = {**complete_config(None, precision, stage, rows, 1), "steps_per_print": None}
    model = LlamaForCausalLM(LlamaConfig(**llama, use_cache=False)).to(DTYPES[precision])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = engine_of(copy.deepcopy(config), model)
    _made.append(engine)
    with MemoryMeter(engine) as meter:
        for step in range(2 * len(engine.hift.blocks)):
            ids = torch.randint(0, llama["vocab_size"], (rows, seq), generator=torch.Generator().manual_seed(step))
            loss = engine(input_ids=ids.to(engine.device), labels=ids.to(engine.device)).loss
            engine.backward(loss)
            del loss
            engine.step()
    device = engine.device
    request = Request(config, seq, None, checkpointing, gpu_memory=card_bytes(device), device_type=device.type)
    plan = Planner(LlamaConfig(**llama)).forecast(request)
    measured = meter.gather().block_peaks("requested" if engine.device.type == "cuda" else "allocated")
    return {block: peak - before for block, peak in measured.items()}, [block.peak for block in plan.blocks]


def bytes_before(dtype: torch.dtype) -> int:
    """Bytes requested of the device after a first matrix product forward and backward; 0 on a CPU.

    From then on cuBLAS keeps a workspace for the forward's thread and one for autograd's (32 MiB each on sm_90), which
    torch's allocator counts and the forecast leaves to its reserve.
    """
    matrix = torch.ones(256, 256, dtype=dtype, device=DEVICE, requires_grad=True)
    torch.mm(matrix, matrix).sum().backward()
    del matrix
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]
