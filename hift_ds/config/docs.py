"""Writes docs/keys.md from the declarations: `make docs`, or `python -m hift_ds.config.docs > docs/keys.md`."""

from __future__ import annotations

import sys

from hift_ds.config.ds_keys import markdown_table
from hift_ds.config.keys import HiFTConfig, StateConfig
from hift_ds.config.kinds import declared, default_of

_PAGE = """# Which keys are there?

Written by `make docs` from `hift_ds/config/keys.py` and `hift_ds/config/ds_keys.py`; do not edit.

## The "hift" section

Every key is optional but `enabled`; where `null` is allowed, it means "choose for me". An unknown key, a wrong type or
an impossible value is an error that names the key, the value and what is allowed. `launch/train.py` has an option for
each:
`--hift_order random`, `--hift_state_moments int8`, `--hift_blocks '[["layers"], ["embed", "model.norm"]]'`.

{hift}
### state

{state}
## DeepSpeed's keys

What becomes of every key of a DeepSpeed config when HiFT is on. A refused key is an error only where it is not at
DeepSpeed's default; a key without effect is named in a warning; a key that DeepSpeed does not know is named, too.

{deepspeed}"""


def page() -> str:
    """The page."""
    return _PAGE.format(hift=_table(HiFTConfig), state=_table(StateConfig), deepspeed=markdown_table())


def _table(cls: type) -> str:
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for part in declared(cls):
        default = default_of(part)
        shown = default if default == "(required)" else f"`{default}`"
        lines.append(
            f"| `{part.name}` | {shown} | {part.metadata['kind'].allowed} | {part.metadata['description']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
