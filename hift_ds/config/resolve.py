"""What a DeepSpeed config with a "hift" section means: decided here, once, for engine, planner and scripts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed import __version__ as version
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from pydantic import ValidationError

from hift_ds.config import surface
from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN, batch_sizes
from hift_ds.config.ds_keys import check_ds_config
from hift_ds.config.kernels import check_kernel, expected_kernel
from hift_ds.config.keys import HiFTConfig
from hift_ds.config.optimizers import check_form, rule_from_config, rule_from_optimizer
from hift_ds.rules import Rule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Keys that DeepSpeed 0.18 does not have, by section: DeepSpeed's config has an attribute of the name where it has one.
_NEWER = {
    "": ("gradient_allreduce_op", "managed_gradient_accumulation"),
    "data_types": ("param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
}


@dataclass(frozen=True)
class ResolvedConfig:
    """One run's settings; DeepSpeed's names where there is one.

    Attributes:
        hift: The "hift" section.
        known_rule: The update rule; `None` until a client's function has made the optimizer (`with_optimizer`).
        group: Hyper-parameters of a param group, as the optimizer begins with.
        optimizer_params: `optimizer.params` as it is; empty for a client's optimizer.
        world: Ranks of the data-parallel group.
        stage: ZeRO stage.
        precision: Of the model weights: `fp32`, `bf16` or `fp16`.
        micro_batch: Rows of a rank's forward.
        micro_steps: Forwards of an optimizer step (`gradient_accumulation_steps`).
        managed: `managed_gradient_accumulation`: DeepSpeed counts the micro steps; else each `step` ends a window.
        accumulation_dtype: Of averaged gradients.
        communication_dtype: Of gradients on their way.
        predivide: `gradient_predivide_factor` (with `prescale_gradients`: the world size).
        mean: `False` for `gradient_allreduce_op: sum`.
        clip: `gradient_clipping`, the largest global norm of the active block's gradient (`hift.clip`: of each unit's
            own); 0 = off.
        zero: DeepSpeed's own reading of `zero_optimization`.
        home: Where masters and moments live: `device`; `stream`, on the host, through a ring on the device; `host`,
            where they are updated, too.
        pin_memory: Page-lock the host's copies.
        kernel: What updates blocks, `torch` or `triton`; before `with_kernel` what a device without trouble takes.
        device_type: Where the model trains.
        notes: Keys of the config that have no effect, a sentence each.
    """

    hift: HiFTConfig
    known_rule: Rule | None
    group: Mapping[str, Any]
    optimizer_params: Mapping[str, Any]
    world: int
    stage: int
    precision: str
    micro_batch: int
    micro_steps: int
    managed: bool
    accumulation_dtype: torch.dtype
    communication_dtype: torch.dtype
    predivide: float
    mean: bool
    clip: float
    zero: Any
    home: str
    pin_memory: bool
    kernel: str
    device_type: str
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> Rule:
        """The update rule."""
        assert self.known_rule is not None, "the client's function has not made the optimizer yet"
        return self.known_rule

    @property
    def dtype(self) -> torch.dtype:
        """Of the model weights."""
        return DTYPES[self.precision]

    @property
    def shard_world(self) -> int:
        """Ranks that share a block's state."""
        return self.world if self.stage > 0 else 1

    @property
    def shared(self) -> tuple:
        """What every rank must have alike, or they would wait for each other, or train apart.

        Of the hyper-parameters those that print alike in every process: a function of the user's does not.
        """
        plain = {key: value for key, value in self.group.items() if isinstance(value, (int, float, str, tuple))}
        return (
            self.hift, plain, self.stage, self.precision, self.micro_steps, self.managed, self.accumulation_dtype,
            self.communication_dtype, self.predivide, self.mean, self.clip,
        )  # fmt: skip

    @property
    def sends_weights(self) -> bool:
        """Whether a rank sends new weights to others after an update: its share of what each keeps whole."""
        return self.shard_world > 1 and self.stage < 3

    @property
    def offloads_params(self) -> bool:
        """Whether the ZeRO-3 slices are on the host."""
        section = self.zero.offload_param
        return self.stage == 3 and section is not None and section.device == "cpu"

    def with_optimizer(self, optimizer: torch.optim.Optimizer) -> ResolvedConfig:
        """With a client's optimizer.

        Raises:
            TypeError, ValueError: One that has no rule, or that does not go with `hift.state`.
        """
        rule = rule_from_optimizer(optimizer)
        check_form(self.hift.state.master, self.hift.state.moments, rule, self.dtype)
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        return replace(self, known_rule=rule, group=group, optimizer_params={})


def resolve(
    ds_config: Mapping[str, Any],
    *,
    world: int,
    device_type: str = "cuda",
    separate_host: bool | None = None,
    optimizer: Any = None,
) -> ResolvedConfig | None:
    """Reads, checks and completes a config.

    Args:
        ds_config: The whole config. Not changed.
        world: Ranks of the data-parallel group.
        device_type: Where the model trains.
        separate_host: Treat host and device as separate memories; `None` = unless the device is the CPU.
        optimizer: The client's, or its function that makes it.

    Returns:
        `None` without a "hift" section, or where it says `"enabled": false`.

    Raises:
        ValueError, TypeError: Whatever in the config HiFT or DeepSpeed refuses, in one sentence.
    """
    hift = HiFTConfig.from_ds_config(ds_config)
    if hift is None:
        return None
    _check_sections(ds_config)
    surface.require()
    notes = tuple(check_ds_config(dict(ds_config)))
    micro_batch, micro_steps = batch_sizes(ds_config, world)
    deepspeed = _as_deepspeed_reads(ds_config, micro_batch, micro_steps)
    _check_known(deepspeed, ds_config)
    _check_scheduler(ds_config.get("scheduler") or {})
    rule: Rule | None = None
    group: dict[str, Any] = {}
    params: dict[str, Any] = {}
    if optimizer is None:
        section = ds_config.get("optimizer")
        if not section or "type" not in section:
            raise ValueError('optimizer: missing; HiFT needs one: pass it, or add "optimizer" to the DeepSpeed config')
        params = section.get("params") or {}
        rule, group = rule_from_config(section["type"], section.get("params"))
        check_form(hift.state.master, hift.state.moments, rule, DTYPES[precision_of(ds_config)])
    on_host = _offload_optimizer(ds_config).get("device") == "cpu"
    if on_host and hift.state.residency == "device":
        raise ValueError(
            "hift.state.residency='device': offload_optimizer.device 'cpu' updates on the host; remove one of the two"
        )
    check_kernel(hift.kernel, hift.state.compact, on_host)
    precision = precision_of(ds_config)
    managed = getattr(deepspeed, "managed_gradient_accumulation", True)
    clip, clip_note = _clip(hift, ds_config, deepspeed.gradient_clipping)
    notes += clip_note
    _check_update(hift, ds_config, managed)
    notes += _of_wrong_gathers(deepspeed.zero_optimization_stage, device_type)
    model_dtype, asked = DTYPES[precision], deepspeed.grad_accum_dtype
    apart = device_type != "cpu" if separate_host is None else separate_host
    resolved = ResolvedConfig(
        hift=hift,
        known_rule=rule,
        group=group,
        optimizer_params=params,
        world=world,
        stage=int(deepspeed.zero_optimization_stage),
        precision=precision,
        micro_batch=micro_batch,
        micro_steps=micro_steps,
        managed=managed,
        accumulation_dtype=_accumulation_dtype(
            None if asked is None else DtypeEnum(asked).value, model_dtype,
            micro_steps > 1 or not managed,
        ),
        communication_dtype=deepspeed.communication_data_type or model_dtype,
        predivide=float(world) if deepspeed.prescale_gradients else deepspeed.gradient_predivide_factor,
        mean=getattr(deepspeed, "gradient_allreduce_op", "mean") == "mean",
        clip=clip,
        zero=deepspeed.zero_config,
        home="device" if not apart or hift.state.residency == "device" else "host" if on_host else "stream",
        # Only a written `false` counts: DeepSpeed's own default of the key is false too.
        pin_memory=hift.state.pin_memory and _offload_optimizer(ds_config).get("pin_memory") is not False,
        kernel=expected_kernel(hift.kernel, device_type, hift.state.compact, on_host),
        device_type=device_type,
        notes=notes,
    )  # fmt: skip
    return resolved.with_optimizer(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else resolved


def _clip(hift: HiFTConfig, ds_config: Mapping[str, Any], clip: float) -> tuple[float, tuple[str, ...]]:
    """The bound in force, and what is to be said of it: DeepSpeed's default is not off."""
    if hift.update == "step":
        if hift.clip == "unit":
            raise ValueError(
                "hift.clip='unit': with hift.update 'step' the norm of the whole block is known before the update; "
                'leave it out, or write "update": "backward"'
            )
        return clip, ()
    given = ds_config.get("gradient_clipping")
    if given is None:
        note = "gradient_clipping: off with hift.update 'backward' where it is not written (DeepSpeed's default is 1.0)"
        return 0.0, (note,) if clip else ()
    if clip > 0 and hift.clip != "unit":
        raise ValueError(
            f"gradient_clipping={given!r}: with hift.update 'backward' the first layers are updated before the norm of "
            'all is known; set it to 0, or write "clip": "unit" in the "hift" section to clip each layer unit by its '
            "own norm"
        )
    return clip, ()


def _check_update(hift: HiFTConfig, ds_config: Mapping[str, Any], managed: bool) -> None:
    """Refuses what cannot be with updates in backward."""
    if hift.update == "step":
        if hift.accumulate == "host":
            raise ValueError(
                "hift.accumulate='host': with hift.update 'step' the whole block's gradient is on the device at its "
                'update; leave it out, or write "update": "backward"'
            )
        return
    if precision_of(ds_config) == "fp16" and not ds_config["fp16"].get("loss_scale"):
        raise ValueError(
            "fp16.loss_scale=0: a dynamic loss scale takes back a whole step, and with hift.update 'backward' a part "
            'of it is made by then; set a fixed loss_scale, use bf16, or write "update": "step"'
        )
    if not managed:
        raise ValueError(
            "managed_gradient_accumulation=False: with hift.update 'backward' it must be known in a backward that it "
            'is the last of its window; leave it out, or write "update": "step"'
        )


def _of_wrong_gathers(stage: int, device_type: str) -> tuple[str, ...]:
    if stage < 3 or device_type != "cpu" or surface.gathers_on_cpu(version):
        return ()
    return (
        f"zero_optimization.stage=3: deepspeed {version} gathers wrong weights now and then on CPU ranks; use stage 2, "
        "or deepspeed 0.19.8",
    )


def precision_of(ds_config: Mapping[str, Any]) -> str:
    """`fp32`, `bf16` or `fp16`; `bfloat16` is DeepSpeed's old name of the section `bf16`."""
    for key, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        if (ds_config.get(key) or {}).get("enabled"):
            return precision
    return "fp32"


def zero_section(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The "zero_optimization" section, a copy; `true` is DeepSpeed's old way to write stage 1."""
    section = ds_config.get("zero_optimization")
    return dict(section) if isinstance(section, Mapping) else {"stage": int(bool(section))}


def set_precision(ds_config: dict[str, Any], precision: str) -> None:
    """Makes a config, in place, one of another precision, by DeepSpeed's defaults."""
    for key in ("bf16", "bfloat16", "fp16"):
        ds_config.pop(key, None)
    if precision != "fp32":
        ds_config[precision] = {"enabled": True}


def set_stage(ds_config: dict[str, Any], stage: int) -> None:
    """Makes a config, in place, one of another ZeRO stage."""
    ds_config["zero_optimization"] = {**zero_section(ds_config), "stage": stage}


def stage_of(ds_config: Mapping[str, Any]) -> int:
    """The ZeRO stage, also of a config without HiFT."""
    return int(zero_section(ds_config).get("stage") or 0)


def _as_deepspeed_reads(ds_config: Mapping[str, Any], micro_batch: int, micro_steps: int) -> DeepSpeedConfig:
    # With train_batch_size it would check again, against the ranks of its process group, which a plan does not have.
    config = {key: value for key, value in copy.deepcopy(dict(ds_config)).items() if key != TRAIN}
    try:
        return DeepSpeedConfig({**config, MICRO: micro_batch, ACCUMULATION: micro_steps})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"DeepSpeed refuses {key}={first['input']!r} ({first['msg']}); correct it") from error
    except AssertionError as error:
        raise ValueError(f"DeepSpeed refuses the config: {error}") from error


def _check_known(deepspeed: DeepSpeedConfig, ds_config: Mapping[str, Any]) -> None:
    """Refuses what the installed DeepSpeed would pass over in silence."""
    for section, names in _NEWER.items():
        given = (ds_config.get(section) or {}) if section else ds_config
        for name in names:
            if given.get(name) is not None and not hasattr(deepspeed, name):
                raise ValueError(
                    f"{f'{section}.{name}'.lstrip('.')}={given[name]!r}: the installed deepspeed {version} does not "
                    "know it; remove the key, or install deepspeed 0.19.8"
                )


def _offload_optimizer(ds_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`zero_optimization.offload_optimizer`, or what its old name means; empty if there is none."""
    zero = zero_section(ds_config)
    section = {"device": "cpu"} if zero.get("cpu_offload") else zero.get("offload_optimizer")
    return section if isinstance(section, Mapping) else {}


def _accumulation_dtype(asked: torch.dtype | None, model_dtype: torch.dtype, accumulates: bool) -> torch.dtype:
    """`data_types.grad_accum_dtype`, else fp32 where micro steps are summed."""
    if asked is not None:
        if not asked.is_floating_point:
            raise ValueError(f"data_types.grad_accum_dtype={asked}: sums of gradients need fp32, bf16 or fp16")
        return asked
    return torch.float32 if accumulates else model_dtype


def _check_sections(ds_config: Mapping[str, Any]) -> None:
    for key in ("optimizer", "scheduler", "zero_optimization", "data_types"):
        if key in ds_config and ds_config[key] is None:
            raise ValueError(f"{key}=null: DeepSpeed reads a section there; write one or leave the key out")


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
