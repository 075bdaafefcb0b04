"""transformers' Trainer: the schedule that it steps, what it logs, and the model when it is done."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from hift_ds.engine import LIVING, HiFTEngine
from hift_ds.extras import needs_recipes

with needs_recipes():
    from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)


class HiFTCallback(TrainerCallback):
    """For a Trainer whose model HiFT trains; `hift_ds.enable` adds it by itself.

    Added by hand without `enable` it raises where the config has a "hift" section that nobody honours; without such a
    section it warns and does nothing.

    - Lends the rotation the schedule that Trainer steps, and the run's length, which `lr_update` needs.
    - Adds to each line of the training log: `hift_block`, index of the block that the last step updated; `hift_cycle`,
      the cycle of that step, from 0; `hift_lr`, the rate in force, of the first param group (`learning_rate` is the
      schedule's); on a CUDA device `hift_peak_gib`, the highest allocation of this process so far.
    - At the end the parameters' `requires_grad` is as it was before, so that another Trainer takes all of them.
    """

    def __init__(self) -> None:
        self._engine: HiFTEngine | None = None
        self._shown: dict[str, float] = {}
        self._had_an_engine = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._engine = next((engine for engine in LIVING if engine.module is given.get("model")), None)
        if self._engine is not None:
            self._had_an_engine = True
            self._engine.follow_schedule(given.get("lr_scheduler"), state.max_steps)
            if args.save_total_limit == 1 and self._engine.hift_config.asynchronous_save:
                raise ValueError(
                    "save_total_limit=1: with hift.asynchronous_save Trainer would remove the last checkpoint before "
                    "the next one is there; let it keep 2 or more"
                )
        elif not self._had_an_engine and _asks_for_hift(args):  # at a second train() the ended engine itself says so
            raise RuntimeError(
                'the DeepSpeed config has a "hift" section, but DeepSpeed\'s own engine would train, in full: call '
                "hift_ds.enable() before trainer.train(), or take the section out"
            )
        elif not self._had_an_engine and state.is_world_process_zero:
            logger.warning('HiFTCallback: this run trains in full; HiFT needs deepspeed=, a config with "hift" in it')

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._engine is not None:
            view = self._engine.hift
            self._shown = {"hift_block": view.active_block, "hift_cycle": view.cycle}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._engine is None or not self._shown or "loss" not in (logs or {}):
            return
        found = {**self._shown, "hift_lr": self._engine.get_lr()[0]}
        if self._engine.device.type == "cuda":
            found["hift_peak_gib"] = round(torch.cuda.max_memory_allocated(self._engine.device) / 2**30, 2)
        logs.update(found)
        state.log_history[-1].update(found)  # Trainer has written the line down before it calls

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._engine is not None:
            self._engine.finish_saving()
            self._engine.rest()
            self._engine, self._shown = None, {}


def _asks_for_hift(args: Any) -> bool:
    config = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    return bool((config.get("hift") or {}).get("enabled"))


def adopt(engine: HiFTEngine) -> None:
    """Gives the Trainer that has called for `engine`, if one has, a HiFTCallback, before all that log what it adds.

    It is looked for among the callers: it may have been made before `hift_ds.enable`, and nothing of transformers is
    replaced.
    """
    trainer = _caller(engine.module)
    if trainer is None:
        return
    callbacks = trainer.callback_handler.callbacks
    mine = next((callback for callback in callbacks if isinstance(callback, HiFTCallback)), None) or HiFTCallback()
    callbacks[:] = [mine, *(callback for callback in callbacks if callback is not mine)]
    gathers = engine.zero_optimization_stage() < 3 or engine.zero_gather_16bit_weights_on_model_save()
    if not gathers and trainer.is_world_process_zero():
        logger.warning(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save=False: at ZeRO-3 Trainer then saves no model "
            "that from_pretrained can load; set it to true in the DeepSpeed config"
        )


def _caller(model: torch.nn.Module) -> Trainer | None:
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.model is model:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
