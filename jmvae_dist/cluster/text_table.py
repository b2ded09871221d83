"""Tables as plain text, which survive a log file and a pipe."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?\*?")


def format_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns, numbers to the right."""
    table = [list(header), *(list(line) for line in lines)]
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_number = [all(not cell or _NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in table
    )


def print_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print them."""
    print(format_columns(header, lines), flush=True)
