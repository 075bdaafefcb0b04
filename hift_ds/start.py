"""`initialize()`: every check before anything is touched, then DeepSpeed's own with the engine hook in its place."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from hift_ds.compiled_layers import is_compiled, require_stage_without_hooks
from hift_ds.config.files import load_ds_config
from hift_ds.config.kernels import KernelChoice, choose_kernel
from hift_ds.config.keys import FRESH, check_spelling
from hift_ds.config.optimizers import guarded_type, without_guard
from hift_ds.config.resolve import ResolvedConfig, resolve
from hift_ds.distributed import agree, init_distributed, of_all_ranks, require_alike
from hift_ds.engine import LIVING, HiFTEngine
from hift_ds.memory.choose import agreed_layers_per_block
from hift_ds.rotation.blocks import BlockPlan, plan_blocks
from hift_ds.rotation.fresh import Fresh, find_fresh, new_parameters
from hift_ds.rotation.param_groups import check_inside, check_step, check_trainable, freeze_left_out
from hift_ds.zero.attachment import unchanged_on_failure

logger = logging.getLogger(__name__)
_PATCH = threading.Lock()
DEEPSPEED_INITIALIZE = deepspeed.initialize  # hift_ds.enable() puts another function in its place


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable | None = None,
    config: str | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Mapping[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """`deepspeed.initialize` with the same arguments; a "hift" section in the config turns rotation on.

    Without that section, or with `"enabled": false` in it, this is exactly `deepspeed.initialize`. Collective: call it
    on every rank with the same arguments. An engine that still trains the model ends (`destroy`) and the new one takes
    the model over as it was before. What is refused leaves the model, and such an engine, as they are.

    Returns:
        engine, optimizer, training dataloader, lr scheduler, as from DeepSpeed. `engine.hift` shows the rotation.

    Raises:
        ValueError, TypeError: A bad "hift" section, a DeepSpeed key that HiFT cannot honour, an unsupported optimizer,
            a model without trainable parameters; the same on every rank.
        RuntimeError: The installed DeepSpeed is not one that hift_ds knows.

    Example:
        >>> engine, _, loader, _ = hift_ds.initialize(model=model, config="ds_configs/zero2_bf16.json")
    """
    forwarded = dict(locals())
    ds_config = given_config(args, config, config_params)
    if isinstance(ds_config, Mapping):
        check_spelling(ds_config)
    chosen = None
    living = _engines_of(model)
    if isinstance(ds_config, Mapping) and "hift" in ds_config:
        init_distributed(distributed_port, dist_init_required)
        active = {param for engine in living for param in engine.module.parameters() if param.requires_grad}
        with _detached(living), unchanged_on_failure(model) as as_found:
            agree(lambda: _check_whole(model, optimizer, active) if living else None)
            # Rank 0's weights are what all ranks get, so what it knows of them holds for all.
            new = of_all_ranks(agree(lambda: _new_parameters(model)))[0]
            prepared = agree(lambda: _prepare(ds_config, model, new, optimizer, mpu, mesh_param))
            require_alike("config or model", None if prepared is None else (prepared[0].shared, prepared[1]))
            if prepared is not None and model is not None:
                chosen = _chosen(*prepared, ds_config, model, optimizer)
    for engine in living:
        engine.destroy()
    guarded = guarded_type(ds_config) if isinstance(ds_config, Mapping) else None
    if chosen is None:
        if guarded is not None:
            raise ValueError(
                f"optimizer.type={guarded!r}: only HiFT trains with it, and the section \"hift\" is off or missing; "
                'write "hift": {"enabled": true}, or the type without "HiFT_"'
            )
        return DEEPSPEED_INITIALIZE(**forwarded)
    if guarded is not None or isinstance(_source(args, config, config_params), str):
        # As it was read: DeepSpeed before 0.19.8 leaves a path where the engine keeps its config.
        forwarded.update(args=_without_config(args), config=without_guard(ds_config), config_params=None)
    resolved, plan = chosen
    for note in resolved.notes:
        if dist.get_rank() == 0:
            logger.warning("DeepSpeed config: %s", note)
    attributes = {"resolved": resolved, "block_plan": plan, "as_found": as_found}
    with unchanged_on_failure(model, as_found), _engine_class(type("HiFTEngine", (HiFTEngine,), attributes)):
        return DEEPSPEED_INITIALIZE(**forwarded)


def given_config(args: Any = None, config: Any = None, config_params: Any = None, **_: Any) -> Any:
    """The DeepSpeed config among the arguments of `initialize`, read as `load_ds_config` does."""
    return load_ds_config(_source(args, config, config_params))


def _source(args: Any, config: Any, config_params: Any) -> Any:
    source = config if config is not None else config_params
    return getattr(args, "deepspeed_config", None) if source is None else source


def _without_config(args: Any) -> Any:
    if getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None
    return args


def _chosen(
    resolved: ResolvedConfig, plan: BlockPlan, choice: KernelChoice, ds_config: Mapping[str, Any],
    model: torch.nn.Module, optimizer: Any,
) -> tuple[ResolvedConfig, BlockPlan]:  # fmt: skip
    """What null leaves to us, the same on every rank. Collective."""
    kernel = _agreed_kernel(choice)
    resolved = replace(resolved, kernel=kernel, hift=replace(resolved.hift, kernel=kernel))
    if resolved.hift.layers_per_block is None and resolved.hift.blocks is None:
        always = list(resolved.hift.always_active)
        told = {**ds_config, "hift": {**ds_config["hift"], "kernel": kernel, "always_active": always}}
        layers = agreed_layers_per_block(model, told, optimizer)
        resolved = replace(resolved, hift=replace(resolved.hift, layers_per_block=layers))
        plan = plan_blocks(model, **resolved.hift.block_keys)
    return resolved, plan


def end_engines_of(model: Any) -> None:
    """Destroys the engines that train parameters of a model. Collective where one does."""
    for engine in _engines_of(model):
        engine.destroy()


def _engines_of(model: Any) -> list[HiFTEngine]:
    mine = set(model.parameters()) if isinstance(model, torch.nn.Module) else set()
    return [engine for engine in list(LIVING) if not mine.isdisjoint(engine.module.parameters())]


def _check_whole(model: Any, optimizer: Any, active: set[torch.nn.Parameter]) -> None:
    """An optimizer made meanwhile of what requires a gradient has the active block of the engine before, no more."""
    inside = {param for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
    whole = {param for param in model.parameters() if param.requires_grad}
    if inside and inside <= active and active < whole:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: has the {len(inside)} parameters of one block alone, which another "
            "engine on this model had active: end that engine (engine.destroy(), or accelerator.free_memory()) before "
            "the optimizer is made"
        )


@contextmanager
def _detached(engines: list[HiFTEngine]) -> Iterator[None]:
    """Inside, their modules look as before `initialize`; after a failure the engines have them again."""
    for engine in engines:
        engine.optimizer.step_aside()
        engine._release()
    try:
        yield
    except BaseException:
        for engine in engines:
            engine.optimizer.step_back()
            engine._take_back()
        raise


def _prepare(
    ds_config: Mapping[str, Any], model: Any, new: Collection[str] | None, optimizer: Any, mpu: Any, mesh_param: Any
) -> tuple[ResolvedConfig, BlockPlan, KernelChoice] | None:
    """Every check that needs no engine, so that what is not supported is refused before anything is built."""
    resolved = resolve(
        ds_config, world=dist.get_world_size(), device_type=get_accelerator().device_name(),
        separate_host=HiFTEngine.separate_host, optimizer=optimizer,
    )  # fmt: skip
    if resolved is None:
        return None
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    if is_compiled(model):
        require_stage_without_hooks(resolved.stage)
    if mpu is not None:
        raise ValueError(f"mpu={type(mpu).__name__}: HiFT has no model parallelism; leave mpu out")
    if mesh_param is not None:
        raise ValueError(f"mesh_param={mesh_param!r}: HiFT has no sequence parallelism; leave mesh_param out")
    if isinstance(optimizer, torch.optim.Optimizer):
        check_inside(optimizer, model)
        check_step(optimizer)
        freeze_left_out(model, optimizer)
    resolved = _with_fresh(resolved, model, new)
    choice = choose_kernel(
        resolved.hift.kernel, resolved.device_type, resolved.hift.state.compact, resolved.home == "host"
    )
    plan = plan_blocks(model, **resolved.hift.block_keys)
    check_trainable(model, plan, resolved.stage)
    frozen = set(plan.frozen)
    for name, param in model.named_parameters():
        if name in frozen:
            param.requires_grad_(False)
    return resolved, plan, choice


def _new_parameters(model: Any) -> tuple[str, ...] | None:
    return new_parameters(model) if isinstance(model, torch.nn.Module) else None


def _with_fresh(resolved: ResolvedConfig, model: torch.nn.Module, new: Collection[str] | None) -> ResolvedConfig:
    """`fresh` in `always_active` by names; where `hift.blocks` places every parameter nothing is left to find."""
    hift = resolved.hift
    if FRESH not in hift.always_active:
        return resolved
    fresh = Fresh()
    if hift.blocks is None:
        plan = plan_blocks(model, **{**hift.block_keys, "layers_per_block": 1})
        fresh = find_fresh(model, {fqn for block in plan.blocks for fqn in block.fqns}, new)
    notes = (*resolved.notes, fresh.note) if fresh.note else resolved.notes
    return replace(resolved, hift=hift.with_fresh(fresh.fqns), notes=notes)


def _agreed_kernel(mine: KernelChoice) -> str:
    """The fused kernels only where every rank can take them; rank 0 says why they are not taken. Collective."""
    for rank, choice in enumerate(of_all_ranks(mine)):
        if choice.why_not is not None:
            if dist.get_rank() == 0:
                logger.warning("hift.kernel=null: updates run in eager torch: rank %d: %s", rank, choice.why_not)
            return choice.kernel
    return mine.kernel


@contextmanager
def _engine_class(replacement: type[DeepSpeedEngine]):
    """deepspeed.initialize looks its engine class up by this name; there is no other seam."""
    with _PATCH:
        original = deepspeed.DeepSpeedEngine
        deepspeed.DeepSpeedEngine = replacement
        try:
            yield
        finally:
            deepspeed.DeepSpeedEngine = original
