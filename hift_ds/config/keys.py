"""The "hift" section of a DeepSpeed config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

ORDERS = ("bottom2up", "top2down", "random")
LR_UPDATES = ("cycle", "paper", "step")
INACTIVE_STATES = ("keep", "reset")
KERNELS = ("triton", "torch")
MASTERS = ("fp32", "split16", "none")
MOMENTS = ("fp32", "bf16", "int8")
RESIDENCIES = ("stream", "device")
NO_GRADIENT = ("error", "skip")


@dataclass(frozen=True)
class StateConfig:
    """`hift.state`: how masters and moments are stored, and where.

    Attributes:
        master: `fp32`; `split16` = the low 16 bits beside the bf16 weight, bit-equal to fp32; `none` = the bf16 weight
            alone, rounded stochastically.
        moments: `fp32`; `bf16`, rounded stochastically; `int8`, a scale for 256 (not Adagrad, Adafactor).
        residency: `stream` = at home on the host, through a ring on the device; `device` = always on the device.
        ring_bytes: Most device bytes for state while it streams; `None` = as much as the largest block has, where that
            is at most a tenth of the card's memory, and 128 MiB at least.
        pin_memory: Page-lock the host's copies on a CUDA machine.
    """

    master: str = "fp32"
    moments: str = "fp32"
    residency: str = "stream"
    ring_bytes: int | None = None
    pin_memory: bool = True

    @property
    def compact(self) -> bool:
        """Whether something is not fp32, which only the fused kernels can update."""
        return (self.master, self.moments) != ("fp32", "fp32")


@dataclass(frozen=True)
class HiFTConfig:
    """How blocks are formed and rotated. `None` always means "choose for me".

    Attributes:
        enabled: `False` makes `hift_ds.initialize` exactly `deepspeed.initialize`.
        layers_per_block: Consecutive layer units trained together (the paper's m); `None` = as many as fit the memory
            found (`hift_ds.memory.choose`).
        order: Order in which blocks are visited; the paper's B2U, T2D and RAN.
        seed: Draws the `random` order, once, the same on every rank.
        steps_per_block: Optimizer steps before the rotation moves on (1 = HiFT).
        lr_update: `cycle` = constant within a cycle, at the value of the schedule at its middle step (of the last
            cycle: at the middle of what is left of the run);
            `paper` = the scheduler advances once per cycle; `step` = no delay.
        inactive_state: `keep` a block's optimizer state between its turns, or `reset` it at each turn (with
            `steps_per_block` > 1 that is block coordinate descent as in BAdam).
        blocks: Lists of regexes on parameter names (`re.search`), each list a block; `None` = found from the model.
        frozen: Regexes of parameters that are never trained.
        always_active: Regexes of parameters that train at every step beside the active block.
        seq_len: Tokens of a row, where `layers_per_block` is to be chosen; `None` = as many as the model has positions,
            2048 at most.
        kernel: Which implementation updates the active block, `triton` or `torch`; `None` = choose
            (`hift_ds.config.kernels`).
        state: How and where masters and moments are kept.
        no_gradient: What a block without a gradient on any rank is at a step: an `error`, or a `skip`: no update, and
            its turn passes (LayerDrop, batches without images, experts that are rarely routed to).
    """

    enabled: bool
    layers_per_block: int | None = 1
    order: str = "bottom2up"
    seed: int = 42
    steps_per_block: int = 1
    lr_update: str = "cycle"
    inactive_state: str = "keep"
    blocks: tuple[tuple[str, ...], ...] | None = None
    frozen: tuple[str, ...] | None = None
    always_active: tuple[str, ...] | None = None
    seq_len: int | None = None
    kernel: str | None = None
    state: StateConfig = StateConfig()
    no_gradient: str = "error"

    @classmethod
    def from_ds_config(cls, ds_config: Mapping[str, Any]) -> HiFTConfig | None:
        """Reads and checks the "hift" section.

        Returns:
            `None` if there is no such section, or if it says `"enabled": false` (the rest is checked all the same).

        Raises:
            ValueError: An unknown key, a missing `enabled`, or a value outside of what is allowed.
            TypeError: A value of the wrong type.
        """
        section = ds_config.get("hift")
        check_spelling(ds_config)
        if section is None:
            return None
        if not isinstance(section, Mapping):
            raise TypeError(f'hift={section!r}: must be an object such as {{"enabled": true}}')
        _check_keys(cls, "hift", section)
        if "enabled" not in section:
            raise ValueError('hift.enabled: missing; write "hift": {"enabled": true} to train with HiFT')
        config = cls(**{key: check(key, section[key]) for key in section for check in [_CHECKS[key]]})
        if config.blocks is not None and (config.layers_per_block or 1) != 1:
            raise ValueError(
                f"hift.layers_per_block={config.layers_per_block}: must be 1 or left out beside hift.blocks, whose "
                "lists already are the blocks"
            )
        return config if config.enabled else None


def check_spelling(ds_config: Mapping[str, Any]) -> None:
    """Raises ValueError for a section such as "HiFT", which DeepSpeed would overlook."""
    for key in ds_config:
        if isinstance(key, str) and key.lower() == "hift" and key != "hift":
            raise ValueError(f'{key}: unknown key; write it "hift", or leave it out to train without HiFT')


def _check_keys(cls: type, name: str, section: Mapping[str, Any]) -> None:
    names = [field.name for field in fields(cls)]
    for key in section:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{name}.{key}={section[key]!r}: unknown key; {hint}allowed are {', '.join(names)}")


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"hift.{key}={value!r}: must be true or false")
    return value


def _positive(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"hift.{key}={value!r}: must be a whole number, 1 or more")
    if value < 1:
        raise ValueError(f"hift.{key}={value!r}: must be 1 or more")
    return value


def _positive_or_null(key: str, value: Any) -> int | None:
    return None if value is None else _positive(key, value)


def _seed(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"hift.{key}={value!r}: must be a whole number")
    if value < 0:
        raise ValueError(f"hift.{key}={value!r}: must be 0 or more")
    return value


def _one_of(*allowed: str):
    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"hift.{key}={value!r}: must be one of {', '.join(map(repr, allowed))}{hint}")
        return value

    return check


def _regexes(key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"hift.{key}={value!r}: must be null or a list of regexes on parameter names")
    return tuple(value) or None


def _blocks(key: str, value: Any) -> tuple[tuple[str, ...], ...] | None:
    if value is None:
        return None
    rule = "must be null or a list of blocks, each a list of one or more regexes on parameter names"
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise TypeError(f"hift.{key}={value!r}: {rule}")
    for index, block in enumerate(value):
        if not isinstance(block, (list, tuple)) or not all(isinstance(v, str) for v in block):
            raise TypeError(f"hift.{key}[{index}]={block!r}: {rule}")
    if not value or not all(value):
        raise ValueError(f"hift.{key}={value!r}: {rule}; an empty list holds no parameter")
    return tuple(tuple(block) for block in value)


def _kernel(key: str, value: Any) -> str | None:
    return None if value is None else _one_of(*KERNELS)(key, value)


def _state(key: str, value: Any) -> StateConfig:
    if value is None:
        return StateConfig()
    if not isinstance(value, Mapping):
        raise TypeError(f'hift.{key}={value!r}: must be null or an object such as {{"master": "split16"}}')
    _check_keys(StateConfig, f"hift.{key}", value)
    given = {name: part for name, part in value.items() if part is not None}
    state = StateConfig(**{name: _STATE_CHECKS[name](f"{key}.{name}", part) for name, part in given.items()})
    if state.residency == "device" and state.ring_bytes is not None:
        raise ValueError(
            f"hift.state.ring_bytes={state.ring_bytes}: nothing streams with residency 'device'; leave it out, or use "
            "residency 'stream'"
        )
    return state


_STATE_CHECKS = {
    "master": _one_of(*MASTERS),
    "moments": _one_of(*MOMENTS),
    "residency": _one_of(*RESIDENCIES),
    "ring_bytes": _positive,
    "pin_memory": _boolean,
}
_CHECKS = {
    "enabled": _boolean,
    "layers_per_block": _positive_or_null,
    "order": _one_of(*ORDERS),
    "seed": _seed,
    "steps_per_block": _positive,
    "lr_update": _one_of(*LR_UPDATES),
    "inactive_state": _one_of(*INACTIVE_STATES),
    "blocks": _blocks,
    "frozen": _regexes,
    "always_active": _regexes,
    "seq_len": _positive_or_null,
    "kernel": _kernel,
    "state": _state,
    "no_gradient": _one_of(*NO_GRADIENT),
}
