"""A model of any size without weights: the real architecture from its config, as fake tensors."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.chunked_loss import use_chunked_loss
from hift_ds.extras import needs_recipes
from hift_ds.zero.activations import keep_activations, use_non_reentrant_checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a forward of more than text takes.
NOT_TEXT = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_features"})


class FakeModel:
    """A model under FakeTensorMode: shapes, dtypes and every operation are the real ones, the data is missing.

    Args:
        config: transformers' config; the class of model is the first of its `architectures`, else a causal language
            model.
        dtype: Of weights and buffers.
        attn_implementation: `None` = transformers' choice.
        checkpointing: Recompute activations in backward (non-reentrant, as HiFT does).
        keep_layers: The last so many layers recompute nothing.
        loss_tile: Make the loss in tiles of so many bytes; `None`: the plain loss.
        checkpoint_frozen: Those of layers in which nothing is trained, too; LlamaFactory keeps them.
        model_class: `None` = that of the config.

    Attributes:
        mode: The FakeTensorMode that its tensors belong to; operations on them must run inside.
        module: The model, in training mode.

    Raises:
        ValueError: transformers cannot build it.
    """

    @needs_recipes()
    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        attn_implementation: str | None = None,
        checkpointing: bool = False,
        checkpoint_frozen: bool = True,
        keep_layers: int = 0,
        loss_tile: int | None = None,
        model_class: type[PreTrainedModel] | None = None,
    ) -> None:
        self.config = config = copy.deepcopy(config)  # building writes into it, the attention for one
        config.use_cache = text_config(config).use_cache = False  # as in training
        self.mode = FakeTensorMode()
        try:
            with self.mode, _quiet(), _no_init_weights():  # there is no data to initialise
                self.module = _cast(_build(config, dtype, attn_implementation, model_class), dtype).train()
        except (ValueError, ImportError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"model of type {config.model_type!r}: transformers cannot build it "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        if loss_tile is not None:
            try:
                use_chunked_loss(self.module, loss_tile)
            except TypeError as error:
                raise ValueError(str(error)) from None
        self._checkpointed: list[Any] = []  # where something is trained
        if checkpointing:
            if not getattr(self.module, "supports_gradient_checkpointing", False):
                raise ValueError(
                    f"--gradient_checkpointing: {type(self.module).__name__} has none; leave the option out"
                )
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
            use_non_reentrant_checkpointing(self.module)
            keep_activations(self.module, keep_layers)
            if not checkpoint_frozen:
                parts: list[Any] = list(self.module.modules())
                self._checkpointed = [part for part in parts if getattr(part, "gradient_checkpointing", False)]

    def train_only(self, trained: Collection[str]) -> None:
        """Lets the parameters `trained` (fqns) require gradients, and no others."""
        for fqn, param in self.module.named_parameters():
            param.requires_grad_(fqn in trained)
        for part in self._checkpointed:
            part.gradient_checkpointing = any(param.requires_grad for param in part.parameters())

    @property
    def takes_images(self) -> bool:
        """Whether the model takes pixels or sound beside text, which a forecast does not count."""
        return bool(NOT_TEXT & inspect.signature(self.module.forward).parameters.keys())

    def batch(self, micro_batch: int, seq: int, padded: bool = False) -> dict[str, torch.Tensor]:
        """Inputs and labels of one micro step: what the model's class takes. Call inside `mode`.

        Args:
            padded: With an attention mask that is not all ones (whose values fake data do not tell).

        Raises:
            ValueError: A model that is not of text, or with fewer positions than `seq`.
        """
        positions = positions_of(text_config(self.config))
        if positions is not None and seq > positions:
            raise ValueError(f"--seq_len {seq}: the model has {positions} positions; use a shorter sequence")
        if self.module.main_input_name != "input_ids":
            raise ValueError(
                f"{type(self.module).__name__}: takes {self.module.main_input_name!r}; only models of text are planned"
            )
        ids = torch.zeros(micro_batch, seq, dtype=torch.int64)
        labels = torch.zeros(micro_batch, seq, dtype=torch.int64)
        mask = {"attention_mask": torch.ones(micro_batch, seq, dtype=torch.int64)} if padded else {}
        kind = type(self.module).__name__
        if kind.endswith("QuestionAnswering"):
            return {"input_ids": ids, **mask, "start_positions": labels[:, 0], "end_positions": labels[:, 0]}
        if kind.endswith(("SequenceClassification", "MultipleChoice")):
            labels = torch.zeros(micro_batch, dtype=torch.int64)
        return {"input_ids": ids, **mask, "labels": labels}


@contextlib.contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Answers for transformers what it cannot ask fake data, whether rows are packed.

    Else it would keep a mask, and repeat keys and values for it, where a real run without padding does neither (5 %
    more in a small Llama).
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def positions_of(config: Any) -> int | None:
    """How many tokens a row may have, where a config of transformers says it."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return positions if isinstance(positions, int) else None


def text_config(config: Any) -> Any:
    """The part of a config that is of its language model: itself where there is nothing else."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _build(
    config: Any, dtype: torch.dtype, attn_implementation: str | None, model_class: type[PreTrainedModel] | None
) -> PreTrainedModel:
    import transformers

    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    name = next(iter(getattr(config, "architectures", None) or []), None)
    model_class = model_class or (getattr(transformers, name, None) if name else None)
    if model_class is None:
        auto: Any = transformers.AutoModelForCausalLM
        if type(config) not in auto._model_mapping:  # a model of text and images whose config names no class
            auto = transformers.AutoModelForImageTextToText
        module = auto.from_config(config, dtype=dtype, **options)
    else:
        module = model_class._from_config(config, dtype=dtype, **options)
    module.tie_weights()  # which comes with the initialisation
    return module


def _cast(module: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As `module.to(dtype)`, which fake parameters refuse: what a model class keeps in fp32 DeepSpeed casts, too."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # ties stay
    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    if tensor not in made:
                        cast = tensor.detach().to(dtype)
                        made[tensor] = torch.nn.Parameter(cast) if isinstance(tensor, torch.nn.Parameter) else cast
                    tensors[name] = made[tensor]
    return module


def _no_init_weights() -> contextlib.AbstractContextManager[None]:
    try:
        home = importlib.import_module("transformers.initialization")
    except ModuleNotFoundError:  # transformers 4
        home = importlib.import_module("transformers.modeling_utils")
    return home.no_init_weights()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of what an untrained model lacks."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
