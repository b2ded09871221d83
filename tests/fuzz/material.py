"""Small sound data sets to be damaged, and an independent reading of their members to compare with."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jmvae_dist.data.digest import member_digest
from jmvae_dist.data.index import RECORD_DTYPE, index_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.data.sums import sums_bytes

MIXED = (
    Modality.image("photo", (3, 6, 5), "jpg|png"),
    Modality("x", "float32", (3,), member="npy"),
    Modality.classes("label", 60, "cls"),
    Modality.text("caption", 8, "txt"),
    Modality("score", "float32", (2,), "json", member="json", field="score"),
)
ARRAYS = (Modality("image", "float32", (2, 3), offset=-1.0, scale=0.5), Modality.classes("label", 60))
SHARDS, SAMPLES = 2, 5
INDEX_HEADER_BYTES = 24


class WrongDataError(AssertionError):
    """Data that are neither correct nor refused."""


@dataclass(frozen=True)
class DataSet:
    """A sound data set in memory.

    Attributes:
        manifest: its document.
        tars, indexes, sums: by shard.
        contents: tars and indexes by sha256.
    """

    modalities: tuple[Modality, ...]
    manifest: dict[str, Any]
    tars: list[bytes]
    indexes: list[bytes]
    sums: list[bytes]
    contents: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path, number: int, **other: Any) -> Manifest:
        """Write the files to `folder`, with those that `other` gives in the place of the sound ones.

        Args:
            folder: exists.
            number: of the case: every case gets times of its own, by which readers tell files apart.
            other: `manifest` (bytes or dict), `tars`, `indexes`, `sums`.
        """
        document = other.get("manifest", self.manifest)
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        kinds = (("tars", ""), ("indexes", ".index"), ("sums", ".sums"))
        for kind, suffix in kinds:
            for shard, data in enumerate(other.get(kind, getattr(self, kind))):
                name = f"{tar_name(shard)}{suffix}"
                (folder / name).write_bytes(data)
                os.utime(folder / name, ns=(10**9 * (number + 1),) * 2)
        (folder / "manifest.json").write_bytes(content)
        return Manifest.load(folder / "manifest.json")

    def described(self, tars: Sequence[bytes], indexes: Sequence[bytes], sums: Sequence[bytes]) -> dict[str, Any]:
        """The manifest with sizes and digests of other files."""
        document = json.loads(json.dumps(self.manifest))
        for entry, tar, index, digests in zip(document["shards"], tars, indexes, sums, strict=True):
            entry.update(num_bytes=len(tar), sha256=hashlib.sha256(tar).hexdigest())
            entry["index"].update(num_bytes=len(index), sha256=hashlib.sha256(index).hexdigest())
            entry["sums64"].update(num_bytes=len(digests), sha256=hashlib.sha256(digests).hexdigest())
        seal_manifest(document)
        return document

    def sums_of(self, tars: Sequence[bytes], indexes: Sequence[bytes]) -> list[bytes]:
        """Sums that fit other tars and indexes."""
        return [sums_of(tar, index) for tar, index in zip(tars, indexes, strict=True)]

    def tar_of(self, shard: Shard) -> bytes:
        """The tar that a manifest of parts of this one means: the sums say it, if there are any."""
        if shard.sums is None:
            return self.contents[shard.sha256]
        return self.tars[[hashlib.sha256(digests).hexdigest() for digests in self.sums].index(shard.sums.sha256)]


def sums_of(tar: bytes, index: bytes) -> bytes:
    """The digests of what lies at the places that an index names; of its whole records, if it has half ones."""
    whole = len(index) - (len(index) - INDEX_HEADER_BYTES) % RECORD_DTYPE.itemsize
    records = np.frombuffer(index[INDEX_HEADER_BYTES:whole], RECORD_DTYPE).tolist()
    return sums_bytes([member_digest(tar[offset : offset + size]) for offset, size in records])


def without_sums(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest as it was before there were sums; they are not part of the fingerprint."""
    shards = [{key: value for key, value in shard.items() if key != "sums64"} for shard in document["shards"]]
    return {**document, "shards": shards}


def tar_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def seal_manifest(document: Any) -> None:
    """Make totals and fingerprint of a manifest fit its shards and modalities."""
    shards = document["shards"]
    document["num_samples"] = sum(shard["num_samples"] for shard in shards)
    document["num_bytes"] = sum(shard["num_bytes"] for shard in shards)
    content = {
        "modalities": document["modalities"],
        "shards": [[shard["sha256"], shard["num_samples"]] for shard in shards],
    }
    if document["format_version"] > 1:
        content["format_version"] = document["format_version"]
        content["indexes"] = [shard["index"]["sha256"] for shard in shards]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    document["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()


def make_dataset(modalities: tuple[Modality, ...], members: Callable[[int], dict[str, bytes]]) -> DataSet:
    """Shards of samples whose members all tell their number."""
    tars, indexes, sums, shards = [], [], [], []
    for shard in range(SHARDS):
        samples = {f"s{shard}/{row:03d}": members(shard * SAMPLES + row) for row in range(SAMPLES)}
        tar = make_tar(samples, tarfile.USTAR_FORMAT)
        index = index_bytes(records_of(tar, modalities, list(samples)))
        tars.append(tar)
        indexes.append(index)
        sums.append(sums_of(tar, index))
        tar_sha256, *others = [hashlib.sha256(data).hexdigest() for data in (tar, index, sums[-1])]
        index_file = IndexFile(f"{tar_name(shard)}.index", len(index), others[0])
        sums_file = IndexFile(f"{tar_name(shard)}.sums", len(sums[-1]), others[1])
        shards.append(Shard(tar_name(shard), SAMPLES, len(tar), tar_sha256, index_file, sums_file))
    document = Manifest.create(modalities, shards, {"name": "fuzz"}, format_version=2).to_json()
    contents = {hashlib.sha256(content).hexdigest(): content for content in (*tars, *indexes)}
    return DataSet(modalities, document, tars, indexes, sums, contents)


def make_tar(samples: dict[str, dict[str, bytes]], format: int, **fields: Any) -> bytes:
    """A tar of samples; `fields` are attributes of every member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                for name, value in fields.items():
                    setattr(info, name, value)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def records_of(tar: bytes, modalities: Sequence[Modality], keys: Sequence[str]) -> np.ndarray:
    """The index records of a tar, as `tarfile` finds its members."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as opened:
        places = {info.name: (info.offset_data, info.size) for info in opened}
    return np.array(
        [
            [
                next(places[name] for name in (f"{key}.{ext}" for ext in modality.extensions) if name in places)
                for modality in modalities
            ]
            for key in keys
        ],
        RECORD_DTYPE,
    )


def mixed_members(number: int) -> dict[str, bytes]:
    """A sample of every encoding; pictures are PNG and JPEG in turn."""
    picture = io.BytesIO()
    pixels = np.arange(90, dtype=np.uint8).reshape(6, 5, 3) + np.uint8(number)
    Image.fromarray(pixels).save(picture, "PNG" if number % 2 else "JPEG")
    return {
        "png" if number % 2 else "jpg": picture.getvalue(),
        "npy": npy_bytes(np.full(3, number, np.float32) + np.float32([0, 0.25, 0.5])),
        "cls": str(number).encode(),
        "txt": f"text {number}".encode(),
        "json": json.dumps({"score": [number, number + 0.5], "note": "\u00e9"}).encode(),
    }


def array_members(number: int) -> dict[str, bytes]:
    """A sample of a uniform shard, which is read as a strided array."""
    image = np.arange(6, dtype=np.float32).reshape(2, 3) + 100 * number
    return {"image.npy": npy_bytes(image), "label.cls": b"%02d" % number}


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of an npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def reference(content: bytes, modality: Modality) -> np.ndarray:
    """The decoded value as other libraries read it; raises anything for what is not one."""
    if modality.encoding == "cls":
        return np.int64(content.decode("ascii"))
    if modality.encoding == "image":
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("L" if modality.shape[0] == 1 else "RGB"))
        return pixels[None] if modality.shape[0] == 1 else pixels.transpose(2, 0, 1)
    if modality.encoding == "text":
        assert modality.length is not None
        content.decode("utf-8")
        ids = list(content[: modality.length])
        return np.array(ids + [256] * (modality.length - len(ids)), np.int64)
    if modality.encoding == "json":
        value = json.loads(content)
        for part in (modality.field or "").split(".") if modality.field else []:
            value = value[int(part)] if isinstance(value, list) else value[part]
        return np.array(value).astype(modality.dtype)
    array = np.load(io.BytesIO(content), allow_pickle=False)
    assert isinstance(array, np.ndarray)
    return array


def check_value(value: Any, content: bytes, modality: Modality, where: str) -> None:
    """Raise WrongDataError unless a value that was read is what `content` holds, bit for bit."""
    try:
        expected = reference(content, modality)
    except Exception as error:
        raise WrongDataError(f"{where}: {content[:60]!r} was read as {value!r}, but is none: {error!r}") from None
    same = np.asarray(value)
    if same.shape != expected.shape or same.dtype != expected.dtype or same.tobytes() != expected.tobytes():
        raise WrongDataError(f"{where}: {content[:60]!r} was read as {value!r} instead of {expected!r}")
