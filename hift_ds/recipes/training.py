"""Parts of a training run that know neither HiFT nor the display: batches, held-out loss, an answer, a saved model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from hift_ds.distributed import of_all_ranks
from hift_ds.recipes.datasets import IGNORED, Exchange, TextData, build_prompt
from hift_ds.shards import is_partitioned


def batches(
    data: TextData, micro_batch: int, seed: int, start: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's training batches, for ever, from micro step `start` on: a resumed run sees what the other would.

    Each epoch has its own order; the rows that do not fill a batch on every rank wait for another epoch.

    Raises:
        ValueError: Fewer rows than one batch over all ranks needs.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    per_epoch = len(data.train) // (micro_batch * world)
    if per_epoch == 0:
        raise ValueError(
            f"dataset {data.name!r}: {len(data.train)} training rows are fewer than one batch "
            f"({micro_batch} x {world} ranks); use a smaller --micro_batch, a smaller --seq_len or more text"
        )
    micro_step = start
    while True:
        epoch, position = divmod(micro_step, per_epoch)
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed + epoch))
        for index in range(position, per_epoch):
            first = (index * world + rank) * micro_batch
            rows = data.collate([data.train[i] for i in order[first : first + micro_batch].tolist()])
            yield on_device(rows, device)
            micro_step += 1


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of the host there; from page-locked memory, else the host would wait for all earlier work of the card."""
    if device.type != "cuda":
        return {key: tensor.to(device) for key, tensor in batch.items()}
    return {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in batch.items()}


def optimizer_step(engine: Any, stream: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
    """One step with all its micro steps; every token that counts, of all micro steps and ranks, weighs the same.

    So rows of unlike lengths give the gradient of one big batch, as in the Hugging Face Trainer. Collective.

    Returns:
        fp64 on the device: this rank's part of the mean loss, whose sum over the ranks is the mean, and its tokens but
        for padding.
    """
    window = [next(stream) for _ in range(engine.gradient_accumulation_steps())]
    shares = torch.stack([_counted(batch) for batch in window]).double()
    total = shares.sum()
    dist.all_reduce(total)
    shares /= total
    as_averaged = shares * len(window) * dist.get_world_size()  # DeepSpeed divides by both
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch, share, factor in zip(window, shares, as_averaged, strict=True):
        loss = _loss(engine, batch)
        engine.backward(loss * factor.to(loss.dtype))
        engine.step()
        sums[0] += loss.detach().double() * share
        sums[1] += batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        del loss  # with it goes its graph: a forecast has none left over from the step before
    return sums


def _loss(engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    # With a cache of keys transformers would not keep packed examples apart.
    return engine(**batch, **({"use_cache": False} if "position_ids" in batch else {})).loss


def _counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many labels of a batch count in its loss: classes, or tokens but a row's first, predicted from nothing."""
    labels = batch["labels"]
    return ((labels[:, 1:] if labels.ndim == 2 else labels) != IGNORED).sum()


@torch.no_grad()
def held_out_loss(engine: Any, data: TextData, micro_batch: int) -> float | None:
    """Mean loss per held-out token that counts; `None` where nothing is held out.

    Collective: each rank takes its share; all run as many forwards.
    """
    if not len(data.eval):
        return None
    device = engine.device
    rank, world = dist.get_rank(), dist.get_world_size()
    rounds = -(-len(data.eval) // (micro_batch * world))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    for index in range(rounds):
        first = (index * world + rank) * micro_batch
        rows = [data.eval[i] for i in range(first, min(first + micro_batch, len(data.eval)))]
        batch = on_device(data.collate(rows or [data.eval[0]]), device)
        tokens = _counted(batch) if rows else 0
        loss = _loss(engine, batch).double()
        sums += torch.stack([loss * tokens, torch.as_tensor(tokens, device=device).double()])
    engine.train()
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


@torch.no_grad()
def answers(
    engine: Any, tokenizer: Any, questions: Sequence[Exchange], device: torch.device, max_new_tokens: int
) -> list[str]:
    """Greedy answers, in the order of the questions. Collective: each rank answers its share, all at once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    partitioned = any(is_partitioned(param) for param in engine.module.parameters())
    own = list(questions[rank::world])
    if partitioned and not own:
        own = [questions[0]]  # every rank must take part in every forward
    shares = of_all_ranks(_generate(engine.module, tokenizer, own, device, max_new_tokens, partitioned))
    return [shares[index % world][index // world] for index in range(len(questions))]


def _generate(
    module: Any, tokenizer: Any, questions: list[Exchange], device: torch.device, max_new_tokens: int, partitioned: bool
) -> list[str]:
    if not questions:
        return []
    prompt = build_prompt(tokenizer, [one.messages for one in questions])
    prompt = {key: tensor.to(device) for key, tensor in prompt.items()}
    module.eval()
    use_cache = getattr(module.config, "use_cache", True)  # off with activation checkpointing
    output = module.generate(
        **prompt, max_new_tokens=max_new_tokens, do_sample=False, synced_gpus=partitioned,
        pad_token_id=tokenizer.pad_token_id, use_cache=use_cache,
    )  # fmt: skip
    module.train()
    replies = tokenizer.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def same_answer(reply: str, answer: str) -> bool:
    """Whether two answers have the same words, whatever their case and punctuation."""
    return _words(reply) == _words(answer)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def save_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder that `from_pretrained` loads. Collective; rank 0 writes."""
    module, weights, copies = engine.module, {}, {}
    names = set(module.state_dict())
    for name, param in module.named_parameters(remove_duplicate=False):
        if id(param) not in copies:  # a tied weight is gathered once and stays one tensor in the file
            with deepspeed.zero.GatheredParameters([param], enabled=is_partitioned(param)):
                copies[id(param)] = param.detach().cpu().clone() if dist.get_rank() == 0 else None
        if name in names:
            weights[name] = copies[id(param)]
    if dist.get_rank() == 0:
        weights.update((name, buffer.cpu()) for name, buffer in module.named_buffers() if name in names)
        module.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    dist.barrier()
