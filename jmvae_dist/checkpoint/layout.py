"""A checkpoint on disk: names, the sealing manifest, verification, and the atomic commit.

    RUN/checkpoints/LATEST                          name of the newest committed checkpoint
    RUN/checkpoints/step-00001000/manifest.json     seals the directory: sizes and sha256 of the files below
    RUN/checkpoints/step-00001000/rank-00000.safetensors ...
    RUN/checkpoints/.tmp-step-00001000/             being written; never read, swept at the next start

A directory without a manifest is not a checkpoint. The manifest is written last and removed first, and carries
a digest of itself, so a torn or altered checkpoint cannot be taken for a valid one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from jmvae_dist.checks import is_integer
from jmvae_dist.errors import CheckpointError
from jmvae_dist.files import fsync_path, sha256_of, write_text_atomic

# Format 2 is format 1 with `micro_batch`, and is written where there is something to say in it: a version that does
# not know the key must not take its checkpoints for damaged ones of its own format.
_FORMAT_WITH_MICRO_BATCH = 2
_READABLE_FORMATS = (1, _FORMAT_WITH_MICRO_BATCH)
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "LATEST"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[\w-]+\.safetensors")
# A manifest lists fragments, not values: one of this size describes millions of fragments.
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_SHOWN_CHARACTERS = 200


class NewerFormatError(CheckpointError):
    """A checkpoint is intact, and only a newer version can read it: not to be passed over as a damaged one is."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class FragmentRecord:
    """Elements [start, start + numel) of a flattened tensor, stored in `file` under the tensor's name."""

    file: str
    start: int
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the training state, cut into fragments that cover it exactly once."""

    shape: list[int]
    dtype: str
    fragments: list[FragmentRecord]


@dataclass
class CheckpointManifest:
    """Everything about a checkpoint except the tensors' values.

    Args:
        global_step: Finished optimizer steps.
        engine: Engine that wrote it; any engine can read it.
        world_size: Number of processes that wrote it.
        versions: Versions of the software that wrote it.
        model: Resolved `JMVAEConfig` and network sizes: enough to rebuild the model.
        modalities: The manifest entries of the training data's modalities (shapes, transforms).
        config: The run's resolved configuration.
        data_state: What fixes the order of samples.
        tracking: Identity of the run at the trackers.
        optimizer: Parameter groups, and the step count of every parameter.
        tensors: Weights (`weight/NAME`), buffers (`buffer/NAME`), moments (`exp_avg/NAME`, `exp_avg_sq/NAME`).
        files: Size and sha256 of every file.
        guards: State of the training guards: loss scale, counters, recent losses.
        passed_over: Ranges [first, last + 1) of steps whose batches are not trained on, after rewinds.
        elapsed_s: Seconds that the run had taken, over all its attempts.
        created: Time of writing, ISO 8601.
        micro_batch: What `training.micro_batch_size: auto` has found; empty without it.
    """

    global_step: int
    engine: str
    world_size: int
    versions: dict[str, str]
    model: dict[str, Any]
    modalities: dict[str, Any]
    config: dict[str, Any]
    data_state: dict[str, Any]
    tracking: dict[str, Any]
    optimizer: dict[str, Any]
    guards: dict[str, Any]
    passed_over: list[list[int]]
    elapsed_s: float
    created: str
    micro_batch: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON text with a digest of itself."""
        fields = asdict(self)
        version = _FORMAT_WITH_MICRO_BATCH
        if not self.micro_batch:
            del fields["micro_batch"]
            version = 1
        content = {"format_version": version, **fields}
        return json.dumps({**content, "digest": _digest(content)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: Path) -> CheckpointManifest:
        """Parse and check the digest, the version and the fields.

        Raises:
            NewerFormatError: The text is intact, and of a format that is newer than this version.
            CheckpointError: It is not a manifest that this version, or an older one, wrote.
        """
        try:
            content = json.loads(text)
            digest = content.pop("digest")
            version = content.pop("format_version")
            # Before the version: a flipped bit in its number is damage.
            if _digest({"format_version": version, **content}) != digest:
                raise CheckpointError(f"{where}: content does not match its digest; the file was damaged or edited")
            if version not in _READABLE_FORMATS:
                raise _format_error(version, where)
            content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
            content["tensors"] = {name: _tensor_record(record) for name, record in content["tensors"].items()}
            manifest = cls(**content)
            manifest._check(where)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {shown(str(error))}"
            raise CheckpointError(f"{where}: not a checkpoint manifest ({problem})") from None
        return manifest

    def _check(self, where: Path) -> None:
        """Refuse what this version would not have written: the digest only shows that the text is as it was."""
        for name, hint in get_type_hints(type(self)).items():
            expected, value = get_origin(hint) or hint, getattr(self, name)
            if not isinstance(value, expected):
                raise TypeError(f"{name} is {value!r}, not of the type {expected.__name__}")
        for name in self.files:
            if not _FILE_NAME.fullmatch(name):
                raise CheckpointError(f"{where}: file name '{shown(name)}' is not allowed in a checkpoint")
        for name, record in self.tensors.items():
            if not _is_covered(record, self.files):
                raise CheckpointError(f"{where}: the fragments of '{shown(name)}' are not exactly all of it")


def shown(text: str) -> str:
    """The beginning of what may be anything, for messages."""
    return ascii(text)[1:-1][:_MAX_SHOWN_CHARACTERS]


def _format_error(version: Any, where: Path) -> CheckpointError:
    newest = _READABLE_FORMATS[-1]
    if is_integer(version) and version > newest:
        return NewerFormatError(
            f"{where}: format {version}, written by a newer version of this program; this one reads formats up to "
            f"{newest}: use the newer one, or move this checkpoint away to go on from the one before"
        )
    return CheckpointError(f"{where}: format version {shown(repr(version))}; this version reads {_READABLE_FORMATS}")


def _is_covered(record: TensorRecord, files: dict[str, FileRecord]) -> bool:
    """Whether the fragments, in listed files, cover the tensor exactly once."""
    covered = 0
    numbers = [*record.shape, *(number for item in record.fragments for number in (item.start, item.numel))]
    if not all(is_integer(number) and number >= 0 for number in numbers):
        return False
    for fragment in record.fragments:
        if fragment.start != covered or fragment.numel < 1 or fragment.file not in files:
            return False
        covered += fragment.numel
    return covered == math.prod(record.shape)


def _tensor_record(record: dict[str, Any]) -> TensorRecord:
    fragments = [FragmentRecord(**fragment) for fragment in record["fragments"]]
    return TensorRecord(record["shape"], record["dtype"], fragments)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def step_name(global_step: int) -> str:
    """Directory name of the checkpoint at `global_step`."""
    return f"step-{global_step:08d}"


def step_of(name: str) -> int:
    """The step that `step_name` has named."""
    return int(name.removeprefix("step-"))


def temporary_directory(root: Path, global_step: int) -> Path:
    """Where the checkpoint at `global_step` is written before it is committed."""
    return root / f".tmp-{step_name(global_step)}"


def list_checkpoints(root: Path) -> list[Path]:
    """Sealed checkpoint directories, oldest step first; whether they are intact is for `find_damage` to say."""
    return [path for path in list_step_directories(root) if (path / MANIFEST_NAME).is_file()]


def list_step_directories(root: Path) -> list[Path]:
    """Directories that bear the name of a checkpoint, with or without a manifest, oldest step first."""
    if not root.is_dir():
        return []
    steps = []
    for path in root.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            steps.append((int(match[1]), path))
    return [path for _, path in sorted(steps)]


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint directory.

    Raises:
        NewerFormatError: It is of a newer format.
        CheckpointError: There is none, or it is damaged.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, so {checkpoint} is not a complete checkpoint") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return CheckpointManifest.from_json(text, path)


def measure_progress(root: Path) -> tuple[int, int]:
    """How far a run has come: (rewinds, global step) of its newest readable checkpoint; (0, -1) without one.

    Pairs compare as the run goes on: a checkpoint that is written after a rewind is further than all before it,
    whatever its step; one that is written again after it was lost or damaged is not.
    """
    for checkpoint in reversed(list_checkpoints(root)):
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError:
            continue
        return len(manifest.passed_over), manifest.global_step
    return 0, -1


def find_damage(checkpoint: Path, manifest: CheckpointManifest, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Args:
        checkpoint: The directory.
        manifest: Its manifest.
        part: With `parts`: check every `parts`-th file, from number `part` on, so that ranks can share the work.
        parts: See `part`.
    """
    for name in sorted(manifest.files)[part::parts]:
        path, record = checkpoint / name, manifest.files[name]
        try:
            num_bytes = path.stat().st_size
            if num_bytes != record.num_bytes:
                return f"{path}: {num_bytes} bytes instead of {record.num_bytes}"
            if sha256_of(path) != record.sha256:
                return f"{path}: sha256 differs from the manifest's"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
    return None


def seal_file(path: Path) -> FileRecord:
    """Make a written file durable and describe it."""
    fsync_path(path)
    return FileRecord(path.stat().st_size, sha256_of(path))


def commit(root: Path, manifest: CheckpointManifest) -> Path:
    """Turn the temporary directory of a step, whose files are durable, into a checkpoint; returns its path."""
    temporary = temporary_directory(root, manifest.global_step)
    final = root / step_name(manifest.global_step)
    write_text_atomic(temporary / MANIFEST_NAME, manifest.to_json())
    os.replace(temporary, final)
    fsync_path(root)
    name_latest(final)
    return final


def name_latest(checkpoint: Path) -> None:
    """Make `LATEST` name this checkpoint; untouched if it does, as a complete run may be on a full disk."""
    latest, text = checkpoint.parent / LATEST_NAME, checkpoint.name + "\n"
    if not latest.is_file() or latest.read_text() != text:
        write_text_atomic(latest, text)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: interrupted at any point, what is left is not a checkpoint."""
    (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
    fsync_path(checkpoint)
    shutil.rmtree(checkpoint)


def sweep(root: Path) -> list[str]:
    """Delete what interrupted writes and deletions left behind; returns the names."""
    removed = []
    for path in root.iterdir() if root.is_dir() else []:
        half_written = path.name.startswith(".tmp-step-")
        half_deleted = _STEP_NAME.fullmatch(path.name) and not (path / MANIFEST_NAME).exists()
        if path.is_dir() and (half_written or half_deleted):
            shutil.rmtree(path)
            removed.append(path.name)
    return sorted(removed)


def find_intact(path: Path) -> tuple[Path, CheckpointManifest]:
    """The checkpoint that a user means by `path`, and its manifest, after checking all of its files.

    Args:
        path: A checkpoint, or a run directory, whose newest intact checkpoint is meant.

    Raises:
        NewerFormatError: A checkpoint that comes first is of a newer format.
        CheckpointError: There is no intact checkpoint.
    """
    is_checkpoint = (path / MANIFEST_NAME).is_file()
    candidates = [path] if is_checkpoint else list(reversed(list_checkpoints(path / "checkpoints")))
    if not candidates:
        raise CheckpointError(f"{path}: neither a checkpoint nor a run directory with checkpoints")
    problems = []
    for checkpoint in candidates:
        try:
            manifest = read_manifest(checkpoint)
            problem = find_damage(checkpoint, manifest)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            return checkpoint, manifest
        problems.append(problem)
    raise CheckpointError(f"{path}: no intact checkpoint; " + "; ".join(problems))
