"""Check of the directory in which a node keeps copies of remote shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jmvae_dist.cluster.doctor.check import Check, Context, Gathered, group_by_value
from jmvae_dist.cluster.doctor.table import Row
from jmvae_dist.data.loader import count_shards_in_use
from jmvae_dist.progress import format_bytes

# Locks between nodes are slow or missing there, and "once per node" would be once for all.
_NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse.", "9p", "afs", "glusterfs")


def _gather(context: Context) -> dict[str, Any]:
    """Open the cache as the ranks of this node would, which makes the directory and tries its locks."""
    run = context.run
    assert run is not None
    manifests = [manifest for manifest in (run.train_manifest, run.eval_manifest) if manifest is not None]
    shards = [shard for manifest in manifests if manifest.has_remote_shards for shard in manifest.shards]
    if not shards:
        return {"is_needed": False}
    cache = run.remote_access.open_cache()
    if cache is None:
        return {"is_needed": True, "path": None}
    status = os.statvfs(cache.folder)
    room = status.f_bavail * status.f_frsize + cache.used_bytes()
    lanes = [run.plan.lanes_of_rank(*context.legal_place(rank)) for rank in context.local_ranks]
    in_use = min(len(shards), sum(count_shards_in_use(run.plan, len(of_rank)) for of_rank in lanes))
    limit = run.config.data.cache.max_bytes
    return {
        "is_needed": True,
        "path": str(cache.folder),
        "file_system": file_system_of(cache.folder),
        "room_bytes": room if limit is None else min(room, limit),
        "largest_bytes": max(shard.num_bytes + shard.index.num_bytes for shard in shards),
        "in_use_bytes": in_use * sum(shard.num_bytes for shard in shards) // len(shards),
    }


def file_system_of(path: Path) -> str:
    """The type of the file system that holds a path, as the kernel calls it; empty if it does not say."""
    real, found, kind = os.path.realpath(path), "", ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        place = left.split(" ")[4].replace("\\040", " ")
        if len(place) >= len(found) and (real == place or real.startswith(place.rstrip("/") + "/")):
            found, kind = place, right.split(" ")[0]
    return kind


def _judge(gathered: Gathered) -> list[Row]:
    rows = []
    for facts, ranks in group_by_value(gathered.facts):
        if not facts["is_needed"]:
            continue
        if facts["path"] is None:
            found = "none: samples are read one by one over the network, and their bytes are not compared with sha256"
            rows.append(gathered.warn(found, "set data.cache.dir to a directory on a local disk", ranks))
            continue
        found = f"{facts['path']} ({facts['file_system'] or 'unknown file system'}): "
        found += f"room for {format_bytes(facts['room_bytes'])}"
        advice = "free space there, raise data.cache.max_bytes, or choose another data.cache.dir"
        if facts["room_bytes"] < facts["largest_bytes"]:
            found += f", less than the largest shard ({format_bytes(facts['largest_bytes'])})"
            rows.append(gathered.fail(found, advice, ranks))
        elif facts["file_system"].startswith(_NETWORK_FILE_SYSTEMS):
            found += ": a network file system"
            rows.append(gathered.warn(found, "set data.cache.dir to a directory on a disk of the node", ranks))
        elif facts["room_bytes"] < facts["in_use_bytes"]:
            found += f"; the node reads from about {format_bytes(facts['in_use_bytes'])} at a time: shards would be "
            rows.append(gathered.warn(f"{found}downloaded again and again", advice, ranks))
        else:
            rows.append(gathered.passed(found, ranks))
    return rows


SHARD_CACHE = Check("shard cache", "node", "run", _gather, _judge, "see data.cache in the configuration")
