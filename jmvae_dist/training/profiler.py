"""A window of steps in torch's profiler, and its Chrome trace (`training.profile_steps`)."""

from __future__ import annotations

import atexit
import faulthandler
import gzip
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

from jmvae_dist.distributed.runtime import Runtime
from jmvae_dist.errors import StopRequested, is_on_all_ranks
from jmvae_dist.files import writing_atomic

logger = logging.getLogger(__name__)

# Level 1 of 9 makes a tenth of the size; more costs time in which the run waits.
_COMPRESSION = 1
# A process that is to end does so after this long at the latest, though a GPU may never finish what is queued.
_ENDING_S = 10.0


class StepProfiler:
    """Records the steps of a window on every rank, each into a file of its own.

    It reads clocks and changes no number. What goes wrong with it is a warning: the run goes on without a trace.

    Args:
        steps: First and last step of the window, as records number them; None records nothing.
        folder: Where the traces go.
        runtime: Process group and device.
        enter: Called before it does something that takes time, and that no limit is meant for.
    """

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, runtime: Runtime, enter: Callable[[], None]
    ) -> None:
        self._steps = steps
        self._folder = folder
        self._runtime = runtime
        self._enter = enter
        self._profile: profile | None = None
        # Number of the first recorded step; None outside of the window. Equal on all ranks, unlike what goes wrong.
        self._first: int | None = None
        self._global_step = 0

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is None:
            return
        if error is None or is_on_all_ranks(error):
            self._end(is_wanted=error is None or isinstance(error, StopRequested))
        else:
            self._leave_running()

    def before_step(self, global_step: int) -> None:
        """So many steps are finished, and another one begins: begin the window with it, if it is in it.

        Called by all ranks.
        """
        self._global_step = global_step
        if self._steps is not None and self._first is None and self._steps[0] <= global_step + 1 <= self._steps[1]:
            self._begin()

    def after_step(self, global_step: int) -> bool:
        """So many steps are finished: end the window, if this was its last step; whether it was ended.

        Called by all ranks, before anything that is not a step.
        """
        self._global_step = global_step
        if self._steps is None or self._first is None or global_step < self._steps[1]:
            return False
        self._end(is_wanted=True)
        # Ranks that are done with their files must not be seen to wait in the next step for those that are not.
        self._runtime.collectives.gather(None)
        return True

    def _begin(self) -> None:
        self._enter()
        self._first = self._global_step + 1
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True)
        try:
            self._profile.start()
        except RuntimeError as error:
            self._profile = None
            logger.warning("training.profile_steps: torch's profiler does not start (%s)", error)

    def _end(self, is_wanted: bool) -> None:
        assert self._first is not None
        self._enter()
        if self._profile is not None:
            # Outside of what is a mere warning: an error of a step on the device shows here.
            self._runtime.wait_for_device()
        first, last, ended = self._first, self._global_step, self._profile
        self._first, self._profile = None, None
        if ended is None:
            return
        path = self._folder / f"steps-{first:08d}-{last:08d}-rank{self._runtime.process.rank}.json.gz"
        try:
            ended.stop()
            if not is_wanted or last < first:
                return
            _write(ended, path)
        except (OSError, RuntimeError) as error:
            logger.warning("training.profile_steps: the trace %s cannot be written (%s)", path, error)
            return
        logger.info(
            "profiled steps %d to %d: %s (one file per rank; open it in ui.perfetto.dev or chrome://tracing)",
            *(first, last, path),
        )

    def _leave_running(self) -> None:
        """This rank fails alone: it was last seen where it failed, and to stop is to wait for a device that may hang.

        A process that ends while torch's profiler runs crashes: it is stopped last of all.
        """
        if self._profile is not None:
            atexit.register(_stop_in_any_case, self._profile)
        self._first, self._profile = None, None


def _stop_in_any_case(running: profile) -> None:
    faulthandler.dump_traceback_later(_ENDING_S, exit=True)
    running.stop()
    faulthandler.cancel_dump_traceback_later()


def _write(ended: profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=path.parent) as folder:
        plain = Path(folder) / "trace.json"
        ended.export_chrome_trace(str(plain))
        with (
            plain.open("rb") as source,
            writing_atomic(path) as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_COMPRESSION) as target,
        ):
            shutil.copyfileobj(source, target)
