"""What a run needs to resume exactly: this rank's part of position, rates, masters and state of every block.

The files are DeepSpeed's (one optimizer file per rank at stages 1-3, inside the model file at stage 0); the content is
one layout for every stage, by block and slot. Beside them lies `hift.json`, the manifest: it says what run wrote the
checkpoint, so that one that does not fit is refused before anything is read or changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hift_ds.optimizer import HiFTOptimizer
    from hift_ds.state import BlockState

FORMAT = 1
MANIFEST = "hift.json"
STAGE, RANKS = "zero_optimization.stage", "number of data-parallel ranks"
BLOCKS = "hift.layers_per_block, hift.blocks, hift.frozen, hift.always_active and the param groups"


def write_manifest(optimizer: HiFTOptimizer, folder: Path) -> None:
    """Writes `hift.json` into a checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "identity": _identity(optimizer)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def latest_tag(load_dir: str | Path) -> str | None:
    """The tag in DeepSpeed's file "latest", or `None`."""
    latest = Path(load_dir, "latest")
    return latest.read_text(encoding="utf-8").strip() if latest.is_file() else None


def check_manifest(optimizer: HiFTOptimizer, folder: Path, whole: bool) -> bool:
    """Whether HiFT wrote the checkpoint in `folder`; what does not fit this run is refused.

    Args:
        optimizer: This run's.
        folder: The checkpoint's, load_dir/tag.
        whole: Position and state are wanted too, not the weights alone.

    Raises:
        ValueError: No such folder.
        RuntimeError: Not HiFT's, or of a run with other blocks, order, stage, ranks, dtype or rule.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r}: no such folder; check load_dir and tag")
    present, manifest = _identity(optimizer), folder / MANIFEST
    if not manifest.is_file():
        if whole:
            raise RuntimeError(f"checkpoint {str(folder)!r} was not written by HiFT: {_WEIGHTS_ALONE}")
        return False
    content = json.loads(manifest.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise RuntimeError(f"the checkpoint has HiFT format {content.get('format')!r}, this version reads {FORMAT}")
    saved = content["identity"]
    fits = _weights_fit(saved, present)
    advice = f"resume with the same, or {_WEIGHTS_ALONE}" if fits else "resume with the same"
    for key, value in present.items():
        if saved.get(key) != value and (whole or not fits):
            then, now = (repr(v) if len(repr(v)) < 60 else "others" for v in (saved.get(key), value))
            raise RuntimeError(f"the checkpoint was written with another {key} ({then}; this run: {now}): {advice}")
    return True


def optimizer_state(optimizer: HiFTOptimizer) -> dict[str, Any]:
    """This rank's state, host tensors by reference (no copy is made)."""
    optimizer.settle()
    rotation, rate = optimizer.rotation, optimizer.rate
    in_shards = optimizer.settings.stage == 3
    return {
        "hift": {
            "step": rotation.step,
            "rates": rate.rates,
            "blocks": [_block_state(state, in_shards) for state in optimizer._all_states()],
            "loss_scaler": {k: v for k, v in vars(optimizer.loss_scaler).items() if isinstance(v, (bool, int, float))},
        },
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
        "zero_stage": optimizer.settings.stage,
        "partition_count": optimizer._shard_world,
    }


def load_optimizer_state(optimizer: HiFTOptimizer, saved: Any, load_optimizer_states: bool) -> None:
    """Restores `optimizer_state`; at stage 3 the model weights too, which are nowhere else. Not collective.

    `check_manifest` has passed. Below stage 3 DeepSpeed has loaded the model weights before.
    """
    if isinstance(saved, (list, tuple)):
        saved = saved[optimizer.states[0].shard.rank]
    blocks = saved["hift"]["blocks"]
    if optimizer.settings.stage == 3:
        _load_sharded_weights(optimizer, blocks)
    if not load_optimizer_states:
        return
    optimizer.settle()
    for state, block in zip(optimizer._all_states(), blocks, strict=True):
        if state.master is not None and block["master"] is not None:
            state.master.copy_(block["master"])
        elif state.master is not None:  # fp32 weights, now updated on the host
            state.refresh_master()
        state.step = block["step"]
        for name, tensor in state.slots.items():
            tensor.copy_(block["slots"][name])
        for name, tensor in state.extra.items():
            tensor.copy_(block["extra"][name])
    optimizer.rotation.step = saved["hift"]["step"]
    optimizer.rate.rates = saved["hift"]["rates"]
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update(values)
    vars(optimizer.loss_scaler).update(saved["hift"]["loss_scaler"])
    optimizer.reducer.discard()


_WEIGHTS_ALONE = "load its weights alone with load_checkpoint(..., load_module_only=True)"


def _block_state(state: BlockState, in_shards: bool) -> dict[str, Any]:
    content = {"fqns": state.shard.fqns, "step": state.step, "master": state.master, "slots": state.slots}
    content["extra"] = state.extra
    if in_shards and (state.master is None or state.master.dtype != torch.float32):
        # The model file has only placeholders, and the weights do not follow from the masters.
        content["weights"] = state.shard.read_weights(torch.empty(state.shard.numel, dtype=state.shard.dtype))
    return content


@torch.no_grad()
def _load_sharded_weights(optimizer: HiFTOptimizer, blocks: list[dict[str, Any]]) -> None:
    """By name, not by block: a load of weights alone may come from a run with other blocks."""
    shards = [state.shard for state in optimizer._all_states()]
    places = {fqn: (shard, index) for shard in shards for index, fqn in enumerate(shard.fqns)}
    for block in blocks:
        offset, source = 0, block["weights"] if "weights" in block else block["master"]
        for fqn in block["fqns"]:
            shard, index = places[fqn]
            segment = shard.segments[index]
            shard.weight_slice(index).copy_(source[offset : offset + segment.numel])
            offset += segment.padded_numel


def _identity(optimizer: HiFTOptimizer) -> dict[str, Any]:
    """What must be the same for a state to fit, as JSON; the key is what a user would look for in the config."""
    states = optimizer._all_states()
    return {
        STAGE: optimizer.settings.stage,
        RANKS: optimizer.settings.world,
        BLOCKS: [list(state.shard.fqns) for state in states],
        "optimizer.type": optimizer.rule.name,
        "hift.order and hift.seed": list(optimizer.rotation.order),
        "hift.steps_per_block": optimizer.rotation.steps_per_block,
        "hift.state.master and hift.state.moments": [optimizer.settings.form.master, optimizer.settings.form.moments],
        "fp16 or bf16": sorted({str(param.dtype).removeprefix("torch.") for s in states for param in s.shard.params}),
    }


def _weights_fit(saved: dict[str, Any], present: dict[str, Any]) -> bool:
    """Whether the weights alone can be taken. Those of stage 3 lie in shards, of the parameters that were trained."""
    if 3 not in (saved[STAGE], present[STAGE]):
        return True
    names = [{fqn for block in identity[BLOCKS] for fqn in block} for identity in (saved, present)]
    return saved[STAGE] == present[STAGE] and saved[RANKS] == present[RANKS] and names[0] == names[1]
