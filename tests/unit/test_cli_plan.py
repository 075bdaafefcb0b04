"""`hift-ds plan`: exit codes, errors in one sentence, pure JSON, and the request that options and a config make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as hf

from hift_ds import cli
from hift_ds.config.batch import ACCUMULATION, MICRO, TRAIN
from hift_ds.memory.request import RESERVE_BYTES, Request, parse_bytes
from hift_ds.recipes import planning
from hift_ds.recipes.planning import complete_config

ROOT = Path(__file__).parents[2]
BACKWARD = {"enabled": True, "update": "backward"}
OPTIMIZER = {"optimizer": {"type": "AdamW"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the config of a Llama of one layer and 64 positions."""
    folder = tmp_path_factory.mktemp("tiny")
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def written(folder, content, name="file.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def plan(*options):
    return cli.main(["plan", *map(str, options)])


# Exit codes.


def test_a_plan_without_limits_or_that_fits_exits_0(tiny, capsys):
    assert plan("--model", tiny, "--seq_len", 8) == 0
    out, err = capsys.readouterr()
    assert "LlamaForCausalLM" in out and "a card of 12 GiB holds it" in " ".join(out.split())
    assert err == ""
    assert plan("--model", tiny, "--seq_len", 8, "--gpu_memory", "24GiB", "--host_memory", "1GiB") == 0
    assert "fits: needs 1.00 GiB of 24.00 GiB" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_exits_1_and_advises(tiny, capsys):
    assert plan("--model", tiny, "--seq_len", 8, "--gpu_memory", "512MiB") == 1
    out, err = capsys.readouterr()
    assert "does not fit: needs 1.00 GiB of 0.50 GiB" in out
    assert "No change that is known here makes it fit" in out
    assert err == ""


def test_a_host_too_small_exits_1_with_what_would_fit(tiny, capsys):
    assert plan("--model", tiny, "--seq_len", 8, "--gpu_memory", "24GiB", "--host_memory", "50kB") == 1
    assert '"master": "split16" in hift.state' in capsys.readouterr().out


def test_no_command_and_unknown_options_exit_2(capsys):
    for arguments in ([], ["plan"], ["plan", "--model", "m", "--gpu", "1"], ["plan", "--model", "m", "--seq_len", "0"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
        assert "error:" in capsys.readouterr().err


# Errors: one sentence on stderr that names option, value and what to do.


def error_of(capsys, *options):
    """The sentence of a run that fails."""
    assert plan(*options) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("hift-ds plan: error: ")
    return lines[0].removeprefix("hift-ds plan: error: ")


@pytest.mark.parametrize("option", ["--gpu_memory", "--host_memory"])
@pytest.mark.parametrize("size", ["24 apples", "GiB", "-3GiB", "0", "1e9"])
def test_a_bad_size_is_refused_with_examples_of_good_ones(tiny, capsys, option, size):
    message = error_of(capsys, "--model", tiny, f"{option}={size}")
    assert message.startswith(f"{option} {size!r}: must be")
    assert "48GiB" in message or size == "0"


def test_a_missing_config_is_refused(capsys, tmp_path):
    for model in (tmp_path / "none", tmp_path / "none.json", "./none"):
        message = error_of(capsys, "--model", model)
        assert str(model) in message and "name a config.json" in message
    message = error_of(capsys, "--model", tmp_path)
    assert str(tmp_path) in message and "holds no config.json" in message
    assert "'nobody/nothing'" in error_of(capsys, "--model", "nobody/nothing")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", {"hidden_size": 3}, {"model_type": "nosuch"}, {"model_type": None}],
    ids=["empty", "unreadable", "no object", "no model_type", "unknown model_type", "null"],
)
def test_a_file_that_is_no_models_config_is_refused(capsys, tmp_path, content):
    path = written(tmp_path, content)
    message = error_of(capsys, "--model", path)
    assert path in message and '"model_type"' in message


@pytest.mark.parametrize(
    "value",
    [{"hidden_size": "wide"}, {"hidden_size": 33, "num_attention_heads": 2}, {"vocab_size": None}],
    ids=["type", "heads", "null"],
)
def test_a_value_that_a_models_config_cannot_have_is_refused(capsys, tmp_path, value):
    path = written(tmp_path, {"model_type": "llama", "num_hidden_layers": 1, **value})
    message = error_of(capsys, "--model", path, "--seq_len", 8)
    assert path in message and next(iter(value)).replace("_", " ") in message.replace("_", " ")


def test_rows_longer_than_the_models_positions_are_refused(tiny, capsys):
    message = error_of(capsys, "--model", tiny, "--seq_len", 65)
    assert message == "--seq_len 65: the model has 64 positions; use a shorter sequence"


def test_a_model_of_images_is_refused(capsys, tmp_path):
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        architectures=["ViTForImageClassification"],
    )  # fmt: skip
    message = error_of(capsys, "--model", written(tmp_path, config.to_dict()), "--seq_len", 8)
    assert "ViTForImageClassification" in message and "only models of text" in message


def test_checkpointing_that_the_model_lacks_is_refused(capsys, tmp_path):
    config = hf.OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, architectures=["OpenAIGPTLMHeadModel"])
    path = written(tmp_path, config.to_dict())
    options = ("--attn_implementation", "eager", "--gradient_checkpointing", "--seq_len", 8)
    message = error_of(capsys, "--model", path, *options)
    assert message == "--gradient_checkpointing: OpenAIGPTLMHeadModel has none; leave the option out"


def test_experts_in_fp32_are_planned_or_refused_in_a_sentence_that_helps(capsys, tmp_path):
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    code = plan("--model", written(tmp_path, config.to_dict()), "--seq_len", 8, "--precision", "fp32")
    err = capsys.readouterr().err
    assert code == 0 or "--precision" in err or "precision" in err


def test_contradictory_batch_sizes_are_refused(tiny, capsys, tmp_path):
    path = written(tmp_path, {TRAIN: 7, MICRO: 2, ACCUMULATION: 1})
    message = error_of(capsys, "--model", tiny, "--deepspeed_config", path, "--gpus", 2)
    assert message.startswith(f"{TRAIN}=7: must be {MICRO} x {ACCUMULATION} x 2 ranks")
    assert "change one of them" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, ("elastic_checkpoint", "remove the key")),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, ("fp16_master_weights_and_grads",)),
        ({"optimizer": {"type": "Muon"}}, ("Muon", "use one of")),
        ({"optimizer": "AdamW"}, ("optimizer='AdamW'",)),
        ({"optimizer": {"type": "AdamW"}, "scheduler": None}, ("scheduler=null", "leave the key out")),
        ({"optimizer": {"type": "AdamW", "params": {"learn": 1}}}, ("optimizer.params.learn=1", "use one of")),
        ({"hift": {"enabled": True, "layers_per_blok": 2}}, ("hift.layers_per_blok=2", "did you mean")),
        ({"hift": {"enabled": True, "state": {"moments": "int4"}}}, ("moments", "'int4'", "must be one of")),
        ({"hift": 3}, ("hift=3", "must be an object")),
        ({"gradient_clipping": 0.5, "hift": BACKWARD, **OPTIMIZER}, ("gradient_clipping=0.5", "clip each layer unit")),
        ({"hift": {"enabled": True, "clip": "unit"}, **OPTIMIZER}, ("hift.clip='unit'", '"update": "backward"')),
        ({"hift": {"enabled": True, "accumulate": "host"}, **OPTIMIZER}, ("hift.accumulate='host'", "hift.update")),
        ({"fp16": {"enabled": True}, "hift": BACKWARD, **OPTIMIZER}, ("fp16.loss_scale=0", "fixed loss_scale")),
        ({MICRO: 0}, (f"{MICRO}=0", "1 or more")),
    ],
)
def test_what_a_run_would_refuse_is_refused(tiny, capsys, tmp_path, config, words):
    message = error_of(capsys, "--model", tiny, "--seq_len", 8, "--deepspeed_config", written(tmp_path, config))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1, "a": 2}'])
def test_a_deepspeed_config_that_cannot_be_read_is_refused(tiny, capsys, tmp_path, content):
    path = written(tmp_path, content)
    assert path in error_of(capsys, "--model", tiny, "--deepspeed_config", path)


def test_a_missing_deepspeed_config_is_refused(tiny, capsys):
    message = error_of(capsys, "--model", tiny, "--deepspeed_config", "nosuch.json")
    assert message == "--deepspeed_config 'nosuch.json': no such file; name a DeepSpeed JSON"


# JSON and picture.


def test_json_to_stdout_is_nothing_but_json(tiny, capsys):
    assert plan("--model", tiny, "--seq_len", 8, "--gpu_memory", "512MiB", "--json") == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["model"] == "LlamaForCausalLM"
    assert found["fits"] is False and found["cheapest_change"] == []
    paper = found["as_the_paper_counts"]
    numel = found["parameters"]
    assert paper["full, fp32"] == {"para": 4 * numel, "gra": 4 * numel, "sta": 8 * numel}
    largest = max(block["numel"] for block in found["blocks"])
    assert paper["hift, mixed_hi"] == {"para": 2 * numel + 4 * largest, "gra": 4 * largest, "sta": 8 * largest}
    assert set(paper) == {"full, fp32", "full, mixed", "hift, fp32", "hift, mixed", "hift, mixed_hi"}


def test_json_and_picture_go_into_files_beside_the_table(tiny, capsys, tmp_path):
    found, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert plan("--model", tiny, "--seq_len", 8, "--json", found, "--plot", picture) == 0
    assert "peak" in capsys.readouterr().out
    assert json.loads(found.read_text())["request"]["seq"] == 8
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_named_card_gives_its_memory_and_modelled_seconds(tiny, capsys):
    assert plan("--model", tiny, "--seq_len", 8, "--card", "a6000") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of 48.00 GiB" in out and "a step on one card, modelled and not measured:" in out and "tokens/s" in out
    assert plan("--model", tiny, "--seq_len", 8, "--tflops", 1e-6, "--card", "a6000", "--json") == 0
    step = json.loads(capsys.readouterr().out)["modelled_step"]
    assert step["tokens"] == 8 and step["tokens_per_second"] == pytest.approx(8 / step["step"])
    bus = ("--model", tiny, "--seq_len", 8, "--card", "a6000", "--json", "--bus_gb_per_s")
    copies = []
    for speed in (1e-3, 2e-3):
        assert plan(*bus, speed) == 0
        copies.append(json.loads(capsys.readouterr().out)["modelled_step"]["copies"])
    assert copies[0] == pytest.approx(2 * copies[1]) and copies[1] > 0
    message = error_of(capsys, "--model", tiny, "--tflops", 3)
    assert message == "--tflops: a step's seconds need --card, too, for its memory; name the nearest"


def test_a_card_says_no_seconds_of_fp32_without_a_rate_for_it(tiny, capsys):
    run = ("--model", tiny, "--seq_len", 8, "--card", "a6000", "--precision", "fp32")
    assert plan(*run) == 0
    out, err = capsys.readouterr()
    assert "modelled" not in out and "give --tflops" in err
    assert plan(*run, "--tflops", 20) == 0
    assert "modelled and not measured" in capsys.readouterr().out


def test_compiled_layers_take_fewer_seconds_as_much_memory_and_no_zero_3(tiny, capsys):
    found = []
    for options in ((), ("--compile",)):
        assert plan("--model", tiny, "--seq_len", 32, "--card", "a6000", "--json", *options) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, compiled = found
    assert compiled["modelled_step"]["compute"] < 0.9 * plain["modelled_step"]["compute"]
    assert compiled["peak"] == plain["peak"]
    assert (plain["request"]["compiled"], compiled["request"]["compiled"]) == (False, True)
    message = error_of(capsys, "--model", tiny, "--stage", 3, "--compile")
    assert message.startswith("compile_layers (--compile): ZeRO-3") and "stage 0 to 2" in message


def test_the_loss_in_chunks_is_planned_or_refused(tiny, capsys, tmp_path):
    peaks = []
    for loss in (["plain"], ["chunked"], ["chunked", "--loss_tile", "4KiB"]):
        assert plan("--model", tiny, "--seq_len", 32, "--micro_batch", 64, "--loss", *loss, "--json") == 0
        peaks.append(json.loads(capsys.readouterr().out)["peak"])
    assert peaks[2] < peaks[1] < peaks[0]
    assert error_of(capsys, "--model", tiny, "--loss_tile", "1MiB").startswith("--loss_tile 1MiB: goes with --loss")
    assert "--loss_tile 'big': must be a size" in error_of(
        capsys, "--model", tiny, "--loss", "chunked", "--loss_tile", "big"
    )
    t5 = hf.T5Config(num_layers=1, d_model=16, d_ff=16, d_kv=8, num_heads=2)
    t5.architectures = ["T5ForConditionalGeneration"]
    t5.save_pretrained(tmp_path)
    assert "the loss in chunks is for decoders alone" in error_of(capsys, "--model", tmp_path, "--loss", "chunked")


def test_table_of_the_command_fits_80_columns_where_output_is_no_terminal(tiny, capsys):
    plan("--model", tiny, "--seq_len", 8)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


# From options to the request.


@pytest.fixture
def request_for(monkeypatch):
    """The request that options make, without a plan."""
    monkeypatch.setattr(planning, "_card_here", lambda: None)
    seen = []
    monkeypatch.setattr(cli, "run_plan", lambda args: seen.append(planning.request_of(args)) or 0)

    def request(*options):
        assert plan("--model", "m", *options) == 0
        return seen.pop()

    return request


def test_defaults_are_adamw_in_bf16_one_row_a_rank(request_for):
    request = request_for()
    config = request.config
    assert (config.precision, config.stage, config.micro_batch, request.seq) == ("bf16", 0, 1, 512)
    assert (request.world, request.gpu_memory, request.host_memory) == (1, None, None)
    assert (request.attn_implementation, request.checkpointing, request.padded) == (None, False, False)
    assert request.ds_config["optimizer"]["type"] == "AdamW"
    assert request.config.hift.layers_per_block == 1


def test_several_ranks_share_by_stage_2_unless_told_otherwise(request_for, tmp_path):
    assert request_for("--gpus", 2).config.stage == 2
    assert request_for("--gpus", 2, "--nodes", 3).world == 6
    assert request_for("--gpus", 2, "--stage", 3).config.stage == 3
    path = written(tmp_path, OPTIMIZER)
    assert request_for("--gpus", 2, "--deepspeed_config", path).config.stage == 0, "the config's"


def facts(config):
    return config.precision, config.micro_batch, config.stage, config.hift.layers_per_block


def test_options_go_before_the_config(request_for, tmp_path):
    config = {
        "bf16": {"enabled": True}, MICRO: 4, ACCUMULATION: 3, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "SGD"}, "hift": {"enabled": False, "layers_per_block": 2, "order": "top2down"},
    }  # fmt: skip
    path = written(tmp_path, config)
    plain = request_for("--deepspeed_config", path)
    assert facts(plain.config) == ("bf16", 4, 1, 2)
    assert plain.ds_config[ACCUMULATION] == 3 and plain.ds_config["optimizer"]["type"] == "SGD"
    told = request_for(
        "--deepspeed_config", path, "--precision", "fp16", "--stage", 3, "--micro_batch", 2, "--layers_per_block", 5,
        "--attn_implementation", "eager", "--gradient_checkpointing", "--padded", "--gpu_memory", "24GB",
        "--host_memory", "1TiB",
    )  # fmt: skip
    assert facts(told.config) == ("fp16", 2, 3, 5)
    assert told.config.hift.order == "top2down"
    assert (told.attn_implementation, told.checkpointing, told.padded) == ("eager", True, True)
    assert (told.gpu_memory, told.host_memory) == (24 * 10**9, 1 << 40)


def test_earlier_names_of_options_are_understood_and_not_shown(request_for, capsys):
    request = request_for("--seq", 16, "--attn", "eager", "--activation_checkpointing")
    assert (request.seq, request.attn_implementation, request.checkpointing) == (16, "eager", True)
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    shown = capsys.readouterr().out.split()
    assert "--seq_len" in shown and not {"--seq", "--attn", "--activation_checkpointing"} & set(shown)


def test_a_config_without_precision_is_fp32(request_for, tmp_path):
    path = written(tmp_path, {**OPTIMIZER, MICRO: 1})
    assert request_for("--deepspeed_config", path).config.precision == "fp32"
    assert request_for("--deepspeed_config", path, "--precision", "bf16").config.precision == "bf16"
    fp16 = written(tmp_path, {**OPTIMIZER, MICRO: 1, "fp16": {"enabled": True}})
    assert request_for("--deepspeed_config", fp16, "--precision", "fp32").config.precision == "fp32"


def test_the_old_name_of_bf16_is_read_as_deepspeed_reads_it(request_for, tmp_path):
    path = written(tmp_path, {**OPTIMIZER, MICRO: 1, "bfloat16": {"enabled": True}})
    assert request_for("--deepspeed_config", path).config.precision == "bf16"


# A config for the Trainer, whose "auto" its arguments would fill in.


TRAINERS = {
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto"},
    "gradient_clipping": "auto", TRAIN: "auto", MICRO: "auto", ACCUMULATION: "auto",
}  # fmt: skip


def test_auto_is_planned_as_the_trainer_fills_it_in(tiny, capsys, tmp_path):
    numbers = {
        "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}, MICRO: 2, ACCUMULATION: 1, "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": 256, "stage3_prefetch_bucket_size": 230,
            "stage3_param_persistence_threshold": 160},
    }  # fmt: skip
    found = []
    for config, more in ((TRAINERS, ("--micro_batch", 2)), (numbers, ())):
        path = written(tmp_path, config)
        assert plan("--model", tiny, "--seq_len", 8, "--gpus", 2, "--deepspeed_config", path, "--json", *more) == 0
        found.append(capsys.readouterr())
    assert json.loads(found[0].out)["blocks"] == json.loads(found[1].out)["blocks"]
    assert found[1].err == ""
    assert [line.partition(":")[2].partition(":")[0] for line in found[0].err.splitlines()] == [
        f' {ACCUMULATION}="auto"', ' bf16.enabled="auto"', ' gradient_clipping="auto"',
    ]  # fmt: skip


def test_a_plan_is_the_same_as_with_the_numbers_that_transformers_itself_fills_in(tiny):
    from types import SimpleNamespace

    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from hift_ds.recipes.auto import without_auto

    theirs = HfTrainerDeepSpeedConfig(json.loads(json.dumps(TRAINERS)))
    steps = {"get_warmup_steps": lambda total: 1, "warmup_steps": 1}
    arguments = SimpleNamespace(
        world_size=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_grad_norm=1.0, learning_rate=1,
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0, save_on_each_node=False, fp16=False,
        fp16_full_eval=False, bf16=True, bf16_full_eval=False, fp16_backend=None, half_precision_backend=None, **steps,
    )  # fmt: skip
    theirs.trainer_config_process(arguments)
    config = hf.AutoConfig.from_pretrained(tiny)
    theirs.trainer_config_finalize(arguments, SimpleNamespace(config=config), 10)
    ours, _ = without_auto(TRAINERS, None, None, 2, lambda: config)
    for key in ("zero_optimization", "gradient_clipping", "bf16", "fp16", ACCUMULATION):
        assert ours[key] == theirs.config[key], key


@pytest.mark.parametrize(
    ("change", "options", "precision"),
    [
        ({}, (), "bf16"),
        ({"bf16": {"enabled": False}}, (), "fp16"),
        ({"fp16": {"enabled": True}}, (), "fp16"),
        ({}, ("--precision", "fp32"), "fp32"),
    ],
    ids=["both auto", "one auto", "one on", "option"],
)
def test_the_precision_of_auto(request_for, tmp_path, change, options, precision):
    change = {**change, "zero_optimization": {"stage": 2}}
    path = written(tmp_path, {**TRAINERS, **change})
    request = request_for("--micro_batch", 1, "--deepspeed_config", path, *options)
    assert request.config.precision == precision


def test_auto_below_stage_3_and_micro_steps_of_a_known_batch(request_for, tmp_path, tiny):
    path = written(tmp_path, {**TRAINERS, TRAIN: 8})
    request = request_for("--model", tiny, "--micro_batch", 2, "--stage", 2, "--deepspeed_config", path)
    assert request.ds_config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 256}
    assert (request.config.micro_batch, request.config.micro_steps) == (2, 4)


def test_rows_that_only_the_trainer_knows_must_be_given(tiny, capsys, tmp_path):
    message = error_of(capsys, "--model", tiny, "--deepspeed_config", written(tmp_path, TRAINERS))
    assert message == f'{MICRO}="auto": only the Trainer\'s arguments have the number; add --micro_batch'


def test_an_auto_that_the_trainer_does_not_fill_in_is_refused(tiny, capsys, tmp_path):
    path = written(tmp_path, {**OPTIMIZER, MICRO: 1, "steps_per_print": "auto"})
    assert "steps_per_print='auto'" in error_of(capsys, "--model", tiny, "--deepspeed_config", path)


def test_the_card_that_is_here_counts_if_none_is_named(request_for, monkeypatch):
    monkeypatch.setattr(planning, "_card_here", lambda: 123)
    assert request_for().gpu_memory == 123
    assert request_for("--gpu_memory", "1GiB").gpu_memory == 1 << 30


def test_batch_sizes_follow_deepspeeds_rule():
    def sizes(config, micro=None, world=4):
        made = complete_config({**config, **OPTIMIZER}, None, None, micro, world)
        resolved = Request(made, 8, gpus=world).config
        return resolved.micro_batch, resolved.micro_steps

    assert sizes({}) == (1, 1)
    assert sizes({TRAIN: 32}) == (8, 1)
    assert sizes({TRAIN: 32, ACCUMULATION: 2}) == (4, 2)
    assert sizes({TRAIN: 32}, micro=2) == (2, 4), "the batch stays, the micro steps follow"
    assert sizes({TRAIN: 32, MICRO: 8, ACCUMULATION: 1}, micro=2) == (2, 4)
    assert sizes({MICRO: 3, ACCUMULATION: 5}) == (3, 5)


def test_a_config_is_completed_and_not_changed():
    config = {"zero_optimization": True, "hift": {"enabled": False, "order": "random"}, **OPTIMIZER}
    made = complete_config(config, None, None, None, 1)
    assert Request(made, 8).config.stage == 1, "DeepSpeed's old way"
    assert made["hift"] == {"order": "random", "enabled": True}
    assert config == {"zero_optimization": True, "hift": {"enabled": False, "order": "random"}, **OPTIMIZER}


@pytest.mark.parametrize(
    ("text", "size"),
    [("48GiB", 48 << 30), ("24GB", 24 * 10**9), (" 1.5 gib ", 3 << 29), ("512MiB", 512 << 20), ("7kb", 7000),
     ("2TiB", 2 << 40), ("1KiB", 1024), ("3000000", 3_000_000), ("3tb", 3 * 10**12)],
)  # fmt: skip
def test_sizes_are_read_in_powers_of_2_and_of_10(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1,5GiB", "1GiBs", "1 2", "nan", "0", "0.1", "0GiB"])
def test_what_is_no_size_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="must be"):
        parse_bytes(text)


def test_a_forgotten_unit_is_asked_for():
    with pytest.raises(ValueError, match="--gpu_memory '24': 24 bytes\\? write the unit, as in 24GiB"):
        parse_bytes("24", "--gpu_memory")


def test_a_changed_request_leaves_the_first_as_it_was():
    request = Request(complete_config(None, "bf16", 2, 1, 2), 8, gpus=2)
    before = json.dumps(request.ds_config)
    changed = request.changed("hift", "state", "moments", value="bf16").changed("bf16", value=None)
    assert (changed.config.hift.state.moments, changed.config.precision) == ("bf16", "fp32")
    assert changed.changed("hift", "state", "moments", value=None).config.hift.state.moments == "fp32"
    assert json.dumps(request.ds_config) == before
    assert (changed.seq, changed.gpus) == (8, 2)


# A model of 7 B parameters on a small machine.

_MEASURED = """
import json, resource, sys, time
begin = time.process_time()  # not of what runs beside
from hift_ds.cli import main
code = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"code": code, "seconds": time.process_time() - begin, "peak": peak}), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["70b", "mixtral"])
def test_large_models_are_planned_in_a_minute_and_4_gib_of_memory(tmp_path, name):
    llama = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    config = hf.MixtralConfig() if name == "mixtral" else hf.LlamaConfig(**llama, num_key_value_heads=8)
    config.save_pretrained(tmp_path)
    options = ["--seq_len", "1024", "--stage", "3", "--gpus", "8", "--gpu_memory", "80GiB", "--json"]
    measured, found = measured_plan(tmp_path, options)
    assert measured["code"] == 0 and measured["peak"] < 4 << 30 and measured["seconds"] < 60, measured
    assert found["parameters"] == {"70b": 68_976_648_192, "mixtral": 46_702_792_704}[name]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "3"])
def test_the_worst_block_of_7b_is_that_of_tracing_every_block_and_its_peak_alike(tmp_path, stage):
    hf.LlamaConfig(num_key_value_heads=32).save_pretrained(tmp_path)
    options = ["--seq_len", "1024", "--stage", stage, "--gpus", "4", "--json"]
    _, found = measured_plan(tmp_path, options)
    _, every = measured_plan(tmp_path, [*options, "--every_block"])
    assert found["worst_block"] == every["worst_block"] and found["peak"] == every["peak"]
    for one, other in zip(found["blocks"], every["blocks"], strict=True):
        assert abs(one["peak"] - other["peak"]) <= 2e-3 * other["peak"]


def measured_plan(folder, options):
    """CPU seconds, peak bytes and exit code of a plan in a process of its own, and the plan."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-c", _MEASURED, "plan", "--model", str(folder), *options], capture_output=True, text=True,
        env=environment, cwd=folder, timeout=200,
    )  # fmt: skip
    assert result.stdout, result.stderr
    return json.loads(result.stderr.splitlines()[-1]), json.loads(result.stdout)


@pytest.mark.slow
def test_all_of_llama_8b_in_one_block_fits_24_gb_with_updates_in_backward_and_the_loss_in_chunks(tmp_path):
    """torchtune's figure for 2 x 2048 tokens is 18.9 GiB, with moments of 8 bits (docs/choosing.md)."""
    hift = {**BACKWARD, "layers_per_block": 1000, "state": {"ring_bytes": 128 << 20}}
    config = written(tmp_path, {"bf16": {"enabled": True}, "gradient_clipping": 0.0, **OPTIMIZER, "hift": hift})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((ROOT / "launch" / "llama31_8b.json").read_text())
    options = ["--deepspeed_config", config, "--gradient_checkpointing", "--loss", "chunked", "--seq_len", "2048"]
    for rows, most in (("2", 17.5), ("4", 22.0)):
        limits = ["--micro_batch", rows, "--gpu_memory", "24GiB"]
        _, found = measured_plan(tmp_path / "model", [*options, *limits, "--json"])
        assert len(found["blocks"]) == 1 and found["fits"] and found["parameters"] == 8_030_261_248
        assert found["peak"] <= most * 2**30, found["peak"] / 2**30


@pytest.mark.slow
def test_a_7b_model_is_planned_in_a_minute_and_4_gib_of_memory(tmp_path):
    hf.LlamaConfig().save_pretrained(tmp_path)
    options = ["--seq_len", "512", "--micro_batch", "1", "--stage", "0", "--gpu_memory", "24GiB", "--json"]
    measured, found = measured_plan(tmp_path, options)
    assert measured["code"] == 0 and measured["peak"] < 4 << 30 and measured["seconds"] < 60, measured
    assert found["parameters"] == 6_738_415_616
    known = 2 * found["parameters"] + 12 * 202_383_360  # the weights, and a ring of a layer's state
    assert known < found["peak"] < known + (3 << 30), "activations and one block's gradients besides"
    assert found["peak"] + RESERVE_BYTES < 24 << 30 < found["full_fine_tuning"]["peak"]


def test_tracing_every_block_says_the_same_of_a_small_model(tiny, capsys):
    found = []
    for more in ((), ("--every_block",)):
        assert plan("--model", tiny, "--seq_len", 8, "--json", *more) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_null_layers_per_block_are_chosen_for_the_card_given(tiny, capsys, tmp_path):
    path = written(tmp_path, {**OPTIMIZER, MICRO: 1, "hift": {"enabled": True, "layers_per_block": None}})
    message = error_of(capsys, "--model", tiny, "--deepspeed_config", path)
    assert message == "hift.layers_per_block=null: the choice needs the size of a card; add --gpu_memory"
    options = ("--model", tiny, "--deepspeed_config", path, "--seq_len", 8, "--gpu_memory", "2GiB", "--json")
    assert plan(*options) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert len(found["blocks"]) == 1 and found["config"]["hift"]["layers_per_block"] == 2
    assert shown.err.startswith(f"layers_per_block: {found['config']['hift']['layers_per_block']}, which needs")
