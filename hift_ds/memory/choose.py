"""`"layers_per_block": null`: the largest blocks that fit the memory found."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.distributed import agree, of_all_ranks
from hift_ds.memory.fake_model import positions_of
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import RESERVE_BYTES, Request
from hift_ds.state.host_memory import available_bytes
from hift_ds.state.unit_state import card_bytes

logger = logging.getLogger(__name__)

ASSUMED_SEQ_LEN = 2048  # at most, where the config does not tell


@dataclass(frozen=True)
class Choice:
    """The number of layer units in a block.

    Attributes:
        note: Why, as a sentence for the log.
        warning: Whether the note is one of trouble.
    """

    layers_per_block: int
    note: str
    warning: bool = False


def choose_layers_per_block(
    module: Any, ds_config: Mapping[str, Any], world: int, memory: int, device_type: str, card: int | None = None,
    optimizer: Any = None,
) -> Choice:  # fmt: skip
    """The choice for a transformers model; 1, with a warning, for a module that cannot be traced.

    Args:
        module: The model; only its class and config are looked at.
        ds_config: A DeepSpeed config with a "hift" section.
        world: Ranks.
        memory: Bytes that a rank may use.
        device_type: Where the model trains.
        card: Bytes of the card, by which the run chooses its ring.
        optimizer: The client's, if there is one; that of a function, which is not made yet, is taken for AdamW.
    """
    config = getattr(module, "config", None)
    if not hasattr(module, "_from_config") or config is None:
        return Choice(1, f"{type(module).__name__} is no transformers model and cannot be traced: 1", warning=True)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        ds_config, optimizer = {**ds_config, "optimizer": {"type": "AdamW"}}, None
    request = Request.of(
        module, ds_config, _sequence(ds_config, config), gpus=world, gpu_memory=card, device_type=device_type,
        optimizer=optimizer,
    )  # fmt: skip
    frozen = [fqn for fqn, param in module.named_parameters() if not param.requires_grad]
    try:
        return largest_blocks(Planner.of(module, frozen), request, memory)
    except Exception as error:  # whatever a model's own code raises on fake tensors
        return Choice(1, f"{type(module).__name__} cannot be traced ({error}): 1", warning=True)


def largest_blocks(planner: Planner, request: Request, memory: int) -> Choice:
    """The choice for a request.

    Args:
        memory: As in `choose_layers_per_block`.
    """

    def need(layers_per_block: int) -> int:
        asked = request.changed("hift", "layers_per_block", value=layers_per_block)
        return planner.peak(asked) + (0 if asked.device_type == "cpu" else RESERVE_BYTES)

    found = (f"{memory / 2**30:.1f} GiB", f"{request.config.micro_batch} x {request.seq} tokens")
    smallest = need(1)
    if smallest > memory:
        note = f"1, but even that needs {smallest / 2**30:.1f} GiB of {found[0]} at {found[1]}"
        return Choice(1, f"{note}; `hift-ds plan` says what would fit", warning=True)
    fits, best = 1, smallest
    too_many = len(planner.layout(request.changed("hift", "layers_per_block", value=1)).block_plan.blocks) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        needed = need(middle)
        if needed <= memory:
            fits, best = middle, needed
        else:
            too_many = middle
    return Choice(fits, f"{fits}, which needs {best / 2**30:.1f} GiB of {found[0]} at {found[1]}")


def _sequence(ds_config: Mapping[str, Any], config: Any) -> int:
    given = ds_config["hift"].get("seq_len")
    if given is not None:
        return given
    return min(positions_of(config) or ASSUMED_SEQ_LEN, ASSUMED_SEQ_LEN)


def agreed_layers_per_block(module: Any, ds_config: Mapping[str, Any], optimizer: Any) -> int:
    """The choice for this run: rank 0's, for the least memory that any rank finds. Collective.

    Args:
        optimizer: The client optimizer, if there is one.
    """
    found = of_all_ranks(memory_found())

    def choose() -> Choice | None:
        if dist.get_rank():
            return None
        card = card_bytes(torch.device(get_accelerator().current_device_name()))
        device_type = get_accelerator().device_name()
        return choose_layers_per_block(module, ds_config, len(found), min(found), device_type, card, optimizer)

    choice = of_all_ranks(agree(choose))[0]
    assert choice is not None  # rank 0 has chosen
    if dist.get_rank() == 0:
        level = logging.WARNING if choice.warning else logging.INFO
        logger.log(level, "hift.layers_per_block=null: %s", choice.note)
    return choice.layers_per_block


def memory_found() -> int:
    """Bytes that this rank may use.

    What its card has free (of its part, where `set_per_process_memory_fraction` sets one), or on a CPU its share of
    what the machine has free.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
        return available_bytes() // ranks
    if accelerator.device_name() != "cuda":
        return accelerator.total_memory()
    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), int(total * torch.cuda.get_per_process_memory_fraction()))
