"""Metrics against scikit-learn and by hand; the bootstrap against its slow twin, and its cost."""
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from covid_ct.evaluate.metrics import (METRICS, PredictionError, auc, bootstrap, classification_metrics, confusion, confusion_figure, draw_patients, energy_in, interval,
                                       metric, metrics_table, pointing_game, roc_band, roc_figure, scored)
from covid_ct.scan import GeometryError
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score, roc_auc_score

C3 = ("healthy", "cap", "covid")


def table(patients=50, scans=1, seed=0, classes=C3, same=.9):
    rng, K = np.random.default_rng(seed), len(classes)
    y = np.repeat(rng.permutation(np.arange(patients) % K), scans)
    z = 1.5 * np.eye(K)[y] + np.repeat(rng.normal(size=(patients, K)), scans, 0) * same ** .5 + rng.normal(size=(len(y), K)) * (1 - same) ** .5
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return pd.DataFrame(dict(scan_id=[f"s{i}" for i in range(len(y))], patient_id=np.repeat([f"p{i}" for i in range(patients)], scans), label=np.array(classes)[y],
                             **{f"prob_{c}": p[:, i] for i, c in enumerate(classes)}))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [2, 7, 10**6])
def test_auc_is_sklearns(seed, ties):
    rng = np.random.default_rng(seed)
    y, s, w = rng.random(80) < .3, rng.integers(0, ties, 80), rng.integers(0, 3, (20, 80))
    assert np.allclose(auc(y, s), roc_auc_score(y, s))
    assert np.allclose(auc(y, s, w), [roc_auc_score(y, s, sample_weight=k) for k in w])
    assert np.allclose(auc(y, -s, w), 1 - auc(y, s, w))


@pytest.mark.parametrize("classes", [C3, ("cap", "covid"), ("covid", "ild", "cap", "healthy")])
def test_all_against_sklearn(classes):
    t = table(60, 2, classes=classes); y, prob, _ = scored(t); call = prob.argmax(1); k = classes.index("covid"); m = classification_metrics(t)
    assert list(m.index) == list(METRICS)
    one, macro = m["covid vs rest"], m["macro"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = [roc_auc_score(y == i, prob[:, i]) for i in range(len(classes))]
    assert np.allclose(one, [each[k], accuracy_score(y == k, call == k), recall_score(y == k, call == k), recall_score(y != k, call != k), f1_score(y == k, call == k)])
    assert np.allclose(macro, [np.mean(each), accuracy_score(y, call), recall_score(y, call, average="macro"),
                               np.mean([recall_score(y != i, call != i) for i in range(len(classes))]), f1_score(y, call, average="macro")])
    assert (confusion(y, call, len(classes))[0] == confusion_matrix(y, call)).all()


def test_column_order_does_not_matter():
    t = table()
    assert classification_metrics(t[t.columns[::-1]], classes=C3).equals(classification_metrics(t, classes=C3))


@pytest.mark.parametrize("by", ["patient_id", "scan_id"])
def test_bootstrap_is_its_slow_twin(by):
    t = table(40, 3)
    for name in METRICS:
        fast = bootstrap(t, metric(name), by=by, n=40, seed=5)
        slow = bootstrap(t, lambda f: classification_metrics(f, classes=C3).loc[name, "covid vs rest"], by=by, n=40, seed=5)
        assert np.allclose(fast, slow)
    rows = metrics_table(t, n=40, seed=5)
    assert np.allclose(rows[(rows.setting == "macro") & (rows.metric == "F1")][["value", "low", "high"]].to_numpy(float)[0], bootstrap(t, metric("F1", None), n=40, seed=5))


def test_bootstrap_ignores_row_order_and_repeats_by_seed():
    t = table(40, 2)
    a = bootstrap(t, metric())
    assert a == bootstrap(t, metric()) and np.allclose(a, bootstrap(t.sample(frac=1, random_state=0), metric())) and a != bootstrap(t, metric(), seed=1)
    assert a.low < a.value < a.high and bootstrap(t, metric(), level=.5).low > a.low


def test_patients_are_drawn_whole():
    w = draw_patients(["a", "a", "b", "c", "c", "c"], 2000)
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 3] == w[:, 5]).all() and (w[:, [0, 2, 3]].sum(1) == 3).all()
    assert abs(w[:, 0].mean() - 1) < .06 and abs((w[:, 0] == 0).mean() - (2 / 3) ** 3) < .04


def test_patient_interval_is_wider_where_patients_repeat():
    ratios = []
    for seed in range(6):
        t = table(40, 4, seed)
        p, s = (bootstrap(t, metric(), by=by, n=400) for by in ("patient_id", "scan_id"))
        ratios.append((p.high - p.low) / (s.high - s.low))
    assert np.mean(ratios) > 1.4
    t = table(160)                                                                 # one scan each: no difference
    p, s = (bootstrap(t, metric(), by=by, n=1000) for by in ("patient_id", "scan_id"))
    assert .85 < (p.high - p.low) / (s.high - s.low) < 1.15


def test_bootstrap_is_fast():
    t = table(500); start = time.process_time()
    bootstrap(t, metric(), n=1000)
    assert time.process_time() - start < 1.5
    start = time.process_time(); metrics_table(t, n=1000)
    assert time.process_time() - start < 3


def test_one_class_is_nan_with_a_reason():
    t = metrics_table(table()[lambda t: t.label == "covid"], C3, n=50).set_index(["setting", "metric"])
    assert np.isnan(t.loc[("covid vs rest", "AUC"), "value"]) and "undefined" in t.loc[("covid vs rest", "AUC"), "note"]
    assert not np.isnan(t.loc[("covid vs rest", "sensitivity"), "value"]) and np.isnan(t.loc[("macro", "sensitivity"), "value"])
    few = pd.concat([table(30)[lambda t: t.label != "covid"], table(30)[lambda t: t.label == "covid"].head(1)])
    assert "resampled cohorts" in bootstrap(few, metric(), n=200).reason
    assert interval(1., np.ones(5)).reason.startswith("all resampled")
    assert np.isnan(interval(.5, [np.nan, np.nan, .5]).low)


def test_bad_tables():
    t = table()
    for bad in (t.drop(columns="label"), t.drop(columns="prob_cap"), t.assign(label="flu"), t.assign(label=None), t.assign(prob_cap=-.1), t.assign(prob_cap=np.nan), t.assign(prob_cap=np.inf), t[:0]):
        with pytest.raises(PredictionError): classification_metrics(bad, classes=C3)
    for call in (lambda: classification_metrics(t, "flu"), lambda: metric("Dice"), lambda: bootstrap(t.drop(columns="patient_id"), metric()), lambda: metrics_table(t.drop(columns="patient_id")),
                 lambda: bootstrap(t.assign(patient_id=[None, *t.patient_id[1:]]), metric()), lambda: roc_figure(t[t.label == "covid"]), lambda: roc_figure(t, "flu")):
        with pytest.raises(PredictionError): call()


def test_roc_band_holds_the_curve_of_one_cohort():
    "With every scan drawn once the band is the curve itself, and its area the AUC"
    t = table(90); y, prob, _ = scored(t); grid = np.linspace(0, 1, 4001)
    low, high = roc_band(y == 2, prob[:, 2], np.ones((1, 90)), grid)
    assert (low == high).all() and abs(np.trapezoid(low, grid) - auc(y == 2, prob[:, 2])[0]) < 2e-3


def test_figures_have_alt_text():
    t = table()
    for fig in (roc_figure(t, n=50), confusion_figure(t)): assert "50 scans" in fig.alt
    assert confusion_figure(table(classes=("cap", "covid"))).alt


def test_energy_and_pointing():
    v, m = np.zeros((4, 5, 6)), np.zeros((4, 5, 6), bool)
    v[1, 2, 3], v[2, 2, 2], m[1, 2, 3] = 3, 1, True
    assert energy_in(v, m) == .75 and pointing_game(v, m) == 1 and pointing_game(v, ~m) == 0 and energy_in(5 * v, m) == .75
    assert energy_in(v, np.ones_like(m)) == 1 and energy_in(v, np.zeros_like(m)) == 0 and np.isnan(energy_in(0 * v, m))
    assert pointing_game(np.where(v > 0, 1., 0.), m) == .5 and np.isnan(pointing_game(v * 0, m)) and pointing_game(v, np.zeros_like(m), 9.) == 0
    far = np.zeros_like(m); far[3, 2, 3] = True
    assert pointing_game(v, far, 9.9, (5., 1., 1.)) == 0 and pointing_game(v, far, 10., (5., 1., 1.)) == 1
    with pytest.raises(GeometryError): energy_in(v, m[:2])
    for bad in (v - 1, v * np.nan):
        with pytest.raises(PredictionError): energy_in(bad, m)
