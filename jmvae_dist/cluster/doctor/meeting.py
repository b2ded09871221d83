"""Where the ranks meet and leave what they found: a key-value store, in which waiting always has an end.

Rank 0 decides and announces, the others hear. Nothing here is a collective: a rank that dies or hangs costs the
others a bounded wait, and what it left before is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from jmvae_dist.cluster.doctor.layout import Layout, Place, format_ranks, shorten
from jmvae_dist.distributed.environment import ProcessInfo, expand_node_list, join_launch
from jmvae_dist.errors import LaunchError

_POLL_S = 0.02
_CONNECT_PAUSE_S = 0.2
# Time between a decision of rank 0 and its arrival at the others.
_GRACE_S = 10.0
_FAREWELL_S = 5.0


class Meeting:
    """All ranks that came, after rank 0 has decided who did.

    Args:
        process: Rank and world size from the launcher.
        timeout_s: How long to wait for ranks that have not come yet.

    Attributes:
        layout: The ranks that came; the same on every rank.

    Raises:
        LaunchError: Rank 0 did not come, or this rank came after rank 0 had stopped waiting.
    """

    def __init__(self, process: ProcessInfo, timeout_s: float) -> None:
        self.process = process
        self.timeout_s = timeout_s
        self._store = dist.PrefixStore("jmvae_dist_doctor", _connect(process, timeout_s))
        self.layout = self._arrive()

    def put(self, topic: str, value: Any) -> None:
        """Leave a JSON value for rank 0."""
        self._store.set(f"{topic}/{self.process.rank}", json.dumps(value))

    def collect(self, topic: str, ranks: Iterable[int], timeout_s: float) -> dict[int, Any]:
        """On rank 0: what `ranks` have left, without those that left nothing in time."""
        values: dict[int, Any] = {}
        deadline_s = time.monotonic() + timeout_s
        pending = sorted(ranks)
        while pending:
            for rank in [rank for rank in pending if self._store.check([f"{topic}/{rank}"])]:
                values[rank] = json.loads(self._store.get(f"{topic}/{rank}"))
            pending = [rank for rank in pending if rank not in values]
            if time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S if pending else 0)
        return values

    def announce(self, topic: str, value: Any) -> None:
        """On rank 0: tell the others a JSON value."""
        self._store.set(topic, json.dumps(value))

    def hear(self, topic: str, timeout_s: float) -> Any:
        """What rank 0 announces.

        Raises:
            LaunchError: It has not by then, or is gone.
        """
        try:
            self._store.wait([topic], timedelta(seconds=timeout_s))
            return json.loads(self._store.get(topic))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LaunchError(f"rank 0 has not said {topic!r} within {timeout_s:g} s ({reason})") from None

    def part(self, topic: str, value: Any = None) -> Any:
        """End the meeting with a last word of rank 0, `value`, which every rank returns.

        Rank 0 holds the store: it stays until the others have heard, or a few seconds.

        Raises:
            LaunchError: The word did not come, so that rank 0 is gone.
        """
        if self.process.rank == 0:
            self.announce(topic, value)
            others = [rank for rank in self.layout.places if rank != 0]
            # An answer that is lost costs the wait and nothing else.
            with contextlib.suppress(RuntimeError):
                self.collect(f"{topic}/heard", others, _FAREWELL_S)
            return value
        # Rank 0 may wait for each stage of a rank that died.
        value = self.hear(topic, self.timeout_s * 4 + 4 * _GRACE_S)
        with contextlib.suppress(RuntimeError):
            self.put(f"{topic}/heard", True)
        return value

    def _arrive(self) -> Layout:
        process = self.process
        place = Place(
            rank=process.rank,
            local_rank=process.local_rank,
            world_size=process.world_size,
            launcher=process.launcher,
            host=socket.gethostname(),
        )
        # Two processes of one number would otherwise look like one.
        self._store.add(f"count/{process.rank}", 1)
        self.put("place", asdict(place))
        if process.rank == 0:
            places = self.collect("place", range(process.world_size), self.timeout_s)
            repeated = [rank for rank in places if self._store.add(f"count/{rank}", 0) > 1]
            self.announce("layout", {"places": list(places.values()), "repeated": repeated})
        told = self.hear("layout", self.timeout_s + _GRACE_S)
        layout = Layout(
            world_size=process.world_size,
            places={item["rank"]: Place(**item) for item in told["places"]},
            repeated=tuple(told["repeated"]),
        )
        if process.rank not in layout.places:
            raise LaunchError(f"rank {process.rank} came after rank 0 had waited {self.timeout_s:g} s for it")
        return layout


def describe_missing(layout: Layout, variables: Mapping[str, str] | None = None) -> str:
    """Who did not come, and on which nodes of the Slurm step nobody did."""
    variables = os.environ if variables is None else variables
    text = f"rank(s) {format_ranks(layout.missing)} of {layout.world_size} did not come"
    nodes = variables.get("SLURM_STEP_NODELIST", "")
    if layout.places[0].launcher == "srun" and nodes:
        present = {host.split(".")[0] for host in layout.nodes}
        silent = [host for host in expand_node_list(nodes) if host.split(".")[0] not in present]
        if silent:
            text += f"; nobody on {shorten(silent)}"
    came = [f"{format_ranks(ranks)} on {host}" for host, ranks in layout.nodes.items()]
    return f"{text}; those that did: {shorten(came)}"


def _connect(process: ProcessInfo, timeout_s: float) -> dist.Store:
    """The store where the ranks of a run meet: held by torchrun's agent, or else by rank 0."""
    if process.world_size == 1:
        return dist.HashStore()
    join_launch(process)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise LaunchError(f"MASTER_ADDR={address!r}, MASTER_PORT={port!r}: the launcher must set both for the ranks")
    holds_store = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holds_store:
        _wait_for_answer(address, int(port), timeout_s)
    try:
        return dist.TCPStore(
            address,
            int(port),
            process.world_size,
            is_master=holds_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            # The process group, which starts later in the same process, shares it.
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(f"{address}:{port}, where the ranks would meet: {reason}; set MASTER_PORT") from None


def _wait_for_answer(address: str, port: int, timeout_s: float) -> None:
    """Wait until somebody listens where the ranks meet; the store's own wait lasts several times its timeout.

    Raises:
        LaunchError: Nobody does by then.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline_s - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise LaunchError(
                    f"rank 0 did not come: nobody answered at {address}:{port} within {timeout_s:g} s ({error}); "
                    "look for its error, and whether this node can reach that address (MASTER_ADDR)"
                ) from None
        time.sleep(_CONNECT_PAUSE_S)
