"COVID-CT-MD: slices by position, rows by the index, the latest labels, and what does not fit"

import shutil

import numpy as np
import pandas as pd
import pytest

from covid_ct.cohort.adapters import open_cohort, slice_labels
from covid_ct.cohort.table import load_row
from covid_ct.io.dicom import write_series
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import CohortError

SUBJECTS = dict(P001=("COVID-19", 0), P002=("COVID-19", 2), cap001=("CAP", 3))
LOBES = ["left lower", "left upper", "right lower", "right middle", "right upper"]


def chest(k):
    return make_phantom("covid", k, (16 + k, 24, 24)).scan


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The layout as published: shuffled files, a gap in the index, corrected labels"
    home = tmp_path_factory.mktemp("md") / "set"
    rng, labels, lobes = np.random.default_rng(3), np.zeros((5, 30), "u1"), np.zeros((5, 30, 5))
    rows = ["Label Index,Diagnosis,Relative Path,Folder/ID"]
    for k, (name, (group, at)) in enumerate(SUBJECTS.items()):
        folder = home / f"{group} subjects" / name
        write_series(chest(k), home / "plain", name="{k}.dcm")
        folder.mkdir(parents=True)
        for i, j in enumerate(rng.permutation(16 + k), 1):
            (home / "plain" / f"{i}.dcm").rename(folder / f"98C14734-ASSH_{j}.dcm")
        labels[at, 2 + k : 6] = 1
        lobes[at, 2 + k, k] = 1
        rows.append(f"{at},{group},./{group}/,{name}")
    shutil.rmtree(home / "plain")
    rows.append("4,CAP,./CAP/,cap002")
    (home / "Index.csv").write_text("\n".join(rows) + "\n")
    np.save(home / "Slice-level-labels-updated-1.npy", labels)
    np.save(home / "Slice-level-labels.npy", np.zeros_like(labels))
    np.save(home / "Lobe-level-labels.npy", lobes.astype("u1"))
    return home


@pytest.fixture
def home(whole, tmp_path):
    "A copy that a test may spoil; slices are small"
    return shutil.copytree(whole, tmp_path / "set")


def test_rows(whole):
    df = open_cohort(whole).set_index("scan_id", drop=False)
    assert df.attrs["adapter"] == "covid_ct_md" and set(df.index) == set(SUBJECTS)
    assert df.label.to_dict() == dict(P001="covid", P002="covid", cap001="cap")
    assert df.label_index.to_dict() == {k: at for k, (_, at) in SUBJECTS.items()}
    assert df.infected_slices.to_dict() == dict(P001=4, P002=3, cap001=2)
    assert df.n_slice.to_dict() == dict(P001=16, P002=17, cap001=18)
    assert set(df.slice_labels) == {"Slice-level-labels-updated-1.npy"}
    assert df.attrs["left_out"] == ["Index.csv: subject cap002 is not in the folder"]
    assert any("order of the files" in t for t in df.attrs["traps"])


def test_labels_stand_beside_the_voxels_of_their_slice(whole):
    df = open_cohort(whole)
    for row in df.to_dict("records"):
        k = list(SUBJECTS).index(row["scan_id"])
        scan, told = load_row(row, df.attrs["root"]), slice_labels(row, df.attrs["root"])
        assert np.array_equal(scan.voxels, chest(k).voxels) and scan.patient_id == row["scan_id"]
        n = scan.shape[0]
        from_top = np.arange(n)[::-1]
        assert told.from_top.tolist() == from_top.tolist()
        assert told.infected.tolist() == [2 + k <= j < 6 for j in from_top]
        assert list(told.columns[2:]) == LOBES
        assert told[LOBES[k]].tolist() == [j == 2 + k for j in from_top]
        assert told[LOBES].to_numpy().sum() == 1


def test_subjects_without_class_folders(home):
    for group in ("COVID-19 subjects", "CAP subjects"):
        for d in (home / group).iterdir():
            d.rename(home / d.name)
        (home / group).rmdir()
    df = open_cohort(home)
    assert df.label.value_counts().to_dict() == dict(covid=2, cap=1)
    assert df.infected_slices.sum() == 9


def test_a_subject_that_nobody_labelled(home):
    index = (home / "Index.csv").read_text().splitlines()
    (home / "Index.csv").write_text("\n".join(r for r in index if "P002" not in r))
    df = open_cohort(home).set_index("scan_id", drop=False)
    assert pd.isna(df.loc["P002", "slice_labels"]) and pd.isna(df.loc["P002", "infected_slices"])
    with pytest.raises(CohortError, match="no labels") as e:
        slice_labels(df.loc["P002"], df.attrs["root"])
    assert "P002" in e.value.source


def test_tables_for_each_subject(home):
    "The labels of a subject as a table of its own"
    for name in ("P001", "P002", "cap001"):
        n = 16 + list(SUBJECTS).index(name)
        marks = [int(3 <= i < 5) for i in range(n)]
        table = {"slice_from_top": range(n), "infected": marks}
        table |= {f"lobe_{i}": [0] * n for i in range(5)}
        pd.DataFrame(table).to_csv(home / f"{name}_slices.csv", index=False)
    for f in (*home.glob("*.npy"), home / "Index.csv"):
        f.unlink()
    df = open_cohort(home)
    assert df.infected_slices.tolist() == [2, 2, 2]
    told = slice_labels(df.iloc[0], df.attrs["root"])
    assert told.from_top[told.infected].tolist() == [4, 3]
    table = pd.read_csv(home / "P001_slices.csv")
    table[:-1].to_csv(home / "P001_slices.csv", index=False)
    with pytest.raises(CohortError, match="P001_slices.csv"):
        open_cohort(home)


def lose_slices(home):
    for f in sorted((home / "COVID-19 subjects" / "P001").iterdir())[:12]:
        f.unlink()


@pytest.mark.parametrize(
    "spoil,says",
    [
        (lose_slices, "marks slice 5 of row 0, and the scan has 4 slices"),
        (lambda h: (h / "Index.csv").write_text("Label Index,ID\n0,P001\n"), "no index of labels"),
        (
            lambda h: (h / "Index.csv").write_text("Label Index,Folder/ID\n0,P001\n0,P002\n"),
            "twice",
        ),
        (
            lambda h: (h / "Index.csv").write_text("Label Index,Folder/ID\n9,P001\n"),
            "row 9 and 16 slices are needed",
        ),
        (
            lambda h: (h / "Slice-level-labels-updated-1.npy").write_bytes(b"none"),
            "no array of labels",
        ),
        (
            lambda h: np.save(h / "Slice-level-labels-updated-2.npy", np.full((5, 30), 2)),
            "other numbers than 0 and 1|marks slice",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(spoil, says, home):
    spoil(home)
    with pytest.raises(CohortError, match=says) as e:
        open_cohort(home)
    assert e.value.remedy and str(home) in e.value.source


@pytest.mark.data
def test_the_sample(data_dir):
    df = open_cohort(data_dir / "covid_ct_md").set_index("scan_id", drop=False)
    assert df.label.to_dict() == dict(P001="covid", cap001="cap")
    assert df.n_slice.to_dict() == dict(P001=148, cap001=168)
    for row in df.to_dict("records"):
        table = pd.read_csv(data_dir / "covid_ct_md" / f"{row['scan_id']}_slices.csv")
        told = slice_labels(row, df.attrs["root"])
        assert told.infected.sum() == table.infected.sum() == row["infected_slices"]
        assert told.infected.tolist() == table.infected.astype(bool).tolist()[::-1]
