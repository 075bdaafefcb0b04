"""Which implementation runs the updates: eager torch, or the fused Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KernelChoice:
    """`torch`, the eager rule, or `triton`, its fused kernel.

    Attributes:
        why_not: Why null does not take the fused kernels on a CUDA device, as a clause.
    """

    kernel: str
    why_not: str | None = None


def check_kernel(kernel: str | None, compact: bool, on_host: bool) -> None:
    """Refuses what no machine can do.

    Args:
        kernel: `hift.kernel`.
        compact: `hift.state` asks for masters or moments that are not fp32.
        on_host: `offload_optimizer.device: cpu` asks for updates on the host.

    Raises:
        ValueError: Kernels are asked for where none are, or eager torch where only kernels can.
    """
    if on_host and (kernel == "triton" or compact):
        what = "hift.kernel='triton'" if kernel == "triton" else "hift.state"
        raise ValueError(
            f"zero_optimization.offload_optimizer.device='cpu': updates on the host have no fused kernel and keep fp32 "
            f"masters and moments; remove it, or {what}"
        )
    if kernel == "torch" and compact:
        raise ValueError(
            "hift.kernel='torch': updates masters and moments in fp32 alone; use null or 'triton' with this hift.state"
        )


def choose_kernel(
    kernel: str | None, device_type: str, compact: bool = False, on_host: bool = False
) -> KernelChoice:
    """This rank's choice, of what `check_kernel` has passed.

    Args:
        kernel: `None` takes the fused kernels where `compact` needs them, and on a CUDA device on which a probe gives
            the right bits.
        device_type: Where the updates run.
        compact, on_host: As of `check_kernel`.

    Raises:
        ValueError: `triton`, or a `hift.state` that needs it, where kernels cannot run.
    """
    if expected_kernel(kernel, device_type, compact, on_host) == "torch":
        return KernelChoice("torch")
    why_not = _trouble(device_type, kernel is None, compact)
    if why_not is None:
        return KernelChoice("triton")
    if kernel is None and not compact:
        return KernelChoice("torch", why_not)
    asked = "hift.kernel='triton'" if kernel == "triton" else "hift.state (which needs hift.kernel 'triton')"
    remedy = "use null or 'torch'" if kernel == "triton" else "leave master and moments at 'fp32'"
    raise ValueError(f"{asked}: {why_not}; {remedy}")


def expected_kernel(kernel: str | None, device_type: str, compact: bool, on_host: bool) -> str:
    """What `choose_kernel` will choose where nothing is wrong with the kernels; for plans, which have no device."""
    fused = kernel == "triton" or compact or (kernel is None and device_type == "cuda" and not on_host)
    return "triton" if fused else "torch"


def _trouble(device_type: str, by_itself: bool, compact: bool) -> str | None:
    """Why the fused kernels cannot or should not run, as a clause.

    Args:
        by_itself: null chooses, and the user has not asked for them.
    """
    try:
        from hift_kernels.launching import INTERPRET, is_available
        from hift_kernels.probe import missing_tools, trouble
    except ImportError as error:
        return f"Triton is missing ({error})"
    if not is_available(device_type):
        return (
            f"the fused kernels need a CUDA device, and this run is on {device_type!r} "
            "(TRITON_INTERPRET=1 runs them on a CPU, very slowly, for tests)"
        )
    if INTERPRET:
        return "TRITON_INTERPRET=1 would run the fused kernels very slowly" if by_itself and not compact else None
    missing = missing_tools()
    if missing is None and by_itself:
        return trouble(torch.device(device_type))  # the current one
    return missing
