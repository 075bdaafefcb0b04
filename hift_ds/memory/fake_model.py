"""A model of any size without weights: the real architecture from its config, as fake tensors."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_ds.zero.activations import use_non_reentrant_checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a forward of more than text takes.
NOT_TEXT = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_features"})


def load_config(source: str) -> Any:
    """The transformers config of a hub name, a folder or a config.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A file that is no model's config.
    """
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if path.is_file():
        return _read_config(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model={source!r}: the folder holds no config.json; name one that does")
        return _read_config(path / "config.json")
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1 or source.endswith(".json"):
        raise FileNotFoundError(f"model={source!r}: no such file or folder; name a config.json, or a hub name")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model={source!r}: no folder of that name here, and the hub did not deliver its config "
            f"({str(error).strip().splitlines()[0]}); without network name a folder or a config.json"
        ) from error


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    wrong = f"model={str(path)!r}: not the config of a model that transformers knows"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.pop("model_type")
        config = AutoConfig.for_model(kind)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f'{wrong}; it must be JSON with a "model_type"') from None
    try:
        return type(config).from_dict(content)
    except Exception as error:  # huggingface_hub's validation has errors of its own
        raise ValueError(f"{wrong} ({str(error).strip().splitlines()[-1].strip()}); mend the value") from None


class FakeModel:
    """A model under FakeTensorMode: shapes, dtypes and every operation are the real ones, the data is missing.

    Args:
        config: transformers' config; the class of model is the first of its `architectures`, else a causal language
            model.
        dtype: Of weights and buffers.
        attn_implementation: `None` = transformers' choice.
        checkpointing: Recompute activations in backward (non-reentrant, as HiFT does).
        model_class: `None` = that of the config.

    Attributes:
        mode: The FakeTensorMode that its tensors belong to; operations on them must run inside.
        module: The model, in training mode.

    Raises:
        ValueError: transformers cannot build it.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        attn_implementation: str | None = None,
        checkpointing: bool = False,
        model_class: type[PreTrainedModel] | None = None,
    ) -> None:
        from transformers import initialization

        self.config = config = copy.deepcopy(config)  # building writes into it, the attention for one
        config.use_cache = text_config(config).use_cache = False  # as in training
        self.mode = FakeTensorMode()
        try:
            with self.mode, _quiet(), initialization.no_init_weights():  # there is no data to initialise
                self.module = _cast(_build(config, dtype, attn_implementation, model_class), dtype).train()
        except (ValueError, ImportError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"model of type {config.model_type!r}: transformers cannot build it "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        if checkpointing:
            if not getattr(self.module, "supports_gradient_checkpointing", False):
                raise ValueError(
                    f"--gradient_checkpointing: {type(self.module).__name__} has none; leave the option out"
                )
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
            use_non_reentrant_checkpointing(self.module)

    @property
    def takes_images(self) -> bool:
        """Whether the model takes pixels or sound beside text, which a plan does not count."""
        return bool(NOT_TEXT & inspect.signature(self.module.forward).parameters.keys())

    def batch(self, micro_batch: int, seq: int, padded: bool = False) -> dict[str, torch.Tensor]:
        """Inputs and labels of one micro step: what the model's class takes. Call inside `mode`.

        Args:
            padded: With an attention mask that is not all ones (whose values fake data do not tell).

        Raises:
            ValueError: A model that is not of text, or with fewer positions than `seq`.
        """
        text = text_config(self.config)
        positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        if isinstance(positions, int) and seq > positions:
            raise ValueError(f"--seq {seq}: the model has {positions} positions; use a shorter sequence")
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
