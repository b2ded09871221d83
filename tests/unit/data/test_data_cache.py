"""The cache of a node: each file downloaded once, whatever is killed, and never more than the budget."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jmvae_dist.data import cache as cache_module
from jmvae_dist.data.cache import CachedFile, CacheEntry, ShardCache
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import ConfigError, DataError
from tests.conftest import launch_environment
from tests.faulty_server import Fault, FaultyServer, serving

NUM_BYTES = 400_000
NAMES = "abcd"
CONTENTS = {name: np.random.default_rng(number).bytes(NUM_BYTES) for number, name in enumerate(NAMES)}
QUICK = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=1.0, attempts=2, backoff_s=0.01)

# Opens one file, says so, and keeps it until its input ends.
HOLDER = """
import sys
from pathlib import Path
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.data.cache import CacheEntry, ShardCache
folder, url, num_bytes, sha256 = sys.argv[1:]
cache = ShardCache(Path(folder), None, RemoteSection(stall_timeout_s=5.0, backoff_s=0.01))
print("ready", flush=True)
file = cache.open(CacheEntry(url, int(num_bytes), sha256, "shard 0"))
print(file.is_new, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    with serving(folder) as server:
        yield server


@pytest.fixture
def entry(server: FaultyServer) -> Callable[[str], CacheEntry]:
    def make(name: str) -> CacheEntry:
        return CacheEntry(f"{server.url}/{name}", NUM_BYTES, hashlib.sha256(CONTENTS[name]).hexdigest(), name)

    return make


Entry = Callable[[str], CacheEntry]


def start_holder(folder: Path, entry: CacheEntry) -> subprocess.Popen[str]:
    arguments = [str(folder), entry.url, str(entry.num_bytes), entry.sha256]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments],
        env=launch_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=30)
    assert process.returncode == 0


def held(folder: Path) -> set[str]:
    """Names of the files that the cache has, by their content."""
    return {name for name, content in CONTENTS.items() if (folder / hashlib.sha256(content).hexdigest()).exists()}


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def total_size(folder: Path) -> int:
    sizes = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # between listing and looking
            sizes.append(path.stat().st_size)
    return sum(sizes)


def content(file: CachedFile) -> bytes:
    return file.path.read_bytes()


def test_a_file_is_downloaded_once(tmp_path: Path, server: FaultyServer, entry: Entry) -> None:
    for is_new in (True, False):
        file = ShardCache(tmp_path / "cache", None, QUICK).open(entry("a"))
        assert content(file) == CONTENTS["a"]
        assert file.is_new == is_new
        file.close()
    assert server.count("/a") == 1
    assert not parts(tmp_path / "cache")


def test_processes_download_a_file_once(tmp_path: Path, server: FaultyServer, entry: Entry) -> None:
    server.always["/a"] = Fault(piece_bytes=20_000)
    holders = [start_holder(tmp_path / "cache", entry("a")) for _ in range(3)]
    assert sorted(says(holder) for holder in holders) == ["False", "False", "True"]
    for holder in holders:
        end(holder)
    assert server.count("/a") == 1


def test_a_download_killed_at_any_moment_is_completed_by_another(
    tmp_path: Path, server: FaultyServer, entry: Entry
) -> None:
    server.always["/a"] = Fault(piece_bytes=10_000)  # 0.4 s
    moments = random.Random(0)
    resumed = 0
    for round_number in range(4):
        folder = tmp_path / f"cache-{round_number}"
        holder = start_holder(folder, entry("a"))
        before = len(server.requests)
        time.sleep(moments.uniform(0.0, 0.4))
        holder.kill()
        holder.wait()
        file = ShardCache(folder, None, QUICK).open(entry("a"))
        assert content(file) == CONTENTS["a"]
        file.close()
        assert not parts(folder)
        resumed += any(requested for _, requested in server.requests[before:])
    assert resumed >= 1, "no download was resumed from the byte reached: the kills came at the wrong moments"


def test_the_least_recently_used_file_makes_room(tmp_path: Path, entry: Entry) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES + 10, QUICK)
    for name in "aba":
        cache.open(entry(name)).close()
        time.sleep(0.01)  # file systems tell times apart that differ by some milliseconds
    cache.open(entry("c")).close()
    assert held(cache.folder) == {"a", "c"}


def test_a_file_in_use_is_not_removed(tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.3)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES, QUICK)
    holder = start_holder(cache.folder, entry("a"))
    assert says(holder) == "True"
    cache.open(entry("b")).close()
    kept = cache.open(entry("c"))  # not in place of a, although that is older than b
    assert held(cache.folder) == {"a", "c"}
    with pytest.raises(DataError, match=r"d \(400000 bytes\) finds no room in .* data\.cache\.max_bytes \(800000\)"):
        cache.open(entry("d"))
    assert cache.is_room_asked_for()
    assert held(cache.folder) == {"a", "c"}
    assert not parts(cache.folder)

    def release() -> bool:
        kept.close()
        return True

    cache.open(entry("d"), release).close()
    assert held(cache.folder) == {"a", "d"}
    holder.kill()  # a lock ends with its holder
    holder.wait()
    cache.open(entry("b")).close()
    assert held(cache.folder) == {"b", "d"}


def test_downloads_going_on_count(tmp_path: Path, server: FaultyServer, entry: Entry) -> None:
    server.always["/a"] = Fault(piece_bytes=20_000)
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES - 1, QUICK)
    holder = start_holder(cache.folder, entry("a"))
    while not parts(cache.folder):
        time.sleep(0.005)
    assert not cache.download_ahead(entry("b"), threading.Event())
    assert says(holder) == "True"
    end(holder)
    cache.open(entry("b")).close()
    assert held(cache.folder) == {"b"}


def test_downloads_ahead_of_use_do_not_displace_each_other(tmp_path: Path, entry: Entry) -> None:
    cache, never = ShardCache(tmp_path / "cache", 2 * NUM_BYTES, QUICK), threading.Event()
    cache.open(entry("a")).close()
    assert cache.download_ahead(entry("b"), never)
    assert cache.download_ahead(entry("b"), never)
    assert cache.download_ahead(entry("c"), never)  # in place of a, which has been used
    assert not cache.download_ahead(entry("d"), never)
    assert held(cache.folder) == {"b", "c"}
    cache.open(entry("b")).close()
    cache.open(entry("d")).close()  # needed now: in place of b, which has been used
    assert held(cache.folder) == {"c", "d"}
    cache.open(entry("a")).close()
    assert held(cache.folder) == {"a", "c"}
    held_in_use = cache.open(entry("a"))
    cache.open(entry("b")).close()  # needed now, and nothing else can go
    assert held(cache.folder) == {"a", "b"}
    held_in_use.close()


def test_what_is_left_behind_is_removed(tmp_path: Path, entry: Entry) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 2 * NUM_BYTES, QUICK)
    fresh, old = folder / f"{'1' * 64}-9.part", folder / f"{'2' * 64}-9.part"
    for part in (fresh, old):
        part.write_bytes(bytes(NUM_BYTES))
    os.utime(old, (0, 0))
    ShardCache(folder, 2 * NUM_BYTES, QUICK)
    assert parts(folder) == [fresh]
    for name in "ab":  # the fresh one goes before complete files
        cache.open(entry(name)).close()
    assert not parts(folder)
    assert held(folder) == {"a", "b"}


def test_a_file_of_the_wrong_size_is_replaced(tmp_path: Path, server: FaultyServer, entry: Entry) -> None:
    cache = ShardCache(tmp_path / "cache", None, QUICK)
    cache.open(entry("a")).close()
    (cache.folder / entry("a").sha256).write_bytes(b"short")
    file = cache.open(entry("a"))
    assert content(file) == CONTENTS["a"]
    file.close()
    assert server.count("/a") == 2


def test_nothing_outside_is_touched(tmp_path: Path, entry: Entry) -> None:
    """Neither by links in the cache, nor are files removed that are not the cache's."""
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    outside.write_text("precious")
    cache = ShardCache(folder, NUM_BYTES, QUICK)
    foreign = folder / "notes.txt"
    foreign.write_text("precious" * NUM_BYTES)
    (folder / entry("a").sha256).symlink_to(outside)
    (folder / f"{entry('b').sha256}-{NUM_BYTES}.part").symlink_to(outside)
    for name in "ab":
        with pytest.raises(DataError, match="cannot be copied to"):
            cache.open(entry(name))
    for name in "cd":
        cache.open(entry(name)).close()
    assert outside.read_text() == "precious"
    assert foreign.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "outside", "served"}


def test_impossible_directories(tmp_path: Path, entry: Entry) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/cache")):
        with pytest.raises(ConfigError, match=r"data\.cache\.dir: .* cannot be used"):
            ShardCache(folder, None, QUICK)
    with pytest.raises(DataError, match=r"400000 bytes, more than data\.cache\.max_bytes \(10\)"):
        ShardCache(tmp_path / "small", 10, QUICK).open(entry("a"))


def test_a_failed_download_leaves_nothing_in_the_way(tmp_path: Path, server: FaultyServer, entry: Entry) -> None:
    cache = ShardCache(tmp_path / "cache", None, QUICK)
    server.faults["/a"].extend([Fault(404), Fault(cut_after=100_000), Fault(503), Fault(503)])
    with pytest.raises(DataError, match=r"a http://.*/a: the server answered 404"):
        cache.open(entry("a"))
    assert not parts(cache.folder)
    with pytest.raises(DataError, match="given up after"):
        cache.open(entry("a"))
    cache.open(entry("a")).close()
    assert server.requests[-1][1] == "bytes=100000-399999"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for two of the files, but not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(small_disk: Path, server: FaultyServer, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(small_disk / "cache", None, QUICK)
    for name in "abc":  # the disk is the limit where none is set
        cache.open(entry(name)).close()
    assert held(cache.folder) == {"b", "c"}

    # Another program fills the disk during a download: a copy makes room.
    server.always["/d"] = Fault(piece_bytes=20_000)
    cache.remove_damaged(cache.open(entry("b")))
    thread = threading.Thread(target=lambda: cache.open(entry("d")).close())
    thread.start()
    while not parts(cache.folder) or parts(cache.folder)[0].stat().st_size == 0:
        time.sleep(0.005)
    (small_disk / "other").write_bytes(bytes(300_000))
    thread.join(timeout=30)
    assert held(cache.folder) == {"d"}

    (small_disk / "other").write_bytes(bytes(550_000 - 8192))
    in_use = cache.open(entry("d"))
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.2)
    with pytest.raises(DataError, match=r"finds no room in .* the limit is what the disk has"):
        cache.open(entry("a"))
    in_use.close()


# Opens files of a folder in a random order and compares what it gets, until it is killed or has done its share.
VISITOR = """
import hashlib, random, sys
from pathlib import Path
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.data.cache import CacheEntry, ShardCache
folder, url, max_bytes, seed, count, *digests = sys.argv[1:]
cache = ShardCache(Path(folder), int(max_bytes), RemoteSection(stall_timeout_s=5.0, backoff_s=0.01))
choice = random.Random(int(seed))
print("ready", flush=True)
for _ in range(int(count)):
    number = choice.randrange(len(digests))
    file = cache.open(CacheEntry(f"{url}/{'abcd'[number]}", 400_000, digests[number], "shard"))
    assert hashlib.sha256(file.path.read_bytes()).hexdigest() == digests[number]
    file.close()
"""


def test_many_processes_keep_the_budget(tmp_path: Path, server: FaultyServer, entry: Entry) -> None:
    """Also while some of them are killed, one after the other."""
    folder, max_bytes = tmp_path / "cache", 3 * NUM_BYTES
    digests = [entry(name).sha256 for name in NAMES]

    def start(seed: int, count: int) -> subprocess.Popen[str]:
        arguments = [str(folder), server.url, str(max_bytes), str(seed), str(count), *digests]
        process = subprocess.Popen(
            [sys.executable, "-c", VISITOR, *arguments], env=launch_environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    visitors = [start(seed, 150) for seed in range(2)]
    victims = [start(seed, 10_000) for seed in range(2, 4)]
    moments = random.Random(1)
    while any(visitor.poll() is None for visitor in visitors):
        # One look may see a file just before it makes room and the next one just after it took that room.
        assert min(total_size(folder) for _ in range(3)) <= max_bytes
        if victims and moments.random() < 0.05:
            victim = victims.pop()
            victim.kill()
            victim.communicate()
        time.sleep(0.005)
    for victim in victims:
        victim.kill()
        victim.communicate()
    for visitor in visitors:
        visitor.communicate()
        assert visitor.returncode == 0
