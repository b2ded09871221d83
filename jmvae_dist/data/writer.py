"""Writes a source as tar shards with indexes and a manifest: complete and durable, or not there at all.

    DIR/shard-000000.tar         USTAR, readable by plain webdataset: <key>.<modality>.npy or .cls
    DIR/shard-000000.tar.index   where each member lies (see `jmvae_dist.data.index`)
    DIR/shard-000000.tar.sums    a digest of each member (see `jmvae_dist.data.sums`)
    DIR/manifest.json            written last

Everything is written to a hidden folder beside DIR, which takes its name only when it is complete, so
whatever has the name DIR is complete. A lock file beside DIR keeps other writers away meanwhile. The bytes
depend on the source and the options alone.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jmvae_dist.data.digest import member_digest
from jmvae_dist.data.exclusive import locked, os_errors_explained
from jmvae_dist.data.index import MAX_INDEX_BYTES, MAX_MEMBER_BYTES, RECORD_DTYPE, index_bytes, index_num_bytes
from jmvae_dist.data.manifest import MANIFEST_NAME, Manifest
from jmvae_dist.data.modality import Modality, check_distinct_names
from jmvae_dist.data.philox import PURPOSE_PACKING, permutation
from jmvae_dist.data.processes import Report, default_workers, run_in_processes
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.data.sources.base import (
    TAR_BLOCK_BYTES,
    EncodedMember,
    SampleValue,
    Source,
    check_finite,
    check_seed,
    member_bytes,
)
from jmvae_dist.data.sums import sums_bytes
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.files import fsync_path, sha256_of
from jmvae_dist.progress import progress

_TAR_NAME_BYTES = 100
_OUR_FILES = re.compile(r"shard-\d{6,}\.tar(\.index|\.sums)?|manifest\.json")


def write_shards(
    source: Source,
    out: str | Path,
    *,
    samples_per_shard: int | None = None,
    bytes_per_shard: int | None = None,
    shuffle_seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> tuple[Manifest, bool]:
    """Write all samples of a source, shuffled, to the folder `out`.

    With several workers, a script must call this inside `if __name__ == "__main__":`, because every worker
    imports the script; and large arrays of the source are copied once to the disk of `out` while it is written.

    Args:
        source: the raw samples.
        out: the folder; must not exist, be empty, or hold shards written earlier.
        samples_per_shard: at most; samples are spread evenly, so that no shard is nearly empty.
        bytes_per_shard: in place of `samples_per_shard`: about how large a shard should be.
        shuffle_seed: raw data is often sorted by class, so samples are permuted before they are packed.
        workers: processes; by default the available CPUs, or one where that is faster.
        overwrite: replace existing shards of other content.

    Returns:
        The manifest at `out`, and whether it was written now (False: the same data was already there).

    Raises:
        ConfigError: an option is out of range, `out` holds something else, is being written by another process,
            or cannot be written (disk full, read-only).
        DataError: the source yields samples that are not what it declares, or a worker died.
    """
    # Symbolic links are resolved, so that the link stays and its target is replaced.
    out = Path(out).expanduser().resolve()
    samples_per_shard = _samples_per_shard(source, samples_per_shard, bytes_per_shard)
    _check_options(source, samples_per_shard, shuffle_seed, workers)
    if workers is None:
        workers = default_workers(len(source), len(source) * source.sample_bytes)
    with os_errors_explained(out), locked(out) as is_locked:
        existing = _existing_manifest(out, overwrite)
        if existing is not None and not overwrite and _differs_at_a_glance(existing, source):
            raise _other_content(out)
        with _Staging(out, is_locked) as staging:
            return _write_staged(source, staging, existing, samples_per_shard, shuffle_seed, workers, overwrite)


def _write_staged(
    source: Source,
    staging: _Staging,
    existing: Manifest | None,
    samples_per_shard: int,
    shuffle_seed: int,
    workers: int,
    overwrite: bool,
) -> tuple[Manifest, bool]:
    out = staging.out
    shards = _write_all(source, staging.path, samples_per_shard, shuffle_seed, workers)
    description = {
        **source.description(),
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": shuffle_seed,
    }
    manifest = Manifest.create(source.modalities, shards, description, out / MANIFEST_NAME)
    if existing is not None and existing.fingerprint == manifest.fingerprint:
        if _is_intact(existing):
            return existing, False
    elif existing is not None and not overwrite:
        raise _other_content(out)
    manifest.save(staging.path / MANIFEST_NAME)
    # Whatever is wrong with it must show now, not at the start of a training run.
    Manifest.load(staging.path / MANIFEST_NAME)
    fsync_path(staging.path)
    if _existing_manifest(out, overwrite) != existing:
        raise ConfigError(
            f"{out} was changed by somebody else while shards were written for it; nothing was replaced"
        )
    staging.commit()
    return manifest, True


@dataclass(frozen=True)
class _Packing:
    """What is written: samples of the source, one shard after another in this order."""

    source: Source
    order: np.ndarray


@dataclass(frozen=True)
class _Job:
    """One shard to write: its path and its part of the order."""

    path: Path
    start: int
    stop: int


def _samples_per_shard(source: Source, samples_per_shard: int | None, bytes_per_shard: int | None) -> int:
    if bytes_per_shard is None:
        return source.default_samples_per_shard if samples_per_shard is None else samples_per_shard
    if samples_per_shard is not None:
        raise ConfigError("--samples-per-shard and --bytes-per-shard exclude each other")
    if bytes_per_shard < 1:
        raise ConfigError(f"--bytes-per-shard must be at least 1, not {bytes_per_shard}")
    return max(1, round(bytes_per_shard / source.sample_bytes))


def _check_options(source: Source, samples_per_shard: int, shuffle_seed: int, workers: int | None) -> None:
    if len(source) == 0:
        raise DataError("the source has no samples")
    if samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard must be at least 1, not {samples_per_shard}")
    largest = min(samples_per_shard, len(source))
    if index_num_bytes(largest, len(source.modalities)) > MAX_INDEX_BYTES:
        raise ConfigError(
            f"{largest} samples of {len(source.modalities)} modalities are too many for one shard: its index would "
            f"have more than {MAX_INDEX_BYTES} bytes; lower --samples-per-shard"
        )
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {workers}")
    check_seed("--shuffle-seed", shuffle_seed)
    try:
        check_distinct_names(source.modalities)
    except ValueError as error:
        raise DataError(f"the source cannot be written: {error}") from None


def _shard_bounds(num_samples: int, samples_per_shard: int) -> list[tuple[int, int]]:
    """Start and stop of every shard; sizes differ by at most one, larger ones first."""
    num_shards = -(-num_samples // samples_per_shard)
    size, larger = divmod(num_samples, num_shards)
    starts = [number * size + min(number, larger) for number in range(num_shards + 1)]
    return list(pairwise(starts))


def _write_all(source: Source, folder: Path, samples_per_shard: int, shuffle_seed: int, workers: int) -> list[Shard]:
    packing = _Packing(source, permutation(len(source), seed=shuffle_seed, purpose=PURPOSE_PACKING))
    jobs = [
        _Job(folder / f"shard-{number:06d}.tar", start, stop)
        for number, (start, stop) in enumerate(_shard_bounds(len(source), samples_per_shard))
    ]
    arrays_folder = folder / "arrays"
    arrays_folder.mkdir()
    with progress(len(source), "writing samples") as advance:
        results = run_in_processes(_write_shard, packing, jobs, workers, folder=arrays_folder, advance=advance)
        shards = dict(results)
    shutil.rmtree(arrays_folder)
    return [shards[number] for number in range(len(jobs))]


# One shard


class _HashingFile(io.RawIOBase):
    """Passes bytes on to a file, counting and hashing them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def _write_shard(packing: _Packing, job: _Job, report: Report) -> Shard:
    """Write and fsync one shard, its index and its sums."""
    from webdataset import TarWriter

    source, modalities = packing.source, packing.source.modalities
    num_samples = job.stop - job.start
    records_NM = np.empty((num_samples, len(modalities)), RECORD_DTYPE)
    digests: list[int] = []
    encoders = [_MemberEncoder(modality) for modality in modalities]
    with open(job.path, "xb") as file:
        hashing = _HashingFile(file)
        # A fixed integer time: the bytes are reproducible, and no PAX header (1 KiB per member) is needed.
        with TarWriter(hashing, encoder=False, mtime=0, user="", group="", compress=False) as tar:
            for row, index in enumerate(packing.order[job.start : job.stop].tolist()):
                key, values = source.key(index), source.sample(index)
                members = dict(encoder.encode(key, values) for encoder in encoders)
                start = tar.tarstream.offset
                tar.write({"__key__": key, **members})
                end = _record_members(records_NM[row], members, key, start)
                assert tar.tarstream.offset == end, f"{key}: unexpected tar layout"
                digests += map(member_digest, members.values())
                report(row + 1)
        file.flush()
        os.fsync(file.fileno())
    return Shard(
        url=job.path.name,
        num_samples=num_samples,
        num_bytes=hashing.num_bytes,
        sha256=hashing.digest.hexdigest(),
        index=IndexFile.write(job.path.with_name(f"{job.path.name}.index"), index_bytes(records_NM)),
        sums=IndexFile.write(job.path.with_name(f"{job.path.name}.sums"), sums_bytes(digests)),
    )


def _record_members(records_M: np.ndarray, members: dict[str, bytes], key: str, start: int) -> int:
    """Fill in the index of one sample written at `start`; returns where the next one begins."""
    columns = {extension: column for column, extension in enumerate(members)}
    position = start
    for extension in sorted(members):  # the order in which TarWriter writes them
        if len(f"{key}.{extension}") > _TAR_NAME_BYTES:
            raise DataError(f"key {key!r} with {extension!r} exceeds the {_TAR_NAME_BYTES} bytes of a tar name")
        content_bytes = len(members[extension])
        if content_bytes > MAX_MEMBER_BYTES:
            raise DataError(f"{key}.{extension}: {content_bytes} bytes exceed the limit of 4 GiB per member")
        records_M[columns[extension]] = (position + TAR_BLOCK_BYTES, content_bytes)
        position += member_bytes(content_bytes)
    return position


class _MemberEncoder:
    """Encodes one modality; all its members of one dtype and shape share one npy header."""

    def __init__(self, modality: Modality) -> None:
        self.modality = modality
        self._header = _npy_header(modality) if modality.encoding == "npy" else b""

    def encode(self, key: str, values: Mapping[str, SampleValue]) -> tuple[str, bytes]:
        """Extension and bytes of this modality's member of one sample.

        Raises:
            DataError: the value is missing, not of the declared dtype, shape or classes, or not finite as stored
                or as the model sees it.
        """
        modality = self.modality
        if modality.name not in values:
            raise self._error(key, "is missing; every sample needs every modality")
        value = values[modality.name]
        if isinstance(value, EncodedMember):
            assert value.extension in modality.extensions
            return value
        if modality.encoding == "cls":
            return modality.extension, self._encode_class(key, int(value))
        array = np.asarray(value)
        if (array.dtype, array.shape) != (np.dtype(modality.dtype), modality.shape):
            raise self._error(
                key,
                f"is {array.dtype} {list(array.shape)}, declared as {modality.dtype} {list(modality.shape)}",
            )
        try:
            check_finite(modality, array)
        except ValueError as error:
            raise self._error(key, str(error)) from None
        return modality.extension, self._header + array.tobytes()

    def _encode_class(self, key: str, class_index: int) -> bytes:
        assert self.modality.num_classes is not None
        if not 0 <= class_index < self.modality.num_classes:
            raise self._error(key, f"class {class_index} is not in 0..{self.modality.num_classes - 1}")
        return f"{class_index:0{self.modality.class_digits}d}".encode("ascii")

    def _error(self, key: str, problem: str) -> DataError:
        return DataError(f"sample {key}: modality {self.modality.name!r}: {problem}")


def _npy_header(modality: Modality) -> bytes:
    header = io.BytesIO()
    example = np.empty(modality.fixed_shape, dtype=modality.dtype)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(example))
    return header.getvalue()


# The folder


def _existing_manifest(out: Path, overwrite: bool) -> Manifest | None:
    """The manifest already at `out`, or None where nothing is in the way.

    Raises:
        ConfigError: `out` holds anything that was not written by this module; that is never deleted.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    foreign = sorted(entry.name for entry in out.iterdir() if not _OUR_FILES.fullmatch(entry.name))
    if foreign:
        raise ConfigError(f"--out {out} holds other files ({foreign[0]}); choose a folder of its own")
    if not any(out.iterdir()):
        return None
    try:
        return Manifest.load(out / MANIFEST_NAME)
    except (ConfigError, DataError) as error:
        if overwrite:
            return None
        raise ConfigError(f"--out {out} holds shards without a sound manifest ({error}); add --overwrite") from None


def _differs_at_a_glance(existing: Manifest, source: Source) -> bool:
    """Tells most other content apart before time is spent on writing; the fingerprint decides the rest."""
    return existing.num_samples != len(source) or existing.modalities != tuple(source.modalities)


def _other_content(out: Path) -> ConfigError:
    return ConfigError(f"{out} holds shards of other content; choose another --out, or add --overwrite")


def _is_intact(manifest: Manifest) -> bool:
    """Whether all files that are written here are there with the sha256 that the manifest states."""
    try:
        return all(
            shard.sums is not None
            and _has_sha256(manifest.shard_path(number), shard.sha256)
            and _has_sha256(manifest.index_path(number), shard.index.sha256)
            and _has_sha256(manifest.sums_path(number), shard.sums.sha256)
            for number, shard in enumerate(manifest.shards)
        )
    except (OSError, DataError):
        return False


def _has_sha256(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


class _Staging:
    """A hidden folder beside `out` that becomes `out` on commit and is removed otherwise.

    Args:
        out: what the folder becomes.
        is_locked: no other writer can be alive: hidden folders that are there already were left behind by a
            killed one, and are removed.
    """

    def __init__(self, out: Path, is_locked: bool) -> None:
        self.out = out
        self.path = self._hidden_sibling()
        self._is_locked = is_locked

    def _hidden_sibling(self) -> Path:
        return self.out.with_name(f".{self.out.name}.writing-{secrets.token_hex(8)}")

    def __enter__(self) -> _Staging:
        self._remove_leftovers()
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> None:
        """Give the finished folder its name."""
        retired = self._hidden_sibling()
        if self.out.exists():
            # Moved aside before it is deleted: `out` is never a mixture of old and new shards.
            os.rename(self.out, retired)
        os.rename(self.path, self.out)
        fsync_path(self.out.parent)
        shutil.rmtree(retired, ignore_errors=True)
        # Again: worker processes that outlived their killed writer may have written on while we removed it.
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        if self._is_locked:
            for leftover in self.out.parent.glob(f".{glob.escape(self.out.name)}.writing-*"):
                shutil.rmtree(leftover, ignore_errors=True)
