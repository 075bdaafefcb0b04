"""`engine.hift`: the user's window on blocks and rotation."""

from __future__ import annotations

import io

from hift_ds.rotation.blocks import Block, BlockPlan
from hift_ds.zero.optimizer import HiFTOptimizer


class HiFT:
    """Read-only view; nothing here is collective or moves data."""

    def __init__(self, plan: BlockPlan, optimizer: HiFTOptimizer) -> None:
        self._plan, self._optimizer = plan, optimizer

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in the model's order; each has `.name`, `.fqns` and `.numel`."""
        return list(self._plan.blocks)

    @property
    def order(self) -> list[int]:
        """Block indices in visiting order."""
        return list(self._optimizer.rotation.order)

    @property
    def active_block(self) -> int:
        """Index of the block that trains at the coming step."""
        return self._optimizer.rotation.active_block

    @property
    def cycle(self) -> int:
        """Completed cycles: how often every block has been active."""
        return self._optimizer.rotation.cycle

    @property
    def host_bytes(self) -> int:
        """Bytes of masters and state that this rank keeps on the host."""
        return sum(state.host_bytes for state in self._optimizer.states)

    def summary(self) -> str:
        """The block plan as a table, 80 columns wide: the active block marked, then what is not rotated."""
        from rich.console import Console
        from rich.table import Table

        blocks, order, active = self.blocks, self.order, self.active_block
        total = sum(block.numel for block in blocks)
        table = Table(title=f"{len(blocks)} blocks, cycle {self.cycle}", show_edge=False, pad_edge=False)
        for header in ("block", "turn", "name", "parameters", "share"):
            table.add_column(header, justify="left" if header == "name" else "right")
        for block in blocks:
            mark = "> " if block.index == active else ""
            share = f"{100 * block.numel / total:.1f} %"
            row = (f"{mark}{block.index}", str(order.index(block.index)), block.name, f"{block.numel:,}", share)
            table.add_row(*row, style="bold" if mark else None)
        out = io.StringIO()
        console = Console(file=out, width=80)
        console.print(table)
        largest = max(blocks, key=lambda block: block.numel)
        console.print(f"{total:,} parameters, largest block: {largest.name}", highlight=False)
        if skipped := self._optimizer.reach.summary():
            console.print(f"steps without a gradient, skipped: {skipped}", highlight=False)
        for label, names in (("trained at every step", self._plan.always_active), ("frozen", self._plan.frozen)):
            if names:
                console.print(f"{label}: {len(names)} parameter tensors", highlight=False)
        return out.getvalue()
