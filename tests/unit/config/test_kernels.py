"""Which implementation runs the updates: what was asked for, and where nothing was, the kernels if they are right."""

import pytest
from hift_kernels import probe

from hift_ds.config.kernels import KernelChoice, check_kernel, choose_kernel, expected_kernel

TORCH, TRITON = KernelChoice("torch"), KernelChoice("triton")


@pytest.fixture
def machine(monkeypatch):
    """Says what a machine's kernels are like; counts probes."""

    class Machine:
        probes = 0

        def is_like(self, interpret: bool = False, tools: str | None = None, trouble: str | None = None) -> None:
            def probed(device):
                assert str(device) == "cuda"
                self.probes += 1
                return trouble

            monkeypatch.setattr("hift_kernels.launching.INTERPRET", interpret)
            monkeypatch.setattr(probe, "missing_tools", lambda: tools)
            monkeypatch.setattr(probe, "trouble", probed)

    found = Machine()
    found.is_like()
    return found


def test_null_takes_the_fused_kernels_where_a_probe_gives_the_right_bits(machine):
    assert choose_kernel(None, "cuda") == choose_kernel(None, "cuda", compact=True) == TRITON
    assert machine.probes == 2


def test_what_was_asked_for_is_taken_without_a_probe(machine):
    assert choose_kernel("torch", "cuda") == TORCH
    assert choose_kernel("triton", "cuda") == TRITON
    machine.is_like(interpret=True)
    assert choose_kernel("triton", "cpu") == TRITON
    assert machine.probes == 0


def test_null_is_torch_on_a_cpu_and_for_updates_on_the_host_and_there_is_nothing_to_say(machine):
    assert choose_kernel(None, "cpu") == choose_kernel(None, "xpu") == TORCH
    assert choose_kernel(None, "cuda", on_host=True) == choose_kernel("torch", "cuda", on_host=True) == TORCH
    machine.is_like(interpret=True)
    assert choose_kernel(None, "cpu") == TORCH
    assert machine.probes == 0


@pytest.mark.parametrize(
    "like", [{"tools": "no compiler"}, {"trouble": "wrong bits"}, {"tools": "no compiler", "trouble": "wrong bits"}]
)
def test_null_is_torch_and_says_why_where_the_kernels_cannot_be_used(machine, like):
    machine.is_like(**like)
    why = next(iter(like.values()))
    assert choose_kernel(None, "cuda") == KernelChoice("torch", why)
    with pytest.raises(ValueError, match=f"^hift.state .which needs hift.kernel 'triton'.: {why}; leave master and mo"):
        choose_kernel(None, "cuda", compact=True)
    assert machine.probes == (0 if "tools" in like else 2), "nothing is compiled without a compiler"


def test_null_does_not_interpret_kernels_on_a_gpu_unless_state_needs_them(machine):
    machine.is_like(interpret=True)
    choice = choose_kernel(None, "cuda")
    assert choice.kernel == "torch" and "TRITON_INTERPRET" in choice.why_not
    assert choose_kernel(None, "cuda", compact=True) == choose_kernel("triton", "cuda") == TRITON


def test_triton_is_refused_in_one_sentence_where_it_cannot_run(machine, monkeypatch):
    with pytest.raises(ValueError, match=r"hift\.kernel='triton': .* a CUDA device, and this run is on 'cpu' .*; use"):
        choose_kernel("triton", "cpu")
    machine.is_like(tools="neither gcc nor clang is on PATH")
    with pytest.raises(ValueError, match=r"^hift\.kernel='triton': neither gcc nor .* PATH; use null or 'torch'$"):
        choose_kernel("triton", "cuda")
    monkeypatch.setitem(__import__("sys").modules, "hift_kernels.launching", None)
    with pytest.raises(ValueError, match=r"hift\.kernel='triton': Triton is missing .*; use null or 'torch'"):
        choose_kernel("triton", "cuda")
    assert "Triton is missing" in choose_kernel(None, "cuda").why_not


def test_compact_state_needs_the_fused_kernels(machine):
    with pytest.raises(ValueError, match=r"hift\.kernel='torch': updates masters and moments in fp32 alone; use null"):
        check_kernel("torch", compact=True, on_host=False)
    with pytest.raises(ValueError, match=r"hift\.state .which .* CUDA device.*leave master and moments at 'fp32'"):
        choose_kernel(None, "cpu", compact=True)


@pytest.mark.parametrize(
    ("kernel", "compact", "named"), [("triton", False, "hift.kernel='triton'"), (None, True, "hift.state")]
)
def test_updates_on_the_host_go_with_neither_kernels_nor_compact_state(kernel, compact, named):
    with pytest.raises(ValueError, match=f"offload_optimizer.device='cpu': .*remove it, or {named}$"):
        check_kernel(kernel, compact, on_host=True)


@pytest.mark.parametrize("kernel", [None, "torch", "triton"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_plan_expects_what_a_machine_without_trouble_chooses(machine, kernel, compact, on_host):
    expected = expected_kernel(kernel, "cuda", compact, on_host)
    try:
        check_kernel(kernel, compact, on_host)
    except ValueError:
        assert compact or on_host
    else:
        assert choose_kernel(kernel, "cuda", compact, on_host).kernel == expected
