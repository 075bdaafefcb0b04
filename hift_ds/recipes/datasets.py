"""Text data by name, tokenised for a causal language model.

Two kinds. *chat*: conversations, rendered with the tokenizer's chat template; loss on the answers only. *text*:
documents; loss on every token. Everything is deterministic: each rank reads the same rows in the same order.

Packing joins examples to rows of many, each with positions of its own, so that they do not see each other: documents
end to end, cut into rows of `seq_len`; conversations whole, as many as fit. Text is packed by default, chat is not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from hift_ds.recipes.packing import IGNORED, Row, pack_cut, pack_whole
from hift_ds.recipes.sources import Example, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers without a chat template (base models). The space before the answer belongs to it, as BPE splits words;
# the line end is an expression because transformers' renderer trims one that follows a block tag.
_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

class TokenRows(Dataset):
    """Rows of tokens; item i is a dict of int64 tensors `input_ids`, `labels` and `attention_mask`, of equal length.

    A packed row has `position_ids` in place of the mask.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids, labels, *positions = (part.long() for part in self._rows[index])
        beside = {"position_ids": positions[0]} if positions else {"attention_mask": torch.ones_like(input_ids)}
        return {"input_ids": input_ids, "labels": labels, **beside}


@dataclass(frozen=True)
class Exchange:
    """What is asked, with all that stands before it, and the right answer."""

    messages: Sequence[dict[str, str]]
    answer: str

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class TextData:
    """Training and held-out rows.

    Packed training rows of text have exactly `seq_len` tokens; all others may be shorter, so batch them with `collate`.
    Every row has at least one token that counts in the loss.

    Attributes:
        kind: "chat" or "text".
        packed: Whether rows hold many examples.
        eval: empty if `eval_fraction` is 0 and the source brings no held-out part.
        held_out: how each held-out conversation begins, up to its first answer; empty for text.
    """

    name: str
    kind: str
    train: TokenRows
    eval: TokenRows
    pad_token_id: int
    held_out: Sequence[Exchange] = ()
    packed: bool = False

    def collate(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad rows on the right to the longest and stack them to [rows, tokens]; padding has mask 0 and no loss.

        In packed rows it is an example more, whose tokens all have position 0.
        """
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "position_ids": 0, "labels": IGNORED}
        return {
            key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)
            for key, fill in fills.items() if key in rows[0]
        }  # fmt: skip


def load_text_dataset(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    pack: bool | None = None,
    eval_fraction: float = 0.05,
    seed: int = 42,
) -> TextData:
    """Read `name`, hold a part out and tokenise both.

    Rows of data carry, in this order of preference, `messages`; `question`, `answer`; `prompt`, `completion`;
    `instruction`[, `input`], `output`; or `text`. Rows with an empty text or answer are left out.

    Args:
        name: "hift-faq" or "hift-facts", the samples; a .txt, .md or .py file (one document); a .jsonl or .json file
            (objects, one per line or in a list); a .csv or .tsv file (tabs, no quoting) whose first line names the
            columns; a folder: all row files in it, or all its text files if it has none, hidden ones left out; or a hub
            name "[owner/]name[:config]".
        seq_len: tokens a row holds at most. Longer unpacked examples are cut, with one warning.
        pack: None means True for text, False for chat.
        eval_fraction: the held-out share of the examples; if that is less than one document, each gives its end. Where
            the source brings a held-out part, that is taken: the samples, a hub split, and row files of a folder named
            test, x_eval, x-dev and the like beside others.
        seed: of the split.

    Raises:
        FileNotFoundError: no such file or folder, or a hub name that cannot be reached.
        ValueError: data that cannot be read, or of which nothing is left to learn.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len!r}: a row has at least 2 tokens, one to predict from the other.")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction!r}: the held-out share is at least 0 and below 1.")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer.pad_token_id=None: batches need padding; load the tokenizer with load_tokenizer.")
    train, held_out = read_examples(name)
    if held_out is None:
        train, held_out = _split(name, train, eval_fraction, seed)
    kind = "text" if isinstance(train[0], str) else "chat"
    streams = [list(_tokenise(part, tokenizer)) for part in (train, held_out)]
    packed = kind == "text" if pack is None else pack
    if packed and kind == "text":
        rows = [_full_rows(name, streams[0], seq_len), pack_cut(streams[1], seq_len)]
    elif packed:
        _warn_of_cuts(name, streams[0] + streams[1], seq_len)
        rows = [pack_whole(stream, seq_len) for stream in streams]
    else:
        _warn_of_cuts(name, streams[0] + streams[1], seq_len)
        rows = [[(input_ids[:seq_len], labels[:seq_len]) for input_ids, labels in stream] for stream in streams]
    return TextData(
        name=name,
        kind=kind,
        train=TokenRows(_learnable(name, "training", rows[0], seq_len)),
        eval=TokenRows(_learnable(name, "held-out", rows[1], seq_len) if held_out else []),
        pad_token_id=tokenizer.pad_token_id,
        held_out=[_first_exchange(example) for example in held_out if not isinstance(example, str)],
        packed=packed,
    )


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]]
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` [conversations, tokens] for `model.generate`, as training rows begin.

    Shorter prompts are padded on the left, because an answer goes on from the end.
    """
    texts = [_render(tokenizer, list(messages), add_generation_prompt=True) for messages in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _split(name: str, examples: list[Example], eval_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    if eval_fraction == 0:
        return examples, []
    texts = [example for example in examples if isinstance(example, str)]  # all or none
    if texts and len(texts) * eval_fraction < 1:
        cuts = [_cut_position(text, eval_fraction) for text in texts]
        heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
        tails = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        return [head for head in heads if head.strip()], [tail for tail in tails if tail.strip()]
    if len(examples) == 1:
        raise ValueError(f"dataset={name!r}: one row cannot be split; add rows, or set eval_fraction=0.")
    num_held_out = min(max(1, round(len(examples) * eval_fraction)), len(examples) - 1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:num_held_out])
    return (
        [example for index, example in enumerate(examples) if index not in held_out],
        [example for index, example in enumerate(examples) if index in held_out],
    )


def _cut_position(text: str, eval_fraction: float) -> int:
    """Where the held-out end of a document begins: after a line end if there is one before."""
    target = max(1, int(len(text) * (1 - eval_fraction)))
    return text.rfind("\n", 0, target) + 1 or target


def _tokenise(examples: list[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 512) -> Iterator[Row]:
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        if isinstance(batch[0], str):
            # The tokenizer's own special tokens open a document, as in its pretraining; eos closes it.
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
                ids = torch.tensor(ids if ids[-1:] == end else ids + end, dtype=torch.int32)
                yield ids, ids
        else:
            yield from _tokenise_conversations([part for part in batch if not isinstance(part, str)], tokenizer)


def _tokenise_conversations(batch: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    # Prompt and answer are tokenised apart, so that a training prompt has the very tokens that generation starts from.
    pieces = [_pieces(messages, tokenizer) for messages in batch]
    texts = [text for conversation in pieces for text, _ in conversation]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    for conversation in pieces:
        input_ids: list[int] = []
        labels: list[int] = []
        for _, is_answer in conversation:
            ids = next(encoded)
            input_ids += ids
            labels += ids if is_answer else [IGNORED] * len(ids)
        yield torch.tensor(input_ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32)


def _pieces(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Cut a rendered conversation into (text, is it an answer) pieces.

    An answer ends with eos where the template writes one. Some templates render an earlier answer differently once a
    later turn follows (reasoning is stripped): such an answer is context only; the last one must be found.
    """
    whole = _render(tokenizer, messages)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], add_generation_prompt=True)
        through = whole if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
        if not (whole.startswith(before) and whole.startswith(through)):
            continue
        end = len(through)
        if tokenizer.eos_token and (eos := whole.rfind(tokenizer.eos_token, len(before), end)) >= 0:
            end = eos + len(tokenizer.eos_token)
        pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    if not pieces:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template renders a prompt differently once the answer "
            "follows, so the answer cannot be told apart; use another template, or rows with a text column."
        )
    return [*pieces, (whole[done:], False)]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    rendered = tokenizer.apply_chat_template(
        messages,
        chat_template=tokenizer.chat_template or _PLAIN_TEMPLATE,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    assert isinstance(rendered, str)
    return rendered


def _full_rows(name: str, stream: list[Row], seq_len: int) -> list[Row]:
    """Documents end to end in rows of `seq_len` tokens; the rest that fills no row is dropped."""
    num_tokens = sum(len(input_ids) for input_ids, *_ in stream)
    if num_tokens < seq_len:
        raise ValueError(
            f"dataset={name!r}: its {num_tokens} training tokens do not fill one packed row of seq_len={seq_len}; "
            "lower seq_len, bring more text, or do not pack."
        )
    return [row for row in pack_cut(stream, seq_len) if len(row[0]) == seq_len]


def _learnable(name: str, part: str, rows: list[Row], seq_len: int) -> list[Row]:
    """Drop rows without a target: their mean loss would be 0 / 0."""
    # The first token of a row is predicted from nothing.
    kept = [row for row in rows if (row[1][1:] != IGNORED).any()]
    if not kept:
        raise ValueError(
            f"dataset={name!r}: no {part} example has a token to learn among its first seq_len={seq_len}: the prompts "
            "fill them, or the texts are empty; raise seq_len or check the data."
        )
    return kept


def _warn_of_cuts(name: str, stream: list[Row], seq_len: int) -> None:
    num_cut = sum(len(input_ids) > seq_len for input_ids, *_ in stream)
    if num_cut and os.environ.get("RANK", "0") == "0":
        num_lost = sum(len(labels) > seq_len and not bool((labels[1:seq_len] != IGNORED).any()) for _, labels in stream)
        warnings.warn(
            f"dataset={name!r}: {num_cut} of {len(stream)} examples are longer than seq_len={seq_len} and were cut, "
            f"{num_lost} of them dropped because their answer begins later; raise seq_len to keep them whole.",
            stacklevel=3,
        )


def _first_exchange(messages: list[dict[str, str]]) -> Exchange:
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return Exchange(messages[:first], messages[first]["content"])
