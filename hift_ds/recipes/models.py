"""Models and tokenizers by name: a sample model, a folder or a hub name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hift_ds.memory.model_names import asking_the_hub, local_model
from hift_ds.recipes.samples import SAMPLE, SAMPLES, fetch_sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    name_or_path: str, *, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model on the CPU, in `dtype`.

    While the caller keeps a `transformers.integrations.HfDeepSpeedConfig` of a stage-3 config alive, each parameter is
    partitioned as it is created; collective then: call on every rank.

    Args:
        name_or_path: "smollm2-135m" (the sample), a folder, or a hub name; a folder wins over a hub name.
        attn_implementation: None means transformers' choice.

    Raises:
        FileNotFoundError: no such folder, a folder without config.json, or a hub name that cannot be reached.
        ValueError: a dtype that is not fp32, bf16 or fp16.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: a model trains in one of {', '.join(map(str, _DTYPES))}.")
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = _pretrained(name_or_path, AutoModelForCausalLM, dtype=dtype, **options)
    if is_deepspeed_zero3_enabled():
        _restore_computed_buffers(model)
    return model


def random_model(
    config: Any, *, dtype: torch.dtype, attn_implementation: str | None, device: str, seed: int
) -> PreTrainedModel:
    """A causal language model of a config with random weights, for measurements; made on `device`, which is quick.

    At stage 3 as `load_model`; collective then.

    Args:
        config: transformers' config.
        seed: The same seed gives the same weights, on every rank and with and without ZeRO-3.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    zero3 = is_deepspeed_zero3_enabled()
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    if zero3:
        _restore_computed_buffers(model)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=zero3):
                if param.ndim >= 2:  # norms begin at 1 and biases at 0, whoever makes them
                    generator = torch.Generator(param.device).manual_seed(1_000_003 * seed + index)
                    param.normal_(0.0, 0.02, generator=generator)
    return model


def _restore_computed_buffers(model: PreTrainedModel) -> None:
    """Gives buffers that no checkpoint holds (rotary frequencies) the values and dtype that the model class computes.

    transformers 5.17 builds them inside zero.Init in the dtype of the weights: bf16 frequencies are off by up to 0.4 %.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        fresh = type(model)(model.config)
    saved, present = set(fresh.state_dict()), dict(model.named_buffers())
    for name, buffer in fresh.named_buffers():
        if name not in saved:
            owner, _, last = name.rpartition(".")
            # zero.Init has put the old one on the accelerator, and DeepSpeed moves no zero.Init model again.
            device = present[name].device if name in present else buffer.device
            model.get_submodule(owner).register_buffer(last, buffer.to(device), persistent=False)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; without a pad token it pads with its end-of-text token.

    Raises:
        FileNotFoundError: as in `load_model`.
        ValueError: the tokenizer has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    tokenizer = _pretrained(name_or_path, AutoTokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model={name_or_path!r}: its tokenizer has neither a pad_token nor an eos_token; add one to "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_of(name_or_path: str) -> str:
    """The name that transformers knows a model by: of a sample, its folder."""
    return str(fetch_sample(name_or_path)) if name_or_path in SAMPLES else name_or_path


def _pretrained(name_or_path: str, auto: Any, **options: Any) -> Any:
    """What a class of transformers makes of a model's name."""
    source = source_of(name_or_path)
    instead = f"a folder that save_pretrained wrote or {SAMPLE!r}"
    source = str(local_model(source, instead) or source)
    with asking_the_hub(source, instead):
        return auto.from_pretrained(source, **options)
