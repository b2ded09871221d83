"""The process that owns the W&B client: it follows `metrics.jsonl` and copies every record (see `wandb`).

It reads messages from standard input, one JSON object per line: first the job, then `figure` and `finish`. The
end of the input means that the training has died; what the record has is still sent. On standard output go
`message`, `mode` and `run_id`; an empty object is a sign of life.

On a resume, W&B must end up with exactly the rows of `metrics.jsonl`: the rows that an earlier attempt logged
after the checkpoint have to go, and rows that were lost with a crash have to come. So the run continues after a
row that W&B certainly has, rewound to it if there are later ones, and everything after it is sent again from
the record.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jmvae_dist.errors import DataError
from jmvae_dist.tracking.jsonl import parse_record, read_records

EXIT_SERVICE_LOST = 3

_POLL_S = 0.25
_SIGN_OF_LIFE_S = 5.0
_FLUSH_S = 0.5
# The client writes its rows to disk every `_FLUSH_S` without telling; after this long they are taken as written.
_SAFE_AFTER_S = 5.0
_MAX_LINE_BYTES = 1 << 22


def redact(value: Any) -> Any:
    """Remove credentials from the URLs in nested settings: user:password@ and everything behind '?'."""
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    if isinstance(value, str) and "://" in value:
        value = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", value)
        return re.sub(r"(\w+://[^\s?]+)\?\S+", r"\1?***", value)
    return value


@dataclass
class CopyState:
    """What earlier attempts left behind, in `RUN/wandb/state.json`.

    Args:
        path: The file.
        mode: Mode of the attempt that wrote it.
        safe_step: Every row up to this step is in the client's own file; -1: none is certain.
        replaced_by: Run ids that could not be continued, and those that do it for them.
        superseded: Folders of offline attempts whose rows were sent again from the record: uploading them as
            well would duplicate those rows.
    """

    path: Path
    mode: str = ""
    safe_step: int = -1
    replaced_by: dict[str, str] = field(default_factory=dict)
    superseded: list[str] = field(default_factory=list)

    @staticmethod
    def load(path: Path) -> CopyState:
        state = CopyState(path)
        # A state that is missing or damaged makes the copy send more than it must, never less.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            stored = json.loads(path.read_bytes())
            replaced_by = {str(old): str(new) for old, new in stored["replaced_by"].items()}
            superseded = [str(name) for name in stored["superseded"]]
            state = CopyState(path, str(stored["mode"]), int(stored["safe_step"]), replaced_by, superseded)
        return state

    def save(self) -> None:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "path"}
        # Not flushed to the disk: a power loss leaves an older state or none, which is harmless.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values))
        os.replace(temporary, self.path)


class RecordFollower:
    """Reads the complete lines that were added to `metrics.jsonl` since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (offset of the line in the file, record)."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115 (closed below; the record may not exist yet)
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            while (line := file.readline()).endswith(b"\n"):
                offset, self._offset = self._offset, self._offset + len(line)
                # A damaged line stops the training's next resume with a clear error; it need not stop the copy.
                with contextlib.suppress(ValueError):
                    yield offset, parse_record(line)


class Client:
    """One attempt of a run in W&B."""

    def __init__(self, job: dict[str, Any], status: StatusPipe) -> None:
        self.job = job
        self.status = status
        self.directory = Path(job["directory"])
        self.state = CopyState.load(self.directory / "state.json")
        self.mode: Literal["online", "offline"] = job["mode"]
        self.run_id: str = self.state.replaced_by.get(job["run_id"], job["run_id"])
        # Rows up to this step stay as W&B has them.
        self.base_step = -1
        self.last_step = -1
        # W&B holds the row of the last step open until a later one comes; the rows before it are closed.
        self._closed_step = -1
        self._handed_over: deque[tuple[float, int]] = deque()
        self._noted_s = time.monotonic()
        self._run: Any = None

    # Connecting

    def connect(self) -> None:
        """Start or continue the run; offline when the server cannot be reached."""
        import wandb

        if self.mode == "online":
            try:
                self._connect_online()
            except Exception as error:
                # The service still holds the run that it could not start.
                wandb.teardown()
                self.mode, self.base_step = "offline", -1
                self.status.send(mode="offline", message=f"no connection ({_describe(error)}); recording offline")
        if self.mode == "offline":
            self._connect_offline()
        else:
            self._supersede(self._folders_to_upload())
        self.last_step = self._closed_step = self.base_step
        self.state.mode = self.mode
        self.state.safe_step = self.base_step
        self.state.save()
        self.status.send(run_id=self.run_id, mode=self.mode)
        if self.mode == "online":
            self.status.send(message=f"online at {self._run.url}")

    def _connect_online(self) -> None:
        resume_step = self.job["resume_step"]
        self._init(resume="allow")
        server_step = self._run.starting_step - 1
        if resume_step is None or server_step <= resume_step:
            self.base_step = server_step
            return
        self._run.finish()
        target = find_base_step(self._recorded_steps(), resume_step)
        if target is None:
            target = resume_step
        try:
            self._init(resume_from=f"{self.run_id}?_step={target}")
            self.base_step = target
        except ConnectionError:
            raise
        except Exception as error:
            self._continue_as_new_run(f"the server cannot rewind it: {_describe(error)}", resume="allow")

    def _connect_offline(self) -> None:
        resume_step = self.job["resume_step"]
        if resume_step is None or not list(self.directory.glob(f"*run-*-{self.run_id}*")):
            self._init()
            return
        steps = self._recorded_steps()
        # Without the server nobody knows how much of an online attempt has arrived: rely on its first row only.
        safe_step = self.state.safe_step if self.state.mode == "offline" else min(steps, default=-1)
        base_step = find_base_step(steps, min(resume_step, safe_step))
        if base_step is None:
            self._continue_as_new_run("no row of the previous attempt is certain to be in its file")
            return
        self.base_step = base_step
        self._init(resume_from=f"{self.run_id}?_step={base_step}")

    def _continue_as_new_run(self, reason: str, **arguments: Any) -> None:
        """A new run with the whole record, where going on with the old one would duplicate or lose rows."""
        old_id, old_folders = self.run_id, self._folders_to_upload()
        self.run_id = f"{self.job['run_id'].split('-')[0]}-{os.urandom(2).hex()}"
        try:
            self._init(notes=f"Has all rows of run {old_id} up to the step where it was resumed.", **arguments)
        except Exception:
            self.run_id = old_id
            raise
        self._supersede(old_folders)
        self.state.replaced_by |= {old_id: self.run_id, self.job["run_id"]: self.run_id}
        self.status.send(
            message=f"run {old_id} goes on as run {self.run_id}, which has all rows of the record ({reason}); "
            f"{old_id} can be deleted"
        )

    def _recorded_steps(self) -> list[int]:
        with contextlib.suppress(DataError):
            return [record["global_step"] for record in read_records(self.job["metrics_path"])]
        return []

    def _init(self, **arguments: Any) -> None:
        import wandb

        job = self.job
        if "resume_from" not in arguments:
            arguments["id"] = self.run_id
        self._run = wandb.init(
            project=job["project"],
            entity=job["entity"],
            name=job["name"],
            group=job["group"],
            tags=job["tags"],
            dir=str(self.directory.parent),
            config=job["config"],
            mode=self.mode,
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                program="jmvae-dist train",
                silent=True,
                init_timeout=job["init_timeout_s"],
                x_service_wait=job["init_timeout_s"],
                # Less than the training waits, so that the client ends in order rather than by force.
                finish_timeout=0.8 * job["finish_timeout_s"],
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=_FLUSH_S,
                # System metrics of the training, not of this process.
                x_stats_pid=job["trainer_pid"],
                x_stats_track_process_tree=True,
            ),
            **arguments,
        )
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    # Copying

    def log(self, offset: int, record: dict[str, Any]) -> None:
        """Send a record that starts at byte `offset` of `metrics.jsonl`, unless W&B has it."""
        step = record["global_step"]
        if step <= self.base_step and offset < self.job["known_bytes"]:
            return
        # An evaluation of the step that was resumed comes after W&B closed that step's row. It gets a row of
        # its own; the x axis is `global_step`, so it is drawn where it belongs.
        step = max(step, self.base_step + 1, self.last_step)
        self._send(record, step)

    def log_figure(self, name: str, path: str, global_step: int) -> None:
        import wandb

        try:
            image = wandb.Image(path)
        except Exception as error:
            self.status.send(message=f"figure {name} is left out ({_describe(error)})")
            return
        # W&B drops values for steps before the open row.
        step = max(global_step, self.base_step + 1, self.last_step)
        self._send({f"figures/{name}": image}, step)

    def _send(self, values: dict[str, Any], step: int) -> None:
        # The row stays open until a later step comes, so that everything about one step becomes one row.
        self._run.log(values, step=step)
        if step > self.last_step:
            self._closed_step, self.last_step = self.last_step, step
        self.note_progress()

    def note_progress(self) -> None:
        """Every few seconds: show that the client lives, and save how far its file certainly goes."""
        now = time.monotonic()
        if now - self._noted_s < _SIGN_OF_LIFE_S:
            return
        self._noted_s = now
        self.status.send()
        self._handed_over.append((now, self._closed_step))
        safe_step = self.state.safe_step
        while self._handed_over and now - self._handed_over[0][0] >= _SAFE_AFTER_S:
            safe_step = self._handed_over.popleft()[1]
        if safe_step != self.state.safe_step:
            self.state.safe_step = safe_step
            self.state.save()

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        self._run.summary.update(summary)
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self.status.send(
                message="not everything was uploaded within tracking.wandb.finish_timeout_s; to send the rest: "
                f"{_sync_command(Path(self._run.dir).parent, '--include-online ')}"
            )
            return
        self.state.safe_step = self.last_step
        self.state.save()
        if self.mode == "offline":
            commands = "".join(f"\n  {_sync_command(folder)}" for folder in self._folders_to_upload())
            self.status.send(message=f"to upload, run each command once, in this order:{commands}")

    def _folders_to_upload(self) -> list[Path]:
        """Folders of this run's offline attempts that are neither uploaded nor superseded, oldest first."""
        # A run that starts over leaves those of another W&B run behind, whose rows are in no record of this one.
        first_id = self.job["run_id"].split("-")[0]
        return [
            folder
            for folder in sorted(self.directory.glob(f"offline-run-*-{first_id}*"))
            if folder.name not in self.state.superseded and not list(folder.glob("*.wandb.synced"))
        ]

    def _supersede(self, folders: list[Path]) -> None:
        self.state.superseded += [folder.name for folder in folders]
        if folders:
            names = ", ".join(folder.name for folder in folders)
            self.status.send(message=f"do not upload {names}: those rows are sent from the record instead")


def find_base_step(recorded_steps: list[int], newest_step: int) -> int | None:
    """The step of `metrics.jsonl` to rewind to, when W&B certainly has all rows up to `newest_step`.

    It is the last but one of those that are not after `newest_step`: the last one is sent again, because a late
    evaluation of it may lie in a row of its own behind it. The only one, if there is one; None if there is none.
    """
    common = sorted({step for step in recorded_steps if step <= newest_step})
    return common[max(0, len(common) - 2)] if common else None


class StatusPipe:
    """Messages to the training process; they are dropped when it is gone."""

    def __init__(self, file_descriptor: int) -> None:
        self._file_descriptor = file_descriptor

    def send(self, **status: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(self._file_descriptor, json.dumps(status).encode() + b"\n")


class Messages:
    """Lines from standard input."""

    def __init__(self, file_descriptor: int) -> None:
        self._file_descriptor = file_descriptor
        self._buffer = b""
        self.ended = False

    def take(self, timeout_s: float | None) -> list[dict[str, Any]]:
        """The messages that arrive within `timeout_s`; returns with the first ones."""
        if not select.select([self._file_descriptor], [], [], timeout_s)[0]:
            return []
        data = os.read(self._file_descriptor, 65536)
        self.ended = not data
        self._buffer += data
        assert len(self._buffer) <= _MAX_LINE_BYTES, "a message of unreasonable size"
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]


def main() -> None:
    """Run until the training says `finish` or dies."""
    # The launcher's signals reach every process of a job step; the training decides what they mean.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    status = StatusPipe(os.dup(1))
    # What the client prints goes to the log file; standard output is for messages only.
    os.dup2(2, 1)
    messages = Messages(0)
    waiting: list[dict[str, Any]] = []
    while not waiting and not messages.ended:
        waiting = messages.take(None)
    if not waiting:
        return
    job, *waiting = waiting
    with _exclusive(Path(job["directory"]) / "lock", job["finish_timeout_s"]):
        try:
            client = Client(job, status)
            client.connect()
            _copy(client, messages, waiting)
        except ConnectionError as error:
            print(f"the W&B service process is gone: {error}", file=sys.stderr, flush=True)
            _exit(EXIT_SERVICE_LOST)
        except Exception as error:
            status.send(message=f"the client failed: {_describe(error)}")
            raise
    _exit(0)


def _copy(client: Client, messages: Messages, waiting: list[dict[str, Any]]) -> None:
    follower = RecordFollower(Path(client.job["metrics_path"]))
    while True:
        for offset, record in follower.read_new():
            client.log(offset, record)
        for message in waiting:
            if "figure" in message:
                client.log_figure(message["figure"], message["path"], message["global_step"])
        ending = [message for message in waiting if "finish" in message]
        # The end of the input comes late when a forked worker of the training still holds the pipe.
        orphaned = messages.ended or os.getppid() != client.job["trainer_pid"]
        if ending or orphaned:
            _limit_lifetime(client.job["finish_timeout_s"] + 5)
            # Records written between the look above and the end of the training.
            for offset, record in follower.read_new():
                client.log(offset, record)
            if ending:
                client.finish(ending[0]["finish"], ending[0]["exit_code"])
            else:
                client.finish({}, exit_code=1)
            return
        client.note_progress()
        waiting = messages.take(_POLL_S)


@contextlib.contextmanager
def _exclusive(path: Path, patience_s: float) -> Iterator[None]:
    """Wait for the client of an earlier attempt, which may still be sending what its training left behind."""
    with open(path, "w") as file:
        deadline_s = time.monotonic() + 2 * patience_s
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                # A file system without locks: nothing to wait for.
                break
        yield


def _limit_lifetime(seconds: float) -> None:
    """End this process after `seconds` whatever the client does: an orphan must not outlive its job."""
    timer = threading.Timer(seconds, _exit, args=(1,))
    timer.daemon = True
    timer.start()


def _exit(code: int) -> None:
    # Not through the exit hooks of the client, which wait for a service process that may hang or be gone.
    sys.stderr.flush()
    os._exit(code)


def _sync_command(folder: Path, options: str = "") -> str:
    return f"wandb sync {options}{shlex.quote(str(folder))}"


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
