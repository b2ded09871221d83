"""Targets of indexing: tars of others, and what an interrupted indexing has left."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmvae_dist.data.indexing.build import index_shards
from jmvae_dist.data.indexing.inference import infer_requests
from jmvae_dist.data.indexing.inspection import ModalityRequest, conclude
from jmvae_dist.data.indexing.opening import identify
from jmvae_dist.data.indexing.shard_scan import scan_shard
from jmvae_dist.data.indexing.workspace import Workspace
from jmvae_dist.data.reader import ShardReader
from tests.fuzz.material import MIXED, SAMPLES, SHARDS, WrongDataError, check_value, make_tar, mixed_members
from tests.fuzz.mutations import PICKLE, Random, mutate_bytes, mutate_json, mutate_tar
from tests.fuzz.target import REFUSALS, Target

REQUESTS = tuple(
    ModalityRequest(modality.name, modality.extensions, modality.encoding, modality.num_classes, field=modality.field)
    for modality in MIXED
)
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


class ForeignTarget(Target):
    """Tars of others, damaged, indexed: by Python, GNU and PAX, with long names and other people's members."""

    def __init__(self) -> None:
        samples = {f"{number:03d}": mixed_members(number) for number in range(SAMPLES)}
        deep = {f"{'folder/' * 20}schl\u00fcssel-{number}": mixed_members(number) for number in range(3)}
        hostile = {key: {**members, "pyd": b"x", "pkl": PICKLE} for key, members in samples.items()}
        self._tars = (
            make_tar(samples, tarfile.USTAR_FORMAT),
            make_tar(hostile, tarfile.GNU_FORMAT),
            make_tar(deep, tarfile.GNU_FORMAT),
            make_tar(samples, tarfile.PAX_FORMAT, mtime=1.5),
            make_tar(deep, tarfile.PAX_FORMAT, mtime=0.25, uname="\u00e9"),
        )

    def run(self, rng: Random, folder: Path, number: int) -> None:
        tar = mutate_tar(rng, rng.choice(self._tars))
        with contextlib.suppress(*REFUSALS):
            infer_requests(io.BytesIO(tar), "shard.tar")
        scan = scan_shard(io.BytesIO(tar), "shard.tar", REQUESTS)
        if (scan.num_bytes, scan.sha256) != (len(tar), hashlib.sha256(tar).hexdigest()):
            raise WrongDataError("size or digest of the tar is wrong")
        expected = _members_by_key(tar)
        if not set(expected) <= set(scan.keys):
            raise WrongDataError(f"samples {set(expected) - set(scan.keys)} were lost")
        may_lack = scan.findings.unreadable.count > 0
        for row, key in enumerate(scan.keys):
            for column, request in enumerate(REQUESTS):
                self._check_member(tar, scan.records[row, column], expected.get(key, {}), request, may_lack)
        for request, facts in zip(REQUESTS, scan.findings.facts, strict=True):
            if facts.kinds or facts.largest >= 0:
                conclude(request, facts)
        if number % 12 == 0:
            self._index(tar, folder)

    @staticmethod
    def _check_member(
        tar: bytes, record: np.ndarray, members: dict[str, list[bytes]], request: ModalityRequest, may_lack: bool
    ) -> None:
        offset, size = record.tolist()
        contents = [content for extension in request.extensions for content in members.get(extension, ())]
        if not contents or (may_lack and offset == 0):
            return  # `tarfile` sees no member where a time before it is not a number
        if tar[offset : offset + size] not in contents or (len(contents) > 1 and not may_lack):
            raise WrongDataError(f"{request.name}: offset {offset}, size {size} is not the member, or one of several")

    @staticmethod
    def _index(tar: bytes, folder: Path) -> None:
        """All the way: manifest and indexes on disk, and the samples read through them."""
        path = folder / "shard.tar"
        path.write_bytes(tar)
        out = folder / "manifest.json"
        manifest = index_shards([str(path)], out, REQUESTS, incomplete="skip", workers=1).manifest
        expected = _members_by_key(tar)
        with contextlib.closing(ShardReader(manifest, 0)) as reader:
            for row, modality in itertools.product(range(reader.num_samples), manifest.modalities):
                members = expected.get(reader.key(row, modality.name), {})
                contents = [content for name in modality.extensions for content in members.get(name, ())]
                if not contents:
                    continue  # `tarfile` gives up where an owner or a time before it is not a number
                value = reader.read_stored(np.array([row]), modality.name)[0] if modality.has_fixed_shape else None
                offset, size = reader.location(row, modality.name)
                if tar[offset : offset + size] not in contents:
                    raise WrongDataError(f"sample {row}, {modality.name}: not a member of the sample")
                if value is not None:
                    check_value(value, tar[offset : offset + size], modality, f"sample {row}")


def _members_by_key(tar: bytes) -> dict[str, dict[str, list[bytes]]]:
    """Samples as `tarfile` and webdataset's rules find them, with the extensions of REQUESTS."""
    wanted = {extension for request in REQUESTS for extension in request.extensions}
    samples: dict[str, dict[str, list[bytes]]] = {}
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as opened:
        for info in opened:
            match = _NAME.fullmatch(info.name)
            if not info.isreg() or match is None or re.match(r"__[^/]*__(/|$)", info.name):
                continue
            if match[2].lower() in wanted:
                content = tar[info.offset_data : info.offset_data + info.size]
                samples.setdefault(match[1], {}).setdefault(match[2].lower(), []).append(content)
    return samples


class WorkspaceTarget(Target):
    """What an interrupted indexing has left, damaged: the result is the same, or there is none."""

    def __init__(self) -> None:
        self._tars = [
            make_tar(
                {f"{shard}-{row}": mixed_members(SAMPLES * shard + row) for row in range(SAMPLES)}, tarfile.PAX_FORMAT
            )
            for shard in range(SHARDS)
        ]
        self._expected: tuple[str, ...] | None = None

    def run(self, rng: Random, folder: Path, number: int) -> None:
        paths = [folder / f"{shard}.tar" for shard in range(SHARDS)]
        for path, tar in zip(paths, self._tars, strict=True):
            path.write_bytes(tar)
        if self._expected is None:
            self._expected = self._indexes(paths, folder / "expected.json")
        workspace = Workspace(folder / "manifest.json", REQUESTS)
        for path, tar in zip(paths, self._tars, strict=True):
            workspace.save(str(path), identify(str(path)), scan_shard(io.BytesIO(tar), str(path), REQUESTS))
        for file in sorted(workspace.folder.iterdir()):
            if rng.random() < 0.4:
                content = file.read_bytes()
                is_json = file.suffix == ".json" and rng.random() < 0.5
                file.write_bytes(mutate_json(rng, _json_in(content)) if is_json else mutate_bytes(rng, content))
        if self._indexes(paths, folder / "manifest.json") != self._expected:
            raise WrongDataError("the indexes differ from those of a run without interruption")

    @staticmethod
    def _indexes(paths: Sequence[Path], out: Path) -> tuple[str, ...]:
        manifest = index_shards([str(path) for path in paths], out, REQUESTS, workers=1).manifest
        files = [file for shard in manifest.shards for file in (shard.index, shard.sums)]
        return manifest.fingerprint, *(file.sha256 for file in files if file is not None)


def _json_in(content: bytes) -> Any:
    """The document in a file of a workspace, which may have a line before it."""
    return json.loads(content[content.index(b"{") :])
