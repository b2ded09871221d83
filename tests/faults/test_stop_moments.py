"""A request to stop is heeded whatever the run is doing: starting up, or evaluating."""

from __future__ import annotations

from collections.abc import Callable

from tests.conftest import Run
from tests.faults.patched import train

MakeRun = Callable[..., Run]
SETTINGS = ("--training.steps", "6", "--training.log_every_steps", "1")


def test_a_stop_while_the_configuration_is_read_is_not_lost(make_run: MakeRun) -> None:
    """Schedulers send USR1 to every process of a job, also to one that has only begun."""
    run = make_run("run", *SETTINGS)
    printed = train(
        run,
        "from jmvae_dist.training import setup\n"
        "resolve = setup.resolve_run\n"
        "setup.resolve_run = lambda *arguments: (os.kill(os.getpid(), signal.SIGUSR1), resolve(*arguments))[1]",
        expect=75,
    )
    assert "stopped on request after step 0" in printed


def test_a_stop_within_an_evaluation_ends_it_and_resuming_makes_up_for_it(make_run: MakeRun) -> None:
    evaluating = (
        "--evaluation.every_steps",
        "3",
        "--evaluation.batch_size",
        "32",
        "--evaluation.joint_nll_samples",
        "10",
    )
    whole, stopped = make_run("whole", *SETTINGS, *evaluating), make_run("stopped", *SETTINGS, *evaluating)
    for run in (whole, stopped):
        run.overrides += ["--data.eval_manifest", str(run.digits / "test" / "manifest.json")]
    # With no time at all between the request to stop and the limit, a warning belongs to the first checkpoint.
    printed = train(whole, JMVAE_DIST_STOP_LEAD_S="0")
    assert printed.count("submit with an earlier --signal=B:USR1@SECONDS") == 1
    train(
        stopped,
        "from jmvae_dist.evaluation.likelihood import ElboTerms\n"
        "update = ElboTerms.update\n"
        "ElboTerms.update = lambda *arguments: (os.kill(os.getpid(), signal.SIGTERM), update(*arguments))[1]",
        expect=75,
    )
    assert [record["global_step"] for record in stopped.records()] == [1, 2, 3]
    assert stopped.checkpoint(3).is_dir()
    assert "scheduler" not in train(stopped)
    assert stopped.records() == whole.records()
