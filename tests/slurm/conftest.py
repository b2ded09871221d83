"""One cluster for the tests of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, SlurmRun, why_not

# Long enough for more than one epoch of the digits. GELU-free networks of different topologies agree that long.
SETTINGS = ("--training.steps", "36", "--training.log_every_steps", "1", "--checkpoint.every_steps", "10")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: jobs use two, and one is left when one fails."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # A short path: munge's socket is in it.
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3)
    try:
        cluster.mini_slurm("up", "3")
        yield cluster
    finally:
        cluster.mini_slurm("down")


@pytest.fixture(autouse=True)
def _all_nodes_work(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Whatever a test has done to the nodes, the next one finds them in order; what it left is shown if it failed."""
    yield
    print(cluster.describe())
    for log in sorted(tmp_path.glob("*/slurm*.out")):
        print(f"{log}:\n{log.read_text(errors='replace')[-5000:]}")
    for number in range(1, cluster.num_nodes + 1):
        cluster.mini_slurm("boot", f"node{number}")
        cluster.mini_slurm("mend", f"node{number}")
    cluster.ask("scancel", "--user=root")
    cluster.mini_slurm("up", str(cluster.num_nodes))  # waits until all of them are usable


@pytest.fixture
def make_slurm_run(cluster: Cluster, tmp_path: Path, digits: Path) -> Callable[..., SlurmRun]:
    """Makes runs for the cluster: `make_slurm_run("name", "--training.steps", "20", ...)`."""

    def make(name: str, *overrides: str, site: list[str] | None = None) -> SlurmRun:
        return SlurmRun(tmp_path / name, digits, [*SETTINGS, *overrides], cluster=cluster, site=site or [])

    return make


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> SlurmRun:
    """What every other run of this shape must equal: two nodes with one rank each, left in peace."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = SlurmRun(folder / "run", digits, list(SETTINGS), cluster=cluster)
    job = run.submit("--nodes=2", "--ntasks-per-node=1", "--time=20")
    cluster.finish(job)
    return run
