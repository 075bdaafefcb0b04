"""Model -> layer units -> blocks, from the module tree alone: no per-family code, no DeepSpeed, no transformers.

How layer units are found:

- A *stack* is an outermost `nn.ModuleList` or `nn.Sequential` (or an `nn.ModuleDict` with numbers as keys) with two or
  more children that own parameters, none of which owns more than 90 % of it. Each such child is one unit.
- A `Sequential` beside ModuleList stacks is a stack only if it holds more parameters than their median unit; so a small
  `Sequential` head stays a head.
- Two kinds of child are opened instead of being one unit: a child that is a stack itself, and a *stage* (ResNet, Swin),
  which has at most one other child with parameters beside a stack with over 90 % of its own. Only a stack of modules of
  one class, not of leaves, is opened: `[attention, feed-forward]` (T5) or `Sequential(Linear, GELU, Linear)` are parts
  of one layer. An MoE layer is no stage: it has attention and norms beside the experts.
- What lies in no stack is *loose*. Loose modules in definition order form one run before, between and after the stacks,
  and each run is a unit. What is defined before a sibling stack but named as used after it (`final*`, `ln_f`, `norm_f`,
  `score`, `classifier`, `*head`) is moved behind that stack (OPT's final norm, XLM-RoBERTa's classifier).
- A unit under 1 % of the largest unit of the stacks joins the one before it (the first: the one after it), because an
  optimizer step for a lone norm is a step wasted. The larger of the two gives the name.
- Without any stack each direct child is a unit, and so are the direct parameters together.

Stacks are found over all parameters, frozen ones too, so that freezing moves no boundary; units hold what is trained.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn

from hift_ds.rotation.names import inside_module, is_inside, join, matches, numels_of, some, tied_names

_STAGE_SHARE = 0.9
_JOIN_SHARE = 0.01
_LATE_NAME = re.compile(r"^(final.*|ln_f|norm_f|score|classifier|\w*head)$")


@dataclass(frozen=True)
class LayerUnit:
    """The smallest piece the rotation can pick; `fqns` in definition order, `numel` in elements."""

    name: str
    fqns: tuple[str, ...]
    numel: int


@dataclass(frozen=True)
class Block:
    """Consecutive layer units trained together; `index` is its place from the bottom of the model."""

    index: int
    name: str
    units: tuple[LayerUnit, ...]

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of its parameters, unit by unit."""
        return tuple(fqn for unit in self.units for fqn in unit.fqns)

    @property
    def numel(self) -> int:
        """Its parameters' elements."""
        return sum(unit.numel for unit in self.units)


@dataclass(frozen=True)
class BlockPlan:
    """Where each parameter of a model belongs: exactly one block, `always_active` or `frozen` (both fqns)."""

    blocks: tuple[Block, ...]
    always_active: tuple[str, ...]
    frozen: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """A module (or a lone parameter) that is never cut: one child of a stack, or a part of a loose run."""

    path: str
    in_stack: bool


def find_layer_units(module: nn.Module) -> list[LayerUnit]:
    """Cut the trainable parameters of `module` into layer units, bottom first (rules: the module's docstring).

    Names are those of `module.named_parameters()`: a tied weight belongs to the first unit that names it. Under ZeRO-3
    sizes are those of the whole parameters (`ds_numel`).
    """
    return _layer_units(module, {fqn for fqn, p in module.named_parameters() if p.requires_grad})


def find_top(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters above the last stack, trainable or not: final norm, pooler, head. Without a stack: none.

    Unlike a layer unit it is never joined with the last layer.
    """
    sizes = _owned_sizes(module)
    stacks, numels = _stack_paths(module, sizes), numels_of(module)
    last = list(_runs(_pieces(module, "", sizes, stacks), numels))[-1:] if stacks else []
    return () if not last or last[0][0].in_stack else _unit(last[0], numels).fqns


def plan_blocks(
    module: nn.Module,
    *,
    layers_per_block: int = 1,
    blocks: list[list[str]] | None = None,
    frozen: list[str] | None = None,
    always_active: list[str] | None = None,
) -> BlockPlan:
    """Put every parameter of `module` into one block, `always_active` or `frozen`; `requires_grad` is left as it is.

    Deterministic: every rank with the same module gets the same plan.

    Args:
        layers_per_block: Layer units in a block; the last block may have fewer. More than there are units: one block.
        blocks: Each inner list of regexes (`re.search` on fqns) is one block, in this order. None: grouped layer units.
        frozen: Regexes of parameters never trained, beside those with `requires_grad=False`; wins over `blocks`. Any
            name of a tied parameter counts.
        always_active: Regexes of parameters trained at every step; `module:PATH` is a whole module, `unit:last` the
            last layer unit.

    Raises:
        TypeError: a string where a list of regexes belongs.
        ValueError: no trainable parameter, or none left to rotate; an invalid regex, or one without a match; an empty
            list in `blocks`; a parameter placed twice or nowhere.
    """
    names = list(numels_of(module))
    trainable = [fqn for fqn, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the model has requires_grad=True: set it on what should be trained.")

    hits = matches("hift.frozen", frozen, names, module, tied_names(module))
    trained = [fqn for fqn in trainable if fqn not in hits]
    patterns = _expanded(always_active, trainable, module)
    active = matches("hift.always_active", patterns, trainable, module)
    for owner, names_of in tied_names(module).items():
        other = next((n for n in names_of for pattern in patterns or () if re.search(pattern, n)), None)
        if other and owner in trainable and owner not in active:
            raise ValueError(f"hift.always_active={always_active!r}: {other!r} is tied to {owner!r}: use that name.")
    both = [fqn for fqn in active if fqn in hits]
    if both:
        raise ValueError(
            f"hift.frozen={hits[both[0]]!r} and hift.always_active={active[both[0]]!r} both match {some(both)}: "
            "a parameter has one role; narrow one of the two regexes."
        )
    if not trained:
        raise ValueError(f"hift.frozen={frozen!r}: matches every trainable parameter; leave at least one to train.")
    rotating = {fqn for fqn in trained if fqn not in active}
    if not rotating:
        raise ValueError(
            f"hift.always_active={always_active!r}: matches every trainable parameter, so nothing is left to rotate; "
            "narrow it, or set hift.enabled to false for ordinary training."
        )
    if blocks is not None:
        groups = _explicit_groups(module, blocks, trained, active)
    else:
        units = _layer_units(module, rotating)
        chunks = [units[i : i + layers_per_block] for i in range(0, len(units), layers_per_block)]
        groups = [(_group_name(chunk), chunk) for chunk in chunks]
    plan = BlockPlan(
        tuple(Block(index, name, tuple(members)) for index, (name, members) in enumerate(groups)),
        tuple(active),
        tuple(fqn for fqn in names if fqn not in rotating and fqn not in active),
    )
    _check_exactly_once(plan, names)
    return plan


def _expanded(entries: list[str] | None, trainable: list[str], module: nn.Module) -> Any:
    """`module:PATH` and `unit:last` as regexes; all else as it is."""
    if isinstance(entries, str) or not entries:
        return entries
    patterns = []
    for entry in entries:
        kind, colon, name = entry.partition(":")
        if entry == "unit:last":
            unit = _layer_units(module, set(trainable))[-1]
            patterns += [f"^{re.escape(fqn)}$" for fqn in unit.fqns]
        elif colon and kind == "unit":
            raise ValueError(f"hift.always_active={entry!r}: the only unit that can be named so is 'unit:last'")
        elif colon and kind == "module":
            patterns.append(inside_module(entry, name, trainable, module))
        else:
            patterns.append(entry)
    return patterns


def _check_exactly_once(plan: BlockPlan, names: list[str]) -> None:
    placed = [fqn for block in plan.blocks for fqn in block.fqns] + [*plan.always_active, *plan.frozen]
    if sorted(placed) != sorted(names) or not all(block.fqns for block in plan.blocks):
        wrong = sorted(set(names) ^ set(placed)) or [fqn for fqn in names if placed.count(fqn) > 1]
        raise RuntimeError(f"Bug in hift_ds: the block plan must hold {some(wrong)} exactly once; please report it.")


def _owned_sizes(module: nn.Module) -> dict[str, int]:
    """Map path to size; a path that is missing owns no parameter (it has none, or they are tied to others)."""
    sizes: dict[str, int] = {}
    for fqn, numel in numels_of(module).items():
        parts = fqn.split(".")
        for end in range(len(parts) + 1):
            path = ".".join(parts[:end])
            sizes[path] = sizes.get(path, 0) + numel
    return sizes


def _owners(module: nn.Module, path: str, sizes: dict[str, int]) -> list[tuple[str, nn.Module]]:
    paths = ((join(path, name), child) for name, child in module.named_children())
    return [(child_path, child) for child_path, child in paths if child_path in sizes]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or (isinstance(module, nn.ModuleDict) and all(k.isdigit() for k in module))


def _is_stack(module: nn.Module, path: str, sizes: dict[str, int]) -> bool:
    if not (_is_list(module) or isinstance(module, nn.Sequential)):
        return False
    children = _owners(module, path, sizes)
    # One child with nearly everything: a wrapper such as Sequential(encoder, head), whose stacks lie deeper.
    return len(children) >= 2 and max(sizes[p] for p, _ in children) <= _STAGE_SHARE * sizes[path]


def _outermost_stacks(module: nn.Module, path: str, sizes: dict[str, int]) -> Iterator[tuple[str, nn.Module]]:
    if _is_stack(module, path, sizes):
        yield path, module
        return
    for child_path, child in _owners(module, path, sizes):
        yield from _outermost_stacks(child, child_path, sizes)


def _inner_stacks(module: nn.Module, path: str, sizes: dict[str, int]) -> Iterator[str]:
    """Yield `path` and the stacks below it that are opened: children that are stacks, and the stacks of stages."""
    yield path
    for child_path, child in _owners(module, path, sizes):
        inside = _owners(child, child_path, sizes)
        if _is_stack(child, child_path, sizes) and _has_layers(inside):
            yield from _inner_stacks(child, child_path, sizes)
        elif len(inside) <= 2:
            # One level only: a ResNet stage opens, its bottlenecks do not.
            for stack_path, stack in inside:
                dominant = sizes[stack_path] > _STAGE_SHARE * sizes[child_path]
                layers = _owners(stack, stack_path, sizes)
                if dominant and _is_stack(stack, stack_path, sizes) and _has_layers(layers):
                    yield stack_path


def _has_layers(children: list[tuple[str, nn.Module]]) -> bool:
    classes, inner = {type(child) for _, child in children}, [m for _, child in children for m in child.children()]
    return len(classes) == 1 and bool(inner)


def _stack_paths(module: nn.Module, sizes: dict[str, int]) -> list[str]:
    outermost = list(_outermost_stacks(module, "", sizes))
    lists = [p for path, m in outermost if _is_list(m) for p in _inner_stacks(m, path, sizes)]
    units = [sizes[piece.path] for piece in _pieces(module, "", sizes, lists) if piece.in_stack]
    floor = median(units) if units else -1
    large = [(path, m) for path, m in outermost if not _is_list(m) and sizes[path] > floor]
    return lists + [p for path, m in large for p in _inner_stacks(m, path, sizes)]


def _pieces(module: nn.Module, path: str, sizes: dict[str, int], stacks: list[str]) -> Iterator[_Piece]:
    """Yield the model's pieces from the bottom up: the children of stacks, and the loose modules around them."""
    for name, _ in module.named_parameters(recurse=False):
        if join(path, name) in sizes:
            yield _Piece(join(path, name), in_stack=False)
    owners = _owners(module, path, sizes)
    opened = [any(is_inside(stack, child_path) for stack in stacks) for child_path, _ in owners]
    late: list[_Piece] = []
    for i, (child_path, child) in enumerate(owners):
        piece = _Piece(child_path, in_stack=path in stacks)
        if opened[i]:
            yield from _pieces(child, child_path, sizes, stacks)
            yield from late
            late = []
        elif not piece.in_stack and any(opened[i:]) and _LATE_NAME.search(child_path.rpartition(".")[2]):
            late.append(piece)
        else:
            yield piece


def _layer_units(module: nn.Module, kept: set[str]) -> list[LayerUnit]:
    sizes = _owned_sizes(module)
    stacks = _stack_paths(module, sizes)
    numels = {fqn: numel for fqn, numel in numels_of(module).items() if fqn in kept}
    runs = list(_runs(_pieces(module, "", sizes, stacks or [_inside_wrappers(module, sizes)]), numels))
    units = [_unit(run, numels) for run in runs]
    if not stacks or not units:
        return units
    in_stacks = [unit.numel for unit, run in zip(units, runs, strict=True) if run[0].in_stack]
    return _join_small(units, _JOIN_SHARE * max(in_stacks or [unit.numel for unit in units]))


def _inside_wrappers(module: nn.Module, sizes: dict[str, int]) -> str:
    path, children = "", _owners(module, "", sizes)
    while len(children) == 1 and sizes[children[0][0]] == sizes[path]:
        inner = _owners(children[0][1], children[0][0], sizes)
        if not inner:
            break
        path, children = children[0][0], inner
    return path


def _runs(pieces: Iterable[_Piece], numels: dict[str, int]) -> Iterator[list[_Piece]]:
    """Group pieces that hold a kept parameter: a stack's child is alone, neighbouring loose pieces go together."""
    run: list[_Piece] = []
    for piece in pieces:
        if not any(is_inside(fqn, piece.path) for fqn in numels):
            continue
        if run and (piece.in_stack or run[0].in_stack):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _unit(run: list[_Piece], numels: dict[str, int]) -> LayerUnit:
    fqns = tuple(fqn for piece in run for fqn in numels if is_inside(fqn, piece.path))
    return LayerUnit(_run_name([piece.path for piece in run]), fqns, sum(numels[fqn] for fqn in fqns))


def _run_name(paths: list[str]) -> str:
    parents, lasts = zip(*((path.rpartition(".")[0], path.rpartition(".")[2]) for path in paths), strict=True)
    name = "+".join(lasts) if len(lasts) <= 3 else f"{lasts[0]}..{lasts[-1]}"
    return join(parents[0], name) if len(set(parents)) == 1 else name


def _join_small(units: list[LayerUnit], floor: float) -> list[LayerUnit]:
    joined: list[LayerUnit] = []
    for unit in units:
        # Small ones at the bottom have no unit before them: they wait there for the next.
        if joined and min(unit.numel, joined[-1].numel) < floor:
            last = joined.pop()
            name = (last if last.numel >= unit.numel else unit).name
            unit = LayerUnit(name, last.fqns + unit.fqns, last.numel + unit.numel)
        joined.append(unit)
    return joined


def _group_name(units: list[LayerUnit]) -> str:
    first, last = units[0].name, units[-1].name
    if len(units) == 1:
        return first
    parents, lasts = zip(*((unit.name.rpartition(".")[0], unit.name.rpartition(".")[2]) for unit in units), strict=True)
    if len(set(parents)) == 1 and all(name.isdigit() for name in lasts):
        return f"{first}-{lasts[-1]}"
    return f"{first}..{last}"


def _explicit_groups(
    module: nn.Module, blocks: list[list[str]], trained: list[str], active: dict[str, str]
) -> list[tuple[str, list[LayerUnit]]]:
    if not blocks:
        raise ValueError("hift.blocks=[]: must list at least one block; use null to find the blocks from the model.")
    groups: list[tuple[str, list[LayerUnit]]] = []
    taken: dict[str, tuple[int, str]] = {}  # block and regex
    for index, patterns in enumerate(blocks):
        key = f"hift.blocks[{index}]"
        if not patterns:
            raise ValueError(f"{key}=[]: must hold at least one regex; remove the empty list or fill it.")
        hits = matches(key, patterns, trained, module)
        fixed = [fqn for fqn in hits if fqn in active]
        if fixed:
            raise ValueError(
                f"{key}={hits[fixed[0]]!r} and hift.always_active={active[fixed[0]]!r} both match {some(fixed)}: "
                "what trains at every step is in no block; narrow one of the two regexes."
            )
        twice = [fqn for fqn in hits if fqn in taken]
        if twice:
            other, pattern = taken[twice[0]]
            raise ValueError(
                f"hift.blocks[{other}]={pattern!r} and {key}={hits[twice[0]]!r} both match {some(twice)}: "
                "a parameter is in one block; narrow one of the two regexes."
            )
        taken.update((fqn, (index, pattern)) for fqn, pattern in hits.items())
        groups.append(("|".join(patterns), _layer_units(module, set(hits))))
    missing = [fqn for fqn in trained if fqn not in taken and fqn not in active]
    if missing:
        raise ValueError(
            f"hift.blocks: {len(missing)} trainable parameters are in no block ({some(missing)}); "
            "add a regex for them to a block, to hift.always_active or to hift.frozen."
        )
    return groups
