"""What a run needs to resume exactly: this rank's part of position, rates, masters and state of every block.

The file is DeepSpeed's (one optimizer file per rank at stages 1-3, inside the model file at stage 0); the content is
one layout for every stage, by block and slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator

if TYPE_CHECKING:
    from hift_ds.optimizer import HiFTOptimizer
    from hift_ds.state import BlockState

FORMAT = 1


def optimizer_state(optimizer: HiFTOptimizer) -> dict[str, Any]:
    """This rank's state, host tensors by reference (no copy is made)."""
    get_accelerator().synchronize()  # write-backs to pinned memory are asynchronous
    rotation, rate = optimizer.rotation, optimizer.rate
    return {
        "hift": {
            "format": FORMAT,
            "identity": _identity(optimizer),
            "step": rotation.step,
            "rates": rate.rates,
            "blocks": [_block_state(state) for state in optimizer._all_states()],
            "loss_scaler": {k: v for k, v in vars(optimizer.loss_scaler).items() if isinstance(v, (bool, int, float))},
        },
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
        "zero_stage": optimizer.settings.stage,
        "partition_count": optimizer._shard_world,
    }


def load_optimizer_state(optimizer: HiFTOptimizer, saved: Any, load_optimizer_states: bool) -> None:
    """Restores `optimizer_state`, and the model weights from its masters (stage 3 has no other copy). Collective.

    Raises:
        RuntimeError: The checkpoint is not HiFT's, or of a run with other blocks, order, stage, ranks or rule.
    """
    if isinstance(saved, (list, tuple)):
        saved = saved[optimizer.states[0].shard.rank]
    if not isinstance(saved, dict) or "hift" not in saved:
        raise RuntimeError(
            "the checkpoint's optimizer state was not written by HiFT: load its weights alone with "
            "load_checkpoint(..., load_module_only=True)"
        )
    content = saved["hift"]
    _check_identity(content, _identity(optimizer))
    for state, block in zip(optimizer._all_states(), content["blocks"]):
        weights = block["master"]
        if state.master is not None:
            state.master.copy_(weights)
        state.shard.write_weights(weights.to(optimizer.device), optimizer.group, optimizer.settings.publish_numel)
        if load_optimizer_states:
            _load_block(state, block)
    if load_optimizer_states:
        _load_position(optimizer, content, saved["param_groups"])


def _block_state(state: BlockState) -> dict[str, Any]:
    master = state.master
    if master is None:  # fp32 weights are their own master
        master = state.shard.read_weights(torch.empty(state.shard.numel))
    return {"fqns": state.shard.fqns, "step": state.step, "master": master, "slots": state.slots, "extra": state.extra}


def _load_block(state: BlockState, block: dict[str, Any]) -> None:
    state.step = block["step"]
    for name, tensor in state.slots.items():
        tensor.copy_(block["slots"][name])
    for name, tensor in state.extra.items():
        tensor.copy_(block["extra"][name])


def _load_position(optimizer: HiFTOptimizer, content: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    optimizer.rotation.step = content["step"]
    optimizer.rate.rates = content["rates"]
    for group, saved in zip(optimizer.param_groups, param_groups):
        group.update(saved)
    vars(optimizer.loss_scaler).update(content["loss_scaler"])
    optimizer.reducer.discard()
    optimizer.activate()


def _identity(optimizer: HiFTOptimizer) -> dict[str, Any]:
    """What must be the same for a state to fit; the key is what a user would look for in the config."""
    return {
        "zero_optimization.stage": optimizer.settings.stage,
        "number of data-parallel ranks": optimizer._shard_world,
        "optimizer.type": optimizer.rule.name,
        "hift.order and hift.seed": optimizer.rotation.order,
        "hift.steps_per_block": optimizer.rotation.steps_per_block,
        "hift.layers_per_block, hift.blocks, hift.frozen and the param groups": tuple(
            state.shard.fqns for state in optimizer._all_states()
        ),
    }


def _check_identity(content: dict[str, Any], present: dict[str, Any]) -> None:
    if content.get("format") != FORMAT:
        raise RuntimeError(f"the checkpoint has HiFT format {content.get('format')!r}, this version reads {FORMAT}")
    for key, value in present.items():
        saved = content["identity"].get(key)
        if saved != value:
            then, now = (repr(v) if len(repr(v)) < 60 else "others" for v in (saved, value))
            raise RuntimeError(
                f"the checkpoint was written with another {key} ({then}; this run: {now}): resume with the same, or "
                "load its weights alone with load_checkpoint(..., load_module_only=True)"
            )
