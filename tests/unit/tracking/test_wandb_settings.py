"""What is decided before the W&B client starts, and what it finds of earlier attempts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.config import WandbSection
from jmvae_dist.tracking.wandb import WandbTracker, has_credentials, resolve_mode
from jmvae_dist.tracking.wandb_process import CopyState, RecordFollower, find_base_step, redact


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_credentials()


def test_key_in_netrc_counts_for_its_server_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = home / ".netrc"
    netrc.write_text("machine wandb.example.org:8080 login user password key\n")
    netrc.chmod(0o600)
    assert not has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert has_credentials()
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org:8080\n")
    assert has_credentials()
    netrc.write_text("machine api.wandb.ai login user password key\n")
    assert not has_credentials()
    settings.write_text("not an ini file")
    assert has_credentials()
    monkeypatch.setenv("NETRC", str(home / "missing"))
    assert not has_credentials()


@pytest.mark.parametrize(
    ("configured", "environment", "has_key", "mode", "messages"),
    [
        ("auto", None, False, "offline", 0),
        ("auto", None, True, "online", 0),
        ("auto", "disabled", True, "disabled", 0),
        ("auto", "dryrun", True, "offline", 0),
        ("auto", "online", False, "offline", 1),
        ("auto", "nonsense", True, "offline", 1),
        ("online", "disabled", True, "online", 0),
        ("online", None, False, "offline", 1),
        ("disabled", "online", True, "disabled", 0),
    ],
)
def test_mode(
    monkeypatch: pytest.MonkeyPatch,
    configured: str,
    environment: str | None,
    has_key: bool,
    mode: str,
    messages: int,
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    if has_key:
        monkeypatch.setenv("WANDB_API_KEY", "key")
    said: list[str] = []
    assert resolve_mode(configured, said.append) == mode
    assert len(said) == messages


@pytest.mark.parametrize("configured", ["auto", "online", "offline"])
@pytest.mark.parametrize("fault", ["url", "settings", "netrc", "home"])
def test_what_the_client_fails_on_is_said_and_does_not_raise(
    home: Path, monkeypatch: pytest.MonkeyPatch, configured: str, fault: str
) -> None:
    if fault == "url":
        monkeypatch.setenv("WANDB_API_KEY", "key")
        monkeypatch.setenv("WANDB_BASE_URL", "http://[x")
    elif fault == "settings":
        (home / "settings").write_text("[default]\nbase_url = http://[x\n")
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    else:
        path = home / (".netrc" if fault == "home" else "keys")
        path.write_bytes(b"\xff\xfe\x00 machine")
        if fault == "netrc":
            monkeypatch.setenv("NETRC", str(path))
    said: list[str] = []
    tracker = WandbTracker(
        WandbSection(mode=configured),  # type: ignore[arg-type]
        run_dir=home / "run",
        run_id=None,
        config={},
        resume_step=None,
        run_name="name",
        message=said.append,
    )
    tracker.log({"global_step": 1})
    tracker.finish({})
    assert tracker.mode == "disabled"
    (message,) = said
    assert ("http://[x" if fault in ("url", "settings") else "not a text file") in message


def test_disabled_starts_nothing_and_writes_nothing(tmp_path: Path) -> None:
    tracker = WandbTracker(
        WandbSection(mode="disabled"),
        run_dir=tmp_path / "run",
        run_id="kept-id",
        config={},
        resume_step=7,
        run_name="name",
    )
    tracker.log({"global_step": 8})
    tracker.log_figures(8, {"figure": tmp_path})
    tracker.finish({})
    assert (tracker.mode, tracker.run_id) == ("disabled", "kept-id")
    assert not (tmp_path / "run").exists()


def test_run_that_starts_over_gets_a_new_id(tmp_path: Path) -> None:
    def run_id(old_id: str | None, resume_step: int | None) -> str:
        section = WandbSection(mode="disabled")
        tracker = WandbTracker(
            section, run_dir=tmp_path, run_id=old_id, config={}, resume_step=resume_step, run_name="name"
        )
        return tracker.run_id

    assert run_id("old", 5) == "old"
    assert run_id("old", None) != "old"
    assert run_id(None, None) != run_id(None, None)


def test_training_process_does_not_import_wandb() -> None:
    code = (
        "import sys, jmvae_dist.tracking.wandb; sys.exit(any(m in sys.modules for m in ('wandb', 'torch', 'rich')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


@pytest.mark.parametrize(
    ("value", "redacted"),
    [
        ("https://user:pass@host/a.tar", "https://***@host/a.tar"),
        ("s3://bucket/a.tar?signature=abc&expires=1", "s3://bucket/a.tar?***"),
        ("pipe:curl https://token@host/x?y=z -o -", "pipe:curl https://***@host/x?*** -o -"),
        ("https://host/path@v1/file", "https://host/path@v1/file"),
        ("plain text?", "plain text?"),
        ({"a": ["https://u@h/", 3, None]}, {"a": ["https://***@h/", 3, None]}),
    ],
)
def test_credentials_in_urls_are_removed(value: object, redacted: object) -> None:
    assert redact(value) == redacted


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(-1, 60))
def test_base_step(recorded_steps: list[int], newest_step: int) -> None:
    step = find_base_step(recorded_steps, newest_step)
    common = {other for other in recorded_steps if other <= newest_step}
    assert (step is None) == (not common)
    if step is not None:
        assert step in common
        assert len([other for other in common if other > step]) == min(1, len(common) - 1)


def test_state_survives_and_damage_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    CopyState(path, "offline", 40, {"old": "new"}, ["folder"]).save()
    assert CopyState.load(path) == CopyState(path, "offline", 40, {"old": "new"}, ["folder"])
    for content in ("", "[]", '{"mode": 1}', json.dumps({"mode": "", "safe_step": "x", "replaced_by": {}})):
        path.write_text(content)
        assert CopyState.load(path) == CopyState(path)
    path.unlink()
    assert CopyState.load(path) == CopyState(path)


def test_follower_takes_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = RecordFollower(path)
    assert list(follower.read_new()) == []
    path.write_bytes(b'{"global_step":1}\n{"global')
    assert list(follower.read_new()) == [(0, {"global_step": 1})]
    assert list(follower.read_new()) == []
    with open(path, "ab") as file:
        file.write(b'_step":2}\n')
    assert list(follower.read_new()) == [(18, {"global_step": 2})]
