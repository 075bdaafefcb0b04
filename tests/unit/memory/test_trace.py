"""The traced micro step and the fake model: against sums by hand, and against the same step with real tensors."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from hift_testing.selection import slow
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hift_ds.memory import fake_model, trace
from hift_ds.memory.fake_model import FakeModel
from hift_ds.memory.model_names import load_config
from hift_ds.memory.trace import END, FETCH, GRADIENT, RELEASE, Event, trace_micro_step
from hift_ds.rotation.blocks import plan_blocks
from hift_ds.zero.activations import use_non_reentrant_checkpointing

ROWS, SEQ = 2, 16
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GQA = {**TEXT, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "llama_tied": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=128, bos_token_id=1, eos_token_id=2
    ),
    "bert": lambda: hf.BertConfig(**TEXT, architectures=["BertForSequenceClassification"]),
    "bert_qa": lambda: hf.BertConfig(**TEXT, architectures=["BertForQuestionAnswering"]),
    "roberta": lambda: hf.RobertaConfig(
        **{**TEXT, "max_position_embeddings": 66, "pad_token_id": 1}, architectures=["RobertaForSequenceClassification"]
    ),
    "t5": lambda: hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=128,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, architectures=["T5ForConditionalGeneration"],
    ),
    "mixtral": lambda: hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


class RealModel:
    """What `trace_micro_step` needs of a FakeModel, with weights and data."""

    def __init__(self, config, dtype, attention=None, checkpointing=False):
        self.config, self.mode = config, contextlib.nullcontext()
        config.use_cache = False
        self.module = fake_model._cast(fake_model._build(config, dtype, attention, None), dtype).train()
        if checkpointing:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
            use_non_reentrant_checkpointing(self.module)

    def train_only(self, trained):
        train_only(self.module, trained)

    def batch(self, micro_batch, seq, padded=False):
        batch = FakeModel.batch(self, micro_batch, seq, padded)
        if padded:
            batch["attention_mask"][0, -3:] = 0  # a mask of ones alone transformers drops
        return batch


def train_only(module, trained):
    for fqn, param in module.named_parameters():
        param.requires_grad_(fqn in trained)


class Two(nn.Module):
    """Two products: (B, 8) rows, 8 x 8 weights, and the sum as loss."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.unused = nn.Linear(2, 2, bias=False)

    def forward(self, rows):
        return SimpleNamespace(loss=self.second(self.first(rows)).sum())


def two(mode=None, cls=Two):
    mode = mode or FakeTensorMode()
    with mode:
        module = cls()
    return SimpleNamespace(module=module, mode=mode, batch=lambda rows, seq, padded: {"rows": torch.ones(rows, 8)},
                           takes_images=False, train_only=lambda trained: train_only(module, trained))  # fmt: skip


# Bytes for 2 rows: 64 of the rows, of each product and of its gradient; 256 of a weight's gradient; 4 of the loss and
# of the 1 that backward begins with, which autograd keeps to the end.
ROW, WEIGHT, LOSS, ONE = 64, 256, 4, 4
BY_HAND = {
    # Nothing is kept for a weight that is not trained: the loss alone is left of forward beside the rows.
    "first.weight": [
        Event(END, (), 3 * ROW, ROW + LOSS, True),
        Event(GRADIENT, ("first.weight",), 2 * ROW + LOSS + ONE + WEIGHT, ROW + LOSS + ONE, False, WEIGHT),
        Event(END, (), ROW + LOSS + ONE, ROW + LOSS, False),
    ],
    # The first product is kept for the second weight's gradient, until that is there.
    "second.weight": [
        Event(END, (), 3 * ROW + LOSS, 2 * ROW + LOSS, True),
        Event(GRADIENT, ("second.weight",), 2 * ROW + LOSS + ONE + WEIGHT, ROW + LOSS + ONE, False, WEIGHT),
        Event(END, (), ROW + LOSS + ONE, ROW + LOSS, False),
    ],
}


@pytest.mark.parametrize("mode", [FakeTensorMode, contextlib.nullcontext], ids=["fake", "real"])
@pytest.mark.parametrize("trained", BY_HAND)
def test_peaks_of_two_products_are_those_by_hand(trained, mode):
    assert trace_micro_step(two(mode()), {trained}, 2, 1) == BY_HAND[trained]


def test_both_weights_trained_hold_the_next_gradient_of_the_rows_beside():
    found = trace_micro_step(two(), {"first.weight", "second.weight"}, 2, 1)
    assert found == [
        Event(END, (), 3 * ROW + LOSS, 2 * ROW + LOSS, True),
        # The gradient of the first product is made in the same breath as the second weight's.
        Event(GRADIENT, ("second.weight",), 3 * ROW + LOSS + ONE + WEIGHT, 2 * ROW + LOSS + ONE, False, WEIGHT),
        Event(GRADIENT, ("first.weight",), 2 * ROW + LOSS + ONE + WEIGHT, ROW + LOSS + ONE, False, WEIGHT),
        Event(END, (), ROW + LOSS + ONE, ROW + LOSS, False),
    ]


def test_a_gradient_that_was_not_there_at_the_peak_is_not_a_part_of_it():
    class Wide(Two):
        def forward(self, rows):  # 100 copies of the product's gradient, before the small weight's own
            return SimpleNamespace(loss=self.first(rows).repeat(100, 1).square().sum())

    gradient = next(e for e in trace_micro_step(two(cls=Wide), {"first.weight"}, 2, 1) if e.kind == GRADIENT)
    assert gradient.peak > 200 * ROW
    assert gradient.gradient == 0


def test_modules_note_before_and_after_they_use_their_parameters():
    found = trace_micro_step(two(), {"first.weight"}, 2, 1, modules=True)
    noted = [(e.kind, e.names, e.forward) for e in found if e.kind != END]
    first, second = ("first.weight",), ("second.weight",)
    assert noted == [
        (FETCH, first, True), (RELEASE, first, True), (FETCH, second, True), (RELEASE, second, True),
        (FETCH, second, False), (RELEASE, second, False), (FETCH, first, False), (RELEASE, first, False),
        (GRADIENT, first, False),
    ]  # fmt: skip
    assert [e.current for e in found if e.kind == RELEASE and e.forward] == [2 * ROW, 3 * ROW]


def test_events_cut_the_step_without_changing_its_peak():
    trained = {"first.weight", "second.weight"}
    plain, noted = (trace_micro_step(two(), trained, 2, 1, modules=modules) for modules in (False, True))
    for forward in (True, False):
        assert max(e.peak for e in plain if e.forward == forward) == max(e.peak for e in noted if e.forward == forward)


def test_recomputation_is_a_part_of_backward():
    model = FakeModel(CONFIGS["llama"](), torch.float32, checkpointing=True)
    norm = "model.layers.1.post_attention_layernorm.weight"
    found = trace_micro_step(model, {norm}, 1, 4, modules=True)
    assert [e.forward for e in found if e.kind == FETCH and e.names == (norm,)] == [True, False, False]


def test_no_hook_and_no_gradient_is_left():
    model = two()
    trace_micro_step(model, {"first.weight"}, 2, 1, modules=True)
    for module in model.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks and not module._backward_pre_hooks
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in model.module.parameters())
    assert trace_micro_step(model, {"second.weight"}, 2, 1) == BY_HAND["second.weight"], "as if it were the first trace"


def test_trained_parameters_alone_require_gradients():
    model = two()
    found = trace_micro_step(model, {"second.weight"}, 2, 1)
    assert {fqn for fqn, p in model.module.named_parameters() if p.requires_grad} == {"second.weight"}
    assert [e.names for e in found if e.kind == GRADIENT] == [("second.weight",)]


def test_a_loss_that_does_not_depend_on_the_block_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"loss does not depend on 'unused\.weight'"):
        trace_micro_step(two(), {"unused.weight"}, 2, 1)


@pytest.mark.parametrize("kind", ["value", "shape"])
def test_a_forward_that_depends_on_its_data_is_an_error(kind):
    class Asking(Two):
        def forward(self, rows):
            rows = rows[rows[:, 0] > 0] if kind == "shape" else rows if rows.sum() > 0 else -rows
            return super().forward(rows)

    with pytest.raises(ValueError, match="Asking: its forward depends on its data"):
        trace_micro_step(two(cls=Asking), {"first.weight"}, 2, 1)


def test_experts_of_a_loop_over_data_are_refused_with_what_to_do():
    config = hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    model = FakeModel(config, torch.bfloat16)
    with pytest.raises(ValueError, match="'grouped_mm'"):
        trace_micro_step(model, {"lm_head.weight"}, 1, 4)


# Every family; dtypes, attention, checkpointing and padding in turn.
STEPS = [
    ("llama", torch.bfloat16, "sdpa", False, False),
    slow("llama", torch.float32, "eager", False, False),
    ("llama", torch.float32, "sdpa", True, True),
    slow("llama", torch.bfloat16, "eager", True, False),
    ("llama_tied", torch.bfloat16, "sdpa", False, True),
    slow("llama_tied", torch.float32, "eager", True, False),
    ("gpt2", torch.bfloat16, "sdpa", False, False),
    slow("gpt2", torch.float32, "sdpa", True, False),
    ("bert", torch.bfloat16, "sdpa", False, True),
    slow("bert", torch.float32, "eager", True, False),
    ("bert_qa", torch.float32, "sdpa", False, False),
    slow("roberta", torch.float32, "sdpa", False, False),
    ("roberta", torch.bfloat16, "eager", True, True),
    slow("t5", torch.bfloat16, "sdpa", False, False),
    ("t5", torch.float32, "eager", True, False),
    slow("mixtral", torch.bfloat16, "sdpa", False, False),
    ("mixtral", torch.bfloat16, "eager", True, False),
]


@pytest.mark.parametrize(("family", "dtype", "attention", "checkpointing", "padded"), STEPS)
def test_a_fake_step_has_the_events_of_a_real_one(family, dtype, attention, checkpointing, padded, monkeypatch):
    fake = FakeModel(CONFIGS[family](), dtype, attention, checkpointing)
    real = RealModel(CONFIGS[family](), dtype, attention, checkpointing)
    everything = {fqn for fqn, _ in real.module.named_parameters()}
    second = set(plan_blocks(real.module).blocks[1].fqns)
    modules = family in ("llama", "t5")
    workload = (ROWS, SEQ, padded, modules)
    forecast = [trace_micro_step(fake, trained, *workload) for trained in (everything, second)]
    # The real step also shows what is only answered for fake data: whether rows are packed.
    monkeypatch.setattr(trace, "one_sequence_a_row", contextlib.nullcontext)
    measured = [trace_micro_step(real, trained, *workload) for trained in (everything, second)]
    assert forecast == measured
    gradients = [{name for e in events if e.kind == GRADIENT for name in e.names} for events in measured]
    assert gradients == [everything, second]


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_layers_that_are_checkpointed_where_something_is_trained_keep_their_activations_elsewhere(family):
    kinds = ((False, True), (True, False), (True, True))
    models = [FakeModel(CONFIGS[family](), torch.float32, "sdpa", *kind) for kind in kinds]
    everything = {fqn for fqn, _ in models[0].module.named_parameters()}
    first, *_, last = plan_blocks(models[0].module).blocks
    plain, where_trained, everywhere = (
        [trace_micro_step(model, set(trained), ROWS, SEQ)[0].peak for trained in (everything, first.fqns, last.fqns)]
        for model in models
    )
    assert everywhere[0] == where_trained[0] < plain[0], "all layers are trained"
    assert everywhere[1] < where_trained[1] == plain[1], "the layers above the embedding have nothing that is trained"
    assert everywhere[2] >= where_trained[2], "nothing is above the last block"


def test_a_layer_that_keeps_its_activations_takes_what_it_takes_without_checkpointing():
    """Two layers: with none, one and both kept, the memory of forward rises by as much each time, but for what a
    checkpoint keeps of its input."""
    options = [{"checkpointing": True, "keep_layers": kept} for kept in (0, 1, 2)]
    models = [FakeModel(CONFIGS["llama"](), torch.float32, "sdpa", **each) for each in (*options, {})]
    everything = {fqn for fqn, _ in models[0].module.named_parameters()}
    none, one, both, plain = (trace_micro_step(model, everything, ROWS, SEQ)[0].current for model in models)
    assert none < one < both == plain
    assert both - one == pytest.approx(one - none, rel=0.1)


def test_a_mask_of_padding_costs_memory():
    model = FakeModel(CONFIGS["llama"](), torch.bfloat16, "sdpa")
    plain, padded = (trace_micro_step(model, {"lm_head.weight"}, ROWS, SEQ, padding) for padding in (False, True))
    assert padded[0].peak > plain[0].peak


# The fake model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_tied", "t5", "mixtral", "bert"])
def test_fake_model_has_the_parameters_of_the_real_one_and_no_data(family, dtype):
    fake, real = FakeModel(CONFIGS[family](), dtype), RealModel(CONFIGS[family](), dtype)

    def described(model):
        tensors = [*model.module.named_parameters(), *model.module.named_buffers()]
        return [(fqn, tensor.shape, tensor.dtype) for fqn, tensor in tensors]

    assert described(fake) == described(real)
    assert {tensor.dtype for tensor in fake.module.parameters()} == {dtype}
    tensors = [*fake.module.parameters(), *fake.module.buffers()]
    assert all(isinstance(tensor.data, FakeTensor) for tensor in tensors)
    assert fake.module.training


def test_ties_stay_when_weights_are_cast():
    tied = fake_model._build(CONFIGS["llama_tied"](), torch.float32, None, None)
    cast = fake_model._cast(tied, torch.bfloat16)
    assert cast.lm_head.weight is cast.model.embed_tokens.weight
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert all(isinstance(p, nn.Parameter) for p in cast.parameters())


def test_weights_and_buffers_kept_in_another_precision_are_cast_and_whole_numbers_are_not():
    module = nn.ModuleDict({"wide": nn.BatchNorm1d(3), "narrow": nn.Linear(3, 3, dtype=torch.bfloat16)})
    weight = module["narrow"].weight
    fake_model._cast(module, torch.bfloat16)
    assert {tensor.dtype for tensor in module.parameters()} == {torch.bfloat16}
    assert module["wide"].running_mean.dtype == torch.bfloat16
    assert module["wide"].num_batches_tracked.dtype == torch.int64
    assert module["narrow"].weight is weight


def test_class_is_the_argument_then_the_architecture_then_a_causal_model():
    config = CONFIGS["llama"]()
    assert type(FakeModel(config, torch.float32).module) is hf.LlamaForCausalLM
    config.architectures = ["LlamaForSequenceClassification"]
    assert type(FakeModel(config, torch.float32).module) is hf.LlamaForSequenceClassification
    chosen = FakeModel(config, torch.float32, model_class=hf.LlamaForTokenClassification)
    assert type(chosen.module) is hf.LlamaForTokenClassification
    config.architectures = ["OfSomebodyElse"]
    assert type(FakeModel(config, torch.float32).module) is hf.LlamaForCausalLM


def test_attention_is_as_asked_for():
    for attention in ("eager", "sdpa"):
        model = FakeModel(CONFIGS["llama"](), torch.float32, attention)
        assert model.module.config._attn_implementation == attention


def test_checkpointing_that_a_class_lacks_is_refused():
    config = hf.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, architectures=["OpenAIGPTLMHeadModel"])
    with pytest.raises(ValueError, match=r"--gradient_checkpointing: OpenAIGPTLMHeadModel has none"):
        FakeModel(config, torch.float32, checkpointing=True)


def test_a_model_that_cannot_be_built_is_an_error_with_its_type():
    with pytest.raises(ValueError, match=r"of type 'vit': transformers cannot build it"):
        FakeModel(hf.ViTConfig(), torch.float32)  # no architecture, and no causal language model


def test_batch_is_what_the_class_takes():
    def keys(family, padded=False):
        model = FakeModel(CONFIGS[family](), torch.float32)
        with model.mode:
            return {name: tuple(tensor.shape) for name, tensor in model.batch(3, 8, padded).items()}

    assert keys("llama") == {"input_ids": (3, 8), "labels": (3, 8)}
    assert keys("llama", padded=True) == {"input_ids": (3, 8), "attention_mask": (3, 8), "labels": (3, 8)}
    assert keys("bert") == {"input_ids": (3, 8), "labels": (3,)}
    assert keys("bert_qa") == {"input_ids": (3, 8), "start_positions": (3,), "end_positions": (3,)}


@pytest.mark.parametrize(("family", "positions"), [("llama", 64), ("gpt2", 64)])
def test_rows_longer_than_the_positions_are_refused(family, positions):
    model = FakeModel(CONFIGS[family](), torch.float32)
    with model.mode:
        model.batch(1, positions)
        with pytest.raises(ValueError, match=rf"--seq_len {positions + 1}: the model has {positions} positions"):
            model.batch(1, positions + 1)


def test_a_model_that_is_not_of_text_is_refused():
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        vocab_size=128, architectures=["WhisperForConditionalGeneration"], pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = FakeModel(config, torch.float32)
    with model.mode, pytest.raises(ValueError, match=r"WhisperForConditionalGeneration: takes 'input_features'"):
        model.batch(1, 8)


def test_models_whose_weights_are_drawn_from_a_truncated_normal_are_built():
    config = hf.ModernBertConfig(
        **{**TEXT, "bos_token_id": 1, "eos_token_id": 2}, cls_token_id=1, sep_token_id=2,
        architectures=["ModernBertForMaskedLM"],
    )  # fmt: skip
    assert sum(p.numel() for p in FakeModel(config, torch.float32).module.parameters()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_in_a_precision_that_cannot_be_traced_are_refused_with_one_that_can(dtype):
    with pytest.raises(ValueError, match=r"MixtralForCausalLM: cannot be traced in this precision .*; plan it in bf16"):
        trace_micro_step(FakeModel(CONFIGS["mixtral"](), dtype), {"lm_head.weight"}, 1, 4)


# Where a config comes from.


def test_config_is_read_from_a_file_and_from_its_folder(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    for source in (tmp_path / "config.json", tmp_path):
        config = load_config(str(source))
        assert (type(config), config.hidden_size, config.num_key_value_heads) == (hf.LlamaConfig, 32, 2)


@pytest.mark.parametrize("content", ["{", "[1]", '{"hidden_size": 3}', '{"model_type": "nosuch"}', '{"model_type": 3}'])
def test_a_file_that_is_no_config_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r'some\.json.*must be JSON with a "model_type"'):
        load_config(str(path))


def test_missing_sources_are_errors_that_say_what_to_name(tmp_path):
    for source in (str(tmp_path / "none"), "./none", "none.json", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_config(source)
    with pytest.raises(FileNotFoundError, match=r"the folder holds no config\.json"):
        load_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the hub did not deliver it"):
        load_config("nobody/nothing")


def test_a_config_of_transformers_keeps_its_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["roberta"]().to_dict()))
    assert type(FakeModel(load_config(str(tmp_path)), torch.float32).module) is hf.RobertaForSequenceClassification
