"""A paper by one command: toy runs in each published layout, stopped and taken up, plans, and the
errors before any training."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from covid_ct.batches.augment import SIX_VIEWS
from covid_ct.batches.slices import SliceBatches, SliceDataset, augmented_six
from covid_ct.cli import main
from covid_ct.io.read import read, write_mask
from covid_ct.papers import reproduce as module
from covid_ct.papers.plan import ProtocolError, assign_roles, departures_of, rows_of_job
from covid_ct.papers.published import published
from covid_ct.papers.records import PAPERS, Paper, Variant, add_paper, all_papers, paper_of
from covid_ct.papers.reproduce import make_plan, reproduce
from covid_ct.phantom.cohort import phantom_cohort, write_phantom_cohort
from covid_ct.phantom.slices import phantom_slices
from covid_ct.scan import DataError, GeometryError, UnitsError
from covid_ct.train.recipes import recipe
from covid_ct.train.run_folder import best_epoch

SOME = {
    "darnet": ("darnet", "darnet-none"),
    "dual_sampling": ("rn34-us", "attention-rn34-us", "attention-rn34-ss"),
    "raunet": ("raunet-unet", "raunet-unet-no-augmentation"),
    "prior_attention": ("wa-66", "pa-66-m"),
}
LAYOUT = dict(darnet="cc_ccii", dual_sampling="csv", raunet="medseg100", prior_attention="csv")


def rows_of(paper, only):
    "Rows of the tables that the variants stand for"
    return {key for key, names in paper_of(paper).rows.items() if set(names) <= set(only)}


@pytest.mark.parametrize("paper", SOME)
def test_toy_from_its_layout_stopped_and_taken_up(tmp_path, monkeypatch, capsys, paper):
    """Phantoms in the layout and unit of the paper, through the same adapter; killed in the
    middle; every row of the trained variants is filled, nothing is held against the paper"""
    out, only, count = tmp_path / "out", SOME[paper], []
    real = module.train_fold

    def stopped(*a, **k):
        count.append(a)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(module, "train_fold", stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce(paper, "phantoms", out, "toy", only, progress=False)
    monkeypatch.undo()
    (first,) = out.rglob("config.json")
    stamp = first.stat().st_mtime_ns
    words = ["reproduce", paper, "phantoms", "--out", str(out), "--scale", "toy", "--json"]
    assert main([*words, "--only", *only]) == 0
    told = json.loads(capsys.readouterr().out)
    assert first.stat().st_mtime_ns == stamp and len(told["runs"]) == len(
        list(out.rglob("config.json"))
    )
    plan = make_plan(paper, "phantoms", out, "toy", only)
    assert plan.cohort.attrs["adapter"] == LAYOUT[paper]
    assert paper != "darnet" or set(plan.cohort.units) == {"uint8"}
    t, page = pd.read_csv(out / "tables.csv"), (out / "report.html").read_text("utf-8")
    assert t.difference.isna().all() and page.count("TOY SCALE") == t.table.nunique()
    mine = t[
        [
            (r.row, r.part) in rows_of(paper, only) or (r.row, "") in rows_of(paper, only)
            for r in t.itertuples()
        ]
    ]
    empty = mine.note.str.contains("undefined here|no scan with a ratio|one class only")
    assert len(mine) and (mine.ours.notna() | empty).all(), mine[mine.ours.isna() & ~empty].note
    assert mine.note[mine.metric != "parameters"].str.contains("toy scale").mean() > 0.9
    assert page.count("<img") >= (1 if paper == "raunet" else 3)


def test_nobody_plays_two_roles():
    "In every run of every paper training, validation and test have no patient in common"
    for paper in all_papers().values():
        rows = phantom_cohort(90, labels=tuple(paper.classes), second_scan=0.4)
        cohort = assign_roles(paper, rows)
        part = {k: set(g.patient_id) for k, g in cohort.groupby("fold")}
        assert sum(map(len, part.values())) == cohort.patient_id.nunique()
        assert (-1 in part) == ("test" in paper.roles) and (-2 in part) == ("select" in paper.roles)
        again = assign_roles(paper, rows.sample(frac=1, random_state=1)).fold
        assert again.sort_index().equals(cohort.fold)
        assert departures_of(paper, cohort)  # phantoms are never as many as in the paper


def test_the_fold_that_is_scored_never_chose_the_epoch(tmp_path):
    "Wang et al.: a run validates on the select role and is tested on its own fold"
    paper = paper_of("prior_attention")
    cohort = assign_roles(paper, phantom_cohort(90, labels=tuple(paper.classes)))
    select, test = (set(cohort.scan_id[cohort.fold == k]) for k in (-2, -1))
    from covid_ct.papers.plan import make_jobs

    jobs = make_jobs(paper, cohort, tmp_path, only=("pa-66-m",))
    assert [j.part for j in jobs] == ["fold"] * 5 + ["final"]
    for j in jobs:
        rows = rows_of_job(cohort, j)
        valid, scored = (set(rows.scan_id[rows.fold == k]) for k in (j.fold, -1))
        own = test if j.part == "final" else set(cohort.scan_id[cohort.fold == j.fold])
        assert valid == select and scored == own
        trained = set(rows.scan_id[(rows.fold >= 0) & (rows.fold != j.fold)])
        assert not trained & (select | test | scored)


@pytest.mark.data
def test_the_plan_of_cc_ccii_has_the_paper_s_counts(data_dir, tmp_path):
    plan = make_plan("darnet", data_dir / "cc_ccii_tables", tmp_path / "out")
    n = plan.roles.patients
    assert n["test"].to_dict() == dict(covid=165, cap=175, healthy=117)
    assert n["train"].to_dict() == dict(covid=764, cap=789, healthy=732)
    assert len(plan.jobs) == 20 and plan.departures == () and "54%" in str(plan)
    with pytest.raises(ProtocolError, match="not on this disk"):
        reproduce("darnet", data_dir / "cc_ccii_tables", tmp_path / "out", progress=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Thirty small phantoms with masks on disk"
    rows = phantom_cohort(30, labels=("cap", "covid"), second_scan=0, law="ouyang")
    out = tmp_path_factory.mktemp("files")
    return write_phantom_cohort(out, rows, (16, 24, 24), progress=False)


def saved(cohort, path):
    "A copy of the table with paths that can be opened from anywhere"
    root = Path(cohort.attrs["root"])
    cohort = cohort.copy()
    for c in ("path", "lung_mask", "infection_mask", "lobe_mask"):
        if c in cohort:
            cohort[c] = [str(root / v) if isinstance(v, str) else v for v in cohort[c]]
    cohort.to_csv(path, index=False)
    return path


def no_class(t, folder):
    return t[t.label != "cap"]


def no_test(t, folder):
    return t.assign(role="train")


def few(t, folder):
    return t.assign(fold=np.where(np.arange(len(t)) == 0, -1, np.arange(len(t)) % 3))


def no_masks(t, folder):
    return t.assign(infection_mask=None, infection_ratio=None).drop(columns="infection_ratio")


def lost_mask(t, folder):
    return t.assign(lung_mask="none.nii.gz")


def other_grid(t, folder):
    scan = read(Path(t.attrs["root"]) / t.path.iloc[0])
    small = scan.replace(voxels=scan.voxels[1:])
    write_mask(np.ones(small.shape, bool), small, folder / "short.nii.gz")
    lung = [str(folder / "short.nii.gz"), *t.lung_mask.iloc[1:]]
    return t.assign(lung_mask=lung)


def grey(t, folder):
    return t.assign(units="uint8")


@pytest.mark.parametrize(
    "spoil, error, said",
    [
        (no_class, ProtocolError, "no scan of class 'cap'"),
        (no_test, ProtocolError, "no scan of the role 'test'"),
        (few, ProtocolError, "role 'test': has no patient of class"),
        (no_masks, ProtocolError, "infection_mask names nothing"),
        (lost_mask, DataError, "lung_mask none.nii.gz does not exist"),
        (other_grid, GeometryError, "has shape"),
        (grey, UnitsError, "is in uint8"),
    ],
)
def test_bad_input_before_any_training(files, tmp_path, spoil, error, said):
    table = spoil(files, tmp_path)
    table.attrs.update(files.attrs)
    path = tmp_path / "cohort.csv"
    if spoil is lost_mask:
        table = table.assign(path=[str(Path(files.attrs["root"]) / p) for p in table.path])
        table.to_csv(path, index=False)
    else:
        saved(table, path)
    with pytest.raises(error, match=said) as e:
        make_plan("dual_sampling", path, tmp_path / "out", "toy")
    assert e.value.remedy and not (tmp_path / "out").exists()


def test_names_that_are_not_there_and_a_full_disk(files, tmp_path, monkeypatch, capsys):
    path = saved(files, tmp_path / "cohort.csv")
    words = ["reproduce", "dual_sampling", str(path), "--out", str(tmp_path / "out")]
    for more, said in (
        (["--only", "rn50"], "no variant 'rn50'"),
        (["--folds", "7"], "no fold 7"),
        (["--folds", "x"], "no numbers"),
        (["--scale", "huge"], "no scale 'huge'"),
    ):
        assert main([*words, "--scale", "toy", *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["reproduce", "alexnet", str(path), "--out", str(tmp_path / "out")]) == 2
    monkeypatch.setattr(
        "covid_ct.papers.plan.shutil.disk_usage", lambda p: type("Usage", (), dict(free=1))
    )
    assert main([*words, "--scale", "toy"]) == 2
    assert "free" in capsys.readouterr().err and not (tmp_path / "out" / "runs").exists()


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    words = ["reproduce", "raunet", "phantoms", "--out", str(tmp_path / "o"), "--scale", "toy"]
    assert main([*words, "--dry-run", "--json", "--only", "raunet-unet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["hours"] > 0 and told["memory_bytes"] > 0 and len(told["runs"]) == 2
    assert not (tmp_path / "o" / "runs").exists()


def test_six_images_in_place_of_one():
    "An epoch of Chen et al. holds each slice in all six views, whatever the order"
    data = SliceDataset(phantom_slices(3, 24, seed=2), 24)
    batches = list(SliceBatches(data, 4, "raunet-six", seed=1))
    seen = torch.cat([b["image"] for b in batches])
    wanted, _ = augmented_six(data.image, data.mask)
    assert len(seen) == len(data) * len(SIX_VIEWS) == len(wanted)

    def key(x):
        return sorted(round(float(v), 3) for v in x.flatten(1).double().square().sum(1))

    assert key(seen) == key(wanted)
    assert len(SliceBatches(data, 4, "raunet")) == 1


def test_the_last_epoch_is_kept_where_nothing_is_selected():
    history = pd.DataFrame(dict(valid_dice=[0.1, 0.9, 0.2], valid_loss=[1, 0.1, 0.5]))
    assert best_epoch(history, "last") == 2 and best_epoch(history, "dice") == 1
    assert {v.recipe.keep for v in paper_of("raunet").variants} == {"last"}


def test_a_fifth_paper_is_one_record():
    "Nothing but a record is needed for rows, tables and plan"
    from dataclasses import replace

    from covid_ct.papers.published import _ROWS, PUBLISHED, add_table

    four = paper_of("darnet")
    own = replace(recipe("darnet", "tiny"), system="mine", name="paper")
    facts = dict(classes=dict(cap=10, covid=10), roles={}, phantoms="table", layouts=("csv",))
    record = Paper(
        "mine",
        "Mine 2026",
        "my own",
        **facts,
        folds=2,
        variants=(Variant("net", own),),
        rows={("Net", ""): ("net",)},
        reference="Net",
        table="I",
        read=four.read,
        tables=("I",),
    )
    try:
        add_paper(record)
        add_table("mine", "I", "AUC", "COVID-19 against the rest | Net | 0.9")
        assert published("mine", "I").value.tolist() == [0.9]
        assert paper_of("mine") is record
        with pytest.raises(DataError, match="without its variant"):
            add_paper(replace(record, rows={("Net", ""): ("other",)}))
    finally:
        PAPERS.pop("mine", None)
        PUBLISHED.pop("mine", None)
        _ROWS[:] = [r for r in _ROWS if r["paper"] != "mine"]
