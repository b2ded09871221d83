"""Who should decode pictures: threads of the training process, or worker processes?

    python benchmarks/decoding.py [--samples 1024] [--threads 1 2 4] [--workers 1 2] [--out FILE.json]

Shards of JPEGs and PNGs are read through `TrainLoader` in the same exact order, once by threads and once by worker
processes, each time from a warm page cache. Samples per second of wall time say what a run sees that does nothing but
read; samples per CPU-second say what decoding takes away from a step that needs the CPUs too. Worker processes also
pay for their start and for handing float32 batches over, which is what training pays, too.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jmvae_dist.data.index import RECORD_DTYPE, index_bytes
from jmvae_dist.data.loader import TrainLoader
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.plan import SamplePlan
from jmvae_dist.data.shard import IndexFile, Shard
from jmvae_dist.data.views import make_views

BATCH, SAMPLES_PER_SHARD, REPEATS = 64, 256, 3
KINDS = {"jpeg 64": ("JPEG", 64), "png 64": ("PNG", 64), "jpeg 256": ("JPEG", 256)}


@dataclass
class Result:
    """One kind of picture, one way of decoding; the best of three passes."""

    kind: str
    threads: int
    workers: int
    samples_per_s: float
    samples_per_cpu_s: float


def main() -> int:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args()
    ways = [(threads, 0) for threads in options.threads] + [(1, workers) for workers in options.workers]
    results = []
    print(f"{'kind':<10}{'threads':>8}{'workers':>8}{'samples/s':>12}{'per CPU-s':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, (file_format, side) in KINDS.items():
            manifest = write_pictures(Path(folder) / kind.replace(" ", "-"), file_format, side, options.samples)
            for threads, workers in ways:
                passes = [measure(manifest, threads, workers) for _ in range(REPEATS)]
                results.append(Result(kind, threads, workers, *(max(values) for values in zip(*passes, strict=True))))
                wall, cpu = results[-1].samples_per_s, results[-1].samples_per_cpu_s
                print(f"{kind:<10}{threads:>8}{workers:>8}{wall:>12,.0f}{cpu:>12,.0f}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0


def write_pictures(folder: Path, file_format: str, side: int, num_samples: int) -> Manifest:
    """Smooth random pictures with some noise: about as hard to decode as photographs."""
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    modality = Modality.image("photo", (3, side, side), "jpg|png", scale=1 / 255)
    shards = []
    for number, start in enumerate(range(0, num_samples, SAMPLES_PER_SHARD)):
        path = folder / f"shard-{number:06d}.tar"
        size = min(SAMPLES_PER_SHARD, num_samples - start)
        records = np.empty((size, 1), RECORD_DTYPE)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(size):
                coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
                pixels = np.clip(smooth + generator.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, file_format, **({"quality": 90} if file_format == "JPEG" else {}))
                info = tarfile.TarInfo(f"{start + row:08d}.{'jpg' if file_format == 'JPEG' else 'png'}")
                info.size = len(file.getvalue())
                records[row] = (tar.offset + 512, info.size)
                tar.addfile(info, io.BytesIO(file.getvalue()))
        index, content = index_bytes(records), path.read_bytes()
        (folder / f"{path.name}.index").write_bytes(index)
        digests = [hashlib.sha256(data).hexdigest() for data in (content, index)]
        index_file = IndexFile(f"{path.name}.index", len(index), digests[1])
        shards.append(Shard(path.name, size, len(content), digests[0], index_file))
    manifest = Manifest.create([modality], shards, {}, folder / "manifest.json")
    manifest.save(manifest.path)
    return manifest


def measure(manifest: Manifest, threads: int, workers: int) -> tuple[float, float]:
    """Samples per second and per CPU-second of one epoch, with the start of workers and threads."""
    plan = SamplePlan(manifest.shard_sizes, BATCH, lanes=BATCH, shuffle_window=64, seed=0)
    loader = TrainLoader(
        manifest, plan, rank=0, world_size=1, views=make_views(manifest.modalities), workers=workers, threads=threads
    )
    steps = manifest.num_samples // BATCH
    cpu_before, wall_before = cpu_s(), time.perf_counter()
    for _ in loader.iterate(0, steps):
        pass
    wall = time.perf_counter() - wall_before
    return steps * BATCH / wall, steps * BATCH / (cpu_s() - cpu_before)


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    raise SystemExit(main())
