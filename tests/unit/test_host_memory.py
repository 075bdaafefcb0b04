"""Arenas: exact size, page-locked while they live, pageable with one warning where that fails."""

import gc
import io
import logging

import pytest
import torch
from hift_testing.locking import Driver

from hift_ds.host_memory import HostMemory

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
    assert "page-locking" in message and "ulimit -l" in message and "hift.state.pin_memory" in message


@pytest.mark.parametrize("name", ["master", "codes"])
def test_saving_one_tensor_writes_it_alone(name):
    buffer = io.BytesIO()
    torch.save(HostMemory().arena({"large": (10**6, torch.float32), **SHAPES})[name], buffer)
    assert len(buffer.getvalue()) < 10_000
