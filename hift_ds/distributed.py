"""Before the engine: the process group, and errors that reach every rank."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import deepspeed
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.extras import needs_recipes

T = TypeVar("T")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")


@needs_recipes()  # mpi4py, under mpirun
def init_distributed(port: int = 29500, required: bool | None = None) -> None:
    """`deepspeed.init_distributed`, made safe for a lone process and quick on a CPU. Collective; may be called again.

    A process that no launcher has started gets a world of its own on a free port (DeepSpeed would ask MPI). On a CPU
    DeepSpeed's shared-memory operator is skipped.

    Args:
        port: Where ranks that came through MPI meet, unless MASTER_PORT says otherwise.
        required: DeepSpeed's `dist_init_required`.

    Raises:
        RuntimeError: srun has started several tasks without telling them their ranks, or this rank has no device.
    """
    if not dist.is_initialized():
        under_mpi = any(name in os.environ for name in MPI_VARIABLES)
        if "RANK" not in os.environ and not under_mpi:
            if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
                raise RuntimeError(
                    f"srun has started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, and each would train alone: start "
                    "torchrun or deepspeed under srun (one task a node), or set RANK, LOCAL_RANK, WORLD_SIZE, "
                    "MASTER_ADDR and MASTER_PORT from SLURM's variables"
                )
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(_free_port())
        _check_local_rank()
        skip_shared_memory_operator()
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            distributed_port=int(os.environ.get("MASTER_PORT", port)),  # DeepSpeed's own MPI way ignores the variable
            dist_init_required=required,
        )
    # NCCL takes the tensors of all_gather_object to the current device: without this every rank's would be GPU 0, and
    # the first check of `agree`, before the engine sets it, would fail.
    if "LOCAL_RANK" in os.environ:  # under MPI DeepSpeed has just set it
        _check_local_rank()
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def skip_shared_memory_operator() -> None:
    """On a CPU: it needs a compiler and half a minute, and gloo does its work; HIFT_DS_SHM=1 has it built."""
    if get_accelerator().device_name() == "cpu" and os.environ.get("HIFT_DS_SHM") != "1":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_local_rank() -> None:
    local_rank, accelerator = int(os.environ.get("LOCAL_RANK", "0")), get_accelerator()
    if accelerator.device_name() != "cpu" and local_rank >= accelerator.device_count():
        raise RuntimeError(
            f"LOCAL_RANK={local_rank}: this process sees {accelerator.device_count()} devices; let every rank see all "
            "devices of its node (CUDA_VISIBLE_DEVICES), or start one rank a device"
        )


def agree(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it fails on any, all raise. Collective.

    Raises:
        Exception: The rank's own, or a RuntimeError that repeats the first other rank's.
    """
    error: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the other ranks must hear of it
        error = caught
    if dist.is_initialized():
        reports = of_all_ranks(None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, report in enumerate(reports) if report is not None]
        if failed and error is None:
            raise RuntimeError(f"rank {failed[0]} failed: {reports[failed[0]]}")
    if error is not None:
        raise error
    return cast("T", result)


def require_alike(what: str, value: Any) -> None:
    """Raises RuntimeError on every rank unless all have the same `value`. Collective."""
    digests = of_all_ranks(hashlib.sha256(repr(value).encode()).hexdigest())
    if len(set(digests)) > 1:
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise RuntimeError(f"{what}: ranks 0 and {other} differ; every rank must be given the same")


def of_all_ranks(value: T) -> list[T]:
    """Every rank's `value`, by rank. Collective."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
