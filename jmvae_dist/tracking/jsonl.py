"""`metrics.jsonl`: the record of a run, one JSON object per line.

Every record has a `global_step`; a training record and an evaluation record may share it. Everything else that
shows metrics (W&B, the report) is a copy of this file.

What survives what:

- a crash or SIGKILL of the process: every record whose `write` returned (the line was handed to the operating
  system in one piece; nothing waits in a buffer of ours);
- a power loss: every record before the last `sync`. Call `sync` before a checkpoint is committed, and no
  record that a resumed run relies on can be missing: the newer ones are dropped and logged again anyway.

The lines are strict JSON, which has no NaN and no infinities: such values are written as the strings "NaN",
"Infinity" and "-Infinity", and `read_records` turns them back into floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jmvae_dist.errors import DataError
from jmvae_dist.files import writing_atomic

_MAX_STEP = 2**63 - 1
# Key of the verb that made an evaluation, `train` or `evaluate`: their settings differ.
EVALUATED_BY = "evaluated_by"
# As `resume_step`: the record is only added to.
EVERY_RECORD = _MAX_STEP
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends records to `metrics.jsonl`; for the one process (rank 0) that writes the file.

    Args:
        path: The file; created with its parent directories when missing.
        resume_step: Global step of the checkpoint that the run continues from. Records of later steps are
            removed, because those steps run again, and so is a line torn by a crash; the rest stays byte for
            byte. EVERY_RECORD: none is removed. None: the run is new.

    Raises:
        DataError: The file has records although the run is new, or a line other than the last is damaged.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._rewind(resume_step)
        self._file_descriptor: int | None = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
        )

    def _rewind(self, resume_step: int | None) -> None:
        if resume_step is None:
            if next(_iterate(self.path), None) is not None:
                raise DataError(
                    f"{self.path}: holds the records of another run; choose a new output_dir or resume that run"
                )
            resume_step = 0
        kept_bytes = sum(len(line) for line, record in _iterate(self.path) if record["global_step"] <= resume_step)
        if kept_bytes == self.path.stat().st_size:
            return
        with writing_atomic(self.path) as rewound:
            for line, record in _iterate(self.path):
                if record["global_step"] <= resume_step:
                    rewound.write(line)

    def write(self, record: dict[str, Any]) -> None:
        """Append `record` as one line; when this returns, a crash of the process cannot lose it.

        Args:
            record: Names to numbers, strings, booleans or None (numpy scalars and one-element tensors are
                converted), among them the integer `global_step`.

        Raises:
            OSError: The line could not be written (disk full, quota). What was written of it is removed.
        """
        assert isinstance(record.get("global_step"), int), f"a record needs an integer global_step: {record}"
        assert self._file_descriptor is not None, "the record is closed"
        plain = {name: _to_json_value(value) for name, value in record.items()}
        line = json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        start = os.fstat(self._file_descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file_descriptor, line[written:])
        except OSError:
            # Otherwise the next record would continue the torn line, and both would be unreadable.
            os.ftruncate(self._file_descriptor, start)
            raise

    def sync(self) -> None:
        """Make all records durable against a power loss; call it before a checkpoint is committed."""
        assert self._file_descriptor is not None, "the record is closed"
        os.fsync(self._file_descriptor)

    def close(self) -> None:
        """Sync and close; further calls do nothing."""
        if self._file_descriptor is not None:
            self.sync()
            os.close(self._file_descriptor)
            self._file_descriptor = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in the order of the file; a torn last line is left out.

    Raises:
        DataError: The file cannot be read, or a line other than the last is damaged.
    """
    return list(iterate_records(path))


def iterate_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield what `read_records` returns, one record at a time, for runs that are too long for a list."""
    for _, record in _iterate(Path(path)):
        yield record


def readable_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield what `iterate_records` does, up to the first damage, and nothing of a file that cannot be read.

    For those who look only; whoever continues the record says what is wrong with it.
    """
    with contextlib.suppress(DataError):
        yield from iterate_records(path)


def last_recorded_step(path: str | Path) -> int:
    """Highest `global_step` of a `metrics.jsonl`; 0 if it has no readable record.

    All of the file is read: an evaluation of an old checkpoint stands behind the records of later steps.
    """
    return max((record["global_step"] for record in readable_records(path)), default=0)


def newest_values(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The value of every key at the highest `global_step` that has it; of several there, the one written last.

    The order of the records does not tell: an old checkpoint may have been evaluated last.
    """
    steps: dict[str, int] = {}
    values: dict[str, Any] = {}
    for record in records:
        step = record["global_step"]
        for name, value in record.items():
            if step >= steps.get(name, step):
                steps[name], values[name] = step, value
    return values


def parse_record(line: bytes) -> dict[str, Any]:
    """The record on one line of `metrics.jsonl`.

    Raises:
        ValueError: The line is not a JSON object with an integer `global_step` of at most 64 bits.
    """
    record = json.loads(line, parse_constant=_refuse_constant)
    step = record.get("global_step") if isinstance(record, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) > _MAX_STEP:
        raise ValueError("no integer global_step")
    return {name: _from_json_value(value) for name, value in record.items()}


def _iterate(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line with its newline, record); stop at a last line that is torn or damaged."""
    try:
        with open(path, "rb") as file:
            failure: str | None = None
            for number, line in enumerate(file, start=1):
                if failure is not None:
                    raise DataError(f"{failure}; restore the file or move it away")
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("the line has no end")
                    record = parse_record(line)
                except (ValueError, RecursionError) as error:
                    failure = f"{path}: line {number} is damaged ({error})"
                    continue
                yield line, record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _to_json_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if not isinstance(value, float):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json_value(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
