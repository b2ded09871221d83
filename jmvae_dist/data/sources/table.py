"""A CSV table: numbers, classes and texts in its cells, or paths of files."""

from __future__ import annotations

import csv
import fnmatch
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jmvae_dist.data.files import open_regular
from jmvae_dist.data.indexing.inspection import Facts, ModalityRequest
from jmvae_dist.data.modality import MAX_CLASSES, Modality
from jmvae_dist.data.sources.base import SampleValue, member_bytes
from jmvae_dist.data.sources.files import input_files
from jmvae_dist.data.sources.packing import (
    PLAIN_KEY,
    check_names,
    conclude_all,
    default_samples_per_shard,
    inspect_sample,
    pack_content,
    pack_file,
    request_for_files,
)
from jmvae_dist.data.sources.splits import LabelCollector, SplitChoice, label_of, rows_of, split_notes
from jmvae_dist.data.sources.standardization import SAMPLES_AT_ONCE, Moments, Standardization, standardized
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.progress import progress

KINDS = ("vector", "class", "text", "path")
MAX_CLASS_NAMES = 1000
MAX_CLASS_NAME_CHARACTERS = 1000

# The order of checks in a row: files take longest.
_KINDS_BY_CHECK = ("vector", "class", "text", "path")
_MAX_COLUMNS_SHOWN = 5

_MAX_LINE_BYTES = 16 * 2**20
_NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class Column:
    """Where a modality is in the table.

    Attributes:
        kind: one of `KINDS`.
        names: the column; for `vector` several, with wildcards such as `pixel*`.
        dtype: for `vector`.
        shape: for `vector`, if it is not the number of columns.
        class_names: for `class`: all that there may be, in the order of their numbers; None for those in the table.
    """

    kind: str
    names: tuple[str, ...]
    dtype: str = "float32"
    shape: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None


@dataclass
class TableSource:
    """Samples that are rows of a CSV file, which is read while packing.

    Attributes:
        path: of the file.
        delimiter: between its cells.
        root: the folder of files that it names.
        split: which part of the rows this is.
        modalities: of every sample.
        columns: by modality: its kind and the positions of its cells.
        class_names: by modality, where classes have names: their numbers.
        offsets: where the rows begin, in bytes.
        lines: in which line the rows begin, for messages.
        rows: those of the split.
        keys: by row, if a column names them.
        sample_bytes: what a sample takes in a tar, on average.
        details: further JSON for the manifest.
    """

    path: Path
    delimiter: str
    root: Path
    split: str
    modalities: tuple[Modality, ...]
    columns: dict[str, tuple[str, tuple[int, ...]]]
    class_names: dict[str, dict[str, int]]
    offsets: np.ndarray
    lines: np.ndarray
    rows: np.ndarray
    keys: list[str] | None
    sample_bytes: int
    details: dict[str, Any]
    _file: BinaryIO | None = field(default=None, repr=False)

    @property
    def default_samples_per_shard(self) -> int:
        return default_samples_per_shard(self.sample_bytes, len(self))

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        row = int(self.rows[index])
        return f"csv-{self.split}-{row:08d}" if self.keys is None else self.keys[row]

    def sample(self, index: int) -> Mapping[str, SampleValue]:
        row = int(self.rows[index])
        cells = self._cells(row)
        try:
            return {modality.name: self._value(modality, cells) for modality in self.modalities}
        except (DataError, ValueError, IndexError) as error:
            raise DataError(f"{self.path}: line {int(self.lines[row])}: {error}") from None

    def moments(self, names: Sequence[str], rows: np.ndarray) -> dict[str, Moments]:
        """Mean and standard deviation of some vectors over some rows of the table, which is read for that."""
        modalities = [modality for modality in self.modalities if modality.name in names]
        moments = {modality.name: Moments() for modality in modalities}
        with progress(len(rows), "standardising, rows") as advance:
            for start in range(0, len(rows), SAMPLES_AT_ONCE):
                part = [
                    [self._value(modality, cells) for modality in modalities]
                    for cells in map(self._cells, rows[start : start + SAMPLES_AT_ONCE].tolist())
                ]
                for modality, values in zip(modalities, zip(*part, strict=True), strict=True):
                    moments[modality.name].add(np.stack(values))
                advance(len(part))
        return moments

    def description(self) -> dict[str, Any]:
        return {"name": "csv", "split": self.split, **self.details}

    def _cells(self, row: int) -> list[str]:
        if self._file is None:
            self._file = open_regular(self.path)
        self._file.seek(int(self.offsets[row]))
        return next(_rows(_Lines(self._file), self.delimiter))

    def _value(self, modality: Modality, cells: Sequence[str]) -> SampleValue:
        kind, positions = self.columns[modality.name]
        if kind == "vector":
            numbers = [_number(cells[position], modality.dtype) for position in positions]
            # Of 64-bit integers numpy would make floats, unless their dtype is said at once.
            is_integer = np.dtype(modality.dtype).kind in "iu"
            values = np.array(numbers, modality.dtype if is_integer else np.float64)
            return values.astype(modality.dtype).reshape(modality.fixed_shape)
        text = cells[positions[0]]
        if kind == "class":
            names = self.class_names.get(modality.name)
            return int(text) if names is None else names[text.strip()]
        if kind == "text":
            return pack_content(text.encode("utf-8"), modality, modality.extension)
        return pack_file(_inside(self.root, text), modality)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def load_table_source(
    path: Path,
    columns: Mapping[str, Column],
    requests: Sequence[ModalityRequest],
    choice: SplitChoice,
    root: Path | None = None,
    delimiter: str = ",",
    key_column: str | None = None,
    skip_incomplete: bool = False,
    standardization: Standardization | None = None,
) -> tuple[TableSource, list[str]]:
    """Check all rows of a table with a header, and the files that it names.

    Args:
        path: the CSV file, UTF-8.
        columns: where each modality is.
        requests: the modalities, in order; what they leave open is found in the table.
        choice: which samples to take.
        root: the folder of the files that cells name, which must lie in it; default: the folder of the table.
        delimiter: between the cells.
        key_column: its cells are the keys of the samples; default: keys are numbers.
        skip_incomplete: leave out rows with an empty or wrong cell, or an unreadable file, instead of refusing them.
        standardization: vectors that get an offset and a scale of every element.

    Returns:
        The source, and what its user may want to know.

    Raises:
        ConfigError: the file cannot be opened, has no such column, or an option does not fit.
        DataError: a row or a file is not what it should be; names line and column.
    """
    check_names(requests)
    standardization = standardization or Standardization()
    root = path.parent if root is None else root
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            table = _Table(path, file, delimiter)
            positions = {name: _positions(table, name, column) for name, column in columns.items()}
            keys = None if key_column is None else _Keys(table, key_column)
            labels = [_LabelColumn(table, *column) for column in choice.label_columns.items()]
            checks = _Checks(columns, positions, requests, table, root)
            with progress(size // 10**6, "looking at the table, MB") as advance:
                complete, left_out = _complete_rows(table, checks, keys, labels, skip_incomplete, advance)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if not len(table.offsets):
        raise DataError(f"{path}: no rows after the header")
    if not len(complete):
        raise DataError(f"{path}: no row is complete: {left_out.describe()}")
    modalities, notes, class_names = checks.conclude(may_name_classes=not choice.is_whole)
    details: dict[str, Any] = {"files": input_files(path)}
    if class_names:
        details["class_names"] = {name: list(numbers) for name, numbers in class_names.items()}
    if skip_incomplete:
        details["left_out"] = left_out.num_rows
        notes = [f"left out: {left_out.describe()}"] * (left_out.num_rows > 0) + notes
    labels_by_title = {column.title: column.labels() for column in labels}
    rows_by_number = np.array(complete, np.int64)

    def rows_of_split(split: str) -> np.ndarray:
        rows: np.ndarray = rows_by_number[rows_of(choice, split, len(complete), labels_by_title)]
        return rows

    source = TableSource(
        path=path,
        delimiter=delimiter,
        root=root,
        split=choice.split,
        modalities=modalities,
        columns={name: (column.kind, positions[name]) for name, column in columns.items()},
        class_names=class_names,
        offsets=np.array(table.offsets, np.int64),
        lines=np.array(table.lines, np.int64),
        rows=rows_of_split(choice.split),
        keys=None if keys is None else keys.of_rows,
        sample_bytes=max(1, checks.total_bytes // len(complete)),
        details={**details, **choice.description(), **standardization.description()},
    )
    transformed, about = standardized(
        modalities, standardization, lambda: source.moments(standardization.names, rows_of_split("train"))
    )
    return replace(source, modalities=transformed), notes + split_notes(choice, labels_by_title) + about


def _complete_rows(
    table: _Table,
    checks: _Checks,
    keys: _Keys | None,
    labels: Sequence[_LabelColumn],
    skip_incomplete: bool,
    advance: Callable[[int], None],
) -> tuple[array[int], _LeftOut]:
    """Check all rows: the numbers of those that are complete, and what is wrong with the others."""
    complete, left_out, done = array("q"), _LeftOut(), 0
    for row, cells in enumerate(table):
        if keys is not None:
            keys.take(cells)
        try:
            # First: a row that is left out shall not add to what the checks find.
            values = [column.read(cells) for column in labels]
            checks.check(cells)
            complete.append(row)
            for column, value in zip(labels, values, strict=True):
                column.add(value)
        except _CellError as error:
            if not skip_incomplete:
                table.fail(f"{error}; --incomplete skip leaves such rows out")
            left_out.add(error, table.lines[-1])
        advance(table.offset // 10**6 - done)
        done = table.offset // 10**6
    return complete, left_out


class _CellError(DataError):
    """A cell that is not what it should be; says in which column."""

    def __init__(self, column: str, problem: object) -> None:
        super().__init__(f"column {column!r}: {problem}")
        self.column = column


class _LeftOut:
    """Rows that are not complete: how many there are by column, and what is wrong with the first one."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._by_column: dict[str, int] = {}
        self._first = ""

    def add(self, error: _CellError, line: int) -> None:
        self._first = self._first or f"line {line}: {error}"
        self.num_rows += 1
        self._by_column[error.column] = self._by_column.get(error.column, 0) + 1

    def describe(self) -> str:
        most = sorted(self._by_column.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{count:,} by {column!r}" for column, count in most[:_MAX_COLUMNS_SHOWN])
        more = ", ..." if len(most) > _MAX_COLUMNS_SHOWN else ""
        return f"{self.num_rows:,} rows ({shown}{more}); first {self._first}"


class _Keys:
    """The cells of the column that names the samples."""

    def __init__(self, table: _Table, title: str) -> None:
        (self._position,) = _positions(table, "--key", Column("key", (title,)))
        self._table, self._title = table, title
        self._lines: dict[str, int] = {}

    def take(self, cells: Sequence[str]) -> None:
        """Note the key of a row; raises DataError naming the line."""
        key = cells[self._position].strip()
        if not PLAIN_KEY.fullmatch(key):
            self._table.fail(
                f"column {self._title!r}: {key[:60]!r} cannot be a key: up to 50 letters, digits, - and _, "
                "the first one no sign"
            )
        line = self._lines.setdefault(key, self._table.lines[-1])
        if line != self._table.lines[-1]:
            self._table.fail(f"column {self._title!r}: line {line} has the key {key!r}, too")

    @property
    def of_rows(self) -> list[str]:
        return list(self._lines)


class _LabelColumn(LabelCollector):
    """A column that decides how the table is split."""

    def __init__(self, table: _Table, option: str, title: str) -> None:
        super().__init__(title)
        (self._position,) = _positions(table, option, Column("class", (title,)))

    def read(self, cells: Sequence[str]) -> str:
        """The value of a row; raises _CellError if there is none."""
        try:
            return label_of(cells[self._position])
        except DataError as error:
            raise _CellError(self.title, error) from None


class _Lines:
    """Lines of a file as text; `offset` is where the next one begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = file.tell()
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(f"more than {_MAX_LINE_BYTES} bytes in one line")
        text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
        self.offset += len(line)
        self.number += 1
        return text


def _rows(lines: _Lines, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_LINE_BYTES)  # of the process; the default refuses texts beyond 128 KiB
    return csv.reader(lines, delimiter=delimiter, strict=True)


class _Table:
    """The rows of a CSV file after its header, with the places where they begin."""

    def __init__(self, path: Path, file: BinaryIO, delimiter: str) -> None:
        self.path = path
        self._lines = _Lines(file)
        self._reader = _rows(self._lines, delimiter)
        self.offsets, self.lines = array("q"), array("q")
        self.header = self._next()
        if self.header is None:
            raise DataError(f"{path}: the file is empty")

    def __iter__(self) -> Iterator[list[str]]:
        assert self.header is not None
        while True:
            offset, line = self._lines.offset, self._lines.number + 1
            cells = self._next()
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            self.offsets.append(offset)
            self.lines.append(line)
            if len(cells) != len(self.header):
                self.fail(f"{len(cells)} cells, the header has {len(self.header)}")
            yield cells

    @property
    def offset(self) -> int:
        return self._lines.offset

    def fail(self, problem: str) -> None:
        """Raise the DataError of the row that was yielded last."""
        raise DataError(f"{self.path}: line {self.lines[-1] if self.lines else 1}: {problem}")

    def _next(self) -> list[str] | None:
        try:
            return next(self._reader, None)
        except (csv.Error, UnicodeDecodeError, DataError) as error:
            raise DataError(f"{self.path}: line {self._lines.number + 1}: {error}") from None


def _positions(table: _Table, name: str, column: Column) -> tuple[int, ...]:
    assert table.header is not None
    found: list[int] = []
    for pattern in column.names:
        matches = [number for number, title in enumerate(table.header) if title == pattern]
        if not matches and column.kind == "vector":
            matches = [n for n, title in enumerate(table.header) if fnmatch.fnmatchcase(title, pattern)]
        elif len(matches) > 1:
            raise ConfigError(f"{table.path} has two columns {pattern!r}")
        if not matches:
            raise ConfigError(f"{name}: {table.path} has no column {pattern!r}; it has {_shown(table.header)}")
        found += matches
    if len(set(found)) != len(found):
        raise ConfigError(f"{name}: a column is named twice")
    return tuple(found)


def _shown(header: Sequence[str]) -> str:
    return ", ".join(header[:20]) + (", ..." if len(header) > 20 else "")


class _Checks:
    """Looks at every row once: what is wrong with it, and what all rows have in common."""

    def __init__(
        self,
        columns: Mapping[str, Column],
        positions: Mapping[str, tuple[int, ...]],
        requests: Sequence[ModalityRequest],
        table: _Table,
        root: Path,
    ) -> None:
        self.total_bytes = 0
        self._columns, self._positions, self._table, self._root = columns, positions, table, root
        self._requests = {request.name: request for request in requests}
        self._order = sorted(columns, key=lambda name: _KINDS_BY_CHECK.index(columns[name].kind))
        self._encodings: dict[str, str] = {}
        self._facts: dict[str, Facts] = {name: Facts() for name in columns}
        self._class_names: dict[str, set[str]] = {name: set() for name in columns}
        self._extensions: dict[str, set[str]] = {name: set() for name in columns}
        self._files: dict[str, tuple[ModalityRequest, Facts]] = {}  # of the row under way

    def check(self, cells: Sequence[str]) -> None:
        """Take in a row; raises _CellError naming the column, and then nothing of the row counts."""
        assert self._table.header is not None
        num_bytes = 0
        for name in self._order:
            column, positions = self._columns[name], self._positions[name]
            position = positions[0]
            try:
                if column.kind == "vector":
                    for position in positions:
                        _number(cells[position], column.dtype)
                    size = _NPY_HEADER_BYTES + len(positions) * np.dtype(column.dtype).itemsize
                else:
                    size = self._check_cell(name, column, cells[position])
            except (ValueError, DataError) as error:
                raise _CellError(self._table.header[position], error) from None
            num_bytes += member_bytes(size)
        self.total_bytes += num_bytes
        for name, column in self._columns.items():
            self._count_cell(name, column, cells[self._positions[name][0]])

    def _check_cell(self, name: str, column: Column, cell: str) -> int:
        """Returns the size of the member that the cell becomes."""
        if column.kind == "class":
            _class_name(cell, column.class_names)
            return 1
        if column.kind == "text":
            return len(cell.encode("utf-8"))
        return self._check_file(name, cell)

    def _count_cell(self, name: str, column: Column, cell: str) -> None:
        if column.kind == "class":
            self._class_names[name].add(_class_name(cell, column.class_names))
            if len(self._class_names[name]) > MAX_CLASSES:
                self._table.fail(f"{name}: more than {MAX_CLASSES} classes")
        elif column.kind == "text":
            example = f"{self._table.path}: line {self._table.lines[-1]}"
            self._facts[name].add_size(len(cell.encode("utf-8")), example)
        elif column.kind == "path":
            request, facts = self._files[name]
            self._encodings[name] = request.encoding
            self._extensions[name] |= set(request.extensions)
            self._facts[name].merge(facts)

    def _check_file(self, name: str, cell: str) -> int:
        path = _inside(self._root, cell)
        request = request_for_files(self._requests[name], [cell])
        if request.encoding != self._encodings.get(name, request.encoding):
            raise DataError(f"{cell} is {request.encoding}, the files before are {self._encodings[name]}")
        facts = Facts()
        (size,) = inspect_sample([request], {name: path}, {name: facts})
        self._files[name] = request, facts
        return size

    def conclude(self, may_name_classes: bool) -> tuple[tuple[Modality, ...], list[str], dict[str, dict[str, int]]]:
        """Modalities, notes for the user, and the numbers of classes that have names."""
        modalities, notes = [], []
        class_names: dict[str, dict[str, int]] = {}
        for name, column in self._columns.items():
            request = self._requests[name]
            if column.kind == "vector":
                modalities.append(_vector(request, column, len(self._positions[name])))
                continue
            if column.kind == "class":
                numbers = _class_numbers(name, column, self._class_names[name], may_name_classes)
                if numbers is not None:
                    class_names[name] = numbers
                largest = len(numbers) - 1 if numbers is not None else max(map(int, self._class_names[name]))
                if request.num_classes is not None and largest >= request.num_classes:
                    names = "" if numbers is None else f" (the names are {_shown(list(numbers))})"
                    raise DataError(
                        f"{name}: class {largest} is not below the {request.num_classes} classes given{names}"
                    )
                self._facts[name].largest = largest
            elif column.kind == "path":
                extensions = tuple(sorted(self._extensions[name]))
                request = replace(request, encoding=self._encodings[name], extensions=extensions)
            (modality,), about = conclude_all([request], self._facts)
            modalities.append(modality)
            notes += about
        return tuple(modalities), notes, class_names


def _number(cell: str, dtype: str) -> float | int:
    """The number in a cell, exactly where the dtype is one of integers.

    Raises:
        DataError: It is none, or none of that dtype.
    """
    try:
        number = float(cell)
    except ValueError:
        raise DataError(f"{cell[:40]!r} is not a number") from None
    if not math.isfinite(number):
        raise DataError(f"{cell[:40]!r} is not finite")
    kind = np.dtype(dtype).kind
    if kind == "f" and abs(number) > float(np.finfo(dtype).max):
        raise DataError(f"{cell[:40]!r} is beyond the range of {dtype}")
    if kind not in "iu":
        return number
    exact = _integer(cell, number)
    limits = np.iinfo(dtype)
    if exact is None or not limits.min <= exact <= limits.max:
        raise DataError(f"{cell[:40]!r} is not a number of dtype {dtype}")
    return exact


def _integer(cell: str, number: float) -> int | None:
    """What a cell says, also beyond 2^53, where floats leave integers out; None if that is no integer.

    Args:
        cell: The text.
        number: What it is as a float.
    """
    try:
        return int(cell)
    except ValueError:  # such as 3.0 or 1e3
        return int(number) if number.is_integer() and abs(number) <= 2**53 else None


def _class_name(cell: str, allowed: tuple[str, ...] | None) -> str:
    name = cell.strip()
    if not name:
        raise DataError("is empty")
    if len(name) > MAX_CLASS_NAME_CHARACTERS:
        raise DataError(f"{name[:60]!r}... has {len(name):,} characters, which is no class")
    if allowed is not None and name not in allowed:
        raise DataError(f"{name[:60]!r} is not one of the --class-names: {_shown(allowed)}")
    return name


def _class_numbers(modality: str, column: Column, names: set[str], may_name: bool) -> dict[str, int] | None:
    """Numbers for classes, as stated or in alphabetical order; None if the names are numbers themselves."""
    if column.class_names is not None:
        return {name: number for number, name in enumerate(column.class_names)}
    if all(name.isascii() and name.isdigit() for name in names):
        return None
    if not may_name:
        raise ConfigError(
            f"{modality}: classes with names get numbers in alphabetical order, which could differ between files; "
            f"say the names for all files with --class-names {modality}={','.join(sorted(names)[:20])}, use numbers, "
            "or one file with --test-fraction"
        )
    if len(names) > MAX_CLASS_NAMES:
        raise DataError(f"{modality}: {len(names)} different names of classes, more than {MAX_CLASS_NAMES}")
    return {name: number for number, name in enumerate(sorted(names))}


def _vector(request: ModalityRequest, column: Column, num_columns: int) -> Modality:
    shape = (num_columns,) if column.shape is None else column.shape
    if math.prod(shape) != num_columns:
        raise ConfigError(f"--shape {request.name}: {list(shape)} does not fit {num_columns} columns")
    scale = 1.0 if request.scale is None else request.scale
    try:
        return Modality(request.name, column.dtype, shape, offset=request.offset, scale=scale)
    except ValueError as error:
        raise ConfigError(f"modality {request.name!r}: {error}") from None


def _inside(root: Path, cell: str) -> Path:
    """The file that a cell names, which must not lead out of the folder."""
    folder = root.resolve()
    path = (folder / cell).resolve()
    if not cell or not path.is_relative_to(folder) or path == folder:
        raise DataError(f"{cell[:200]!r} is not a file below {folder}; see --root")
    return path
