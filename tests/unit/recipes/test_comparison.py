"""The matrix of a comparison, its configs, rows and tables, and its pictures."""

import csv
import sys

import pytest
from matplotlib.image import imread

from hift_ds.config.keys import HiFTConfig
from hift_ds.config.optimizers import rule_from_config
from hift_ds.recipes.comparison import (
    COLUMNS,
    Cell,
    Matrix,
    config_of,
    flat_row,
    in_rounds,
    markdown,
    signature,
    write_tables,
)  # fmt: skip
from hift_ds.recipes.pictures import draw_all, labels_of
from launch import compare

BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.01}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "hift": {"enabled": True, "seed": 7},
}
FULL = Cell("full", 2, "bf16", 2, "AdamW", False, 64)
HIFT = Cell("hift", 3, "fp32", 2, "AdamW", True, 64, 4, "random", 8)


def result(of_allocator=None, **more):
    """Of a CPU; `of_allocator` is what a CUDA device measures besides."""
    nothing = dict.fromkeys(("active", "reserved", "requested"))
    measured = {"allocated": 3 << 20, **(of_allocator or nothing), "weights": 1 << 20, "gradients": 0, "state": 1 << 20,
                "activations": 1 << 20, "other": 0, "how": "tensors counted on a CPU: not GPU memory"}  # fmt: skip
    return {
        "status": "ok", "ranks": 2, "measured": measured, "forecast": {"peak": 3 << 20}, "loss": [4.0, 3.0, 2.0],
        "held_out_loss": [4.5, 2.5], "tokens_per_s": 123.456, "timed_cycles": 2, "timed_steps": 6,
        "step_ms": {"p20": 9.0, "p50": 10.0, "p80": 12.0}, "cycles": {"steps": 3},
        "versions": {"python": "3", "torch": "2", "deepspeed": "0", "transformers": "5"}, "date": "2026-11-22", **more,
    }  # fmt: skip


def test_every_combination_is_one_cell_and_full_fine_tuning_has_no_blocks():
    cells = Matrix(gpus=(1, 2), layers_per_block=(1, 4), orders=("bottom2up", "random"), steps_per_block=(1, 8)).cells()
    full = [cell for cell in cells if cell.method == "full"]
    assert len(full) == 4 * 3 * 2 and len(cells) == len(full) * (1 + 8)
    assert all(cell.order is None and cell.layers_per_block is None for cell in full)
    assert len({cell.name for cell in cells}) == len(cells) == len(set(cells))


def test_in_rounds_what_is_compared_takes_turns_and_every_cell_has_each_round_once():
    cells = Matrix(methods=("hift", "full"), stages=(0, 2), precisions=("bf16",), layers_per_block=(1, 4)).cells()
    runs = in_rounds(cells, 2)
    assert [(cell.method, cell.layers_per_block, cell.stage, number) for cell, number in runs] == [
        (method, blocks, stage, number)
        for stage in (0, 2) for number in (1, 2) for method, blocks in (("hift", 1), ("hift", 4), ("full", None))
    ]  # fmt: skip
    assert in_rounds(cells, 1) == [(cell, 1) for cell in cells]


def test_a_cell_s_config_has_its_stage_precision_and_blocks_and_leaves_the_base_alone():
    before = repr(BASE)
    config = config_of(HIFT, BASE)
    assert repr(BASE) == before
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert "bf16" not in config and "fp16" not in config
    section = HiFTConfig.from_ds_config(config)
    assert (section.layers_per_block, section.order, section.steps_per_block, section.seed) == (4, "random", 8, 7)
    assert config_of(Cell("full", 0, "fp16", 1, "AdamW", False, 64), BASE)["fp16"]["enabled"]


def test_full_fine_tuning_is_given_torchs_fused_adamw_whose_update_takes_no_memory_of_its_own():
    params = config_of(FULL, BASE)["optimizer"]["params"]
    assert params["torch_adam"] and params["fused"]


def test_full_fine_tuning_offloaded_has_deepspeeds_adam_on_the_host_and_no_cell_without_zero():
    cells = Matrix(methods=("full", "offload"), stages=(0, 2), precisions=("bf16",)).cells()
    assert [(cell.method, cell.stage) for cell in cells] == [("full", 0), ("full", 2), ("offload", 2)]
    config = config_of(cells[-1], {**BASE, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}})
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["optimizer"]["params"] == {"lr": 1e-3}


def test_updates_in_backward_are_cells_of_their_own_beside_one_cell_of_full_fine_tuning():
    cells = Matrix(stages=(2,), precisions=("bf16",), updates=("step", "backward")).cells()
    assert [cell.update for cell in cells] == [None, "step", "backward"] and len({cell.name for cell in cells}) == 3
    assert [config_of(cell, BASE)["hift"].get("update") for cell in cells] == [None, "step", "backward"]
    assert labels_of(cells[1:]) == ["HiFT, update in step", "HiFT, update in backward"]
    assert {number for _, number in in_rounds(cells, 2)[:3]} == {1}, "they do not take turns"


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "SGDM", "Adagrad", "Adafactor", "Lion"])
def test_every_optimizer_of_the_matrix_is_one_that_the_rules_read(name):
    section = config_of(Cell("hift", 0, "fp32", 1, name, False, 64, 1, "bottom2up", 1), BASE)["optimizer"]
    rule, group = rule_from_config(section["type"], section["params"])
    assert group["lr"] == 1e-3
    assert len(rule.slots(group)) == {"AdamW": 2, "Adam": 2, "SGD": 0, "SGDM": 1, "Adagrad": 1, "Adafactor": 0,
                                      "Lion": 1}[name]  # fmt: skip


def test_a_signature_changes_with_cell_config_and_options():
    config = config_of(FULL, BASE)
    signs = {
        signature(FULL, config, []), signature(HIFT, config, []), signature(FULL, config, ["--max_steps", "3"]),
        signature(FULL, config_of(FULL, {**BASE, "gradient_clipping": 0.5}), []),
    }  # fmt: skip
    assert len(signs) == 4
    assert signature(FULL, config_of(FULL, BASE), []) in signs


def test_a_row_has_every_column_and_a_failed_cell_s_says_why():
    row = flat_row(HIFT, result())
    assert set(row) >= set(COLUMNS)
    assert (row["peak_mib"], row["forecast_mib"], row["step_ms_p50"], row["held_out_loss"]) == (3.0, 3.0, 10.0, 2.5)
    assert (row["first_loss"], row["last_loss"], row["tokens_per_s"]) == (4.0, 3.0, 123.5)
    failed = flat_row(FULL, {"status": "out of memory"})
    assert failed["status"] == "out of memory" and failed["peak_mib"] is None and failed["ranks"] == 2


def test_active_and_reserved_bytes_stand_beside_allocated_ones_and_not_on_a_cpu():
    on_cuda = result({"active": 4 << 20, "reserved": 6 << 20, "requested": 2 << 20})
    rows = [flat_row(FULL, on_cuda), flat_row(HIFT, result())]
    found = [(row["peak_mib"], row["active_mib"], row["reserved_mib"]) for row in rows]
    assert found == [(3.0, 4.0, 6.0), (3.0, None, None)]
    before = result()
    del before["measured"]["active"]  # a cell that an earlier version has kept
    assert flat_row(HIFT, before)["active_mib"] is None


def test_tables_show_what_differs_and_say_once_what_is_shared(tmp_path):
    rows = [flat_row(FULL, {"status": "out of memory"}), flat_row(HIFT, result())]
    write_tables(rows, tmp_path / "new", "two cells")
    written = list(csv.DictReader((tmp_path / "new" / "results.csv").open()))
    assert [row["status"] for row in written] == ["out of memory", "ok"]
    assert list(written[0]) == list(COLUMNS)
    text = (tmp_path / "new" / "results.md").read_text()
    header = text.splitlines()[2]
    assert "method" in header and "ZeRO" in header and "ranks" not in header
    assert "ranks 2" in text.splitlines()[-1]
    assert "not GPU memory" in text
    assert text == markdown(rows, "two cells")


def test_labels_name_what_differs_alone():
    assert labels_of([FULL, HIFT]) == ["full, ZeRO-2, bf16", "HiFT, ZeRO-3, fp32"]
    other = Cell("hift", 3, "fp32", 2, "AdamW", True, 64, 1, "random", 8)
    assert labels_of([HIFT, other]) == ["HiFT, m=4", "HiFT, m=1"]


def test_pictures_are_drawn_of_what_there_is_and_failed_cells_stay_in_them(tmp_path):
    none = [(FULL, {"status": "out of memory"})]
    assert draw_all(none, tmp_path) == []
    some = [*none, (HIFT, result()), (FULL, result(step_ms=None))]
    drawn = draw_all(some, tmp_path)
    assert [path.name for path in drawn] == ["memory.png", "time.png"]
    for path in drawn:
        pixels = imread(path)
        assert pixels.shape[1] == 9 * 150 and pixels.std() > 0.05


@pytest.mark.parametrize("name", sorted(compare.EXPERIMENTS))
def test_each_experiment_compares_hift_with_full_fine_tuning_under_the_same_conditions(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--experiment", name, "--gpus", "2"])
    cells = compare._matrix(compare._arguments()).cells()
    conditions = {"full": set(), "hift": set()}
    for cell in cells:
        conditions[cell.method].add((cell.stage, cell.precision, cell.gpus, cell.optimizer, cell.seq_len))
    assert conditions["full"] == conditions["hift"]
    varied = {"blocks": "layers_per_block", "rotation": "steps_per_block"}.get(name)
    if varied:
        assert len({getattr(cell, varied) for cell in cells if cell.method == "hift"}) > 2
