"""`hift-ds export`: the weights of a checkpoint of any ranks and stage, as transformers load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.runtime import constants
from deepspeed.utils import safe_get_full_fp32_param
from hift_testing.parity import build
from hift_testing.selection import slow
from hift_testing.training import batch_of, ds_config, engine_of, run_steps, small_llama, whole_weights

from hift_ds import cli
from hift_ds.checkpoint.export import export

pytestmark = pytest.mark.multi_rank
SPLIT = {"kernel": "triton", "state": {"master": "split16"}}


def trained(folder: str, stage: int, dtype: str, hift: dict[str, Any], tied: bool) -> Any:
    """Weights, masters and logits of a run that is saved."""
    engine = engine_of(ds_config(stage, dtype, hift), small_llama(tied=tied))
    run_steps(engine, 7)
    engine.save_checkpoint(folder)
    weights = whole_weights(engine)
    masters = {
        name: safe_get_full_fp32_param(param).clone() for name, param in engine.module.named_parameters()
        if not name.startswith("model.layers.1.mlp.up")
    }  # fmt: skip
    with torch.no_grad():
        return weights, masters, engine(**batch_of(50, 0, 0)).logits


def exported(folder: Path, out: Path, *options: str) -> transformers.PreTrainedModel:
    assert cli.main(["export", str(folder), str(out), *options]) == 0
    return transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")


@pytest.mark.parametrize(
    ("stage", "dtype", "hift", "tied"),
    [
        (0, "fp32", {}, False), (2, "bf16", {"always_active": ["norm"]}, True), (3, "bf16", SPLIT, False),
        slow(1, "bf16", SPLIT, True), slow(3, "fp32", {}, True),
    ],
)  # fmt: skip
def test_an_exported_folder_has_the_run_s_weights_and_logits_and_its_masters_in_fp32(
    two_ranks, tmp_path, stage, dtype, hift, tied
):
    hift = {**hift, "frozen": ["layers.1.mlp.up"]}
    weights, masters, logits = two_ranks.run(trained, str(tmp_path / "saved"), stage, dtype, hift, tied)[0]
    model = exported(tmp_path / "saved", tmp_path / "own")
    assert {n: w for n, w in model.named_parameters() if not torch.equal(w, weights[n])} == {}
    with torch.no_grad():
        if dtype == "fp32" or hasattr(constants, "BUFFER_DTYPE"):  # DeepSpeed 0.18 casts the run's buffers, too
            assert torch.equal(model(**batch_of(50, 0, 0)).logits, logits)
    model = exported(tmp_path / "saved" / "global_step7", tmp_path / "wide", "--dtype", "fp32")
    found = dict(model.named_parameters())
    assert next(iter(found.values())).dtype == torch.float32
    assert [name for name, master in masters.items() if not torch.equal(found[name], master)] == []


def one_save(folder: str) -> None:
    engine = engine_of(ds_config(3, "bf16", {}), build("bert"))
    engine.save_checkpoint(folder)


def test_shards_have_an_index_and_no_name_is_lost(two_ranks, tmp_path):
    two_ranks.run(trained, str(tmp_path / "saved"), 3, "bf16", {"frozen": ["layers.1.mlp.up"]}, False)
    written = export(tmp_path / "saved", tmp_path / "out", shard_bytes=20_000)
    assert len(written) > 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in written if path.suffix == ".safetensors"}
    whole = exported(tmp_path / "saved", tmp_path / "whole").state_dict()
    sharded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert whole.keys() == sharded.keys() <= index.keys()
    assert [name for name in whole if not torch.equal(whole[name], sharded[name])] == []


def test_what_cannot_be_exported_is_one_sentence(two_ranks, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has neither hift.json nor latest" in capsys.readouterr().err.replace("\n", " ")
    two_ranks.run(one_save, str(tmp_path / "saved"))
    path = next((tmp_path / "saved/global_step0").glob("hift_rank_1_block_0*"))
    path.write_bytes(path.read_bytes()[:-8])
    assert cli.main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 2
    assert f"{path.name}' has" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", str(tmp_path / "saved"), str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
