"""These tests need a CUDA device, and DeepSpeed to use it."""

import os

import pytest
import torch

WHY_NOT = None
if not torch.cuda.is_available():
    WHY_NOT = "no CUDA device here"
elif os.environ.get("HIFT_TEST_DEVICE") != "cuda":
    WHY_NOT = "run them with `make gpu`, which lets DeepSpeed and Triton use the device"


def pytest_collection_modifyitems(items):
    for item in items:
        if WHY_NOT and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))
