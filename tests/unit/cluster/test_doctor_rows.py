"""What the preflight makes of facts: rows with the right status, rank and advice."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.cluster.doctor import job, machine, network
from jmvae_dist.cluster.doctor.check import Check, judge_check
from jmvae_dist.cluster.doctor.diagnosis import plan_together
from jmvae_dist.cluster.doctor.layout import Layout, Place, format_ranks
from jmvae_dist.cluster.doctor.meeting import describe_missing
from jmvae_dist.cluster.doctor.shard_cache import SHARD_CACHE
from jmvae_dist.cluster.doctor.table import Row, print_table

CHECKS = {check.name: check for check in (*machine.CHECKS, *machine.LIMITS, *job.CHECKS, job.CONFIGURATION)}
CHECKS |= {check.name: check for check in (job.SHARED_DIRECTORY, network.INTERFACE, network.CLOCKS)}
CHECKS |= {check.name: check for check in (network.PROCESS_GROUP, SHARD_CACHE)}


def make_layout(*ranks_per_node: int, world_size: int | None = None, **changes: Any) -> Layout:
    """Nodes node1, node2, ... with so many ranks each."""
    places = {}
    for number, count in enumerate(ranks_per_node, start=1):
        for local_rank in range(count):
            places[len(places)] = Place(len(places), local_rank, sum(ranks_per_node), "torchrun", f"node{number}")
    return Layout(world_size or len(places), places, **changes)


def judge(check: str, facts: dict[int, Any], layout: Layout) -> list[Row]:
    """Rows of a check for the facts of some ranks."""
    return judge_check(CHECKS[check], {rank: {check: {"facts": item}} for rank, item in facts.items()}, layout)


def the_problem(rows: list[Row]) -> Row:
    """The only row that is not a pass; it must say what to do."""
    (row,) = [row for row in rows if row.status != "pass"]
    assert row.advice
    return row


def summarize(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.status, row.where) for row in rows]


@pytest.mark.parametrize(
    ("launcher", "file", "variable", "said"),
    [
        ("srun", "site.env", None, ("warn", "site.env was not read: srun alone")),
        ("srun", "site.env", "", ("warn", "site.env was not read: srun alone")),
        ("srun", "site.env", "7 {digest} {file}", ("pass", "started with the settings of {file}")),
        ("srun", "site.env", "6 {digest} {file}", ("warn", "site.env was not read: srun alone")),
        ("srun", "site.env", "{file}", ("warn", "site.env was not read: srun alone")),
        (
            "srun",
            "site.env",
            "7 0123 {file}",
            ("warn", "started with the settings of {file}, which has changed since"),
        ),
        ("srun", "a b/none", "7 {digest} {file}", ("pass", "started with the settings of {file}")),
        ("srun", "none", None, None),
        ("torchrun", "site.env", None, None),
    ],
    ids=["none", "empty", "read", "another job", "a path", "changed", "unreadable", "no file", "torchrun"],
)
def test_settings_of_the_site_that_were_not_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    file: str,
    variable: str | None,
    said: tuple[str, str] | None,
) -> None:
    (tmp_path / "site.env").write_text("INTERFACE=ib0\n")
    names = {"file": str(tmp_path / file), "digest": hashlib.sha256(b"INTERFACE=ib0\n").hexdigest()}
    monkeypatch.setenv("JMVAE_DIST_SITE", names["file"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("JMVAE_DIST_SITE_READ", raising=False)
    if variable is not None:
        monkeypatch.setenv("JMVAE_DIST_SITE_READ", variable.format(**names))
    places = {rank: Place(rank, rank, 2, launcher, "node1") for rank in range(2)}
    rows = judge("site", {0: CHECKS["site"].gather(None)}, Layout(2, places))  # it does not look at the context
    expected = [] if said is None else [(said[0], "all")]
    assert summarize(rows) == expected
    assert said is None or said[1].format(**names) in rows[0].found


# Names of ranks and nodes


def test_ranks_are_named_in_few_words() -> None:
    layout = make_layout(2, 2, 2)
    assert layout.name(range(6)) == "all"
    assert layout.name([2, 3]) == "node2"
    assert layout.name([0, 1, 4, 5]) == "node1, node3"
    assert layout.name([3]) == "rank 3 (node2)"
    assert layout.name([0, 1, 3, 5]) == "ranks 0-1,3,5"
    assert layout.name_nodes([0, 2, 4]) == "all"
    assert layout.name_nodes([4]) == "node3"


@given(st.sets(st.integers(0, 40)))
def test_ranges_name_every_rank_once(ranks: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, format_ranks(ranks).split(",")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(ranks)


def test_missing_ranks_are_named_with_the_nodes_nobody_came_from() -> None:
    layout = make_layout(2, world_size=6)
    assert describe_missing(layout, {"SLURM_STEP_NODELIST": "node[1-3]"}) == (
        "rank(s) 2-5 of 6 did not come; those that did: 0-1 on node1"
    )
    by_srun = {rank: Place(rank, rank, 6, "srun", "node1.cluster") for rank in range(2)}
    text = describe_missing(Layout(6, by_srun), {"SLURM_STEP_NODELIST": "node[1-3]"})
    assert "nobody on node2, node3" in text


# The frame around all checks


def test_a_check_that_fails_becomes_a_row() -> None:
    layout = make_layout(1, 1, 1)
    limits = {"soft": 1024, "hard": 4096, "usable": 512, "files_per_shard": 1}
    results = {
        0: {"open files": {"facts": {**limits, "wanted": None}}},
        1: {"open files": {"error": "OSError: port 1234"}},
        2: {"open files": {"error": "OSError: port 99"}},
    }
    rows = judge_check(CHECKS["open files"], results, layout)
    assert summarize(rows) == [("fail", "node2, node3"), ("pass", "node1")]
    assert rows[0].found == "OSError: port 1234"
    assert rows[0].advice


def test_a_judgement_that_fails_becomes_a_row() -> None:
    check = Check("ranks", "rank", "nothing", lambda context: 1, lambda gathered: [][0], "do nothing")
    (row,) = judge_check(check, {0: {"ranks": {"facts": 1}}}, make_layout(1))
    assert (row.status, row.where) == ("fail", "all")
    assert "IndexError" in row.found


def test_the_table_is_plain_text_of_100_columns_and_loses_nothing() -> None:
    path = "/scratch/" + "very_long_name/" * 12
    rows = [
        Row("disk space", "all", "fail", f"{path} is full", "free [some] space"),
        Row("ranks", "ranks 0-3,5,9-12,40,44", "pass", "fine"),
    ]
    file = io.StringIO()
    print_table(rows, file)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in file.getvalue()
    assert [line for line in lines if line != line.rstrip()] == []
    text = re.sub(r"\s", "", file.getvalue())
    assert path in text
    assert "0-3,5,9-12,40,44" in text
    assert "->free[some]space" in text
    assert lines[-1] == "1 pass, 0 warn, 1 fail"


def test_only_those_that_can_take_part_work_together() -> None:
    layout = make_layout(2, 1)
    fine = {"engine": {"facts": {}}, "configuration": {"facts": {}}}
    main = {**fine, "disk space": {"facts": {"probe": "/runs/x/.doctor-1"}}}
    plan = plan_together({0: main, 1: fine, 2: fine}, layout, None, main_hangs=False)
    assert plan["checks"] == ["output_dir", "clock", "collectives"]
    assert plan["leaders"] == [0, 2]
    hanging = {"shards": {"error": "did not end", "hangs": True}}
    plan = plan_together({0: main, 1: fine, 2: hanging}, layout, None, main_hangs=False)
    assert plan["checks"] == ["output_dir"]
    missing = make_layout(2, 1, world_size=4)
    plan = plan_together({0: fine, 1: fine, 2: fine}, missing, None, main_hangs=False)
    assert plan["checks"] == ["clock"]


# Processes and nodes


def test_ranks_of_every_node_are_listed() -> None:
    layout = make_layout(2, 2)
    rows = judge("ranks", {rank: {"foreign": {}} for rank in layout.places}, layout)
    assert summarize(rows) == [("pass", "node1"), ("pass", "node2")]
    assert "rank 2-3, local rank 0-1" in rows[1].found


def test_launches_that_do_not_form_one_run() -> None:
    alone = Layout(1, {0: Place(0, 0, 1, "single", "node1")})
    row = the_problem(judge("ranks", {0: {"foreign": {"OMPI_COMM_WORLD_SIZE": "4"}}}, alone))
    assert row.status == "fail"
    assert "OMPI_COMM_WORLD_SIZE=4" in row.found
    nothing = {rank: {"foreign": {}} for rank in range(2)}
    places = {rank: Place(rank, rank, 2 + rank, "torchrun", "node1") for rank in range(2)}
    row = the_problem(judge("ranks", nothing, Layout(2, places)))
    assert (row.status, row.where, row.found) == ("fail", "rank 1 (node1)", "world size 3 there, 2 on rank 0")
    places = {rank: Place(rank, 0, 2, "torchrun", "node1") for rank in range(2)}
    assert the_problem(judge("ranks", nothing, Layout(2, places))).status == "warn"
    row = the_problem(judge("ranks", nothing, make_layout(2, repeated=(1,))))
    assert (row.status, row.where) == ("fail", "rank 1 (node1)")
    uneven = judge("ranks", {rank: {"foreign": {}} for rank in range(5)}, make_layout(2, 2, 1))
    assert (the_problem(uneven).status, the_problem(uneven).where) == ("warn", "node3")


def test_the_rank_with_another_version_is_named() -> None:
    layout = make_layout(1, 1, 1)
    facts = {rank: {"torch": "2.13.0", "numpy": "2.4.6"} for rank in range(3)}
    assert summarize(judge("versions", facts, layout)) == [("pass", "all")]
    facts[1] = {"torch": "2.12.0", "numpy": "2.4.6"}
    row = the_problem(judge("versions", facts, layout))
    assert (row.status, row.where, row.found) == ("warn", "node2", "torch is 2.12.0, elsewhere 2.13.0")


def test_the_rank_with_other_code_is_named() -> None:
    facts = {rank: {"version": "1", "commit": "", "digest": "a" * 64} for rank in range(4)}
    facts[3]["digest"] = "b" * 64
    row = the_problem(judge("code", facts, make_layout(2, 2)))
    assert (row.status, row.where) == ("fail", "rank 3 (node2)")


def device_facts(gpus: list[str], **changes: Any) -> dict[str, Any]:
    listed = [{"name": "GPU", "memory_bytes": 1, "uuid": uuid} for uuid in gpus]
    return {"asked": "auto", "gpus": listed, "visible_devices": None, "cuda_build": None, "driver": None, **changes}


def test_devices() -> None:
    layout = make_layout(2)
    assert summarize(judge("device", dict.fromkeys(range(2), device_facts([])), layout)) == [("pass", "all")]
    both = device_facts(["a", "b"], driver="1.2")
    assert summarize(judge("device", {0: both, 1: both}, layout)) == [("pass", "all")]
    # One GPU per task: each rank sees its own as number 0.
    own = {0: device_facts(["a"], driver="1.2"), 1: device_facts(["b"], driver="1.2")}
    assert [row.status for row in judge("device", own, layout)] == ["pass"]
    row = the_problem(judge("device", dict.fromkeys(range(2), device_facts(["a"])), layout))
    assert (row.status, row.where) == ("fail", "all")
    row = the_problem(judge("device", {0: both, 1: device_facts([])}, layout))
    assert (row.status, row.where) == ("fail", "rank 1 (node1)")
    row = the_problem(judge("device", dict.fromkeys(range(2), device_facts([], driver="1.2")), layout))
    assert row.status == "warn"
    asked_for_cpu = device_facts([], driver="1.2", asked="cpu")
    assert [row.status for row in judge("device", dict.fromkeys(range(2), asked_for_cpu), layout)] == ["pass"]


@pytest.mark.parametrize(
    ("threads", "cores", "changes", "status"),
    [
        (2, range(4), {}, "pass"),
        (4, range(4), {}, "warn"),  # 8 threads on 4 cores
        (1, range(16), {}, "warn"),  # idle cores
        (1, range(16), {"on_cpu": False}, "pass"),  # which do not matter beside GPUs
        (1, range(1), {}, "warn"),  # 2 ranks bound to one core
        (2, range(4), {"quota": 2.0}, "warn"),  # a container's share
    ],
)
def test_threads_against_cores(threads: int, cores: range, changes: dict[str, Any], status: str) -> None:
    facts = {"threads": threads, "cores": list(cores), "quota": None, "workers": 0, "on_cpu": True, **changes}
    rows = judge("threads", dict.fromkeys(range(4), facts), make_layout(2, 2))
    assert summarize(rows) == [(status, "all")]


def test_idle_cores_are_for_threads_or_for_more_ranks() -> None:
    facts = {"threads": 1, "cores": list(range(8)), "quota": None, "workers": 0, "on_cpu": True}
    row = the_problem(judge("threads", {0: facts}, make_layout(1)))
    assert row.advice.startswith("set OMP_NUM_THREADS=8, or start more ranks per node: ")


def test_limits() -> None:
    layout = make_layout(1, 1)
    few = {"soft": 1024, "hard": 4096, "usable": 512, "files_per_shard": 1, "wanted": 500}
    assert summarize(judge("open files", {0: few, 1: few}, layout)) == [("pass", "all")]
    row = the_problem(judge("open files", {rank: {**few, "wanted": 900} for rank in range(2)}, layout))
    assert row.status == "warn"
    assert "ulimit -n 1800" in row.advice


def judge_shared_memory(layout: Layout, **changes: Any) -> Row:
    """The row of nodes that are alike."""
    facts = {"size_bytes": 100, "free_bytes": 100, "reader_bytes": 0, "gradient_bytes": 0}
    alike = {**facts, "gradient_reduction": "auto", **changes}
    (row,) = judge("/dev/shm", dict.fromkeys(layout.leaders, alike), layout)
    return row


def test_shared_memory_against_readers() -> None:
    roomy = {"size_bytes": 2**30, "free_bytes": 2**30, "reader_bytes": 2**20, "gradient_bytes": 0}
    roomy["gradient_reduction"] = "auto"
    row = the_problem(judge("/dev/shm", {0: roomy, 1: {**roomy, "free_bytes": 2**19}}, make_layout(1, 1)))
    assert (row.status, row.where) == ("fail", "node2")
    assert "this run puts nothing there" in judge_shared_memory(make_layout(2)).found
    assert "gradients of ddp" in judge_shared_memory(make_layout(2), reader_bytes=None, gradient_bytes=None).found


@pytest.mark.parametrize(
    ("gradients", "setting", "status"),
    [
        (40, "auto", "pass"),
        (41, "auto", "warn"),
        (40, "shared_memory", "pass"),
        (41, "shared_memory", "fail"),
    ],
)
def test_shared_memory_against_gradients(gradients: int, setting: str, status: str) -> None:
    """Twice their size has to be free after what readers need, as in training."""
    row = judge_shared_memory(make_layout(2), reader_bytes=20, gradient_bytes=gradients, gradient_reduction=setting)
    assert row.status == status
    assert f"its ranks share {gradients} B for gradients" in row.found
    assert (row.advice != "") == (status != "pass")


def test_shared_memory_of_several_nodes_is_none() -> None:
    row = judge_shared_memory(make_layout(2, 2), gradient_bytes=10, gradient_reduction="shared_memory")
    assert (row.status, row.where) == ("warn", "all")
    assert "the ranks are on 2" in row.found


# Network


def test_clocks() -> None:
    def rows(*offsets: tuple[float, float]) -> list[Row]:
        items = [{"offset_s": offset_s, "uncertainty_s": uncertainty_s} for offset_s, uncertainty_s in offsets]
        facts = {str(rank): item for rank, item in enumerate(items, start=1)}
        return judge("clock", {0: facts, **dict.fromkeys(range(1, 4))}, make_layout(1, 1, 1, 1))

    assert summarize(rows((0.01, 0.001), (-0.5, 0.1), (0.0, 0.0))) == [("pass", "node2, node3, node4")]
    assert summarize(rows((0.01, 0.001), (-3.0, 0.1), (0.9, 0.2))) == [
        ("warn", "node3"),
        ("warn", "node4"),
        ("pass", "node2"),
    ]
    # Nothing to compare on one node.
    assert judge("clock", {0: {}}, make_layout(1)) == []


@given(st.integers(0, 30))
def test_every_node_is_measured_with_both_neighbours_one_at_a_time(num_nodes: int) -> None:
    leaders = [8 * node for node in range(num_nodes)]
    rounds = network.pair_rounds(leaders)
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))
    measured = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    ring = {tuple(sorted((rank, leaders[(place + 1) % num_nodes]))) for place, rank in enumerate(leaders)}
    assert measured == (sorted(ring) if num_nodes > 1 else [])


def test_a_slow_link_is_named_and_a_slow_network_is_not() -> None:
    layout = make_layout(1, 1, 1, 1)

    def rows(bytes_per_s: dict[int, float]) -> list[Row]:
        facts = {}
        for rank in range(4):
            pair = {"to": (rank + 1) % 4, "latency_s": 1e-4, "bytes_per_s": bytes_per_s[rank]}
            facts[rank] = {"runtime": "4 processes", "latency_s": 1e-4, "duration_s": 0.1, "pairs": [pair]}
        return judge("collectives", facts, layout)

    assert [row.status for row in rows(dict.fromkeys(range(4), 1.0))] == ["pass", "pass", "pass"]
    row = the_problem(rows({0: 1e9, 1: 1e9, 2: 1e8, 3: 1e9}))
    assert (row.status, row.where) == ("warn", "node3, node4")
    assert row.found.startswith("node3 - node4: ")


def interface_facts(**changes: Any) -> dict[str, Any]:
    return {
        "interface": "eth0",
        "address": "10.0.0.1",
        "megabits_per_s": 10_000,
        "mtu": 1500,
        "hostname_address": "10.0.0.1",
        "gloo": None,
        "nccl": None,
        "interfaces": {"eth0": ["10.0.0.1"], "lo": ["127.0.0.1"]},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "pass"),
        ({"gloo": "eth0"}, "pass"),
        ({"gloo": "ib0"}, "fail"),
        ({"gloo": "lo"}, "fail"),
        ({"hostname_address": "127.0.1.1"}, "warn"),
        ({"hostname_address": "127.0.1.1", "gloo": "eth0"}, "pass"),
    ],
)
def test_interfaces(changes: dict[str, Any], status: str) -> None:
    facts = {0: interface_facts(), 1: interface_facts(**changes)}
    (row,) = [row for row in judge("network", facts, make_layout(1, 1)) if row.where in ("node2", "all")]
    assert row.status == status
    # On one node the loopback interface will do.
    if changes.get("gloo") != "ib0":
        assert judge("network", {0: facts[1]}, make_layout(1))[0].status == "pass"


# The run


@given(st.integers(1, 64), st.integers(1, 80), st.integers(1, 4))
def test_world_sizes(lanes: int, world_size: int, samples_per_lane: int) -> None:
    facts = {"world_size": world_size, "lanes": lanes, "global_batch_size": lanes * samples_per_lane}
    (row,) = judge("world size", {0: facts}, make_layout(world_size))
    assert row.where == "all"
    assert (row.status == "fail") == (world_size > lanes)
    if world_size <= lanes:
        shares = [(rank + 1) * lanes // world_size - rank * lanes // world_size for rank in range(world_size)]
        idle = 1 - lanes / (max(shares) * world_size)
        assert (row.status == "warn") == (idle >= 0.1)
    assert bool(row.advice) == (row.status != "pass")


def manifest_facts(fingerprint: str) -> dict[str, Any]:
    manifest = {"path": "/data/manifest.json", "fingerprint": fingerprint, "num_samples": 10, "num_shards": 1}
    return {"output_dir": "/runs/x", "total_steps": 5, "manifests": {"data.train_manifest": manifest}}


def test_the_node_with_other_data_is_named() -> None:
    facts = {rank: manifest_facts("b" if rank == 2 else "a") for rank in range(3)}
    row = the_problem(judge("configuration", facts, make_layout(1, 1, 1)))
    assert (row.status, row.where) == ("fail", "node3")
    # `all`, but for those whose configuration is not valid.
    results = {rank: {"configuration": {"facts": item}} for rank, item in facts.items() if rank != 2}
    results[2] = {"configuration": {"error": "no manifest at /data/manifest.json"}}
    rows = judge_check(CHECKS["configuration"], results, make_layout(1, 1, 1))
    assert summarize(rows) == [("fail", "node3"), ("pass", "node1, node2"), ("pass", "node1, node2")]


def test_shards_and_how_fast_they_are_read() -> None:
    layout = make_layout(2, 2, 2)
    fine = {"num_shards": 3, "looked_at": 3, "num_problems": 0, "problems": []}
    broken = {**fine, "num_problems": 2, "problems": ["/data/0.tar: No such file or directory"]}
    facts = {rank: {"data.train_manifest": broken if rank == 4 else fine} for rank in (0, 2, 4)}
    row = the_problem(judge("shards", facts, layout))
    assert (row.status, row.where) == ("fail", "node3")
    assert "/data/0.tar" in row.found

    speeds = {rank: {"samples": 1000, "bytes": 2**20, "duration_s": 10.0 if rank == 2 else 1.0} for rank in (0, 2, 4)}
    row = the_problem(judge("read speed", speeds, layout))
    assert (row.status, row.where) == ("warn", "node2")
    moments = {rank: {**item, "duration_s": item["duration_s"] / 1000} for rank, item in speeds.items()}
    assert [row.status for row in judge("read speed", moments, layout)] == ["pass"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "pass"),
        ({"free_bytes": 4799}, "fail"),
        ({"free_bytes": 6000}, "warn"),
        ({"free_bytes": 3000, "present_bytes": 3600}, "pass"),  # a resumed run replaces its own checkpoints
        ({"free_files": 10}, "fail"),
        ({"free_files": None}, "pass"),
    ],
)
def test_space_for_checkpoints(changes: dict[str, Any], status: str) -> None:
    facts = {
        "num_parameters": 100,
        "num_checkpoints": 4,
        "files_per_checkpoint": 3,
        "free_bytes": 10**6,
        "free_files": 10**6,
        "present_bytes": 0,
        "path": "/runs/x",
        **changes,
    }
    assert judge("disk space", {0: facts}, make_layout(2))[0].status == status


def test_a_run_directory_that_is_not_shared() -> None:
    shared = {"is_seen": True, "problem": None, "path": "/runs/x"}
    facts = {0: shared, 1: {**shared, "is_seen": False}, 2: {**shared, "problem": "Read-only file system"}}
    rows = judge("output_dir", facts, make_layout(1, 1, 1))
    assert summarize(rows) == [("pass", "node1"), ("fail", "node2"), ("fail", "node3")]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "pass"),
        ({"every_s": None}, "warn"),
        ({"every_s": None, "every_steps": 10}, "pass"),
        ({"every_s": None, "every_steps": 200}, "warn"),
        ({"remaining_s": 600.0}, "warn"),
        ({"remaining_s": 600.0, "every_steps": 10}, "pass"),
    ],
)
def test_cadence_of_checkpoints(changes: dict[str, Any], status: str) -> None:
    facts = {"every_s": 1800.0, "every_steps": None, "total_steps": 100, "remaining_s": None, **changes}
    assert judge("checkpoints", {0: facts}, make_layout(1))[0].status == status


def test_wandb() -> None:
    offline = {"mode": "offline", "asked": "auto", "messages": []}
    online = {"mode": "online", "asked": "online", "messages": [], "server": "api:443", "problem": None}
    cases = [
        (offline, "pass"),
        (online, "pass"),
        ({**online, "problem": "refused"}, "warn"),
        ({**offline, "messages": ["W&B: online, but no API key"]}, "warn"),
    ]
    for facts, status in cases:
        assert judge("W&B", {0: facts}, make_layout(1))[0].status == status


def test_shard_cache() -> None:
    good = {
        "is_needed": True,
        "path": "/scratch/cache",
        "file_system": "ext4",
        "room_bytes": 10**9,
        "largest_bytes": 10**8,
        "in_use_bytes": 10**9,
    }
    layout = make_layout(1, 1)
    assert judge("shard cache", {0: {"is_needed": False}, 1: {"is_needed": False}}, layout) == []
    assert summarize(judge("shard cache", {0: good, 1: good}, layout)) == [("pass", "all")]
    for changes, status, word in (
        ({"path": None}, "warn", "one by one"),
        ({"room_bytes": 10**7}, "fail", "less than the largest shard"),
        ({"file_system": "nfs4"}, "warn", "network file system"),
        ({"in_use_bytes": 10**10}, "warn", "again and again"),
    ):
        row = the_problem(judge("shard cache", {0: good, 1: {**good, **changes}}, layout))
        assert (row.status, row.where) == (status, "node2")
        assert word in row.found
