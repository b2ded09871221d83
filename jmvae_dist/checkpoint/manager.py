"""When checkpoints are written, which are kept, and which one a run resumes from.

Every method that touches the disk is called by all ranks together: rank 0 decides, and an error on any rank is
raised on all of them.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from jmvae_dist.checkpoint.fragments import (
    EntrySpec,
    Fragment,
    check_same_entries,
    copy_to_host,
    fragments_to_write,
    merge_index,
    read_fragments,
    write_fragments,
)
from jmvae_dist.checkpoint.layout import (
    CheckpointManifest,
    FileRecord,
    FragmentRecord,
    NewerFormatError,
    commit,
    find_damage,
    list_checkpoints,
    name_latest,
    read_manifest,
    remove_checkpoint,
    seal_file,
    step_name,
    step_of,
    sweep,
    temporary_directory,
)
from jmvae_dist.checkpoint.live_state import live_state, optimizer_record, restore_steps
from jmvae_dist.config import CheckpointSection
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.distributed.engine import Engine
from jmvae_dist.errors import CheckpointError, is_on_all_ranks, mark_on_all_ranks

logger = logging.getLogger(__name__)

# Room that must be left beside a checkpoint for its manifest, the record and logs.
_DISK_MARGIN_BYTES = 1 << 20


class _PartWriter:
    """Writes this rank's file of a checkpoint in a thread of its own.

    Args:
        path: The file.
        fragments: With values that nobody changes meanwhile.
        manifest: The checkpoint's manifest, still without files and index.
        specs: Every entry of the state.
        begun_s: When the checkpoint was begun, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        path: Path,
        fragments: list[Fragment],
        manifest: CheckpointManifest,
        specs: dict[str, EntrySpec],
        begun_s: float,
    ) -> None:
        self.manifest = manifest
        self.specs = specs
        self.begun_s = begun_s
        self._path = path
        self._fragments = fragments
        self._part: dict[str, Any] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the file is still being written."""
        return self._thread.is_alive()

    def result(self) -> dict[str, Any]:
        """Index and size of the written file as JSON values; waits for it.

        Raises:
            CheckpointError: The file cannot be written.
        """
        self._thread.join()
        if isinstance(self._failure, (OSError, SafetensorError)):
            raise CheckpointError(f"{self._path}: cannot be written ({self._failure})") from self._failure
        if self._failure is not None:
            raise self._failure
        return self._part

    def _write(self) -> None:
        try:
            index = write_fragments(self._path, self._fragments)
            self._part = {
                "index": {name: asdict(item) for name, item in index.items()},
                "file": asdict(seal_file(self._path)),
            }
        except Exception as failure:  # raised again in `result`, on the main thread
            self._failure = failure
        self._fragments = []  # the copy is as large as the rank's part of the state


class CheckpointManager:
    """Checkpoints of one run.

    Args:
        root: `RUN/checkpoints`, on a file system that all ranks share.
        section: Cadence and retention.
        engine: Whose state is saved.
        collectives: Agreement between ranks.
        on_commit: Told of each checkpoint that is complete: its step, and the seconds since it was begun.
    """

    def __init__(
        self,
        root: Path,
        section: CheckpointSection,
        engine: Engine,
        collectives: Collectives,
        on_commit: Callable[[int, float], None] = lambda global_step, save_s: None,
    ) -> None:
        self.root = root
        self.section = section
        self.engine = engine
        self.collectives = collectives
        self._on_commit = on_commit
        self.last_saved_step = -1
        self._writer: _PartWriter | None = None
        self._stall_s: float | None = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was begun is complete and sound, whatever has happened since; alone no rank can commit it.
        if error is None or is_on_all_ranks(error):
            self.finish()

    def resume(
        self, check: Callable[[CheckpointManifest], None], at_most: int | None = None
    ) -> CheckpointManifest | None:
        """Load the newest intact checkpoint into the engine.

        Args:
            check: Called with its manifest before anything is loaded; raises if the run is another one.
            at_most: Go back to this step or before it; newer checkpoints are set aside, once there is one.

        Returns:
            Its manifest; None if the run has no checkpoint.

        Raises:
            CheckpointError: There are checkpoints, but none is intact, or they are another model's; or the newest
                intact one is of a newer format.
        """
        names = self.collectives.on_main(self._find_candidates)
        newer = [name for name in names if at_most is not None and step_of(name) > at_most]
        names = names[len(newer) :]
        for number, name in enumerate(names):
            manifest = self._verify_together(self.root / name)
            if manifest is not None:
                self.collectives.on_main(partial(self._set_aside, newer, "rewound"))
                self._load_together(self.root / name, manifest, check)
                self.collectives.on_main(partial(self._set_aside, names[:number], "damaged"))
                self.collectives.on_main(partial(name_latest, self.root / name))
                self.last_saved_step = manifest.global_step
                return manifest
        if names:
            which, advice = "", "restore one from a copy, or move the directory away to start from the beginning"
            if newer:
                which = f" up to step {at_most}, to go back to,"
                advice = f"the same command goes on from {newer[0]}"
            raise mark_on_all_ranks(
                CheckpointError(
                    f"{self.root}: none of the {len(names)} checkpoints{which} is intact (see the warnings above); "
                    f"{advice}"
                )
            )
        return None

    def oldest_step(self) -> int | None:
        """Step of the oldest checkpoint there is."""
        checkpoints = list_checkpoints(self.root)
        return step_of(checkpoints[0].name) if checkpoints else None

    def _set_aside(self, names: list[str], why: str) -> None:
        """Take checkpoints out of the list: they must not be resumed from, or count when old ones are deleted."""
        for name in names:
            aside = self.root / f"{why}-{name}"
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(self.root / name, aside)
            logger.warning("the %s checkpoint is now %s; delete it when you have seen enough", why, aside)

    def _find_candidates(self) -> list[str]:
        """Names of the checkpoints, newest first, after removing what interrupted writes left behind."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in sweep(self.root):
                logger.warning(
                    "removed %s: without its manifest, as after an interrupted write or deletion, "
                    "it is no checkpoint",
                    self.root / name,
                )
            return [path.name for path in reversed(list_checkpoints(self.root))]
        except OSError as failure:
            raise CheckpointError(f"{self.root}: {failure}") from failure

    def _verify_together(self, checkpoint: Path) -> CheckpointManifest | None:
        """The manifest if every rank finds its share of the files intact; else None, with a warning.

        Raises:
            NewerFormatError: It is of a newer format; on all ranks.
        """
        manifest, problem, newer = None, None, None
        try:
            manifest = read_manifest(checkpoint)
            problem = find_damage(checkpoint, manifest, self.collectives.rank, self.collectives.world_size)
            if checkpoint.name != step_name(manifest.global_step):
                problem = f"{checkpoint}: its manifest is that of {step_name(manifest.global_step)}"
        except NewerFormatError as error:
            newer = str(error)
        except CheckpointError as error:
            problem = str(error)
        found = self.collectives.gather((newer, problem))
        for newer, _ in found:
            if newer is not None:
                raise mark_on_all_ranks(NewerFormatError(newer))
        problems = [problem for _, problem in found if problem is not None]
        if problems and self.collectives.rank == 0:
            logger.warning("DAMAGED CHECKPOINT, trying the one before: %s", "; ".join(sorted(set(problems))))
        return None if problems else manifest

    def _load_together(
        self, checkpoint: Path, manifest: CheckpointManifest, check: Callable[[CheckpointManifest], None]
    ) -> None:
        with self.collectives.together():
            check(manifest)
            state = live_state(self.engine, self.collectives.rank)
            check_same_entries(state.specs, manifest, checkpoint)
            read_fragments(checkpoint, manifest, state.fragments)
            restore_steps(self.engine, state, manifest.optimizer)
        state.after_read()

    @property
    def is_begun(self) -> bool:
        """Whether a checkpoint was begun that is not committed yet; equal on all ranks."""
        return self._writer is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its file of the checkpoint that `save` began."""
        return self._writer is not None and self._writer.is_running

    def save(self, describe: Callable[[], CheckpointManifest], *, wait: bool) -> None:
        """Begin a checkpoint of the current state, unless this step's is there already.

        With `async_write` training goes on while a copy of the state is written; `finish` then commits it.

        Args:
            describe: Makes the manifest without files, tensors and optimizer, which are filled in here.
            wait: Return only when the checkpoint is committed.

        Raises:
            CheckpointError: There is no room, or some rank could not write its part; nothing was committed.
        """
        self.finish()
        manifest = describe()
        if manifest.global_step == self.last_saved_step:
            return
        started_s = time.perf_counter()
        goes_on = self.section.async_write and not wait
        self._writer = self._begin(manifest, copies=goes_on, begun_s=started_s)
        self._add_stall(started_s)
        if not goes_on:
            self.finish()

    def finish(self) -> None:
        """Commit the checkpoint that was begun, if any, and apply retention; waits for whoever still writes.

        Raises:
            CheckpointError: Some rank could not write its part; nothing was committed.
        """
        if self._writer is None:
            return
        started_s = time.perf_counter()
        writer, self._writer = self._writer, None
        manifest = writer.manifest
        try:
            self._complete(manifest, writer)
            self.collectives.on_main(lambda: self._commit(manifest))
            self._on_commit(manifest.global_step, time.perf_counter() - writer.begun_s)
        except CheckpointError:
            if self.collectives.rank == 0:
                # What was written of it may be what filled the disk.
                shutil.rmtree(temporary_directory(self.root, manifest.global_step), ignore_errors=True)
            raise
        self.collectives.on_main(self._retain)
        self.last_saved_step = manifest.global_step
        self._add_stall(started_s)

    def take_stall_s(self) -> float | None:
        """Seconds that training has stood still for checkpoints since the last call; None without a checkpoint."""
        stall_s, self._stall_s = self._stall_s, None
        return stall_s

    def _add_stall(self, started_s: float) -> None:
        self._stall_s = (self._stall_s or 0.0) + time.perf_counter() - started_s

    def _begin(self, manifest: CheckpointManifest, *, copies: bool, begun_s: float) -> _PartWriter:
        """Make room, describe the state and start writing this rank's part of it, or a copy of it."""
        rank, world_size = self.collectives.rank, self.collectives.world_size
        state = live_state(self.engine, rank)
        fragments = fragments_to_write(state.fragments, rank, world_size)
        part_bytes = sum(fragment.values.numel() * fragment.values.element_size() for fragment in fragments)
        total_bytes = sum(self.collectives.gather(part_bytes))
        self.collectives.on_main(lambda: self._prepare(manifest.global_step, total_bytes))
        manifest.optimizer = optimizer_record(self.engine, state)
        if copies:
            fragments = copy_to_host(fragments)
        path = temporary_directory(self.root, manifest.global_step) / f"rank-{rank:05d}.safetensors"
        return _PartWriter(path, fragments, manifest, state.specs, begun_s)

    def _prepare(self, global_step: int, total_bytes: int) -> None:
        temporary = temporary_directory(self.root, global_step)
        try:
            free_bytes = shutil.disk_usage(self.root).free
            if free_bytes < total_bytes + _DISK_MARGIN_BYTES:
                raise CheckpointError(
                    f"{self.root}: a checkpoint of {total_bytes / 1e6:,.1f} MB does not fit, only "
                    f"{free_bytes / 1e6:,.1f} MB are free; make room, or lower checkpoint.keep_last"
                )
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
        except OSError as failure:
            raise CheckpointError(f"{temporary}: {failure}") from failure

    def _complete(self, manifest: CheckpointManifest, writer: _PartWriter) -> None:
        """Fill in the files and the index of all ranks."""
        part: dict[str, Any] = {}
        with self.collectives.together():
            part = writer.result()
        parts = self.collectives.gather(part)
        indexes = [{name: FragmentRecord(**item) for name, item in part["index"].items()} for part in parts]
        manifest.tensors = merge_index(writer.specs, indexes)
        manifest.files = {
            f"rank-{number:05d}.safetensors": FileRecord(**part["file"]) for number, part in enumerate(parts)
        }

    def _commit(self, manifest: CheckpointManifest) -> None:
        try:
            commit(self.root, manifest)
        except OSError as failure:
            raise CheckpointError(f"{self.root}: the checkpoint was not committed ({failure})") from failure

    def _retain(self) -> None:
        """Delete all but the newest `keep_last` and the multiples of `keep_every_steps`."""
        for checkpoint in list_checkpoints(self.root)[: -self.section.keep_last]:
            every = self.section.keep_every_steps
            if every is None or step_of(checkpoint.name) % every != 0:
                try:
                    remove_checkpoint(checkpoint)
                except OSError as failure:
                    logger.warning("%s: an old checkpoint could not be deleted (%s)", checkpoint, failure)
