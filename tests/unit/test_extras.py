"""Without the extra `recipes`: training works, and what does not says in one sentence what to install."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hift_testing.selection import slow

from hift_ds import extras
from hift_ds.config import surface
from hift_ds.distributed import RANK_VARIABLES
from hift_ds.memory import report

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()

_HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
_TRAIN = """
import torch, hift_ds
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
          "zero_optimization": {"stage": 2}, "hift": {"enabled": True, "layers_per_block": None}}
before = [param.detach().clone() for param in model.parameters()]
engine, *_ = hift_ds.initialize(model=model, config=config)
for _ in range(2):
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters())]
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(HIDDEN))
print("changed", changed, "loaded", loaded, engine.hift.summary())
"""


def without_extra(code, *arguments, names=extras.RECIPES - {"filelock"}):  # which torch brings
    """The outcome of `code` in an interpreter that finds none of `names`."""
    hidden = sorted(names)
    alone = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment = {**alone, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-c", f"{_HIDE.format(names=hidden)}HIDDEN = {hidden!r}\n{code}", *arguments],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200,
    )  # fmt: skip


def listed(extra):
    """Names of the packages in a list of pyproject.toml."""
    block = re.search(rf"^{extra} = \[(.*?)\]\n", PROJECT, re.DOTALL | re.MULTILINE)[1]
    return {name.lower() for name in re.findall(r'"([\w-]+)[\[>=<;]', block)}


def test_training_needs_no_package_of_the_extra():
    result = without_extra(_TRAIN)
    assert result.returncode == 0, result.stderr
    assert "changed [True, True, True, True] loaded []" in result.stdout, result.stdout
    assert "parameters" in result.stdout


@pytest.mark.parametrize(
    "start",
    [
        slow("from hift_ds.cli import main; sys.exit(main(['plan', '--model', '/nowhere/config.json']))"),
        slow("import runpy; sys.argv = ['train.py']; runpy.run_path('launch/train.py', None, '__main__')"),
    ],
    ids=["hift-ds plan", "train.py"],
)
def test_what_needs_the_extra_says_so_in_one_sentence_and_exits_2(start):
    result = without_extra(start)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert "error: transformers: not installed" in line
    assert 'pip install "hift_ds[recipes]"' in line


def test_a_picture_alone_needs_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match="matplotlib: not installed"):
        report.plot(None, None)


def test_another_missing_module_keeps_its_own_error():
    with pytest.raises(ModuleNotFoundError, match="nosuch"), extras.needs_recipes():
        import nosuch  # noqa: F401


def test_the_list_of_the_extra_is_pyprojects():
    assert listed("recipes") == extras.RECIPES
    assert not listed("dependencies") & extras.RECIPES


def test_the_deepspeed_that_is_asked_for_is_pyprojects():
    assert f'"{surface.SUPPORTED}"' in PROJECT
