"""The target of remote data: a server that errs, and a cache that holds anything."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmvae_dist.data.index import RECORD_DTYPE
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.data_config import CacheSection
from jmvae_dist.errors import DataError
from tests.faulty_server import Fault, serving
from tests.fuzz.material import INDEX_HEADER_BYTES, SAMPLES, SHARDS, DataSet, WrongDataError, reference, without_sums
from tests.fuzz.mutations import Random, mutate_bytes, mutate_tar
from tests.fuzz.target import QUICK, REFUSALS, OfDataSets

# Another shard, as sound: nobody can notice it where a shard is read in parts and has no digests of its members.
_SWAP = Fault(302, {"Location": "/shard-000001.tar"})


class RemoteTarget(OfDataSets):
    """Damaged files on a server that errs, read member by member or through a cache that holds anything."""

    _FAULTS = (
        *(Fault(status) for status in (404, 403, 416, 500, 503, 206, 302, 304, 100)),
        *(Fault(cut_after=number) for number in (0, 1, 600)),
        *(Fault(content=content) for content in (b"", b"<html>log in</html>", bytes(40_000))),
        *(Fault(ignores_range=True), Fault(states_no_length=True), Fault(states_no_length=True, cut_after=700)),
        *(Fault(headers={"Content-Length": value}) for value in ("-1", "0", "9" * 30, "9" * 5000, "x", "1e3", "")),
        *(
            Fault(206, {"Content-Range": value})
            for value in ("bytes 0-0/1", "bytes 0-9/" + "9" * 5000, "bytes */*", "x")
        ),
        *(Fault(302, {"Location": value}) for value in ("http://[", "pipe:touch canary", "//", "")),
        _SWAP,
        *(Fault(503, {"Retry-After": value}) for value in ("9" * 5000, "-1", "0", "Thu, 01 Jan 1970 00:00:00 GMT")),
        *(Fault(headers={"Content-Encoding": value}) for value in ("gzip", "identity", "x" * 5000)),
        *(Fault(headers={"ETag": value}) for value in ('"a"', "a" * 5000, "W/")),
        Fault(headers={"Content-Type": "text/html"}),
    )

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._server = self._stack.enter_context(serving(Path("/nowhere")))

    def close(self) -> None:
        self._stack.close()

    def run(self, rng: Random, folder: Path, number: int) -> None:
        data = rng.choice(self.datasets)
        tars, indexes = list(data.tars), list(data.indexes)
        files = rng.choice(((), (), (tars,), (indexes,), (tars, indexes)))
        for contents in files:
            shard = rng.randrange(SHARDS)
            contents[shard] = (mutate_tar if contents is tars else mutate_bytes)(rng, contents[shard])
        served = folder / "served"
        served.mkdir()
        sums, document = data.sums, data.manifest
        if rng.random() < 0.3:
            sums = data.sums_of(tars, indexes)
            document = data.described(tars, indexes, sums)
        if rng.random() < 0.5:
            document = without_sums(document)
        with contextlib.suppress(*REFUSALS):  # whether it is sound is for the reader at the other end to say
            data.write(served, number, tars=tars, indexes=indexes, sums=sums, manifest=document)
        access = RemoteAccess(remote=QUICK)
        if rng.random() < 0.6:
            access = RemoteAccess(CacheSection(dir=str(folder / "cache")), QUICK)
            self._fill_cache(rng, folder, document, number)
        has_digests = access.cache.dir is not None or "sums64" in document["shards"][0]
        self._serve(rng, served, self._FAULTS if has_digests else [fault for fault in self._FAULTS if fault != _SWAP])
        manifest = Manifest.load(f"{self._server.url}/manifest.json", QUICK)
        self._read(manifest, access, data, tars, indexes)

    def _serve(self, rng: Random, folder: Path, faults: Sequence[Fault]) -> None:
        server = self._server
        server.folder = folder
        server.faults.clear()
        server.always.clear()
        for path in folder.iterdir():
            if rng.random() < 0.15:
                fault = rng.choice(faults)
                if rng.random() < 0.5:
                    server.always[f"/{path.name}"] = fault
                else:
                    server.faults[f"/{path.name}"].append(fault)

    @staticmethod
    def _fill_cache(rng: Random, folder: Path, document: dict[str, Any], number: int) -> None:
        cache = folder / "cache"
        cache.mkdir()
        for shard in document["shards"]:
            for entry in (shard, shard["index"], *([shard["sums64"]] if "sums64" in shard else [])):
                content = (folder / "served" / entry["url"]).read_bytes()
                name = rng.choice((entry["sha256"], f"{entry['sha256']}-{entry['num_bytes']}.part", "lock", "wanted"))
                kind = rng.randrange(9)
                if os.path.lexists(cache / name):
                    continue
                if kind == 0:
                    (cache / name).symlink_to(folder / "served" / "manifest.json")
                elif kind == 1:
                    os.mkfifo(cache / name)
                elif kind == 2:
                    (cache / name).mkdir()
                elif kind <= 5:
                    (cache / name).write_bytes(mutate_bytes(rng, content))
                    os.utime(cache / name, ns=(10**9 * (number + 1),) * 2)

    @staticmethod
    def _read(
        manifest: Manifest, access: RemoteAccess, data: DataSet, tars: Sequence[bytes], indexes: Sequence[bytes]
    ) -> None:
        views = make_views(manifest.modalities)
        shard_B, index_B = np.repeat(np.arange(SHARDS), SAMPLES), np.tile(np.arange(SAMPLES), SHARDS)
        with contextlib.closing(ShardSet(manifest, "first_use", access=access)) as shards:
            values, problems = shards.gather_valid(shard_B, index_B, views, SampleKeys(np.arange(len(shard_B))))
        by_digest = {hashlib.sha256(content).hexdigest(): content for content in (*tars, *indexes)} | data.contents
        kept = [row for row in range(len(shard_B)) if row not in problems]
        for position, row in enumerate(kept):
            shard, sample = int(shard_B[row]), int(index_B[row])
            entry = manifest.shards[shard]
            # A shard that is read in parts cannot be compared with its digest: what the server has is what counts.
            tar = by_digest.get(entry.sha256, b"") if access.cache.dir else tars[shard]
            records = np.frombuffer(by_digest[entry.index.sha256], RECORD_DTYPE, offset=INDEX_HEADER_BYTES)
            for column, view in enumerate(views):
                offset, size = records.reshape(SAMPLES, len(views))[sample, column].tolist()
                stored = np.empty(view.stored_shape, view.dtype)
                stored[...] = reference(tar[offset : offset + size], view.modality)
                if not np.array_equal(values[view.name][position], view.modality.to_model(stored[None])[0]):
                    raise WrongDataError(
                        f"sample {sample} of shard {shard}, {view.name}: {values[view.name][position]}"
                    )
        if problems:
            raise DataError(next(iter(problems.values())))
