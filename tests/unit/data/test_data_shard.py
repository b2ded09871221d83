"""Entries of shards: what is refused, and where their files are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifest_examples import assert_refused, changed, example, removed

from jmvae_dist.data.index import index_num_bytes


def shard_of(num_samples: int) -> dict[str, Any]:
    index = {"url": "b.tar.index", "num_bytes": index_num_bytes(num_samples, 2), "sha256": "c" * 64}
    return {"url": "b.tar", "num_samples": num_samples, "num_bytes": 2**40, "sha256": "b" * 64, "index": index}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("shards", 1, "url", value="a.tar"), "shards: 'a.tar' is listed twice"),
        (changed("shards", 1, "url", value="pipe:rm -rf /"), r"shards\[1\]\.url: scheme 'pipe'"),
        (changed("shards", 1, "url", value="memory://host/b.tar"), r"shards\[1\]\.url: scheme 'memory'"),
        (changed("shards", 1, "url", value="file://host/b.tar"), r"shards\[1\]\.url: .* must have the form"),
        (changed("shards", 1, "url", value="a\0b"), r"shards\[1\]\.url: .* printable"),
        (changed("shards", 1, "sha256", value="zz"), r"shards\[1\]\.sha256: must be a sha256"),
        (changed("shards", 1, "num_samples", value=0), r"shards\[1\]\.num_samples: 0 must be"),
        (changed("shards", 1, "num_samples", value=2**40), r"shards\[1\]\.index: 1099511627776 samples in one shard"),
        (
            changed("shards", 1, "index", "num_bytes", value=96),
            r"shards\[1\]\.index\.num_bytes: says 96, but 4 samples with 2 modalities take 120",
        ),
        (changed("shards", 1, "url", value="file:///a%00b"), r"shards\[1\]\.url: .* must have the form"),
        (changed("shards", 1, "url", value="file:///a%1b[2J"), r"shards\[1\]\.url: .* must have the form"),
        (
            changed("shards", 1, value=shard_of(30_000_000)),
            r"shards\[1\]\.index: 30000000 samples in one shard: an index has at most 268435456 bytes",
        ),
        (removed("shards", 1, "index", "url"), r"shards\[1\]\.index\.url: is missing"),
    ],
)
def test_malformed_shards_name_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    assert_refused(tmp_path, change, message)


def test_file_urls(tmp_path: Path) -> None:
    assert str(example(("file:///data/a%20b.tar",)).shard_path(0)) == "/data/a b.tar"
    assert str(example(("/data/a.tar",)).shard_path(0)) == "/data/a.tar"
