"""Checks of what a configuration asks for: settings, world size, data, disk, W&B, engine."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from jmvae_dist.checkpoint.layout import list_checkpoints
from jmvae_dist.cluster.doctor.check import Check, Context, Gathered, find_outliers, group_by_value
from jmvae_dist.cluster.doctor.table import Row
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.plan import default_lanes
from jmvae_dist.data.shard_set import ShardSet
from jmvae_dist.data.transfer import RemoteFile
from jmvae_dist.data.urls import shown
from jmvae_dist.data.views import SampleKeys
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.distributed.runtime import takes_gpu
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.model import JMVAE
from jmvae_dist.progress import format_bytes, format_duration
from jmvae_dist.tracking.wandb import resolve_mode, server_url
from jmvae_dist.training.setup import ResolvedRun, check_machine, resolve_run

# float32 weights and AdamW's two moments.
BYTES_PER_PARAMETER = 12
# Bounds on what a preflight asks of a file system that others use too.
_READ_BYTES = 64 * 2**20
_READ_S = 10.0
_TELLING_READ_S = 0.2
_SHARDS_LOOKED_AT = 2000
_LOOK_S = 10.0
# Directories of a network file system may be seen as they were a few seconds ago.
_SHARED_WAIT_S = 8.0
_CONNECT_S = 5.0
_SLOW_READ_FACTOR = 2.0
# Share of time that ranks may spend waiting for the one with the most lanes.
_IDLE_FRACTION = 0.1


# Configuration and world size


def _gather_configuration(context: Context) -> dict[str, Any]:
    config = context.config
    assert config is not None
    lanes = config.data.lanes or default_lanes(config.training.global_batch_size)
    # An impossible world size is a row of its own, and no reason to leave out the other checks.
    run = resolve_run(config, min(context.meeting.process.world_size, lanes))
    check_machine(config)
    context.run = run
    manifests = {"data.train_manifest": _describe_manifest(run.train_manifest)}
    if run.eval_manifest is not None:
        manifests["data.eval_manifest"] = _describe_manifest(run.eval_manifest)
    return {"output_dir": str(run.output_dir), "total_steps": run.total_steps, "manifests": manifests}


def _describe_manifest(manifest: Manifest) -> dict[str, Any]:
    return {
        "path": shown(manifest.path),
        "fingerprint": manifest.fingerprint,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
    }


def _judge_configuration(gathered: Gathered) -> list[Row]:
    facts = next(iter(gathered.facts.values()))
    rows = [gathered.passed(f"valid: {facts['total_steps']:,} steps, run directory {facts['output_dir']}")]
    for key in sorted({key for facts in gathered.facts.values() for key in facts["manifests"]}):
        manifests = {
            rank: facts["manifests"][key] for rank, facts in gathered.facts.items() if key in facts["manifests"]
        }
        groups = group_by_value({rank: item["fingerprint"] for rank, item in manifests.items()})
        (fingerprint, ranks), *deviations = groups
        usual = manifests[ranks[0]]
        found = f"{key}: {usual['num_samples']:,} samples in {usual['num_shards']:,} shard(s), "
        found += f"fingerprint {fingerprint[:12]}, {usual['path']}"
        rows.append(gathered.passed(found, ranks))
        for other, others in deviations:
            found = f"{key}: fingerprint {other[:12]}, elsewhere {fingerprint[:12]}: other data under the same path"
            rows.append(gathered.fail(found, f"copy the same shards and manifest to {usual['path']} there", others))
    return rows


def _gather_world_size(context: Context) -> dict[str, Any]:
    config = context.config
    assert config is not None
    batch = config.training.global_batch_size
    return {
        "world_size": context.meeting.process.world_size,
        "lanes": config.data.lanes or default_lanes(batch),
        "global_batch_size": batch,
    }


def _judge_world_size(gathered: Gathered) -> list[Row]:
    facts, everyone = gathered.facts[0], gathered.layout.places
    world_size, lanes, batch = facts["world_size"], facts["lanes"], facts["global_batch_size"]
    equal = [size for size in range(1, lanes + 1) if lanes % size == 0]
    sizes = f"possible: 1 to {lanes}; equal shares with {', '.join(map(str, equal))}"
    if world_size > lanes:
        divisors = [size for size in range(world_size, batch + 1) if batch % size == 0]
        advice = f"start at most {lanes} processes"
        advice += f", or set data.lanes to one of {divisors[:8]}" if divisors else ", or enlarge the global batch"
        return [gathered.fail(f"{world_size} processes cannot share {lanes} lanes; {sizes}", advice, everyone)]
    largest = math.ceil(lanes / world_size)
    idle = 1 - lanes / (largest * world_size)
    if lanes % world_size == 0:
        return [gathered.passed(f"{world_size}, with {largest} of {lanes} lanes each; {sizes}", everyone)]
    found = f"{world_size}: shares of {largest - 1} and {largest} of {lanes} lanes; the smaller wait "
    found += f"({idle:.0%} of the time of all ranks); {sizes}"
    if idle < _IDLE_FRACTION:
        return [gathered.passed(found, everyone)]
    fewer, more = max(size for size in equal if size < world_size), min(size for size in equal if size > world_size)
    return [gathered.warn(found, f"start {fewer} or {more} processes, or choose another data.lanes", everyone)]


# Shards


def _gather_shards(context: Context) -> dict[str, Any]:
    run = context.run
    assert run is not None
    manifests = {"data.train_manifest": run.train_manifest}
    if run.eval_manifest is not None:
        manifests["data.eval_manifest"] = run.eval_manifest
    deadline_s = time.monotonic() + _LOOK_S
    remote = run.config.data.remote
    return {key: _look_at_shards(manifest, remote, deadline_s) for key, manifest in manifests.items()}


def _look_at_shards(manifest: Manifest, remote: RemoteSection, deadline_s: float) -> dict[str, Any]:
    """Whether shards, indexes and sums are there with the right size; evenly spread ones, if there are many."""
    number = len(manifest.shards)
    stride = math.ceil(number / _SHARDS_LOOKED_AT)
    looked_at, problems = 0, []
    for shard_number in range(0, number, stride):
        if time.monotonic() > deadline_s:
            break
        looked_at += 1
        shard = manifest.shards[shard_number]
        files = [
            (manifest.shard_location(shard_number), shard.num_bytes),
            (manifest.index_location(shard_number), shard.index.num_bytes),
        ]
        if shard.sums is not None:
            files.append((manifest.sums_location(shard_number), shard.sums.num_bytes))
        for location, num_bytes in files:
            try:
                if isinstance(location, str):
                    # The answer states the size of the whole file, which is checked.
                    RemoteFile(location, num_bytes, f"shard {shard_number}", remote).read_range(0, 1)
                elif location.stat().st_size != num_bytes:
                    problems.append(f"{location}: {location.stat().st_size:,} bytes, the manifest says {num_bytes:,}")
                elif not os.access(location, os.R_OK):
                    problems.append(f"{location}: may not be read")
            except OSError as error:
                problems.append(f"{location}: {error.strerror}")
            except DataError as error:
                problems.append(str(error))
    return {"num_shards": number, "looked_at": looked_at, "num_problems": len(problems), "problems": problems[:3]}


def _judge_shards(gathered: Gathered) -> list[Row]:
    rows = []
    for key in sorted({key for facts in gathered.facts.values() for key in facts}):
        for facts, ranks in group_by_value({r: facts[key] for r, facts in gathered.facts.items() if key in facts}):
            found = f"{key}: {facts['looked_at']:,} of {facts['num_shards']:,} shard(s) looked at"
            if facts["num_problems"]:
                found += f", {facts['num_problems']:,} problem(s); {'; '.join(facts['problems'])}"
                advice = "copy them to this node, or mount the file system there; then `jmvae-dist shards verify`"
                rows.append(gathered.fail(found, advice, ranks))
            else:
                rows.append(gathered.passed(f"{found}, present with the right size", ranks))
    return rows


def _gather_read_speed(context: Context) -> dict[str, Any]:
    """Read the first batches of this rank as training would, but without sha256, which reads whole shards."""
    run = context.run
    assert run is not None
    manifest, views = run.train_manifest, run.views
    plan = run.plan
    lanes = plan.lanes_of_rank(*context.legal_place(context.rank))
    # Of pictures that differ in size only the shards tell how large they are.
    sizes = [view.modality.stored_bytes or manifest.num_bytes // manifest.num_samples for view in views]
    stored_bytes = max(1, sum(sizes))
    reader = ShardSet(manifest, "never", access=run.remote_access)
    _drop_cached(run, lanes)
    samples, start_s = 0, time.monotonic()
    try:
        for step in range(math.ceil(plan.steps_per_epoch)):
            shard_B, index_B = plan.batch(step, lanes)
            if manifest.has_remote_shards:
                # Each shard may be downloaded as a whole: one of them has to do.
                is_in_first = shard_B == plan.batch(0, lanes)[0][0]
                shard_B, index_B = shard_B[is_in_first], index_B[is_in_first]
            # A batch alone may exceed the bound.
            most = max(1, (_READ_BYTES - samples * stored_bytes) // stored_bytes)
            reader.gather(shard_B[:most], index_B[:most], views, SampleKeys(index_B[:most]))
            samples += min(len(shard_B), most)
            if samples * stored_bytes >= _READ_BYTES or time.monotonic() - start_s > _READ_S:
                break
    finally:
        reader.close()
    return {"samples": samples, "bytes": samples * stored_bytes, "duration_s": time.monotonic() - start_s}


def _drop_cached(run: ResolvedRun, lanes: range) -> None:
    """Ask the kernel to forget the shards that are about to be read: its memory is not what training reads from."""
    shard_B, _ = run.plan.batch(0, lanes)
    for number in sorted(set(shard_B.tolist())):
        # Only advice: where it cannot be followed the reading is merely faster.
        with contextlib.suppress(OSError, DataError), run.train_manifest.shard_path(number).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _judge_read_speed(gathered: Gathered) -> list[Row]:
    speeds = {rank: facts["samples"] / max(facts["duration_s"], 1e-9) for rank, facts in gathered.facts.items()}
    # Durations of small samples say more about chance than about nodes.
    is_telling = all(facts["duration_s"] >= _TELLING_READ_S for facts in gathered.facts.values())
    slow = find_outliers(speeds, "low", _SLOW_READ_FACTOR) if is_telling else []
    rows = []
    for rank in slow:
        found = f"{_name_speed(gathered.facts[rank])}; the median of the nodes reads over twice as fast"
        advice = "look at that node's mount and network; leave it out (--exclude) if it stays slow"
        rows.append(gathered.warn(found, advice, [rank]))
    others = [rank for rank in speeds if rank not in slow]
    slowest, fastest = min(others, key=speeds.__getitem__), max(others, key=speeds.__getitem__)
    found = _name_speed(gathered.facts[slowest])
    if len(others) > 1:
        found = f"slowest node {found}; fastest {_name_speed(gathered.facts[fastest])}"
    return [*rows, gathered.passed(found, others)]


def _name_speed(facts: dict[str, Any]) -> str:
    duration_s = max(facts["duration_s"], 1e-9)
    speed = f"{facts['samples'] / duration_s:,.0f} samples/s, {format_bytes(facts['bytes'] / duration_s)}/s"
    return f"{speed} ({format_bytes(facts['bytes'])} in {duration_s:.2f} s, one process)"


# Disk


def _gather_output_dir(context: Context) -> dict[str, Any]:
    """Make the run directory and a file in it, which the other nodes look for in the second stage."""
    run = context.run
    assert run is not None
    output_dir = run.output_dir.absolute()
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    probe = output_dir / f".doctor-{secrets.token_hex(8)}"

    def clean_up() -> None:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()

    context.on_exit.append(clean_up)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be written ({error.strerror})") from None
    return {**_describe_space(run, output_dir, context.meeting.process.world_size), "probe": str(probe)}


def _describe_space(run: ResolvedRun, output_dir: Path, world_size: int) -> dict[str, Any]:
    status = os.statvfs(output_dir)
    present = [file for checkpoint in list_checkpoints(output_dir / "checkpoints") for file in checkpoint.iterdir()]
    return {
        "num_parameters": count_parameters(run),
        "num_checkpoints": count_checkpoints(run),
        "files_per_checkpoint": world_size + 1,
        "free_bytes": status.f_bavail * status.f_frsize,
        # Some file systems have no fixed number of files, and say 0.
        "free_files": status.f_favail if status.f_files else None,
        "present_bytes": sum(file.stat().st_size for file in present),
        "path": str(output_dir),
    }


def count_parameters(run: ResolvedRun) -> int:
    """Parameters of the run's model, which is built without memory for them."""
    with torch.device("meta"):
        model = JMVAE(run.model_config, networks=run.config.model.networks, kernels="reference")
    return sum(parameter.numel() for parameter in model.parameters())


def count_checkpoints(run: ResolvedRun) -> int:
    """Most checkpoints that are there at a time: those kept, and one that is being written."""
    section = run.config.checkpoint
    kept = run.total_steps // section.keep_every_steps if section.keep_every_steps else 0
    return section.keep_last + 1 + kept


def _judge_space(gathered: Gathered) -> list[Row]:
    facts = gathered.facts[0]
    each = facts["num_parameters"] * BYTES_PER_PARAMETER
    total = each * facts["num_checkpoints"]
    needed = max(0, total - facts["present_bytes"])
    files = facts["files_per_checkpoint"] * facts["num_checkpoints"]
    found = f"{facts['num_parameters']:,} parameters; {facts['num_checkpoints']} checkpoints of {format_bytes(each)}"
    found += f" need {format_bytes(total)}"
    if facts["present_bytes"]:
        found += f", of which {format_bytes(facts['present_bytes'])} is there"
    found += f"; {format_bytes(facts['free_bytes'])} free in {facts['path']} (a quota may be lower)"
    advice = "free space, lower checkpoint.keep_last, raise checkpoint.keep_every_steps, or choose another output_dir"
    if needed > facts["free_bytes"]:
        return [gathered.fail(found, advice)]
    if facts["free_files"] is not None and files > facts["free_files"]:
        found += f"; {files:,} files are needed, {facts['free_files']:,} can be made"
        return [gathered.fail(found, "remove files: the file system has no inodes left for more")]
    if 2 * needed > facts["free_bytes"]:
        return [gathered.warn(f"{found}: more than half of it", advice)]
    return [gathered.passed(found)]


def _gather_shared_directory(context: Context) -> dict[str, Any]:
    """Look for rank 0's file in the run directory, and write one there."""
    probe = Path(context.plan["probe"])
    deadline_s = time.monotonic() + _SHARED_WAIT_S
    is_seen = False
    while not is_seen and time.monotonic() < deadline_s:
        # A listing is fresher than a look-up of one name, whose absence network file systems remember.
        with contextlib.suppress(OSError):
            is_seen = probe.name in os.listdir(probe.parent)
        if not is_seen:
            time.sleep(0.1)
    problem = None
    own = probe.with_name(f"{probe.name}-{context.rank}")
    if is_seen:
        try:
            own.touch()
            own.unlink()
        except OSError as error:
            problem = error.strerror
    return {"is_seen": is_seen, "problem": problem, "path": str(probe.parent)}


def _judge_shared_directory(gathered: Gathered) -> list[Row]:
    rows = []
    for facts, ranks in group_by_value(gathered.facts):
        if not facts["is_seen"]:
            found = f"a file of rank 0 in {facts['path']} is not seen here: it is another directory"
            advice = "choose an output_dir on a file system that all nodes share: every rank writes its part"
            rows.append(gathered.fail(found, advice, ranks))
        elif facts["problem"]:
            found = f"{facts['path']} cannot be written from here ({facts['problem']})"
            rows.append(gathered.fail(found, "look at the mount and the permissions on that node", ranks))
        else:
            shared = "writable" if len(gathered.layout.nodes) == 1 else "writable, and the same on these nodes"
            rows.append(gathered.passed(f"{facts['path']}: {shared}", ranks))
    return rows


def _gather_cadence(context: Context) -> dict[str, Any]:
    run = context.run
    assert run is not None
    section = run.config.checkpoint
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return {
        "every_s": section.every_s,
        "every_steps": section.every_steps,
        "total_steps": run.total_steps,
        "remaining_s": int(end) - time.time() if end.isdigit() else None,
    }


def _judge_cadence(gathered: Gathered) -> list[Row]:
    facts = gathered.facts[0]
    every_s, every_steps, total_steps = facts["every_s"], facts["every_steps"], facts["total_steps"]
    cadences = []
    if every_s is not None:
        cadences.append(format_duration(every_s))
    if every_steps is not None:
        cadences.append(f"{every_steps:,} of {total_steps:,} steps")
    remaining_s = facts["remaining_s"]
    found = f"every {' and every '.join(cadences)}" if cadences else "only at the end of the run"
    if remaining_s is not None:
        found += f"; {format_duration(max(0.0, remaining_s))} left in this job"
    by_steps = every_steps is not None and every_steps < total_steps
    if every_s is None and not by_steps:
        return [gathered.warn(f"{found}: a crash would lose all of it", "set checkpoint.every_s (1800, say)")]
    if remaining_s is not None and every_s is not None and every_s > remaining_s and not by_steps:
        found += ": the first checkpoint by time would come too late"
        return [gathered.warn(found, "lower checkpoint.every_s, or ask for more time")]
    return [gathered.passed(found)]


# W&B and engine


def _gather_wandb(context: Context) -> dict[str, Any]:
    config = context.config
    assert config is not None
    messages: list[str] = []
    mode = resolve_mode(config.tracking.wandb.mode, messages.append)
    facts: dict[str, Any] = {"mode": mode, "asked": config.tracking.wandb.mode, "messages": messages}
    return {**facts, **_reach_server()} if mode == "online" else facts


def _reach_server() -> dict[str, Any]:
    """Open a connection to the W&B server, or to the proxy before it, and close it: nothing is sent."""
    address = urlsplit(server_url())
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy)
    # The rest of the address may hold a password.
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return {"server": f"{host}:{port}", "problem": str(error)}
    return {"server": f"{host}:{port}", "problem": None}


def _judge_wandb(gathered: Gathered) -> list[Row]:
    facts = gathered.facts[0]
    found = f"{facts['mode']} (tracking.wandb.mode: {facts['asked']})"
    if facts["messages"]:
        return [gathered.warn(f"{found}; {'; '.join(facts['messages'])}", "set tracking.wandb.mode or WANDB_MODE")]
    if facts.get("problem"):
        found += f", but {facts['server']} cannot be reached: {facts['problem']}"
        advice = (
            "set tracking.wandb.mode: offline and `wandb sync` later, or HTTPS_PROXY; training goes on either way"
        )
        return [gathered.warn(found, advice)]
    if facts["mode"] == "online":
        found += f", {facts['server']} answers"
    return [gathered.passed(found)]


def _gather_engine(context: Context) -> dict[str, Any]:
    config = context.config
    assert config is not None
    engine = config.training.engine
    if engine != "ddp":
        from jmvae_dist.distributed.deepspeed import prepare_process

        prepare_process(on_cpu=not takes_gpu(config.training.device))
    return {"engine": engine, "precision": config.training.precision}


def _judge_engine(gathered: Gathered) -> list[Row]:
    facts = gathered.facts[min(gathered.facts)]
    library = "torch alone" if facts["engine"] == "ddp" else "DeepSpeed can be imported"
    return [gathered.passed(f"{facts['engine']}, {facts['precision']} ({library})")]


CONFIGURATION = Check(
    "configuration",
    "rank",
    "config",
    _gather_configuration,
    _judge_configuration,
    "correct it; the checks of data, disk and checkpoints are left out where it failed",
)
CHECKS = (
    Check("world size", "main", "config", _gather_world_size, _judge_world_size, "correct data.lanes"),
    Check("engine", "rank", "config", _gather_engine, _judge_engine, "install DeepSpeed, or training.engine: ddp"),
    Check("W&B", "main", "config", _gather_wandb, _judge_wandb, "set tracking.wandb.mode: offline"),
    Check("shards", "node", "run", _gather_shards, _judge_shards, "see `jmvae-dist shards verify`"),
    Check("read speed", "node", "run", _gather_read_speed, _judge_read_speed, "run `jmvae-dist shards verify`"),
    Check("checkpoints", "main", "run", _gather_cadence, _judge_cadence, "look at the section checkpoint"),
    Check("disk space", "main", "run", _gather_output_dir, _judge_space, "choose another output_dir"),
)
SHARED_DIRECTORY = Check(
    "output_dir", "node", "run", _gather_shared_directory, _judge_shared_directory, "look at that node's mounts"
)
