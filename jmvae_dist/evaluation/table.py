"""Evaluation results as text: one line per number, and a table where numbers differ by target and source."""

from __future__ import annotations

from collections.abc import Mapping

_SOURCE = "from_"
_MOST_SINGLE = 2


def format_results(results: Mapping[str, float]) -> str:
    """A readable table of results, without the prefix `eval/`.

    Keys `<quantity>/<target>/from_<source>` (and without a target) become one table per quantity, with a row per
    source and a column per target; everything else, and quantities with one or two values, is one line per number.
    """
    single: dict[str, float] = {}
    tables: dict[str, dict[str, tuple[str, str]]] = {}
    for key, value in results.items():
        name = key.removeprefix("eval/")
        quantity, _, rest = name.partition("/")
        target, _, source = rest.rpartition("/")
        if source.startswith(_SOURCE):
            tables.setdefault(quantity, {})[name] = (source.removeprefix(_SOURCE), target)
        single[name] = value
    tables = {quantity: cells for quantity, cells in tables.items() if len(cells) > _MOST_SINGLE}
    tabulated = {name for cells in tables.values() for name in cells}
    lines = _lines({name: value for name, value in single.items() if name not in tabulated})
    for quantity, cells in tables.items():
        lines += ["", *_table(quantity, {place: single[name] for name, place in cells.items()})]
    return "\n".join(lines)


def _lines(values: Mapping[str, float]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"  {key:<{width}}  {value:.6g}" for key, value in values.items()]


def _table(quantity: str, cells: Mapping[tuple[str, str], float]) -> list[str]:
    sources = list(dict.fromkeys(source for source, _ in cells))
    found = {target for _, target in cells}
    # Modalities in the order in which they are sources, which is the model's.
    targets = list(dict.fromkeys([*(name for name in sources if name in found), *(target for _, target in cells)]))
    rows = [[f"{quantity} from", *targets]]
    for source in sources:
        values = [cells.get((source, target)) for target in targets]
        rows.append([source, *("" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(targets) + 1)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
