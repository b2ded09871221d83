"""`jmvae-dist encode`: every sample once, in stored order, under the key and class of its row in the user's table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jmvae_dist import load_model
from jmvae_dist.checkpoint.export import CONFIG_NAME
from jmvae_dist.commands.encode import find_keys, main
from jmvae_dist.commands.shards import main as shards
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.store import RemoteAccess
from jmvae_dist.data_config import RemoteSection
from jmvae_dist.errors import ConfigError, DataError
from jmvae_dist.model_config import JMVAEConfig
from tests.exports import export_untrained
from tests.faulty_server import Fault, serving

# A patient's numbers and class follow from its number, so that a row in the wrong place shows.
PATIENTS = {f"P{number:02d}": (number, number / 2, "sick" if number % 3 else "well") for number in range(11)}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = [f"{key},{first},{second},{state}" for key, (first, second, state) in PATIENTS.items()]
    (tmp_path / "table.csv").write_text("\n".join(["patient,first,second,state", *lines]))
    source = ["csv", "--file", str(tmp_path / "table.csv"), "--key", "patient", "--split", "test", "--file-is-split"]
    columns = [
        "--vector",
        "a=first",
        "--vector",
        "b=second",
        "--class",
        "state=state",
        "--class-names",
        "state=sick,well",
    ]
    assert shards(["write", *source, *columns, "--samples-per-shard", "4", "--out", str(tmp_path / "shards")]) == 0
    return tmp_path / "shards" / "manifest.json"


@pytest.fixture
def export(tmp_path: Path, manifest: Path) -> Path:
    """An export of an untrained model of `a` and `b`, without the classes."""
    modalities = {
        entry.name: entry.to_json() for entry in Manifest.load(manifest).modalities if entry.name != "state"
    }
    return export_untrained(tmp_path / "export", JMVAEConfig(2, 3, {"a": (1,), "b": (1,)}), modalities)


@pytest.mark.parametrize("given", [["a", "b"], ["b"]])
def test_each_row_belongs_to_its_patient(tmp_path: Path, export: Path, manifest: Path, given: list[str]) -> None:
    out = tmp_path / "encoded"
    command = [str(export), "--manifest", str(manifest), "--given", ",".join(given), "--batch-size", "3"]
    assert main([*command, "--out", f"{out}.npz"]) == 0
    assert main([*command, "--out", f"{out}.csv"]) == 0
    with np.load(f"{out}.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    keys = arrays["key"].tolist()
    assert sorted(keys) == list(PATIENTS)
    values = torch.tensor([PATIENTS[key][:2] for key in keys], dtype=torch.float32)
    posterior = load_model(export).encode({"a": values[:, :1], "b": values[:, 1:]}, given, return_mean=True)
    np.testing.assert_allclose(arrays["mu"], posterior.mu, atol=1e-6)
    np.testing.assert_allclose(arrays["logvar"], posterior.logvar, atol=1e-6)
    states = [PATIENTS[key][2] for key in keys]
    assert arrays["class_names.state"][arrays["class.state"]].tolist() == states
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["class.state"]) for row in rows] == list(zip(keys, states, strict=True))
    written = [[float(row[f"mu.{number}"]) for number in range(3)] for row in rows]
    np.testing.assert_allclose(written, arrays["mu"], rtol=1e-6)


@pytest.mark.parametrize("names", [["sick"], ["sick", "well"], ["sick", "well", "dead"]], ids=len)
def test_names_of_a_model_with_other_classes_are_not_given_to_data_without(
    tmp_path: Path, export: Path, manifest: Path, names: list[str]
) -> None:
    """The posterior does not take the classes, so the number of them need not be the model's."""
    description = json.loads((export / CONFIG_NAME).read_text())
    modality = Modality.classes("state", len(names))
    description["modalities"]["state"] = {**modality.to_json(), "class_names": names}
    (export / CONFIG_NAME).write_text(json.dumps(description))
    record = json.loads(manifest.read_text())
    del record["source"]["class_names"]
    manifest.write_text(json.dumps(record))
    out = tmp_path / "encoded.csv"
    assert main([str(export), "--manifest", str(manifest), "--given", "a", "--out", str(out)]) == 0
    with open(out, newline="") as file:
        shown = {row["class.state"] for row in csv.DictReader(file)}
    assert shown == ({"sick", "well"} if len(names) == 2 else {"0", "1"})


def test_a_key_that_cannot_be_read_is_an_error(manifest: Path) -> None:
    """Messages can do without one; a table in which patients are called unknown is wrong."""
    quick = RemoteSection(connect_timeout_s=2.0, stall_timeout_s=1.0, attempts=1, backoff_s=0.01)
    with serving(manifest.parent) as server:
        remote = Manifest.load(f"{server.url}/manifest.json", quick)
        assert sorted(find_keys(remote, RemoteAccess(remote=quick))) == list(PATIENTS)
        server.always["/shard-000001.tar"] = Fault(status=503)
        with pytest.raises(DataError, match=r"shard-000001\.tar.*503"):
            find_keys(remote, RemoteAccess(remote=quick))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "x.txt"], "must end in .npz or .csv"),
        (["--out", "x.npz", "--given", "c"], "the model has a, b"),
        (["--out", "x.npz", "--batch-size", "0"], "must be at least 1"),
        (["--out", "nowhere/x.npz"], "cannot be written"),
    ],
    ids=range(4),
)
def test_mistakes(
    tmp_path: Path, export: Path, manifest: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        main([str(export), "--manifest", str(manifest), *options])
