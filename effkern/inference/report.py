"""What :func:`effkern.optimize` did to a network, line by line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_COLUMNS = ("action", "module", "kind", "into / why")


@dataclass(frozen=True)
class Row:
    """One piece of the network.

    Attributes:
        action: ``"replaced"`` (part of an effkern op now), ``"removed"`` (did nothing in eval mode) or ``"left"``.
        module: name of the module, or of the module that calls a function.
        kind: its type, or the function's name.
        detail: what it became part of, or why it was left.
    """

    action: str
    module: str
    kind: str
    detail: str


@dataclass
class Report:
    """Every piece of the network and what became of it; ``print`` shows a table.

    Attributes:
        rows: in the order of execution.
        error: ``max |y - y0| / max |y0|`` between the optimized network's and the original's outputs on the example
            input; None without an example.
    """

    rows: list[Row] = field(default_factory=list)
    error: float | None = None

    @property
    def replaced(self) -> list[Row]:
        """Rows of what runs in effkern ops now."""
        return [row for row in self.rows if row.action == "replaced"]

    @property
    def removed(self) -> list[Row]:
        """Rows of what is not run any more."""
        return [row for row in self.rows if row.action == "removed"]

    @property
    def left(self) -> list[Row]:
        """Rows of what runs as before, with the reasons."""
        return [row for row in self.rows if row.action == "left"]

    def why(self, module: str) -> str:
        """The details told of a module, joined; empty if there are none."""
        return "; ".join(row.detail for row in self.rows if row.module == module)

    def __str__(self) -> str:
        ops = len({row.detail for row in self.replaced})
        summary = f"{len(self.replaced)} replaced by {ops} ops, {len(self.removed)} removed, {len(self.left)} left"
        if self.error is not None:
            summary += f"; relative error on the example {self.error:.1e}"
        lines = [_COLUMNS, *((r.action, r.module or "(model)", r.kind, r.detail) for r in self.rows)]
        return "\n".join([summary, *_table(lines)])


def _table(lines: Iterable[tuple[str, ...]]) -> list[str]:
    lines = list(lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
