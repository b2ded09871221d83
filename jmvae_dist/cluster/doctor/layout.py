"""Which ranks are where, and how to name some of them in few words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One process, as it sees itself."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str
    host: str


@dataclass(frozen=True)
class Layout:
    """The ranks that came.

    Args:
        world_size: Ranks that were announced to rank 0.
        places: Those that came, by rank; rank 0 is one of them.
        repeated: Ranks under whose number more than one process came.
    """

    world_size: int
    places: dict[int, Place]
    repeated: tuple[int, ...] = ()

    @property
    def missing(self) -> list[int]:
        """Ranks that did not come."""
        return [rank for rank in range(self.world_size) if rank not in self.places]

    @property
    def nodes(self) -> dict[str, list[int]]:
        """Ranks by host, hosts in the order of their first rank."""
        nodes: dict[str, list[int]] = {}
        for rank in sorted(self.places):
            nodes.setdefault(self.places[rank].host, []).append(rank)
        return nodes

    @property
    def leaders(self) -> list[int]:
        """The first rank of each node, which speaks for it."""
        return [ranks[0] for ranks in self.nodes.values()]

    def host(self, rank: int) -> str:
        """The host of a rank that came."""
        return self.places[rank].host

    def name(self, ranks: Collection[int]) -> str:
        """Ranks in few words: all; whole nodes by name; or `rank 3 (node2)`, `ranks 1,4-7`."""
        chosen = set(ranks)
        if chosen == set(self.places):
            return "all"
        whole = [host for host, members in self.nodes.items() if chosen.issuperset(members)]
        if whole and chosen == {rank for host in whole for rank in self.nodes[host]}:
            return shorten(whole)
        if len(chosen) == 1:
            (rank,) = chosen
            return f"rank {rank} ({self.host(rank)})" if rank in self.places else f"rank {rank}"
        return f"ranks {format_ranks(chosen)}"

    def name_nodes(self, leaders: Collection[int]) -> str:
        """The nodes whose leaders are given: all, or their names."""
        if set(leaders) == set(self.leaders):
            return "all"
        return shorten([self.host(rank) for rank in sorted(leaders)])


def format_ranks(ranks: Iterable[int]) -> str:
    """Sorted numbers with ranges: 0-3,7."""
    parts: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def shorten(names: list[str], at_most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:at_most])} and {more} more"
