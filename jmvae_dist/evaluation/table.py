"""Evaluation results as text: lines, and tables of what differs by modality, or by target and source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jmvae_dist.evaluation.likelihood import DIAGNOSTICS, STANDARD_ERROR, companion_key

_SOURCE = "from_"
_MOST_SINGLE = 2


def format_results(results: Mapping[str, float], modalities: Sequence[str] = ()) -> str:
    """A readable table of results, without the prefix `eval/`.

    Keys `<quantity>/<modality>` become one table with a row per quantity and a column per modality; keys
    `<quantity>/<target>/from_<source>` (and without a target) one table per quantity, with a row per source and a
    column per target. Everything else, and quantities with one or two such keys, is one line per number, those of a
    quantity together. A standard error stands behind its number; what tells how far to trust a likelihood is left to
    the JSON.

    Args:
        results: Numbers by key.
        modalities: Of the model, in its order; none: no table by modality.
    """
    values = {key.removeprefix("eval/"): value for key, value in results.items()}
    companions = {companion_key(name, suffix) for name in values for suffix in (STANDARD_ERROR, *DIAGNOSTICS)}
    by_modality: dict[tuple[str, str], str] = {}
    by_source: dict[str, dict[tuple[str, str], str]] = {}
    for name in (name for name in values if name not in companions):
        quantity, _, last = name.rpartition("/")
        if last in modalities:
            by_modality[quantity, last] = name
        elif last.startswith(_SOURCE):
            quantity, _, target = quantity.partition("/")
            by_source.setdefault(quantity, {})[last.removeprefix(_SOURCE), target] = name
    by_source = {quantity: cells for quantity, cells in by_source.items() if len(cells) > _MOST_SINGLE}
    tabulated = companions.union(by_modality.values(), *(cells.values() for cells in by_source.values()))
    lines = _lines([name for name in values if name not in tabulated], values)
    if by_modality:
        cells = {place: _with_error(name, values, 6) for place, name in by_modality.items()}
        lines += ["", *_table("by modality", cells, modalities)]
    for quantity, names in by_source.items():
        cells = {place: _with_error(name, values, 4) for place, name in names.items()}
        # Modalities in the order in which they are sources, which is the model's.
        lines += ["", *_table(f"{quantity} from", cells, [source for source, _ in cells])]
    return "\n".join(lines)


def _with_error(name: str, values: Mapping[str, float], digits: int) -> str:
    """A number to so many digits, and its standard error if it has one."""
    error = values.get(companion_key(name, STANDARD_ERROR))
    text = f"{values[name]:.{digits}g}"
    return text if error is None else f"{text} ± {error:.2g}"


def _lines(names: Sequence[str], values: Mapping[str, float]) -> list[str]:
    """A line per number; a quantity with several numbers is a block between empty lines."""
    width = max(map(len, names), default=0)
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.partition("/")[0], []).append(f"  {name:<{width}}  {_with_error(name, values, 6)}")
    lines: list[str] = []
    previous = 1
    for block in blocks.values():
        if lines and max(previous, len(block)) > 1:
            lines.append("")
        lines += block
        previous = len(block)
    return lines


def _table(title: str, cells: Mapping[tuple[str, str], str], order: Sequence[str]) -> list[str]:
    """Cells by row and column, rows as they come, columns in this order as far as it knows them."""
    names = list(dict.fromkeys(row for row, _ in cells))
    found = list(dict.fromkeys(column for _, column in cells))
    columns = list(dict.fromkeys([*(column for column in order if column in found), *found]))
    rows = [[title, *columns]]
    rows += [[name, *(cells.get((name, column), "") for column in columns)] for name in names]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns) + 1)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
