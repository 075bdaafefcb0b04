"""Which parameters are freshly initialised: those that the checkpoint did not hold, such as a new classifier."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from hift_ds.rotation.blocks import find_top

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


def find_fresh(module: nn.Module, trained: Collection[str]) -> Fresh:
    """Finds them among `trained` (fqns).

    They are those that `module._hift_fresh` names, a collection of fqns that a loader of one's own may set; else those
    of a model of `from_pretrained` that the checkpoint did not hold. Input and output embeddings are none, because
    resizing replaces them. With a new head comes all that lies above the last layer: a loaded pooler that takes its
    turns holds the head back as if it were new. Where they are more than a tenth of what is trained, nothing is fresh.
    """
    params = {name: param for name, param in module.named_parameters() if name in trained}
    sizes = {name: getattr(param, "ds_numel", param.numel()) for name, param in params.items()}
    told = getattr(module, "_hift_fresh", None)
    if told is not None:
        return Fresh(tuple(name for name in params if name in set(told)))
    loaded = {name for name, param in params.items() if getattr(param, _LOADED, False)}
    if not loaded:
        return Fresh(note=_unknown(module, params))
    embeddings = _embeddings(module)
    found = tuple(name for name, param in params.items() if name not in loaded and id(param) not in embeddings)
    if not found:
        return Fresh()
    share = _share(found, sizes)
    if share > _SHARE:
        return Fresh(note=(
            f"hift.always_active='fresh': the checkpoint did not hold {_some(found)}, {share:.0%} of what is trained, "
            f"and these wait for their turn; over {_SHARE:.0%} name them in hift.always_active yourself"
        ))  # fmt: skip
    top = set(find_top(module)) if set(find_top(module)) & set(found) else set()
    beside = tuple(name for name in params if name in top and name not in found and id(params[name]) not in embeddings)
    if _share(found + beside, sizes) > _SHARE:
        beside = ()
    note = f"hift.always_active='fresh': the checkpoint did not hold {_some(found)}: trained at every step"
    return Fresh(
        tuple(name for name in params if name in {*found, *beside}),
        f"{note}, with {_some(beside)} above the last layer" if beside else note,
    )


def _share(names: Collection[str], sizes: Mapping[str, int]) -> float:
    return sum(map(sizes.__getitem__, names)) / sum(sizes.values())


def _embeddings(module: nn.Module) -> set[int]:
    found = set()
    for part in module.modules():
        for get in ("get_input_embeddings", "get_output_embeddings"):
            try:
                layer = getattr(part, get)()
            except (AttributeError, NotImplementedError):
                continue
            found |= {id(param) for param in layer.parameters()} if isinstance(layer, nn.Module) else set()
    return found


def _unknown(module: nn.Module, names: Collection[str]) -> str | None:
    """A model whose parameters have no mark: built from a config, copied, or no model of transformers."""
    heads = [
        path for path, _ in module.named_modules()
        if _HEAD.match(path.rpartition(".")[2]) and any(name.startswith(f"{path}.") for name in names)
    ]  # fmt: skip
    if not heads or len(heads) == len(list(module.children())):
        return None
    return (
        f"hift.always_active='fresh': whether {_some(heads)} is freshly initialised is not known of this model; if so, "
        f'write "always_active": {_as_json(heads)}, or it learns in its turns alone; else []'
    )


def _as_json(paths: list[str]) -> str:
    return "[" + ", ".join(f'"module:{path}"' for path in paths) + "]"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
