"""A real Slurm cluster on this machine for tests, and runs that are submitted to it as a user submits them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, Run, launch_environment

HERE = Path(__file__).parent
MINI_SLURM = HERE / "mini-slurm"
_TIMEOUT_S = 180.0
_POLL_S = 0.2


def why_not() -> str | None:
    """Why no cluster can be made here, or None."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root, for namespaces and slurmd"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if shutil.which("slurmctld", path=path) is None or shutil.which("munged", path=path) is None:
        return "needs Slurm: sudo bash tests/slurm/mini-slurm install (Debian, Ubuntu)"
    return None


@dataclass
class Cluster:
    """A cluster of some nodes; every method is what a user or an accident does to it.

    Args:
        folder: Run directory of the cluster.
        num_nodes: Its nodes, node1, node2, ...
    """

    folder: Path
    num_nodes: int

    def mini_slurm(self, *arguments: str) -> None:
        """Run a subcommand of `mini-slurm`."""
        environment = {
            **os.environ,
            "MINI_SLURM_DIR": str(self.folder),
            "MINI_SLURM_NODE_TIMEOUT": "5",
        }
        result = subprocess.run(
            ["bash", str(MINI_SLURM), *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def command(self, *arguments: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, from the repository."""
        environment = {**launch_environment(), **(more or {})}
        environment["PATH"] = f"{self.folder}/bin:{environment['PATH']}"
        return subprocess.run(
            arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def ask(self, *arguments: str) -> str:
        """Output of one of Slurm's commands, which must succeed."""
        result = self.command(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", job_id, "-o")))

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = _TIMEOUT_S) -> str:
        """Wait until the job is in one of the states, and return it."""
        wait_until(lambda: self.job(job_id)["JobState"] in states, f"job {job_id} in {states}", timeout_s)
        return self.job(job_id)["JobState"]

    def describe(self) -> str:
        """Its nodes, its jobs and the end of what its controller has logged: for the report of a failed test."""
        pages = [self.command("sinfo", "-N", "-l").stdout, self.command("scontrol", "show", "job", "-o").stdout]
        log = (self.folder / "log" / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join([*pages, *log[-150:]])

    def preempt_all(self) -> None:
        """Run a job on all nodes that pushes out those of others."""
        options = ("--partition=urgent", f"--nodes={self.num_nodes}", "--exclusive", "--output=/dev/null")
        self.finish(self.ask("sbatch", "--parsable", *options, "--wrap=sleep 1").strip())

    def finish(self, job_id: str, state: str = "COMPLETED", timeout_s: float = _TIMEOUT_S) -> None:
        """Wait for the job's end, which must be the given one, and for its processes to go."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        final = self.wait_for_state(job_id, *ended, timeout_s=timeout_s)
        assert final == state, self.ask("scontrol", "show", "job", job_id)
        wait_until(lambda: self.ask("squeue", "-h", "-j", job_id) == "", f"job {job_id} gone", 30)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Poll until `condition` holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(_POLL_S)


@dataclass
class SlurmRun(Run):
    """A run whose ranks note every sample they train on.

    Args:
        cluster: Where it is submitted.
        site: Lines of its `site.env`, beside the interpreter.
    """

    cluster: Cluster = field(kw_only=True)
    site: list[str] = field(default_factory=list)

    @property
    def audit_dir(self) -> Path:
        """Where the notes are."""
        return self.output_dir.with_name(f"{self.output_dir.name}-audit")

    def environment(self) -> dict[str, str]:
        """What the user's shell has exported."""
        self.audit_dir.mkdir(exist_ok=True)
        if not (self.audit_dir / "pace").exists():
            self.set_pace(0.0)
        python = self.audit_dir / "python"
        python.write_text(
            f'#!/usr/bin/env bash\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
            f'shift 2\nexec {sys.executable} {HERE}/audited_train.py "$@"\n'
        )
        python.chmod(0o755)
        site = self.audit_dir / "site.env"
        site.write_text("\n".join([f"PYTHON={python}", *self.site]) + "\n")
        return {"JMVAE_DIST_SITE": str(site), "AUDIT_DIR": str(self.audit_dir)}

    def set_pace(self, step_s: float) -> None:
        """Let every step take longer by this."""
        path = self.audit_dir / "pace.tmp"
        path.write_text(str(step_s))
        path.replace(self.audit_dir / "pace")

    def submit(self, *options: str, script: str = "train.sbatch", arguments: list[str] | None = None) -> str:
        """Submit the script and return the job's id."""
        words = self.sbatch_arguments() if arguments is None else arguments
        result = self.cluster.command(
            *("sbatch", "--parsable", f"--output={self.log}", *options, f"slurm/{script}", *words),
            more=self.environment(),
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def sbatch_arguments(self) -> list[str]:
        """The configuration and its overrides, as `train.sbatch` takes them."""
        words = self.arguments()
        assert words[0] == "--config"
        return words[1:]

    @property
    def log(self) -> Path:
        """The jobs' log, of all attempts."""
        return self.audit_dir / "slurm.out"

    def wait_for_step(self, global_step: int, timeout_s: float = 90.0) -> None:
        """Wait until rank 0 has taken this many steps."""
        wait_until(lambda: self.steps_noted() >= global_step, f"step {global_step}", timeout_s)

    def steps_noted(self) -> int:
        """The number of steps that rank 0 has taken by its last note."""
        path = self.audit_dir / "rank-0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] + 1 if lines else 0

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one rank, whatever its node."""
        entry = f"SLURM_PROCID={rank}".encode()
        (process,) = (
            pid
            for pid, command in processes_with(str(self.output_dir)).items()
            if "audited_train.py train" in command and entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )
        os.kill(process, signal.SIGKILL)

    def attempts(self) -> list[dict[str, Any]]:
        """Ends of the attempts, as the batch script noted them."""
        lines = (self.output_dir / "slurm" / "attempts.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == "end"]

    def tail(self) -> str:
        """The end of the log, for messages."""
        return self.log.read_text()[-3000:] if self.log.exists() else "(no log)"

    def samples_by_step(self, notes: Path) -> dict[int, list[int]]:
        """The samples of each global batch, in the order of its rows; a step taken again counts as it ended."""
        rows: dict[int, dict[int, int]] = {}
        for path in notes.glob("rank-*.jsonl"):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                rows.setdefault(entry["step"], {}).update(zip(entry["rows"], entry["samples"], strict=True))
        return {step: [by_row[row] for row in sorted(by_row)] for step, by_row in sorted(rows.items())}

    def assert_every_sample_once_per_epoch(self, notes: Path | None = None) -> None:
        """No sample was lost, and none was seen twice before all others were seen; `notes`: a folder of them."""
        expected = Counter(samples_of(self.digits / "train" / "manifest.json"))
        batches = self.samples_by_step(notes or self.audit_dir)
        assert list(batches) == list(range(len(batches)))
        seen: Counter[int] = Counter()
        for step, batch in batches.items():
            seen.update(batch)
            epochs = seen.total() // expected.total()
            wrong = [sample for sample, times in expected.items() if not 0 <= seen[sample] - epochs * times <= times]
            assert not wrong, f"after step {step}, {len(wrong)} samples were not seen {epochs} times or once more"
        assert seen.total() > expected.total(), "not even one epoch"
        assert seen.keys() == expected.keys()

    def assert_nothing_is_left(self) -> None:
        """No process of the run lives on, and no unfinished file is there."""
        wait_until(lambda: not processes_with(str(self.output_dir)), f"no orphans of {self.output_dir}", 20)
        unfinished = [path for path in self.output_dir.rglob("*") if ".tmp" in path.name]
        assert not unfinished


def samples_of(manifest_path: Path) -> list[int]:
    """Every sample of a data set, told by the bytes that the model sees."""
    from jmvae_dist.data.loader import EvaluationLoader
    from jmvae_dist.data.manifest import Manifest

    loader = EvaluationLoader(Manifest.load(manifest_path), rank=0, world_size=1, batch_size=512)
    samples = []
    for batch in loader:
        values = [batch.inputs[name].numpy() for name in sorted(batch.inputs)]
        samples += [zlib.crc32(b"".join(array[row].tobytes() for array in values)) for row in range(len(batch))]
    return samples


def processes_with(text: str) -> dict[int, str]:
    """Command lines, on any node, that have `text` in them, by process: the nodes' processes show here too."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in command and int(path.parent.name) != os.getpid():
            found[int(path.parent.name)] = command
    return found
