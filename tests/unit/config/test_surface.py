"""The surface of DeepSpeed that hift_ds relies on: all there, and named when it is not."""

import ast
import re
import sys
import types
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

import hift_ds
from hift_ds.config import resolve as resolving
from hift_ds.config import surface
from hift_ds.config.batch import MICRO

PACKAGE = Path(hift_ds.__file__).parent


def test_the_installed_deepspeed_has_all_of_it():
    assert surface.missing() == []
    surface.require()


@pytest.mark.parametrize(
    ("owner", "attribute", "named"),
    [
        (DeepSpeedEngine, "allreduce_gradients", "deepspeed.runtime.engine.DeepSpeedEngine.allreduce_gradients"),
        (DeepSpeedEngine, "clip_fp32_gradients", "deepspeed.runtime.engine.DeepSpeedEngine.clip_fp32_gradients"),
        (
            DeepSpeedZeRoOffload, "partition_all_parameters",
            "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload.partition_all_parameters",
        ),
        (deepspeed.comm, "reduce_scatter_tensor", "deepspeed.comm.reduce_scatter_tensor"),
        (deepspeed, "DeepSpeedEngine", "deepspeed.DeepSpeedEngine"),
    ],
)  # fmt: skip
def test_a_lacking_attribute_is_named(monkeypatch, owner, attribute, named):
    monkeypatch.delattr(owner, attribute)
    assert named in surface.missing()
    with pytest.raises(RuntimeError) as caught:
        surface.require()
    message = str(caught.value)
    assert message.startswith(f"deepspeed {deepspeed.__version__} lacks ")
    assert named in message
    assert message.endswith(f"install {surface.SUPPORTED}")


def test_a_lacking_class_is_named_once(monkeypatch):
    from deepspeed.runtime import base_optimizer

    monkeypatch.delattr(base_optimizer, "ZeROOptimizer")
    assert surface.missing() == ["deepspeed.runtime.base_optimizer.ZeROOptimizer"]


def test_a_lacking_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.fp16.loss_scaler", None)
    assert "deepspeed.runtime.fp16.loss_scaler" in surface.missing()


def test_a_module_that_only_instances_need_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.parameter_offload", None)
    found = surface.missing()
    assert "deepspeed.runtime.zero.parameter_offload" in found
    assert "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload().param_coordinator" in found


def test_an_attribute_that_instances_no_longer_set_is_named(monkeypatch):
    def bare(self):
        self._config = self.tput_timer

    monkeypatch.setattr(DeepSpeedEngine, "__init__", bare)
    found = surface.missing()
    assert "deepspeed.runtime.engine.DeepSpeedEngine().tput_timer" in found, "read, never set"
    assert "deepspeed.runtime.engine.DeepSpeedEngine()._config" not in found


def test_several_are_named_in_one_message(monkeypatch):
    monkeypatch.delattr(DeepSpeedEngine, "get_lr")
    monkeypatch.setattr(deepspeed, "ops", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops", types.ModuleType("deepspeed.ops"))
    with pytest.raises(RuntimeError, match=r"DeepSpeedEngine\.get_lr.*install"):
        surface.require()
    assert {"deepspeed.ops.__compatible_ops__", "deepspeed.runtime.engine.DeepSpeedEngine.get_lr"} <= set(
        surface.missing()
    )


def test_what_our_engine_overrides_is_in_the_surface():
    """Every method of HiFTEngine that DeepSpeed's engine also has: DeepSpeed calls it, so it must keep its name."""
    from hift_ds.engine import HiFTEngine
    from hift_ds.engine_loading import LoadingEngine
    from hift_ds.engine_saving import SavingEngine

    own = vars(HiFTEngine).keys() | vars(LoadingEngine).keys() | vars(SavingEngine).keys()
    overridden = {name for name in own if hasattr(DeepSpeedEngine, name) and not name.startswith("__")}
    named = set(surface.SURFACE["deepspeed.runtime.engine"]["DeepSpeedEngine"])
    assert overridden - named == set()


def core_trees():
    """Of the library, by dotted name under it; the planner and the scripts come by DeepSpeed's public names."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py") if "recipes" not in path.parts and "memory" not in path.parts
    }  # fmt: skip


def test_what_the_core_imports_from_deepspeed_is_in_the_surface():
    """`from deepspeed... import name`, but for modules."""
    named = {
        f"{module}.{name}" for module, owners in surface.SURFACE.items() for name in (*owners, *owners.get("", ()))
    }
    lacking = []
    for stem, tree in core_trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "deepspeed":
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                lacking += [f"{stem}: {name}" for name in full if name not in named and name not in surface.SURFACE]
    assert lacking == []


@pytest.mark.parametrize(
    ("classes", "base"),
    [
        (
            {"engine": "HiFTEngine", "engine_saving": "SavingEngine", "engine_loading": "LoadingEngine"},
            ("deepspeed.runtime.engine", "DeepSpeedEngine"),
        ),
        (
            {"zero.answers": "ReadByDeepSpeed", "zero.optimizer": "HiFTOptimizer"},
            ("deepspeed.runtime.base_optimizer", "ZeROOptimizer"),
        ),
    ],
    ids=["engine", "optimizer"],
)
def test_what_our_classes_take_from_their_base_is_in_the_surface(classes, base):
    """`self.name` of something that no class of ours defines itself."""
    trees = core_trees()
    own = [n for stem in classes for n in trees[stem].body if isinstance(n, ast.ClassDef) and n.name == classes[stem]]
    assert len(own) == len(classes)
    used, defined = set(), set()
    for node in (node for tree in own for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.AnnAssign, ast.Assign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    module, class_in_module = base
    named = set(surface.SURFACE[module][class_in_module])
    named |= set(surface.INSTANCE_SURFACE.get(module, {}).get(class_in_module, ()))
    assert used - defined - named - {"module"} == set()  # DeepSpeed writes `module` into __dict__


def test_the_surface_of_the_engine_names_nothing_that_nobody_uses():
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    known = [d["deepspeed.runtime.engine"]["DeepSpeedEngine"] for d in (surface.SURFACE, surface.INSTANCE_SURFACE)]
    used = set(re.findall(r"(?:self|engine|super\(\)|super\(\w+, self\))\.(\w+)|def (\w+)", source))
    assert {name for names in known for name in names} - {name for pair in used for name in pair} == set()


@pytest.mark.parametrize(
    ("section", "name", "config"),
    [("", "future", {"future": False}), ("data_types", "some_dtype", {"data_types": {"some_dtype": "fp32"}})],
)
def test_a_key_that_the_installed_deepspeed_would_pass_over_is_refused(monkeypatch, section, name, config):
    monkeypatch.setattr(resolving, "_NEWER", {section: (name,)})
    config = {MICRO: 1, "optimizer": {"type": "AdamW"}, "hift": {"enabled": True}, **config}
    with pytest.raises(ValueError, match=rf"{name}=.* deepspeed {re.escape(deepspeed.__version__)} does not know it"):
        resolving.resolve(config, world=1)
    del config[section or name]
    assert resolving.resolve(config, world=1).managed


def test_zero_3_on_cpu_ranks_of_an_older_deepspeed_is_noted(monkeypatch):
    config = {MICRO: 1, "optimizer": {"type": "AdamW"}, "hift": {"enabled": True}}
    monkeypatch.setattr(resolving, "version", "0.18.9")
    noted = []
    for stage, device in ((3, "cpu"), (2, "cpu"), (3, "cuda")):
        found = resolving.resolve({**config, "zero_optimization": {"stage": stage}}, world=2, device_type=device)
        noted.append(any("gathers wrong weights" in note for note in found.notes))
    assert noted == [True, False, False]
    assert [surface.gathers_on_cpu(one) for one in ("0.19.8", "0.20.0+x", "0.19.5")] == [True, True, False]
