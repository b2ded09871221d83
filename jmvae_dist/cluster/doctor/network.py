"""Checks of what lies between ranks: interfaces, clocks, the process group, latency and bandwidth."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist

from jmvae_dist.cluster.doctor.check import Check, Context, Gathered, Judgement, find_outliers
from jmvae_dist.cluster.doctor.layout import Layout
from jmvae_dist.cluster.doctor.table import Row
from jmvae_dist.distributed.runtime import start_runtime
from jmvae_dist.progress import format_bytes

if TYPE_CHECKING:
    from jmvae_dist.distributed.runtime import Runtime

_LOOPBACK = "127."
_CLOCK_ROUNDS = 8
_MAX_SKEW_S = 1.0
_SMALL_BYTES = 4
_LARGE_BYTES = 64 * 2**20
_PAIR_BYTES = 16 * 2**20
_SMALL_ROUNDS = 50
_LARGE_ROUNDS = 3
_WARM_UP_ROUNDS = 3
# A pair of nodes, or a rank, that is worse than the median of the others by this factor is named.
_SLOW_FACTOR = 2.0
_LATE_FACTOR = 3.0


# Interfaces


def _gather_interface(context: Context) -> dict[str, Any]:
    interfaces = {name: [item.address for item in items] for name, items in psutil.net_if_addrs().items()}
    address = _own_address()
    name = next((name for name, addresses in interfaces.items() if address in addresses), "unknown")
    state = psutil.net_if_stats().get(name)
    return {
        "interface": name,
        "address": address,
        # Virtual interfaces do not know their speed.
        "megabits_per_s": state.speed if state is not None and state.speed else None,
        "mtu": state.mtu if state is not None else None,
        "hostname_address": _address_of_hostname(),
        "gloo": os.environ.get("GLOO_SOCKET_IFNAME"),
        "nccl": os.environ.get("NCCL_SOCKET_IFNAME"),
        "interfaces": interfaces,
    }


def _own_address() -> str:
    """This node's address on the way to where the ranks meet."""
    target = os.environ.get("MASTER_ADDR") or socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket that connects sends nothing: the kernel only chooses the way.
            probe.connect((target, 9))
        except OSError:
            return "unknown"
        return probe.getsockname()[0]


def _address_of_hostname() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "unknown"


def _judge_interface(gathered: Gathered) -> list[Row]:
    return gathered.merge(
        {r: _judge_interface_of_node(facts, gathered.layout) for r, facts in gathered.facts.items()}
    )


def _judge_interface_of_node(facts: dict[str, Any], layout: Layout) -> Judgement:
    speed = f", {facts['megabits_per_s']:,} Mbit/s" if facts["megabits_per_s"] else ""
    found = f"{facts['interface']} on the way to rank 0{speed}, MTU {facts['mtu']}"
    for variable, value in (("GLOO_SOCKET_IFNAME", facts["gloo"]), ("NCCL_SOCKET_IFNAME", facts["nccl"])):
        found += f"; {variable} {value or 'not set'}"
    # Gloo takes names, NCCL also prefixes and exclusions.
    named = facts["gloo"].split(",") if facts["gloo"] else []
    for name in named:
        if name not in facts["interfaces"]:
            found += f"; {name} is not an interface here ({', '.join(facts['interfaces'])})"
            return "fail", found, "set GLOO_SOCKET_IFNAME to one of them"
    if len(layout.nodes) == 1:
        return "pass", f"{found}; one node", ""
    for name in named:
        if any(address.startswith(_LOOPBACK) for address in facts["interfaces"][name]):
            found += f"; {name} reaches no other node"
            return "fail", found, f"set GLOO_SOCKET_IFNAME to an interface that does, such as {facts['interface']}"
    if not named and facts["hostname_address"].startswith(_LOOPBACK):
        advice = f"set GLOO_SOCKET_IFNAME={facts['interface']}, or correct /etc/hosts"
        return "warn", f"{found}; the node's name is {facts['hostname_address']}, no address for others", advice
    return "pass", found, ""


# Clocks


def _gather_clocks(context: Context) -> dict[str, Any] | None:
    """On rank 0: by rank of each other node's leader, how far that node's clock is ahead."""
    others = [rank for rank in context.plan["leaders"] if rank != 0]
    if context.rank != 0:
        if context.rank in others:
            for number in range(_CLOCK_ROUNDS):
                context.meeting.hear(f"clock/{context.rank}/{number}", context.timeout_s)
                context.meeting.put(f"clock/{number}/time", time.time())
        return None
    offsets = {}
    for rank in others:
        rounds = [_ask_time(context, rank, number) for number in range(_CLOCK_ROUNDS)]
        offset_s, uncertainty_s = min(rounds, key=lambda item: item[1])
        offsets[str(rank)] = {"offset_s": offset_s, "uncertainty_s": uncertainty_s}
    return offsets


def _ask_time(context: Context, rank: int, number: int) -> tuple[float, float]:
    """Offset of a rank's clock, and how wrong that can be: its answer was made between question and arrival."""
    asked_s = time.time()
    context.meeting.announce(f"clock/{rank}/{number}", True)
    told_s = context.meeting.hear(f"clock/{number}/time/{rank}", context.timeout_s)
    heard_s = time.time()
    return told_s - (asked_s + heard_s) / 2, (heard_s - asked_s) / 2


def _judge_clocks(gathered: Gathered) -> list[Row]:
    offsets = {int(rank): item for rank, item in (gathered.facts.get(0) or {}).items()}
    if not offsets:
        return []
    rows = []
    for rank, item in offsets.items():
        offset_s, uncertainty_s = item["offset_s"], item["uncertainty_s"]
        found = f"{offset_s:+.3f} s against rank 0, give or take {uncertainty_s:.3f} s"
        if abs(offset_s) - uncertainty_s > _MAX_SKEW_S:
            advice = "start the time service there (chronyd, systemd-timesyncd): times of logs and files mislead"
            rows.append(gathered.warn(found, advice, [rank]))
        elif abs(offset_s) + uncertainty_s > _MAX_SKEW_S:
            advice = "repeat when the network is quiet: the answer took too long to tell"
            rows.append(gathered.warn(found, advice, [rank]))
    good = [rank for rank, item in offsets.items() if abs(item["offset_s"]) + item["uncertainty_s"] <= _MAX_SKEW_S]
    if good:
        worst = offsets[max(good, key=lambda rank: abs(offsets[rank]["offset_s"]))]
        found = f"at most {_name_time(abs(worst['offset_s']))} apart from rank 0, "
        found += f"give or take {_name_time(worst['uncertainty_s'])}"
        rows.append(gathered.passed(found, good))
    return rows


# Process group


def _gather_process_group(context: Context) -> dict[str, Any]:
    """Start what training starts, and measure it."""
    training = context.config.training if context.config is not None else None
    engine = context.plan["engine"]
    if torch.cuda.is_available():
        # Without it NCCL aborts the process when a peer does not answer, instead of raising an error.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    with start_runtime(
        context.meeting.process,
        device="auto" if training is None else training.device,
        precision="fp32" if training is None else training.precision,
        engine=engine,
        deepspeed_config=context.run.deepspeed_config if context.run is not None and engine != "ddp" else None,
        timeout_s=context.timeout_s,
        has_joined=context.meeting.process.world_size > 1,
    ) as runtime:
        facts: dict[str, Any] = {"runtime": runtime.describe()}
        if context.meeting.process.world_size > 1:
            facts["latency_s"] = time_all_reduce(runtime, _SMALL_BYTES, _SMALL_ROUNDS)
            facts["duration_s"] = time_all_reduce(runtime, _LARGE_BYTES, _LARGE_ROUNDS)
            facts["pairs"] = _measure_pairs(runtime, context.layout)
    return facts


def time_all_reduce(runtime: Runtime, num_bytes: int, rounds: int) -> float:
    """Median duration in seconds of an all-reduce of `num_bytes` of float32 over all ranks."""
    values = torch.zeros(num_bytes // torch.float32.itemsize, device=runtime.device)
    for _ in range(_WARM_UP_ROUNDS if num_bytes < _LARGE_BYTES else 1):
        dist.all_reduce(values)
    return statistics.median(_time(runtime, lambda: dist.all_reduce(values)) for _ in range(rounds))


def _time(runtime: Runtime, work: Callable[[], Any]) -> float:
    _synchronize(runtime)
    start_s = time.perf_counter()
    work()
    _synchronize(runtime)
    return time.perf_counter() - start_s


def _synchronize(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def pair_rounds(leaders: list[int]) -> list[list[tuple[int, int]]]:
    """Neighbouring nodes as a ring of pairs, in rounds in which no node is in two pairs."""
    if len(leaders) < 2:
        return []
    pairs = [(leaders[place], leaders[place + 1]) for place in range(len(leaders) - 1)]
    rounds = [pairs[0::2], pairs[1::2]]
    if len(leaders) > 2:
        rounds.append([(leaders[-1], leaders[0])])
    return [pairs for pairs in rounds if pairs]


def _measure_pairs(runtime: Runtime, layout: Layout) -> list[dict[str, Any]]:
    """Latency and bandwidth to the next node, from the first rank of each pair; every rank calls it."""
    measured = []
    for pairs in pair_rounds(layout.leaders):
        runtime.collectives.gather(None)  # nobody still sends in the former round
        for first, second in pairs:
            if runtime.process.rank == first:
                measured.append({"to": second, **_send_to(runtime, second)})
            elif runtime.process.rank == second:
                _echo(runtime, first)
    return measured


def _send_to(runtime: Runtime, peer: int) -> dict[str, float]:
    small = torch.zeros(1, device=runtime.device)
    large = torch.zeros(_PAIR_BYTES // torch.float32.itemsize, device=runtime.device)

    def exchange(values: torch.Tensor) -> None:
        dist.send(values, peer)
        dist.recv(small, peer)

    exchange(small)
    latency_s = statistics.median(_time(runtime, lambda: exchange(small)) / 2 for _ in range(_SMALL_ROUNDS))
    exchange(large)
    duration_s = statistics.median(_time(runtime, lambda: exchange(large)) for _ in range(_LARGE_ROUNDS))
    # The answer's way back is not part of the transfer.
    return {"latency_s": latency_s, "bytes_per_s": _PAIR_BYTES / max(duration_s - latency_s, 1e-9)}


def _echo(runtime: Runtime, peer: int) -> None:
    small = torch.zeros(1, device=runtime.device)
    large = torch.zeros(_PAIR_BYTES // torch.float32.itemsize, device=runtime.device)
    for values in [small] * (_SMALL_ROUNDS + 1) + [large] * (_LARGE_ROUNDS + 1):
        dist.recv(values, peer)
        dist.send(small, peer)


def _judge_process_group(gathered: Gathered) -> list[Row]:
    facts = {rank: item for rank, item in gathered.facts.items() if "latency_s" in item}
    rows = [gathered.passed(gathered.facts[min(gathered.facts)]["runtime"])]
    if not facts:
        return rows
    first = facts[min(facts)]
    size = gathered.layout.world_size
    # What each rank sends and receives in a ring, whatever their number: comparable with a link's speed.
    bandwidth = 2 * (size - 1) / size * _LARGE_BYTES / first["duration_s"]
    found = f"all-reduce: {_name_time(first['latency_s'])} for {_SMALL_BYTES} bytes (median of {_SMALL_ROUNDS}); "
    found += f"{format_bytes(_LARGE_BYTES)} in {_name_time(first['duration_s'])}, "
    found += f"{format_bytes(bandwidth)}/s bus bandwidth"
    late = find_outliers({rank: item["latency_s"] for rank, item in facts.items()}, "high", _LATE_FACTOR)
    rows.append(gathered.passed(found))
    if late:
        found = f"all-reduce takes {_name_time(max(facts[rank]['latency_s'] for rank in late))} as seen from there"
        rows.append(gathered.warn(found, "look for other load on these cores and nodes", late))
    return rows + _judge_pairs(gathered)


def _judge_pairs(gathered: Gathered) -> list[Row]:
    pairs = {(rank, pair["to"]): pair for rank, item in gathered.facts.items() for pair in item.get("pairs", [])}
    if not pairs:
        return []
    slow = find_outliers({key: pair["bytes_per_s"] for key, pair in pairs.items()}, "low", _SLOW_FACTOR)
    late = find_outliers({key: pair["latency_s"] for key, pair in pairs.items()}, "high", _LATE_FACTOR)
    rows = []
    for key in sorted({*slow, *late}):
        pair = pairs[key]
        found = f"{_name_pair(gathered.layout, key)}: {_name_time(pair['latency_s'])}, "
        found += f"{format_bytes(pair['bytes_per_s'])}/s, much worse than the median of the pairs"
        advice = "a node in two such pairs is the likely cause: look at its cable, switch and load, or --exclude it"
        rows.append(gathered.warn(found, advice, key))
    others = [key for key in pairs if key not in slow and key not in late]
    if others:
        bandwidths = [pairs[key]["bytes_per_s"] for key in others]
        latencies = [pairs[key]["latency_s"] for key in others]
        found = f"between neighbouring nodes ({len(others)} pair(s)): {_name_time(min(latencies))} to "
        found += (
            f"{_name_time(max(latencies))}, {format_bytes(min(bandwidths))}/s to {format_bytes(max(bandwidths))}/s"
        )
        rows.append(gathered.passed(found, {rank for key in others for rank in key}))
    return rows


def _name_pair(layout: Layout, pair: tuple[int, int]) -> str:
    return " - ".join(layout.host(rank) for rank in pair)


def _name_time(duration_s: float) -> str:
    return f"{duration_s * 1e6:.0f} us" if duration_s < 1e-3 else f"{duration_s * 1e3:.1f} ms"


INTERFACE = Check("network", "node", "nothing", _gather_interface, _judge_interface, "look at `ip address` there")
CLOCKS = Check("clock", "node", "nothing", _gather_clocks, _judge_clocks, "look at `timedatectl` there")
PROCESS_GROUP = Check(
    "collectives",
    "rank",
    "nothing",
    _gather_process_group,
    _judge_process_group,
    "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between nodes; open the firewall for all ports "
    "between them; NCCL_DEBUG=INFO says more",
)
