"""The examples: short, and each runs to its last line on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hift_testing.selection import slow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
LAST = {
    "trainer_causal_lm": "held-out loss ", "sft_chat": "held-out loss ", "classifier": "right on held-out questions: ",
    "dpo": "the right answer is preferred in ",
}  # fmt: skip
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def model_of(folder, example):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<eos>", "<unk>"]
    core = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(special + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    ).save_pretrained(folder)
    shape = {"vocab_size": len(special + alphabet), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, **SIZE}
    model = BertModel(BertConfig(**shape)) if example == "classifier" else LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(folder)
    return folder


def test_each_example_is_under_60_lines_and_is_tested():
    assert EXAMPLES.keys() == LAST.keys()
    assert {name for name, path in EXAMPLES.items() if len(path.read_text().splitlines()) >= 60} == set()


@pytest.mark.parametrize(
    ("name", "stage"), [slow("classifier", 0), slow("sft_chat", 2), slow("trainer_causal_lm", 2), slow("dpo", 0)]
)
def test_an_example_runs_to_its_last_line(name, stage, tmp_path):
    own = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    own |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(EXAMPLES[name]), "--model", str(model_of(tmp_path / "model", name)), "--stage",
               str(stage), "--max_steps", "3", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    found = subprocess.run(command, env=own, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith(LAST[name])
    assert "HiFT trains this" in found.stderr
