"""`jmvae-dist shards` from its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_examples import example_source

from jmvae_dist.commands.shards import main
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.writer import write_shards
from jmvae_dist.errors import ConfigError, DataError


def test_write_show_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    assert main(["write", "digits", "--out", str(out), "--split", "test"]) == 0
    assert f"wrote 359 samples in 2 shards (730.0 KiB): {out}/manifest.json" in capsys.readouterr().out
    assert main(["write", "digits", "--out", str(out), "--split", "test"]) == 0
    assert "already there, unchanged: 359 samples" in capsys.readouterr().out
    assert main(["show", str(out / "manifest.json")]) == 0
    shown = capsys.readouterr().out
    for part in (
        "2 of 179 to 180 samples",
        "1x8x8",
        "(value - 0) * 0.0625",
        "one-hot of 10 classes",
        "split_seed: 0",
    ):
        assert part in shown
    assert main(["verify", str(out)]) == 0
    assert "359 samples in 2 shards are sound" in capsys.readouterr().out
    shard = out / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert main(["verify", str(out / "manifest.json")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "shard-000001.tar" in captured.err
    assert "1 problem\n" in captured.err


def test_one_shard_is_not_called_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((10, 4), np.float32))
    out = str(tmp_path / "out")
    main(["write", "npz", "--file", str(tmp_path / "d.npz"), "--out", out, "--split", "test", "--file-is-split"])
    main(["verify", out])
    assert capsys.readouterr().out.count("10 samples in 1 shard ") == 2


def test_show_escapes_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = example_source(5)
    source.details["note\x1b[2J"] = ["\x1b]0;title\x07", {"deep": "\x9b1m"}]
    write_shards(source, tmp_path / "out")
    assert main(["show", str(tmp_path / "out" / "manifest.json")]) == 0
    shown = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert "note\\x1b[2J: \\x1b]0;title\\x07" in shown


def test_show_prints_little_of_a_long_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, _ = write_shards(example_source(3), tmp_path / "out", workers=1)
    long = {"names": ["a"] * 100_000, "text": "x" * 100_000, "classes": {str(number): "b" for number in range(9999)}}
    Manifest.create(manifest.modalities, manifest.shards, long, manifest.path).save(
        tmp_path / "out" / "manifest.json"
    )
    assert main(["show", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "and 99,952 more entries" in shown
    assert len(shown) < 10_000
    long.pop("names")
    Manifest.create(manifest.modalities, manifest.shards, long, manifest.path).save(
        tmp_path / "out" / "manifest.json"
    )
    assert main(["show", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"text: {'x' * 994}...\n" in shown
    assert len(shown) < 10_000


def test_npz_asks_which_samples_are_the_split(tmp_path: Path) -> None:
    """With a default, the whole file would be written as train split and again as test split."""
    np.savez(tmp_path / "d.npz", x=np.zeros((10, 4), np.float32))
    command = ["write", "npz", "--file", str(tmp_path / "d.npz"), "--out", str(tmp_path / "out")]
    for options in (
        [],
        ["--split", "train"],
        ["--test-fraction", "0.2"],
        ["--file-is-split"],
        ["--split", "test", "--test-fraction", "0.2", "--file-is-split"],
    ):
        with pytest.raises(ConfigError, match=r"--split train\|test, and either --test-fraction F .*--file-is-split"):
            main([*command, *options])
    assert not (tmp_path / "out").exists()
    assert main([*command, "--split", "test", "--file-is-split"]) == 0
    assert Manifest.load(tmp_path / "out" / "manifest.json").num_samples == 10


def test_npz_number_of_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=np.arange(5), b=np.arange(5))
    command = ["write", "npz", "--file", str(tmp_path / "d.npz"), "--split", "test", "--file-is-split"]
    main([*command, "--out", str(tmp_path / "out"), "--class-modalities", "a=10,b"])
    modalities = Manifest.load(tmp_path / "out" / "manifest.json").modalities
    assert [modality.num_classes for modality in modalities] == [10, 5]


def test_npz_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "d.npz", image=np.zeros((10, 4), np.uint8), kind=np.arange(10) % 3)
    options = ["--class-modalities", "kind=3", "--scale", "image=1/255", "--offset", "image=-2"]
    command = ["write", "npz", "--file", str(tmp_path / "d.npz"), "--out", str(tmp_path / "out"), *options]
    assert main([*command, "--test-fraction", "0.3", "--split", "test"]) == 0
    assert "wrote 3 samples" in capsys.readouterr().out
    main(["show", str(tmp_path / "out" / "manifest.json")])
    shown = capsys.readouterr().out
    assert "(value - -2) * 0.00392157" in shown
    assert "one-hot of 3 classes" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VERB"),
        (["rite"], "invalid choice: 'rite'"),
        (["write"], "SOURCE"),
        (["write", "digits"], "--out"),
        (["write", "digits", "--out", "x", "--spilt", "test"], "unrecognized arguments: --spilt"),
        (["write", "digits", "--out", "x", "--samples-per-shard", "0"], "'0' must be a whole number of at least 1"),
        (["write", "digits", "--out", "x", "--test-fraction", "2"], "--test-fraction must lie between 0 and 1"),
        (["write", "npz", "--file", "f", "--out", "x", "--scale", "image"], "NAME=NUMBER"),
        (["write", "npz", "--file", "f", "--out", "x", "--scale", "image=1/0"], "NAME=NUMBER"),
        (["write", "npz", "--file", "f", "--out", "x", "--class-modalities", "a=0"], "'0' must be a whole number"),
        (["write", "npz", "--file", "f", "--out", "x", "--class-modalities", "a,a=2"], "each array once"),
        (["show", "nowhere.json"], "no manifest at nowhere.json"),
    ],
)
def test_usage_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_abbreviated_options_are_refused() -> None:
    """`--over` must not become `--overwrite`."""
    with pytest.raises(ConfigError, match="unrecognized arguments: --over"):
        main(["write", "digits", "--out", "x", "--over"])


def test_a_malformed_manifest_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="format_version"):
        main(["show", str(tmp_path / "manifest.json")])


def test_the_light_parts_of_the_data_layer_do_not_import_torch() -> None:
    code = (
        "import sys, jmvae_dist.data.manifest, jmvae_dist.data.plan, jmvae_dist.data.reader, jmvae_dist.data.writer;"
        "import jmvae_dist.commands.shards;"
        "print([name for name in ('torch', 'webdataset', 'rich', 'sklearn') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
