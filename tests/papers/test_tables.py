"""The papers' tables from run folders: values against scikit-learn, seats, tests, honesty of
empty cells and phantoms, traces to files, formats, the checklist, the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from covid_ct.evaluate.statistics import holm
from covid_ct.models.dual_sampling import RATIO_GROUPS, ratio_group
from covid_ct.models.zoo import ROWS, build
from covid_ct.papers.checklist import _FILLED, _ITEMS, _PARTLY, AUTHOR, fill_checklist
from covid_ct.papers.published import PUBLISHED, PublishedError, published, tables_of
from covid_ct.papers.records import paper_of
from covid_ct.papers.report import (
    _FORMATS,
    _confusion_panels,
    _roc_panels,
    _rows_with_runs,
    write_report,
)
from covid_ct.papers.runs import (
    RunPredictions,
    TableError,
    estimate,
    find_runs,
    open_runs,
    row_requirements,
    select,
)
from covid_ct.papers.runs import paired_tests as paired
from covid_ct.papers.tables import (
    _count_cell,
    _network_size,
    _tex_text,
    _weight_counts,
    changed_files,
    cohort_of_runs,
    file_table,
    paper_table,
    printed_table,
    to_latex,
    to_markdown,
)
from covid_ct.train.recipes import change, recipe, to_dict
from covid_ct.train.run_folder import RunError, write_tensors

SYSTEM = {
    "darnet": "darnet",
    "rn34": "dual_sampling",
    "attention-rn34": "dual_sampling",
    "raunet": "raunet",
    "66": "prior_attention",
}


def answers(classes, patients=40, shift=1.5, seed=0, part="test", prefix=""):
    """Made-up probabilities, two scans of every other patient; the patients' own difficulty does
    not depend on `seed`"""
    who = np.repeat(np.arange(patients), 1 + np.arange(patients) % 2)
    y, n, k = who % len(classes), len(who), len(classes)
    z = (
        np.random.default_rng(len(part)).normal(size=(n, k))
        + np.random.default_rng([seed, 7]).normal(size=(n, k)) / 2
    )
    z[np.arange(n), y] += shift
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return pd.DataFrame(
        {
            "scan_id": [f"{prefix}{part}{i:03d}" for i in range(n)],
            "patient_id": [f"{prefix}{part}-{w}" for w in who],
            "label": [classes[i] for i in y],
            **{f"prob_{c}": p[:, i] for i, c in enumerate(classes)},
            "part": part,
        }
    )


def counts(n=20, seed=0, part="valid", prefix=""):
    "Made-up voxel counts of a segmentation"
    rng, t = (
        np.random.default_rng(seed),
        {
            "scan_id": [f"{prefix}{part}{i:02d}" for i in range(n)],
            "patient_id": [f"{prefix}p{i:02d}" for i in range(n)],
        },
    )
    for c in ("background", "ggo", "consolidation"):
        true = rng.integers(0, 50, n)
        t |= {
            f"true_{c}": true,
            f"found_{c}": true + rng.integers(0, 20, n),
            f"both_{c}": (true * rng.uniform(0.5, 1, n)).astype(int),
        }
    return pd.DataFrame(t).assign(part=part)


def make_run(
    folder,
    row,
    shift=1.5,
    fold=0,
    seed=0,
    trained_on="cc_ccii",
    table=None,
    status="finished",
    row_of="paper",
    protocol=True,
    part="test",
    folds=1,
    **kw,
):
    "A run folder without a training"
    system = next(s for k, s in SYSTEM.items() if k in row)
    r = change(recipe(system, row_of), "test", model=row, seed=seed, **kw)
    config = dict(
        status=status,
        system=system,
        recipe=to_dict(r),
        recipe_hash=r.hash,
        seed=seed,
        trained_on=trained_on,
        split_hash="5" * 64,
        warnings=[],
        fold=fold,
        model=dict(kind="Net", parameters=35_237_163),
        versions=dict(covid_ct="0", torch="2"),
        hardware=dict(device="cpu", gpu=""),
    )
    if protocol is True:
        protocol = dict(scale="paper", departures=[], part=part, folds=folds)
    if protocol:
        config["protocol"] = protocol
    if table is None and system == "raunet":
        table = counts(seed=fold, prefix=f"{fold}")
    if table is None:
        table = pd.concat(
            [
                answers(r.classes, shift=shift, seed=fold + 10 * seed + 100 * len(row)),
                answers(r.classes, 20, shift, fold + 50, "valid", f"{fold}"),
            ]
        )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    table.to_csv(folder / "predictions.csv", index=False)
    return table


@pytest.fixture()
def darnet(tmp_path):
    for fold in range(3):
        make_run(tmp_path / "runs" / "both" / str(fold), "darnet", 2.2, fold)
        make_run(tmp_path / "runs" / "none" / str(fold), "darnet-none", 1.0, fold)
    return tmp_path / "runs"


def cell(table, row, metric, part=None):
    t = table[(table.row == row) & (table.metric == metric)]
    return (t if part is None else t[t.part == part]).iloc[0]


REST, THREE = "COVID-19 against the rest", "three classes"


# ---------------------------------------------------------------- what is printed


def test_published():
    "Values that a reader can look up, and nothing twice"
    t = pd.concat(published(p) for p in PUBLISHED)
    at = t.set_index(["paper", "table", "part", "row", "metric"])
    assert not at.index.duplicated().any()
    for key, printed in {
        ("darnet", "IV", THREE, "DARNet (w/o DA)", "sensitivity"): "91.70±3.58",
        ("darnet", "II", REST, "[15]", "accuracy"): "93.57",
        (
            "dual_sampling",
            "III",
            "test set, > 0.030",
            "Attention RN34 + DS",
            "specificity",
        ): "0.650±0.037",
        ("raunet", "II", "no augmentation", "M - R", "accuracy"): "0.76",
        ("prior_attention", "II", "ILD", "PA-66-M", "F1"): "90.2±1.1",
        ("prior_attention", "I", "", "PA-66-M", "parameters"): "15,988,903",
    }.items():
        assert at.printed[key] == printed
    assert (
        at.value["prior_attention", "Fig. 6", "ILD", "PA-66-M", "called_ILD"] == 95.5
        and at.scans["dual_sampling", "II", "test set", "RN34 + US", "AUC"] == 2796
    )
    assert tables_of("darnet") == ["I", "II", "III", "IV"] and set(
        t.source[t.paper == "raunet"]
    ) == {"Chen et al. 2020, Table I", "Chen et al. 2020, Table II"}
    with pytest.raises(PublishedError, match="I, II, III, IV"):
        published("darnet", "VI")
    with pytest.raises(PublishedError, match="raunet"):
        published("resnet")


def test_every_row_has_a_network():
    "A seat names a row of the zoo; rows of other groups have none"
    without = {
        (r.paper, r.row)
        for p in PUBLISHED
        for r in published(p).itertuples()
        if not row_requirements(p, r.row, r.part)
        and r.metric not in ("scans", "patients", "age", "female", "male")
    }
    assert {row for p, row in without if p == "darnet"} == {"[11]", "[14]", "[15]", "[28]"} and {
        p for p, _ in without
    } == {"darnet", "prior_attention"}
    assert all(
        n in ROWS
        for p in PUBLISHED
        for r in published(p).itertuples()
        for n, _ in row_requirements(p, r.row, r.part)
    )


# ---------------------------------------------------------------- runs


def test_find_runs(tmp_path, darnet):
    make_run(darnet / "half", "darnet", status="running")
    runs = find_runs(darnet)
    assert [r.name for r in runs] == [
        "both/0",
        "both/1",
        "both/2",
        "none/0",
        "none/1",
        "none/2",
    ] and open_runs(runs) is not None
    assert [r.name for r in find_runs(darnet / "both" / "0")] == ["0"] and [
        r.name for r in find_runs(darnet / "both" / "0", darnet / "none")
    ] == ["both/0", "none/0", "none/1", "none/2"]
    with pytest.raises(TableError, match="1 runs, none of them finished"):
        find_runs(darnet / "half")
    with pytest.raises(TableError):
        find_runs(tmp_path / "nowhere")
    (darnet / "both" / "0" / "config.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        find_runs(darnet)


def test_phantoms_and_patients_do_not_mix(darnet):
    make_run(darnet / "drawn", "darnet", fold=9, trained_on="240 Phantoms")
    with pytest.raises(TableError, match="some are on phantoms"):
        paper_table("darnet", "IV", darnet, n=10)


def test_phantoms_that_were_written_to_disk(tmp_path):
    "A cohort file has forgotten that it was drawn; the names of its scans have not"
    t = answers(("healthy", "cap", "covid"))
    make_run(
        tmp_path / "drawn",
        "darnet",
        trained_on="cohort.csv",
        table=t.assign(scan_id=[f"P005{i:04d}-1" for i in range(len(t))]),
    )
    make_run(
        tmp_path / "real",
        "darnet",
        trained_on="cohort.csv",
        table=t.assign(scan_id=[f"P{i:03d}-1" for i in range(len(t))]),
    )
    assert [r.phantoms for r in find_runs(tmp_path)] == [True, False]
    one = paper_table("darnet", "IV", tmp_path / "drawn", n=10)
    assert (
        one.difference.isna().all() and one.note[one.row == "DARNet"].str.contains("phantoms").all()
    )


def test_a_training_counts_once(darnet):
    make_run(darnet / "copy", "darnet", fold=1)
    with pytest.raises(TableError, match="both/1/predictions.csv"):
        paper_table("darnet", "IV", darnet, n=10)


def test_held_out_and_shared(tmp_path):
    """Test sets of their own, one for all, or validation folds: Table II and Fig. 6 of Wang et
    al. take what is meant"""
    classes = recipe("prior_attention", "tiny").classes
    for k in range(3):
        make_run(
            tmp_path / f"fold{k}",
            "pa-66-m",
            fold=0,
            table=answers(classes, seed=k, prefix=f"own{k}"),
        )
    for s in range(2):
        make_run(tmp_path / f"all{s}", "pa-66-m", seed=s, table=answers(classes, seed=s))
    runs = find_runs(tmp_path)
    held, shared = (
        select(runs, "prior_attention", "PA-66-M", p)[0] for p in ("held-out", "shared")
    )
    assert (
        len(held) == 3
        and all(m.table.scan_id[0].startswith("own") for m in held)
        and len(shared) == 2
    )
    six, two = (paper_table("prior_attention", t, tmp_path, n=20) for t in ("Fig. 6", "II"))
    assert cell(six, "PA-66-M", "accuracy").models == 2 and cell(two, "PA-66-M", "AUC").models == 3
    for k in range(3):
        (tmp_path / f"fold{k}" / "config.json").unlink()
    assert (
        select(find_runs(tmp_path), "prior_attention", "PA-66-M", "held-out")[1]
        == "no run of pa-66-m"
    )  # no validation answers in these
    make_run(tmp_path / "cv0", "sa-66-m", fold=0)
    make_run(tmp_path / "cv1", "sa-66-m", fold=1)
    found, note = select(find_runs(tmp_path), "prior_attention", "SA-66-M", "held-out")
    assert found == [] and note == "no run of sa-66-m"  # never scored on what chose the epoch


def test_the_part_that_reproduce_noted_decides(tmp_path):
    "Every run of `reproduce` has a test set of its own, also the one on all folds"
    classes = recipe("prior_attention", "tiny").classes
    for k, part in enumerate(("fold", "fold", "final")):
        table = answers(classes, seed=k, prefix=f"{part}{k}")
        make_run(tmp_path / str(k), "pa-66-m", fold=k, table=table, part=part, folds=2)
    runs = find_runs(tmp_path)
    held, shared = (
        select(runs, "prior_attention", "PA-66-M", p)[0] for p in ("held-out", "shared")
    )
    assert len(held) == 2 and [m.table.scan_id[0][:5] for m in shared] == ["final"]


def test_a_study_writes_test_csv(tmp_path):
    t = answers(("healthy", "cap", "covid"))
    make_run(tmp_path / "run", "darnet", table=t.assign(part="valid"))
    assert select(find_runs(tmp_path), "darnet", "DARNet")[1] == "no run of darnet"
    t.drop(columns="part").to_csv(tmp_path / "run" / "test.csv", index=False)
    (model,), _ = select(find_runs(tmp_path), "darnet", "DARNet")
    assert len(model.table) == len(t) and list(model.files) == ["run/test.csv"]


# ---------------------------------------------------------------- numbers


def test_darnet_against_sklearn(darnet):
    "Every number of Table IV from the files that its line names, by another library"
    t = paper_table("darnet", "IV", darnet, n=20)
    mine = t[t.ours.notna()]
    assert len(mine) == 20
    for r in mine.itertuples():
        each = []
        for f in r.files.split("; "):
            p = pd.read_csv(darnet / f).query("part=='test'")
            prob = p[[f"prob_{c}" for c in ("healthy", "cap", "covid")]].to_numpy()
            y, got = p.label.map(["healthy", "cap", "covid"].index).to_numpy(), prob.argmax(1)

            def one(k, y=y, prob=prob, got=got):
                return dict(
                    AUC=roc_auc_score(y == k, prob[:, k]),
                    sensitivity=recall_score(y == k, got == k),
                    specificity=recall_score(y != k, got != k),
                    F1=f1_score(y == k, got == k),
                )

            each.append(
                accuracy_score(y, got)
                if r.metric == "accuracy"
                else one(2)[r.metric]
                if r.part == REST
                else np.mean([one(k)[r.metric] for k in range(3)])
            )
        scale = 100 if r.unit == "%" else 1
        assert np.isclose(r.ours, scale * np.mean(each)) and np.isclose(
            r.sd, scale * np.std(each, ddof=1)
        ), (r.part, r.metric)
        assert (
            r.low <= r.ours <= r.high
            and np.isclose(r.difference, r.ours - r.theirs)
            and (r.scans, r.patients, r.models) == (60, 40, 3)
        )


def test_prior_against_sklearn(tmp_path):
    make_run(tmp_path / "r", "wa-66-m", 1.2)
    p = pd.read_csv(tmp_path / "r" / "predictions.csv").query("part=='test'")
    classes = ["healthy", "ild", "covid"]
    y, got = p.label.map(classes.index), p[[f"prob_{c}" for c in classes]].to_numpy().argmax(1)
    m = {k: float(v[0]) for k, v in paper_of("prior_attention").read(p).items()}
    for i, name in enumerate(("Non-Pneu", "ILD", "COVID-19")):
        want = dict(
            precision=precision_score(y == i, got == i),
            recall=recall_score(y == i, got == i),
            F1=f1_score(y == i, got == i),
            accuracy=accuracy_score(y == i, got == i),
            called_ILD=(got[y == i] == 1).mean(),
        )
        assert all(np.isclose(m[name, k], v) for k, v in want.items())
    assert np.isclose(m["", "accuracy"], accuracy_score(y, got))


def test_segmentation_by_hand(tmp_path):
    "Two folds and both settings; Dice, accuracy and precision from the counts, lesions only"
    for fold in range(2):
        make_run(tmp_path / f"a{fold}", "raunet", fold=fold, augment="raunet")
        make_run(tmp_path / f"n{fold}", "raunet-unet", fold=fold, augment="none")
    t = paper_table("raunet", "II", tmp_path, n=20)
    have = t[t.ours.notna()].groupby(["part", "row"]).size()
    assert (
        dict(have) == {("with augmentation", "Ours(M)"): 3, ("no augmentation", "U-Net"): 3}
        and cell(t, "M - A", "Dice").note == "no run of raunet-a with augmentation"
    )
    each = []
    for fold in range(2):
        p = pd.read_csv(tmp_path / f"a{fold}" / "predictions.csv")

        def d(c, p=p):
            return (2 * p[f"both_{c}"] / (p[f"true_{c}"] + p[f"found_{c}"]))[
                p[f"true_{c}"] + p[f"found_{c}"] > 0
            ].mean()

        k = ("ggo", "consolidation")
        each.append(
            (
                np.mean([d(c) for c in k]),
                sum(p[f"both_{c}"].sum() for c in k) / sum(p[f"true_{c}"].sum() for c in k),
                np.mean([p[f"both_{c}"].sum() / p[f"found_{c}"].sum() for c in k]),
            )
        )
    assert np.allclose(
        [cell(t, "Ours(M)", m).ours for m in ("Dice", "accuracy", "precision")], np.mean(each, 0)
    )


@pytest.fixture()
def dual(tmp_path):
    for fold in range(2):
        for name, row, sampler in (
            ("us", "rn34", "uniform"),
            ("aus", "attention-rn34", "uniform"),
            ("ass", "attention-rn34", "size_balanced"),
        ):
            make_run(
                tmp_path / "runs" / f"{name}{fold}",
                row,
                fold=fold,
                sampler=sampler,
                loss="cross_entropy",
                loss_kwargs={},
                table=pd.concat(
                    [
                        answers(
                            ("cap", "covid"), 40, 1, fold + len(name) + 40 * (sampler == "uniform")
                        ),
                        answers(("cap", "covid"), 20, 1, fold + 5, "valid", f"{fold}"),
                    ]
                ),
            )
    scans = pd.concat(
        [
            pd.read_csv(p / "predictions.csv")[["scan_id", "patient_id", "label", "part"]]
            for p in (tmp_path / "runs").iterdir()
        ]
    ).drop_duplicates("scan_id")
    cohort = scans.assign(
        infection_ratio=np.random.default_rng(0).choice([0.0005, 0.01, 0.2], len(scans)),
        fold=np.where(scans.part == "test", -1, 0),
    ).drop(columns="part")
    cohort.to_csv(tmp_path / "cohort.csv", index=False)
    return tmp_path / "runs", tmp_path / "cohort.csv"


def test_ensemble_by_hand(dual):
    "DS of each fold from two files by Eq. 5; without ratios the cell is empty and says so"
    runs, cohort = dual
    bare = paper_table("dual_sampling", "II", runs, n=20)
    assert "needs infection ratios" in cell(
        bare, "Attention RN34 + DS", "AUC"
    ).note and np.isfinite(cell(bare, "Attention RN34 + SS", "AUC").ours)
    t = paper_table("dual_sampling", "II", runs, cohort, n=20)
    ratio, aucs, f1 = pd.read_csv(cohort).set_index("scan_id").infection_ratio, [], []
    for fold in range(2):
        us, ss = (
            pd.read_csv(runs / f"{k}{fold}" / "predictions.csv")
            .query("part=='test'")
            .set_index("scan_id")
            for k in ("aus", "ass")
        )
        r = ratio[us.index]
        w = np.where((r < 0.001) | (r > 0.030), 0.35, 0.96)
        p = w * us.prob_covid + (1 - w) * ss.prob_covid.reindex(us.index)
        aucs.append(roc_auc_score(us.label == "covid", p))
        f1.append(f1_score(us.label == "covid", p >= 0.5, average="macro"))
    at = cell(t, "Attention RN34 + DS", "AUC", "test set")
    assert np.isclose(at.ours, np.mean(aucs)) and np.isclose(
        cell(t, "Attention RN34 + DS", "F1", "test set").ours, np.mean(f1)
    )
    assert (
        set(at.files.split("; "))
        == {f"{k}{f}/predictions.csv" for k in ("aus", "ass") for f in range(2)}
        and "cohort.csv" in t.attrs["files"]
    )


def test_pooled_folds_and_groups(dual):
    """TV set: all folds as one, no spread; groups of Table III hold the scans of their ratio,
    and their counts are counted"""
    runs, cohort = dual
    t = paper_table("dual_sampling", "II", runs, cohort, n=20)
    both = pd.concat(
        [pd.read_csv(runs / f"us{f}" / "predictions.csv").query("part=='valid'") for f in range(2)]
    )
    at = cell(t, "RN34 + US", "AUC", "TV set")
    assert (
        np.isclose(at.ours, roc_auc_score(both.label == "covid", both.prob_covid))
        and np.isnan(at.sd)
        and at.models == 1
        and at.scans == len(both)
    )
    three, c = paper_table("dual_sampling", "III", runs, cohort, n=20), pd.read_csv(cohort)
    for g in RATIO_GROUPS:
        part = f"test set, {g}"
        ids = set(c[(ratio_group(c.infection_ratio) == g) & (c.fold == -1)].scan_id)
        assert (
            cell(three, "Total", "scans", part).ours
            == len(ids)
            == cell(three, "RN34 + US", "AUC", part).scans
        )
        p = pd.read_csv(runs / "us0" / "predictions.csv").query("part=='test'")
        p = p[p.scan_id.isin(ids) & (p.label == "covid")]
        q = pd.read_csv(runs / "us1" / "predictions.csv").set_index("scan_id").loc[p.scan_id]
        assert np.isclose(
            cell(three, "RN34 + US", "sensitivity", part).ours,
            np.mean([(p.prob_covid >= 0.5).mean(), (q.prob_covid >= 0.5).mean()]),
        )


def test_counts(tmp_path, darnet):
    """Table I from split.csv and the labels of all folds; two splits are refused; what is not
    known is said"""
    t = paper_table("darnet", "I", darnet)
    assert cell(t, "COVID-19", "scans", "test set").note.startswith("no split.csv")
    every = pd.concat(
        [pd.read_csv(darnet / "both" / str(k) / "predictions.csv") for k in range(3)]
    ).drop_duplicates("scan_id")
    split = every[["scan_id", "patient_id"]].assign(fold=np.where(every.part == "test", -1, 0))
    for k in ("both", "none"):
        split.to_csv(darnet / k / "split.csv", index=False)
    t = paper_table("darnet", "I", darnet)
    want = every[(every.label == "covid") & (every.part == "valid")]
    assert (
        cell(t, "COVID-19", "scans", "training set").ours == len(want)
        and cell(t, "COVID-19", "patients", "training set").ours == want.patient_id.nunique()
    )
    assert cell(t, "In total", "scans", "in total").ours == len(every) and {
        "both/split.csv",
        "none/split.csv",
    } < set(t.attrs["files"])
    split.assign(fold=0).to_csv(darnet / "none" / "split.csv", index=False)
    with pytest.raises(TableError, match="different splits"):
        paper_table("darnet", "I", darnet)
    people = cohort_of_runs([r for r in find_runs(darnet) if r.name.startswith("both")])
    assert _count_cell(people, "TV set", "COVID-19", "age")[1] == "no column age: give a cohort"


def test_sizes(tmp_path, darnet):
    "Trainable parameters from config.json in millions; Keras' count from the header of the weights"
    t = paper_table("darnet", "III", darnet)
    assert (
        np.isclose(cell(t, "DARNet", "parameters").ours, 35.237163)
        and cell(t, "DARNet", "parameters").files == "both/0/config.json"
        and cell(t, "DARNet (w/o CA)", "parameters").note == "no run of darnet-da"
    )
    net = build("sa-66-m", depth=32, width=4, blocks=(1, 1, 1, 1), hidden=16)
    write_tensors(tmp_path / "w.safetensors", net.state_dict())
    got = _weight_counts(tmp_path / "w.safetensors")
    assert got["parameters"] == sum(p.numel() for p in net.parameters()) + sum(
        b.numel() for k, b in net.named_buffers() if "running" in k
    )
    assert got["convolutions"] == sum(isinstance(m, torch.nn.Conv3d) for m in net.modules())
    make_run(tmp_path / "pa", "pa-66-m")
    assert (
        "no checkpoints/best.safetensors"
        in _network_size(find_runs(tmp_path / "pa")[0], "prior_attention", "parameters")[2]
    )


# ---------------------------------------------------------------- intervals and tests


def test_interval_is_over_patients():
    "Two copies of each scan of a patient: the interval stays; as patients of their own it shrinks"
    t = answers(("cap", "covid"), 60, 1.0)
    key, width = (
        ("", "accuracy"),
        lambda *ts: (lambda i: i.high - i.low)(
            estimate(
                [RunPredictions((0, k, ""), u, {}) for k, u in enumerate(ts)],
                paper_of("dual_sampling").read,
                400,
            )[key][2]
        ),
    )
    twice = pd.concat([t, t], ignore_index=True)
    alone = twice.assign(patient_id=[f"{i}" for i in range(len(twice))])
    assert (
        np.isclose(width(twice), width(t))
        and np.isclose(width(t, t, t), width(t))
        and width(alone) < 0.75 * width(t)
    )


def test_swap_by_patients_is_exact():
    """With two patients there are four swaps: enumerated by hand, the random ones agree; the
    models' test is Student's"""
    a, b = (
        pd.DataFrame(
            dict(
                scan_id=list("wxyz"),
                patient_id=list("1122"),
                label=["covid", "cap"] * 2,
                prob_covid=p,
            )
        ).assign(prob_cap=lambda t: 1 - t.prob_covid)
        for p in ([0.9, 0.1, 0.9, 0.1], [0.9, 0.6, 0.3, 0.1])
    )
    key = ("", "accuracy")
    assert paired(
        [RunPredictions((0, 0, ""), a, {})],
        [RunPredictions((0, 0, ""), b, {})],
        paper_of("dual_sampling").read,
        4000,
    )[key][1] == pytest.approx(0.5, abs=0.03)  # |d| = 1/2 in two of four swaps, 0 in two
    rng = np.random.default_rng(0)
    shifts = (
        [answers(("cap", "covid"), 30, s, k) for k, s in enumerate(rng.uniform(1, 2, 4))],
        [answers(("cap", "covid"), 30, 0.5, 9 + k) for k in range(4)],
    )
    ms = [[RunPredictions((0, k, ""), t, {}) for k, t in enumerate(ts)] for ts in shifts]
    d = np.array(
        [
            roc_auc_score(x.label == "covid", x.prob_covid)
            - roc_auc_score(y.label == "covid", y.prob_covid)
            for x, y in zip(*shifts, strict=False)
        ]
    )
    from scipy.stats import ttest_1samp

    assert paired(*ms, paper_of("dual_sampling").read, 50)["", "AUC"][0] == pytest.approx(
        ttest_1samp(d, 0).pvalue
    )
    assert (
        paired(
            ms[0],
            [m._replace(key=(1, *m.key[1:])) for m in ms[1]],
            paper_of("dual_sampling").read,
            9,
        )
        == {}
    )  # other seeds: not a pair


def test_swap_keeps_its_level():
    "Equal networks: p below 0.05 in about 5 % of 200 studies with clustered patients"
    low = 0
    for s in range(200):
        a, b = (answers(("cap", "covid"), 24, 1, 1000 + 2 * s + j) for j in range(2))
        low += (
            paired(
                [RunPredictions((0, 0, ""), a, {})],
                [RunPredictions((0, 0, ""), b, {})],
                paper_of("dual_sampling").read,
                99,
                seed=s,
            )["", "AUC"][1]
            < 0.05
        )
    assert 2 <= low <= 20


def test_holm_over_rows(dual):
    "p of three rows against the reference, corrected within a metric; the reference has none"
    runs, cohort = dual
    t = paper_table("dual_sampling", "II", runs, cohort, n=99)
    part = t[(t.part == "test set") & (t.metric == "AUC")].set_index("row")
    assert (
        np.isnan(part.p_patients["RN34 + US"])
        and part.p_patients.notna().sum() == 3
        and part.p_models.notna().sum() == 3
    )
    ref, _ = select(find_runs(runs), "dual_sampling", "RN34 + US")
    ratio = cohort_of_runs(find_runs(runs), cohort).ratio
    raw = [
        paired(
            select(find_runs(runs), "dual_sampling", row, ratio=ratio)[0],
            ref,
            paper_of("dual_sampling").read,
            99,
        )["", "AUC"][1]
        for row in part.index[1:]
    ]
    assert np.allclose(part.p_patients.iloc[1:], holm(raw))


# ---------------------------------------------------------------- honesty


def test_missing_runs_are_named(darnet):
    t = paper_table("darnet", "IV", darnet, n=10)
    assert (
        (t.note[t.row == "DARNet (w/o DA)"] == "no run of darnet-ca").all()
        and (t.note[t.row == "DARNet (w/o CA)"] == "no run of darnet-da").all()
        and t.ours[t.row.str.contains("CA\\)$|DA\\)$") & ~t.row.str.contains("and")].isna().all()
    )
    two = paper_table("darnet", "II", darnet, n=10)
    assert (
        two.note[two.row == "[28]"].str.startswith("not ours")
    ).all() and two.p_patients.isna().all()  # its reference row is not in this table
    empty = paper_table("raunet", "I", darnet, n=10)
    assert empty.ours.isna().all() and set(empty.note) == {
        "no run of raunet with augmentation",
        "no run of raunet no augmentation",
        "no run of raunet-unet with augmentation",
        "no run of raunet-unet no augmentation",
    }


@pytest.mark.parametrize(
    "trained_on, word",
    [("phantoms, study x", "phantoms: no reproduction"), ("", "data not named: no reproduction")],
)
def test_no_difference_without_patients(tmp_path, trained_on, word):
    make_run(tmp_path / "a", "darnet", trained_on=trained_on)
    t = paper_table("darnet", "IV", tmp_path, n=10)
    mine = t[t.row == "DARNet"]
    assert (
        mine.ours.notna().all() and t.difference.isna().all() and mine.note.str.contains(word).all()
    )
    size = cell(paper_table("darnet", "III", tmp_path), "DARNet", "parameters")
    assert np.isfinite(size.difference) and not size.note  # a size is a size
    assert "difference" in printed_table(t) and (printed_table(t)["difference"] == "").all()


@pytest.mark.parametrize(
    "protocol, said",
    [
        (None, "not run by reproduce"),
        (dict(scale="small", departures=[], part="test", folds=1), "small scale"),
        (
            dict(scale="paper", departures=["2 folds in place of 5"], part="test", folds=1),
            "2 folds",
        ),
        (dict(scale="paper", departures=[], part="test", folds=5), "4 of 5 runs of darnet"),
    ],
)
def test_no_difference_outside_the_protocol(tmp_path, protocol, said):
    """The paper's recipe on real scans, but not the paper's protocol: nothing in any table, also
    not a number of scans, is held against the paper"""
    make_run(tmp_path / "runs" / "a", "darnet", protocol=protocol)
    cohort = answers(("healthy", "cap", "covid")).assign(fold=-1)
    cohort.to_csv(tmp_path / "cohort.csv", index=False)
    for name in ("I", "II", "IV"):
        t = paper_table("darnet", name, tmp_path / "runs", tmp_path / "cohort.csv", n=10)
        mine = t[t.ours.notna()]
        assert len(mine) and t.difference.isna().all()
        assert mine.note.str.contains(said, regex=False).all()
    out = write_report("darnet", tmp_path / "runs", tmp_path / "out", ("csv", "md"), n=10)
    assert pd.read_csv(out["tables.csv"]).query("metric != 'parameters'").difference.isna().all()
    if protocol and protocol["scale"] == "small":
        text = out["tables.md"].read_text("utf-8")
        assert text.count("SMALL SCALE") == 4 and "| difference" not in text


# ---------------------------------------------------------------- traces


def test_a_planted_number_moves_the_table(darnet, tmp_path):
    """One probability in one file: the numbers that rest on it move, the others do not, the
    fingerprint tells, the report tells"""
    write_report("darnet", darnet, tmp_path / "report", n=20)
    before, files = (
        paper_table("darnet", "IV", darnet, n=20),
        file_table([paper_table("darnet", "IV", darnet, n=20)]),
    )
    assert changed_files(tmp_path / "report", darnet) == [] and list(files.file) == [
        f"{k}/{i}/predictions.csv" for k in ("both", "none") for i in range(3)
    ]
    path = darnet / "none" / "1" / "predictions.csv"
    t = pd.read_csv(path)
    i = t[(t.part == "test") & (t.label == "covid")].prob_covid.idxmax()
    t.loc[i, ["prob_healthy", "prob_cap", "prob_covid"]] = (0.8, 0.1, 0.1)
    t.to_csv(path, index=False)
    after = paper_table("darnet", "IV", darnet, n=20)
    moved = before[~np.isclose(before.ours, after.ours, equal_nan=True)]
    assert set(moved.row) == {"DARNet (w/o DA and CA)"} and {
        "AUC",
        "accuracy",
        "sensitivity",
        "F1",
    } <= set(moved.metric)
    lost = (
        cell(before, "DARNet (w/o DA and CA)", "sensitivity", REST).ours
        - cell(after, "DARNet (w/o DA and CA)", "sensitivity", REST).ours
    )
    assert np.isclose(
        lost, 100 / (t[t.part == "test"].label == "covid").sum() / 3
    )  # one of the covid scans, in one of three models
    now = file_table([after])
    assert (
        list(now.file[now.sha256 != files.sha256])
        == ["none/1/predictions.csv"]
        == changed_files(tmp_path / "report", darnet)
    )
    old = (tmp_path / "report" / "tables.md").read_text("utf-8")
    write_report("darnet", darnet, tmp_path / "report", n=20)
    assert (tmp_path / "report" / "tables.md").read_text("utf-8") != old and changed_files(
        tmp_path / "report", darnet
    ) == []
    path.unlink()
    assert changed_files(tmp_path / "report", darnet) == ["none/1/predictions.csv"]


def test_every_number_names_its_files(dual):
    "No number of ours without a file, no file that is not listed; the cohort counts as one"
    runs, cohort = dual
    for table in tables_of("dual_sampling"):
        t = paper_table("dual_sampling", table, runs, cohort, n=10)
        assert (t.files[t.ours.notna()] != "").all() and (t.files[t.ours.isna()] == "").all()
        assert {f for line in t.files for f in line.split("; ") if f} <= set(
            t.attrs["files"]
        ) and all(Path(p).is_file() for p in t.attrs["files"].values())
    out = runs.parent / "report"
    write_report("dual_sampling", runs, out, ["csv"], cohort, n=10)
    assert changed_files(out, runs, cohort) == []
    cohort.write_text(cohort.read_text("utf-8") + "\n")
    assert changed_files(out, runs, cohort) == ["cohort.csv"]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(lr=0.1), "paper (changed: lr)"),
        (dict(epochs=3, milestones=()), "paper (changed: epochs, milestones)"),
        (dict(row_of="tiny"), "tiny"),
        (dict(model_kwargs=dict(classes=3, depth=64, width=4)), "model_kwargs"),
    ],
)
def test_no_difference_for_a_changed_recipe(tmp_path, how, said):
    """Real scans, real training, another recipe: the numbers stay, the difference goes, the
    table says why"""
    make_run(tmp_path / "runs" / "a", "darnet", **how)
    t = paper_table("darnet", "IV", tmp_path / "runs", n=10)
    mine = t[t.row == "DARNet"]
    assert mine.ours.notna().all() and t.difference.isna().all()
    assert mine.note.str.contains("no difference, not the paper's recipe").all()
    assert mine.note.str.contains(said, regex=False).all()
    sizes = cell(paper_table("darnet", "III", tmp_path / "runs"), "DARNet", "parameters")
    other_network = "model_kwargs" in said or said == "tiny"
    assert np.isnan(sizes.difference) == other_network and bool(sizes.note) == other_network
    page = write_report("darnet", tmp_path / "runs", tmp_path / "out", ("md",), n=10)[
        "tables.md"
    ].read_text("utf-8")
    assert "Not the paper's recipe" in page and said in page


def test_what_chooses_the_row_is_no_change(tmp_path):
    """An ablation of the paper, trained as the paper says with another seed, is held against the
    paper"""
    make_run(tmp_path / "a", "darnet-none", seed=3)
    t = paper_table("darnet", "IV", tmp_path, n=10)
    mine = t[t.row == "DARNet (w/o DA and CA)"]
    assert np.isfinite(mine.difference).all() and (mine.note == "").all()


def test_a_name_in_an_old_file_is_not_believed(tmp_path):
    "Runs written before recipes were named after their changes"
    make_run(tmp_path / "a", "darnet")
    p = tmp_path / "a" / "config.json"
    c = json.loads(p.read_text("utf-8"))
    c["recipe"] |= dict(lr=0.5, name="paper")
    p.write_text(json.dumps(c), "utf-8")
    t = paper_table("darnet", "IV", tmp_path, n=10)
    assert (
        t.difference.isna().all() and t.note.str.contains("paper (changed: lr)", regex=False).any()
    )


def test_latex_escapes_everything():
    raw = r"50 % of a_b & {c} #1 $x$ ~ ^ \n < > ± … −"
    safe = _tex_text(raw)
    bare = re.sub(
        r"\\[&%$#_{}]|\\textbackslash\{\}|\\textasciitilde\{\}|\\textasciicircum\{\}"
        r"|\\ldots\{\}|\$[<>-]\$|\$\\pm\$",
        "",
        safe,
    )
    assert not set(bare) & set("&%$#_{}~^\\<>±…−") and all(ord(c) < 128 for c in safe)
    table = to_latex(pd.DataFrame({"a_b": ["1 & 2"], "c": ["x"]}), "50 %")
    assert (
        table.count("\\begin{longtable}{ll}") == 1
        and r"a\_b & c \\" in table
        and r"1 \& 2 & x \\" in table
        and r"\caption{50 \%} \\" in table
    )


def test_markdown_keeps_its_columns():
    t = pd.DataFrame({"a": ["x|y", "two\nlines", "back\\|"], "b": ["1", "2", "3"]})
    lines = to_markdown(t).splitlines()
    assert len(lines) == 5 and all(
        len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines
    )


def test_shown_has_the_papers_digits(darnet):
    s = printed_table(paper_table("darnet", "IV", darnet, n=10))
    at = s[(s.row == "DARNet") & (s.metric == "AUC")].iloc[0]
    assert (
        at.theirs == "0.9950 ± 0.0020"
        and re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", at.ours)
        and re.fullmatch(r"[+-]0\.\d{4}", at["difference"])
        and at["scans / patients / models"] == "60 / 40 / 3"
    )
    assert re.fullmatch(
        r"\d+\.\d\d ± \d+\.\d\d", s[(s.row == "DARNet") & (s.metric == "accuracy, %")].iloc[0].ours
    )
    ages = printed_table(paper_table("dual_sampling", "I", darnet))
    assert ages[ages.metric == "age, years"].theirs.iloc[0] == "50.0 (14-89)"


def test_report_in_every_format(darnet, tmp_path):
    out = tmp_path / "out"
    done = write_report("darnet", darnet, out, n=10)
    assert (
        {p.name for p in out.iterdir()}
        == set(done)
        == {"report.html", "tables.md", "tables.tex", "tables.csv", "files.csv", "claim.md"}
    )
    assert all(str(tmp_path) not in p.read_text("utf-8") for p in out.iterdir())
    csv = pd.read_csv(out / "tables.csv")
    assert (
        len(csv) == len(published("darnet"))
        and np.allclose(csv.theirs, published("darnet").value)
        and csv.files[csv.ours.notna()].notna().all()
    )
    tex = (out / "tables.tex").read_text("utf-8")
    assert tex.count("\\begin{longtable}") == tex.count("\\end{longtable}") == 4
    page = (out / "report.html").read_text("utf-8")
    assert (
        page.count("<img ") == 2
        and "no run of darnet-ca" in page
        and file_table([paper_table("darnet", "IV", darnet, n=10)]).sha256[0] in page
    )
    only = write_report("darnet", darnet, tmp_path / "one", ["md"], n=10)
    assert set(only) == {"files.csv", "claim.md", "tables.md"}


def test_nothing_is_written_on_a_mistake(darnet, tmp_path):
    out = tmp_path / "out"
    for call, error, word in (
        (("raunet", darnet, out), TableError, "no run of this system"),
        (("darnet", darnet, out, ["pdf"]), TableError, "pdf"),
        (("resnet", darnet, out), PublishedError, "resnet"),
        (("darnet", tmp_path / "x", out), TableError, "none of them finished"),
    ):
        with pytest.raises(error, match=word):
            write_report(*call)
    assert not out.exists() and set(_FORMATS) == {"html", "md", "tex", "csv"}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_hostile_names_stay_text(tmp_path):
    "Scan names, folder names and model cards from outside are text in the page"
    evil = "<img src=x onerror=alert(1)>"
    t = answers(("healthy", "cap", "covid"), shift=0).assign(scan_id=lambda t: evil + t.scan_id)
    make_run(tmp_path / "runs" / "a&b <i>", "darnet", table=t)
    (tmp_path / "runs" / "a&b <i>" / "model_card.md").write_text(evil, "utf-8")
    write_report("darnet", tmp_path / "runs", tmp_path / "out", n=10)
    tags = Tags()
    tags.feed((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert (
        all(a["src"].startswith("data:image/png") for k, a in tags.seen if k == "img")
        and "i" not in {k for k, _ in tags.seen}
        and evil in fill_checklist(tmp_path / "runs").said[38]
    )


def test_figures_tell_the_tables_numbers(darnet):
    rows = _rows_with_runs("darnet", find_runs(darnet))
    assert list(rows) == ["DARNet (w/o DA and CA)", "DARNet"]
    fig = _roc_panels(rows, n=20)
    t = paper_table("darnet", "IV", darnet, n=10)
    legend = [
        [float(x.get_text().split()[-1]) for x in ax.get_legend().get_texts()] for ax in fig.axes
    ]
    assert len(fig.axes) == 3 and np.allclose(
        np.mean(legend, 0), [cell(t, r, "AUC", REST).ours for r in rows], atol=0.001
    )
    panels = _confusion_panels(rows)
    share = [
        sum(int(x.get_text().split()[0]) for i, x in enumerate(ax.texts) if i in (0, 4, 8))
        / sum(int(x.get_text().split()[0]) for x in ax.texts)
        for ax in panels.axes
    ]
    assert (
        np.allclose(100 * np.array(share), [cell(t, r, "accuracy", REST).ours for r in rows])
        and "answers right" in panels.alt
    )


def test_page_in_a_browser(browser, darnet, tmp_path):
    "Opens from disk without asking anybody, nothing in the console, readable on a phone"
    write_report("darnet", darnet, tmp_path / "out", ["html"], n=10)
    page, asked, errors = browser.new_page(viewport={"width": 390, "height": 800}), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: errors.append(m.text))
    page.goto((tmp_path / "out" / "report.html").as_uri())
    assert (
        all(u.startswith(("file:", "data:")) for u in asked)
        and not errors
        and page.locator("h2").count() >= 8
    )
    assert (
        page.evaluate("document.documentElement.scrollWidth") <= 390
        and page.locator("table").count() >= 7
    )
    page.close()


# ---------------------------------------------------------------- the checklist


def test_claim(tmp_path, darnet):
    "44 items, each with a state; what is filled says something, what is not asks for something"
    t = fill_checklist(darnet, n=20)
    assert (
        list(t.item) == list(range(1, 45))
        and [tuple(x) for x in t[["section", "topic"]].to_numpy()] == _ITEMS
        and set(t.state) == {_FILLED, _PARTLY, AUTHOR}
    )
    assert (
        (t.said[t.state != AUTHOR] != "").all()
        and (t.missing[t.state != _FILLED] != "").all()
        and (t.missing[t.state == _FILLED] == "").all()
    )
    said = t.set_index("item").said
    assert (
        "6 trainings" in said[25]
        and "darnet-none" in said[22]
        and "darnet" in said[22]
        and "torch 2" in said[23]
        and "accuracy" not in said[38]
        and re.search(r"sensitivity 0\.\d+ \(0\.\d+ … ", said[38])
    )
    wrong = sum(
        (
            p[[f"prob_{c}" for c in ("healthy", "cap", "covid")]].idxmax(axis=1).str[5:] != p.label
        ).sum()
        for f in darnet.rglob("predictions.csv")
        for p in [pd.read_csv(f).query("part=='test'")]
    )
    assert said[39].startswith(f"{wrong} of 360 test answers")


def test_claim_of_all_systems(tmp_path, dual):
    runs, cohort = dual
    t = fill_checklist(runs, cohort, n=10).set_index("item")
    assert (
        "two networks" in t.said[27]
        and t.state[20] == _FILLED
        and "test: 60 scans of 40 patients" in t.said[19]
    )
    make_run(
        tmp_path / "seg",
        "raunet",
        trained_on="phantoms",
        table=pd.concat([counts(), counts(part="test", seed=5)]),
    )
    t = fill_checklist(tmp_path / "seg", n=10).set_index("item")
    assert t.state[39] == AUTHOR and "Dice" in t.said[37] and t.state[14] == _FILLED
    make_run(tmp_path / "pa", "pa-66-m")
    assert "sensitivity" in fill_checklist(tmp_path / "pa", n=10).set_index("item").said[38]


# ---------------------------------------------------------------- real answers


@pytest.mark.data
def test_the_authors_own_answers(data_dir, tmp_path):
    """The release's predictions as two runs: three-class accuracy and AUC by scikit-learn,
    difference from the paper printed"""
    t = pd.read_csv(data_dir / "cc_ccii_tables" / "release_predictions.csv")
    names = dict(CP="cap", NCP="covid", Normal="healthy")
    for k, (run, g) in enumerate(t.groupby("run")):
        g = g.assign(
            label=g.label.map(names),
            part="test",
            scan_id=g.scan_id.astype(str),
            patient_id=g.patient_id.astype(str),
        ).rename(columns={"p_cp": "prob_cap", "p_ncp": "prob_covid", "p_normal": "prob_healthy"})
        make_run(
            tmp_path / str(run),
            "darnet",
            fold=k,
            trained_on="CC-CCII",
            table=g[
                ["scan_id", "patient_id", "label", "prob_healthy", "prob_cap", "prob_covid", "part"]
            ],
        )
    four = paper_table("darnet", "IV", tmp_path, n=200)
    at = cell(four, "DARNet", "AUC", REST)
    assert (
        np.isclose(
            at.ours,
            np.mean([roc_auc_score(g.label == "NCP", g.p_ncp) for _, g in t.groupby("run")]),
        )
        and at.models == 2
        and at.patients == 436
    )
    assert np.isfinite(four[four.row == "DARNet"].difference).all() and at.low < at.ours < at.high
