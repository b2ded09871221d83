"""Small sharded data sets for the tests of the data layer."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from data_examples import example_source

from jmvae_dist.data.index import RECORD_DTYPE, index_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.data.writer import write_shards


@pytest.fixture
def example_manifest(tmp_path: Path) -> Callable[..., Manifest]:
    """Writes `example_source(num_samples)` and loads the manifest."""

    def make(num_samples: int = 47, samples_per_shard: int = 10, folder: str = "shards") -> Manifest:
        out = tmp_path / folder
        write_shards(example_source(num_samples), out, samples_per_shard=samples_per_shard)
        return Manifest.load(out / "manifest.json")

    return make


@pytest.fixture
def foreign_manifest(tmp_path: Path) -> Callable[..., Manifest]:
    """Makes one shard from given members with Python's tarfile, and an index from what tarfile reads back."""

    def make(
        modalities: Sequence[Modality], samples: Sequence[dict[str, bytes]], key: str = "foreign-{:03d}"
    ) -> Manifest:
        folder = tmp_path / "foreign"
        folder.mkdir(exist_ok=True)
        path = folder / "shard-000000.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, members in enumerate(samples):
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key.format(number)}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        places = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                places[member.name] = (member.offset_data, member.size)
        records = np.array(
            [
                [places[f"{key.format(number)}.{modality.extension}"] for modality in modalities]
                for number in range(len(samples))
            ],
            dtype=RECORD_DTYPE,
        )
        return _manifest(folder, path, records, modalities)

    return make


def _manifest(folder: Path, path: Path, records: np.ndarray, modalities: Sequence[Modality]) -> Manifest:
    index = index_bytes(records)
    (folder / "shard-000000.tar.index").write_bytes(index)
    content = path.read_bytes()
    shard = Shard(
        path.name,
        len(records),
        len(content),
        hashlib.sha256(content).hexdigest(),
        IndexFile("shard-000000.tar.index", len(index), hashlib.sha256(index).hexdigest()),
    )
    Manifest.create(modalities, [shard], {}).save(folder / "manifest.json")
    return Manifest.load(folder / "manifest.json")
