"""The keys of the "hift" section, each declared once: type, default, meaning."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hift_ds.config.kinds import (
    boolean,
    document,
    key,
    lists_of_regexes,
    one_of,
    read_section,
    regexes,
    regexes_or,
    section,
    whole,
)

FRESH = "fresh"  # the entry of `always_active` that `initialize` replaces by names


@document
@dataclass(frozen=True)
class StateConfig:
    """`hift.state`: how masters and moments are stored, and where. A null is the default."""

    master: str = key(
        "fp32", one_of("fp32", "split16", "none"),
        "master weights: `split16` = the low 16 bits beside the bf16 weight, bit-equal to fp32; `none` = the bf16 "
        "weight alone, rounded stochastically",
    )  # fmt: skip
    moments: str = key(
        "fp32", one_of("fp32", "bf16", "int8"),
        "`bf16`, rounded stochastically; `int8`, in groups of 256 with one scale (AdamW, Adam, Lion, SGD with "
        "momentum; Adagrad's sum would stop growing, Adafactor's moments are small)",
    )  # fmt: skip
    residency: str = key(
        "stream", one_of("stream", "device"),
        "`stream` = at home on the host, through a ring on the device; `device` = always on the device, nothing is "
        "copied",
    )  # fmt: skip
    ring_bytes: int | None = key(
        None, whole(1).or_null(),
        "most device bytes that streaming state ever takes; null: the largest block's state, but no more than a tenth "
        "of the card's memory (or 128 MiB, if that is more)",
    )  # fmt: skip
    pin_memory: bool = key(
        True, boolean(),
        "page-lock the host's copies on a CUDA machine; where that fails they stay pageable, with one warning: steps "
        "then wait for the copies",
    )  # fmt: skip

    @property
    def compact(self) -> bool:
        """Whether something is not fp32, which only the fused kernels can update."""
        return (self.master, self.moments) != ("fp32", "fp32")


def _state(given: Mapping[str, Any]) -> StateConfig:
    state = StateConfig(
        **read_section(StateConfig, "hift.state", {name: part for name, part in given.items() if part is not None})
    )
    if state.residency == "device" and state.ring_bytes is not None:
        raise ValueError(
            f"hift.state.ring_bytes={state.ring_bytes}: nothing streams with residency 'device'; leave it out, or use "
            "residency 'stream'"
        )
    return state


@document
@dataclass(frozen=True)
class HiFTConfig:
    """How blocks are formed and rotated. Where `None` is allowed, it means "choose for me"."""

    enabled: bool = key(..., boolean(), "`false` makes `hift_ds.initialize` exactly `deepspeed.initialize`")
    layers_per_block: int | None = key(
        1, whole(1).or_null(),
        "consecutive layer units trained together (the paper's m); the last block may be smaller; null: as many as "
        "fit the memory found, by the planner",
    )  # fmt: skip
    order: str = key(
        "bottom2up", one_of("bottom2up", "top2down", "random"),
        "order in which blocks are visited; the paper's B2U, T2D and RAN (drawn once from `seed`)",
    )  # fmt: skip
    seed: int = key(42, whole(0), "draws the `random` order, the same on every rank, and stochastic rounding")
    steps_per_block: int = key(1, whole(1), "optimizer steps before the rotation moves on (1 = HiFT)")
    lr_update: str = key(
        "cycle", one_of("cycle", "paper", "step"),
        "`cycle` = constant within a cycle, at the value of the schedule at its middle step (of the last cycle: at the "
        "middle of what is left of the run); `paper` = the scheduler advances once per cycle; `step` = no delay",
    )  # fmt: skip
    update: str = key(
        "step", one_of("step", "backward"),
        "when updates are made: `step`, the whole block in `engine.step()`; `backward`, each layer unit of the block "
        "as soon as backward has its gradient, so that gradients and state of one unit are on the device at a time, "
        "whatever `layers_per_block` is (without clipping by the global norm)",
    )  # fmt: skip
    clip: str = key(
        "global", one_of("global", "unit"),
        "what `gradient_clipping` bounds: the norm of all that trains in a step, or, with `update` `backward` alone, "
        "that of each layer unit by itself, which is another algorithm",
    )  # fmt: skip
    accumulate: str = key(
        "device", one_of("device", "host"),
        "where gradients of earlier micro steps wait for the last one's, with `update` `backward`: on the `device`, "
        "the whole block's, or on the `host`, from where each unit's comes back for its update (2 or 4 bytes a "
        "parameter, by `data_types.grad_accum_dtype`)",
    )  # fmt: skip
    inactive_state: str = key(
        "keep", one_of("keep", "reset"),
        "`keep` a block's optimizer state between its turns, or `reset` it at each turn (with `steps_per_block` > 1 "
        "that is block coordinate descent as in BAdam)",
    )  # fmt: skip
    blocks: tuple[tuple[str, ...], ...] | None = key(
        None, lists_of_regexes().or_null(),
        "your own blocks: lists of regexes on parameter names (`re.search`), each list a block; null: found from the "
        "model",
    )  # fmt: skip
    frozen: tuple[str, ...] | None = key(None, regexes().or_null(), "regexes of parameters that are never trained")
    always_active: tuple[str, ...] = key(
        (FRESH,), regexes_or(FRESH),
        "parameters that train at every step beside the active block, their state on the device: `fresh` = those that "
        "the checkpoint of `from_pretrained` did not hold (a new classifier) and what is above the last layer beside "
        "them, where they are under a tenth of what is trained; regexes, beside it or instead; `module:PATH` is a "
        "whole module, `unit:last` the last layer unit, `[]` nothing",
    )  # fmt: skip
    seq_len: int | None = key(
        None, whole(1).or_null(),
        "tokens of a row, where `layers_per_block` is to be chosen; null: as many as the model has positions, 2048 at "
        "most",
    )  # fmt: skip
    kernel: str | None = key(
        None, one_of("triton", "torch").or_null(),
        "what updates the active block: `triton`, fused kernels on CUDA (the host then does not wait for the device "
        "in a step, but for fp16's dynamic loss scale), or `torch`, eager; null: `triton` on a CUDA device where a "
        "probe kernel gives the right bits, and where `state` needs it",
    )  # fmt: skip
    state: StateConfig = key(  # noqa: RUF009
        StateConfig(), section(_state, '{"master": "split16"}').or_null(),
        "how and where masters and moments are kept: the keys below",
    )  # fmt: skip
    no_gradient: str = key(
        "error", one_of("error", "skip"),
        "what a block that no rank's batch reaches is at a step: an `error`, or a `skip`: no update, its turn passes, "
        "counted in `engine.hift.summary()` (LayerDrop, batches without images, experts that are rarely routed to); "
        "the host then waits for each step's gradients",
    )  # fmt: skip
    not_finite: str = key(
        "skip", one_of("skip", "stop"),
        "what a gradient with inf or nan does, but for fp16's dynamic loss scale: a `skip`: its update is left out "
        "with a warning and counted in `engine.skipped_steps`, or a `stop`: an error on every rank, nothing changed",
    )  # fmt: skip
    asynchronous_save: bool = key(
        False, boolean(),
        "whether `engine.save_checkpoint` writes in the background while training goes on, where it is not told",
    )  # fmt: skip

    @property
    def block_keys(self) -> dict[str, Any]:
        """The arguments of `hift_ds.rotation.blocks.plan_blocks`; what is fresh, only `initialize` knows."""
        return {
            "layers_per_block": self.layers_per_block or 1, "blocks": self.blocks, "frozen": self.frozen,
            "always_active": [entry for entry in self.always_active if entry != FRESH],
        }  # fmt: skip

    def with_fresh(self, fqns: Iterable[str]) -> HiFTConfig:
        """With the names that `fresh` stands for in a model, instead of the word."""
        named = (rf"^{re.escape(fqn)}$" for fqn in fqns)
        return replace(self, always_active=(*self.block_keys["always_active"], *named))

    @classmethod
    def from_ds_config(cls, ds_config: Mapping[str, Any]) -> HiFTConfig | None:
        """Reads and checks the "hift" section.

        Returns:
            `None` if there is no such section, or if it says `"enabled": false` (the rest is checked all the same).

        Raises:
            ValueError: An unknown key, a missing `enabled`, or a value outside of what is allowed.
            TypeError: A value of the wrong type.
        """
        given = ds_config.get("hift")
        check_spelling(ds_config)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise TypeError(f'hift={given!r}: must be an object such as {{"enabled": true}}')
        values = read_section(cls, "hift", given)
        if "enabled" not in given:
            raise ValueError('hift.enabled: missing; write "hift": {"enabled": true} to train with HiFT')
        if "state" in values and values["state"] is None:
            del values["state"]
        config = cls(**values)
        if config.blocks is not None and (config.layers_per_block or 1) != 1:
            raise ValueError(
                f"hift.layers_per_block={config.layers_per_block}: must be 1 or left out beside hift.blocks, whose "
                "lists already are the blocks"
            )
        return config if config.enabled else None


def check_spelling(ds_config: Mapping[str, Any]) -> None:
    """Raises ValueError for a section such as "HiFT" or "hitf", which DeepSpeed would overlook."""
    for name in ds_config:
        if isinstance(name, str) and name != "hift" and difflib.get_close_matches(name.lower(), ["hift"], cutoff=0.75):
            raise ValueError(f'{name}: unknown key; write it "hift", or leave it out to train without HiFT')
