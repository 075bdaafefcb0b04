"""What a trace of steps says of copies: intervals by hand."""

import pytest

from hift_ds.recipes.tracing import overlap, require_trace


def event(category, name, start, duration, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": args}


def test_copies_count_where_no_kernel_runs_and_copies_on_the_device_are_kernels():
    events = [
        event("kernel", "gemm", 1000, 4000),
        event("kernel", "gemm", 3000, 4000),  # on another stream: busy from 1000 to 7000
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7000, 1000, bytes=99),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 3000, bytes=30),  # 1000 of it before the first kernel
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 7500, 2500, bytes=20),  # 2000 after the last
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 9000, 1500, bytes=10),  # 1000 of it with the other one
        event("gpu_memset", "Memset (Device)", 12500, 500),
        event("cpu_op", "aten::mm", 0, 20000),
        {"ph": "M", "name": "process_name"},
    ]
    found = overlap(events, steps=2)
    assert found.pop("longest_kernels_ms") == {
        "gemm": 4.0, "Memcpy DtoD (Device -> Device)": 0.5, "Memset (Device)": 0.25
    }  # fmt: skip
    assert found == {
        "steps": 2, "step_ms": 6.5, "kernels_ms": 3.75, "exposed_copies_ms": 1.75, "idle_ms": 1.0,
        "to_device": {"ms": 2.25, "bytes": 20}, "to_host": {"ms": 1.25, "bytes": 10},
    }  # fmt: skip


def test_a_trace_of_nothing_is_refused():
    with pytest.raises(RuntimeError, match="no kernel"):
        overlap([event("cpu_op", "aten::mm", 0, 1)], steps=1)
    with pytest.raises(ValueError, match="cpu"):
        require_trace("cpu")
