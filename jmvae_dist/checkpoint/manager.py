"""When checkpoints are written, which are kept, and which one a run resumes from.

Every method that touches the disk is called by all ranks together: rank 0 decides, and an error on any rank is
raised on all of them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from jmvae_dist.checkpoint.fragments import (
    check_same_entries,
    create_optimizer_state,
    merge_index,
    optimizer_record,
    own_fragments,
    read_entries,
    replicated_entries,
    restore_steps,
    write_fragments,
)
from jmvae_dist.checkpoint.layout import (
    CheckpointManifest,
    FileRecord,
    FragmentRecord,
    commit,
    find_damage,
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
    seal_file,
    step_name,
    sweep,
    temporary_directory,
)
from jmvae_dist.config import CheckpointSection
from jmvae_dist.distributed.collectives import Collectives
from jmvae_dist.errors import CheckpointError, mark_on_all_ranks

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Checkpoints of one run.

    Args:
        root: `RUN/checkpoints`, on a file system that all ranks share.
        section: Cadence and retention.
        model: The unwrapped model.
        optimizer: The unwrapped optimizer.
        collectives: Agreement between ranks.
    """

    def __init__(
        self,
        root: Path,
        section: CheckpointSection,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        collectives: Collectives,
    ) -> None:
        self.root = root
        self.section = section
        self.model = model
        self.optimizer = optimizer
        self.collectives = collectives
        self.last_saved_step = -1

    def resume(self, check: Callable[[CheckpointManifest], None]) -> CheckpointManifest | None:
        """Load the newest intact checkpoint into model and optimizer.

        Args:
            check: Called with its manifest before anything is loaded; raises if the run is another one.

        Returns:
            Its manifest; None if the run has no checkpoint.

        Raises:
            CheckpointError: There are checkpoints, but none is intact, or they are another model's.
        """
        names = self.collectives.on_main(self._find_candidates)
        for number, name in enumerate(names):
            manifest = self._verify_together(self.root / name)
            if manifest is not None:
                self._load_together(self.root / name, manifest, check)
                self.collectives.on_main(partial(self._set_aside, names[:number]))
                self.last_saved_step = manifest.global_step
                return manifest
        if names:
            raise mark_on_all_ranks(
                CheckpointError(
                    f"{self.root}: none of the {len(names)} checkpoints is intact (see the warnings above); "
                    "restore one from a copy, or move the directory away to start from the beginning"
                )
            )
        return None

    def _set_aside(self, damaged: list[str]) -> None:
        """Take damaged checkpoints out of the list: they must not count when old ones are deleted."""
        for name in damaged:
            aside = self.root / f"damaged-{name}"
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(self.root / name, aside)
            logger.warning("the damaged checkpoint is now %s; delete it when you have seen enough", aside)

    def _find_candidates(self) -> list[str]:
        """Names of the checkpoints, newest first, after removing what interrupted writes left behind."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in sweep(self.root):
                logger.warning("removed %s, left behind by an interrupted write", self.root / name)
            return [path.name for path in reversed(list_checkpoints(self.root))]
        except OSError as failure:
            raise CheckpointError(f"{self.root}: {failure}") from failure

    def _verify_together(self, checkpoint: Path) -> CheckpointManifest | None:
        """The manifest if every rank finds its share of the files intact; else None, with a warning."""
        manifest, problem = None, None
        try:
            manifest = read_manifest(checkpoint)
            problem = find_damage(checkpoint, manifest, self.collectives.rank, self.collectives.world_size)
            if checkpoint.name != step_name(manifest.global_step):
                problem = f"{checkpoint}: its manifest is that of {step_name(manifest.global_step)}"
        except CheckpointError as error:
            problem = str(error)
        problems = [found for found in self.collectives.gather(problem) if found is not None]
        if problems and self.collectives.rank == 0:
            logger.warning("DAMAGED CHECKPOINT, trying the one before: %s", "; ".join(sorted(set(problems))))
        return None if problems else manifest

    def _load_together(
        self, checkpoint: Path, manifest: CheckpointManifest, check: Callable[[CheckpointManifest], None]
    ) -> None:
        with self.collectives.together():
            check(manifest)
            create_optimizer_state(self.optimizer)
            entries = replicated_entries(self.model, self.optimizer)
            check_same_entries(entries, manifest, checkpoint)
            read_entries(checkpoint, manifest, entries)
            restore_steps(self.model, self.optimizer, manifest.optimizer)

    def save(self, describe: Callable[[], CheckpointManifest]) -> Path | None:
        """Write the current state as a checkpoint and apply retention.

        Args:
            describe: Makes the manifest without files, tensors and optimizer, which are filled in here.

        Returns:
            The checkpoint's path; None if this step's was already written.

        Raises:
            CheckpointError: Some rank could not write its part; nothing was committed.
        """
        manifest = describe()
        if manifest.global_step == self.last_saved_step:
            return None
        try:
            self.collectives.on_main(lambda: self._prepare(manifest.global_step))
            self._write_together(manifest)
            self.collectives.on_main(lambda: self._commit(manifest))
        except CheckpointError:
            if self.collectives.rank == 0:
                # What was written of it may be what filled the disk.
                shutil.rmtree(temporary_directory(self.root, manifest.global_step), ignore_errors=True)
            raise
        self.collectives.on_main(self._retain)
        self.last_saved_step = manifest.global_step
        return self.root / step_name(manifest.global_step)

    def _prepare(self, global_step: int) -> None:
        temporary = temporary_directory(self.root, global_step)
        try:
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
        except OSError as failure:
            raise CheckpointError(f"{temporary}: {failure}") from failure

    def _write_together(self, manifest: CheckpointManifest) -> None:
        """Write this rank's fragments, then complete the manifest with those of all ranks."""
        create_optimizer_state(self.optimizer)
        entries = replicated_entries(self.model, self.optimizer)
        rank, world_size = self.collectives.rank, self.collectives.world_size
        path = temporary_directory(self.root, manifest.global_step) / f"rank-{rank:05d}.safetensors"
        part: dict[str, Any] = {}
        with self.collectives.together():
            try:
                index = write_fragments(path, own_fragments(entries, rank, world_size))
                part["index"] = {name: asdict(item) for name, item in index.items()}
                part["file"] = asdict(seal_file(path))
            except (OSError, SafetensorError) as failure:
                raise CheckpointError(f"{path}: cannot be written ({failure})") from failure
        parts = self.collectives.gather(part)
        indexes = [{name: FragmentRecord(**item) for name, item in part["index"].items()} for part in parts]
        manifest.tensors = merge_index(entries, indexes)
        manifest.files = {
            f"rank-{number:05d}.safetensors": FileRecord(**part["file"]) for number, part in enumerate(parts)
        }
        manifest.optimizer = optimizer_record(self.model, self.optimizer)

    def _commit(self, manifest: CheckpointManifest) -> None:
        try:
            commit(self.root, manifest)
        except OSError as failure:
            raise CheckpointError(f"{self.root}: the checkpoint was not committed ({failure})") from failure

    def _retain(self) -> None:
        """Delete all but the newest `keep_last` and the multiples of `keep_every_steps`."""
        for checkpoint in list_checkpoints(self.root)[: -self.section.keep_last]:
            global_step = int(checkpoint.name.removeprefix("step-"))
            every = self.section.keep_every_steps
            if every is None or global_step % every != 0:
                try:
                    remove_checkpoint(checkpoint)
                except OSError as failure:
                    logger.warning("%s: an old checkpoint could not be deleted (%s)", checkpoint, failure)
