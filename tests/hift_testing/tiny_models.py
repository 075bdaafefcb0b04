"""Tiny Hugging Face models, one per family, from configs alone: a second to build, nothing to download."""

from collections.abc import Callable

import transformers as hf
from torch import nn

_SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
}
_TEXT = {**_SIZE, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_ENCODER = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Dropout is 0 throughout, so that parity between runs needs no matching random state.
_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, tie_word_embeddings=False)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, tie_word_embeddings=True)),
    "llama_cls": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_GQA, num_labels=3)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            vocab_size=128,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=128,
            max_position_embeddings=64,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_TEXT, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA, tie_word_embeddings=True)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GQA, head_dim=8)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GQA, tie_word_embeddings=False)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER, num_labels=3)),
    "bert_mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)),
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**{**_ENCODER, "max_position_embeddings": 66, "type_vocab_size": 1}, num_labels=3)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            vocab_size=128,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    ),
}

FAMILIES = tuple(_BUILDERS)


def tiny_model(family: str) -> nn.Module:
    """Build the tiny model of `family` (one of `FAMILIES`), fp32 on the default device, no dropout.

    Weights are drawn from torch's global generator: call `torch.manual_seed` first for the same model every time.

    Raises:
        ValueError: `family` is not one of `FAMILIES`.
    """
    if family not in _BUILDERS:
        raise ValueError(f"family={family!r}: must be one of {', '.join(FAMILIES)}.")
    return _BUILDERS[family]()
