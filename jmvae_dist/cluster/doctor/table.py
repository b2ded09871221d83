"""Rows of the preflight's table, and how they are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

Status = Literal["pass", "warn", "fail"]

_PIPED_WIDTH = 100
_STYLES: dict[str, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        check: What was looked at.
        where: Ranks or nodes that the row speaks of; "all" for every rank.
        status: pass, warn (the run would work, but) or fail (it would not).
        found: The facts.
        advice: What to do; empty for pass.
    """

    check: str
    where: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count_by_status(rows: Sequence[Row]) -> dict[str, int]:
    """Number of rows of each status."""
    return {status: sum(row.status == status for row in rows) for status in _STYLES}


def print_table(rows: Sequence[Row], file: IO[str] | None = None) -> None:
    """Print the rows and a summary: as wide as the terminal, 100 columns of plain text elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = sys.stdout if file is None else file
    is_terminal = file.isatty()
    # Captured: what is piped shall have no blanks at the ends of lines.
    console = Console(file=file, width=None if is_terminal else _PIPED_WIDTH, highlight=False)
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False, collapse_padding=True)
    for title in ("check", "where", "status"):
        # A long path or list of ranks is folded rather than cut: what is cut is what one would need.
        table.add_column(title, overflow="fold", max_width=20)
    table.add_column("found, and -> what to do", overflow="fold", ratio=1)
    for row in rows:
        found = Text(row.found)
        if row.advice:
            found.append(f"\n-> {row.advice}", style=_STYLES[row.status])
        table.add_row(Text(row.check), Text(row.where), Text(row.status, style=_STYLES[row.status]), found)
    counts = count_by_status(rows)
    with console.capture() as capture:
        console.print(table)
        console.print(Text("\n" + ", ".join(f"{count} {status}" for status, count in counts.items())))
    file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    file.flush()
