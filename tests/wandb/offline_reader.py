"""Reads the `.wandb` file of an offline run: LevelDB's log framing around protobuf records.

A file starts with a header of 7 bytes; blocks of 32 KiB follow. A chunk is crc32 (4 bytes, over type and body),
length (2), type (1: a whole record, 2: its first part, 3: a middle part, 4: its last part) and body.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER_BYTES = 7
BLOCK_BYTES = 32768
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass
class OfflineRun:
    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None


def read_offline_run(folder: Path) -> OfflineRun:
    """The contents of `folder/run-ID.wandb` up to the first torn chunk."""
    (path,) = folder.glob("*.wandb")
    run = OfflineRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id = record.run.run_id
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.rows.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "files":
            run.files += [file.path for file in record.files.files]
        elif kind == "metric":
            run.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    assert data.startswith(b":W&B"), data[:HEADER_BYTES]
    position, parts = HEADER_BYTES, b""
    while position + 7 <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if left < 7 or (kind == 0 and length == 0):
            position += left
            continue
        body = data[position + 7 : position + 7 + length]
        if len(body) < length or checksum != zlib.crc32(bytes([kind]) + body):
            return
        position += 7 + length
        parts = body if kind in (WHOLE, FIRST) else parts + body
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def _items(items: Any) -> dict[str, Any]:
    return {(".".join(item.nested_key) or item.key): json.loads(item.value_json or "null") for item in items}
