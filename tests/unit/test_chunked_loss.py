"""The loss in chunks: transformers' loss and gradients to rounding, and never a whole matrix of logits."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

from hift_ds.chunked_loss import ChunkedLoss, tile_bytes_of, use_chunked_loss
from hift_ds.memory.request import Request
from hift_ds.memory.storages import StorageMeter

VOCAB, WIDTH = 97, 32
SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FIVE_ROWS = 4 * VOCAB * 5  # bytes: no divisor of the tokens below
MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES)),
    "tied": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "soft-capped": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05)),
    "divided": lambda: T.GraniteForCausalLM(T.GraniteConfig(**SIZES, logits_scaling=7.0)),
    "multiplied": lambda: T.CohereForCausalLM(T.CohereConfig(**SIZES, logit_scale=0.3)),
    "biased": lambda: T.PhiForCausalLM(T.PhiConfig(**SIZES)),
    "router loss": lambda: T.MixtralForCausalLM(
        T.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}


def pair_of(name, tile_bytes=FIVE_ROWS):
    """A model, and a copy with the loss in chunks."""
    torch.manual_seed(0)
    plain = MODELS[name]().train()
    for part in plain.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    chunked = copy.deepcopy(plain)
    use_chunked_loss(chunked, tile_bytes)
    return plain, chunked


def batch():
    ids = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[2] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": torch.tensor(17)}, {"num_items_in_batch": 13}])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_whole_matrix_to_a_millionth(name, counted):
    losses = []
    models = pair_of(name)
    for model in models:
        loss = model(**batch(), **counted).loss
        (0.37 * loss).backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    compared = 0
    for (fqn, param), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (param.grad is None) == (other.grad is None), fqn
        if param.grad is not None:
            assert (param.grad - other.grad).abs().max() <= 1e-6 * param.grad.abs().max().clamp_min(1e-6), fqn
            compared += bool(param.grad.any())
    assert compared > 10


def test_a_loss_that_counts_nothing_is_nan_and_its_gradients_0_as_ever():
    """A micro batch whose answers are cut off: the others of its window train."""
    rows = batch()
    rows["labels"] = torch.full_like(rows["labels"], -100)
    for model in pair_of("llama"):
        loss = model(**rows).loss
        loss.backward()
        assert torch.isnan(loss)
        assert not any(param.grad.any() for param in model.parameters())


def test_gradients_of_gradients_are_refused_and_not_left_out():
    """As of a gradient penalty; a plain backward with `create_graph` is none."""
    plain, chunked = pair_of("llama")
    for model in (plain, chunked):
        hidden = model.get_input_embeddings()(batch()["input_ids"])
        loss = model(inputs_embeds=hidden, labels=batch()["labels"]).loss
        if model is chunked:
            with pytest.raises(RuntimeError, match="no gradients of its gradients"):
                torch.autograd.grad(loss, hidden, create_graph=True)
        else:
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_without_labels_and_with_logits_to_keep_the_model_is_as_before():
    plain, chunked = (model.eval() for model in pair_of("soft-capped"))
    rows = batch()
    assert torch.equal(plain(input_ids=rows["input_ids"]).logits, chunked(input_ids=rows["input_ids"]).logits)
    kept = [model(**{**rows, "labels": None}, logits_to_keep=2).logits for model in (plain, chunked)]
    assert torch.equal(*kept) and kept[0].shape[1] == 2
    written = [model.generate(rows["input_ids"][:1], max_new_tokens=5, do_sample=False) for model in (plain, chunked)]
    assert torch.equal(*written)
    outputs = chunked(**rows)
    assert outputs.logits is None and chunked.config.final_logit_softcapping == 0.05
    assert chunked(**rows, return_dict=False)[1] is None


def test_a_copy_of_the_model_computes_with_its_own_head():
    _, chunked = pair_of("llama")
    twin = copy.deepcopy(chunked)
    with torch.no_grad():
        chunked.lm_head.weight.zero_()
    rows = batch()
    assert chunked(**rows).loss.item() == pytest.approx(torch.log(torch.tensor(float(VOCAB))).item(), rel=1e-6)
    assert abs(twin(**rows).loss.item() - chunked(**rows).loss.item()) > 1e-3


@pytest.mark.parametrize(("trained", "others"), [("weight", 0), ("hidden", 0), ("both", 0)])
def test_only_gradients_that_are_asked_for_are_made_and_no_more_than_a_few_tiles_are_alive(trained, others):
    tokens, rows = 400, 10
    hidden = torch.randn(tokens, WIDTH, requires_grad=trained != "weight")
    weight = nn.Parameter(torch.randn(VOCAB, WIDTH), requires_grad=trained != "hidden")
    labels = torch.randint(0, VOCAB, (tokens,))
    meter = StorageMeter([hidden, weight, labels])
    with meter:
        loss = ChunkedLoss.apply(hidden, weight, None, labels, -100, None, rows)
        loss.backward()
    gradients = sum(tensor.nbytes for tensor in (hidden, weight) if tensor.requires_grad)
    tile = 4 * rows * VOCAB
    assert meter.peak <= gradients + 4 * tile + 20 * tokens
    assert 4 * tokens * VOCAB > 8 * tile, "a whole matrix would not fit"
    assert (weight.grad is None, hidden.grad is None) == (trained == "hidden", trained == "weight")


def test_the_head_s_hook_sees_one_gradient_a_backward():
    _, chunked = pair_of("tied")
    seen = []
    chunked.lm_head.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    chunked(**batch()).loss.backward()
    assert len(seen) == 1


class Twice(T.LlamaForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        hidden_states = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden_states)
        logits = logits * 2
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return T.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^Twice: the loss in chunks does not know .* in `logits = logits \* 2`"):
        use_chunked_loss(Twice(T.LlamaConfig(**SIZES)))
    with pytest.raises(TypeError, match=r"^Linear: the loss in chunks is for causal language models"):
        use_chunked_loss(nn.Linear(2, 2))
    t5 = T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    with pytest.raises(ValueError, match="for decoders alone"):
        use_chunked_loss(t5)
    own = T.LlamaForCausalLM(T.LlamaConfig(**SIZES))
    own.loss_function = lambda **_: None
    with pytest.raises(ValueError, match="replaces ForCausalLMLoss"):
        use_chunked_loss(own)


class Scaled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def scaled_head(model):
    model.lm_head = Scaled(WIDTH, VOCAB, bias=False)


CHANGES = {
    "head": (scaled_head, "the head is Scaled"),
    "hook": (lambda model: model.lm_head.register_forward_hook(lambda *call: 2 * call[-1]), "hooks of"),
    "pre-hook": (lambda model: model.lm_head.register_forward_pre_hook(lambda *call: None), "hooks of"),
    "backward hook": (lambda model: model.lm_head.register_full_backward_hook(lambda *call: None), "hooks of"),
    "loss": (lambda model: setattr(model, "loss_function", lambda **_: None), "replaces ForCausalLMLoss"),
    "resized": (lambda model: model.resize_token_embeddings(VOCAB + 8), "lm_head has been replaced"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_head_or_loss_that_is_more_than_it_knows_is_refused_whenever_the_user_changes_it(change, when):
    work, says = CHANGES[change]
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES))
    if when == "after":
        use_chunked_loss(model)
        if change == "head":
            model.lm_head.__class__ = Scaled
        else:
            work(model)
    else:
        work(model)
    if change == "resized" and when == "before":
        use_chunked_loss(model)
        assert torch.isfinite(model(**batch()).loss)
        return
    with pytest.raises(ValueError, match=says):
        use_chunked_loss(model) if when == "before" else model(**batch())


def test_a_model_s_forecast_has_the_tiles_of_its_loss():
    plain, chunked = pair_of("llama", FIVE_ROWS + 7)
    assert tile_bytes_of(plain) is Request.of(plain, {}, 8).loss_tile is None
    assert tile_bytes_of(chunked) == Request.of(chunked, {}, 8).loss_tile == FIVE_ROWS, "whole tokens"
    use_chunked_loss(chunked, 1)
    assert tile_bytes_of(chunked) == 4 * VOCAB, "one at least"


@pytest.mark.parametrize("size", [0, -5, True, 1.5, "64MiB"])
def test_a_tile_of_no_number_of_bytes_is_refused(size):
    with pytest.raises(ValueError, match=r"use_chunked_loss\(tile_bytes=.*must be a whole number of bytes from 1"):
        use_chunked_loss(MODELS["llama"](), size)
