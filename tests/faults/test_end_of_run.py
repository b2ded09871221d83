"""What comes after the last step: a slow end is no hang, and a request to stop comes too late to matter."""

from __future__ import annotations

from collections.abc import Callable

from tests.conftest import Run
from tests.faults.patched import train

MakeRun = Callable[..., Run]
SETTINGS = ("--training.steps", "6", "--training.log_every_steps", "1")


def test_the_end_may_take_longer_than_a_step(make_run: MakeRun) -> None:
    """W&B may wait for uploads, and the report reads the whole record."""
    run = make_run("run", *SETTINGS, "--training.watchdog.step_timeout_s", "3")
    printed = train(
        run,
        "finish = Recorder.__exit__\nRecorder.__exit__ = lambda *arguments: (time.sleep(6), finish(*arguments))[1]",
    )
    assert "watchdog" not in printed
    assert (run.output_dir / "report.html").is_file()


def test_a_stop_after_the_last_step_of_a_run_without_evaluation_leaves_nothing_to_do(make_run: MakeRun) -> None:
    run = make_run("run", *SETTINGS)
    train(
        run,
        "save = loop.Trainer._save_checkpoint\n"
        "loop.Trainer._save_checkpoint = lambda *arguments, **options: (\n"
        "    save(*arguments, **options), os.kill(os.getpid(), signal.SIGTERM))",
    )
    assert (run.output_dir / "report.html").is_file()
