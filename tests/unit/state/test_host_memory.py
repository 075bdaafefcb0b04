"""Arenas: exact size, page-locked while they live, pageable with one warning where that fails."""

import gc
import io
import logging
import subprocess
import sys

import psutil
import pytest
import torch
from hift_testing.locking import Driver

from hift_ds.state import host_memory
from hift_ds.state.host_memory import HostMemory

SHAPES = {"master": (1000, torch.float32), "empty": (0, torch.float32), "codes": (77, torch.uint8)}


def test_tensors_are_as_asked_writable_apart_and_aligned():
    tensors = HostMemory().arena(SHAPES)
    assert {name: (t.numel(), t.dtype) for name, t in tensors.items()} == SHAPES
    tensors["master"].fill_(1.5)
    tensors["codes"].fill_(7)
    assert bool((tensors["master"] == 1.5).all()) and bool((tensors["codes"] == 7).all())
    assert all(tensor.data_ptr() % 256 == 0 for tensor in tensors.values())


def test_an_arena_is_not_rounded_up_to_a_power_of_two():
    driver = Driver()
    tensors = HostMemory(driver.register, driver.unregister).arena({"a": (33_000_000, torch.float32)})
    assert 0 <= next(iter(driver.locked.values())) - tensors["a"].nbytes < 256


def test_memory_is_locked_while_any_tensor_lives_and_unlocked_after():
    driver = Driver()
    tensors = HostMemory(driver.register, driver.unregister).arena(SHAPES)
    (address,) = driver.locked
    assert address == tensors["master"].data_ptr()
    codes = tensors.pop("codes")
    del tensors
    gc.collect()
    assert driver.locked
    del codes
    gc.collect()
    assert not driver.locked


@pytest.mark.parametrize("refused", [False, True])
def test_huge_pages_are_asked_for_before_pages_are_locked_and_are_not_needed(monkeypatch, refused):
    calls, driver = [], Driver()

    class Memory(host_memory._Memory):
        def madvise(self, option):
            calls.append(option)
            if refused:
                raise OSError(22, "Invalid argument")

    monkeypatch.setattr(host_memory, "_Memory", Memory)
    monkeypatch.setattr(host_memory.mmap, "MADV_DONTFORK", "no fork", raising=False)
    monkeypatch.setattr(host_memory.mmap, "MADV_HUGEPAGE", "huge", raising=False)

    def register(address, nbytes):
        calls.append("locked")
        driver.register(address, nbytes)
        if refused:  # the other advice is not optional
            monkeypatch.setattr(Memory, "madvise", lambda self, option: calls.append(option))

    tensors = HostMemory(register, driver.unregister).arena(SHAPES)
    tensors["master"].fill_(1.5)
    assert calls == ["huge", "locked", "no fork"]
    monkeypatch.delattr(host_memory.mmap, "MADV_HUGEPAGE")  # a platform without them
    assert bool((HostMemory().arena(SHAPES)["master"].fill_(2.0) == 2.0).all())
    assert calls == ["huge", "locked", "no fork"]


def test_where_locking_fails_memory_is_pageable_with_one_warning_and_one_attempt(caplog):
    driver = Driver(fails=True)
    memory = HostMemory(driver.register, driver.unregister)
    with caplog.at_level(logging.WARNING):
        arenas = [memory.arena(SHAPES) for _ in range(3)]
    arenas[2]["master"].fill_(2.0)
    del arenas
    gc.collect()
    assert driver.attempts == 1
    (message,) = (record.getMessage() for record in caplog.records)
    for words in ("page-locking", "steps wait for them", "ulimit -l", "hift.state.pin_memory"):
        assert words in message


@pytest.mark.parametrize("name", ["master", "codes"])
def test_saving_one_tensor_writes_it_alone(name):
    buffer = io.BytesIO()
    torch.save(HostMemory().arena({"large": (10**6, torch.float32), **SHAPES})[name], buffer)
    assert len(buffer.getvalue()) < 10_000


@pytest.mark.parametrize(("version", "of_process"), [(2, "0::/slurm/job_7/step"), (1, "9:memory:/slurm/job_7/step")])
def test_the_limit_of_every_cgroup_around_the_process_counts_and_page_cache_does_not(tmp_path, version, of_process):
    own, top = tmp_path / "cgroup", tmp_path / ("memory" if version == 1 else "")
    own.write_text(f"3:cpuset:/elsewhere\n{of_process}\n")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder, limit, used in ((".", "max", 9), ("slurm/job_7", 1000, 700), ("slurm/job_7/step", 2000, 600)):
        place = top / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / names[0]).write_text(f"{limit}\n")
        (place / names[1]).write_text(f"{used}\n")
        (place / "memory.stat").write_text("anon 1\ninactive_file 3\ntotal_inactive_file 3\n")
    assert sorted(host_memory._left_in_cgroups(own, tmp_path)) == [303, 1403]
    assert host_memory._left_in_cgroups(tmp_path / "none", tmp_path) == []
    assert 0 < host_memory.available_bytes() <= psutil.virtual_memory().total


def test_state_that_a_node_has_no_memory_for_is_one_sentence():
    gib = 2**30
    host_memory.require_host_memory([("a", 3 * gib, 6 * gib), ("a", 3 * gib, 6 * gib), ("b", 5 * gib, 5 * gib)])
    says = r"6.0 GiB of host memory are needed on a \(2 ranks\) and 5.5 GiB are available: free some .*split16"
    with pytest.raises(MemoryError, match=says):
        host_memory.require_host_memory([("a", 3 * gib, 6 * gib), ("a", 3 * gib, int(5.5 * gib))])


REFUSED = """
import resource, sys
from hift_ds.state.host_memory import HostMemory
import torch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
HostMemory().arena({"a": (2**28, torch.float32)})
"""


def test_memory_that_the_system_refuses_is_one_sentence():
    found = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=60)
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("MemoryError: optimizer state: the system refuses 1.0 GiB more of host memory ("), last
    assert found.returncode == 1 and "are available: free some or raise the limit" in last
