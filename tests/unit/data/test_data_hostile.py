"""Hostile data sets: nothing in them runs, is unpacked without limit, or is taken for something else."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_examples import example_source, npy_bytes

from jmvae_dist.commands.shards import main
from jmvae_dist.data import manifest
from jmvae_dist.data.index import RECORD_DTYPE, index_bytes
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.reader import ShardReader
from jmvae_dist.data.shard import IndexFile
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.data.writer import write_shards
from jmvae_dist.data_config import CacheSection, RemoteSection
from jmvae_dist.errors import ConfigError, DataError
from tests.faulty_server import serving

MakeManifest = Callable[..., Manifest]
QUICK = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=2.0, attempts=2, backoff_s=0.01)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.canary,)


def test_the_payload_would_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pkl.gz", "npy.gz", "x.pyd"])
def test_members_that_other_decoders_run_are_not_looked_at(
    tmp_path: Path, extension: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """webdataset's `.decode()` unpickles and unzips them by their extension."""
    payload = pickle.dumps(Payload(tmp_path / "canary"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("1.npy", npy_bytes(np.zeros(3, np.float32))),
            (f"1.{extension}", gzip.compress(payload) if extension.endswith("gz") else payload),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out = str(tmp_path / "m.json")
    asked_for = ["index", str(tmp_path / "a.tar"), "--out", out, "--modality", f"x={extension}"]
    with pytest.raises(ConfigError, match="which encoding"):
        main(asked_for)
    with pytest.raises(DataError, match=r"no readable member .* not a valid npy array"):
        main([*asked_for, "--encoding", "x=npy"])
    assert main(["index", str(tmp_path / "a.tar"), "--out", out]) == 0
    assert f"with extension {extension}" in capsys.readouterr().out
    assert ShardReader(Manifest.load(out), 0).read([0], "array").shape == (1, 3)
    assert not (tmp_path / "canary").exists()


def test_an_array_of_objects_is_not_unpickled(foreign_manifest: MakeManifest, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.array([Payload(tmp_path / "canary")], dtype=object), allow_pickle=True)
    modality = Modality("x", "float32", (1,))
    shards = foreign_manifest([modality], [{"x.npy": file.getvalue()}])
    with pytest.raises(DataError, match="holds Python objects, which are never loaded"):
        ShardReader(shards, 0).read([0], "x")
    assert not (tmp_path / "canary").exists()


def test_an_index_that_is_a_pickle(example_manifest: MakeManifest, tmp_path: Path) -> None:
    """As wids writes them; of the right size and digest."""
    shards = example_manifest()
    path, size = shards.index_path(0), shards.shards[0].index.num_bytes
    content = pickle.dumps(Payload(tmp_path / "canary")).ljust(size, b".")
    path.write_bytes(content)
    index = IndexFile(path.name, len(content), hashlib.sha256(content).hexdigest())
    changed = [replace(shards.shards[0], index=index), *shards.shards[1:]]
    with pytest.raises(DataError, match="not a version 1 index"):
        ShardReader(Manifest.create(shards.modalities, changed, {}, shards.path), 0)
    assert not (tmp_path / "canary").exists()


def test_a_manifest_beyond_the_limit_is_not_parsed(
    example_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = example_manifest().path
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(DataError, match="a manifest has at most 1000 bytes"):
        Manifest.load(path)


def test_an_index_for_more_than_there_is_reserves_no_memory(example_manifest: MakeManifest) -> None:
    shards = example_manifest()
    many = index_bytes(np.zeros((10, 2), RECORD_DTYPE)).ljust(200 * 2**20, b"\0")
    index = replace(shards.shards[0].index, num_bytes=len(many))
    changed = [replace(shards.shards[0], num_samples=8_738_132, index=index), *shards.shards[1:]]
    with pytest.raises(DataError, match=r"index should have .* bytes but has only"):
        ShardReader(Manifest.create(shards.modalities, changed, {}, shards.path), 0)


def test_shards_of_one_name_are_told_apart_in_the_cache(tmp_path: Path) -> None:
    """webdataset's cache goes by the last part of the URL."""
    write_shards(example_source(3), tmp_path / "a")
    write_shards(example_source(5), tmp_path / "b")
    access = RemoteAccess(CacheSection(dir=str(tmp_path / "cache")), QUICK)
    with serving(tmp_path) as server:
        for name, count in (("a", 3), ("b", 5), ("a", 3)):
            values = gather(Manifest.load(f"{server.url}/{name}/manifest.json", QUICK), access)
            expected = gather(Manifest.load(tmp_path / name / "manifest.json"), RemoteAccess())
            assert len(values["image"]) == count
            assert all(np.array_equal(values[key], expected[key]) for key in expected)


def gather(shards: Manifest, access: RemoteAccess) -> dict[str, np.ndarray]:
    rows = np.arange(shards.num_samples)
    opened = ShardSet(shards, access=access)
    try:
        return opened.gather(np.zeros_like(rows), rows, make_views(shards.modalities), SampleKeys(rows))
    finally:
        opened.close()
