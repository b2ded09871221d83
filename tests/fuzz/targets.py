"""What is fuzzed. Each target damages sound data and reads them: they are correct, or refused with a user's error."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.checkpoint_targets import CheckpointTarget
from tests.fuzz.indexing_targets import ForeignTarget, WorkspaceTarget
from tests.fuzz.remote_targets import RemoteTarget
from tests.fuzz.shard_targets import DecodeTarget, IndexTarget, ManifestTarget, ShardTarget
from tests.fuzz.target import REFUSALS, Target

__all__ = ["REFUSALS", "TARGETS"]

TARGETS: dict[str, Callable[[], Target]] = {
    "decode": DecodeTarget,
    "manifest": ManifestTarget,
    "index": IndexTarget,
    "shard": ShardTarget,
    "foreign": ForeignTarget,
    "remote": RemoteTarget,
    "workspace": WorkspaceTarget,
    "checkpoint": CheckpointTarget,
}
