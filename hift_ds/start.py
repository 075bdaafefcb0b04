"""`initialize()`: every check before anything is touched, then DeepSpeed's own with the engine hook in its place."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine

from hift_ds.config import surface
from hift_ds.config.ds_keys import check_ds_config
from hift_ds.config.files import load_ds_config
from hift_ds.config.kernels import KernelChoice, choose_kernel
from hift_ds.config.keys import HiFTConfig, check_spelling
from hift_ds.config.optimizers import check_form, rule_from_config, rule_from_optimizer
from hift_ds.distributed import agree, init_distributed, require_alike
from hift_ds.engine import LIVING, HiFTEngine
from hift_ds.memory.choose import agreed_layers_per_block
from hift_ds.memory.request import precision_of, zero_section
from hift_ds.rotation.blocks import BlockPlan, plan_blocks
from hift_ds.rotation.param_groups import check_inside, check_step, check_trainable, freeze_left_out
from hift_ds.zero.attachment import unchanged_on_failure
from hift_ds.zero.settings import updates_on_host

logger = logging.getLogger(__name__)
_PATCH = threading.Lock()


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
    source = config if config is not None else config_params
    if source is None:
        source = getattr(args, "deepspeed_config", None)
    ds_config = load_ds_config(source)
    forwarded = dict(
        args=args, model=model, optimizer=optimizer, model_parameters=model_parameters, training_data=training_data,
        lr_scheduler=lr_scheduler, distributed_port=distributed_port, mpu=mpu, dist_init_required=dist_init_required,
        collate_fn=collate_fn, config=config, mesh_param=mesh_param, config_params=config_params,
    )  # fmt: skip
    if isinstance(ds_config, Mapping):
        check_spelling(ds_config)
    living = [engine for engine in list(LIVING) if _share_parameters(engine.module, model)]
    if isinstance(ds_config, Mapping) and "hift" in ds_config:
        init_distributed(distributed_port, dist_init_required)
        with _detached(living), unchanged_on_failure(model) as as_found:
            prepared = agree(lambda: _prepare(ds_config, model, optimizer, mpu, mesh_param))
            require_alike("hift section or model", None if prepared is None else prepared[:2])
            if prepared is not None:
                prepared = _chosen(*prepared, ds_config, model, optimizer)
    else:
        prepared = None
    for engine in living:
        engine.destroy()
    if prepared is None:
        return deepspeed.initialize(**forwarded)
    hift_config, plan, notes = prepared
    for note in notes:
        if dist.get_rank() == 0:
            logger.warning("DeepSpeed config: %s", note)
    attributes = {"hift_config": hift_config, "block_plan": plan, "as_found": as_found}
    with unchanged_on_failure(model, as_found), _engine_class(type("HiFTEngine", (HiFTEngine,), attributes)):
        return deepspeed.initialize(**forwarded)


def _chosen(
    config: HiFTConfig, plan: BlockPlan, notes: list[str], choice: KernelChoice, ds_config: Mapping[str, Any],
    model: torch.nn.Module, optimizer: Any,
) -> tuple[HiFTConfig, BlockPlan, list[str]]:  # fmt: skip
    """What null leaves to us, the same on every rank. Collective."""
    config = dataclasses.replace(config, kernel=_agreed_kernel(choice))
    if config.layers_per_block is None and config.blocks is None:
        told = {**ds_config, "hift": {**ds_config["hift"], "kernel": config.kernel}}
        config = dataclasses.replace(config, layers_per_block=agreed_layers_per_block(model, told, optimizer))
        plan = _plan_blocks(model, config)
    return config, plan, notes


def _share_parameters(trained: torch.nn.Module, model: Any) -> bool:
    return isinstance(model, torch.nn.Module) and not set(trained.parameters()).isdisjoint(model.parameters())


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
    ds_config: Mapping[str, Any], model: Any, optimizer: Any, mpu: Any, mesh_param: Any
) -> tuple[HiFTConfig, BlockPlan, list[str], KernelChoice] | None:
    """Every check that needs no engine, so that what is not supported is refused before anything is built."""
    config = HiFTConfig.from_ds_config(ds_config)
    if config is None:
        return None
    surface.require()
    notes = check_ds_config(dict(ds_config))
    DeepSpeedConfig(copy.deepcopy(dict(ds_config)))  # what DeepSpeed refuses in it, before anything is touched
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    _check_scheduler(ds_config.get("scheduler") or {})
    if mpu is not None:
        raise ValueError(f"mpu={type(mpu).__name__}: HiFT has no model parallelism; leave mpu out")
    if mesh_param is not None:
        raise ValueError(f"mesh_param={mesh_param!r}: HiFT has no sequence parallelism; leave mesh_param out")
    section = ds_config.get("optimizer")
    if optimizer is None:
        if not section or "type" not in section:
            raise ValueError('optimizer: missing; HiFT needs one: pass it, or add "optimizer" to the DeepSpeed config')
        rule, _ = rule_from_config(section["type"], section.get("params") or {})
        check_form(config.state.master, config.state.moments, rule, _weight_dtype(ds_config))
    elif isinstance(optimizer, torch.optim.Optimizer):
        rule = rule_from_optimizer(optimizer)
        check_form(config.state.master, config.state.moments, rule, _weight_dtype(ds_config))
        check_inside(optimizer, model)
        check_step(optimizer)
        freeze_left_out(model, optimizer)
    on_host = updates_on_host(ds_config)
    if on_host and config.state.residency == "device":
        raise ValueError(
            "hift.state.residency='device': offload_optimizer.device 'cpu' updates on the host; remove one of the two"
        )
    choice = choose_kernel(config.kernel, get_accelerator().device_name(), config.state.compact, on_host)
    plan = _plan_blocks(model, config)
    check_trainable(model, plan, int(zero_section(ds_config).get("stage", 0)))
    frozen = set(plan.frozen)
    for name, param in model.named_parameters():
        if name in frozen:
            param.requires_grad_(False)
    return config, plan, notes, choice


def _check_scheduler(section: Mapping[str, Any]) -> None:
    name, params = section.get("type"), section.get("params") or {}
    if not name:
        return
    kind = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if kind is None:
        raise ValueError(
            f"scheduler.type={name!r}: must be one of {', '.join(lr_schedules.VALID_LR_SCHEDULES)}, or a class of "
            "torch.optim.lr_scheduler"
        )
    try:
        inspect.signature(kind).bind(None, **params)
    except TypeError as error:
        raise ValueError(f"scheduler.params={dict(params)!r}: not those of {name} ({error}); correct them") from None


def _agreed_kernel(mine: KernelChoice) -> str:
    """The fused kernels only where every rank can take them; rank 0 says why they are not taken. Collective."""
    choices: list[KernelChoice] = [mine] * dist.get_world_size()
    if len(choices) > 1:
        dist.all_gather_object(choices, mine)
    for rank, choice in enumerate(choices):
        if choice.why_not is not None:
            if dist.get_rank() == 0:
                logger.warning("hift.kernel=null: updates run in eager torch: rank %d: %s", rank, choice.why_not)
            return choice.kernel
    return mine.kernel


def _weight_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision_of(ds_config)]


def _plan_blocks(model: torch.nn.Module, config: HiFTConfig) -> BlockPlan:
    return plan_blocks(
        model,
        layers_per_block=config.layers_per_block or 1,
        blocks=config.blocks,
        frozen=config.frozen,
        always_active=config.always_active,
    )


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
