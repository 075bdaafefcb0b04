"""What counts as freshly initialised: what the checkpoint of from_pretrained did not hold, and little else."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from hift_ds.rotation.blocks import plan_blocks
from hift_ds.rotation.fresh import find_fresh, new_parameters

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
HEAD = ("classifier.weight", "classifier.bias")


def fresh_of(model):
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    return find_fresh(model, trained, new_parameters(model))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A pretrained encoder without pooler and classifier."""
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(BertConfig(**SIZE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_the_checkpoint_did_not_hold_is_fresh(bert, dtype):
    found = fresh_of(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, dtype=dtype))
    assert found.fqns == (*POOLER, *HEAD)
    assert found.note.endswith("did not hold 'bert.pooler', 'classifier': trained at every step")


def test_a_model_that_the_checkpoint_held_whole_has_nothing_fresh(bert, llama):
    for model in (AutoModelForMaskedLM.from_pretrained(bert), AutoModelForCausalLM.from_pretrained(llama)):
        assert fresh_of(model) == type(fresh_of(model))()


def test_a_head_that_has_been_trained_and_saved_is_fresh_no_more(bert, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(tmp_path)
    assert fresh_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)).fqns == ()


def test_a_head_of_another_size_is_fresh_again(bert, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert fresh_of(model).fqns[-2:] == HEAD


def test_a_pooler_that_the_checkpoint_held_trains_with_the_new_head(bert, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    found = fresh_of(model)
    assert found.fqns == (*POOLER, *HEAD)
    assert found.note.endswith("'classifier': trained at every step, with 'bert.pooler' above the last layer")


def test_resized_embeddings_are_not_fresh(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(80)
    assert fresh_of(model).fqns == ()


def test_an_output_that_a_base_model_s_checkpoint_lacks_is_new_and_no_resized_embedding(tmp_path):
    LlamaModel(LlamaConfig(**SIZE, num_key_value_heads=1)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(80)
    assert new_parameters(model) == ("lm_head.weight",)


def test_where_all_that_trains_is_new_nothing_is_fresh(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith(("bert.pooler", "classifier")))
    assert fresh_of(model) == type(fresh_of(model))()


def test_a_layer_of_one_s_own_on_a_loaded_model_is_fresh(llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    model.score = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    own = ("score.0.weight", "score.0.bias", "score.1.weight", "score.1.bias")
    assert set(fresh_of(model).fqns) == {*own, "model.norm.weight"}


def test_what_is_frozen_is_not_trained_and_so_not_fresh(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model.bert.pooler.requires_grad_(False)
    assert fresh_of(model).fqns == HEAD


def test_over_a_tenth_nothing_is_fresh_and_a_note_says_so(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=200)
    found = fresh_of(model)
    assert found.fqns == () and "over 10% name them in hift.always_active yourself" in found.note


def test_adapters_alone_are_not_fresh(llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules="all-linear"))
    assert fresh_of(model).fqns == ()


def test_of_a_new_head_beside_adapters_a_note_says_what_to_write(bert):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    found = fresh_of(model)
    assert found.fqns == () and 'write "always_active": ["module:base_model.model.classifier"]' in found.note
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    active = plan_blocks(model, always_active=["module:base_model.model.classifier"]).always_active
    assert active and set(active) < set(trained) and all("classifier" in name for name in active)


def test_of_a_model_without_marks_a_note_names_heads_and_what_to_write(bert):
    loaded = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    for model in (copy.deepcopy(loaded), BertForSequenceClassification(BertConfig(**SIZE))):
        found = fresh_of(model)
        assert found.fqns == ()
        assert 'write "always_active": ["module:bert.pooler", "module:classifier"]' in found.note
    assert fresh_of(LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1))).note is None
    assert fresh_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))).note is None


def test_a_loader_of_one_s_own_may_name_what_is_fresh(llama):
    model = LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1))
    model._hift_fresh = {"model.layers.2.mlp.up_proj.weight"}
    assert fresh_of(model).fqns == ("model.layers.2.mlp.up_proj.weight",)


def test_a_name_of_such_a_loader_that_is_no_parameter_is_refused(llama):
    model = LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1))
    model._hift_fresh = ["lm_head.wieght"]
    with pytest.raises(ValueError, match=r"_hift_fresh='lm_head.wieght': .* did you mean 'lm_head.weight'\?"):
        new_parameters(model)


def test_a_module_or_the_last_unit_can_be_always_active():
    model = BertForSequenceClassification(BertConfig(**SIZE))
    assert plan_blocks(model, always_active=["module:bert.pooler"]).always_active == POOLER
    assert plan_blocks(model, always_active=["unit:last"]).always_active == (*POOLER, *HEAD)
    assert plan_blocks(model, always_active=["module:classifier", r"layer\.0\.output.*bias"]).always_active[-2:] == HEAD
    with pytest.raises(ValueError, match=r"hift.always_active='module:pooler': no module of that path .*'bert.pooler'"):
        plan_blocks(model, always_active=["module:pooler"])
    with pytest.raises(ValueError, match=r"hift.always_active='module:': no module of that path"):
        plan_blocks(model, always_active=["module:"])
    with pytest.raises(ValueError, match=r"hift.always_active='unit:frist': the only unit .* 'unit:last'"):
        plan_blocks(model, always_active=["unit:frist"])
