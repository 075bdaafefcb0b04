"""Random module trees: the block plan puts every parameter in one place, or says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hift_testing.fuzzing import count, examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hift_ds.rotation.blocks import plan_blocks

NAMES = ["embed", "layers", "blocks", "norm", "final_norm", "ln_f", "head", "lm_head", "classifier", "score", "a", "b"]


class Own(nn.Module):
    """Parameters of its own beside children."""

    def __init__(self, children: dict[str, nn.Module], sizes: list[int]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        for index, size in enumerate(sizes):
            self.register_parameter(f"p{index}", nn.Parameter(nn.Linear(1, size).weight.detach().reshape(-1)))


LEAVES = st.one_of(
    st.builds(nn.Linear, st.integers(1, 12), st.integers(1, 12)),
    st.builds(nn.Embedding, st.integers(1, 40), st.integers(1, 9)), st.builds(nn.LayerNorm, st.integers(1, 9)),
    st.builds(nn.GELU), st.builds(Own, st.just({}), st.lists(st.integers(1, 30), max_size=2)),
)  # fmt: skip


def repeated(child: nn.Module, times: int, how: int) -> nn.Module:
    layers = [copy.deepcopy(child) for _ in range(times)]
    if how == 0:
        return nn.ModuleList(layers)
    if how == 1:
        return nn.Sequential(*layers)
    return nn.ModuleDict({str(index): layer for index, layer in enumerate(layers)})


def grown(inner: Any) -> Any:
    named = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    return st.one_of(
        st.builds(Own, named, st.lists(st.integers(1, 9), max_size=1)), st.builds(nn.Sequential, inner, inner),
        st.builds(repeated, inner, st.integers(1, 6), st.integers(0, 2)), st.builds(nn.ModuleDict, named),
    )  # fmt: skip


TREES = st.recursive(LEAVES, grown, max_leaves=12)


def disturb(module: nn.Module, draw: Any) -> None:
    """Freezes some parameters, and ties two of one shape."""
    params = list(module.named_parameters())
    for _, param in params:
        if draw.random() < 0.15:
            param.requires_grad_(False)
    first = draw.choice(params) if params else None
    for name, param in params:
        if first is not None and param is not first[1] and param.shape == first[1].shape and draw.random() < 0.3:
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, first[1])
            return


@examples(150)
@given(TREES, st.randoms(use_true_random=False), st.integers(1, 5), st.booleans())
def test_every_parameter_of_a_random_tree_is_in_one_place(module, draw, layers, freeze):
    if freeze:
        disturb(module, draw)
    flags = {name: param.requires_grad for name, param in module.named_parameters()}
    if not any(flags.values()):
        with pytest.raises(ValueError, match="No parameter of the model has requires_grad=True"):
            plan_blocks(module)
        return count("module trees", "refused")
    single, plan = plan_blocks(module), plan_blocks(module, layers_per_block=layers)
    assert plan == plan_blocks(copy.deepcopy(module), layers_per_block=layers), "ranks would differ"
    places = [fqn for block in plan.blocks for fqn in block.fqns] + list(plan.frozen)
    assert sorted(places) == sorted(flags) and plan.always_active == ()
    assert set(plan.frozen) == {name for name, trained in flags.items() if not trained}
    assert {name: param.requires_grad for name, param in module.named_parameters()} == flags
    units = [unit for block in single.blocks for unit in block.units]
    assert [unit for block in plan.blocks for unit in block.units] == units
    assert len(plan.blocks) == -(-len(units) // layers) and all(block.fqns for block in plan.blocks)
    numels = {name: param.numel() for name, param in module.named_parameters()}
    assert all(block.numel == sum(numels[fqn] for fqn in block.fqns) for block in plan.blocks)
    assert [block.index for block in plan.blocks] == list(range(len(plan.blocks)))
    return count("module trees", "planned")
