"""README and docs say what is true: examples run, links lead somewhere, figures are those of the results files."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hift_ds.config import docs

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "ds_configs/README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {ROOT / "docs/keys.md"}
RESULTS = ROOT / "launch/results/2026-11-26_gpu_h100"
H200 = ROOT / "launch/results/2026-11-27_gpu_h200"
# masters and moments, rows x tokens -> file
RUNS = {
    ("fp32, fp32 (exact AdamW)", "1 x 1024"): "bf16_1x1024_22gib",
    ("16-bit remainders, 8 bits", "1 x 1024"): "bf16_1x1024_22gib_split16_int8",
    ("fp32, fp32 (exact AdamW)", "6 x 512"): "bf16_6x512_46gib",
    ("the weights, fp32", "1 x 512"): "fp32_1x512_46gib",
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def rows_of(page):
    """The cells of its tables' rows, without emphasis."""
    rows = [line.split("|")[1:-1] for line in text_of(page).splitlines() if line.startswith("|")]
    return [[cell.strip().replace("**", "") for cell in cells] for cells in rows]


def code_of(page, language):
    return re.search(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL).group(1)


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_quickstart_runs_on_a_cpu_and_rotates_through_every_block_twice(tmp_path):
    script = tmp_path / "quickstart.py"
    check = "\nassert engine.hift.cycle == 2 and engine.hift.active_block == 0\nprint('done')\n"
    script.write_text(code_of(README, "python") + check)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip().endswith("done") and "blocks, cycle 0" in run.stdout


def test_the_diff_has_five_lines_and_makes_the_quickstart():
    lines = code_of(README, "diff").splitlines()
    changed = [line for line in lines if line[0] in "+-"]
    assert len(changed) == 5
    script = [line.strip() for line in code_of(README, "python").splitlines()]
    assert all(line[1:].strip() in script for line in lines if line[0] != "-")
    before = [line[1:].replace("deepspeed", "hift_ds") for line in changed if line[0] == "-"]
    assert before == [line[1:] for line in changed if line[0] == "+"][:2]


def test_readme_is_one_screen_and_a_half():
    assert len(text_of(README).splitlines()) <= 120


def test_the_page_of_keys_is_what_make_docs_writes():
    assert text_of(ROOT / "docs/keys.md") == docs.page(), "run: make docs"


def test_every_page_of_docs_is_in_readme_and_begins_with_a_question():
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"(docs/{page.name})" in text_of(README), page.name
        assert page in GENERATED or re.match(r"# [^\n]+\?\n", text_of(page)), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text_of(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_machine_paths(page):
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/", text_of(page))


def test_every_named_command_and_file_exists():
    prose = "\n".join(map(text_of, PAGES))
    targets = set(re.findall(r"^([\w-]+):(?!=)", text_of(ROOT / "Makefile"), re.MULTILINE)) | {"docs"}
    assert set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)\b", prose, re.MULTILINE)) <= targets
    named = set(re.findall(r"\b((?:launch|tests|hift_ds|kernels|ds_configs)/[\w/]+\.(?:py|sh|json))\b", prose))
    missing = {path for path in named if "NAME" not in path and not (ROOT / path).exists()}
    assert missing == {"kernels/__init__.py"}  # said not to be there


def test_the_tree_of_the_house_names_every_module():
    tree = text_of(ROOT / "docs/design.md").split("## The house")[1].split("```")[1]
    for folder in ("hift_ds", "kernels/hift_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            named = re.search(rf"\b{path.name}\b", tree)
            assert named or path.name == "__init__.py" or path.parent.name == "recipes", path.relative_to(ROOT)
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert any((ROOT / folder).rglob(name) for folder in ("hift_ds", "kernels", "launch")), name


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/speed.md"])
def test_figures_of_the_gpu_are_those_of_the_results_files(page):
    found = 0
    for cells in rows_of(ROOT / page):
        for (state, shape), name in RUNS.items():
            if state in cells and shape in cells:
                run, found = json.loads((RESULTS / f"{name}.json").read_text()), found + 1
                assert cells[-1] == f"{run['tokens_per_s']:,.0f}"
                assert cells[-2].startswith(f"{run['step_ms']['p50']:.0f} ms")
                if page != "docs/speed.md":
                    assert f"{run['measured']['allocated'] / 2**30:.2f}" in cells
    assert found >= 3


def test_figures_of_8b_on_the_h200_are_those_of_the_results_files():
    runs = {path.stem[15:]: json.loads(path.read_text()) for path in H200.glob("llama31*.json")}
    step = {name: f"{run['step_ms']['p50']:,.0f} ms" for name, run in runs.items()}
    peak = {name: f"{run['measured']['allocated'] / 2**30:.2f} GiB" for name, run in runs.items()}
    tokens = {name: f"{run['tokens_per_s']:,.0f}" for name, run in runs.items()}
    first, speed = rows_of(README), rows_of(ROOT / "docs/speed.md")
    compact = "16-bit remainders, 8 bits"
    for name, state, compiled in (
        ("whole_exact", "fp32, fp32", "no"), ("whole_int8", compact, "no"), ("whole_compiled", compact, "yes"),
        ("whole_compiled_256", compact, "yes"), ("layer_exact", "fp32, fp32", "no"), ("layer_int8", compact, "no"),
        ("layer_compiled", "fp32, fp32", "yes"),
    ):  # fmt: skip
        block = "all, loss in tiles of 256 MiB" if name.endswith("256") else "all"
        times = [f"{runs[name]['trace'][key]:,.0f} ms" for key in ("kernels_ms", "exposed_copies_ms")]
        if name.startswith("layer"):
            block, times = "a layer", ["", ""]  # the trace is of some of its blocks
        assert [block, state, compiled, step[name], tokens[name], *times] in [row[:-1] for row in speed], name
    for name in ("layer_exact", "whole_exact", "whole_int8", "whole_compiled_256"):
        assert [peak[name], tokens[name]] in [row[2:] for row in first], name
    ratio = {name: runs["eight_full"]["step_ms"]["p50"] / run["step_ms"]["p50"] for name, run in runs.items()}
    for method, name, places in (
        ("HiFT, a layer a block", "eight_layer", 1), ("HiFT, one block", "eight_whole", 2),
        ("full, offloaded", "eight_offload", 2),
    ):  # fmt: skip
        assert any(
            row[0].startswith(method) and row[1:] == [step[name], f"{ratio[name]:.{places}f}", peak[name]]
            for row in speed
        ), name
    faster = runs["eight_whole"]["tokens_per_s"] / runs["eight_offload"]["tokens_per_s"]
    assert f"{faster:.1f} times" in text_of(README).split("ZeRO-Offload")[0]


def test_modelled_steps_are_those_of_the_results_file():
    with open(ROOT / "launch/results/2026-11-27_steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cards = {"RTX 4090": "rtx4090", "A6000": "a6000", "H200": "h200"}
    forms = {"fp32, fp32": ("fp32", "fp32"), "16-bit remainders, 8 bits": ("split16", "int8")}
    found = 0
    for cells in rows_of(ROOT / "docs/choosing.md"):
        if cells[0] in cards:
            card, block, form, kept, compiled, tile, peak, step, exposed, tokens = cells
            key = (cards[card], "1" if block == "all" else "34", *forms[form], kept, compiled, tile.split()[0])
            names = ("card", "blocks", "master", "moments", "keep_layers", "compiled", "tile_mib")
            (row,) = (row for row in rows if tuple(row[name] for name in names) == key)
            assert (peak, step, exposed) == (f"{row['peak_gib']} GiB", f"{row['step_s']} s", f"{row['exposed_s']} s")
            assert int(tokens.replace(",", "")) == int(row["tokens_per_s"])
            found += 1
    assert found >= 10


def test_forecasts_are_those_of_the_results_files():
    plans = [json.loads(path.read_text()) for path in (ROOT / "launch/results/2026-11-26_plans").glob("*.json")]
    made = {(f"{plan['peak'] / 2**30:.2f}", f"{plan['full_fine_tuning']['peak'] / 2**30:.2f}") for plan in plans}
    table = text_of(ROOT / "docs/memory.md").split("## Forecast")[1].split("###")[0]
    rows = re.findall(r"\| \**([\d.]+)\** \((-\d+) %\) \| ([\d.]+) \|$", table, re.MULTILINE)
    assert {(hift, full) for hift, _, full in rows} == made
    assert all(round(100 * (float(hift) / float(full) - 1)) == int(less) for hift, less, full in rows)


def test_the_two_savings_of_the_sample_model_are_those_of_their_files():
    page = text_of(ROOT / "docs/memory.md")
    counted = json.loads((ROOT / "launch/results/2026-11-22_demo.json").read_text())
    if "bytes_per_rank" in counted:
        hift, full = (
            sum(counted["bytes_per_rank"][method][role] for role in ("weights", "gradients", "state")) / 2**20
            for method in ("hift", "full")
        )
        assert f"| **{hift:,.1f}** | **{full:,.1f}** | **{100 * (hift / full - 1):.0f} %** |" in page
    table = text_of(ROOT / "launch/results/2026-11-22_compare_cpu/results.md")
    full, hift = (re.search(rf"^\| {m} \| 2 \| bf16 \| ([\d,.]+) \|", table, re.MULTILINE)[1] for m in ("full", "hift"))
    less = 100 * (float(hift.replace(",", "")) / float(full.replace(",", "")) - 1)
    assert f"| **{hift}** | **{full}** | **{less:.0f} %** |" in page


def test_numbers_of_the_sample_data_are_those_of_the_files():
    data = ROOT / "hift_ds/recipes/data"
    train, held_out = (len(text_of(data / f"hift_faq_{part}.jsonl").splitlines()) for part in ("train", "eval"))
    sentence = f"{train} questions and answers about this tool (and {held_out} held out)"
    assert sentence in text_of(ROOT / "docs/running.md")
    train, held_out = (len(text_of(data / f"hift_facts_{part}.jsonl").splitlines()) for part in ("train", "eval"))
    assert f"{train} questions with short answers (and {held_out} held out)" in text_of(ROOT / "docs/running.md")


def test_hooks_are_local_and_those_of_the_environment():
    (repo,) = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(f".venv/bin/{hook['id']}")
