"""Names of parameters: which of them an entry of the "hift" section means, and a short way to say some."""

import difflib
import re
from collections.abc import Collection, Sequence

from torch import nn


def numels_of(module: nn.Module) -> dict[str, int]:
    """Elements of each parameter; under ZeRO-3, which leaves an empty placeholder, of the whole one (`ds_numel`)."""
    return {fqn: getattr(p, "ds_numel", p.numel()) for fqn, p in module.named_parameters()}


def join(path: str, name: str) -> str:
    """The path of a child; that of the model itself is empty."""
    return f"{path}.{name}" if path else name


def is_inside(fqn: str, path: str) -> bool:
    """Whether a parameter or module is that of the path, or inside of it."""
    return not path or fqn == path or fqn.startswith(path + ".")


def tied_names(module: nn.Module) -> dict[str, list[str]]:
    """The other names of tied parameters."""
    owner = {id(p): fqn for fqn, p in module.named_parameters()}
    aliases: dict[str, list[str]] = {}
    for fqn, p in module.named_parameters(remove_duplicate=False):
        if owner[id(p)] != fqn:
            aliases.setdefault(owner[id(p)], []).append(fqn)
    return aliases


def matches(
    key: str,
    patterns: Sequence[str] | None,
    fqns: list[str],
    module: nn.Module,
    aliases: dict[str, list[str]] | None = None,
) -> dict[str, str]:
    """Map each of `fqns` that a pattern matches, in definition order, to the first that does; each must match.

    With `aliases` any name of a tied parameter counts.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{key}={patterns!r}: must be a list of regexes; write [{patterns!r}].")
    found: dict[str, str] = {}
    for pattern in patterns or []:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}={pattern!r}: is not a regex ({error}); correct it (Python's re syntax).") from None
        hits = [fqn for fqn in fqns if any(map(regex.search, (fqn, *(aliases or {}).get(fqn, ()))))]
        if not hits:
            advice = _advice(pattern, regex, fqns, module)
            raise ValueError(f"{key}={pattern!r}: matches no trainable parameter; {advice}.")
        for fqn in hits:
            found.setdefault(fqn, pattern)
    return {fqn: found[fqn] for fqn in fqns if fqn in found}


def _advice(pattern: str, regex: re.Pattern[str], fqns: list[str], module: nn.Module) -> str:
    named = list(module.named_parameters())
    frozen = [fqn for fqn, _ in named if regex.search(fqn)]
    if frozen:
        return f"{some(frozen)} is frozen: unfreeze it or remove the regex"
    owner = {id(p): fqn for fqn, p in named}
    tied = [(fqn, owner[id(p)]) for fqn, p in module.named_parameters(remove_duplicate=False) if regex.search(fqn)]
    if tied:
        return f"{tied[0][0]!r} is tied to {tied[0][1]!r}: use that name"
    words = re.sub(r"[\\^$()\[\]?*+|]", "", pattern)
    matcher = difflib.SequenceMatcher(None, b=words, autojunk=False)

    def overlap(fqn: str) -> int:
        matcher.set_seq1(fqn)
        return matcher.find_longest_match().size

    return f"the closest are {some(sorted(fqns, key=overlap, reverse=True)[:3])}; correct the regex"


def inside_module(entry: str, path: str, fqns: list[str], module: nn.Module) -> str:
    """The regex of `module:PATH` in `hift.always_active`; one of `fqns` must be inside."""
    if not path or not any(is_inside(fqn, path) for fqn in fqns):
        paths = [found for found, part in module.named_modules() if found and any(True for _ in part.parameters())]
        close = difflib.get_close_matches(path, paths, n=3) or paths[-3:]
        raise ValueError(
            f"hift.always_active={entry!r}: no module of that path has trainable parameters; the closest are "
            f"{some(close)}; correct it."
        )
    return rf"^{re.escape(path)}(\.|$)"


def some(names: Collection[str]) -> str:
    """The first three names, and how many there are beside them."""
    shown = ", ".join(map(repr, list(names)[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def others_than(fqns: Collection[str], module: nn.Module) -> list[str]:
    """All names of the other parameters of a model."""
    named = list(module.named_parameters(remove_duplicate=False))
    chosen = {id(param) for fqn, param in named if fqn in fqns}
    return [fqn for fqn, param in named if id(param) not in chosen]


def shortest(fqns: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest names for some parameters of a model: a module's path where none of the others is inside."""
    paths: dict[str, None] = {}
    for fqn in fqns:
        parts = fqn.split(".")
        above = (".".join(parts[:end]) for end in range(1, len(parts)))
        paths[next((path for path in above if not any(is_inside(other, path) for other in others)), fqn)] = None
    return list(paths)
