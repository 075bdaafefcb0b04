"""`deepspeed.initialize` honours a "hift" section: for scripts and tools that do not call `hift_ds.initialize`."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

from deepspeed import comm as dist

from hift_ds import start
from hift_ds.engine import HiFTEngine

logger = logging.getLogger(__name__)
_enabled = False


class Enabled:
    """What `enable` returns: as a context manager it puts back, at the block's end, what was before."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            disable()


def enable() -> Enabled:
    """From now on `deepspeed.initialize` honours a "hift" section, whoever calls it; any other config is untouched.

    For Trainer, Accelerate, TRL and scripts of one's own: call it before training begins (not collective); nothing else
    changes. It may be called again. A model that is only run (a config without an optimizer, or nothing to train)
    stays DeepSpeed's own. `python -m hift_ds.run train.py` does it for a script that is not changed.

    Returns:
        A context manager, to be ignored or used: `with hift_ds.enable(): ...` ends with the block.

    Example:
        >>> hift_ds.enable()
        >>> Trainer(model, TrainingArguments(deepspeed="ds_configs/zero2_bf16.json")).train()
    """
    before = _enabled
    _set(True)
    return Enabled(before)


def disable() -> None:
    """`deepspeed.initialize` is DeepSpeed's own again. Engines that have been built go on."""
    _set(False)


def _set(enabled: bool) -> None:
    global _enabled
    _enabled = enabled
    old, new = start.DEEPSPEED_INITIALIZE, initialize
    if not enabled:
        old, new = new, old
    # Not in deepspeed alone: `from deepspeed import initialize` has made the name one of the script's, too.
    for name, module in list(sys.modules.items()):
        space = getattr(module, "__dict__", {})
        if space.get("initialize") is old and module is not start and name != __name__:
            space["initialize"] = new


@functools.wraps(start.DEEPSPEED_INITIALIZE)
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` while `enable` is in force."""
    given = inspect.signature(start.DEEPSPEED_INITIALIZE).bind_partial(*args, **kwargs).arguments
    if not (_enabled and _trains_with_hift(given)):
        return start.DEEPSPEED_INITIALIZE(*args, **kwargs)
    found = start.initialize(**given)
    if isinstance(found[0], HiFTEngine):
        _announce(found[0])
        if "transformers.trainer" in sys.modules:
            from hift_ds.integrations.trainer import adopt

            adopt(found[0])
    return found


def _trains_with_hift(given: Mapping[str, Any]) -> bool:
    try:
        config = start.given_config(**given)
    except ValueError:  # no JSON: DeepSpeed says so
        return False
    if not isinstance(config, Mapping):
        return False
    if not any(isinstance(key, str) and key.lower() == "hift" for key in config):
        return False
    if not (config.get("optimizer") or given.get("optimizer")):
        return False
    model = given.get("model")
    parameters = getattr(model, "parameters", None)
    return parameters is None or any(param.requires_grad for param in parameters())


def _announce(engine: HiFTEngine) -> None:
    if dist.get_rank() == 0:
        logger.warning(
            "HiFT trains this %s: all parameters below, in %d blocks, one block at a step (a tool that counts those "
            "with requires_grad counts the active block's)\n%s", type(engine.module).__name__, len(engine.hift.blocks),
            engine.hift.summary().rstrip(),
        )  # fmt: skip
