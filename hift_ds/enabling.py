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
from hift_ds.config.keys import check_spelling
from hift_ds.config.optimizers import guarded_type
from hift_ds.distributed import skip_shared_memory_operator
from hift_ds.engine import HiFTEngine
from hift_ds.integrations.interrupted import watch

logger = logging.getLogger(__name__)
_enabled = False
_open: list[Enabled] = []  # blocks of `with`


class Enabled:
    """What `enable` returns: as a context manager it puts back, at the end of the last open block, what was before."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        _set(True)
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        for other in _open:
            other._before = other._before and self._before
        if not self._before and not _open:
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
    skip_shared_memory_operator()  # zero.Init, before a model is loaded, would build it
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
    watch(enabled)
    # Not in deepspeed alone: `from deepspeed import initialize` has made it one of the script's names, too.
    for name, module in list(sys.modules.items()):
        if module is not start and name != __name__:
            space = getattr(module, "__dict__", {})
            for key in [key for key, value in list(space.items()) if value is old]:
                space[key] = new


@functools.wraps(start.DEEPSPEED_INITIALIZE)
def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` while `enable` is in force."""
    given = inspect.signature(start.DEEPSPEED_INITIALIZE).bind_partial(*args, **kwargs).arguments
    config = _training_config(given) if _enabled else None
    if config is None:
        return start.DEEPSPEED_INITIALIZE(*args, **kwargs)
    check_spelling(config)
    if "hift" not in config and guarded_type(config) is None:
        start.end_engines_of(given.get("model"))
        return start.DEEPSPEED_INITIALIZE(*args, **kwargs)
    found = start.initialize(**given)
    if isinstance(found[0], HiFTEngine):
        _announce(found[0])
        if "transformers.trainer" in sys.modules:
            from hift_ds.integrations.trainer import adopt

            adopt(found[0])
    return found


def _training_config(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The DeepSpeed config, if the model is trained and not only run."""
    try:
        config = start.given_config(**given)
    except ValueError:  # no JSON: DeepSpeed says so
        return None
    if not isinstance(config, Mapping) or not (config.get("optimizer") or given.get("optimizer")):
        return None
    parameters = getattr(given.get("model"), "parameters", None)
    return config if parameters is None or any(param.requires_grad for param in parameters()) else None


def _announce(engine: HiFTEngine) -> None:
    if dist.get_rank() == 0:
        logger.warning(
            "HiFT trains this %s: all parameters below, in %d blocks, one block at a step (a tool that counts those "
            "with requires_grad counts the active block's)\n%s", type(engine.module).__name__, len(engine.hift.blocks),
            engine.hift.summary().rstrip(),
        )  # fmt: skip
