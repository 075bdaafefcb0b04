"""Models by name: what is loaded, and what bad names say. No network, no real weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hift_ds.recipes import models
from hift_ds.recipes.models import SAMPLE, load_model, load_tokenizer


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folder_loads_in_the_asked_dtype(tiny_folder, dtype):
    model = load_model(str(tiny_folder), dtype=dtype, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "eager"


def test_tokenizer_without_pad_token_pads_with_eos(tiny_folder):
    tokenizer = load_tokenizer(str(tiny_folder))
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.pad_token_id == 0


def test_tokenizer_with_neither_pad_nor_eos_is_refused(tiny_folder, tmp_path):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    PreTrainedTokenizerFast(tokenizer_file=str(tiny_folder / "tokenizer.json")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        load_tokenizer(str(tmp_path))


def test_sample_name_goes_through_the_cache(tiny_folder, monkeypatch):
    monkeypatch.setattr(models, "fetch_sample", lambda name: tiny_folder)
    assert load_model(SAMPLE, dtype=torch.float32).config.vocab_size == 8
    assert load_tokenizer(SAMPLE).eos_token == "<eos>"


@pytest.mark.parametrize("name", ["/missing/folder", "./missing", "a/b/c"])
def test_missing_folder_is_said_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder; name a folder that .* or 'smollm2-135m'"):
        load_model(name, dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match=r"no such folder; name a folder that .* or 'smollm2-135m'"):
        load_tokenizer(name)


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder holds no config\.json"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_unreachable_hub_name_names_the_alternatives(monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def unreachable(source, **options):
        raise OSError(f"We couldn't connect to load {source}.\nCheck your connection")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    message = (
        r"'org/model'.*\(We couldn't connect to load org/model\.\); without network name a folder .*'smollm2-135m'"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_model("org/model", dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer("org/model")


def test_damaged_folder_keeps_its_own_error(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    with pytest.raises(OSError, match=r"(?i)safetensors|weights") as raised:
        load_model(str(tmp_path), dtype=torch.float32)
    assert "hub did not deliver" not in str(raised.value)


def test_other_dtype_is_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"dtype=torch\.float64: a model trains in one of torch\.float32"):
        load_model(str(tiny_folder), dtype=torch.float64)


def test_computed_buffers_are_those_of_the_model_class_whatever_zero_init_made_of_them(tiny_folder):
    """transformers 5.17 rounds rotary frequencies to bf16 under zero.Init, so that ZeRO-3 would train another model."""
    model = load_model(str(tiny_folder), dtype=torch.bfloat16)
    expected = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in expected.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_buffer(last, buffer.bfloat16(), persistent=False)
    weights = {name: param.data_ptr() for name, param in model.named_parameters()}
    models._restore_computed_buffers(model)
    assert any("inv_freq" in name for name in expected)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, expected[name]), name
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == weights


def test_import_is_light():
    """train.py prints its usage before transformers is loaded."""
    heavy = "{'transformers', 'datasets', 'deepspeed'}"
    code = f"import sys, hift_ds.recipes.models, hift_ds.recipes.datasets; print(sorted({heavy} & set(sys.modules)))"
    root = Path(models.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
