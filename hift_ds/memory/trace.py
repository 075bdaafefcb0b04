"""Activations of one micro step, traced without a GPU and without weights, for one set of trained parameters.

Forward and backward of the real architecture run under FakeTensorMode; a dispatch mode adds up the storages alive. A
gradient is dropped as soon as it is whole: what becomes of it depends on the ZeRO stage, and is accounted elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from hift_ds.memory.fake_model import FakeModel, one_sequence_a_row
from hift_ds.memory.storages import StorageMeter

GRADIENT, FETCH, RELEASE, END = "gradient", "fetch", "release", "end"


@dataclass(frozen=True)
class Event:
    """A moment of the micro step.

    Attributes:
        kind: `gradient`: a parameter's gradient is whole and was dropped; `fetch` and `release`: before and after a
            module uses its parameters, in forward or backward; `end`: of forward, or of backward.
        names: The parameters' fqns.
        peak: Most bytes alive since the event before, a gradient in the making included.
        gradient: Bytes of that gradient if it was alive at that peak, else 0.
        current: Bytes alive now.
        forward: In forward (a recomputation is a part of backward).
        counted: Not so a gradient that only images would make: its size is that of the parameter.
    """

    kind: str
    names: tuple[str, ...]
    peak: int
    current: int
    forward: bool
    gradient: int = 0
    counted: bool = True


def trace_micro_step(
    model: FakeModel, trained: Collection[str], micro_batch: int, seq: int, padded: bool = False, modules: bool = False
) -> list[Event]:
    """Runs one forward and backward with the parameters `trained` (fqns) requiring gradients, and no others.

    Args:
        padded: Rows have padding, so that there is an attention mask.
        modules: Also note when modules use their parameters (stage 3 gathers them then).

    Raises:
        ValueError: The model's forward depends on its data, or its loss not on `trained`.
    """
    tracer = _Tracer(model)
    model.train_only(trained)
    with model.mode, tracer.hooked(modules), one_sequence_a_row():
        batch = model.batch(micro_batch, seq, padded)
        with tracer.meter:
            for tensor in batch.values():
                tracer.meter.add(tensor)
            try:
                loss = model.module(**batch).loss
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(
                    f"{type(model.module).__name__}: its forward depends on its data ({error}) and cannot be traced; "
                    "a mixture of experts needs experts_implementation 'grouped_mm' in its config"
                ) from error
            except RuntimeError as error:  # an operation without a fake kernel for this dtype or shape
                raise ValueError(
                    f"{type(model.module).__name__}: cannot be traced in this precision "
                    f"({str(error).strip().splitlines()[0]}); plan it in bf16"
                ) from error
            tracer.note(END)
            tracer.forward = False
            if not loss.requires_grad and model.takes_images:
                tracer.events += uncounted(model.module, trained, tracer.meter.current)
                tracer.note(END)
                return tracer.events
            if not loss.requires_grad:
                raise ValueError(f"the loss does not depend on {next(iter(trained), 'any parameter')!r} and its block")
            with warnings.catch_warnings():
                # A module whose inputs need no gradients is done when its outputs' are there: as meant.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss.backward()
            tracer.note(END)
    return tracer.events


def uncounted(module: torch.nn.Module, names: Collection[str], current: int) -> list[Event]:
    """Gradients that only images would make, from the last parameter to the first; activations not counted."""
    return [
        Event(GRADIENT, (fqn,), current + param.nbytes, current, False, param.nbytes, counted=False)
        for fqn, param in reversed(list(module.named_parameters())) if fqn in names
    ]  # fmt: skip


class _Tracer:
    def __init__(self, model: FakeModel) -> None:
        self.module = model.module
        self.meter = StorageMeter([*self.module.parameters(), *self.module.buffers()])
        self.events: list[Event] = []
        self.forward = True
        self._fqns = {param: fqn for fqn, param in self.module.named_parameters()}

    def note(self, kind: str, *names: str, gradient: int = 0) -> None:
        meter = self.meter
        self.events.append(Event(kind, names, meter.peak, meter.current, self.forward, gradient))
        meter.restart()

    @contextmanager
    def hooked(self, modules: bool) -> Iterator[None]:
        handles = [
            param.register_post_accumulate_grad_hook(self._on_gradient)
            for param in self.module.parameters() if param.requires_grad
        ]  # fmt: skip
        for module in self.module.modules() if modules else ():
            names = tuple(self._fqns[param] for param in module.parameters(recurse=False))
            if names:
                handles += self._module_hooks(module, names)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        assert param.grad is not None  # and no other name for it, or it would stay alive below
        alive = self.meter.made_at(param.grad) <= self.meter.peak_clock
        gradient = param.grad.untyped_storage().nbytes() if alive else 0
        param.grad = None
        self.note(GRADIENT, self._fqns[param], gradient=gradient)

    def _module_hooks(self, module: torch.nn.Module, names: tuple[str, ...]) -> list[Any]:
        def fetch(*_: Any) -> None:
            self.note(FETCH, *names)

        def release(*_: Any) -> None:
            self.note(RELEASE, *names)

        return [
            module.register_forward_pre_hook(fetch),
            module.register_forward_hook(release),
            module.register_full_backward_pre_hook(fetch),
            module.register_full_backward_hook(release),
        ]
