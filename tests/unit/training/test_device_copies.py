"""Batches share two places of a device: none is written over before its step is done, and the host cannot run away.

There is no GPU here. The streams are threads, which take what is launched one after the other and late.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from jmvae_dist.data.loader import Batch
from jmvae_dist.training.batches import CheckedBatches
from jmvae_dist.training.device_copies import BATCHES_ON_DEVICE, DeviceCopies
from jmvae_dist.training.ready_batches import Preparation, ReadyBatches
from jmvae_dist.training.setup import ResolvedRun
from tests.unit.training.test_ready_batches import LIKELIHOODS, loader_of
from tests.unit.training.test_setup import resolve

CPU = torch.device("cpu")
DEADLINE_S = 60.0
STEPS = 12
# Steps take so long that whatever does not wait for them comes before their end.
STEP_S = 0.01


class Event:
    """Is done when the stream has come to where it was recorded; at once if it was recorded nowhere."""

    def __init__(self, blocking: bool = False) -> None:
        self.done = threading.Event()
        self.done.set()

    def synchronize(self) -> None:
        assert self.done.wait(DEADLINE_S)


class Stream:
    """Takes what is launched on it in order, in a thread."""

    def __init__(self, device: torch.device) -> None:
        self.recorded: list[Event] = []
        self.awaited: list[Event] = []
        self._work: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def launch(self, kernel: Callable[[], Any]) -> None:
        self._work.put(kernel)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.done.clear()
        self.recorded.append(event)
        self.launch(event.done.set)
        return event

    def wait_event(self, event: Event) -> None:
        self.awaited.append(event)
        self.launch(event.synchronize)

    def drain(self) -> None:
        """Wait for all that has been launched."""
        drained = threading.Event()
        self.launch(drained.set)
        assert drained.wait(DEADLINE_S)

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(DEADLINE_S)

    def _run(self) -> None:
        while (kernel := self._work.get()) is not None:
            kernel()


class Device:
    """What `torch.cuda` is to a GPU."""

    Event = Event

    def __init__(self) -> None:
        self.steps = Stream(CPU)
        self.copies: list[Stream] = []

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802  # as torch calls it
        self.copies.append(Stream(device))
        return self.copies[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """What torch copies inside has to come after what was launched on the stream before."""
        stream.drain()
        yield

    def current_stream(self, device: torch.device) -> Stream:
        return self.steps

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    for stream in (device.steps, *device.copies):
        stream.end()


def copies_of(run: ResolvedRun, device: Device) -> DeviceCopies:
    assert run.model_config.input_dims is not None
    return DeviceCopies(run.model_config.input_dims, 64, CPU, backend=device)


def batches_of(run: ResolvedRun) -> Generator[Batch, None, None]:
    """Of steps in which samples are masked, among them all of one step."""
    for batch in loader_of(run).iterate(0, STEPS):
        if batch.global_step in (2, 3):
            batch.inputs["image"][5] = -1.0
        if batch.global_step == 6:
            batch.inputs["image"][:] = -1.0
        yield batch


@pytest.mark.parametrize("interrupt", [lambda: None, None], ids=["thread", "no-thread"])
def test_steps_get_their_batches_and_the_host_stays_close(
    digits: Path, device: Device, interrupt: Callable[[], None] | None
) -> None:
    run = resolve(digits, "--data.on_bad_sample", "mask")
    expected = list(CheckedBatches(batches_of(run), run, LIKELIHOODS, range(64)))
    checked = CheckedBatches(batches_of(run), run, LIKELIHOODS, range(64))
    prepare = Preparation(run, copies_of(run, device))
    seen: list[dict[str, Tensor]] = []
    places = set()

    def take_step(values: dict[str, Tensor]) -> None:
        time.sleep(STEP_S)
        seen.append({name: tensor.clone() for name, tensor in values.items()})

    with contextlib.closing(ReadyBatches(checked, prepare, interrupt)) as batches:
        for number, batch in enumerate(batches):
            assert (batch.global_step, batch.noise) == (number, None)
            values = {**batch.inputs, "rows": batch.rows}
            places.add(tuple(tensor.untyped_storage().data_ptr() for tensor in values.values()))
            device.steps.launch(lambda values=values: take_step(values))
            batch.release()
            assert len(seen) >= number  # only the step of this batch may be left
    device.steps.drain()
    copied = [device.copies[step % BATCHES_ON_DEVICE].recorded[step // BATCHES_ON_DEVICE] for step in range(STEPS)]
    assert device.steps.awaited == copied  # that each copy is complete
    assert [len(values["rows"]) for values in seen] == [64, 64, 63, 63, 64, 64, 0, *[64] * 5]
    assert len(places) == BATCHES_ON_DEVICE
    for values, batch in zip(seen, expected, strict=True):
        assert torch.equal(values.pop("rows"), batch.rows)
        assert values.keys() == batch.inputs.keys()
        assert all(torch.equal(values[name], batch.inputs[name]) for name in values)


def test_a_batch_that_is_in_use_is_not_written_over(digits: Path, device: Device) -> None:
    run = resolve(digits)
    copies, batch = copies_of(run, device), next(loader_of(run).iterate(0, 1))
    first = copies.copy(batch.inputs, batch.rows)
    copies.copy(batch.inputs, batch.rows)
    with pytest.raises(AssertionError, match="has not been released"):
        copies.copy(batch.inputs, batch.rows)
    first.release()
    third = copies.copy(batch.inputs, batch.rows)
    assert third.rows.data_ptr() == first.rows.data_ptr()


def test_a_batch_that_comes_after_a_step_was_launched_is_copied_beside_it(digits: Path, device: Device) -> None:
    run = resolve(digits)
    copies, batch = copies_of(run, device), next(loader_of(run).iterate(0, 1))
    done = threading.Event()
    first = copies.copy(batch.inputs, batch.rows)
    first.await_copy()
    device.steps.launch(done.wait)
    try:
        first.release()
        second = copies.copy(batch.inputs, batch.rows)
    finally:
        done.set()
    assert torch.equal(second.rows, batch.rows)


def test_a_batch_can_be_used_and_released_again_while_no_other_comes(digits: Path, device: Device) -> None:
    """As `bench step` takes steps with the last one."""
    run = resolve(digits)
    copies, batch = copies_of(run, device), next(loader_of(run).iterate(0, 1))
    copy = copies.copy(batch.inputs, batch.rows)
    for _ in range(3):
        copy.await_copy()
        copy.release()
    assert torch.equal(copy.rows, batch.rows)
