"""Checks of processes and nodes: launcher, software, devices, cores, limits."""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path
from typing import Any

import torch

import jmvae_dist
from jmvae_dist.cluster.doctor.check import Check, Context, Gathered, Judgement, group_by_value
from jmvae_dist.cluster.doctor.job import count_parameters
from jmvae_dist.cluster.doctor.layout import Layout, format_ranks
from jmvae_dist.cluster.doctor.table import Row
from jmvae_dist.cluster.provenance import describe_code
from jmvae_dist.cluster.site import find_site_file, find_site_read
from jmvae_dist.data.loader import count_shards_in_use
from jmvae_dist.data.shard_set import most_open_shards
from jmvae_dist.distributed.runtime import takes_gpu
from jmvae_dist.errors import ConfigError
from jmvae_dist.progress import format_bytes
from jmvae_dist.training.assembly import prefetched_bytes
from jmvae_dist.training.cores import cpu_quota, usable_cores
from jmvae_dist.training.memory import engine_memory
from jmvae_dist.training.setup import ResolvedRun
from jmvae_dist.training.state import software_versions

_SHARED_MEMORY = Path("/dev/shm")
_MORE_SHARED_MEMORY = "enlarge /dev/shm (docker run --shm-size, mount -o remount,size=)"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Up to here each node has a row of its own with its ranks.
_NODES_SHOWN = 16
# Launchers that `detect_process` does not know, and where they say how many processes they started.
_FOREIGN_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")


# Ranks and nodes


def _gather_ranks(context: Context) -> dict[str, Any]:
    sizes = {name: os.environ.get(name, "1") for name in _FOREIGN_LAUNCHERS}
    return {"foreign": {name: size for name, size in sizes.items() if size != "1"}}


def _judge_ranks(gathered: Gathered) -> list[Row]:
    layout = gathered.layout
    first = layout.places[0]
    rows = []
    foreign = gathered.facts.get(0, {"foreign": {}})["foreign"]
    if first.launcher == "single" and foreign:
        variable, size = next(iter(foreign.items()))
        found = f"one process as far as jmvae-dist knows, but {variable}={size}: each would train alone"
        rows.append(gathered.fail(found, "start with srun, torchrun, accelerate launch or deepspeed"))
    for launcher, ranks in group_by_value({rank: place.launcher for rank, place in layout.places.items()})[1:]:
        found = f"started by {launcher}, rank 0 by {first.launcher}"
        rows.append(gathered.fail(found, "start all processes with the same launcher", ranks))
    others = [rank for rank, place in layout.places.items() if place.world_size != layout.world_size]
    if others:
        sizes = format_ranks(layout.places[rank].world_size for rank in others)
        found = f"world size {sizes} there, {layout.world_size} on rank 0"
        rows.append(gathered.fail(found, "look for WORLD_SIZE in scripts and shell profiles", others))
    if layout.repeated:
        found = "several processes have this rank"
        rows.append(gathered.fail(found, "two launches share MASTER_ADDR and MASTER_PORT; end one", layout.repeated))
    return rows + _judge_nodes(gathered)


def _judge_nodes(gathered: Gathered) -> list[Row]:
    layout = gathered.layout
    rows: list[Row] = []
    usual: list[Row] = []
    usual_size = group_by_value({ranks[0]: len(ranks) for ranks in layout.nodes.values()})[0][0]
    for host, ranks in layout.nodes.items():
        local_ranks = [layout.places[rank].local_rank for rank in ranks]
        launcher = layout.places[ranks[0]].launcher
        found = f"{len(ranks)} of {layout.world_size} process(es) on {host}, started "
        found += "without a launcher" if launcher == "single" else f"by {launcher}"
        found += f": rank {format_ranks(ranks)}, local rank {format_ranks(local_ranks)}"
        if len(set(local_ranks)) != len(local_ranks):
            advice = "nodes must differ in name, and each has one launcher: else ranks share a GPU"
            rows.append(gathered.warn(f"{found}, of which some occur twice", advice, ranks))
        elif len(ranks) != usual_size and not layout.missing:
            advice = "give every node as many ranks, unless its GPUs are fewer"
            rows.append(gathered.warn(f"{found}; other nodes have {usual_size}", advice, ranks))
        else:
            usual.append(gathered.passed(found, ranks))
    if len(usual) > _NODES_SHOWN:
        members = {rank for ranks in layout.nodes.values() if len(ranks) == usual_size for rank in ranks}
        usual = [gathered.passed(f"{usual_size} process(es) on each of {len(usual)} nodes", members)]
    return rows + usual


def _gather_site(context: Context) -> dict[str, Any]:
    try:
        file = find_site_file()
    except ConfigError:  # without batch scripts there is no such file
        file = None
    read = find_site_read()
    return {
        "file": None if file is None else str(file),
        "read": None if read is None else str(read[0]),
        "is_unchanged": None if read is None else read[1],
    }


def _judge_site(gathered: Gathered) -> list[Row]:
    """Whether ranks of srun have the settings that those of batch jobs have."""
    facts = gathered.facts[0]
    if gathered.layout.places[0].launcher != "srun" or (facts["file"] is None and facts["read"] is None):
        return []
    everyone = gathered.layout.places
    if facts["read"] is not None:
        found = f"started with the settings of {facts['read']}"
        if facts["is_unchanged"]:
            return [gathered.passed(found, everyone)]
        return [gathered.warn(f"{found}, which has changed since", "submit slurm/doctor.sbatch once more", everyone)]
    found = f"{facts['file']} was not read: srun alone does not start ranks with the interpreter, modules, interface "
    found += "and variables that batch jobs have from it"
    return [gathered.warn(found, "sbatch slurm/doctor.sbatch, if the run is to be a batch job", everyone)]


# Software


def _gather_versions(context: Context) -> dict[str, str]:
    return {**software_versions(), "torch": str(torch.__version__)}


def _judge_versions(gathered: Gathered) -> list[Row]:
    names = sorted({name for versions in gathered.facts.values() for name in versions})
    usual: dict[str, str] = {}
    rows = []
    for name in names:
        versions = {rank: facts.get(name, "not installed") for rank, facts in gathered.facts.items()}
        (usual[name], _), *deviations = group_by_value(versions)
        for version, ranks in deviations:
            found = f"{name} is {version}, elsewhere {usual[name]}"
            rows.append(
                gathered.warn(found, "use one environment on all nodes (a container, or a shared path)", ranks)
            )
    if not rows:
        rows.append(gathered.passed(", ".join(f"{name} {version}" for name, version in usual.items())))
    return rows


def _gather_code(context: Context) -> dict[str, str]:
    root = Path(jmvae_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    facts = {"version": jmvae_dist.__version__, "commit": "", "digest": digest.hexdigest()}
    if context.rank in context.layout.leaders:
        code, _ = describe_code()
        changes = " with changes" if code["is_changed"] else ""
        facts["commit"] = f"{code['git_commit'][:12]}{changes}" if code["git_commit"] else ""
    return facts


def _judge_code(gathered: Gathered) -> list[Row]:
    # Commits can be the same with changes on one node only, and unknown where there is no git: the files decide.
    (_, ranks), *deviations = group_by_value({rank: facts["digest"] for rank, facts in gathered.facts.items()})
    usual = gathered.facts[ranks[0]]
    advice = "install the same code on all nodes: ranks with different code compute different things"
    rows = [
        gathered.fail(
            f"code is {_name_code(gathered.facts[others[0]])}, elsewhere {_name_code(usual)}", advice, others
        )
        for _, others in deviations
    ]
    return rows or [gathered.passed(_name_code(usual))]


def _name_code(facts: dict[str, str]) -> str:
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    return f"jmvae_dist {facts['version']}{commit} (files {facts['digest'][:12]})"


# Devices


def _asked_device(context: Context) -> str:
    return "auto" if context.config is None else context.config.training.device


def _gather_devices(context: Context) -> dict[str, Any]:
    gpus = []
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = [
            {"name": item.name, "memory_bytes": item.total_memory, "uuid": str(getattr(item, "uuid", ""))}
            for item in properties
        ]
    return {
        "asked": _asked_device(context),
        "gpus": gpus,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cuda_build": torch.version.cuda,
        "driver": _nvidia_driver(),
    }


def _nvidia_driver() -> str | None:
    """The version of the kernel driver; None where there is none."""
    try:
        words = _NVIDIA_DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _judge_devices(gathered: Gathered) -> list[Row]:
    on_cpu = {rank for rank, facts in gathered.facts.items() if facts["asked"] == "cpu" or not facts["gpus"]}
    if on_cpu and len(on_cpu) < len(gathered.facts):
        found = "sees no GPU, others do: ranks would not agree on a backend"
        return [gathered.fail(found, "ask for GPUs on every node, or set training.device: cpu", on_cpu)]
    if on_cpu:
        return [_judge_cpu(gathered, facts, ranks) for facts, ranks in group_by_value(gathered.facts)]
    return _judge_gpus(gathered)


def _judge_cpu(gathered: Gathered, facts: dict[str, Any], ranks: list[int]) -> Row:
    build = f"built for CUDA {facts['cuda_build']}" if facts["cuda_build"] else "built without CUDA"
    if facts["asked"] != "cpu" and facts["driver"]:
        found = f"CPU: torch ({build}) sees no GPU, but the node has NVIDIA driver {facts['driver']}"
        if facts["visible_devices"] is not None:
            found += f"; CUDA_VISIBLE_DEVICES={facts['visible_devices']!r}"
        advice = "install a CUDA build of torch for that driver, ask Slurm for GPUs (--gpus-per-node), or set "
        return gathered.warn(found, f"{advice}training.device: cpu", ranks)
    return gathered.passed(f"CPU, no GPU is used (torch {build})", ranks)


def _judge_gpus(gathered: Gathered) -> list[Row]:
    layout = gathered.layout
    rows = []
    used: dict[int, dict[str, Any]] = {}
    for rank, facts in gathered.facts.items():
        # As Accelerate chooses it.
        used[rank] = facts["gpus"][layout.places[rank].local_rank % len(facts["gpus"])]
    for host, ranks in layout.nodes.items():
        here = [rank for rank in ranks if rank in used]
        owners: dict[str, list[int]] = {}
        for rank in here:
            index = layout.places[rank].local_rank % len(gathered.facts[rank]["gpus"])
            owners.setdefault(used[rank]["uuid"] or str(index), []).append(rank)
        for sharing in (sharing for sharing in owners.values() if len(sharing) > 1):
            found = f"{len(sharing)} ranks would share one GPU of {host}; NCCL refuses that"
            rows.append(gathered.fail(found, "start as many ranks as the node has GPUs (--gpus-per-node)", sharing))
    described = {rank: [item["name"], gathered.facts[rank]["driver"]] for rank, item in used.items()}
    (usual, usual_ranks), *deviations = group_by_value(described)
    for (name, driver), ranks in deviations:
        found = f"{name}, driver {driver}; elsewhere {usual[0]}, driver {usual[1]}"
        rows.append(gathered.warn(found, "all ranks wait for the slowest; ask for one type of GPU", ranks))
    facts = gathered.facts[usual_ranks[0]]
    memory = format_bytes(used[usual_ranks[0]]["memory_bytes"])
    found = f"{usual[0]} ({memory}), driver {usual[1]}, torch built for CUDA {facts['cuda_build']}; "
    found += f"{len(facts['gpus'])} visible to a rank"
    return [*rows, gathered.passed(found, usual_ranks)]


# Cores and limits


def _gather_threads(context: Context) -> dict[str, Any]:
    workers = 0 if context.config is None else context.config.data.workers
    return {
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "cores": sorted(os.sched_getaffinity(0)),
        "quota": cpu_quota(),
        "workers": workers,
        "on_cpu": not takes_gpu(_asked_device(context)),
    }


def _judge_threads(gathered: Gathered) -> list[Row]:
    judgements: dict[int, Judgement] = {}
    for ranks in gathered.layout.nodes.values():
        present = [rank for rank in ranks if rank in gathered.facts]
        if present:
            judgement = _judge_threads_of_node([gathered.facts[rank] for rank in present])
            judgements.update(dict.fromkeys(present, judgement))
    return gathered.merge(judgements)


def _judge_threads_of_node(facts: list[dict[str, Any]]) -> Judgement:
    cores = len(set().union(*(item["cores"] for item in facts)))
    available = usable_cores((item["cores"] for item in facts), (item["quota"] for item in facts))
    threads = sum(item["threads"] for item in facts)
    workers = sum(item["workers"] for item in facts)
    found = f"{len(facts)} rank(s) per node with {threads} thread(s) in all for {available:g} core(s)"
    if available < cores:
        found += f" (the container's share of {cores})"
    if workers:
        found += f"; {workers} reader process(es) beside them"
    each = max(1, int(available) // len(facts))
    crowded = sum(item["threads"] > len(item["cores"]) for item in facts)
    if len(facts) > available:
        return (
            "warn",
            f"{found}: fewer cores than ranks",
            "ask for more (--cpus-per-task), or start fewer ranks per node",
        )
    if threads > available or crowded:
        found += ": threads get in each other's way"
        if crowded:
            found += f"; {crowded} rank(s) may use fewer cores than they have threads"
        return "warn", found, f"set OMP_NUM_THREADS={each}, or ask for more cores (--cpus-per-task)"
    if facts[0]["on_cpu"] and threads * 2 <= available:
        advice = f"set OMP_NUM_THREADS={each}, or start more ranks per node: on CPUs threads are what computes"
        return "warn", f"{found}: most cores would be idle", advice
    return "pass", found, ""


def _gather_open_files(context: Context) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted, files_per_shard = None, 1
    if context.run is not None:
        lanes = context.run.plan.lanes_of_rank(*context.legal_place(context.rank))
        wanted = count_shards_in_use(context.run.plan, len(lanes))
        files_per_shard = context.run.remote_access.files_per_shard(context.run.train_manifest)
    usable = most_open_shards(files_per_shard)
    return {"soft": soft, "hard": hard, "usable": usable, "wanted": wanted, "files_per_shard": files_per_shard}


def _judge_open_files(gathered: Gathered) -> list[Row]:
    rows = []
    for (soft, hard, usable), ranks in group_by_value(
        {rank: (facts["soft"], facts["hard"], facts["usable"]) for rank, facts in gathered.facts.items()}
    ):
        wanted = max((gathered.facts[rank]["wanted"] or 0 for rank in ranks), default=0)
        needed = 2 * wanted * gathered.facts[ranks[0]]["files_per_shard"]
        found = f"limit of open files {_name_limit(soft)}"
        if wanted:
            found += f"; a rank reads from {wanted:,} shard(s) at a time"
        if wanted > usable:
            found += f", but may keep {usable:,} open: shards would be opened again and again"
            advice = f"ulimit -n {needed} (the hard limit is {_name_limit(hard)}), larger shards, "
            rows.append(gathered.warn(found, f"{advice}or a smaller data.shuffle_window", ranks))
        else:
            rows.append(gathered.passed(found, ranks))
    return rows


def _name_limit(limit: int) -> str:
    return "none" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _gather_shared_memory(context: Context) -> dict[str, Any]:
    status = os.statvfs(_SHARED_MEMORY)
    facts = {"size_bytes": status.f_blocks * status.f_frsize, "free_bytes": status.f_bavail * status.f_frsize}
    run = context.run
    if run is None:
        return {**facts, "reader_bytes": None, "gradient_bytes": None, "gradient_reduction": ""}
    places = [context.legal_place(rank) for rank in context.local_ranks] if run.config.data.workers > 0 else []
    return {
        **facts,
        "reader_bytes": sum(prefetched_bytes(run, *place) for place in places),
        "gradient_bytes": _shared_gradient_bytes(run, context.layout, len(context.local_ranks)),
        "gradient_reduction": run.config.training.gradient_reduction,
    }


def _shared_gradient_bytes(run: ResolvedRun, layout: Layout, num_local_ranks: int) -> int:
    """What the ranks of this node are to share; with `auto` only where all of them are on one node."""
    training = run.config.training
    is_local = len(layout.nodes) == 1 or training.gradient_reduction == "shared_memory"
    if training.engine != "ddp" or not is_local:
        return 0
    memory = engine_memory(
        training.engine,
        count_parameters(run),
        layout.world_size,
        device_type="cuda" if takes_gpu(training.device) else "cpu",
        gradient_reduction=training.gradient_reduction,
    )
    return num_local_ranks * memory.buffers


def _judge_shared_memory(gathered: Gathered) -> list[Row]:
    layout = gathered.layout
    judgements = {rank: _judge_shared_memory_of_node(facts, layout) for rank, facts in gathered.facts.items()}
    return gathered.merge(judgements)


def _judge_shared_memory_of_node(facts: dict[str, Any], layout: Layout) -> Judgement:
    """Free space against what training wants of it (distributed/shared_memory.py): readers first, then gradients."""
    free, readers, gradients = facts["free_bytes"], facts["reader_bytes"], facts["gradient_bytes"]
    found = f"{format_bytes(free)} of {format_bytes(facts['size_bytes'])} free"
    if readers is None:
        return "pass", f"{found}; reader processes (data.workers) and gradients of ddp on CPUs would use it", ""
    if readers:
        found += f"; the reader processes of a node put up to {format_bytes(readers)} there"
    if gradients:
        found += f"; its ranks share {format_bytes(gradients)} for gradients, and want twice that free besides"
    if not readers and not gradients:
        found += "; this run puts nothing there"
    if readers > free:
        return "fail", found, f"lower data.workers, or {_MORE_SHARED_MEMORY}"
    is_required = facts["gradient_reduction"] == "shared_memory"
    if is_required and len(layout.nodes) > 1:
        found += "; training.gradient_reduction: shared_memory is for one machine, and the ranks are on "
        found += str(len(layout.nodes))
        # Not more than that: containers of one machine may differ in their names.
        return "warn", found, "set training.gradient_reduction: auto, unless these are one machine"
    if 2 * gradients <= free - readers:
        return "pass", found, ""
    if is_required:
        return "fail", found, f"set training.gradient_reduction: auto, or {_MORE_SHARED_MEMORY}"
    found += ": too little, they would go through the process group, which is slower"
    return "warn", found, f"{_MORE_SHARED_MEMORY}; or training.gradient_reduction: process_group, if that is meant"


CHECKS = (
    Check("ranks", "rank", "nothing", _gather_ranks, _judge_ranks, "see the launcher's documentation"),
    Check("site", "main", "nothing", _gather_site, _judge_site, "look at slurm/site.env"),
    Check("versions", "rank", "nothing", _gather_versions, _judge_versions, "install the package again"),
    Check("code", "rank", "nothing", _gather_code, _judge_code, "install the package again"),
    Check("device", "rank", "nothing", _gather_devices, _judge_devices, "look at nvidia-smi on that node"),
    Check("threads", "rank", "nothing", _gather_threads, _judge_threads, "set OMP_NUM_THREADS"),
)
# These use the resolved run, if there is one, and so come after it.
LIMITS = (
    Check("open files", "rank", "nothing", _gather_open_files, _judge_open_files, "look at ulimit -n"),
    Check(
        "/dev/shm",
        "node",
        "nothing",
        _gather_shared_memory,
        _judge_shared_memory,
        "mount a tmpfs at /dev/shm, or set data.workers: 0",
    ),
)
