"""Which parameters are freshly initialised: those that the checkpoint did not hold, such as a new classifier."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from hift_ds.rotation.blocks import find_top
from hift_ds.rotation.names import is_inside, numels_of, others_than, shortest, some

_SHARE = 0.1
# transformers marks what from_pretrained has loaded, so that its own initialisation leaves it alone.
_LOADED = "_is_hf_initialized"
_HEAD = re.compile(r"^(classifier|score|pooler|\w*projection|\w*(?<!lm)_head|qa_outputs)$")


@dataclass(frozen=True)
class Fresh:
    """What is known of a model.

    Attributes:
        fqns: Fresh parameters, to be trained at every step.
        note: What the user should know, in a sentence; `None` = nothing.
    """

    fqns: tuple[str, ...] = ()
    note: str | None = None


def new_parameters(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the parameters that the checkpoint did not hold; `None` where nothing is known of the model.

    They are those that `module._hift_fresh` names, a collection of fqns that a loader of one's own may set; else those
    of a model of `from_pretrained` without the mark of what was loaded. Word embeddings are none of these: resizing
    replaces them.
    """
    params = dict(module.named_parameters())
    told = getattr(module, "_hift_fresh", None)
    if told is not None:
        unknown = sorted(set(told) - params.keys())
        if unknown:
            close = difflib.get_close_matches(unknown[0], params, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"model._hift_fresh={unknown[0]!r}: no parameter has that name; {hint}correct it")
        return tuple(name for name in params if name in set(told))
    found = [name for name, param in params.items() if not getattr(param, _LOADED, False)]
    if len(found) == len(params):
        return None
    embeddings = _word_embeddings(module) if found else set()
    return tuple(name for name in found if id(params[name]) not in embeddings)


def find_fresh(module: nn.Module, trained: Collection[str], new: Collection[str] | None) -> Fresh:
    """Finds what is fresh among `trained` (fqns).

    With a new head comes all that lies above the last layer: a loaded pooler that takes its turns holds the head back
    as if it were new. Where they are more than a tenth of what is trained, nothing is fresh.

    Args:
        new: Of `new_parameters`.
    """
    if new is None:
        return Fresh(note=_unknown(module, trained))
    sizes = {name: numel for name, numel in numels_of(module).items() if name in trained}
    found = [name for name in sizes if name in new]
    if len(found) == len(sizes):  # adapters, or a head alone
        return Fresh(note=_unknown(module, trained))
    if not found:
        return Fresh()
    share = _share(found, sizes)
    lacked = f"hift.always_active='fresh': the checkpoint did not hold {_paths(found, module)}"
    if share > _SHARE:
        return Fresh(note=(
            f"{lacked}, {share:.0%} of what is trained, and these wait for their turn; over {_SHARE:.0%} name them in "
            "hift.always_active yourself"
        ))  # fmt: skip
    top = set(find_top(module))
    beside = [name for name in sizes if name in top and name not in found] if top & set(found) else []
    if _share([*found, *beside], sizes) > _SHARE:
        beside = []
    note = f"{lacked}: trained at every step"
    return Fresh(
        tuple(name for name in sizes if name in {*found, *beside}),
        f"{note}, with {_paths(beside, module)} above the last layer" if beside else note,
    )


def _share(names: Collection[str], sizes: Mapping[str, int]) -> float:
    return sum(map(sizes.__getitem__, names)) / sum(sizes.values())


def _word_embeddings(module: nn.Module) -> set[int]:
    """Ids of parameters; the output's only where the checkpoint is of this class, else it may be a new head."""
    found = set()
    for part in module.modules():
        saved_as = getattr(getattr(part, "config", None), "architectures", None) or ()
        getters = ["get_input_embeddings", *(["get_output_embeddings"] if type(part).__name__ in saved_as else [])]
        for getter in getters:
            try:
                layer = getattr(part, getter)()
            except (AttributeError, NotImplementedError):
                continue
            found |= {id(param) for param in layer.parameters()} if isinstance(layer, nn.Module) else set()
    return found


def _unknown(module: nn.Module, names: Collection[str]) -> str | None:
    """Of parameters without a mark: adapters, a model built from a config, copied, or no model of transformers."""
    heads = [
        path for path, _ in module.named_modules()
        if _HEAD.match(path.rpartition(".")[2]) and any(is_inside(name, path) for name in names)
    ]  # fmt: skip
    if not heads or all(any(is_inside(name, path) for path in heads) for name in names):
        return None
    return (
        f"hift.always_active='fresh': whether {some(heads)} is freshly initialised is not known of this model; if so, "
        f'write "always_active": {_as_json(heads)}, or it learns in its turns alone; else []'
    )


def _paths(names: Collection[str], module: nn.Module) -> str:
    return some(shortest(names, others_than(names, module)))


def _as_json(paths: list[str]) -> str:
    return "[" + ", ".join(f'"module:{path}"' for path in paths) + "]"
