"""What a run shows on a terminal of 80 columns."""

import io
import re

import pytest
from rich.console import Console

from hift_ds.recipes.display import Display

LONG = "model.embed_tokens..model.layers.2.and_more_of_it"


@pytest.fixture
def display_on():
    """Rank 0's display on a terminal, or not."""

    def make(terminal):
        display = Display(0)
        display.console = Console(width=80, force_terminal=terminal, file=io.StringIO(), highlight=False)
        return display

    return make


def shown(display):
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", display.console.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]", plain) if line.strip()]


def test_a_long_block_name_gives_way_to_step_and_time(display_on):
    display = display_on(True)
    with display.progress(144, 128) as steps:
        steps.update(2.264, 1.2e-4, LONG, 140.0)
    last = shown(display)[-1]
    assert len(last) <= 80
    assert "129/144 loss 2.264 lr 1.2e-04 140 tok/s model." in last
    assert re.search(r"… (\d+:)*(--|\d\d):(--|\d\d)$", last), last


def test_a_cells_name_gives_way_and_its_figures_are_a_line_of_their_own(display_on):
    display = display_on(True)
    with display.cells(24) as cells:
        cells.start(LONG * 2)
        cells.finish("full", "ok", 2565.7, 2667.2)
    lines = shown(display)
    assert "1/24 full: 2,565.7 MiB, 2,667 ms a step" in lines
    assert "1/24" in lines[-1] and lines[-1].endswith("0:00:00") and max(map(len, lines)) <= 80


def test_without_a_terminal_the_first_and_the_last_step_have_a_line(display_on):
    display = display_on(False)
    with display.progress(3, 0) as steps:
        for _ in range(3):
            steps.update(1.0, 1e-3, "layers.0", 10.0)
    assert [line.split()[1] for line in shown(display)] == ["1/3", "3/3"]
