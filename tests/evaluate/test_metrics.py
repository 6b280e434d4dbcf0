"""Metrics against scikit-learn and by hand; the bootstrap against its slow reference, and its
cost."""

import time
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
    roc_auc_score,
)

from covid_ct.evaluate.metrics import (
    METRICS,
    PredictionError,
    auc,
    average_precision,
    bootstrap,
    class_table,
    classification_metrics,
    confusion,
    confusion_figure,
    draw_patients,
    energy_in,
    interval,
    labels_and_probabilities,
    mask_scores,
    metric_statistic,
    metrics,
    pointing_game,
    pr_band,
    pr_figure,
    roc_band,
    roc_figure,
)
from covid_ct.scan import GeometryError

C3 = ("healthy", "cap", "covid")


def table(patients=50, scans=1, seed=0, classes=C3, same=0.9):
    rng, K = np.random.default_rng(seed), len(classes)
    y = np.repeat(rng.permutation(np.arange(patients) % K), scans)
    z = (
        1.5 * np.eye(K)[y]
        + np.repeat(rng.normal(size=(patients, K)), scans, 0) * same**0.5
        + rng.normal(size=(len(y), K)) * (1 - same) ** 0.5
    )
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return pd.DataFrame(
        dict(
            scan_id=[f"s{i}" for i in range(len(y))],
            patient_id=np.repeat([f"p{i}" for i in range(patients)], scans),
            label=np.array(classes)[y],
            **{f"prob_{c}": p[:, i] for i, c in enumerate(classes)},
        )
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [2, 7, 10**6])
def test_auc_is_sklearns(seed, ties):
    rng = np.random.default_rng(seed)
    y, s, w = rng.random(80) < 0.3, rng.integers(0, ties, 80), rng.integers(0, 3, (20, 80))
    assert np.allclose(auc(y, s), roc_auc_score(y, s))
    assert np.allclose(auc(y, s, w), [roc_auc_score(y, s, sample_weight=k) for k in w])
    assert np.allclose(auc(y, -s, w), 1 - auc(y, s, w))


@pytest.mark.parametrize("classes", [C3, ("cap", "covid"), ("covid", "ild", "cap", "healthy")])
def test_all_against_sklearn(classes):
    t = table(60, 2, classes=classes)
    y, prob, _ = labels_and_probabilities(t)
    call = prob.argmax(1)
    k = classes.index("covid")
    m = classification_metrics(t)
    assert list(m.index) == list(METRICS)
    one, macro = m["covid vs rest"], m["macro"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = [roc_auc_score(y == i, prob[:, i]) for i in range(len(classes))]
    assert np.allclose(
        one,
        [
            each[k],
            accuracy_score(y == k, call == k),
            recall_score(y == k, call == k),
            recall_score(y != k, call != k),
            f1_score(y == k, call == k),
        ],
    )
    assert np.allclose(
        macro,
        [
            np.mean(each),
            accuracy_score(y, call),
            recall_score(y, call, average="macro"),
            np.mean([recall_score(y != i, call != i) for i in range(len(classes))]),
            f1_score(y, call, average="macro"),
        ],
    )
    assert (confusion(y, call, len(classes))[0] == confusion_matrix(y, call)).all()


@pytest.mark.parametrize("classes", [C3, ("cap", "covid"), ("covid", "ild", "cap", "healthy")])
def test_every_class_against_sklearn(classes):
    """Six numbers of each class against the rest, their mean as macro, accuracy there the share
    that is right"""
    t = table(60, 2, classes=classes)
    y, prob, _ = labels_and_probabilities(t)
    call = prob.argmax(1)
    c = class_table(t, n=30)
    wide = c.pivot(index="class", columns="metric", values="value")
    assert (
        c["class"].unique().tolist() == [*classes, "macro"]
        and len(c) == 6 * (len(classes) + 1)
        and ((c.low <= c.value) & (c.value <= c.high)).all()
    )
    for i, k in enumerate(classes):
        a, b = y == i, call == i
        assert np.allclose(
            wide.loc[
                k, ["AUC", "accuracy", "sensitivity", "specificity", "precision", "F1"]
            ].astype(float),
            [
                roc_auc_score(a, prob[:, i]),
                accuracy_score(a, b),
                recall_score(a, b),
                recall_score(~a, ~b),
                precision_score(a, b),
                f1_score(a, b),
            ],
        )
    means = wide.drop(index="macro").mean()
    assert np.allclose(wide.loc["macro"].drop("accuracy"), means.drop("accuracy")) and np.isclose(
        wide.loc["macro", "accuracy"], accuracy_score(y, call)
    )
    assert np.allclose(
        wide.loc[["covid", "macro"], list(METRICS)].T.to_numpy(),
        classification_metrics(t)[["covid vs rest", "macro"]].to_numpy(),
    )


def test_class_table_is_the_bootstrap_and_says_what_is_undefined():
    t = table(40, 3)
    c = class_table(t, n=40, seed=5).set_index(["class", "metric"])
    slow = bootstrap(
        t,
        lambda f: precision_score(
            f.label == "cap",
            f[[f"prob_{k}" for k in C3]].to_numpy().argmax(1) == 1,
            zero_division=np.nan,
        ),
        n=40,
        seed=5,
    )
    assert np.allclose(c.loc[("cap", "precision"), ["value", "low", "high"]].astype(float), slow)
    never = t.assign(prob_cap=0.0, prob_healthy=0.6, prob_covid=0.4)
    n = class_table(never, C3, n=20).set_index(["class", "metric"])
    assert (
        np.isnan(n.loc[("cap", "precision"), "value"])
        and n.loc[("cap", "precision"), "note"].startswith("undefined")
        and n.loc[("cap", "sensitivity"), "value"] == 0
    )
    assert np.isnan(n.loc[("macro", "precision"), "value"]) and not np.isnan(
        n.loc[("macro", "sensitivity"), "value"]
    )
    with pytest.raises(PredictionError, match="patient_id"):
        class_table(t.drop(columns="patient_id"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [2, 7, 10**6])
def test_average_precision_and_curve_are_sklearns(seed, ties):
    rng = np.random.default_rng(seed)
    y, s, w = rng.random(80) < 0.2, rng.integers(0, ties, 80), rng.integers(0, 3, (20, 80))
    assert np.allclose(average_precision(y, s), average_precision_score(y, s))
    assert np.allclose(
        average_precision(y, s, w), [average_precision_score(y, s, sample_weight=k) for k in w]
    )
    grid = np.linspace(0.01, 1, 57)
    low, high = pr_band(y, s, np.ones((1, 80)), grid)
    p, r, _ = precision_recall_curve(y, s)  # recall falls along it
    assert (low == high).all() and np.allclose(
        low, [p[np.flatnonzero(r >= g - 1e-12)[-1]] for g in grid]
    )


def test_precision_recall_of_nothing_and_of_everything():
    y = np.arange(200) % 4 == 0
    assert (
        np.isnan(average_precision([0, 0], [0.1, 0.2]))
        and average_precision(y, y)[0] == 1
        and average_precision(y, np.ones(200))[0] == 0.25
    )
    w = draw_patients(np.arange(200), 300)
    low, high = pr_band(y, np.random.default_rng(0).random(200), w, [0.25, 0.5, 1.0])
    assert (low < 0.25 + 0.05).all() and (high > 0.25 - 0.05).all() and (low < high).all()


def test_column_order_does_not_matter():
    t = table()
    assert classification_metrics(t[t.columns[::-1]], classes=C3).equals(
        classification_metrics(t, classes=C3)
    )


@pytest.mark.parametrize("by", ["patient_id", "scan_id"])
def test_bootstrap_is_its_slow_twin(by):
    t = table(40, 3)
    for name in METRICS:
        fast = bootstrap(t, metric_statistic(name), by=by, n=40, seed=5)
        slow = bootstrap(
            t,
            lambda f, *, name=name: classification_metrics(f, classes=C3).loc[
                name, "covid vs rest"
            ],
            by=by,
            n=40,
            seed=5,
        )
        assert np.allclose(fast, slow)
    rows = metrics(t, n=40, seed=5)
    assert np.allclose(
        rows[(rows.setting == "macro") & (rows.metric == "F1")][["value", "low", "high"]].to_numpy(
            float
        )[0],
        bootstrap(t, metric_statistic("F1", None), n=40, seed=5),
    )


def test_bootstrap_ignores_row_order_and_repeats_by_seed():
    t = table(40, 2)
    a = bootstrap(t, metric_statistic())
    assert (
        a == bootstrap(t, metric_statistic())
        and np.allclose(a, bootstrap(t.sample(frac=1, random_state=0), metric_statistic()))
        and a != bootstrap(t, metric_statistic(), seed=1)
    )
    assert a.low < a.value < a.high and bootstrap(t, metric_statistic(), level=0.5).low > a.low


def test_patients_are_drawn_whole():
    w = draw_patients(["a", "a", "b", "c", "c", "c"], 2000)
    assert (
        (w[:, 0] == w[:, 1]).all()
        and (w[:, 3] == w[:, 5]).all()
        and (w[:, [0, 2, 3]].sum(1) == 3).all()
    )
    assert abs(w[:, 0].mean() - 1) < 0.06 and abs((w[:, 0] == 0).mean() - (2 / 3) ** 3) < 0.04


def test_patient_interval_is_wider_where_patients_repeat():
    ratios = []
    for seed in range(6):
        t = table(40, 4, seed)
        p, s = (bootstrap(t, metric_statistic(), by=by, n=400) for by in ("patient_id", "scan_id"))
        ratios.append((p.high - p.low) / (s.high - s.low))
    assert np.mean(ratios) > 1.4
    t = table(160)  # one scan each: no difference
    p, s = (bootstrap(t, metric_statistic(), by=by, n=1000) for by in ("patient_id", "scan_id"))
    assert 0.85 < (p.high - p.low) / (s.high - s.low) < 1.15


def test_bootstrap_is_fast():
    t = table(500)
    start = time.process_time()
    bootstrap(t, metric_statistic(), n=1000)
    assert time.process_time() - start < 1.5
    start = time.process_time()
    metrics(t, n=1000)
    assert time.process_time() - start < 3


def test_one_class_is_nan_with_a_reason():
    t = metrics(table()[lambda t: t.label == "covid"], C3, n=50).set_index(["setting", "metric"])
    assert (
        np.isnan(t.loc[("covid vs rest", "AUC"), "value"])
        and "undefined" in t.loc[("covid vs rest", "AUC"), "note"]
    )
    assert not np.isnan(t.loc[("covid vs rest", "sensitivity"), "value"]) and np.isnan(
        t.loc[("macro", "sensitivity"), "value"]
    )
    few = pd.concat(
        [table(30)[lambda t: t.label != "covid"], table(30)[lambda t: t.label == "covid"].head(1)]
    )
    assert "resampled cohorts" in bootstrap(few, metric_statistic(), n=200).reason
    assert interval(1.0, np.ones(5)).reason.startswith("all resampled")
    assert np.isnan(interval(0.5, [np.nan, np.nan, 0.5]).low)


def test_bad_tables():
    t = table()
    for bad in (
        t.drop(columns="label"),
        t.drop(columns="prob_cap"),
        t.assign(label="flu"),
        t.assign(label=None),
        t.assign(prob_cap=-0.1),
        t.assign(prob_cap=np.nan),
        t.assign(prob_cap=np.inf),
        t[:0],
    ):
        with pytest.raises(PredictionError):
            classification_metrics(bad, classes=C3)
    for call in (
        lambda: classification_metrics(t, "flu"),
        lambda: metric_statistic("Dice"),
        lambda: bootstrap(t.drop(columns="patient_id"), metric_statistic()),
        lambda: metrics(t.drop(columns="patient_id")),
        lambda: bootstrap(t.assign(patient_id=[None, *t.patient_id[1:]]), metric_statistic()),
        lambda: roc_figure(t[t.label == "covid"]),
        lambda: roc_figure(t, "flu"),
        lambda: pr_figure(t[t.label == "covid"]),
        lambda: classification_metrics(t, "macro"),
        lambda: roc_figure(t.drop(columns="patient_id")),
        lambda: pr_figure(t.assign(patient_id=[None, *t.patient_id[1:]])),
        lambda: class_table(t.assign(patient_id=[None, *t.patient_id[1:]])),
    ):
        with pytest.raises(PredictionError):
            call()


def test_roc_band_holds_the_curve_of_one_cohort():
    "With every scan drawn once the band is the curve itself, and its area the AUC"
    t = table(90)
    y, prob, _ = labels_and_probabilities(t)
    grid = np.linspace(0, 1, 4001)
    low, high = roc_band(y == 2, prob[:, 2], np.ones((1, 90)), grid)
    assert (low == high).all() and abs(np.trapezoid(low, grid) - auc(y == 2, prob[:, 2])[0]) < 2e-3


def test_figures_have_alt_text():
    t = table()
    for fig in (roc_figure(t, n=50), pr_figure(t, n=50), confusion_figure(t)):
        assert "50 scans" in fig.alt
    a = bootstrap(t, metric_statistic(), n=50)
    assert (
        f"AUC {a.value:.3f}, interval {a.low:.3f} to {a.high:.3f}" in roc_figure(t, n=50).alt
        and f"{average_precision(t.label == 'covid', t.prob_covid)[0]:.3f}"
        in pr_figure(t, n=50).alt
    )
    assert confusion_figure(table(classes=("cap", "covid"))).alt


def test_energy_and_pointing():
    v, m = np.zeros((4, 5, 6)), np.zeros((4, 5, 6), bool)
    v[1, 2, 3], v[2, 2, 2], m[1, 2, 3] = 3, 1, True
    assert (
        energy_in(v, m) == 0.75
        and pointing_game(v, m) == 1
        and pointing_game(v, ~m) == 0
        and energy_in(5 * v, m) == 0.75
    )
    assert (
        energy_in(v, np.ones_like(m)) == 1
        and energy_in(v, np.zeros_like(m)) == 0
        and np.isnan(energy_in(0 * v, m))
    )
    assert (
        pointing_game(np.where(v > 0, 1.0, 0.0), m) == 0.5
        and np.isnan(pointing_game(v * 0, m))
        and pointing_game(v, np.zeros_like(m), 9.0) == 0
    )
    far = np.zeros_like(m)
    far[3, 2, 3] = True
    assert (
        pointing_game(v, far, 9.9, (5.0, 1.0, 1.0)) == 0
        and pointing_game(v, far, 10.0, (5.0, 1.0, 1.0)) == 1
    )
    with pytest.raises(GeometryError):
        energy_in(v, m[:2])
    for bad in (v - 1, v * np.nan):
        with pytest.raises(PredictionError):
            energy_in(bad, m)


def blobs(seed, shape=(14, 15, 16)):
    rng = np.random.default_rng(seed)
    return [gaussian_filter(rng.normal(size=shape), 2) > 0.02 for _ in range(2)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 0.7)])
def test_masks_by_loop_and_against_monai(seed, spacing):
    "Every border voxel to every border voxel, written out; and MONAI, where it counts the same"
    a, b = blobs(seed)

    def rim(m):
        p = np.pad(m, 1)
        return np.argwhere(
            m
            & ~np.logical_and.reduce(
                [np.roll(p, k, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for k in (-1, 1)]
            )
        ) * np.array(spacing)

    d = np.sqrt(((rim(a)[:, None] - rim(b)[None]) ** 2).sum(-1))
    there, back, s = d.min(1), d.min(0), mask_scores(a, b, spacing)
    assert np.isclose(
        s["surface"], (there.sum() + back.sum()) / (len(there) + len(back))
    ) and np.isclose(s["hausdorff"], max(there.max(), back.max()))
    assert np.isclose(
        s["hd95"], max(np.quantile(there, 0.95), np.quantile(back, 0.95))
    ) and np.isclose(s["dice"], f1_score(a.ravel(), b.ravel()))
    assert s == pytest.approx(mask_scores(b, a, spacing)) and s == pytest.approx(
        mask_scores(a[:, ::-1], b[:, ::-1], spacing)
    )
    torch, m = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    x, y = (torch.tensor(v[None, None].astype("f4")) for v in (a, b))
    kw = dict(include_background=True, spacing=spacing)
    assert np.isclose(
        s["surface"],
        m.compute_average_surface_distance(x, y, symmetric=True, **kw).item(),
        rtol=1e-5,
    )
    assert np.isclose(
        s["hd95"], m.compute_hausdorff_distance(x, y, percentile=95, **kw).item(), rtol=1e-5
    ) and np.isclose(s["hausdorff"], m.compute_hausdorff_distance(x, y, **kw).item(), rtol=1e-5)


def test_masks_at_their_limits():
    m, e = np.zeros((6, 6, 6), bool), np.zeros((6, 6, 6), bool)
    m[2, 2, 2] = True
    assert (
        mask_scores(m, m) == dict(dice=1, surface=0, hd95=0, hausdorff=0)
        and mask_scores(m, e)["dice"] == 0
        and np.isnan(mask_scores(e, e)["dice"])
    )
    assert all(np.isnan(mask_scores(m, e)[k]) for k in ("surface", "hd95", "hausdorff"))
    full = np.ones((6, 6, 6), bool)  # the edge of the picture is a border, too
    assert mask_scores(full, full)["surface"] == 0 and mask_scores(full, m, (1.0, 1.0, 1.0))[
        "hausdorff"
    ] == np.sqrt(27)
    far = np.zeros_like(m)
    far[5, 2, 2] = True
    assert mask_scores(m, far, (4.0, 1.0, 1.0))["surface"] == 12
    with pytest.raises(GeometryError):
        mask_scores(m, m[1:])
