"""Data sets at URLs: the same samples as from local files, with and without a cache, or one clear error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import example_source, without_sums
from hypothesis import given, settings
from hypothesis import strategies as st

from jmvae_dist.commands.shards import main
from jmvae_dist.data.loader import Batch, EvaluationLoader, TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.store import RemoteAccess, ShardStore, shard_files
from jmvae_dist.data.urls import REMOTE_SCHEMES, check_remote, resolve, shown
from jmvae_dist.data.verify import _Data, _verify_shard, verify_shards
from jmvae_dist.data.views import SampleKeys, make_views
from jmvae_dist.data.writer import write_shards
from jmvae_dist.data_config import CacheSection, RemoteSection
from jmvae_dist.errors import ConfigError, DataError, UnreachableError
from jmvae_dist.files import sha256_of_descriptor
from tests.faulty_server import Fault, FaultyServer, serving

QUICK = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=1.0, attempts=2, backoff_s=0.01)
SHARD_1 = "/shards/shard-000001.tar"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    write_shards(example_source(47), tmp_path / "served" / "shards", samples_per_shard=10)
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture
def local(server: FaultyServer) -> Manifest:
    return Manifest.load(server.folder / "shards" / "manifest.json")


@pytest.fixture
def remote(server: FaultyServer) -> Manifest:
    return Manifest.load(f"{server.url}/shards/manifest.json", QUICK)


@pytest.fixture
def cached(tmp_path: Path) -> RemoteAccess:
    return RemoteAccess(CacheSection(dir=str(tmp_path / "cache")), QUICK)


RANGED = RemoteAccess(remote=QUICK)


def gather(
    shards: ShardSet,
    manifest: Manifest,
    shard_numbers: list[int],
    indices: list[int],
    names: list[str] | None = None,
) -> dict[str, np.ndarray]:
    keys = SampleKeys(np.arange(len(indices)), is_training=False)
    return shards.gather(np.array(shard_numbers), np.array(indices), make_views(manifest.select(names)), keys)


def same(left: Batch, right: Batch) -> bool:
    return all(np.array_equal(values, right.inputs[name]) for name, values in left.inputs.items())


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_manifest_at_a_url(server: FaultyServer, local: Manifest, remote: Manifest) -> None:
    assert remote.fingerprint == local.fingerprint
    assert remote.shard_location(1) == f"{server.url}{SHARD_1}"
    assert remote.index_location(1) == f"{server.url}{SHARD_1}.index"
    with pytest.raises(DataError, match="is not a local file"):
        remote.shard_path(1)
    with pytest.raises(DataError, match=r"manifest http://.*/nothing: the server answered 404"):
        Manifest.load(f"{server.url}/nothing", QUICK)
    server.always["/shards/manifest.json"] = Fault(content=b"[]")
    with pytest.raises(DataError, match=r"http://.*/shards/manifest.json"):
        Manifest.load(f"{server.url}/shards/manifest.json?token=secret", QUICK)


@pytest.mark.parametrize(
    ("base", "url", "expected"),
    [
        ("http://host/a/manifest.json", "b.tar", "http://host/a/b.tar"),
        ("http://host/manifest.json?token=1", "b/c-1.tar", "http://host/b/c-1.tar"),
        ("http://host/a%20b/manifest.json", "c.tar", "http://host/a%20b/c.tar"),
        ("http://host/a/manifest.json", "b//c.tar", "http://host/a/b/c.tar"),
        ("http://host/a/manifest.json?token=1", "b c#1%.tar", "http://host/a/b%20c%231%25.tar"),
        ("http://host/a/manifest.json", "../../../b.tar", "http://host/b.tar"),
        ("http://host:8080/manifest.json", "x/./b.tar", "http://host:8080/x/b.tar"),
        ("http://host/a/manifest.json", "https://other/b.tar?token=1", "https://other/b.tar?token=1"),
        ("s3://bucket/a/manifest.json", "b c.tar", "s3://bucket/a/b c.tar"),
        (Path("/data/manifest.json"), "s3://bucket/b.tar", "s3://bucket/b.tar"),
        (Path("/data/manifest.json"), "b.tar", Path("/data/b.tar")),
        (Path("/data/manifest.json"), "file:///a%20b.tar", Path("/a b.tar")),
    ],
)
def test_relative_urls(base: Path | str, url: str, expected: Path | str) -> None:
    if expected == "s3://bucket/a/b c.tar":
        with pytest.raises(ValueError, match="without spaces"):
            resolve(base, url)
    else:
        assert resolve(base, url) == expected


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "//other/b.tar", "pipe:cat", "memory://a/b"])
def test_a_remote_manifest_names_no_local_files(url: str) -> None:
    with pytest.raises(ValueError, match=r"local file|not supported"):
        resolve("http://host/a/manifest.json", url)


def test_shown_locations() -> None:
    assert shown("https://user:password@host/a?signature=1#x") == "https://host/a?..."
    assert shown("https://host/a@b") == "https://host/a@b"
    assert shown(Path("/data/a?b")) == "/data/a?b"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["ranged", "cached", "cached, hardly any room"])
def test_batches_are_those_of_local_shards(
    server: FaultyServer, local: Manifest, remote: Manifest, cached: RemoteAccess, workers: int, how: str
) -> None:
    plan = SamplePlan(local.shard_sizes, 12, 4, 8, seed=5)
    access = RANGED if how == "ranged" else cached
    if "hardly" in how:
        largest = max(shard.num_bytes + shard.index.num_bytes for shard in local.shards)
        room = dataclasses.replace(cached.cache, max_bytes=(2 + workers) * largest)
        access = dataclasses.replace(cached, cache=room)
    loaders = [
        TrainLoader(local, plan, rank=1, world_size=2),
        TrainLoader(remote, plan, rank=1, world_size=2, workers=workers, access=access),
    ]
    batches = list(zip(*(loader.iterate(3, 15) for loader in loaders), strict=True))
    assert len(batches) == 12
    assert all(same(*pair) for pair in batches)
    if how == "cached":
        downloads = {path for path, _ in server.requests if path.endswith(".tar")}
        assert [server.count(path) for path in downloads] == [1] * len(downloads)
        assert all(not requested for _, requested in server.requests)
    elif how == "ranged":
        assert all(requested for path, requested in server.requests if path.endswith(".tar"))
    else:
        files = [path for path in Path(str(cached.cache.dir)).iterdir() if path.name not in ("lock", "wanted")]
        assert sum(path.stat().st_size for path in files) <= (2 + workers) * largest


@pytest.mark.parametrize("how", ["ranged", "cached"])
def test_evaluation(local: Manifest, remote: Manifest, cached: RemoteAccess, how: str) -> None:
    """A batch of more shards than are kept open."""
    access = RANGED if how == "ranged" else cached
    loaders = [
        EvaluationLoader(local, rank=0, world_size=1, batch_size=40),
        EvaluationLoader(remote, rank=0, world_size=1, batch_size=40, access=access),
    ]
    assert all(same(*pair) for pair in zip(*loaders, strict=True))


def test_only_what_is_needed_is_read(server: FaultyServer, local: Manifest, remote: Manifest) -> None:
    """Neighbours share a request; modalities and samples that nobody asked for are not read."""
    shards = ShardSet(remote, access=RANGED)
    server.requests.clear()
    samples = [1, 0, 1, 1], [5, 0, 6, 5]
    values = gather(shards, remote, *samples, ["image"])
    expected = gather(ShardSet(local), local, *samples, ["image"])
    assert np.array_equal(values["image"], expected["image"])
    ranges = {path: requested for path, requested in server.requests if path.endswith(".tar")}
    assert len([path for path, _ in server.requests if path.endswith(".tar")]) == 2
    first, last = (int(number) for number in ranges[SHARD_1].removeprefix("bytes=").split("-"))
    assert last - first < local.shards[1].num_bytes / 3
    shards.close()


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, r"sample 0 .*modality 'image': the tar header before it is damaged"), (514, "sample 0 .*not a valid npy")],
)
def test_damage_that_ranged_reading_notices_without_sums(
    server: FaultyServer, remote: Manifest, offset: int, message: str
) -> None:
    remote = without_sums(remote)
    flip_byte(server.folder / SHARD_1[1:], offset)
    with pytest.raises(DataError, match=rf"^http://.*{SHARD_1}: {message}"):
        gather(ShardSet(remote, access=RANGED), remote, [1], [0])


# (fault of every answer for shard 1, what the message says)
FAULTS = {
    "404": (Fault(404), "answered 404"),
    "HTML": (Fault(content=b"<p>", headers={"Content-Type": "text/html"}), "HTML page"),
    "cut": (Fault(cut_after=5), "given up after 2 attempts"),
    "redirect": (Fault(302, {"Location": "file:///etc/passwd"}), "not http://"),
}


@pytest.mark.parametrize("how", ["ranged", "cached"])
@pytest.mark.parametrize("case", FAULTS)
def test_faults_stop_at_the_step_that_needs_the_shard(
    server: FaultyServer, local: Manifest, remote: Manifest, cached: RemoteAccess, case: str, how: str
) -> None:
    server.always[SHARD_1], message = FAULTS[case]
    plan = SamplePlan(local.shard_sizes, 5, 1, 1, seed=5)
    needs = next(step for step in range(10) if 1 in plan.batch(step)[0])
    loader = TrainLoader(
        remote, plan, rank=0, world_size=1, access=RANGED if how == "ranged" else cached, workers=needs % 2
    )
    batches = loader.iterate(0, 10)
    assert [next(batches).global_step for _ in range(needs)] == list(range(needs))
    with pytest.raises(DataError, match=f"shard 1 {server.url}{SHARD_1}: .*{message}"):
        next(batches)


def test_a_server_without_range_needs_a_cache(
    server: FaultyServer, local: Manifest, remote: Manifest, cached: RemoteAccess
) -> None:
    server.always.update({f"/shards/{shard.url}": Fault(ignores_range=True) for shard in local.shards})
    expected = gather(ShardSet(local), local, [1], [3])
    values = gather(ShardSet(remote, access=cached), remote, [1], [3])
    assert all(np.array_equal(expected[name], values[name]) for name in expected)
    with pytest.raises(DataError, match=rf"shard 1 .*{SHARD_1}: .* set data\.cache\.dir"):
        gather(ShardSet(remote, access=RANGED), remote, [1], [3])


@pytest.mark.parametrize("has_sums", [True, False])
def test_damaged_copies_are_replaced(
    server: FaultyServer, remote: Manifest, cached: RemoteAccess, has_sums: bool
) -> None:
    manifest = remote if has_sums else without_sums(remote)
    shard = manifest.shards[1]
    before = gather(ShardSet(manifest, access=cached), manifest, [0, 1], [3, 0])
    for file in (shard.sha256, shard.index.sha256, *([shard.sums.sha256] if shard.sums else [])):
        flip_byte(Path(str(cached.cache.dir)) / file, 650 if file == shard.sha256 else 30)
    after = gather(ShardSet(manifest, access=cached), manifest, [0, 1], [3, 0])
    assert all(np.array_equal(values, after[name]) for name, values in before.items())
    assert server.count(SHARD_1) == 2
    assert server.count(f"{SHARD_1}.sums") == 2 * has_sums
    server.always[SHARD_1] = Fault(404)
    again = gather(ShardSet(manifest, access=cached), manifest, [0, 1], [3, 0])
    assert all(np.array_equal(values, again[name]) for name, values in before.items())


def test_a_copy_that_is_damaged_again_and_again(remote: Manifest, cached: RemoteAccess) -> None:
    """The run stops: nothing says that the samples are bad."""
    gather(ShardSet(remote, access=cached), remote, [1], [0])
    copy = Path(str(cached.cache.dir)) / remote.shards[1].sha256
    content = copy.read_bytes()

    class OnABadDisk(ShardSet):
        def _gather(self, *arguments: Any) -> dict[str, np.ndarray]:
            copy.write_bytes(content)
            flip_byte(copy, 650)
            return super()._gather(*arguments)

    shards, views = OnABadDisk(remote, access=cached), make_views(remote.modalities)
    with pytest.raises(UnreachableError, match=r"sample 0 .*damaged again and again"):
        shards.gather_valid(np.array([1]), np.array([0]), views, SampleKeys(np.array([0])))


def test_idle_sets_give_way(remote: Manifest, cached: RemoteAccess) -> None:
    """What waits for its turn, such as training during an evaluation, keeps no room that another one waits for."""
    room = max(shard.num_bytes + shard.index.num_bytes for shard in remote.shards)
    access = dataclasses.replace(cached, cache=dataclasses.replace(cached.cache, max_bytes=room))
    first, second = (ShardSet(remote, access=access) for _ in range(2))
    for number in (0, 1, 2):
        for shards in (first, second):
            assert gather(shards, remote, [number], [3])["label"][0].argmax() >= 0
    first.close()
    second.close()


def test_open_files_of_shards_in_the_cache(remote: Manifest, cached: RemoteAccess) -> None:
    shards = ShardSet(remote, max_open=2, access=cached)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(len(remote.shards)):
        shards.reader(number)
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * cached.files_per_shard(remote)
    shards.close()
    assert len(os.listdir("/proc/self/fd")) <= before  # a connection of the server in this process may have ended


def test_a_damaged_shard_is_asked_for_once(server: FaultyServer, remote: Manifest) -> None:
    server.always[SHARD_1] = Fault(404)
    server.always[f"{SHARD_1}.index"] = Fault(404)
    shards = ShardSet(remote, access=RANGED)
    keys, views = SampleKeys(np.arange(4), is_training=False), make_views(remote.modalities)
    for _ in range(3):
        assert len(shards.gather_valid(np.full(4, 1), np.arange(4), views, keys)[1]) == 4
    assert server.count(f"{SHARD_1}.index") <= 2


def test_a_shard_is_of_one_version_however_often_it_is_opened(server: FaultyServer, remote: Manifest) -> None:
    shards = ShardSet(remote, max_open=1, access=RANGED)
    for number, etag in ((1, '"1"'), (0, '"1"'), (1, '"1"'), (0, '"1"')):
        server.always[SHARD_1] = Fault(headers={"ETag": etag})
        gather(shards, remote, [number], [3])
    server.always[SHARD_1] = Fault(headers={"ETag": '"2"'})
    with pytest.raises(
        DataError, match=rf"{SHARD_1}: the file has changed on the server .*sample 4, key .*, modality 'image'"
    ):
        gather(shards, remote, [1], [4])


def test_always_verifying_needs_whole_shards(remote: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"data\.verify: 'always' needs whole shards"):
        ShardSet(remote, "always", access=RANGED)


def test_shards_are_downloaded_ahead(
    server: FaultyServer, local: Manifest, remote: Manifest, cached: RemoteAccess
) -> None:
    """As many as configured, in the order of their use, while nobody asks for a batch."""
    access = dataclasses.replace(cached, cache=dataclasses.replace(cached.cache, prefetch_shards=2))
    plan = SamplePlan(local.shard_sizes, 1, 1, 1, seed=5)
    order = list(dict.fromkeys(int(plan.batch(step)[0][0]) for step in range(47)))
    batches = TrainLoader(remote, plan, rank=0, world_size=1, access=access).iterate(0, 47)

    def downloaded() -> set[int]:
        return {number for number in order if (Path(str(access.cache.dir)) / local.shards[number].sha256).exists()}

    def wait_for(shards: list[int]) -> None:
        deadline_s = time.monotonic() + 10
        while downloaded() != set(shards) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert downloaded() == set(shards)

    next(batches)
    wait_for(order[:3])
    sizes = local.shard_sizes
    for _ in range(sizes[order[0]]):
        next(batches)
    wait_for(order[:4])
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jmvae-prefetch")]


def test_what_was_downloaded_ahead_is_not_hashed_again(
    remote: Manifest, cached: RemoteAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    monkeypatch.setattr(
        "jmvae_dist.data.store.sha256_of_descriptor", lambda file: hashed.append(file) or sha256_of_descriptor(file)
    )
    manifest, cache = without_sums(remote), cached.open_cache()
    assert cache is not None
    for entry in shard_files(manifest, 1):
        cache.download_ahead(entry, threading.Event())
    gather(ShardSet(manifest, access=cached), manifest, [1], [3])
    assert not hashed
    os.utime(cache.folder / manifest.shards[1].sha256)
    gather(ShardSet(manifest, access=cached), manifest, [1], [3])
    assert len(hashed) == 1


def test_upcoming_shards(local: Manifest) -> None:
    """Every shard is announced for the step that first needs it, or an earlier one of the same window."""
    for window, start in ((1, 0), (8, 0), (8, 17), (100, 3), (25, 40)):
        plan = SamplePlan(local.shard_sizes, 12, 4, window, seed=5)
        lanes = range(1, 3)
        announced: dict[int, int] = {}
        for step, shard in plan.upcoming_shards(start, lanes):
            if step >= 60:
                break
            assert step >= start
            announced.setdefault(shard, step)
        for step in range(start, 60):
            for shard in set(plan.batch(step, lanes)[0].tolist()):
                assert announced[shard] <= step
        steps = [step for step, _ in zip((s for s, _ in plan.upcoming_shards(start, lanes)), range(50), strict=False)]
        assert steps == sorted(steps)


def test_show_and_verify(server: FaultyServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = f"{server.url}/shards/manifest.json"
    assert main(["show", url]) == 0
    assert f"manifest     {url}\nsamples      47\n" in capsys.readouterr().out
    assert main(["verify", url, "--workers", "1"]) == 0
    assert f"{url}: 47 samples in 5 shards are sound" in capsys.readouterr().out
    flip_byte(server.folder / SHARD_1[1:], 700)
    server.always["/shards/shard-000003.tar"] = Fault(404)
    assert main(["verify", url, "--workers", "1", "--cache-dir", str(tmp_path / "cache")]) == 1
    problems = [line for line in capsys.readouterr().err.splitlines() if "http://" in line]
    assert len(problems) == 3
    assert f"shard 1 {server.url}{SHARD_1}: sha256 differs" in problems[0]
    assert "shard 3" in problems[1]
    assert "answered 404" in problems[1]


def test_verify_shares_temporary_copies(local: Manifest, remote: Manifest, cached: RemoteAccess) -> None:
    """Uniform shards have equal indexes, so one copy: the first process to be done must leave it to the others."""
    assert local.shards[0].index.sha256 == local.shards[1].index.sha256
    store = ShardStore(remote, "first_use", cached)
    assert store.cache is not None
    data = _Data(remote, store, are_copies_temporary=True)
    used_by_another = store.cache.open(shard_files(remote, 1)[0])
    assert _verify_shard(data, 0, lambda done: None) == []
    assert used_by_another.path.exists()
    used_by_another.close()
    assert _verify_shard(data, 1, lambda done: None) == []
    assert store.cache.used_bytes() == 0


def test_verify_names_urls_not_copies(server: FaultyServer, local: Manifest, tmp_path: Path) -> None:
    """A shard that is what the manifest says, but not what it should be."""
    path = server.folder / SHARD_1[1:]
    content = bytearray(path.read_bytes())
    content[512 + 128 : 512 + 132] = np.float32("nan").tobytes()
    path.write_bytes(content)
    record: dict[str, Any] = json.loads((server.folder / "shards" / "manifest.json").read_text())
    shards = [
        dataclasses.replace(shard, sha256=hashlib.sha256(content).hexdigest(), sums=None) if number == 1 else shard
        for number, shard in enumerate(local.shards)
    ]
    Manifest.create(local.modalities, shards, record["source"]).save(server.folder / "shards" / "manifest.json")
    manifest = Manifest.load(f"{server.url}/shards/manifest.json")
    problems = verify_shards(manifest, workers=1)
    assert len(problems) == 1
    assert problems[0].startswith(f"{server.url}{SHARD_1}: sample 0 (key 'example-train-00000")
    assert "not finite" in problems[0]


def _read_in_child(manifest: Manifest, access: RemoteAccess, results: Any) -> None:
    batches = TrainLoader(
        manifest, SamplePlan(manifest.shard_sizes, 5, 1, 1, seed=5), rank=0, world_size=1, access=access
    )
    results.put(sum(float(batch.inputs["image"].sum()) for batch in batches.iterate(0, 9)))


def test_a_forked_process_reads_on(local: Manifest, remote: Manifest) -> None:
    """Connections and threads of the parent are not those of the child."""
    shards = ShardSet(remote, access=RANGED)
    gather(shards, remote, [0, 1], [0, 0])
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(remote, RANGED, results))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    _read_in_child(local, RANGED, results)
    assert results.get() == results.get()
    gather(shards, remote, [0, 1], [1, 1])
    shards.close()
    assert os.getpid() != child.pid


PIECES = st.sampled_from(
    ["http", "s3", "file", "pipe", ":", "::", "//", "/", "..", "?", "#", "@", "host", " ", "%", "["]
)


@given(st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join), st.booleans())
@settings(max_examples=300)
def test_any_text_as_a_url(url: str, is_base_remote: bool) -> None:
    """A manifest's URL is a local file of a local manifest, one of the schemes, or refused."""
    base = "https://host/data/manifest.json" if is_base_remote else Path("/data/manifest.json")
    try:
        location = resolve(base, url)
    except ValueError:
        return
    if isinstance(location, Path):
        assert not is_base_remote
    else:
        check_remote(location)
        assert location.split("://")[0].lower() in REMOTE_SCHEMES


def test_a_cache_of_anything(server: FaultyServer, local: Manifest, remote: Manifest, cached: RemoteAccess) -> None:
    """Whatever is in the cache, there are correct data or a DataError, and nothing outside of it changes."""
    shard, folder = local.shards[1], Path(str(cached.cache.dir))
    wanted = [1, 1], [3, 7]
    expected = gather(ShardSet(local), local, *wanted)
    gather(ShardSet(remote, access=cached), remote, *wanted)
    outside = server.folder / "precious"
    outside.write_text("precious")
    sound = {name: (folder / name).read_bytes() for name in (shard.sha256, shard.index.sha256)}
    numbers = np.random.default_rng(0)

    def damage(path: Path, content: bytes) -> None:
        path.unlink(missing_ok=True)
        kind = numbers.integers(8)
        changed = bytearray(content)
        if kind < 3:
            changed[numbers.integers(len(content))] ^= 1 << numbers.integers(8)
            path.write_bytes(changed)
        elif kind == 3:
            path.write_bytes(content[: numbers.integers(len(content))])
        elif kind == 4:
            path.symlink_to(outside)
        elif kind == 5:
            os.mkfifo(path)
        elif kind == 6:
            path.write_bytes(numbers.bytes(len(content)))

    correct = 0
    for _ in range(60):
        for name, content in sound.items():
            if numbers.integers(2):
                damage(folder / name, content)
                part = folder / f"{name}-{len(content)}.part"
                if numbers.integers(2):
                    damage(part, content)
        try:
            values = gather(ShardSet(remote, access=cached), remote, *wanted)
        except DataError:
            for path in folder.iterdir():
                path.unlink()
            continue
        assert all(np.array_equal(values[name], expected[name]) for name in expected)
        correct += 1
    assert 0 < correct < 60
    assert outside.read_text() == "precious"


def test_only_bad_data_are_masked(
    server: FaultyServer, local: Manifest, remote: Manifest, cached: RemoteAccess
) -> None:
    """A sample of a damaged shard is masked; one that cannot be had at the moment stops the run."""
    keys, views = SampleKeys(np.arange(4), is_training=False), make_views(local.modalities)
    wanted = np.array([0, 1, 0, 2]), np.array([3, 3, 4, 5])
    for access in (RANGED, cached):
        server.always[SHARD_1] = Fault(404)
        values, problems = ShardSet(remote, access=access).gather_valid(*wanted, views, keys)
        assert list(problems) == [1]
        assert "answered 404" in problems[1]
        assert len(values["image"]) == 3
        for path in (SHARD_1, f"{SHARD_1}.index"):
            server.always[path] = Fault(503)
            with pytest.raises(UnreachableError, match=r"answered 503 .*needed for sample 3, key .*'image'"):
                ShardSet(remote, access=access).gather_valid(*wanted, views, keys)
        del server.always[f"{SHARD_1}.index"]
