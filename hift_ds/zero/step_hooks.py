"""Step hooks of a client optimizer (EMA, projections), run as its own `step` would."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from hift_ds.shards import is_partitioned

logger = logging.getLogger(__name__)


class StepHooks:
    """Those of one optimizer, and those registered for all optimizers, whenever they were registered.

    At stage 3 a hook finds in each parameter this rank's part of it, flat, as DeepSpeed's own stage 3 has it: what
    works element by element is right, and nothing is gathered.

    Args:
        holder: The client optimizer, or what stands for it.
    """

    def __init__(self, holder: torch.optim.Optimizer) -> None:
        self._holder, self._warned = holder, False

    def before(self) -> None:
        """Just before an update."""
        of_all, own = torch_optimizer._global_optimizer_pre_hooks, self._holder._optimizer_step_pre_hooks
        hooks = [*of_all.values(), *own.values()]
        if hooks and not self._warned:
            self._warned = True
            logger.warning(
                "the optimizer has step pre-hooks: they run, but find no gradient in param.grad (it lies in shards), "
                "so one that changes gradients changes nothing"
            )
        self._run(hooks)

    def after(self) -> None:
        """Just after it."""
        own, of_all = self._holder._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
        self._run([*own.values(), *of_all.values()])

    def _run(self, hooks: list[Callable[..., Any]]) -> None:
        if hooks:
            with _as_parts(param for group in self._holder.param_groups for param in group["params"]):
                for hook in hooks:
                    hook(self._holder, (), {})


@contextmanager
def _as_parts(params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    placeholders = {param: param.data for param in params if is_partitioned(param) and not param.numel()}
    for param in placeholders:
        param.data = param.ds_tensor.data  # with offload_param on another device than the placeholder
    try:
        yield
    finally:
        for param, placeholder in placeholders.items():
            param.data = placeholder
