"""What a user can set about data: the section `data`, and the checks of its parts.

Like all of the configuration it needs neither torch nor the data: what depends on a manifest is checked in
`training/setup.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jmvae_dist.checks import check_user_class, is_finite, is_integer, require
from jmvae_dist.errors import ConfigError

# Parameters of the transforms that `data.transforms` knows by name: type, and whether they must be given.
TRANSFORM_PARAMETERS: dict[str, dict[str, tuple[str, bool]]] = {
    "scale": {"offset": ("number", False), "scale": ("number", False)},
    "resize": {"size": ("size", True), "resample": ("resample", False), "fit": ("fit", False)},
    "binarize": {"threshold": ("number", False), "keyed": ("flag", False)},
    "one_hot": {"num_classes": ("count", True)},
}
_MAX_IMAGE_SIDE = 2**15


def check_wishes(transforms: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> None:
    """Check `data.transforms` and `data.tokenizers`, but for what depends on their modalities; raises ConfigError."""
    for modality, entries in transforms.items():
        require(isinstance(entries, list), f"data.transforms.{modality}", entries, "a list of steps")
        for number, entry in enumerate(entries):
            _check_transform(f"data.transforms.{modality}[{number}]", entry)
    for modality, settings in tokenizers.items():
        check_user_class(f"data.tokenizers.{modality}", settings, {"length"})
        length = settings.get("length")
        allowed = "an integer of at least 1, or null for the manifest's"
        valid = length is None or (is_integer(length) and length >= 1)
        require(valid, f"data.tokenizers.{modality}.length", length, allowed)


def _check_transform(key: str, entry: Any) -> None:
    """Check one step of `data.transforms`, but for what depends on its modality."""
    allowed = f"a step with a name ({', '.join(TRANSFORM_PARAMETERS)}) or a class_path"
    require(isinstance(entry, dict) and ("name" in entry) != ("class_path" in entry), key, entry, allowed)
    if "class_path" in entry:
        check_user_class(key, entry)
        return
    known = list(TRANSFORM_PARAMETERS)
    require(entry["name"] in known, f"{key}.name", entry["name"], f"one of {known}")
    parameters = TRANSFORM_PARAMETERS[entry["name"]]
    for name, value in entry.items():
        if name == "name":
            continue
        if name not in parameters:
            raise ConfigError(f"{key}: {entry['name']} has no parameter {name!r}; it takes {', '.join(parameters)}")
        _check_transform_parameter(f"{key}.{name}", value, parameters[name][0])
    for name, (_, is_required) in parameters.items():
        if is_required and name not in entry:
            raise ConfigError(f"{key}: {entry['name']} needs {name}")
    if entry["name"] == "binarize" and entry.get("keyed") and "threshold" in entry:
        raise ConfigError(f"{key}: binarize takes a threshold or keyed: true, not both")


def _check_transform_parameter(key: str, value: Any, kind: str) -> None:
    sizes = isinstance(value, list) and len(value) == 2 and all(is_integer(side) for side in value)
    checks = {
        "number": (is_finite(value), "a finite number"),
        "flag": (isinstance(value, bool), "true or false"),
        "count": (is_integer(value) and 1 <= value <= 1_000_000, "an integer from 1 to 1000000"),
        "size": (
            sizes and all(1 <= side <= _MAX_IMAGE_SIDE for side in value),
            f"[height, width], each from 1 to {_MAX_IMAGE_SIDE}",
        ),
        "resample": (value in ("nearest", "bilinear", "bicubic", "lanczos"), "nearest, bilinear, bicubic or lanczos"),
        "fit": (value in ("stretch", "crop"), "stretch or crop"),
    }
    is_valid, allowed = checks[kind]
    require(is_valid, key, value, allowed)


@dataclass
class CacheSection:
    """Copies of remote shards on a disk of the node, shared by all its processes and runs.

    Args:
        dir: Directory of the copies, on a local disk, such as `$TMPDIR/jmvae-cache`; null: none are made, and only
            the samples that are needed are read, with Range requests.
        max_bytes: Most bytes that the copies take; the least recently used ones make room. null: what the disk has.
        prefetch_shards: Shards per lane that are downloaded before the lane comes to them; 0: none.
    """

    dir: str | None = None
    max_bytes: int | None = None
    prefetch_shards: int = 2

    def __post_init__(self) -> None:
        if self.dir is not None:
            require(bool(self.dir.strip()), "data.cache.dir", self.dir, "the path of a directory, or null")
        if self.max_bytes is not None:
            require(self.max_bytes >= 1, "data.cache.max_bytes", self.max_bytes, "at least 1, or null")
            require(self.dir is not None, "data.cache.max_bytes", self.max_bytes, "null without data.cache.dir")
        valid = 0 <= self.prefetch_shards <= 1000
        require(valid, "data.cache.prefetch_shards", self.prefetch_shards, "between 0 and 1000")


@dataclass
class RemoteSection:
    """How patient reading over the network is.

    Args:
        connect_timeout_s: Longest wait for a connection.
        stall_timeout_s: A transfer that brings next to nothing for this long is started again where it stopped.
        attempts: Attempts in a row that may fail without bringing at least 1 MiB before the run stops.
        backoff_s: Longest pause before the second attempt; doubles with each further one, up to 30 s.
        connections: Requests at the same time, per process.
    """

    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 20.0
    attempts: int = 5
    backoff_s: float = 1.0
    connections: int = 4

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "stall_timeout_s"):
            value = getattr(self, name)
            valid = is_finite(value) and 0 < value <= 86400
            require(valid, f"data.remote.{name}", value, "greater than 0 and at most a day")
        valid = is_finite(self.backoff_s) and 0 <= self.backoff_s <= 30
        require(valid, "data.remote.backoff_s", self.backoff_s, "between 0 and 30")
        for name, most in (("attempts", 100), ("connections", 64)):
            value = getattr(self, name)
            require(1 <= value <= most, f"data.remote.{name}", value, f"between 1 and {most}")


@dataclass
class DataSection:
    """Where samples come from and in which order.

    Args:
        train_manifest: `manifest.json` of the training shards, a path or URL, or the path of its folder.
        eval_manifest: The same of held-out shards; without it nothing is evaluated during training.
        modalities: The modalities to use, in this order; all of the manifest by default.
        lanes: Number of lanes C that cut an epoch; a divisor of `training.global_batch_size` and at least the
            number of processes. Default: its largest divisor up to 64. Part of the order: fixed for a run.
        shuffle_window: Samples that are shuffled together within a lane. Part of the order: fixed for a run.
        workers: Reader processes per rank; 0 reads in the training process.
        decode_threads: Threads that decode images in each process that reads; by default as many as the CPUs that
            this process may use, and at most 8, or 1 beside reader processes. Nothing else needs any.
        verify: When the bytes of shards are checked: always (the whole shard at every opening), first_use (each
            member when a process first uses it; the whole shard at its first opening if it has no sums) or never. The
            sha256 of an index is checked at every opening.
        cache: Copies of remote shards.
        remote: Timeouts and retries of remote shards.
        transforms: By modality, a list of steps between the stored value and the model: `{name: resize, size: [H,
            W]}`, `{name: scale, offset: A, scale: S}`, `{name: binarize, threshold: T}` or `{name: binarize, keyed:
            true}`, `{name: one_hot, num_classes: K}`, or `{class_path: ..., init_args: ...}` for a class of your own.
        tokenizers: By text modality, `{class_path: ..., init_args: ..., length: ...}` of a tokenizer of your own.
        on_bad_sample: What a sample does that cannot be read or that its likelihood cannot explain: stop ends the
            run with an error; mask leaves it out of its batch, whose loss is then the mean over the others.
        bad_sample_tolerance: With mask, the fraction of samples that may be bad for good.
        bad_sample_burst: With mask, how many more bad samples than that the run bears before it stops.
        allow_order_change: Resume although data, seed, batch size, lanes or window differ from the
            checkpoint's: some samples of the current epoch are then seen twice and others not at all.
    """

    train_manifest: str
    eval_manifest: str | None = None
    modalities: list[str] | None = None
    lanes: int | None = None
    shuffle_window: int = 8192
    workers: int = 0
    decode_threads: int | None = None
    verify: Literal["always", "first_use", "never"] = "first_use"
    cache: CacheSection = field(default_factory=CacheSection)
    remote: RemoteSection = field(default_factory=RemoteSection)
    transforms: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_bad_sample: Literal["stop", "mask"] = "stop"
    bad_sample_tolerance: float = 0.001
    bad_sample_burst: int = 100
    allow_order_change: bool = False

    def __post_init__(self) -> None:
        if self.lanes is not None:
            require(self.lanes >= 1, "data.lanes", self.lanes, "at least 1")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "at least 1")
        require(self.workers >= 0, "data.workers", self.workers, "at least 0")
        if self.decode_threads is not None:
            require(1 <= self.decode_threads <= 256, "data.decode_threads", self.decode_threads, "from 1 to 256")
        valid = is_finite(self.bad_sample_tolerance) and 0 <= self.bad_sample_tolerance < 1
        require(valid, "data.bad_sample_tolerance", self.bad_sample_tolerance, "at least 0 and below 1")
        require(self.bad_sample_burst >= 0, "data.bad_sample_burst", self.bad_sample_burst, "at least 0")
        check_wishes(self.transforms, self.tokenizers)
        if self.modalities is not None:
            unique = len(set(self.modalities)) == len(self.modalities) >= 2
            require(unique, "data.modalities", self.modalities, "at least two different modalities")
