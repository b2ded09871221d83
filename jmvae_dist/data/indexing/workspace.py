"""What was found in the shards read so far, on disk beside the manifest: a killed index goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jmvae_dist.data.digest import DIGEST_BYTES
from jmvae_dist.data.index import RECORD_DTYPE
from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.indexing.opening import Identity
from jmvae_dist.data.indexing.shard_scan import Findings, ShardScan
from jmvae_dist.files import writing_atomic

Incomplete = Literal["error", "skip", "keep"]

_VERSION = 4


@dataclass(frozen=True)
class ShardRecord:
    """What was found in a shard, without its index, which stays on disk."""

    shard: str
    identity: Identity
    num_bytes: int
    sha256: str
    num_samples: int
    data_sha256: str
    findings: Findings

    def samples_kept(self, incomplete: Incomplete) -> int:
        """How many samples the index will have."""
        return self.num_samples - (0 if incomplete == "keep" else self.findings.incomplete.count)


class Workspace:
    """The folder beside the manifest that remembers what was read, for one choice of modalities."""

    def __init__(self, out: Path, requests: Sequence[ModalityRequest]) -> None:
        self.out = out
        self.requests = requests
        self.folder = out.with_name(f".{out.name}.indexing")
        self.folder.mkdir(exist_ok=True)
        # What is given later about a modality, such as a length, does not change what is found.
        what = [[request.extensions, request.encoding, request.field, request.num_classes] for request in requests]
        self._what = json.dumps(what)

    def load(self, shard: str, identity: Identity) -> ShardRecord | None:
        """What an earlier process found in this shard; None if it did not, or if anything has changed since."""
        try:
            digest, _, text = self._path(shard, ".json").read_bytes().partition(b"\n")
            if hashlib.sha256(text).hexdigest().encode() != digest:
                return None
            content = json.loads(text)
            if content.pop("version") != _VERSION or content["identity"] != identity or content["shard"] != shard:
                return None
            record = ShardRecord(**{**content, "findings": Findings.from_json(content["findings"])})
            data = self._path(shard, ".data").read_bytes()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if hashlib.sha256(data).hexdigest() == record.data_sha256 else None

    def save(self, shard: str, identity: Identity, scan: ShardScan) -> ShardRecord:
        """Remember a shard; the record, which says that the rest is complete, last."""
        data = scan.records.tobytes() + scan.digests.tobytes() + _key_hashes(scan.keys)
        record = ShardRecord(
            shard=shard,
            identity=identity,
            num_bytes=scan.num_bytes,
            sha256=scan.sha256,
            num_samples=len(scan.keys),
            data_sha256=hashlib.sha256(data).hexdigest(),
            findings=scan.findings,
        )
        text = json.dumps({"version": _VERSION, **asdict(record)}).encode()
        sealed = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        for suffix, content in ((".data", data), (".json", sealed)):
            with writing_atomic(self._path(shard, suffix)) as file:
                file.write(content)
        return record

    def index_records(self, record: ShardRecord) -> np.ndarray:
        """The index records of a shard, also of incomplete samples: (samples, modalities)."""
        data, count = self._path(record.shard, ".data").read_bytes(), record.num_samples * len(self.requests)
        return np.frombuffer(data, RECORD_DTYPE, count).reshape(record.num_samples, len(self.requests))

    def digests(self, record: ShardRecord) -> np.ndarray:
        """The digests of the members of these samples: uint64 (samples, modalities)."""
        data, count = self._path(record.shard, ".data").read_bytes(), record.num_samples * len(self.requests)
        digests = np.frombuffer(data, np.uint64, count, count * RECORD_DTYPE.itemsize)
        return digests.reshape(record.num_samples, len(self.requests))

    def key_hashes(self, record: ShardRecord) -> np.ndarray:
        """64-bit hashes of the keys of a shard: uint64 (samples,)."""
        data, count = self._path(record.shard, ".data").read_bytes(), record.num_samples * len(self.requests)
        return np.frombuffer(data, np.uint64, offset=count * (RECORD_DTYPE.itemsize + DIGEST_BYTES))

    def remove(self) -> None:
        """Forget everything: the result is on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: str, suffix: str) -> Path:
        digest = hashlib.sha256(f"{self._what}\0{shard}".encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{digest[:32]}{suffix}"


def _key_hashes(keys: Sequence[str]) -> bytes:
    return b"".join(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
