"""How `benchmarks/data.py` reads the same samples with other libraries; each is optional.

Every function yields batches without end, each as float32 images (B, C, H, W) in 0..1 and labels (B,), like ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Samples:
    """One data set in every form that is read here.

    Attributes:
        name: of the data set.
        shards: tars, with their numbers of samples.
        extension: of the image in the tars: `image.npy`, `png` or `jpg`.
        label_extension: of the label in the tars.
        folder: where other forms are written.
        images: the content of the images: uint8 arrays (N, C, H, W), or files.
        labels: int64 (N,).
        channels: C.
    """

    name: str
    shards: Sequence[tuple[Path, int]]
    extension: str
    label_extension: str
    folder: Path
    images: Any
    labels: np.ndarray
    channels: int

    @property
    def is_array(self) -> bool:
        """Whether the images are arrays, not files to be decoded."""
        return isinstance(self.images, np.ndarray)


def decode_picture(content: bytes, channels: int) -> np.ndarray:
    """A PNG or JPEG as float32 (C, H, W) in 0..1."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_float(images: Any) -> torch.Tensor:
    """A batch of arrays as float32 in 0..1, if it is not yet."""
    tensor = torch.as_tensor(images)
    return tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32) / 255


def _batches(loader: Any) -> Batches:
    while True:
        for images, labels in loader:
            yield _to_float(images), torch.as_tensor(labels)


# webdataset and wids read our tars


def webdataset(samples: Samples, batch: int, workers: int) -> Batches:
    """The pipeline of its documentation, in stored order, on our tars."""
    urls = [str(path) for path, _ in samples.shards]
    return _webdataset(urls, samples, samples.extension, samples.label_extension, batch, workers)


def webdataset_with_its_tars(samples: Samples, batch: int, workers: int) -> Batches:
    """The same on tars as its own writer makes them, with a PAX header for every member."""
    import webdataset as wds

    folder, size = samples.folder / "webdataset", samples.shards[0][1]
    extension = "npy" if samples.is_array else samples.extension
    if not folder.exists():
        folder.mkdir()
        with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=size, verbose=0) as writer:
            for number, (image, label) in enumerate(zip(samples.images, samples.labels.tolist(), strict=True)):
                writer.write({"__key__": f"{number:08d}", extension: image, "cls": label})
    return _webdataset(sorted(map(str, folder.iterdir())), samples, extension, "cls", batch, workers)


def _webdataset(
    urls: Sequence[str], samples: Samples, extension: str, label_extension: str, batch: int, workers: int
) -> Batches:
    import webdataset as wds

    dataset = wds.WebDataset(list(urls), shardshuffle=False)
    # Its own handler decodes pictures with Pillow, too.
    pictures = "torchrgb" if samples.channels == 3 else "torchl"
    dataset = dataset.decode() if samples.is_array else dataset.decode(pictures)
    dataset = dataset.to_tuple(extension, label_extension).batched(batch, partial=False)
    return _batches(DataLoader(dataset, batch_size=None, num_workers=workers))


def wids(samples: Samples, batch: int, workers: int) -> Batches:
    """Its random access to local tars, with its own sampler."""
    import wids as library

    image, label = f".{samples.extension}", f".{samples.label_extension}"

    def convert(sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        content = sample[image].getvalue()
        if samples.is_array:
            return np.load(io.BytesIO(content)), int(sample[label].getvalue())
        return decode_picture(content, samples.channels), int(sample[label].getvalue())

    shards = [{"url": str(path), "nsamples": count} for path, count in samples.shards]
    dataset = library.ShardListDataset(shards, transformations=[convert], keep=True)
    sampler = library.ChunkedSampler(dataset, shuffle=True)
    return _batches(DataLoader(dataset, batch, sampler=sampler, num_workers=workers, drop_last=True))


# The others read forms of their own


def tensors_in_memory(samples: Samples, batch: int, workers: int) -> Batches:
    """float32 tensors of the whole data set in memory, shuffled."""
    images = torch.from_numpy(samples.images.astype(np.float32) / 255)
    dataset = TensorDataset(images, torch.from_numpy(samples.labels))
    return _batches(DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True))


def litdata(samples: Samples, batch: int, workers: int) -> Batches:
    """Its chunks, shuffled."""
    import litdata as library

    folder = samples.folder / "litdata"
    if not folder.exists():
        writer_folder = folder.with_name("litdata.part")
        from litdata.streaming.writer import BinaryWriter

        writer_folder.mkdir()
        writer = BinaryWriter(str(writer_folder), chunk_bytes="64MB")
        for number, (image, label) in enumerate(zip(samples.images, samples.labels.tolist(), strict=True)):
            writer[number] = {"image": image, "label": label}
        writer.done()
        writer.merge()
        writer_folder.rename(folder)

    class Pictures(library.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            image = sample["image"] if samples.is_array else decode_picture(sample["image"], samples.channels)
            return image, sample["label"]

    dataset = Pictures(str(folder), shuffle=True, drop_last=True)
    return _batches(library.StreamingDataLoader(dataset, batch_size=batch, num_workers=workers))


def streaming(samples: Samples, batch: int, workers: int) -> Batches:
    """mosaicml-streaming's shards, shuffled."""
    import streaming as library

    folder = samples.folder / "mds"
    if not folder.exists():
        columns = {"image": "ndarray" if samples.is_array else "bytes", "label": "int"}
        with library.MDSWriter(out=str(folder), columns=columns) as writer:
            for image, label in zip(samples.images, samples.labels.tolist(), strict=True):
                writer.write({"image": image, "label": label})

    class Pictures(library.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            image = sample["image"] if samples.is_array else decode_picture(sample["image"], samples.channels)
            return image, sample["label"]

    library.base.util.clean_stale_shared_memory()
    dataset = Pictures(local=str(folder), shuffle=True, batch_size=batch)
    return _batches(DataLoader(dataset, batch_size=batch, num_workers=workers, drop_last=True))


RIVALS: dict[str, Callable[[Samples, int, int], Batches]] = {
    "webdataset": webdataset,
    "webdataset, its tars": webdataset_with_its_tars,
    "wids": wids,
    "TensorDataset": tensors_in_memory,
    "litdata": litdata,
    "mosaicml-streaming": streaming,
}
