"""Arenas: exact size, page-locked while they live, pageable with one warning where that fails."""

import gc
import io
import logging

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
