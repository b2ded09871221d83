"""Standardised elements: by the train split alone, the same for both splits, and stored as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmvae_dist.commands.shards import main
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.modality import Modality
from jmvae_dist.data.sources.base import split_rows
from jmvae_dist.data.sources.standardization import Moments
from jmvae_dist.data.verify import verify_shards
from jmvae_dist.errors import ConfigError, DataError


@given(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32)), min_size=1, max_size=30),
    st.integers(1, 30),
    st.sampled_from([0.0, 1e6, -1e12]),
)
def test_moments_of_parts_are_those_of_the_whole(values: list[tuple[float, float]], step: int, mean: float) -> None:
    """Also where the mean is so large that its square hides the deviation."""
    array = np.array(values, np.float64) * 1e-3 * max(1.0, abs(mean)) + mean
    moments = Moments()
    for start in range(0, len(array), step):
        moments.add(array[start : start + step])
    offset, scale = map(np.array, moments.transform())
    varies = array.min(axis=0) < array.max(axis=0)
    assert np.array_equal(moments.is_constant, ~varies)
    deviation = np.where(varies, array.std(axis=0), 1.0)
    assert np.allclose(offset, array.mean(axis=0), rtol=1e-12, atol=1e-15)
    # Of deviations far below the mean, few digits are in the values themselves.
    tells = deviation > 1e-9 * np.abs(array).max()
    assert np.allclose((1 / scale)[tells], deviation[tells], rtol=1e-5)


def test_rounding_does_not_make_a_constant_vary() -> None:
    """The mean of many 0.1 is not exactly 0.1: divided by what is left, noise would become as large as data."""
    column = np.full((1000, 1), 0.1)
    assert column.std() > 0
    moments = Moments()
    for part in np.split(column, 10):
        moments.add(part)
    assert moments.transform() == ([0.1], [1.0])


def seen_by_model(modality: Modality, stored: np.ndarray) -> np.ndarray:
    return modality.to_model(stored).astype(np.float64)


def write_both(source: str, tmp_path: Path, *options: str) -> dict[str, Manifest]:
    for split in ("train", "test"):
        assert main(["write", source, "--out", str(tmp_path / split), "--split", split, *options]) == 0
    return {split: Manifest.load(tmp_path / split) for split in ("train", "test")}


def test_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    array = (rng.normal(size=(200, 2, 3)) * 10.0 ** np.arange(3) + 7).astype(np.float32)
    array[:, 1, 0] = 0.1
    counts = rng.integers(0, 50, size=200)
    np.savez(tmp_path / "d.npz", rna=array, counts=counts, other=array)
    options = ["--file", str(tmp_path / "d.npz"), "--standardize", "rna", "--standardize", "counts"]
    manifests = write_both("npz", tmp_path, *options, "--test-fraction", "0.25")
    assert manifests["train"].modalities == manifests["test"].modalities
    rna, counted, other = manifests["test"].modalities
    train_rows = split_rows(200, "train", 0.25, 0)
    seen = seen_by_model(rna, array[train_rows])
    varies = np.array([[True] * 3, [False, True, True]])
    assert np.allclose(seen.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(seen.std(axis=0)[varies], 1, atol=1e-5)
    assert not seen[:, ~varies].any()
    assert np.allclose(np.array(rna.scale)[varies] * array[train_rows].astype(np.float64).std(axis=0)[varies], 1)
    assert abs(seen_by_model(counted, counts[train_rows, None]).std() - 1) < 1e-5
    assert (other.offset, other.scale) == (0.0, 1.0)
    assert manifests["test"].source["standardized"] == ["rna", "counts"]
    assert verify_shards(manifests["test"]) == []
    note = "modality 'rna': 1 of 6 elements are constant in the train split"
    assert capsys.readouterr().out.count(note) == 2


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(150, 4)) * [1, 10, 100, 0] + 5
    rows = [f"p{number % 50},{','.join(map(str, row))}" for number, row in enumerate(values)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["patient,g0,g1,g2,g3", *rows]) + "\n")
    return path


def values_of(table: Path) -> np.ndarray:
    return np.loadtxt(table, delimiter=",", skiprows=1, usecols=range(1, 5)).astype(np.float32)


def test_csv(table: Path, tmp_path: Path) -> None:
    """By the rows of the train split, whatever decides which these are."""
    from jmvae_dist.data.sources.splits import is_test_group

    options = ["--file", str(table), "--vector", "rna=g*", "--shape", "rna=2x2", "--standardize", "rna"]
    manifests = write_both("csv", tmp_path, *options, "--test-fraction", "0.2", "--group", "patient")
    assert manifests["train"].modalities == manifests["test"].modalities
    (rna,) = manifests["test"].modalities
    is_train = np.array([not is_test_group(f"p{row % 50}", 0, 0.2) for row in range(150)])
    seen = seen_by_model(rna, values_of(table)[is_train].reshape(-1, 2, 2)).reshape(-1, 4)
    assert np.allclose(seen.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(seen.std(axis=0), [1, 1, 1, 0], atol=1e-5)
    assert verify_shards(manifests["test"]) == []


def test_files_of_their_own(table: Path, tmp_path: Path) -> None:
    """The file that is the train split gives the numbers; that of the test split takes them."""
    command = ["write", "csv", "--vector", "rna=g*", "--standardize", "rna", "--file-is-split"]
    lines = table.read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *lines[1:30]]))
    assert main([*command, "--file", str(table), "--out", str(tmp_path / "a"), "--split", "train"]) == 0
    test = [*command, "--file", str(tmp_path / "test.csv"), "--out", str(tmp_path / "b"), "--split", "test"]
    with pytest.raises(ConfigError, match=r"the train split, which is not in this file.*--standardize-like MANIFEST"):
        main(test)
    assert main([*test, "--standardize-like", str(tmp_path / "a")]) == 0
    train_manifest, test_manifest = Manifest.load(tmp_path / "a"), Manifest.load(tmp_path / "b")
    assert test_manifest.modalities == train_manifest.modalities
    assert test_manifest.source["standardized_like"] == train_manifest.fingerprint
    seen = seen_by_model(train_manifest.modalities[0], values_of(table))
    assert np.allclose(seen.std(axis=0), [1, 1, 1, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--standardize", "x"], "--standardize x: there is no --vector x"),
        (["--standardize", "rna", "--standardize", "rna"], "--standardize names a modality twice"),
        (["--standardize", "rna", "--scale", "rna=2"], "leave out its --offset and --scale"),
        (["--standardize", "rna", "--offset", "rna=2"], "leave out its --offset and --scale"),
        (["--standardize-like", "{plain}"], "--standardize-like needs --standardize NAME"),
        (["--standardize", "rna", "--standardize-like", "{plain}"], "has 'rna' as it is, not standardised"),
        (["--standardize", "dna", "--standardize-like", "{plain}"], "has no modality 'dna'; it has rna"),
        (["--standardize", "rna", "--standardize-like", "nowhere.json"], "no manifest at nowhere.json"),
        (
            ["--standardize", "rna", "--standardize-like", "{other}"],
            "has 'rna' of shape [2], and this one is of shape [4]",
        ),
    ],
    ids=range(9),
)
def test_csv_mistakes(table: Path, tmp_path: Path, options: list[str], message: str) -> None:
    command = ["write", "csv", "--file", str(table), "--split", "train", "--test-fraction", "0.2"]
    main([*command, "--vector", "rna=g*", "--out", str(tmp_path / "plain")])
    main([*command, "--vector", "rna=g0,g1", "--standardize", "rna", "--out", str(tmp_path / "other")])
    options = [option.format(plain=tmp_path / "plain", other=tmp_path / "other") for option in options]
    with pytest.raises(ConfigError) as caught:
        main([*command, "--vector", "rna=g*", "--vector", "dna=g*", "--out", str(tmp_path / "out"), *options])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--standardize", "x"], ConfigError, "has no array 'x'"),
        (
            ["--standardize", "kind", "--class-modalities", "kind"],
            ConfigError,
            "takes no --offset, --scale or ",
        ),
        (["--standardize", "huge"], ConfigError, "--standardize huge: values are too large, or differ too little"),
        (
            ["--standardize", "kind", "--group", "kind"],
            ConfigError,
            "array 'kind' says how .* add --class-modalities",
        ),
        (["--standardize", "tiny"], ConfigError, "--standardize tiny: scale is beyond the range of float32"),
    ],
    ids=range(5),
)
def test_npz_mistakes(tmp_path: Path, options: list[str], error: type[DataError], message: str) -> None:
    numbers = np.arange(10)
    arrays = {"kind": numbers, "huge": numbers * 1e307, "tiny": (numbers * 1e-40).astype(np.float32)}
    np.savez(tmp_path / "d.npz", **arrays)
    command = ["write", "npz", "--file", str(tmp_path / "d.npz"), "--split", "train", "--test-fraction", "0.5"]
    with pytest.raises(error, match=message):
        main([*command, "--out", str(tmp_path / "out"), *options])
