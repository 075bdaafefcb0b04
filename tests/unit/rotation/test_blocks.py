"""Layer units and blocks: hand-written plans per family, exactly once, plain modules, paper sizes, errors."""

import ast
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import transformers as hf
from hift_testing.tiny_models import FAMILIES, tiny_model
from torch import nn

import hift_ds.rotation.blocks
from hift_ds.rotation.blocks import LayerUnit, find_layer_units, plan_blocks

OLDER_NAMES = tuple(map(int, hf.__version__.split(".")[:2])) < (5, 17)
def _layers(path: str, num: int = 3) -> list[str]:
    return [f"{path}.{i}" for i in range(num)]


# Read off the model classes: the units' names, and the last fqn of the last unit, which shows where a norm went.
UNITS = {
    "llama": (["model.embed_tokens", *_layers("model.layers"), "norm+lm_head"], "lm_head.weight"),
    "llama_tied": (["model.embed_tokens", *_layers("model.layers")], "model.norm.weight"),
    "llama_cls": (["model.embed_tokens", *_layers("model.layers"), "norm+score"], "score.weight"),
    "gpt2": (["transformer.wte+wpe", *_layers("transformer.h")], "transformer.ln_f.bias"),
    "opt": (
        ["model.decoder.embed_tokens+embed_positions", *_layers("model.decoder.layers")],
        "model.decoder.final_layer_norm.bias",
    ),
    "gpt_neox": (["gpt_neox.embed_in", *_layers("gpt_neox.layers"), "final_layer_norm+lm_head"], "lm_head.weight"),
    "qwen2": (["model.embed_tokens", *_layers("model.layers")], "model.norm.weight"),
    "gemma": (["model.embed_tokens", *_layers("model.layers")], "model.norm.weight"),
    "mixtral": (["model.embed_tokens", *_layers("model.layers"), "norm+lm_head"], "lm_head.weight"),
    "phi3": (["model.embed_tokens", *_layers("model.layers"), "norm+lm_head"], "lm_head.weight"),
    "bert": (["bert.embeddings", *_layers("bert.encoder.layer"), "pooler+classifier"], "classifier.bias"),
    "bert_mlm": (
        ["bert.embeddings", *_layers("bert.encoder.layer"), "cls"],
        "cls.predictions.transform.LayerNorm.bias",
    ),
    "roberta": (
        ["roberta.embeddings", *_layers("roberta.encoder.layer"), "classifier"],
        "classifier.out_proj.bias",
    ),
    "t5": (["shared", *_layers("encoder.block"), *_layers("decoder.block")], "decoder.final_layer_norm.weight"),
    "vit": (["vit.embeddings", *_layers("vit.layers"), "layernorm+classifier"], "classifier.bias"),
}


class Holder(nn.Module):
    """Children as attributes, in the order given."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def _linears(num: int, width: int = 16) -> list[nn.Linear]:
    return [nn.Linear(width, width) for _ in range(num)]


def _names(module: nn.Module) -> list[str]:
    return [unit.name for unit in find_layer_units(module)]


def _placed(plan) -> list[str]:
    return sorted([fqn for block in plan.blocks for fqn in block.fqns] + [*plan.always_active, *plan.frozen])


def _meta(model_class: type, config) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> tuple[str, nn.Module]:
    return request.param, tiny_model(request.param)


def test_units_of_each_family_are_those_read_off_its_class(family):
    name, model = family
    if OLDER_NAMES and name in ("gpt_neox", "vit"):
        pytest.skip("this transformers names their parts otherwise")
    units = find_layer_units(model)
    expected, last_fqn = UNITS[name]
    assert [unit.name for unit in units] == expected
    assert units[-1].fqns[-1] == last_fqn
    for unit in units:
        if "+" not in unit.name:
            prefix = unit.name + "."
            own = [fqn for fqn, _ in model.named_parameters() if fqn.startswith(prefix)]
            assert list(unit.fqns[: len(own)]) == own


@pytest.mark.parametrize("layers_per_block", [1, 2, 3, 100])
def test_every_parameter_is_in_exactly_one_block_and_sizes_add_up(family, layers_per_block):
    name, model = family
    plan = plan_blocks(model, layers_per_block=layers_per_block)
    sizes = {fqn: p.numel() for fqn, p in model.named_parameters()}
    assert _placed(plan) == sorted(sizes)
    assert not plan.always_active and not plan.frozen
    assert len(plan.blocks) == -(-len(UNITS[name][0]) // layers_per_block)
    assert [block.index for block in plan.blocks] == list(range(len(plan.blocks)))
    for block in plan.blocks:
        assert block.numel == sum(sizes[fqn] for fqn in block.fqns) > 0


def test_plan_is_deterministic_and_leaves_requires_grad_alone(family):
    name, model = family
    before = [p.requires_grad for p in model.parameters()]
    arguments = {"layers_per_block": 2, "always_active": [r"(layers?|h|block)\.1\."], "frozen": ["emb|wte|shared"]}
    plan = plan_blocks(model, **arguments)
    assert plan == plan_blocks(tiny_model(name), **arguments)
    assert plan.always_active and plan.frozen
    assert [p.requires_grad for p in model.parameters()] == before


def test_tiny_model_weights_depend_only_on_the_seed():
    torch.manual_seed(3)
    first = tiny_model("mixtral").state_dict()
    torch.manual_seed(3)
    second = tiny_model("mixtral").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match="family='lama': must be one of llama"):
        tiny_model("lama")


def test_norm_too_small_for_a_step_joins_the_layer_before_it():
    units = {unit.name: unit for unit in find_layer_units(tiny_model("t5"))}
    assert units["encoder.block.2"].fqns[-1] == "encoder.final_layer_norm.weight"
    assert any("EncDecAttention" in fqn for fqn in units["decoder.block.0"].fqns)
    assert "model.norm.weight" in find_layer_units(tiny_model("llama_tied"))[-1].fqns


def test_final_norm_defined_before_the_layers_comes_after_them():
    units = find_layer_units(tiny_model("opt"))
    assert not any("final_layer_norm" in fqn for fqn in units[0].fqns)
    assert units[-1].fqns[-2:] == ("model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias")


def test_classifier_defined_before_the_layers_comes_after_them():
    module = Holder(classifier=nn.Linear(16, 4), embed=nn.Linear(16, 16), layers=nn.ModuleList(_linears(2)))
    assert _names(module) == ["embed", "layers.0", "layers.1", "classifier"]


def test_tied_weight_belongs_to_the_first_unit_that_names_it():
    module = Holder(embed=nn.Embedding(8, 16), layers=nn.ModuleList(_linears(2)), head=nn.Linear(16, 8, bias=False))
    module.head.weight = module.embed.weight
    units = find_layer_units(module)
    assert [unit.name for unit in units] == ["embed", "layers.0", "layers.1"]
    assert units[0] == LayerUnit("embed", ("embed.weight",), 128)


PAPER_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


# Source: HiFT, arXiv 2401.15207: the largest group and the whole model, in millions of parameters, two decimals.
# RoBERTa: the published totals need the two-label classification head, which has no pooler; GPT-2, GPT-Neo: tied heads.
@pytest.mark.parametrize(
    ("model_class", "config", "num_units", "largest", "total"),
    [
        (hf.RobertaForSequenceClassification, hf.RobertaConfig(**PAPER_ROBERTA), 14, 39.00, 124.65),
        (hf.RobertaForSequenceClassification, hf.RobertaConfig(**PAPER_ROBERTA, **LARGE), 26, 52.00, 355.36),
        (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20), 37, 65.64, 774.03),
        (
            hf.GPTNeoForCausalLM,
            hf.GPTNeoConfig(hidden_size=2560, num_layers=32, num_heads=20, attention_types=[[["global", "local"], 16]]),
            33,
            133.90,
            2651.31,
        ),
        (hf.LlamaForCausalLM, hf.LlamaConfig(), 34, 202.38, 6738.42),
        (
            hf.LlamaForCausalLM,
            hf.LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824),
            42,
            317.20,
            13015.86,
        ),
    ],
    ids=["roberta-base", "roberta-large", "gpt2-large", "gpt-neo-2.7b", "llama-7b", "llama-13b"],
)
def test_units_have_the_sizes_the_paper_prints(model_class, config, num_units, largest, total):
    if OLDER_NAMES and model_class in (hf.GPT2LMHeadModel, hf.GPTNeoForCausalLM):
        pytest.skip("this transformers ties no weights without data")
    units = find_layer_units(_meta(model_class, config))
    assert len(units) == num_units
    assert max(unit.numel for unit in units) / 1e6 == pytest.approx(largest, abs=0.005)
    assert sum(unit.numel for unit in units) / 1e6 == pytest.approx(total, abs=0.005)


def test_stages_of_a_hierarchical_model_are_opened_and_their_blocks_are_units():
    config = hf.ConvNextConfig(depths=[3, 3, 3, 3], hidden_sizes=[16, 32, 64, 128], num_labels=3)
    names = _names(_meta(hf.ConvNextForImageClassification, config))
    blocks = [f"convnext.encoder.stages.{stage}.layers.{i}" for stage in (2, 3) for i in range(3)]
    assert [name for name in names if re.search(r"stages\.[23]\.layers", name)] == blocks


def test_bottlenecks_of_a_resnet_stage_stay_whole():
    config = hf.ResNetConfig(depths=[2, 2], hidden_sizes=[64, 128], embedding_size=16)
    names = _names(_meta(hf.ResNetForImageClassification, config))
    blocks = [f"resnet.encoder.stages.{stage}.layers.{i}" for stage in (0, 1) for i in range(2)]
    assert [name for name in names if ".stages." in name] == blocks


def test_stage_module_with_a_downsample_is_opened_but_an_moe_layer_is_not():
    def stage() -> nn.Module:
        return Holder(blocks=nn.ModuleList([Holder(a=nn.Linear(64, 64)) for _ in range(2)]), down=nn.Linear(64, 2))

    def moe_layer() -> nn.Module:
        experts = nn.ModuleList([Holder(up=nn.Linear(64, 64)) for _ in range(4)])
        return Holder(attention=nn.Linear(64, 2), norm=nn.LayerNorm(64), experts=experts)

    assert _names(nn.ModuleList([stage(), stage()])) == [
        "0.blocks.0", "0.blocks.1", "0.down", "1.blocks.0", "1.blocks.1", "1.down"
    ]  # fmt: skip
    assert _names(Holder(layers=nn.ModuleList([moe_layer(), moe_layer()]))) == ["layers.0", "layers.1"]


def test_layer_with_a_small_list_of_its_own_stays_whole():
    def layer() -> nn.Module:
        return Holder(attention=nn.Linear(64, 64), gates=nn.ModuleList([Holder(a=nn.Linear(8, 8)) for _ in range(2)]))

    assert _names(nn.ModuleList([layer(), layer()])) == ["0", "1"]


def test_layer_made_of_a_list_of_different_parts_is_one_unit():
    layers = [nn.ModuleList([Holder(attn=nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))]) for _ in range(2)]
    assert _names(Holder(layers=nn.ModuleList(layers))) == ["layers.0", "layers.1"]
    mlps = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2)]
    assert _names(Holder(layers=nn.ModuleList(mlps))) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("container", [nn.ModuleList, lambda layers: nn.Sequential(*layers)])
def test_list_of_lists_of_layers_gives_the_inner_layers(container):
    module = container([container([Holder(a=nn.Linear(8, 8)) for _ in range(2)]) for _ in range(2)])
    assert _names(module) == ["0.0", "0.1", "1.0", "1.1"]


def test_plain_modules():
    assert _names(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == ["0", "2"]
    two_lists = Holder(a=nn.ModuleList(_linears(2)), mid=nn.Linear(16, 16), b=nn.ModuleList(_linears(2)))
    assert _names(two_lists) == ["a.0", "a.1", "mid", "b.0", "b.1"]
    assert find_layer_units(nn.Linear(3, 4)) == [LayerUnit("weight+bias", ("weight", "bias"), 16)]
    assert _names(Holder(fc1=nn.Linear(8, 8), act=nn.ReLU(), fc2=nn.Linear(8, 2))) == ["fc1", "fc2"]
    assert _names(Holder(net=Holder(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 2)))) == ["net.fc1", "net.fc2"]
    assert _names(Holder(net=nn.Linear(8, 8))) == ["net"]
    numbered = nn.ModuleDict({"0": nn.Linear(8, 8), "1": nn.Linear(8, 8)})
    assert _names(Holder(embed=nn.Linear(8, 8), layers=numbered)) == ["embed", "layers.0", "layers.1"]


def test_direct_parameters_without_a_stack_are_one_unit():
    module = Holder(fc=nn.Linear(8, 8), out=nn.Linear(8, 8))
    module.register_parameter("scale", nn.Parameter(torch.ones(3)))
    module.register_parameter("shift", nn.Parameter(torch.ones(3)))
    assert _names(module) == ["scale+shift", "fc", "out"]


def test_sequential_beside_lists_is_a_stack_only_if_it_is_large():
    def model(width: int) -> nn.Module:
        head = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16))
        return Holder(layers=nn.ModuleList(_linears(3)), head=head)

    assert _names(model(4)) == ["layers.0", "layers.1", "layers.2", "head"]
    assert _names(model(64)) == ["layers.0", "layers.1", "layers.2", "head.0", "head.2"]


def test_sequential_that_only_wraps_a_model_and_its_head_is_looked_through():
    encoder = Holder(emb=nn.Linear(16, 16), norm=nn.Linear(16, 16), layers=nn.ModuleList(_linears(20)))
    assert _names(nn.Sequential(OrderedDict(encoder=encoder, head=nn.Linear(16, 8)))) == [
        "encoder.emb+norm", *_layers("encoder.layers", 20), "head"
    ]  # fmt: skip


def test_small_unit_at_the_bottom_joins_the_one_after_it():
    module = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 512), nn.LayerNorm(64), nn.Linear(512, 64))
    units = find_layer_units(module)
    assert [unit.name for unit in units] == ["1", "3"]
    assert units[0].fqns == ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")


def test_long_run_is_named_by_its_first_and_last_module():
    parts = {name: nn.Linear(16, 16) for name in "abcd"}
    assert _names(Holder(**parts, layers=nn.ModuleList(_linears(2)))) == ["a..d", "layers.0", "layers.1"]


def test_zero3_placeholders_count_with_the_size_of_the_whole_parameter():
    module = Holder(layers=nn.ModuleList(_linears(2)), norm=nn.LayerNorm(1))
    for p in module.parameters():
        p.ds_numel = p.numel()
        p.data = torch.empty(0)
    units = find_layer_units(module)
    assert [(unit.name, unit.numel) for unit in units] == [("layers.0", 272), ("layers.1", 274)]
    assert plan_blocks(module).blocks[1].numel == 274


def test_freezing_moves_no_boundary():
    model = tiny_model("llama")
    for fqn, p in model.named_parameters():
        p.requires_grad = "layers.2" in fqn or "lm_head" in fqn
    assert _names(model) == ["model.layers.2", "lm_head"]
    plan = plan_blocks(model)
    by_regex = plan_blocks(tiny_model("llama"), frozen=["embed", r"layers\.[01]\.", r"model\.norm"])
    assert plan == by_regex
    assert "model.norm.weight" in plan.frozen and plan.always_active == ()


def test_always_active_parameters_leave_their_unit_and_a_left_over_norm_joins_the_layer(llama):
    plan = plan_blocks(llama, always_active=["lm_head", r"layers\.1\."], frozen=["embed_tokens"])
    assert [block.name for block in plan.blocks] == ["model.layers.0", "model.layers.2"]
    assert plan.blocks[-1].fqns[-1] == "model.norm.weight"
    assert plan.frozen == ("model.embed_tokens.weight",)
    assert plan.always_active[-1] == "lm_head.weight" and len(plan.always_active) == 10


@pytest.mark.parametrize(
    ("layers_per_block", "names"),
    [
        (2, ["model.embed_tokens..model.layers.0", "model.layers.1-2", "norm+lm_head"]),
        (3, ["model.embed_tokens..model.layers.1", "model.layers.2..norm+lm_head"]),
        (5, ["model.embed_tokens..norm+lm_head"]),
        (9, ["model.embed_tokens..norm+lm_head"]),
    ],
)
def test_consecutive_units_are_grouped_and_the_last_block_may_be_smaller(llama, layers_per_block, names):
    assert [block.name for block in plan_blocks(llama, layers_per_block=layers_per_block).blocks] == names


def test_blocks_given_as_regexes_keep_their_order(llama):
    plan = plan_blocks(
        llama,
        blocks=[["lm_head", r"model\.norm"], [r"\.self_attn\."], [r"layers\.\d\.(mlp|.*layernorm)"]],
        frozen=["embed"],
    )
    assert plan.blocks[0].fqns == ("model.norm.weight", "lm_head.weight")
    assert plan.blocks[0].name == r"lm_head|model\.norm"
    assert len(plan.blocks[1].fqns) == 12 and len(plan.blocks[2].fqns) == 15
    assert _placed(plan) == sorted(fqn for fqn, _ in llama.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": []}, r"^hift.blocks=\[\]: must list at least one block"),
        ({"blocks": [["."], []]}, r"^hift.blocks\[1\]=\[\]: must hold at least one regex"),
        (
            {"blocks": [["."], ["head"]]},
            r"^hift.blocks\[0\]='.' and hift.blocks\[1\]='head' both match 'lm_head.weight'",
        ),
        (
            {"blocks": [["lm_head"], ["embed"]]},
            r"^hift.blocks: 28 trainable parameters are in no block \('model.layers.0.*and 25 more\); add a regex",
        ),
        (
            {"blocks": [["."]], "always_active": ["lm_h"]},
            r"^hift.blocks\[0\]='.' and hift.always_active='lm_h' both match 'lm_head.weight'",
        ),
        ({"blocks": [["layers("]]}, r"^hift.blocks\[0\]='layers\(': is not a regex"),
        ({"frozen": ["*embed"]}, r"^hift.frozen='\*embed': is not a regex"),
        (
            {"frozen": ["embd_tokens"]},
            r"^hift.frozen='embd_tokens': matches no .* the closest are 'model.embed_tokens.w",
        ),
        (
            {"always_active": ["lmhead"]},
            r"^hift.always_active='lmhead': matches no .* the closest are 'lm_head.weight'",
        ),
        (
            {"blocks": [["."], ["h_head"]]},
            r"^hift.blocks\[1\]='h_head': matches no .* the closest are 'lm_head.weight'",
        ),
        ({"blocks": [["."], ["lm_h"]], "frozen": ["lm_h"]}, r"^hift.blocks\[1\]='lm_h': .*'lm_head.weight' is frozen"),
        (
            {"frozen": ["head"], "always_active": ["lm_"]},
            r"^hift.frozen='head' and hift.always_active='lm_' both match 'lm_head.weight'",
        ),
        (
            {"always_active": ["."]},
            r"^hift.always_active=\['.'\]: matches every trainable .* nothing is left to rotate",
        ),
        ({"frozen": ["."]}, r"^hift.frozen=\['.'\]: matches every trainable parameter"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_key_and_the_parameters(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_blocks(llama, **arguments)


def test_string_instead_of_a_list_of_regexes_is_refused(llama):
    with pytest.raises(TypeError, match=r"^hift.blocks\[0\]='lm_head': must be a list of regexes; write \['lm_head'\]"):
        plan_blocks(llama, blocks=["lm_head"])


def test_regex_on_the_other_name_of_a_tied_weight_is_told_the_right_one():
    message = "'lm_head.weight' is tied to 'model.embed_tokens.weight': use that name"
    with pytest.raises(ValueError, match=message):
        plan_blocks(tiny_model("llama_tied"), always_active=["lm_head"])


@pytest.mark.parametrize("fqns", [("weight",), ("weight", "bias", "bias")], ids=["lost", "twice"])
def test_plan_that_loses_or_doubles_a_parameter_is_a_bug_that_raises(monkeypatch, fqns):
    monkeypatch.setattr(hift_ds.rotation.blocks, "_layer_units", lambda module, kept: [LayerUnit("all", fqns, 0)])
    with pytest.raises(RuntimeError, match="must hold 'bias' exactly once"):
        plan_blocks(nn.Linear(2, 2))


def test_model_without_trainable_parameter_is_refused():
    module = nn.Linear(2, 2).requires_grad_(False)
    assert find_layer_units(module) == []
    with pytest.raises(ValueError, match="No parameter of the model has requires_grad=True"):
        plan_blocks(module)


@pytest.mark.parametrize(("file", "packages"), [("names", {"torch"}), ("blocks", {"torch", "hift_ds"})])
def test_blocks_are_found_with_torch_and_the_names_of_parameters_alone(file, packages):
    tree = ast.parse(Path(hift_ds.rotation.blocks.__file__).with_name(f"{file}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == packages
    assert {name for name in imported if name.startswith("hift_ds.")} <= {"hift_ds.rotation.names"}
