"""The values "auto" of a DeepSpeed config written for the Hugging Face Trainer, as far as a forecast needs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN
from hift_ds.config.resolve import set_precision, set_stage, stage_of, zero_section

AUTO = "auto"
CLIP = 1.0  # TrainingArguments.max_grad_norm
# What the Trainer makes of them, of the model's hidden size (transformers/integrations/deepspeed.py); stage 3's have no
# effect below it.
_BUCKETS: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def without_auto(
    ds_config: Mapping[str, Any], precision: str | None, stage: int | None, micro_batch: int | None,
    model_config: Callable[[], Any],
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """The config with the Trainer's values, and what was assumed, a sentence each.

    Rates and a schedule with "auto" go: memory does not depend on them. An "auto" that the Trainer does not fill in
    stays, for `resolve` to refuse.

    Args:
        precision, stage, micro_batch: What is planned instead of the config's; `None` = as it is.
        model_config: Gives transformers' config of the model; called only where a size depends on it.

    Raises:
        ValueError: `"auto"` in the place of a number that only the Trainer's arguments have.
    """
    config, notes = copy.deepcopy(dict(ds_config)), []
    if precision is not None:
        set_precision(config, precision)
    if stage is not None:
        set_stage(config, stage)
    notes += _batch(config, micro_batch) + _precision(config)
    if config.get("gradient_clipping") == AUTO:
        config["gradient_clipping"] = CLIP
        notes.append(f'gradient_clipping="auto": planned as {CLIP}, which is the Trainer\'s default')
    params = _params(config, "optimizer")
    for key in [key for key, value in params.items() if value == AUTO]:
        del params[key]
    if AUTO in _params(config, "scheduler").values():
        del config["scheduler"]
    _buckets(config, model_config)
    return config, notes


def _params(config: dict[str, Any], section: str) -> dict[str, Any]:
    """Of a section; empty where it is none, which `resolve` refuses."""
    found = config.get(section)
    params = found.get("params") if isinstance(found, dict) else None
    return params if isinstance(params, dict) else {}


def _batch(config: dict[str, Any], micro_batch: int | None) -> list[str]:
    automatic = [key for key in (TRAIN, MICRO, ACCUMULATION) if config.get(key) == AUTO]
    for key in automatic:
        del config[key]
    if MICRO in automatic and micro_batch is None:
        raise ValueError(f'{MICRO}="auto": only the Trainer\'s arguments have the number; add --micro_batch')
    if ACCUMULATION in automatic and TRAIN not in config:
        config[ACCUMULATION] = 1
        return [f'{ACCUMULATION}="auto": planned as 1, the Trainer\'s default; put the number where it is more']
    return []


def _precision(config: dict[str, Any]) -> list[str]:
    """bf16 where both sections leave it to the Trainer; one that is on by itself decides."""
    sections = {key: config[key] for key in ("bf16", "bfloat16", "fp16") if isinstance(config.get(key), Mapping)}
    automatic = [key for key, section in sections.items() if section.get("enabled") == AUTO]
    decided = any(section.get("enabled") is True for section in sections.values())
    for number, key in enumerate(automatic):
        config[key]["enabled"] = number == 0 and not decided
    if not automatic or decided:
        return []
    return [f'{automatic[0]}.enabled="auto": planned in {automatic[0]}; --precision says otherwise']


def _buckets(config: dict[str, Any], model_config: Callable[[], Any]) -> None:
    section = zero_section(config)
    automatic = [key for key in _BUCKETS if section.get(key) == AUTO]
    if not automatic:
        return
    for key in automatic:
        del section[key]
    needed = automatic if stage_of(config) == 3 else [key for key in automatic if not key.startswith("stage3")]
    if needed:
        hidden = _hidden_size(model_config(), needed[0])
        section |= {key: _BUCKETS[key](hidden) for key in needed}
    config["zero_optimization"] = section


def _hidden_size(config: Any, key: str) -> int:
    for part in (config, getattr(config, "text_config", None)):
        size = getattr(part, "hidden_size", None) or max(getattr(part, "hidden_sizes", None) or [0])
        if size:
            return size
    raise ValueError(f'zero_optimization.{key}="auto": the model\'s config has no hidden_size; put a number')
