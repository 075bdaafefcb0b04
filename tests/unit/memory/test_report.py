"""The table, the JSON, the picture and the sentence of plans made by hand."""

import io
import json
from dataclasses import replace

import pytest
from matplotlib import image
from rich.console import Console
from rich.text import Text

from hift_ds.memory.advice import Advice, Change
from hift_ds.memory.figures import Figures, Forecast
from hift_ds.memory.report import CARDS, ROLES, _alike, plot, render, to_json, verdict
from hift_ds.memory.request import RESERVE_BYTES, Request

GIB = 1 << 30
HEADERS = ("block", "weights", "gradients", "state", "activations", "peak", "phase")


def figures(name, numel, scale, phase="backward", **changed):
    """Roles of 1, 2, 3 and 4 times `scale` bytes."""
    made = Figures(name, numel, scale, 3 * scale, 2 * scale, 4 * scale, phase, 5 * scale, 6 * scale, 7 * scale, scale)
    return replace(made, **changed)


def request_of(**keywords):
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "hift": {"enabled": True},
    }
    return Request(config, 512, **keywords)


def plan_of(scale=GIB, layers=3, numel=10**6, name="model.layers", **keywords):
    blocks = [figures("model.embed_tokens", numel // 2, scale // 2)]
    blocks += [figures(f"{name}.{i}", numel, scale - i * (scale // 200)) for i in range(layers)]
    blocks.append(figures("norm+lm_head", numel // 2, scale // 4, phase="update"))
    full = figures("full fine-tuning", sum(block.numel for block in blocks), 20 * scale)
    return Forecast(request_of(**keywords), "LlamaForCausalLM", tuple(blocks), full, 5 * scale, 6 * scale)


def shown(forecast, advice=None, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, emoji=False).print(render(forecast, advice))
    return stream.getvalue()


def plain(markup):
    return Text.from_markup(markup).plain


SIZES = {
    "tiny": dict(scale=1000, layers=3, numel=1000),
    "70B": dict(scale=60 * GIB, layers=80, numel=856_000_000, gpus=8, nodes=16, checkpointing=True,
                gpu_memory=80 * GIB, host_memory=2000 * GIB),
    "more than 1,000 GiB": dict(scale=110 * GIB, layers=80, numel=856_000_000),
    "long names": dict(layers=40, name="model.language_model.transformer.decoder.layers"),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_table_fits_80_columns_and_cuts_no_header_and_no_number(size):
    forecast = plan_of(**SIZES[size])
    change = Change('ZeRO stage 3 with "offload_param": {"device": "cpu"}', "weights cross the bus")
    for advice in (None, Advice((), None), Advice((change,), forecast)):
        text = shown(forecast, advice)
        assert max(map(len, text.splitlines())) <= 80
        header = next(line for line in text.splitlines() if "activations" in line and "block" in line)
        assert header.split() == list(HEADERS)
        compared = next(line for line in text.splitlines() if "full fine-tuning" in line and "HiFT" in line)
        assert compared.split() == ["HiFT", "full", "fine-tuning"]
        cut = [line for line in text.splitlines() if "…" in line]
        assert all(line.index("…") < 22 for line in cut), "only names of blocks may be cut"
    for number in (forecast.worst.peak, forecast.full.peak, forecast.full.activations):
        assert f"{number / GIB:,.2f}" in text


def test_table_shows_gib_of_each_role_and_of_the_sum():
    lines = shown(plan_of()).splitlines()
    row = next(line for line in lines if "layers.0" in line)
    assert row.split()[-6:] == ["1.00", "2.00", "3.00", "4.00", "10.00", "backward"]
    assert row.startswith("> "), "the worst block is marked"
    assert sum(line.startswith("> ") for line in lines) == 1


def test_full_fine_tuning_stands_beside_the_worst_block():
    text = shown(plan_of(gpus=2))
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert rows["device, at the peak"][-4:] == ["10.00", "(-95", "%)", "200.00"]
    assert rows["host, pinned"][-2:] == ["5.00", "6.00"]
    assert rows["host, of a node"][-2:] == ["10.00", "12.00"]
    assert rows["collectives, a step"][-1] == "20.00"
    assert "host, of a node" not in shown(plan_of())


def test_a_plan_that_takes_more_than_full_fine_tuning_says_so():
    forecast = plan_of()
    assert "(+100 %)" in shown(replace(forecast, full=figures("full", 1, GIB // 2)))


def test_heading_names_the_run():
    text = " ".join(shown(plan_of(numel=10**9, gpus=4, nodes=2, checkpointing=True)).split())
    assert "LlamaForCausalLM, 4.00 B parameters, bf16, ZeRO-3, 2 nodes of 4 GPUs, activation checkpointing" in text
    assert "3 x 512 tokens a rank and micro step, 2 micro steps; 5 blocks, AdamW" in text
    assert "1 GPU" in shown(plan_of()) and "1 GPUs" not in shown(plan_of())
    assert "4,000 parameters" in shown(plan_of(numel=1000))


def blocks(*shapes):
    return [figures(f"layers.{i}", numel, scale, phase) for i, (numel, scale, phase) in enumerate(shapes)]


def test_alike_blocks_share_a_row_and_the_worst_stands_alone():
    b, u = "backward", "update"
    made = blocks((1, 5, b), (7, 9, b), (7, 8, b), (7, 7, b), (7, 6, u), (7, 5, u), (1, 2, u))
    assert _alike(made) == [(0, 0), (1, 1), (2, 3), (4, 5), (6, 6)]
    assert _alike(blocks((7, 1, b), (7, 2, b), (7, 9, b))) == [(0, 1), (2, 2)]
    assert _alike(blocks((7, 1, b), (7, 9, b), (7, 2, b))) == [(0, 0), (1, 1), (2, 2)]
    assert _alike(blocks((7, 1, b))) == [(0, 0)]


def test_of_alike_blocks_the_highest_is_shown():
    made = tuple(blocks((1, 9 * GIB, "backward"), *((7, scale * GIB, "update") for scale in (1, 3, 2))))
    row = next(line for line in shown(replace(plan_of(), blocks=made)).splitlines() if "layers.1 to 3" in line)
    assert row.split()[-2:] == ["30.00", "update"]


# The sentence.


def test_verdict_without_a_card_names_the_smallest_that_holds_it():
    forecast = plan_of(scale=GIB)  # 10 GiB and the reserve of 1
    assert plain(verdict(forecast)) == (
        "needs 11.00 GiB a card (1.00 GiB of it is an allowance for CUDA itself and gaps): a card of 12 GiB holds it"
    )
    worst = max(CARDS)
    assert f"a card of {worst} GiB holds it" in verdict(plan_of(scale=(worst - 1) * GIB // 10))
    assert "no single common card holds it" in verdict(plan_of(scale=(worst - 1) * GIB // 10 + 1))


def test_verdict_with_a_card_says_whether_it_fits():
    need = 10 * GIB + RESERVE_BYTES
    allowance = "(1.00 GiB of it is an allowance for CUDA itself and gaps)"
    assert plain(verdict(plan_of(gpu_memory=need))) == f"fits: needs 11.00 GiB of 11.00 GiB {allowance}"
    assert plain(verdict(plan_of(gpu_memory=8 * GIB))) == f"does not fit: needs 11.00 GiB of 8.00 GiB {allowance}"


def test_verdict_with_a_node_counts_all_its_ranks():
    fits, not_fits = (plain(verdict(plan_of(gpus=2, host_memory=size * GIB))) for size in (10, 9))
    assert fits.endswith("; host fits: 10.00 GiB of 10.00 GiB a node")
    assert not_fits.endswith("; host does not fit: 10.00 GiB of 9.00 GiB a node")


def test_advice_says_what_it_costs_and_what_comes_of_it():
    forecast = plan_of(gpu_memory=8 * GIB)
    better = replace(plan_of(scale=GIB // 2, gpu_memory=8 * GIB))
    change = Change("a smaller thing", "a little")
    one = " ".join(shown(forecast, Advice((change,), better)).split())
    assert "The cheapest change that makes it fit: - a smaller thing (costs: a little)" in one
    assert "then: fits: needs 6.00 GiB of 8.00 GiB" in one
    two = shown(forecast, Advice((change, change), better))
    assert "The cheapest changes that fit:" in two and two.count("a smaller thing") == 2
    assert "No change that is known here makes it fit" in shown(forecast, Advice((), None))


def test_what_is_said_of_a_plan_is_not_read_as_markup():
    bracketed = Change('"hift": ["a"]', "none")
    assert '"hift": ["a"]' in shown(plan_of(gpu_memory=1), Advice((bracketed,), plan_of()))


# JSON.


def test_json_is_valid_and_its_bytes_add_up():
    forecast = plan_of(gpus=2, gpu_memory=8 * GIB)
    paper = {"full, fp32": {"para": 1, "gra": 2, "sta": 3}}
    found = json.loads(json.dumps(to_json(forecast, None, paper), allow_nan=False))
    assert len(found["blocks"]) == len(forecast.blocks)
    for block in [*found["blocks"], found["full_fine_tuning"]]:
        assert block["peak"] == sum(block[role] for role in ROLES)
    assert found["peak"] == max(block["peak"] for block in found["blocks"]) == 10 * GIB
    assert found["worst_block"] == "model.layers.0"
    assert found["parameters"] == found["full_fine_tuning"]["numel"] == sum(b["numel"] for b in found["blocks"])
    assert (found["host_per_rank"], found["host_per_node"]) == (5 * GIB, 10 * GIB)
    assert found["full_fine_tuning"]["host_per_rank"] == 6 * GIB
    assert found["reserve"] == RESERVE_BYTES
    assert found["fits"] is False and found["as_the_paper_counts"] == paper
    assert found["config"] == forecast.request.ds_config
    request = found["request"]
    assert (request["stage"], request["precision"], request["micro_batch"], request["seq"]) == (3, "bf16", 3, 512)
    assert "cheapest_change" not in found


def test_json_has_the_advice_there_is():
    forecast, better = plan_of(gpu_memory=8 * GIB), plan_of(scale=GIB // 2)
    change = Change("a smaller thing", "a little")
    found = to_json(forecast, Advice((change,), better), {})
    assert found["cheapest_change"] == [{"what": "a smaller thing", "cost": "a little"}]
    assert found["peak_after_change"] == better.worst.peak
    nothing = json.loads(json.dumps(to_json(forecast, Advice((), None), {})))
    assert (nothing["cheapest_change"], nothing["peak_after_change"]) == ([], None)
    assert to_json(plan_of(), None, {})["fits"] is None


# The picture.


@pytest.mark.parametrize("keywords", [{}, {"layers": 80, "gpu_memory": 24 * GIB}], ids=["few", "many and a card"])
def test_plot_writes_a_picture_into_a_new_folder(tmp_path, keywords):
    path = tmp_path / "new" / "plan.png"
    plot(plan_of(**keywords), path)
    pixels = image.imread(path)
    assert pixels.shape[:2] == (750, 1500)
    colours = {tuple(pixel) for pixel in (255 * pixels[::3, ::3, :3]).round().astype(int).reshape(-1, 3)}
    roles = [(0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52), (0x55, 0xA8, 0x68), (0x81, 0x72, 0xB3)]
    assert set(roles) <= colours, "every role has a bar"
