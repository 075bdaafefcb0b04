"""Param groups: the holder of hyper-parameters, and which parameter is in which group."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hift_ds.rotation.blocks import BlockPlan
from hift_ds.rotation.names import some

logger = logging.getLogger(__name__)


class HyperParameters(torch.optim.Optimizer):
    """Param groups and nothing else: what schedulers and loggers read and write. It never has state."""

    def step(self, closure: Any = None) -> Any:
        """Does nothing: HiFTOptimizer updates the weights."""


def trainable_groups(model_parameters: Any) -> list[dict[str, Any]]:
    """Parameters or param groups, as `deepspeed.initialize` takes them, as groups of what requires gradients.

    With names or without, as torch's optimizers take them, too.
    """
    parameters = list(model_parameters)
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": parameters}]
    kept = [{**group, "params": _trainable(group["params"])} for group in groups]
    return [group for group in kept if group["params"]]


def _trainable(params: Any) -> list[Any]:
    entries = [params] if isinstance(params, torch.Tensor) else params
    return [entry for entry in entries if (entry[1] if isinstance(entry, tuple) else entry).requires_grad]


def check_coverage(holder: torch.optim.Optimizer, params: dict[str, torch.nn.Parameter]) -> None:
    """Raises ValueError if one of `params` (what the blocks train) is in no param group."""
    inside = group_indices(holder.param_groups, params)
    missing = [name for name in params if name not in inside]
    if missing:
        raise ValueError(
            f"model_parameters: {len(missing)} trainable parameters are in no param group, first {missing[0]!r}: add "
            'them, or freeze them with "hift": {"frozen": [...]}'
        )


def check_inside(holder: torch.optim.Optimizer, module: torch.nn.Module) -> None:
    """Raises ValueError if an optimizer has a parameter that the module has not: no block would hold it."""
    inside = set(module.parameters())
    for index, group in enumerate(holder.param_groups):
        for place, param in enumerate(group["params"]):
            if param not in inside:
                raise ValueError(
                    f"optimizer.param_groups[{index}]['params'][{place}]: a parameter of shape {list(param.shape)} "
                    "that is not in the model, and HiFT trains the model's blocks alone: make it an nn.Parameter of "
                    "the module and name it in hift.always_active, or train it with an optimizer of its own"
                )


def step_fault(optimizer: torch.optim.Optimizer) -> str | None:
    """A sentence if an optimizer object has a `step` of its own, which nothing would call."""
    step = vars(optimizer).get("step")
    if step is None or hasattr(step, "_wrapped_by_lr_sched"):  # torch's schedulers only count its calls
        return None
    return (
        f"optimizer: the step() of this {type(optimizer).__name__} object was replaced, and HiFT, which makes the "
        "update itself, would never call it; use register_step_pre_hook and register_step_post_hook"
    )


def check_step(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where there is a `step_fault`."""
    fault = step_fault(optimizer)
    if fault:
        raise ValueError(fault)


def groups_fault(param_groups: list[dict], known: list[list[int]]) -> str | None:
    """What has been changed in the sets of parameters since `initialize`, as a sentence, or `None`.

    Args:
        param_groups: The holder's.
        known: The ids of their parameters then.
    """
    present = [list(map(id, group["params"])) for group in param_groups]
    if present == known:
        return None
    index = next((i for i, (now, then) in enumerate(zip(present, known, strict=False)) if now != then), len(known))
    return (
        f"param group {index} was added or has other parameters than at initialize, and these would never train: call "
        "engine.destroy() and hift_ds.initialize again"
    )


def check_trainable(model: torch.nn.Module, plan: BlockPlan, stage: int) -> None:
    """Raises ValueError if the model has trained parameters that HiFT cannot train at this ZeRO stage."""
    names = {fqn for block in plan.blocks for fqn in block.fqns} | set(plan.always_active)
    trained = {name: param for name, param in model.named_parameters() if name in names}
    for name, param in trained.items():
        if stage < 3 and hasattr(param, "ds_id"):
            raise ValueError(
                f"zero_optimization.stage={stage}: {name} is a ZeRO-3 parameter (the model was made under "
                "deepspeed.zero.Init, or a stage-3 engine has trained it); use stage 3, or make the model without it"
            )
        if param.is_complex():
            raise ValueError(
                f"{name}: a complex parameter ({param.dtype}), of which shards would lose the imaginary part; store it "
                "as torch.view_as_real, or name it in hift.frozen"
            )
    for path, module in model.named_modules():
        embeds = isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
        if embeds and module.sparse and any(param is module.weight for param in trained.values()):
            raise ValueError(
                f"{path}: an embedding with sparse=True, whose gradients are not implemented; make it with "
                "sparse=False, or name it in hift.frozen"
            )


def freeze_left_out(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Parameters that a client optimizer does not have stop requiring gradients; one warning names them.

    DeepSpeed would compute their gradients and never use them.
    """
    inside = {id(param) for group in optimizer.param_groups for param in group["params"]}
    left_out = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    for _, param in left_out:
        param.requires_grad_(False)
    if left_out:
        names = some([name for name, _ in left_out])
        logger.warning("%d parameters are in no param group of the optimizer and stay frozen: %s", len(left_out), names)


def group_indices(param_groups: list[dict], params: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    """Param group index by parameter name, for the parameters that are in a group."""
    index_of = {id(param): index for index, group in enumerate(param_groups) for param in group["params"]}
    return {name: index_of[id(param)] for name, param in params.items() if id(param) in index_of}
