"""The import graph: what stays light, who knows DeepSpeed, and that imports go one way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hift_ds

PACKAGE = Path(hift_ds.__file__).parent
ROOT = PACKAGE.parent

# Of the core, only these rooms know DeepSpeed (of config/, the files that read its config and name its surface).
KNOW_DEEPSPEED = {
    "engine", "engine_saving", "checkpoint", "start", "enabling", "zero", "distributed", "config", "memory",
}  # fmt: skip
# From the bottom up: a module imports from its own room and those before it.
LAYERS = (
    ("shards", "extras", "chunked_loss", "compiled_layers", "last_product"),
    ("rules", "rotation"),
    ("config",),
    ("state",),
    ("distributed",),
    ("checkpoint",),
    ("zero",),
    ("memory",),
    ("view", "engine_saving"), ("engine_loading",), ("engine",),
    ("start",),
    ("integrations",),
    ("enabling",),
    ("run",),
    ("recipes", "cli"),
)
PURE = ("rotation.blocks", "rotation.rotation", "rotation.schedule", "rotation.param_groups", "shards")


def modules():
    """Dotted name under hift_ds -> syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports_of(tree):
    """Absolute names of the modules that a tree imports: inside functions and for type checking, too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def inner_imports(tree):
    """Rooms and top-level modules of hift_ds that a tree imports."""
    found = {name.split(".")[1] for name in imports_of(tree) if name.startswith("hift_ds.")}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def loaded_by(statement):
    """Top-level packages in sys.modules of a fresh interpreter after `statement`."""
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_package_alone_loads_nothing_heavy():
    assert not loaded_by("import hift_ds; hift_ds.__version__") & {"torch", "deepspeed", "transformers", "triton"}


# One interpreter for all that may not load a package: what one of them loads is there at the end.


def together(names):
    return "import " + ", ".join(f"hift_ds.{name}" for name in names)


def test_the_pure_modules_and_the_rules_load_neither_deepspeed_nor_transformers():
    names = ["config.keys", *PURE, "rules"]
    assert not loaded_by(together(names)) & {"deepspeed", "transformers", "accelerate", "datasets"}


def test_what_needs_no_tensors_loads_no_torch():
    names = ["config.keys", "config.ds_keys", "rotation.rotation", "rotation.schedule"]
    assert "torch" not in loaded_by(together(names))


def test_only_the_named_modules_import_deepspeed():
    importing = {
        name.split(".")[0]
        for name, tree in modules().items()
        if any(found.split(".")[0] == "deepspeed" for found in imports_of(tree))
    }
    core = {row_name for row in LAYERS[:-1] for row_name in row}
    assert importing & core <= KNOW_DEEPSPEED
    assert importing >= KNOW_DEEPSPEED, "a module that no longer needs DeepSpeed should leave the list"


def test_the_pure_modules_import_neither_even_inside_functions():
    trees = modules()
    for name in ("config.keys", *PURE):
        packages = {found.split(".")[0] for found in imports_of(trees[name])}
        assert not packages & {"deepspeed", "transformers"}, name


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in modules()} - {"", "__init__"} <= {name for row in LAYERS for name in row}


def test_imports_go_one_way():
    level = {name: number for number, row in enumerate(LAYERS) for name in row}
    upwards = [
        f"hift_ds.{name} imports hift_ds.{inner}"
        for name, tree in modules().items()
        if name not in ("", "__init__")
        for inner in inner_imports(tree)
        if level[inner] > level[name.split(".")[0]]
    ]
    assert upwards == []


def test_imports_have_no_circle_between_rooms_or_files_and_none_for_type_checking():
    trees = {name: tree for name, tree in modules().items() if name not in ("", "__init__")}
    rooms = {}
    for name, tree in trees.items():
        own = name.split(".")[0]
        rooms.setdefault(own, set()).update(inner_imports(tree) - {own})
    files = {
        name: {found.removeprefix("hift_ds.") for found in imports_of(tree)} & trees.keys() - {name}
        for name, tree in trees.items()
    }
    for graph in (rooms, files):
        assert_no_circle(graph)


def assert_no_circle(graph):
    finished = []

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for inner in graph[name]:
                visit(inner, [*path, name])
            finished.append(name)

    for name in graph:
        visit(name, [])


def test_the_library_never_imports_its_scripts_or_tests():
    for name, tree in modules().items():
        packages = {found.split(".")[0] for found in imports_of(tree)}
        assert not packages & {"launch", "tests", "hift_testing", "pytest"}, name


def test_collectives_go_through_deepspeed_comm():
    """ruff's banned-api sees names; this sees `torch.distributed` in any form, but for asking who one is."""
    harmless = {"is_initialized", "get_rank", "is_available", "get_world_size", "ProcessGroup"}
    for name, tree in modules().items():
        assert not any(found.startswith("torch.distributed") for found in imports_of(tree)), name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.distributed":
                assert node.attr in harmless, f"{name}: torch.distributed.{node.attr}"


def test_every_public_name_can_be_imported():
    for name in hift_ds.__all__:
        assert getattr(hift_ds, name).__module__.startswith("hift_ds.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hift_ds.nothing  # noqa: B018
