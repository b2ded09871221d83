"""How fast samples are read, against other libraries, and how soon after a resume.

    python benchmarks/data.py [--repeats 5] [--seconds 1] [--workers 0 2] [--mnist FOLDER] [--out FILE.json]

Three data sets: MNIST as arrays (uniform shards, which are read as strided arrays), MNIST as PNGs, and JPEGs of
64 x 64 cut out of scikit-learn's two sample photographs. Without --mnist, random arrays of MNIST's size take its
place. All loaders deliver batches of the same size and type; webdataset and wids read the very tars that we read
(webdataset also tars of its own writer), the others forms of their own. Loaders take turns, each in a process of its
own, `--repeats` times; the medians are printed. A turn begins when the first batches are there, so that the start of
workers and the filling of their queues do not count. CPU-seconds are those of the process and of all its children,
from the same moment on. Our turn ends with the first epoch, in which members are checked; of arrays there are turns
of later epochs, and without checks, as well. Libraries that are not installed are named and left out.

For a resume, new processes open the manifest and fetch one batch at several places in the order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import machine, versions
from data_rivals import RIVALS, Batches, Samples

from jmvae_dist.data.indexing.inspection import ModalityRequest
from jmvae_dist.data.loader import TrainLoader, decode_threads
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan, default_lanes
from jmvae_dist.data.sources.base import ArraySource
from jmvae_dist.data.sources.folder import load_folder_source
from jmvae_dist.data.sources.mnist import read_idx
from jmvae_dist.data.sources.splits import SplitChoice
from jmvae_dist.data.store import Verify
from jmvae_dist.data.writer import write_shards

BATCH = 256
SHUFFLE_WINDOW = 8192
_FEWEST_BATCHES = 4  # that a turn counts
RESUME_EPOCHS = (0.0, 0.25, 0.5, 0.75, 3.1, 1000.5)
PACKAGES = ("torch", "numpy", "pillow", "webdataset", "wids", "litdata", "mosaicml-streaming")


@dataclass
class Result:
    """Medians of one loader on one data set."""

    data: str
    loader: str
    workers: int
    samples_per_s: float
    samples_per_cpu_s: float


@dataclass
class Resume:
    """Medians of the time from opening the manifest to the first batch, in milliseconds."""

    verify: str
    epoch: float
    manifest_ms: float
    first_batch_ms: float


def main() -> int:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--pictures", type=int, default=12_800, help="how many PNGs and JPEGs")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--resume-in", help=argparse.SUPPRESS)  # what the new processes of a resume do
    options = parser.parse_args()
    if options.resume_in is not None:
        print(json.dumps(_resume(**json.loads(options.resume_in))))
        return 0
    most_workers = max(options.workers)
    least_pictures = BATCH * (_warm_up_batches(most_workers) + 3 * most_workers + _FEWEST_BATCHES)
    if options.pictures < least_pictures:
        parser.error(f"--pictures: at least {least_pictures} are needed for a turn with {most_workers} workers")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(PACKAGES),
    }
    print(json.dumps({key: report[key] for key in ("machine", "versions")}, indent=1))
    with tempfile.TemporaryDirectory() as folder:
        sets = [make(Path(folder), options) for make in (make_arrays, make_pngs, make_jpegs)]
        results = [result for samples in sets for result in compare(samples, options)]
        resumes = measure_resumes(sets[0].shards[0][0].parent / "manifest.json", options.repeats)
    report |= {"results": [asdict(result) for result in results], "resume": [asdict(resume) for resume in resumes]}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


# Data


def make_arrays(folder: Path, options: argparse.Namespace) -> Samples:
    """MNIST's training images as uint8 arrays, and labels."""
    images, labels = _mnist(options.mnist)
    modalities = (Modality("image", "uint8", (1, 28, 28), scale=1 / 255), Modality.classes("label", 10))
    arrays = {"image": images, "label": labels}
    source = ArraySource("mnist", "train", modalities, arrays, np.arange(len(labels)), 6000, {})
    write_shards(source, folder / "arrays" / "shards")
    return _samples("MNIST arrays", folder / "arrays", "image.npy", "label.cls", images, labels)


def make_pngs(folder: Path, options: argparse.Namespace) -> Samples:
    """MNIST's images as PNGs."""
    images, labels = (array[: options.pictures] for array in _mnist(options.mnist))
    return _make_pictures(folder / "pngs", "MNIST PNGs", "png", images, labels)


def make_jpegs(folder: Path, options: argparse.Namespace) -> Samples:
    """Squares of 64 x 64 out of photographs, as JPEGs of quality 90; the label says which photograph."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    generator = np.random.default_rng(0)
    labels = np.arange(options.pictures) % len(photos)
    images = np.empty((options.pictures, 3, 64, 64), np.uint8)
    for image, label in zip(images, labels, strict=True):
        height, width, _ = photos[label].shape
        top, left = generator.integers(height - 64), generator.integers(width - 64)
        image[:] = photos[label][top : top + 64, left : left + 64].transpose(2, 0, 1)
    return _make_pictures(folder / "jpegs", "JPEGs 64 x 64", "jpg", images, labels)


def _mnist(folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if folder is None:
        generator = np.random.default_rng(0)
        return generator.integers(0, 256, (60_000, 1, 28, 28), np.uint8), np.arange(60_000) % 10
    images = read_idx(folder / "train-images-idx3-ubyte.gz", num_dimensions=3)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", num_dimensions=1)
    return images[:, None], labels.astype(np.int64)


def _make_pictures(folder: Path, name: str, extension: str, images: np.ndarray, labels: np.ndarray) -> Samples:
    from PIL import Image

    files = folder / "files"
    files.mkdir(parents=True)
    contents = []
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = io.BytesIO()
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        kind = {"format": "JPEG", "quality": 90} if extension == "jpg" else {"format": "PNG"}
        Image.fromarray(pixels).save(file, **kind)
        contents.append(file.getvalue())
        (files / f"{number:06d}.{extension}").write_bytes(contents[-1])
        (files / f"{number:06d}.cls").write_text(str(label))
    requests = [
        ModalityRequest("image", (extension,), "image", scale=1 / 255),
        ModalityRequest("label", ("cls",), "cls", num_classes=10),
    ]
    patterns = {"image": f"*.{extension}", "label": "*.cls"}
    source, _ = load_folder_source(files, patterns, requests, SplitChoice("train"))
    write_shards(source, folder / "shards", samples_per_shard=1600)
    # The rows of other forms are not in the order of the tars: they are shuffled anyway.
    return _samples(name, folder, extension, "cls", contents, labels)


def _samples(
    name: str, folder: Path, extension: str, label_extension: str, images: Any, labels: np.ndarray
) -> Samples:
    manifest = Manifest.load(folder / "shards" / "manifest.json")
    shards = [(manifest.shard_path(number), shard.num_samples) for number, shard in enumerate(manifest.shards)]
    members = {modality.name: modality.extension for modality in manifest.modalities}
    channels = manifest.modalities[0].shape[0]
    assert channels is not None
    return Samples(name, shards, members["image"], members["label"], folder, images, labels, channels)


# Throughput


def ours(samples: Samples, batch: int, workers: int) -> Batches:
    """The training order, exact and shuffled; each member is checked when it is first used."""
    return _train(samples, batch, workers, "first_use")


def ours_later(samples: Samples, batch: int, workers: int) -> Batches:
    """From the second epoch on, in the process that has read the first one: what is checked is known per process."""
    batches = _train(samples, batch, workers, "first_use")
    for _ in range(len(samples.labels) // batch + 1):
        next(batches)
    yield from batches


def ours_unchecked(samples: Samples, batch: int, workers: int) -> Batches:
    """With `data.verify: never`."""
    return _train(samples, batch, workers, "never")


def _train(samples: Samples, batch: int, workers: int, verify: Verify) -> Batches:
    manifest = Manifest.load(samples.folder / "shards" / "manifest.json")
    loader = _loader(manifest, batch, workers, verify)
    for item in loader.iterate(0, 10**9):
        yield item.inputs["image"], item.inputs["label"]


def _loader(manifest: Manifest, batch: int, workers: int, verify: Verify) -> TrainLoader:
    plan = SamplePlan(manifest.shard_sizes, batch, default_lanes(batch), SHUFFLE_WINDOW, seed=0)
    threads = decode_threads(None, workers)
    return TrainLoader(manifest, plan, rank=0, world_size=1, workers=workers, threads=threads, verify=verify)


OURS = {"jmvae_dist": ours, "jmvae_dist, epoch 2": ours_later, "jmvae_dist, unchecked": ours_unchecked}


def compare(samples: Samples, options: argparse.Namespace) -> list[Result]:
    """All loaders on one data set, in turns."""
    loaders: dict[tuple[str, int], Callable[[Samples, int, int], Batches]] = {}
    for name, make in {**OURS, **RIVALS}.items():
        if not samples.is_array and (name == "TensorDataset" or make in (ours_later, ours_unchecked)):
            continue  # decoded pictures in memory are arrays, and to check files is little beside decoding them
        is_one_process = name == "TensorDataset" or make is ours_later
        for workers in (0,) if is_one_process else options.workers:
            loaders[name, workers] = make
    turns: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in loaders}
    for repeat in range(options.repeats):
        for (name, workers), make in list(loaders.items()):
            result = _in_new_process(_turn, make, samples, workers, options.seconds)
            if isinstance(result, str):
                if repeat > 0 or name in OURS:
                    raise RuntimeError(f"{name}, {workers} workers: {result}")
                print(f"{samples.name}: {name} with {workers} workers left out ({result})")
                del loaders[name, workers]
            else:
                turns[name, workers].append(result)
    print(f"\n{samples.name:<22}{'workers':>8}{'samples/s':>12}{'per CPU-s':>12}{'ours / it: wall':>17}{'CPU':>8}")
    results = []
    for name, workers in loaders:
        wall, cpu = (statistics.median(values) for values in zip(*turns[name, workers], strict=True))
        results.append(Result(samples.name, name, workers, wall, cpu))
    by_workers = {result.workers: result for result in results if result.loader == "jmvae_dist"}
    for result in results:
        own = by_workers[result.workers]
        ratios = own.samples_per_s / result.samples_per_s, own.samples_per_cpu_s / result.samples_per_cpu_s
        numbers = (
            f"{result.samples_per_s:>12,.0f}{result.samples_per_cpu_s:>12,.0f}{ratios[0]:>17.2f}{ratios[1]:>8.2f}"
        )
        print(f"{result.loader:<22}{result.workers:>8}{numbers}", flush=True)
    return results


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, or as text why there is none: what libraries leave running must not slow the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
                sender.send(function(*arguments))
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        finally:
            os._exit(0)  # without waiting for threads

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "its process died"
    finally:
        process.join()


def _turn(
    make: Callable[[Samples, int, int], Batches], samples: Samples, workers: int, seconds: float
) -> tuple[float, float]:
    """Samples per second, and per CPU-second, of one loader."""
    with contextlib.closing(make(samples, BATCH, workers)) as batches:  # type: ignore[type-var]
        # What has been prepared by then would come for free: by workers, or as steps that are read together.
        warm_up = _warm_up_batches(workers)
        for _ in range(warm_up):
            _check(next(batches), samples)
        # Ours prepares three batches per worker ahead: they are not of the second epoch either.
        most_batches = len(samples.labels) // BATCH - warm_up - 3 * workers if make is ours else 10**9
        wall, cpu, count = time.perf_counter(), _cpu_s(), 0
        while (time.perf_counter() - wall < seconds or count < _FEWEST_BATCHES) and count < most_batches:
            next(batches)
            count += 1
        wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
    return count * BATCH / wall, count * BATCH / cpu


def _warm_up_batches(workers: int) -> int:
    return 4 + 3 * workers


def _check(batch: tuple[torch.Tensor, torch.Tensor], samples: Samples) -> None:
    """All loaders must deliver the same."""
    images, labels = batch
    assert images.dtype == torch.float32
    assert len(images) == len(labels) == BATCH
    assert images[0].numel() == (samples.channels * 28 * 28 if samples.channels == 1 else 3 * 64 * 64)
    assert 0.5 < float(images.max()) <= 1.0 + 1e-6


def _cpu_s() -> float:
    """CPU-seconds of this process and all its children, those that still run included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(
        map(_running_cpu_s, _descendants(os.getpid()))
    )


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _running_cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# Resume


def measure_resumes(manifest_path: Path, repeats: int) -> list[Resume]:
    """The first batch at several places, each in new processes."""
    resumes = []
    print(f"\n{'first batch after':<22}{'verify':>10}{'manifest, ms':>16}{'and batch, ms':>16}")
    for verify in ("never", "first_use"):
        for epoch in RESUME_EPOCHS:
            order = json.dumps({"path": str(manifest_path), "epoch": epoch, "verify": verify})
            command = [sys.executable, __file__, "--resume-in", order]
            times = [json.loads(subprocess.check_output(command)) for _ in range(repeats)]
            opened, first = (statistics.median(values) for values in zip(*times, strict=True))
            resumes.append(Resume(verify, epoch, opened, first))
            print(f"{f'epoch {epoch:g}':<22}{verify:>10}{opened:>16.1f}{first:>16.1f}", flush=True)
    return resumes


def _resume(path: str, epoch: float, verify: Verify) -> tuple[float, float]:
    """Milliseconds until the manifest is open, and until the first batch is there."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    manifest = Manifest.load(Path(path))
    opened = time.perf_counter()
    loader = _loader(manifest, BATCH, 0, verify)
    step = int(epoch * manifest.num_samples / BATCH)
    with contextlib.closing(loader.iterate(step, step + 1)) as batches:
        next(batches)
        return 1000 * (opened - start), 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    raise SystemExit(main())
