"""The loss of a causal language model without its matrix of logits: head and cross entropy, tile by tile.

Source of the idea: Liger Kernel's fused linear cross entropy (arXiv 2410.10989), which has gradients ready in forward.
Here forward keeps nothing and backward makes the logits of a tile again: nothing waits between the two, the head's
gradient reaches its parameter once, and the loss may be scaled by whoever calls backward. Plain torch, on any device.
DeepSpeed's TiledFusedLogitsLoss runs a backward for each tile inside forward, which gradient hooks see as many
gradients, and leaves the head's unscaled.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

TILE_BYTES = 64 << 20  # of a tile's logits in fp32; half as much again in the model's dtype
IGNORED = -100
_OWN_HOOKS = ("deepspeed.", "hift_ds.")  # modules whose hooks see a head as it is
_PLAIN = "use the plain loss (--loss plain)"
SCALES = (r"logits = logits / self\.config\.logits_scaling", r"logits = logits \* self\.logit_scale")
CAP = "final_logit_softcapping"
# What a forward of transformers may do with logits: pass them on, scale them (the hidden states then are), cap them.
_KNOWN = re.compile("|".join((
    r".*router_logits.*", r".*logits_to_keep.*",
    r"(lm_)?logits = self\.lm_head\(hidden_states(\[:, slice_indices, :\])?\)(\.float\(\)|\.contiguous\(\))?",
    *SCALES, rf"if self\.config\.{CAP} is not None:", rf"logits = logits [/*] self\.config\.{CAP}",
    r"logits = torch\.tanh\(logits\)", r"(loss = self\.loss_function\()?(logits=)?(lm_)?logits, (labels=)?labels, .*",
    r"(logits=)?(lm_)?logits,", r"output = \((lm_)?logits,\) \+ .*",
)))  # fmt: skip


def use_chunked_loss(model: nn.Module, tile_bytes: int = TILE_BYTES) -> None:
    """From now on `model(..., labels=...)` makes its loss tile by tile, in forward and backward.

    The loss and its gradients are the same but for rounding (fp32: 1e-6 relative): label shift, `ignore_index`,
    `num_items_in_batch`, scaled and soft-capped logits. `outputs.logits` is `None` then. Without `labels`, and with
    `logits_to_keep`, the model is as before. Call it before `hift_ds.initialize`; a second call changes `tile_bytes`.

    Args:
        model: A causal language model of transformers.
        tile_bytes: Most bytes of logits in fp32 at a time, one token's at least. With few tokens in a tile the head's
            weight is read so often that the card's memory bounds its products.

    Raises:
        TypeError: Not such a model.
        ValueError: One whose forward does something else with its logits; the message has the line. No number of bytes.
    """
    if type(tile_bytes) is not int or tile_bytes < 1:
        raise ValueError(f"use_chunked_loss(tile_bytes={tile_bytes!r}): must be a whole number of bytes from 1")
    kind = type(model)
    head, config = getattr(model, "lm_head", None), getattr(model, "config", None)
    if not isinstance(head, nn.Linear) or config is None:
        raise TypeError(
            f"{kind.__name__}: the loss in chunks is for causal language models of transformers with an lm_head; "
            f"{_PLAIN}"
        )
    _check(model, head)
    _require_as_known(model)
    rows = max(1, tile_bytes // (4 * head.out_features))
    head.chunks = (rows, getattr(config, CAP, None))  # type: ignore[assignment]
    head.forward = MethodType(_head_forward, head)  # type: ignore[method-assign]
    model.forward = MethodType(functools.wraps(kind.forward)(_model_forward), model)  # type: ignore[method-assign]


def tile_bytes_of(model: Any) -> int | None:
    """Bytes of a tile's logits in fp32, in whole tokens; `None`: `use_chunked_loss` has not been called on it."""
    head: Any = getattr(model, "lm_head", None)
    return 4 * head.out_features * head.chunks[0] if hasattr(head, "chunks") else None


def _check(model: Any, head: nn.Linear) -> None:
    why = None
    if getattr(model.config, "is_encoder_decoder", False):
        why = "is for decoders alone"
    else:
        source = inspect.getsource(inspect.unwrap(type(model).forward)).split('"""')[-1]
        lines = [line.partition("#")[0].strip() for line in source.splitlines()]
        unknown = [line for line in lines if "logits" in line and not _KNOWN.fullmatch(line)]
        if unknown:
            why = f"does not know what its forward does in `{unknown[0]}`"
        elif head.bias is not None and any(re.fullmatch(scale, line) for scale in SCALES for line in lines):
            why = "scales hidden states in the place of logits, and its head has a bias"
    if why is not None:
        raise ValueError(f"{type(model).__name__}: the loss in chunks {why}; {_PLAIN}")


def _require_as_known(model: Any) -> None:
    """What the user may do to a model at any time, and what would then be left out of its loss."""
    head, loss, why = model.lm_head, getattr(model.loss_function, "__name__", "another function"), None
    kinds = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    if type(head).forward is not nn.Linear.forward:
        why = f"knows nn.Linear, and the head is {type(head).__name__}"
    elif [hook for hook in hooks if not (getattr(hook, "__module__", None) or "").startswith(_OWN_HOOKS)]:
        why = "does not run hooks of the head as they expect it, and it has one"
    elif loss != "ForCausalLMLoss":
        why = f"replaces ForCausalLMLoss, and model.loss_function is {loss!r}"
    if why is not None:
        raise ValueError(f"{type(model).__name__}: the loss in chunks {why}; {_PLAIN}")


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    forward = type(self).forward
    given = inspect.signature(forward).bind_partial(self, *args, **kwargs).arguments
    if given.get("labels") is None or not _is_zero(given.get("logits_to_keep", 0)):
        return forward(self, *args, **kwargs)
    if tile_bytes_of(self) is None:
        raise ValueError(
            f"{type(self).__name__}: its lm_head has been replaced since hift_ds.use_chunked_loss (resized?): call it "
            "again"
        )
    _require_as_known(self)
    with _passed_on(self):
        outputs = forward(self, *args, **kwargs)
    if isinstance(outputs, tuple):
        return (outputs[0], None, *outputs[2:])
    return type(outputs)(**{**outputs, "logits": None})


def _is_zero(kept: Any) -> bool:
    return isinstance(kept, int) and kept == 0


@contextmanager
def _passed_on(model: Any) -> Iterator[None]:
    """Inside, hidden states take the logits' way through a forward, and its loss function is ours."""
    head, config = model.lm_head, model.config
    cap, had = getattr(config, CAP, None), "_loss_function" in vars(model)
    before = vars(model).get("_loss_function")
    # The head itself is not called twice: ZeRO-3 would gather it twice.
    model._modules["lm_head"] = nn.Identity()
    model._loss_function = functools.partial(_loss, head)
    if cap is not None:
        setattr(config, CAP, None)
    try:
        yield
    finally:
        model._modules["lm_head"] = head
        if had:
            model._loss_function = before
        else:
            del model._loss_function
        if cap is not None:
            setattr(config, CAP, cap)


def _loss(
    head: nn.Linear, logits: torch.Tensor, labels: torch.Tensor, vocab_size: Any = None,
    num_items_in_batch: torch.Tensor | int | None = None, ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """As transformers' ForCausalLMLoss, of hidden states (batch, tokens, width) in place of `logits`."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = shift_labels.reshape(-1).to(logits.device)
    total = head(logits.reshape(-1, logits.shape[-1]).to(head.weight.dtype), flat, ignore_index)
    if num_items_in_batch is None:
        return total / (flat != ignore_index).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def _head_forward(
    self: Any, hidden: torch.Tensor, labels: torch.Tensor | None = None, ignore_index: int = IGNORED
) -> torch.Tensor:
    if labels is None:
        return type(self).forward(self, hidden)
    rows, cap = self.chunks
    return ChunkedLoss.apply(hidden, self.weight, self.bias, labels, ignore_index, cap, rows)


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross entropies of tokens: `ChunkedLoss.apply(hidden, weight, bias, labels, ignore_index, cap, rows)`.

    hidden (tokens, width) and weight (vocabulary, width) of one dtype, bias (vocabulary) or `None`, labels (tokens);
    logits = hidden @ weight.T + bias, capped as cap * tanh(logits / cap) where `cap` is not `None`. Returns fp32, no
    dimensions. Never more than `rows` tokens' logits at a time. The weight's gradient is summed over tiles in its own
    dtype, as a matrix product's partial sums over micro batches are. Gradients of gradients raise RuntimeError.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
        ignore_index: int, cap: float | None, rows: int,
    ) -> torch.Tensor:  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            tile = slice(start, start + rows)
            chances = torch.log_softmax(_logits(hidden[tile], weight, bias, cap), dim=1, dtype=torch.float32)
            counts = labels[tile] != ignore_index
            right = chances.gather(1, labels[tile].where(counts, 0).unsqueeze(1)).squeeze(1)
            total -= right.where(counts, 0.0).sum()
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.ignore_index, ctx.cap, ctx.rows = ignore_index, cap, rows
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # torch's once_differentiable says nothing where the loss itself is what is differentiated.
        if torch.is_grad_enabled():
            raise RuntimeError(f"the loss in chunks has no gradients of its gradients (create_graph); {_PLAIN}")
        hidden, weight, bias, labels = ctx.saved_tensors
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for start in range(0, hidden.shape[0], ctx.rows):
            tile = slice(start, start + ctx.rows)
            logits = _logits(hidden[tile], weight, bias, ctx.cap)
            error = torch.softmax(logits, dim=1, dtype=torch.float32)
            counts = labels[tile] != ctx.ignore_index
            place = labels[tile].where(counts, 0).unsqueeze(1)
            error.scatter_add_(1, place, -torch.ones_like(place, dtype=error.dtype))
            if ctx.cap is not None:
                error.mul_(1 - (logits.float() / ctx.cap).square())
            scale = grads[0].where(counts, 0.0).unsqueeze(1)  # it is not finite where nothing counts
            error = torch.mul(error, scale, out=logits)
            if of_bias is not None:
                of_bias += error.sum(0)
            if of_hidden is not None:
                torch.mm(error, weight, out=of_hidden[tile])
            if of_weight is not None:
                of_weight.addmm_(error.t(), hidden[tile])
        return of_hidden, of_weight, of_bias, None, None, None, None


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cap: float | None
) -> torch.Tensor:
    """In their own dtype."""
    logits = nn.functional.linear(hidden, weight, bias)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
