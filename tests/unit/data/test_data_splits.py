"""Splits by group, by class and by a column: nothing of a group is held out while the rest of it is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jmvae_dist.commands.shards import main
from jmvae_dist.data.manifest import Manifest
from jmvae_dist.data.sources.npz import load_npz_source
from jmvae_dist.data.sources.splits import Labels, SplitChoice, is_test_group, label_of, rows_of
from jmvae_dist.errors import ConfigError, DataError


def labels_of(values: list[str], title: str = "patient") -> dict[str, Labels]:
    different = list(dict.fromkeys(values))
    return {title: Labels(title, different, np.array([different.index(value) for value in values], np.int64))}


def both(choice: SplitChoice, num_rows: int, labels: dict[str, Labels]) -> tuple[list[int], list[int]]:
    """Rows of the train and of the test split; none where that is refused as empty."""
    rows = []
    for split in ("train", "test"):
        try:
            rows.append(rows_of(choice, split, num_rows, labels).tolist())
        except ConfigError:
            rows.append([])
    return rows[0], rows[1]


GROUPS = st.lists(st.sampled_from([f"patient {number}" for number in range(12)]), min_size=1, max_size=40)
FRACTIONS = st.floats(0.01, 0.99)


@given(GROUPS, FRACTIONS, st.integers(0, 2**64 - 1))
def test_no_group_is_in_both_splits(values: list[str], fraction: float, seed: int) -> None:
    train, test = both(SplitChoice("train", fraction, seed, group="patient"), len(values), labels_of(values))
    assert sorted(train + test) == list(range(len(values)))
    assert train == sorted(train)
    assert not {values[row] for row in train} & {values[row] for row in test}


@given(GROUPS, FRACTIONS, st.integers(0, 2**64 - 1), st.randoms(use_true_random=False))
def test_a_group_stays_where_it_is(values: list[str], fraction: float, seed: int, random: object) -> None:
    """Whatever other rows there are, in whatever order: a table that grows moves nobody into the test split."""
    choice = SplitChoice("train", fraction, seed, group="patient")
    _, test = both(choice, len(values), labels_of(values))
    others = [*values[len(values) // 2 :], "somebody", *values]
    random.shuffle(others)  # type: ignore[attr-defined]
    _, other_test = both(choice, len(others), labels_of(others))
    expected = {values[row] for row in test}
    assert {others[row] for row in other_test} - {"somebody"} == expected


@given(st.text(max_size=8), st.integers(0, 2**64 - 1), FRACTIONS, FRACTIONS)
def test_a_larger_test_split_keeps_what_it_had(value: str, seed: int, smaller: float, larger: float) -> None:
    assume(smaller <= larger)
    assert is_test_group(value, seed, larger) or not is_test_group(value, seed, smaller)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_the_share_of_groups_is_right_in_expectation(fraction: float) -> None:
    num_groups = 4000
    shares = [
        np.mean([is_test_group(str(group), seed, fraction) for group in range(num_groups)]) for seed in range(3)
    ]
    deviation = (fraction * (1 - fraction) / num_groups) ** 0.5
    assert np.all(np.abs(np.array(shares) - fraction) < 4 * deviation)
    assert len(set(shares)) > 1


def test_splits_do_not_change_between_versions() -> None:
    """Data sets that have been written must come out the same."""
    assert rows_of(SplitChoice("test", 0.3, 7), "test", 20, {}).tolist() == [4, 5, 8, 13, 16, 17]
    assert [group for group in range(30) if is_test_group(str(group), 0, 0.2)] == [5, 9, 10, 16, 17, 28]
    assert [group for group in range(30) if is_test_group(str(group), 2**64 - 1, 0.2)] == [3, 10, 11, 22]
    assert is_test_group("Zoë", 1, 0.5)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), FRACTIONS, st.integers(0, 5))
def test_both_splits_have_the_same_share_of_every_class(values: list[str], fraction: float, seed: int) -> None:
    choice = SplitChoice("train", fraction, seed, stratify="kind")
    train, test = both(choice, len(values), labels_of(values, "kind"))
    assume(train and test)
    assert sorted(train + test) == list(range(len(values)))
    for value in set(values):
        assert [values[row] for row in test].count(value) == round(fraction * values.count(value))
    kinds = labels_of(values, "kind")["kind"]
    numbered_otherwise = Labels("kind", list(kinds.values)[::-1], len(kinds.values) - 1 - kinds.codes)
    assert both(choice, len(values), {"kind": numbered_otherwise}) == (train, test)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "a", "stratify": "b", "test_fraction": 0.1}, "--group and --stratify exclude each other"),
        ({"group": "a"}, "--group needs --test-fraction"),
        ({"stratify": "a"}, "--stratify needs --test-fraction"),
        ({"stratify": "a", "column": "b"}, "--stratify needs --test-fraction"),
        ({"column": "a", "test_fraction": 0.1}, "leave out --test-fraction"),
        ({"test_fraction": 1.0}, "must lie between 0 and 1"),
        ({"test_fraction": 0.5, "seed": -1}, "--split-seed must be between"),
    ],
)
def test_choices_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitChoice("train", **settings)


def test_columns_that_do_not_suit() -> None:
    values = [str(number) for number in range(1001)]
    with pytest.raises(ConfigError, match="--stratify age: 1,001 different values are no classes"):
        rows_of(SplitChoice("test", 0.5, stratify="age"), "test", 1001, labels_of(values, "age"))
    with pytest.raises(ConfigError, match="the test split empty: it got none of the 1 different values of 'p'"):
        rows_of(SplitChoice("test", 0.001, group="p"), "test", 2, labels_of(["x", "x"], "p"))
    with pytest.raises(DataError, match="is empty"):
        label_of(" \t")


# csv


@pytest.fixture
def visits(tmp_path: Path) -> Path:
    """Three visits of each of 40 patients, one per line in the order of the visits; folds by patient."""
    lines = ["patient,visit,fold,kind,dose"]
    for visit in range(3):
        for patient in range(40):
            fold = ("train", "train", "test", "val")[patient % 4]
            lines.append(f" P{patient} ,{visit},{fold},{'ab'[patient % 2]},{patient + visit / 4}")
    path = tmp_path / "visits.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_csv(visits: Path, out: Path, *options: str) -> None:
    columns = ["--vector", "dose=dose", "--vector", "visit=visit", "--class", "kind=kind"]
    assert main(["write", "csv", "--file", str(visits), "--out", str(out), *columns, *options]) == 0


def rows_in(out: Path) -> set[int]:
    """Numbers of the rows whose samples are in the shards."""
    import tarfile

    manifest = Manifest.load(out)
    names = set()
    for number in range(len(manifest.shards)):
        with tarfile.open(manifest.shard_path(number), "r:") as tar:
            names |= {name.partition(".")[0] for name in tar.getnames()}
    return {int(name.rpartition("-")[2]) for name in names}


def test_csv_by_group(visits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for split in ("train", "test"):
        write_csv(visits, tmp_path / split, "--split", split, "--test-fraction", "0.25", "--group", "patient")
        rows[split] = rows_in(tmp_path / split)
    assert rows["train"] | rows["test"] == set(range(120))
    patients = {split: {row % 40 for row in of_split} for split, of_split in rows.items()}
    assert patients["test"] == {patient for patient in range(40) if is_test_group(f"P{patient}", 0, 0.25)}
    assert not patients["train"] & patients["test"]
    share = f"{len(rows['test'])} of 120 samples ({len(rows['test']) / 120:.1%})"
    note = f"the test split has {len(patients['test'])} of the 40 different values of 'patient', with {share}"
    assert capsys.readouterr().out.count(note) == 2
    source = Manifest.load(tmp_path / "test").source
    assert (source["group"], source["test_fraction"], source["split_seed"]) == ("patient", 0.25, 0)


def test_csv_by_column(visits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, folds in (("train", {0, 1}), ("test", {2})):
        write_csv(visits, tmp_path / split, "--split", split, "--split-column", "fold", "--group", "patient")
        assert rows_in(tmp_path / split) == {row for row in range(120) if row % 4 in folds}
        note = "30 rows are in neither split: 'fold' has 'train' (60), 'test' (30), 'val' (30)"
        assert note in capsys.readouterr().out


def test_csv_by_class(visits: Path, tmp_path: Path) -> None:
    write_csv(visits, tmp_path / "out", "--split", "test", "--test-fraction", "0.1", "--stratify", "kind")
    kinds = [row % 40 % 2 for row in rows_in(tmp_path / "out")]
    assert (kinds.count(0), kinds.count(1)) == (6, 6)


def test_rows_without_a_group(visits: Path, tmp_path: Path) -> None:
    lines = visits.read_text().splitlines()
    lines[5] = lines[5].replace("P4", "")
    visits.write_text("\n".join(lines))
    options = ["--split", "train", "--test-fraction", "0.25", "--group", "patient"]
    with pytest.raises(DataError, match=r"line 6: column 'patient': is empty; --incomplete skip leaves"):
        write_csv(visits, tmp_path / "out", *options)
    write_csv(visits, tmp_path / "out", *options, "--incomplete", "skip")
    kept = {row for row in range(120) if not is_test_group(f"P{row % 40}", 0, 0.25)}
    assert rows_in(tmp_path / "out") == kept - {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--test-fraction", "0.1", "--group", "patients"],
            "--group: {file} has no column 'patients'; it has",
        ),
        (
            ["--split-column", "fold", "--file-is-split"],
            "or --split-column COLUMN (which says train or test)",
        ),
        (["--split-column", "fold", "--test-fraction", "0.1"], "name the split to write"),
        (["--split-column", "kind"], "no row says 'test': 'kind' has 'a' (60), 'b' (60)"),
        (
            ["--split-column", "visit_fold", "--group", "patient"],
            "puts samples of 40 of the 40 different values of 'patient' into both splits, first 'P0'",
        ),
        (["--file-is-split", "--group", "patient"], "--group needs --test-fraction"),
    ],
    ids=range(6),
)
def test_csv_mistakes(visits: Path, tmp_path: Path, options: list[str], message: str) -> None:
    lines = visits.read_text().splitlines()
    folds = ["visit_fold", *["train"] * 80, *["test"] * 40]
    visits.write_text("\n".join(f"{line},{fold}" for line, fold in zip(lines, folds, strict=True)))
    with pytest.raises((ConfigError, DataError)) as caught:
        write_csv(visits, tmp_path / "out", "--split", "test", "--class-names", "kind=a,b", *options)
    assert message.format(file=visits) in str(caught.value)


# npz


@pytest.mark.parametrize("kind", [str, np.bytes_, np.int16, np.uint64])
def test_npz_by_group(tmp_path: Path, kind: type) -> None:
    """The same groups as in a table; the array of the groups is no modality."""
    patients = [number // 3 for number in range(90)]
    np.savez(tmp_path / "d.npz", x=np.zeros((90, 2)), patient=np.array(patients).astype(kind))
    rows = {}
    for split in ("train", "test"):
        source, notes = load_npz_source(tmp_path / "d.npz", SplitChoice(split, 0.3, group="patient"))
        assert [modality.name for modality in source.modalities] == ["x"]
        assert list(source.arrays) == ["x"]
        assert "of the 30 different values of 'patient'" in notes[0]
        rows[split] = set(source.rows.tolist())
    assert rows["test"] == {row for row in range(90) if is_test_group(str(patients[row]), 0, 0.3)}
    assert rows["train"] == set(range(90)) - rows["test"]


def test_npz_by_an_array_that_is_a_modality(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((90, 2)), kind=np.arange(90) % 3)
    choice = SplitChoice("test", 0.2, stratify="kind")
    source, _ = load_npz_source(tmp_path / "d.npz", choice, {"kind": 3})
    assert [modality.name for modality in source.modalities] == ["x", "kind"]
    assert np.bincount(source.rows % 3).tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"x": np.zeros(3)}, ConfigError, "has no array 'patient'; it has x"),
        ({"x": np.zeros(3), "patient": np.zeros(3)}, DataError, "must have one integer or string per sample"),
        (
            {"x": np.zeros(3), "patient": np.zeros((3, 1), int)},
            DataError,
            "must have one integer or string per sample",
        ),
        ({"x": np.zeros(3), "patient": np.array(["a", "b", ""])}, DataError, "array 'patient': row 2: is empty"),
        ({"patient": np.arange(3)}, DataError, "no array is left to be a modality"),
    ],
    ids=range(5),
)
def test_npz_mistakes(tmp_path: Path, arrays: dict, error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(error, match=message):
        load_npz_source(tmp_path / "d.npz", SplitChoice("test", 0.5, group="patient"))
