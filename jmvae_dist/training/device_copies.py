"""Batches on a GPU: copied beside its kernels, into an amount of its memory that is known beforehand.

Written for CUDA, and not run on a GPU yet: `tests/unit/training/test_device_copies.py` runs it on streams made of
threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# The one in use, and the next one, which is copied meanwhile.
BATCHES_ON_DEVICE = 2


class Place:
    """Memory for one batch after the other.

    Args:
        shapes: By modality, of one sample.
        num_rows: Most samples of a batch.
        device: Where.
        stream: On which batches are copied into it; None: none are.

    Attributes:
        inputs: By modality, float32 (num_rows, *shape), undefined at first.
        rows: int64 (num_rows,), undefined at first.
        is_free: Whether all that uses what is in it has been launched.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], num_rows: int, device: torch.device, stream: Any = None
    ) -> None:
        self.stream = stream
        self.inputs = {
            name: torch.empty(num_rows, *shape, dtype=torch.float32, device=device) for name, shape in shapes.items()
        }
        self.rows = torch.empty(num_rows, dtype=torch.int64, device=device)
        self.is_free = True


class DeviceCopy:
    """A batch on its way to the device, or there.

    Attributes:
        inputs: By modality, float32 (B, *shape).
        rows: int64 (B,).
    """

    def __init__(
        self, copies: DeviceCopies, place: Place, inputs: dict[str, Tensor], rows: Tensor, copied: Any
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self._copies = copies
        self._place = place
        self._copied = copied

    def await_copy(self) -> None:
        """Let what is launched on the current stream from now on wait for the copy; the host does not wait."""
        self._copies.current_stream().wait_event(self._copied)

    def release(self) -> None:
        """All that uses the batch has been launched on the current stream.

        The host waits until the device is done with the batch before this one. Meanwhile the device has the step of
        this one to compute, in which the host launches the next: waiting costs nothing unless the host is the slower
        one of both, and then there is nothing to wait for.
        """
        self._copies.release(self._place)


class DeviceCopies:
    """Copies the batches of one rank to its device, from page-locked memory and on streams of its own.

    A host launches steps faster than a GPU takes them, up to the next one that is recorded. Each batch would have
    memory of its own for as long, on the device and page-locked on the host. So there are two places that all batches
    share, and the host is kept from being more than a step ahead (`DeviceCopy.release`). Each has a stream: on one
    for both, a batch that is read for longer than a step is launched would be copied after that step, not beside it.

    Args:
        shapes: By modality, of one sample.
        num_rows: Most samples of a batch.
        device: Of the rank.
        backend: What has the device's streams and events.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        num_rows: int,
        device: torch.device,
        backend: Any = torch.cuda,
    ) -> None:
        self.device = device
        self._backend = backend
        self._places: list[Place] = []
        for _ in range(BATCHES_ON_DEVICE):
            stream = backend.Stream(device)
            # Of the stream's own memory: once it is given back, only this stream's work can get it, and that begins
            # after the last use (`release`).
            with backend.stream(stream):
                self._places.append(Place(shapes, num_rows, device, stream))
        self._num_copied = 0
        self._used: Any = None

    def copy(self, inputs: Mapping[str, Tensor], rows: Tensor) -> DeviceCopy:
        """Begin to copy a batch; the one before the last must have been released.

        Args:
            inputs: By modality, float32 (B, *shape), page-locked.
            rows: int64 (B,), page-locked.
        """
        place = self._places[self._num_copied % BATCHES_ON_DEVICE]
        assert place.is_free, "the batch before the last one has not been released"
        place.is_free = False
        self._num_copied += 1
        with self._backend.stream(place.stream):
            copied_inputs = {
                name: place.inputs[name][: len(rows)].copy_(values, non_blocking=True)
                for name, values in inputs.items()
            }
            copied_rows = place.rows[: len(rows)].copy_(rows, non_blocking=True)
        return DeviceCopy(self, place, copied_inputs, copied_rows, place.stream.record_event())

    def release(self, place: Place) -> None:
        """See `DeviceCopy.release`."""
        # An event that does not spin: cores of the host have better things to do.
        used = self.current_stream().record_event(self._backend.Event(blocking=True))
        # On the device: the next copy into this place begins after its last use.
        place.stream.wait_event(used)
        place.is_free = True
        before, self._used = self._used, used
        if before is not None:
            before.synchronize()

    def device_chosen(self) -> AbstractContextManager[Any]:
        """What concerns the current device concerns this one inside of it."""
        chosen: AbstractContextManager[Any] = self._backend.device(self.device)
        return chosen

    def current_stream(self) -> Any:
        """The stream on which this thread launches kernels of the device."""
        return self._backend.current_stream(self.device)


def make_places(shapes: Mapping[str, tuple[int, ...]], num_rows: int, device: torch.device) -> list[Place]:
    """As much memory as batches take on a device."""
    return [Place(shapes, num_rows, device) for _ in range(BATCHES_ON_DEVICE)]
