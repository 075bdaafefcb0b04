"""Layers compiled part by part: what is compiled, how often, and that nothing else changes."""

import copy
from collections import Counter

import pytest
import torch
import torch._dynamo
from hift_testing.messages import logged
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hift_ds
from hift_ds import last_product
from hift_ds.compiled_layers import is_compiled, layers_of, parts_of_layers, require_compiler
from hift_ds.memory.request import Request

IDS = torch.arange(40).view(2, 20) % 64


def llama(layers=3):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).train()


class Counting:
    """A backend that compiles nothing and counts how often it is asked."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def train_only(model, layer):
    for name, param in model.named_parameters():
        param.requires_grad_(f"layers.{layer}." in name)


def gradients(model, ids=IDS):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [None if param.grad is None else param.grad.clone() for param in model.parameters()]


def rotation(layers):
    """How often a rotation through all layers, and again, has compiled after each turn; what trains has gradients."""
    model, backend = llama(layers), Counting()
    hift_ds.compile_layers(model, backend=backend)
    found = []
    for turn in (*range(layers), *range(layers)):
        train_only(model, turn)
        for grad, (name, _) in zip(gradients(model), model.named_parameters(), strict=True):
            assert (grad is not None) == (f"layers.{turn}." in name), name
        found.append(backend.graphs)
    return found


def test_a_rotation_compiles_a_layer_s_forms_once_however_many_layers_there_are():
    few, many = rotation(3), rotation(6)
    assert few[-1] == many[-1] <= 12
    assert many[5] == many[-1], "the second cycle compiles nothing"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [llama, t5], ids=lambda make: make.__name__)
def test_gradients_are_those_of_the_uncompiled_model(make, checkpointing):
    found = []
    for compiled in (True, False):
        model = make()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            torch._dynamo.reset()
            hift_ds.compile_layers(model, backend="aot_eager")
        found.append(gradients(model))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_gradients_of_torch_s_own_compiler_are_those_of_the_uncompiled_model():
    torch._dynamo.reset()
    require_compiler(torch.device("cpu"))
    expected, model = gradients(llama()), llama()
    hift_ds.compile_layers(model)
    for one, other in zip(gradients(model), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_recomputation_stops_before_the_product_at_a_layer_s_end(monkeypatch):
    """As without a compiler; attention's last product is made again, for what comes after it."""
    torch._dynamo.reset()
    model, begun, done = llama(), [], []
    cut = last_product._cut

    def counting(graph, tail):
        rest, wanted = cut(graph, tail)

        def run(*values):
            begun.append("down_proj" in str(tail[0]))
            out = rest(*values)
            done.append(begun[-1])
            return out

        return run, wanted

    monkeypatch.setattr(last_product, "_cut", counting)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hift_ds.compile_layers(model, backend=Counting())
    gradients(model)
    assert Counter(begun) == {True: 2 * 3, False: 2 * 3}, "two forwards of three layers"
    assert Counter(done) == {True: 3, False: 2 * 3}


class Parts(nn.Module):
    """Ways in which a graph ends."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.last = kind, nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        hidden = x if self.kind in ("alone", "counts") else torch.relu(self.first(x))
        if self.kind == "beside":
            out = self.last(hidden)
            return out, hidden
        if self.kind == "before":
            return self.last(hidden.mul_(2)).view(-1)
        if self.kind == "norm":
            return torch.rms_norm(self.last(hidden), (8,))
        if self.kind == "alone":
            return self.last(x)
        if self.kind == "counts":
            self.calls.add_(1)
            return self.last(x)
        out = self.last(hidden)
        hidden.add_(1)  # in place, after the product has read it
        return out


@pytest.mark.parametrize(
    ("kind", "splits"),
    [("beside", True), ("before", True), ("alone", True), ("norm", False), ("after", False), ("counts", False)],
)
def test_a_graph_is_split_where_nothing_but_its_way_out_comes_after_the_last_product(kind, splits):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    part = Parts(kind)
    compiled = torch.compile(part, backend=last_product.without_last_product(keep), dynamic=True)
    for rows in (4, 6):
        x = torch.ones(rows, 8)
        with torch.no_grad():  # an operation in place would change what backward needs
            for found, expected in zip(compiled(x.clone()), part(x.clone()), strict=True):
                assert torch.equal(found, expected)
    products = [targets.count(nn.functional.linear) for targets in graphs]
    assert set(products) == (set() if kind == "alone" else {1 if splits or kind == "counts" else 2})
    assert part.calls == (2 * 2 if kind == "counts" else 0), "compiled and not"


def test_evaluation_and_generation_compile_nothing():
    model, backend = llama(), Counting()
    hift_ds.compile_layers(model, backend=backend)
    with torch.no_grad():
        model(input_ids=IDS, labels=IDS)
    model.eval()
    model(input_ids=IDS, labels=IDS)
    model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
    assert backend.graphs == 0
    gradients(model.train())
    assert backend.graphs > 0


def test_a_forward_that_keeps_keys_and_values_runs_uncompiled_and_says_so():
    from hift_ds import compiled_layers

    compiled_layers._warn_of_cache.cache_clear()
    model, backend = llama(), Counting()
    expected = gradients(model)
    model.config.use_cache = True
    hift_ds.compile_layers(model, backend=backend)
    with logged("hift_ds.compiled_layers") as messages:
        found = gradients(model)
    assert [message for message in messages if "LlamaAttention keeps keys and values" in message] == messages != []
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_names_stay_a_copy_is_not_compiled_and_a_later_call_takes_an_earlier_one_s_place():
    model, first, second = llama(), Counting(), Counting()
    names = list(model.state_dict())
    assert not is_compiled(model)
    hift_ds.compile_layers(model, backend=first)
    hift_ds.compile_layers(model, backend=second)
    gradients(model)
    assert (first.graphs, second.graphs > 0) == (0, True)
    assert list(model.state_dict()) == names
    assert is_compiled(model) and is_compiled(nn.Sequential(model)) and Request.of(model, {}, 20).compiled
    other = copy.deepcopy(model)
    assert not is_compiled(other) and is_compiled(model)


@pytest.mark.parametrize(("make", "parts"), [
    (llama, {"LlamaRMSNorm", "LlamaAttention", "LlamaMLP"}),
    (t5, {"T5LayerSelfAttention", "T5LayerCrossAttention", "T5LayerFF"}),
    (lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)),
     {"LayerNorm", "GPT2Attention", "GPT2MLP"}),
])  # fmt: skip
def test_parts_are_the_attention_feed_forward_and_norms_of_every_layer(make, parts):
    model = make()
    found = [part for part, _ in parts_of_layers(model)]
    assert {type(part).__name__ for part in found} == parts
    inside = {param for layer in layers_of(model) for param in layer.parameters()}
    assert {param for part in found for param in part.parameters()} == inside


def test_a_model_without_known_layers_is_refused_and_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"\(--compile\): Sequential has no module .* compile parts of it"):
        hift_ds.compile_layers(model)
    assert not is_compiled(model)
    with pytest.raises(TypeError, match=r"compile_layers\(str\): must be a torch\.nn\.Module"):
        hift_ds.compile_layers("model")


def test_a_model_that_zero_3_has_partitioned_is_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 0  # as DeepSpeed marks it
    with pytest.raises(ValueError, match=r"compile_layers .*: ZeRO-3 gathers weights in hooks"):
        hift_ds.compile_layers(model)
    assert not is_compiled(model)


def test_a_model_that_loops_over_tokens_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match=r"MambaForCausalLM keeps a recurrent state, .* leave it out"):
        hift_ds.compile_layers(model)
    assert not is_compiled(model)


def test_reentrant_checkpointing_is_refused_before_dropout_draws_two_masks():
    model = llama()
    hift_ds.compile_layers(model, backend="aot_eager")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"not with reentrant checkpointing.*\"use_reentrant\": False"):
        model(input_ids=IDS, labels=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(grad is not None for grad in gradients(model))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_inside_one_layer_s_part_runs_in_that_layer(when):
    """By dynamo's own guards the other layers' code, compiled without a hook, would serve for it."""
    found = []
    for compiled in (True, False):
        model, backend = llama(), Counting()
        if compiled:
            hift_ds.compile_layers(model, backend=backend)
        if when == "after":
            gradients(model)
        model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda module, inputs, out: 3 * out)
        found.append(gradients(model))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*found, strict=True))


def test_where_nothing_can_compile_the_reason_is_in_the_sentence(monkeypatch):
    def broken(function):
        raise RuntimeError("No working C++ compiler found\nand a stack")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile: .*\(No working C\+\+ compiler found\); install"):
        require_compiler(torch.device("cpu"))
