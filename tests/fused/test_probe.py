"""The probe: right kernels pass, wrong ones do not, and a machine that has passed is remembered."""

import json
import os
import threading

import pytest
import torch
from hift_kernels import probe
from hift_testing.fused_cases import DEVICE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hift_ds"


@pytest.fixture
def probes(monkeypatch):
    """The devices that were probed; what the probe finds wrong can be set."""

    class Probes(list):
        wrong: list[str] = []

        def __call__(self, device):
            self.append(device)
            return self.wrong

    found = Probes()
    monkeypatch.setattr(probe, "_wrong_bits", found)
    return found


def test_the_kernels_have_the_bits_that_the_probe_expects():
    assert probe._wrong_bits(DEVICE) == []


def contracted(gradient, weights, exp_avg, exp_avg_sq, scalars, **hyper):
    """AdamW whose first moment is one fused multiply-add."""
    before = exp_avg.double()
    adamw_step(gradient, weights, exp_avg, exp_avg_sq, scalars, **hyper)
    difference = gradient.float() * scalars[probe.SCALE.value] - before.float()
    exp_avg.copy_(before + (torch.tensor(1 - hyper["beta1"]).double() * difference.double()))


def off_by_one(gradient, weights, exp_avg, exp_avg_sq, scalars, **hyper):
    adamw_step(gradient, weights, exp_avg, exp_avg_sq, scalars, **hyper)
    weights.master[-1:].view(torch.int32).add_(1)


def untouched(gradient, weights, *rest, **hyper):
    pass


adamw_step = probe.adamw_step


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [(contracted, {"exp_avg"}), (off_by_one, {"masters"}), (untouched, {"weights", "masters", "exp_avg"})],
)
def test_wrong_updates_are_found_out(cache, monkeypatch, kernel, wrong):
    monkeypatch.setattr(probe, "adamw_step", kernel)
    assert wrong <= set(probe._wrong_bits(DEVICE))
    assert probe.trouble(DEVICE).startswith("a probe of the fused kernels gave wrong bits in ")


def test_a_wrong_norm_is_found_out(monkeypatch):
    monkeypatch.setattr(probe, "sum_of_squares", lambda gradient, square: square.fill_(3.0))
    assert "norm" in probe._wrong_bits(DEVICE)


def test_a_kernel_that_does_not_run_is_trouble_and_no_error(cache, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image\nand a long story")

    monkeypatch.setattr(probe, "prepare", fails)
    assert probe.trouble(DEVICE) == "a probe of the fused kernels failed (RuntimeError: no kernel image)"
    assert not cache.exists(), "asked again at the next start"


def test_a_machine_that_has_passed_is_not_probed_again(cache, probes):
    assert [probe.trouble(DEVICE) for _ in range(3)] == [None] * 3
    assert len(probes) == 1
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["torch"] == torch.__version__


@pytest.mark.parametrize("change", ["torch.__version__", "triton.__version__"])
def test_another_version_is_probed(cache, probes, monkeypatch, change):
    probe.trouble(DEVICE)
    monkeypatch.setattr(f"hift_kernels.probe.{change}", "0.0")
    probe.trouble(DEVICE)
    assert len(probes) == 2 == len(list(cache.iterdir()))


def test_wrong_bits_are_not_remembered(cache, probes):
    probes.wrong = ["masters", "norm"]
    found = [probe.trouble(DEVICE) for _ in range(2)]
    assert found == ["a probe of the fused kernels gave wrong bits in masters, norm"] * 2
    assert len(probes) == 2 and not cache.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"])
def test_a_torn_file_is_not_believed_and_is_mended(cache, probes, content):
    probe.trouble(DEVICE)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert [probe.trouble(DEVICE) for _ in range(2)] == [None, None]
    assert len(probes) == 2


@pytest.mark.parametrize("where", ["a file", "a folder in a file", "a folder in the file's place"])
def test_where_nothing_can_be_written_each_start_probes(tmp_path, monkeypatch, probes, where):
    (tmp_path / "file").touch()
    place = tmp_path / {"a file": "file", "a folder in a file": "file/below"}.get(where, "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    if where == "a folder in the file's place":
        probe._cache_file(probe._machine(DEVICE)).mkdir(parents=True)
    assert [probe.trouble(DEVICE) for _ in range(2)] == [None, None]
    assert len(probes) == 2
    left = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert left == ["file"], "no temporary file stays"


def test_ranks_that_probe_at_once_leave_one_whole_file(cache, probes):
    barrier, found = threading.Barrier(8), []

    def rank():
        barrier.wait()
        found.append(probe.trouble(DEVICE))

    threads = [threading.Thread(target=rank) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = cache.iterdir()
    assert found == [None] * 8 and file.read_text() == probe._machine(DEVICE)


def test_the_cache_is_the_users_and_a_relative_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert probe._cache_file("machine").parent == tmp_path / ".cache/hift_ds"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert probe._cache_file("machine") is None


def test_a_missing_compiler_or_header_is_named(tmp_path, monkeypatch):
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    for name in ("gcc", "clang", "mycc"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(probe.sysconfig, "get_paths", lambda scheme: {"include": str(include)})
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert probe.missing_tools() is None
    (tmp_path / "gcc").unlink()
    assert probe.missing_tools() is None, "clang does as well"
    (tmp_path / "clang").unlink()
    assert probe.missing_tools() == "Triton needs a C compiler at run time, and neither gcc nor clang is on PATH"
    monkeypatch.setenv("CC", "nocc")
    assert probe.missing_tools() == "Triton needs a C compiler at run time, and CC='nocc' is no command"
    monkeypatch.setenv("CC", "mycc")
    assert probe.missing_tools() is None
    monkeypatch.setattr(probe.sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
    assert probe.missing_tools().startswith("Triton needs Python.h at run time, and '/nowhere' has none")
    monkeypatch.setenv("CPATH", f"/elsewhere:{include}")
    assert probe.missing_tools() is None
