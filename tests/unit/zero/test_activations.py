"""Layers that keep their activations where the others recompute them."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import hift_ds
from hift_ds.memory.request import Request
from hift_ds.zero.activations import keep_again, kept_activations

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0)),
}  # fmt: skip
IDS = torch.arange(40).view(2, 20) % 64


def step_of(model):
    """How often each layer's forward has run in a step, and the gradients."""
    calls = {}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    first = [next(module for module in layer.children() if not list(module.children())) for layer in layers]
    for index, module in enumerate(first):
        module.register_forward_hook(lambda *_, index=index: calls.update({index: calls.get(index, 0) + 1}))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [calls[index] for index in range(len(first))], [param.grad for param in model.parameters()]


@pytest.mark.parametrize("family", MODELS)
def test_the_last_layers_run_once_the_others_twice_and_gradients_are_the_same(family):
    found = []
    for kept in (0, 1, 3):
        torch.manual_seed(0)
        model = MODELS[family]().float()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        hift_ds.keep_activations(model, kept)
        assert kept_activations(model) == Request.of(model, {}, 20).keep_layers == kept
        calls, grads = step_of(model)
        assert calls == [2] * (4 - kept) + [1] * kept
        found.append(grads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_more_layers_than_there_are_and_a_model_that_recomputes_nothing_are_refused_and_left_alone():
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match=r"keep_activations\(model, 1\): .*no layer does, call"):
        hift_ds.keep_activations(model, 1)
    assert kept_activations(model) == 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layers in (5, -1):
        with pytest.raises(ValueError, match=rf"keep_activations\(model, {layers}\): .*4 layers recompute theirs"):
            hift_ds.keep_activations(model, layers)
    with pytest.raises(TypeError, match="whole number"):
        hift_ds.keep_activations(model, 1.0)
    assert kept_activations(model) == 0 and model.is_gradient_checkpointing


def test_a_later_call_takes_an_earlier_one_s_place_and_the_trainer_s_own_enabling_is_made_good():
    """The Trainer turns checkpointing on in every layer before it calls initialize, which asks `keep_again`."""
    model = MODELS["llama"]()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layers in (3, 1, 2):
        hift_ds.keep_activations(model, layers)
        assert kept_activations(model) == layers
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_activations(model) == 0
    keep_again(torch.nn.Sequential(model))  # in a wrapper
    assert kept_activations(model) == 2
    hift_ds.keep_activations(model, 0)
    keep_again(model)
    assert kept_activations(model) == 0
