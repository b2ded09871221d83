"""Weights & Biases (W&B) as a copy of `metrics.jsonl` that cannot stop, delay or outlive the training.

The W&B client runs in a process of its own (`wandb_process`), which follows `metrics.jsonl` and copies every new
record. The training process only writes small messages to a pipe that never blocks. So a client that hangs,
fails or dies costs the training nothing; when the *training* is killed, the client still copies what the record
has; and when both are killed, the next attempt sends what W&B lacks.

This module decides the mode, starts and watches that process, and ends it in bounded time. It does not import
wandb.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import logging
import netrc
import os
import secrets
import select
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from jmvae_dist.config import WandbSection
from jmvae_dist.tracking.wandb_process import EXIT_SERVICE_LOST, redact

WandbMode = Literal["online", "offline", "disabled"]

_DEFAULT_BASE_URL = "https://api.wandb.ai"
_MAX_RESTARTS = 3
_SILENCE_S = 120.0
# A message that the client did not take yet waits here; a client that takes none at all must not fill the memory.
_MAX_UNSENT_BYTES = 1 << 20
# They would make the client join another service, or contradict the id and mode that are decided here.
_DROPPED_VARIABLES = (
    "WANDB_SERVICE",
    "WANDB_DIR",
    "WANDB_FORK_FROM",
    "WANDB_MODE",
    "WANDB_RESUME",
    "WANDB_RESUME_FROM",
    "WANDB_RUN_ID",
)


class WandbTracker:
    """Copies the records of `run_dir/metrics.jsonl` to W&B, from rank 0.

    Construct it after `MetricsLog`, which rewinds the record that is copied. No method raises because of W&B or
    waits for it, except `finish`, which waits at most `section.finish_timeout_s`. Trouble is said once.

    Args:
        section: The settings.
        run_dir: Run directory; the client's files go to `run_dir/wandb`.
        run_id: W&B id of the run, from the checkpoint that is resumed; None: a new one.
        config: The resolved configuration, shown in W&B. Credentials in URLs are removed.
        resume_step: Global step of the checkpoint that is resumed; None: the run starts, under a new id.
        run_name: Display name unless `section.name` is set.
        message: Prints one line for the user; by default a warning of the logger `jmvae_dist.tracking`.

    Attributes:
        run_id: W&B id of the run, to be stored in checkpoints. It changes only when the server cannot rewind
            the run on a resume and the run is continued under a new id.
        mode: online, offline or disabled. It turns offline when the server does not answer, and disabled when
            the client is given up.
    """

    def __init__(
        self,
        section: WandbSection,
        *,
        run_dir: Path,
        run_id: str | None,
        config: dict[str, Any],
        resume_step: int | None,
        run_name: str,
        message: Callable[[str], None] | None = None,
    ) -> None:
        self._section = section
        self._message = message or logging.getLogger("jmvae_dist.tracking").warning
        self._directory = Path(run_dir).absolute() / "wandb"
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent = b""
        self._received = b""
        self._restarts = 0
        self._silence_reported = False
        self._last_step = resume_step or 0
        is_new = run_id is None or resume_step is None
        self.run_id = _make_run_id() if run_id is None or is_new else run_id
        self.mode: WandbMode = resolve_mode(section.mode, self._message)
        self._job: dict[str, Any] = {
            "metrics_path": str(self._directory.parent / "metrics.jsonl"),
            "directory": str(self._directory),
            "trainer_pid": os.getpid(),
            "project": section.project,
            "entity": section.entity,
            "name": section.name or run_name,
            "group": section.group,
            "tags": section.tags,
            "config": redact(config),
            "init_timeout_s": section.init_timeout_s,
            "finish_timeout_s": section.finish_timeout_s,
        }
        if self.mode != "disabled":
            self._start(resume_step=None if is_new else resume_step)

    def log(self, record: dict[str, Any]) -> None:
        """Note that `record` is in `metrics.jsonl`, from where the client reads it; takes microseconds."""
        self._last_step = record["global_step"]
        self._watch()

    def log_figures(self, global_step: int, figures: dict[str, Path]) -> None:
        """Send pictures (PNG files, by name); they appear at `global_step` or at the next logged step."""
        for name, path in figures.items():
            self._send({"figure": name, "path": str(Path(path).absolute()), "global_step": global_step})
        self._watch()

    def finish(self, summary: dict[str, Any] | None = None, exit_code: int = 0) -> None:
        """Send the rest and end the client, within `finish_timeout_s`; further calls do nothing.

        Args:
            summary: Final values, shown in the table of runs.
            exit_code: 0 marks the run as finished, anything else as failed.
        """
        if self._process is None:
            return
        deadline_s = time.monotonic() + self._section.finish_timeout_s
        self._send({"finish": redact(summary or {}), "exit_code": exit_code})
        while self._process is not None and time.monotonic() < deadline_s:
            self._flush()
            self._watch(restart=False)
            time.sleep(0.02)
        if self._process is not None:
            self._kill()
            self._give_up(f"did not finish within tracking.wandb.finish_timeout_s={self._section.finish_timeout_s:g}")

    def _start(self, resume_step: int | None) -> None:
        metrics_path = Path(self._job["metrics_path"])
        known_bytes = metrics_path.stat().st_size if metrics_path.exists() else 0
        job = {**self._job, "run_id": self.run_id, "mode": self.mode, "resume_step": resume_step}
        job["known_bytes"] = known_bytes if resume_step is not None else 0
        environment = {name: value for name, value in os.environ.items() if name not in _DROPPED_VARIABLES}
        # The parent's import path, so that both processes run the same code wherever it is installed.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        # Without these the client writes to the home directory, which may be full, shared or missing on a node.
        for name in ("CACHE", "DATA", "ARTIFACT"):
            environment[f"WANDB_{name}_DIR"] = str(self._directory / name.lower())
        # Crash reports to W&B's own telemetry: they delay a failing start, and nobody asked for them.
        environment["WANDB_ERROR_REPORTING"] = "false"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(self._directory / "client.log", "ab") as log_file:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", "from jmvae_dist.tracking.wandb_process import main; main()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    env=environment,
                    # With "-c" the working directory comes first on the import path: not one that a user writes to.
                    cwd="/",
                    # Ctrl-C is for the training, which then tells the client.
                    start_new_session=True,
                )
        except OSError as error:
            self._give_up(f"cannot start: {error}")
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._unsent, self._received = b"", b""
        self._last_sign_s = time.monotonic()
        self._send(job)

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, default=str).encode() + b"\n"
        if len(self._unsent) + len(line) <= _MAX_UNSENT_BYTES:
            self._unsent += line
        self._flush()

    def _flush(self) -> None:
        if self._process is None or not self._unsent:
            return
        assert self._process.stdin is not None
        # A full pipe keeps the rest for the next call; a closed one means that the process ended, which
        # `_watch` reports.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            sent = os.write(self._process.stdin.fileno(), self._unsent)
            self._unsent = self._unsent[sent:]

    def _watch(self, restart: bool = True) -> None:
        """Take the client's messages; notice that it ended or went silent."""
        if self._process is None:
            return
        self._flush()
        exit_code = self._process.poll()
        self._receive()
        if exit_code is not None:
            self._reap(exit_code, restart)
            return
        silence_s = time.monotonic() - self._last_sign_s
        # While it connects it cannot answer: at worst it waits for the server twice before it goes offline.
        if silence_s > _SILENCE_S + 2 * self._section.init_timeout_s and not self._silence_reported:
            self._silence_reported = True
            self._message(f"W&B: the client has not answered for {silence_s:.0f} s; training goes on without it")

    def _receive(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], 0)[0]:
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                break
            self._received += data
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            status = json.loads(line)
            self._last_sign_s = time.monotonic()
            if self._silence_reported:
                self._silence_reported = False
                self._message("W&B: the client answers again")
            self.run_id = status.get("run_id", self.run_id)
            self.mode = status.get("mode", self.mode)
            if "message" in status:
                self._message(f"W&B: {status['message']}")

    def _reap(self, exit_code: int, restart: bool) -> None:
        self._close_pipes()
        if exit_code == 0:
            return
        if exit_code == EXIT_SERVICE_LOST and restart and self._restarts < _MAX_RESTARTS:
            self._restarts += 1
            self._message("W&B: its service process died; starting it again, nothing is lost")
            self._start(resume_step=self._last_step or None)
            return
        reason = "service process died" if exit_code == EXIT_SERVICE_LOST else f"client ended with code {exit_code}"
        self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self.mode = "disabled"
        self._message(
            f"W&B: {reason}; going on without it. {self._job['metrics_path']} has every record, and a resumed run "
            f"sends what is missing (details: {self._directory / 'client.log'})"
        )

    def _kill(self) -> None:
        assert self._process is not None
        import psutil

        # The service process usually follows its parent, but not when it is the one that hangs.
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.kill()
        # A process that waits for a hung disk does not even die of SIGKILL; do not wait with it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        self._close_pipes()

    def _close_pipes(self) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process = None


def resolve_mode(configured: str, message: Callable[[str], None]) -> WandbMode:
    """The mode to use: `auto` follows WANDB_MODE, and without it is online exactly where a key is configured.

    Args:
        configured: auto, online, offline or disabled.
        message: Is told why the mode is not the one that was asked for.
    """
    mode = configured if configured != "auto" else os.environ.get("WANDB_MODE") or "auto"
    modes: dict[str, WandbMode] = {
        "auto": "online",
        "online": "online",
        "run": "online",
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "disabled",
    }
    if mode not in modes:
        message(f"W&B: WANDB_MODE={mode!r} is none of online, offline, disabled; recording offline")
        mode = "offline"
    if modes[mode] == "disabled":
        return "disabled"
    try:
        has_key = has_credentials()
    except ValueError as error:
        message(f"W&B: {error}; the client cannot start with it, going on without W&B")
        return "disabled"
    if modes[mode] == "online" and not has_key:
        if mode != "auto":
            message("W&B: online, but no API key is configured (WANDB_API_KEY or `wandb login`); recording offline")
        return "offline"
    return modes[mode]


def has_credentials() -> bool:
    """Whether the W&B client would find a key: in the environment, or in netrc for the configured server.

    Raises:
        ValueError: The server's address or the netrc file is such that the client fails on it, even offline.
    """
    base_url = server_url()
    try:
        host = urlsplit(base_url).netloc
    except ValueError as error:
        raise ValueError(f"WANDB_BASE_URL={redact(base_url)!r} is not a URL ({error})") from None
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    candidates = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    for path in candidates:
        # An unreadable or malformed file is one without a key; no home directory is a RuntimeError.
        with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
            try:
                found = netrc.netrc(str(path.expanduser())).authenticators(host)
            except UnicodeDecodeError:
                raise ValueError(f"{path} (NETRC) is not a text file") from None
            if found is not None and found[2]:
                return True
    return False


def server_url() -> str:
    """Address of the W&B server in use: WANDB_BASE_URL, else W&B's own settings file, else the public server."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, RuntimeError, configparser.Error, UnicodeDecodeError):
        directory = os.environ.get("WANDB_CONFIG_DIR") or Path("~/.config/wandb").expanduser()
        settings.read(Path(directory) / "settings")
    return settings.get("default", "base_url", fallback=_DEFAULT_BASE_URL)


def _make_run_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
