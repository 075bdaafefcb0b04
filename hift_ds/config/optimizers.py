"""From a config's "optimizer" section, or a client's optimizer, to an update rule and its hyper-parameters."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hift_ds.rules import SGD, Adafactor, Adagrad, Adam, Lion, Rule
from hift_ds.rules.base import check_bool, refuse_flags

_TORCH_NO_EFFECT = ("foreach", "fused")
_TORCH_REFUSED = ("maximize", "differentiable")


@dataclass(frozen=True)
class _ConfigType:
    """What a config's "optimizer" section may say beside the hyper-parameters of the rule."""

    name: str
    rule: Callable[[dict[str, Any]], Rule]
    switches: tuple[str, ...] = ()  # read here
    no_effect: tuple[str, ...] = _TORCH_NO_EFFECT  # how others run the same maths
    refused: tuple[str, ...] = _TORCH_REFUSED  # allowed only where false


_ADAM_SWITCHES = ("adam_w_mode", "torch_adam", "fp32_optimizer_states")
_ADAM_NO_EFFECT = (*_TORCH_NO_EFFECT, "capturable", "set_grad_none")
_ADAM_REFUSED = (*_TORCH_REFUSED, "amsgrad")
_CONFIG_TYPES = {
    config_type.name.lower(): config_type
    for config_type in (
        _ConfigType("AdamW", lambda switches: Adam(True), _ADAM_SWITCHES, _ADAM_NO_EFFECT, _ADAM_REFUSED),
        _ConfigType(
            "Adam", lambda switches: Adam(switches["adam_w_mode"]), _ADAM_SWITCHES, _ADAM_NO_EFFECT, _ADAM_REFUSED
        ),
        _ConfigType("SGD", lambda switches: SGD()),
        _ConfigType("Adagrad", lambda switches: Adagrad(), refused=(*_TORCH_REFUSED, "amsgrad")),
        _ConfigType("Adafactor", lambda switches: Adafactor(), no_effect=("foreach",), refused=("maximize",)),
        _ConfigType("Lion", lambda switches: Lion(), ("fp32_optimizer_states",), ("set_grad_none",), ()),
    )
}
_GUARD = "hift_"  # "HiFT_AdamW" is AdamW here and an error in plain DeepSpeed
_SWITCH_DEFAULTS = {"adam_w_mode": True, "torch_adam": False, "fp32_optimizer_states": True}


def rule_from_config(optimizer_type: str, params: dict[str, Any] | None) -> tuple[Rule, dict[str, Any]]:
    """Read the "optimizer" section of a DeepSpeed config as DeepSpeed does.

    Types are case-insensitive; "HiFT_" before one changes nothing, but that DeepSpeed alone refuses it. "Adam" is AdamW
    unless `adam_w_mode` is false; "AdamW" always is. A key that is absent or null has the default of the optimizer that
    DeepSpeed would build: torch's, but weight_decay 0 for AdamW (0.01 only with `torch_adam: true`), and lr 1e-3
    (Adagrad, Adafactor: 1e-2). `torch_adam`, `foreach`, `fused`, `capturable` and `set_grad_none` choose how others
    compute the same and change nothing else here.

    Args:
        optimizer_type: the section's "type".
        params: the section's "params", left as it is; None as {}.

    Returns:
        The rule, and every hyper-parameter of a param group (lists as tuples).

    Raises:
        TypeError: a value has the wrong type.
        ValueError: the type or a key is unknown, or a value is impossible or not supported.

    Source: deepspeed/runtime/engine.py, `_configure_basic_optimizer`.
    """
    config_type = _config_type(optimizer_type)
    if params is not None and not isinstance(params, dict):
        raise TypeError(f"optimizer.params={params!r}: must be an object of hyper-parameters; write {{}} for defaults.")
    given = params or {}
    if "max_grad_norm" in given:
        raise ValueError(
            f"optimizer.params.max_grad_norm={given['max_grad_norm']!r}: not an optimizer parameter, as in DeepSpeed; "
            'use the top-level key "gradient_clipping".'
        )
    switches = dict(_SWITCH_DEFAULTS)
    for key in config_type.switches:
        if given.get(key) is not None:
            check_bool(key, given[key])
            switches[key] = bool(given[key])
    if not switches["fp32_optimizer_states"]:
        raise ValueError(
            "fp32_optimizer_states=False: hift.state.moments says how HiFT keeps optimizer state; leave the key out."
        )
    rule = config_type.rule(switches)
    group = rule.defaults()
    if switches["torch_adam"] and rule.name == "adamw":
        group["weight_decay"] = 1e-2
    _check_keys(config_type, group, given)
    for key in group:
        if given.get(key) is not None:
            group[key] = tuple(given[key]) if isinstance(given[key], list) else given[key]
    for key in config_type.no_effect:
        if given.get(key) is not None:
            check_bool(key, given[key])
    refuse_flags(given, *config_type.refused)
    rule.check_group(group)
    return rule, group


def guarded_type(ds_config: Mapping[str, Any]) -> str | None:
    """The config's "optimizer.type" where it is one that only HiFT knows, such as "HiFT_AdamW"; else `None`."""
    section = ds_config.get("optimizer")
    name = section.get("type") if isinstance(section, Mapping) else None
    return name if isinstance(name, str) and name.lower().startswith(_GUARD) else None


def without_guard(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose "optimizer.type" DeepSpeed knows, too."""
    name = guarded_type(ds_config)
    if name is None:
        return dict(ds_config)
    return {**ds_config, "optimizer": {**ds_config["optimizer"], "type": name[len(_GUARD) :]}}


def rule_from_optimizer(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule that does what a client optimizer does, with every param group checked.

    Only exact classes are known, by module and name, so that DeepSpeed is not imported: a subclass may change the
    maths. The optimizer's state is not read.

    Raises:
        TypeError: not an optimizer object, or one of a class that has no rule.
        ValueError: a param group has hyper-parameters that the rule refuses.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: must be a torch.optim.Optimizer object, one of {_allowed_optimizers()}; "
            "pass the optimizer itself."
        )
    known = _KNOWN_OPTIMIZERS.get(_path(type(optimizer)))
    if known is None:
        raise TypeError(_why_not(type(optimizer)))
    rule = known(optimizer)
    for group in optimizer.param_groups:
        rule.check_group(group)
    return rule


def check_form(master: str, moments: str, rule: Rule, weight_dtype: torch.dtype) -> None:
    """Refuse a `hift.state` that does not go with the update rule or the model weights.

    Raises:
        ValueError: it does not.
    """
    if moments not in rule.moments:
        allowed = " or ".join(map(repr, rule.moments))
        raise ValueError(f"hift.state.moments={moments!r}: {rule.name} keeps them in {allowed}; use one of these.")
    if master != "fp32" and weight_dtype != torch.bfloat16:
        dtype = str(weight_dtype).removeprefix("torch.")
        raise ValueError(
            f"hift.state.master={master!r}: needs bf16 model weights, and these are {dtype}; use 'fp32', or "
            '"bf16": {"enabled": true}.'
        )


def _config_type(optimizer_type: str) -> _ConfigType:
    allowed = ", ".join(config_type.name for config_type in _CONFIG_TYPES.values())
    if not isinstance(optimizer_type, str):
        raise TypeError(f"optimizer.type={optimizer_type!r}: must be one of {allowed}, as a string.")
    config_type = _CONFIG_TYPES.get(optimizer_type.lower().removeprefix(_GUARD))
    if config_type is None:
        raise ValueError(
            f"optimizer.type={optimizer_type!r}: HiFT has no rule for it; use one of {allowed}"
            f"{_closest(optimizer_type.lower(), _CONFIG_TYPES)}."
        )
    return config_type


def _check_keys(config_type: _ConfigType, group: dict[str, Any], given: dict[str, Any]) -> None:
    allowed = (*group, *config_type.switches, *config_type.no_effect, *config_type.refused)
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(
                f"optimizer.params.{key}={value!r}: {config_type.name} has no such key; use one of "
                f"{', '.join(allowed)}{_closest(key, allowed)}."
            )


def _closest(word: Any, allowed: Any) -> str:
    matches = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _torch_adam(optimizer: torch.optim.Optimizer) -> Rule:
    # torch.optim.Adam is AdamW where its groups say so; check_group() refuses groups that differ.
    return Adam(bool(optimizer.param_groups[0].get("decoupled_weight_decay", False)))


def _deepspeed_adam(optimizer: Any) -> Rule:
    return Adam(bool(optimizer.adam_w_mode))


_KNOWN_OPTIMIZERS: dict[str, Callable[[torch.optim.Optimizer], Rule]] = {
    _path(torch.optim.AdamW): lambda optimizer: Adam(True),
    _path(torch.optim.Adam): _torch_adam,
    _path(torch.optim.SGD): lambda optimizer: SGD(),
    _path(torch.optim.Adagrad): lambda optimizer: Adagrad(),
    _path(torch.optim.Adafactor): lambda optimizer: Adafactor(),
    "deepspeed.ops.adam.fused_adam.FusedAdam": _deepspeed_adam,
    "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam": _deepspeed_adam,
    "deepspeed.ops.adagrad.cpu_adagrad.DeepSpeedCPUAdagrad": lambda optimizer: Adagrad(),
    "deepspeed.ops.lion.fused_lion.FusedLion": lambda optimizer: Lion(),
    "deepspeed.ops.lion.cpu_lion.DeepSpeedCPULion": lambda optimizer: Lion(),
}


def _allowed_optimizers() -> str:
    """The known classes as users import them."""
    names = []
    for path in _KNOWN_OPTIMIZERS:
        package = "torch.optim" if path.startswith("torch.") else ".".join(path.split(".")[:3])
        names.append(f"{package}.{path.rsplit('.', 1)[1]}")
    return ", ".join(names)


def _why_not(cls: type) -> str:
    """The sentence for an optimizer class that has no rule."""
    if cls.__module__.startswith("transformers.") and cls.__name__ == "Adafactor":
        return f"optimizer of class {_path(cls)}: other maths than torch's; use torch.optim.Adafactor."
    parent = next((base for base in cls.__mro__[1:] if _path(base) in _KNOWN_OPTIMIZERS), None)
    if parent is not None:
        return (
            f"optimizer of class {_path(cls)}: a subclass of {parent.__name__} may change its maths, which HiFT would "
            f"not see; pass {parent.__name__} itself, or another of {_allowed_optimizers()}."
        )
    return f"optimizer of class {_path(cls)}: HiFT has no rule for it; use one of {_allowed_optimizers()}."
