"""What the comparison of quality compares: methods, tasks, and how much is run. Nothing imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from hift_ds.config.keys import FRESH
from hift_ds.recipes.samples import MINILM, SAMPLE


@dataclass(frozen=True)
class Method:
    """A contestant.

    Attributes:
        kind: "full", "hift", "lora" or "last" (the last layer and the head).
        places_above: Of its middle rate on the ladder, over full fine-tuning's.
        layers_per_block: HiFT's m.
        always_active: HiFT's key: what it trains at every step.
        rank: LoRA's r.
    """

    name: str
    label: str
    kind: str
    places_above: int = 0
    layers_per_block: int | None = None
    always_active: str | tuple[str, ...] | None = None
    rank: int | None = None


# HiFT's best rate lies between full fine-tuning's and that times the root of the number of blocks.
METHODS = {
    method.name: method
    for method in (
        Method("full", "full fine-tuning", "full"),
        Method("hift_m1", "HiFT, m = 1", "hift", 1, 1, FRESH),
        Method("hift_m2", "HiFT, m = 2", "hift", 1, 2, FRESH),
        Method("hift_m4", "HiFT, m = 4", "hift", 0, 4, FRESH),
        Method("hift_m1_classifier", "HiFT, m = 1, pooler in turn", "hift", 1, 1, ("^classifier",)),
        Method("hift_m1_head_in_turn", "HiFT, m = 1, head in turn", "hift", 1, 1, ()),
        Method("hift_m2_head_in_turn", "HiFT, m = 2, head in turn", "hift", 1, 2, ()),
        Method("hift_m4_head_in_turn", "HiFT, m = 4, head in turn", "hift", 0, 4, ()),
        Method("lora_r8", "LoRA, r = 8", "lora", 2, rank=8),
        Method("lora_r16", "LoRA, r = 16", "lora", 2, rank=16),
        Method("last_layer", "last layer and head", "last", 2),
    )
}


@dataclass(frozen=True)
class Task:
    """What is learnt, and how long.

    Attributes:
        counts: The metric that counts: "accuracy" or "loss".
        middle_place: Of full fine-tuning's grid, on the ladder of rates.
        max_tokens: Of a row; longer ones are cut.
        fresh_head: The checkpoint does not hold the head.
        last: Regexes of the last layer and the head.
        files: Of training rows, of test rows, and of a text that is not trained on (or "").
    """

    name: str
    model: str
    counts: str
    steps: int
    micro_batch: int
    max_tokens: int
    middle_place: int
    fresh_head: bool
    last: tuple[str, ...]
    files: tuple[str, str, str]
    num_validation: int = 500
    num_test: int = 1000

    @property
    def recipe(self) -> dict[str, Any]:
        """What of it is a setting of every run."""
        names = ("model", "micro_batch", "max_tokens", "num_validation", "num_test")
        return {**{name: value for name, value in asdict(self).items() if name in names}, "optimizer": OPTIMIZER}


OPTIMIZER: dict[str, Any] = {
    "name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "warmup": 0.1,
    "schedule": "cosine to a tenth", "dtype": "fp32",
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "model": MINILM, "counts": "accuracy", "micro_batch": 16, "max_tokens": 64, "middle_place": -7,
    "fresh_head": True, "last": ("^classifier", "pooler", r"layer\.5\."),
}  # fmt: skip
TASKS = {
    task.name: task
    for task in (
        Task("banking77", steps=240, files=("banking77_train.csv", "banking77_test.csv", ""), **_ENCODER),
        Task("sst2", steps=160, files=("sst2_train.tsv", "sst2_test.tsv", ""), **_ENCODER),
        Task(
            "gsm8k", SAMPLE, "loss", 62, 2, 192, -8, False, (r"layers\.29\.", r"model\.norm"),
            ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "tinyshakespeare.txt"), num_validation=32, num_test=64,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        num_rates: Of the grid that each method begins with.
        num_extensions: How often a grid may grow by one rate where its best is at its edge.
    """

    methods: Sequence[str] = tuple(METHODS)
    seeds: Sequence[int] = (0, 1, 2)
    num_rates: int = 3
    num_extensions: int = 3
    budgets: Sequence[str] = ("steps", "seconds")

    def check(self) -> None:
        """Raises ValueError for a plan that would fail after hours."""
        lora = [name for name in self.methods if METHODS[name].kind == "lora"]
        if lora and not find_spec("peft"):
            raise ValueError(f"--methods {lora[0]}: needs peft; pip install peft, or leave out LoRA")
        if "seconds" in self.budgets and "full" not in self.methods:
            raise ValueError("--budgets seconds: are those of full fine-tuning; add full to --methods, or leave it out")
