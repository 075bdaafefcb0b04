"""A `train()` of transformers' Trainer that ends in an exception: Trainer then calls no callback."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hift_ds.engine import LIVING

_MODULE = "transformers.trainer"


def watch(enabled: bool) -> None:
    """From now on, or no longer: a model whose training is interrupted has `requires_grad` as before `initialize`.

    Else another Trainer would take the block that was active for the whole model.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _AfterImport]
    if _MODULE in sys.modules:
        _wrap(sys.modules[_MODULE], enabled)
    elif enabled:
        sys.meta_path.insert(0, _AfterImport)  # type: ignore[arg-type]


class _AfterImport:
    """Wraps Trainer when it is imported; enabling does not import transformers."""

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not cls]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_wrap(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec


def _then_wrap(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def executed(module: ModuleType) -> None:
        execute(module)
        _wrap(module, True)

    return executed


def _wrap(module: ModuleType, enabled: bool) -> None:
    train = module.Trainer.train
    ours = getattr(train, "_hift_ds", None)  # a wrapper over it that somebody else has made has the attribute, too
    if enabled and ours is None:
        module.Trainer.train = _resting(train)
    elif not enabled and ours is not None and ours is train:
        module.Trainer.train = ours.__wrapped__


def _resting(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        except BaseException:
            for engine in list(LIVING):
                if engine.module is self.model:
                    engine.rest()
            raise

    wrapped._hift_ds = wrapped  # type: ignore[attr-defined]
    return wrapped
