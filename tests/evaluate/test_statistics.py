"""Intervals, tests and calibration against published examples, slow references, scikit-learn and
SciPy; coverage by simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, log_loss, roc_auc_score

from covid_ct.evaluate.calibration import (
    apply_temperature,
    at_threshold,
    brier,
    calibrate,
    decision_figure,
    ece,
    ece_floor,
    fit_temperature,
    net_benefit,
    predictive_values,
    reliability,
    reliability_figure,
    shift_prevalence,
    subgroups,
    threshold_at,
    youden_threshold,
)
from covid_ct.evaluate.metrics import (
    PredictionError,
    auc,
    bootstrap,
    draw_patients,
    metric_statistic,
)
from covid_ct.evaluate.statistics import (
    _placements,
    auc_interval,
    compare_aucs,
    compare_groups,
    compare_runs,
    delong,
    holm,
    mcnemar,
    mean_interval,
    paired_permutation,
    paired_t,
    wilson,
)

C3 = ("healthy", "cap", "covid")


def study(rng, patients=120, scans=3, same=0.8, d=1.0, mixed=False):
    """Truth, score and patient; the true AUC is Phi(d / sqrt 2); `mixed` patients have scans of
    both classes"""
    who = np.repeat(np.arange(patients), scans)
    truth = (
        rng.random(len(who)) < 0.5
        if mixed
        else np.repeat(rng.permutation(patients) % 2 == 0, scans)
    )
    return (
        truth,
        d * truth
        + same**0.5 * rng.normal(size=patients)[who]
        + (1 - same) ** 0.5 * rng.normal(size=len(who)),
        who,
    )


def ward(patients=300, seed=0, sharp=1.0, scans=1):
    """Predictions whose true probabilities are softmax(z) and whose reported ones are
    softmax(sharp z)"""
    rng = np.random.default_rng(seed)
    z = 1.6 * rng.normal(size=(patients, 3))
    p, said = (np.exp(s * z) / np.exp(s * z).sum(1, keepdims=True) for s in (1, sharp))
    y, who = np.array([rng.choice(3, p=q) for q in p]), np.repeat(np.arange(patients), scans)
    return pd.DataFrame(
        dict(
            scan_id=[f"s{seed}-{i}" for i in range(len(who))],
            patient_id=[f"p{seed}-{i}" for i in who],
            label=np.array(C3)[y[who]],
            **{f"prob_{c}": said[who, k] for k, c in enumerate(C3)},
        )
    )


# shares


@pytest.mark.parametrize("n", [1, 2, 7, 50, 472])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_the_closed_form_and_its_own_inverse(n, level):
    z = stats.norm.ppf((1 + level) / 2)
    for k in {0, 1, n // 2, n}:
        p, half = k / n, z * math.sqrt(k / n * (1 - k / n) / n + z * z / 4 / n / n)
        w = wilson(k, n, level)
        assert np.allclose(
            w,
            (
                p,
                (p + z * z / 2 / n - half) / (1 + z * z / n),
                (p + z * z / 2 / n + half) / (1 + z * z / n),
            ),
            atol=1e-12,
        )
        for end in w[1:]:  # at the ends the count is exactly z errors away
            assert math.isclose(
                abs(p - end), z * math.sqrt(max(end * (1 - end), 0) / n), abs_tol=1e-9
            )


def test_wilson_refuses():
    assert np.isnan(wilson(0, 0)).all() and wilson(0, 0).reason
    for k, n in ((-1, 3), (4, 3), (1.5, 3), (1, 2.5)):
        with pytest.raises(PredictionError, match="whole numbers"):
            wilson(k, n)


# DeLong


def pairs(truth, scores):
    "Every pair written out, in float64"
    psi = np.array(
        [
            [[0.5 if x == y else float(x > y) for y in s[~truth]] for x in s[truth]]
            for s in np.asarray(scores, float)
        ]
    )
    return (
        psi.mean((1, 2)),
        np.cov(psi.mean(2)) / truth.sum() + np.cov(psi.mean(1)) / (~truth).sum(),
        psi,
    )


@pytest.mark.parametrize("levels", [2, 5, 10**9])
@pytest.mark.parametrize("seed", range(3))
def test_delong_is_its_slow_twin(seed, levels):
    rng = np.random.default_rng(seed)
    truth, scores = rng.random(50) < 0.4, rng.integers(0, levels, (3, 50))
    area, cov, psi = pairs(truth, scores)
    fast = delong(truth, scores)
    assert (
        np.allclose(fast.auc, area)
        and np.allclose(fast.cov, cov, atol=1e-15)
        and fast.cov.shape == (3, 3)
    )
    assert np.allclose(fast.auc, [roc_auc_score(truth, s) for s in scores])
    v = _placements(truth, scores.astype(float))
    assert np.allclose(v[:, truth], psi.mean(2)) and np.allclose(v[:, ~truth], psi.mean(1))


def test_clustered_delong_is_a_loop_over_patients():
    truth, s, who = study(np.random.default_rng(0), 30, 4, mixed=True)
    keep = np.random.default_rng(1).random(len(who)) < 0.7
    truth, scores, who = (
        truth[keep],
        np.stack([s, s + np.random.default_rng(2).normal(size=len(s))])[:, keep],
        who[keep],
    )
    area, _, psi = pairs(truth, scores)
    m, n, ids = truth.sum(), (~truth).sum(), np.unique(who)
    pos, neg = who[truth], who[~truth]
    S = np.zeros((3, 2, 2))
    for p in ids:
        a = (psi.mean(2)[:, pos == p] - area[:, None]).sum(1) / m
        b = (psi.mean(1)[:, neg == p] - area[:, None]).sum(1) / n
        S += np.outer(a, a), np.outer(b, b), np.outer(a, b) + np.outer(b, a)
    k = [len(np.unique(pos)), len(np.unique(neg)), len(ids)]
    assert np.allclose(
        delong(truth, scores, who).cov,
        sum(f / (f - 1) * part for f, part in zip(k, S, strict=False)),
        atol=1e-15,
    )


def test_delong_invariances():
    truth, s, who = study(np.random.default_rng(3), 40, 3, mixed=True)
    for groups in (None, who):
        a = delong(truth, s, groups)
        order = np.random.default_rng(0).permutation(len(s))
        for b in (
            delong(truth, np.exp(s) - 7, groups),
            delong(truth[order], s[order], None if groups is None else groups[order]),
            delong(~truth, -s, groups),
        ):
            assert np.allclose(a.auc, b.auc) and np.allclose(a.cov, b.cov)
        flipped = delong(truth, -s, groups)
        assert np.allclose(flipped.auc, 1 - a.auc) and np.allclose(flipped.cov, a.cov)
    one = delong(*study(np.random.default_rng(3), 40, 1)[:2])
    t, x, w = study(np.random.default_rng(3), 40, 1)
    assert np.allclose(delong(t, x, w).cov, one.cov, rtol=1e-12) and np.allclose(
        delong(t, x, [f"n{i}" for i in w]).cov, one.cov, rtol=1e-12
    )
    assert np.allclose(
        delong(np.tile(t, 3), np.tile(x, 3), np.tile(w, 3)).cov, one.cov
    )  # copies are no evidence
    assert delong(np.tile(t, 3), np.tile(x, 3)).cov[0, 0] < 0.4 * one.cov[0, 0]


# pROC (Robin et al. 2011, BMC Bioinformatics 12:77) is the reference. Where "documented" stands,
# the digits are those of its own test suite on its example aSAH (github.com/xrobin/pROC,
# tests/testthat: test-roc.test.R at 0bc764d, test-ci.auc.R at 13bdf2c, test-var.R at 2bacb19, the
# AUCs in helper-deLongPlacementsCpp-expected.R at 13bdf2c); version 1.18.0 under R 4.2.2 was run as
# well, printed the same, and gave the digits of the other examples.

# 113 patients with subarachnoid haemorrhage, 72 with a good outcome and then 41 with a poor one:
# WFNS grade / S100B / NDKA (Turck et al. 2010)
ASAH = """
1/.13/3.01 1/.14/8.54 1/.1/8.09 1/.04/10.42 5/.47/6 1/.18/15.54 2/.1/6.01 2/.1/17.86 1/.04/13.41
2/.08/20.75 2/.04/16.11 1/.09/49.94 1/.11/9.47 1/.07/6.29 2/.17/12.53 1/.07/6.54 2/.11/6.3
1/.13/80.3 1/.19/12.8 3/.05/9.8 4/.16/9.81 1/.14/18.21 4/.34/5.03 1/.09/8.02 5/.5/6.59
5/.46/9.63 1/.16/13.12 1/.07/7.96 2/.43/14.34 4/.45/41.43 1/.11/7.63 1/.08/7.06 2/.09/12.59
2/.08/9.44 1/.06/7.66 2/.13/12.98 1/.1/27.19 2/.14/22.27 2/.15/9.95 1/.06/11.73 1/.05/58.83
1/.09/6.39 1/.04/17.21 2/.09/9.7 1/.08/10.51 2/.16/10.6 1/.09/14.57 1/.08/4.61 3/.33/17.3
2/.11/12.71 4/.28/9.44 2/.07/11.07 1/.1/19.46 4/.32/10.83 1/.07/11.97 1/.05/7.75 5/.24/9.83
4/.38/10.55 2/.1/28.49 2/.15/8.53 1/.08/12.57 1/.14/12.9 1/.1/46.83 3/.07/11.68 1/.04/12.67
2/.19/9.01 2/.15/24.58 4/.47/10.33 4/.17/13.87 1/.15/22.43 1/.5/6.79 1/.48/13.45 3/.13/17.4
2/.1/12.75 4/.16/13.2 5/.12/15.96 5/.44/5.18 5/.71/8.9 5/.49/11.6 2/.07/32.37 5/.33/54.82
2/.09/32.41 1/.07/40.34 2/.41/9.85 5/.35/14.04 4/.48/21.93 4/.96/7.42 2/.25/8.38 5/.86/13.56
5/.52/3.87 5/2.07/419.19 2/.07/21.22 5/.77/10.4 2/.3/11.09 5/.03/12.22 2/.09/13.67 4/.23/22.63
5/.7/12.9 4/.27/21.57 4/.71/8.23 1/.08/72.57 4/.26/15.54 4/.13/5.19 2/.1/9.63 2/.11/21.48
5/.22/5.37 5/.56/9.57 2/.14/34.06 2/.58/11.72 5/.32/14.26 5/.82/47.61 5/.74/11.67 5/.44/15.89
"""


def asah():
    wfns, s100b, ndka = np.array([row.split("/") for row in ASAH.split()], float).T
    return np.repeat([False, True], [72, 41]), dict(wfns=wfns, s100b=s100b, ndka=ndka)


@pytest.mark.parametrize(
    "name, area, variance",
    [
        ("wfns", 0.823678861788618, 0.00146991470882363),
        ("s100b", 0.731368563685637, 0.00266868245717244),
        ("ndka", 0.611957994579946, 0.0031908105493913),
    ],
)
def test_documented_by_proc_one_area(name, area, variance):
    truth, score = asah()[0], asah()[1][name]
    a = delong(truth, score)
    assert np.isclose(a.auc[0], area, rtol=1e-12) and np.isclose(a.cov[0, 0], variance, rtol=1e-12)
    if name == "ndka":
        assert np.allclose(
            auc_interval(truth, score, logit=False),
            (0.611957994579946, 0.501244999271703, 0.722670989888189),
            rtol=1e-12,
        )


@pytest.mark.parametrize(
    "first, second, z, p, low, high",
    [
        (
            "wfns",
            "s100b",
            2.20898359144091,
            0.0271757822291882,
            0.0104061769564846,
            0.174214419249478,
        ),
        (
            "wfns",
            "ndka",
            2.79777591868904,
            0.00514557970691098,
            0.0634011709339876,
            0.3600405634833566,
        ),
        (
            "ndka",
            "s100b",
            -1.39077002573558,
            0.164295175223054,
            -0.2876917446341914,
            0.0488706064228094,
        ),
    ],
)
def test_documented_by_proc_two_areas(first, second, z, p, low, high):
    truth, s = asah()
    c = compare_aucs(truth, s[first], s[second])
    assert np.allclose((c.statistic, c.p, c.low, c.high), (z, p, low, high), rtol=1e-9)
    back = compare_aucs(truth, s[second], s[first])
    assert np.isclose(back.statistic, -z) and np.isclose(back.p, p)


def test_documented_by_proc_two_groups():
    """Unpaired, D = -1.55995743389685 of NDKA against S100B; pROC takes its p from Student's t,
    ours from the normal law, which is why only D is held"""
    truth, s = asah()
    both = np.tile(truth, 2), np.r_[s["ndka"], s["s100b"]], np.repeat([True, False], 113)
    assert np.isclose(compare_groups(*both).statistic, -1.55995743389685, rtol=1e-9)


def test_hanley_mcneil():
    "109 rated CT images (Hanley and McNeil 1982, Table I); digits of pROC 1.18.0"
    truth = np.repeat([False, True], [58, 51])
    rating = np.r_[np.repeat(range(5), [33, 6, 6, 11, 2]), np.repeat(range(5), [3, 2, 2, 11, 33])]
    a = delong(truth, rating)
    assert np.allclose((a.auc[0], a.cov[0, 0] ** 0.5), (0.893171061528, 0.0307244083794), rtol=1e-9)
    assert np.allclose(
        auc_interval(truth, rating, logit=False)[1:], (0.832952327658, 0.953389795398), rtol=1e-9
    )


OVARIAN = """
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1
3.8 5.7 5 1 3.7 6.7 6 1 3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0
2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1 3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1
3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1 3.3 6.8 6 0 1.7 4.0 7 0
3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1
3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
"""


def test_the_data_of_delong():
    """43 complete patients of DeLong et al. 1988 as printed in the SAS/STAT User's Guide (LOGISTIC,
    "Comparing Receiver Operating Characteristic Curves", statug 68162, Example 72.8); digits of
    pROC 1.18.0, the joint test by hand from its covariances"""
    alb, tp, kg, survived = np.array(OVARIAN.split(), float).reshape(43, 4).T
    truth, scores = survived == 1, np.stack([alb, tp, 10 - kg])
    a = delong(truth, scores)
    assert np.allclose(
        a.auc, (0.736559139785, 0.647849462366, 0.725806451613), rtol=1e-9
    ) and np.allclose(
        np.diag(a.cov) ** 0.5, (0.0926943460524, 0.100047375584, 0.10282160898), rtol=1e-9
    )
    ends = (
        (0.554881559952, 0.918236719618),
        (0.451760209474, 0.843938715257),
        (0.52427980118, 0.927333102046),
    )
    assert all(
        np.allclose(auc_interval(truth, s, logit=False)[1:], e, rtol=1e-9)
        for s, e in zip(scores, ends, strict=False)
    )
    for i, j, wanted in (
        (0, 2, (0.112778269045, 0.910206347201, -0.176117368735, 0.197622745079)),
        (1, 2, (-0.745218389658, 0.456139707507, -0.282988015572, 0.127074037078)),
        (0, 1, (1.59002925832, 0.111828210121, -0.0206391109204, 0.198058465759)),
    ):
        c = compare_aucs(truth, scores[i], scores[j])
        assert np.allclose((c.statistic, c.p, c.low, c.high), wanted, rtol=1e-9)


def test_intervals_of_an_area():
    truth, s, who = study(np.random.default_rng(5), 60, 2, d=3.0)
    plain, logit = auc_interval(truth, s, who, logit=False), auc_interval(truth, s, who)
    assert (
        plain.value == logit.value
        and plain.high == 1 > logit.high > logit.value > logit.low
        and logit.low < plain.low
    )
    assert auc_interval(truth, s, level=0.5).low > auc_interval(truth, s).low
    A, se, z = logit.value, delong(truth, s, who).cov[0, 0] ** 0.5, stats.norm.ppf(0.975)
    assert np.allclose(
        stats.logistic.ppf(logit[1:]),
        stats.logistic.ppf(A) + np.array([-1, 1]) * z * se / (A * (1 - A)),
    )
    sure = auc_interval([0, 0, 1, 1], [1, 2, 3, 4])
    assert sure.value == 1 and np.isnan(sure.low) and sure.reason


def test_delong_agrees_with_the_bootstrap_over_patients():
    truth, s, who = study(np.random.default_rng(6), 150, 3, mixed=True)
    se = np.nanstd(auc(truth, s, draw_patients(who, 1000)))
    assert abs(delong(truth, s, who).cov[0, 0] ** 0.5 / se - 1) < 0.1


def test_two_areas():
    truth, a, who = study(np.random.default_rng(7), 50, 2)
    b = a + np.random.default_rng(8).normal(size=len(a))
    for groups in (None, who):
        c, back = compare_aucs(truth, a, b, groups), compare_aucs(truth, b, a, groups)
        assert (
            np.allclose(c[:4], -np.array(back)[[0, 2, 1, 3]])
            and np.isclose(c.p, back.p)
            and np.isclose(c.difference, auc(truth, a)[0] - auc(truth, b)[0])
        )
        same = compare_aucs(truth, a, 2 * a + 1, groups)
        assert same == (0, 0, 0, 0, 1) and same.reason
    assert np.isnan(compare_aucs([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1]).p)


def test_two_groups_of_patients():
    truth, s, who = study(np.random.default_rng(9), 80, 2)
    g = who < 30
    c = compare_groups(truth, s, g, who)
    one, two = delong(truth[g], s[g], who[g]), delong(truth[~g], s[~g], who[~g])
    assert np.isclose(c.difference, one.auc[0] - two.auc[0]) and np.isclose(
        c.statistic, c.difference / (one.cov + two.cov)[0, 0] ** 0.5
    )
    with pytest.raises(PredictionError, match="both groups"):
        compare_groups(truth, s, np.arange(160) % 2 == 0, who)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: delong([0, 1, 2], [1, 2, 3]), "other than 0 and 1"),
        (lambda: delong([0, 1, 1, 0], [1, 2, 3]), "for 4 scans"),
        (lambda: delong([0, 1, 1, 0], [1, 2, 3, np.nan]), "NaN"),
        (lambda: delong([0, 0, 0, 1], [1, 2, 3, 4]), "only 1 positive"),
        (lambda: delong([0, 0, 1, 1], [1, 2, 3, 4], ["a", "b", "c", "c"]), "only 1 positive"),
        (lambda: delong([0, 0, 1, 1], [1, 2, 3, 4], ["a"]), "for 4 scans"),
        (lambda: delong([0, 0, 1, 1], [1, 2, 3, 4], ["a", "b", None, "c"]), "gaps"),
        (lambda: paired_t([1, 2], [0, 0], [1, np.nan]), "gaps"),
        (lambda: mcnemar([1, 0], [1]), "same scans"),
        (lambda: mcnemar([], []), "same scans"),
        (lambda: mcnemar([1], [1], "yates"), "unknown name"),
        (lambda: mean_interval([1.0]), "at least two"),
        (lambda: mean_interval([1.0, np.nan]), "NaN"),
        (lambda: paired_t([1, 2], [0, 0], ["a"]), "for 2 scans"),
        (lambda: paired_permutation([1, 2], [1]), "shapes"),
        (lambda: holm([0.1, np.nan]), "no probability"),
        (lambda: holm([1.1]), "no probability"),
    ],
)
def test_bad_input_names_the_remedy(call, says):
    with pytest.raises(PredictionError, match=says) as e:
        call()
    assert e.value.remedy


# coverage

STUDIES = 2000


def many(rng, studies=STUDIES, patients=120, scans=3, same=0.8, d=1.0):
    """Truth `(N,)`, patient `(N,)` and the scores `(studies,N)` of one design; every second patient
    is positive, the true AUC is Phi(d / sqrt 2)"""
    who = np.repeat(np.arange(patients), scans)
    truth = who % 2 == 0
    return (
        truth,
        who,
        d * truth
        + np.repeat(same**0.5 * rng.normal(size=(studies, patients)), scans, 1)
        + (1 - same) ** 0.5 * rng.normal(size=(studies, len(who))),
    )


def spread(truth, who, *networks):
    """AUC `(studies, networks)` and covariance `(studies, networks, networks)` of every study, by
    `delong` for a hundred studies at once"""
    area, cov, k = [], [], len(networks)
    for i in range(0, len(networks[0]), 100):
        a = delong(
            truth, np.stack([s[i : i + 100] for s in networks], 1).reshape(-1, len(truth)), who
        )
        n = len(a.auc) // k
        area.append(a.auc.reshape(n, k))
        cov.append(a.cov.reshape(n, k, n, k)[np.arange(n), :, np.arange(n)])
    return np.concatenate(area), np.concatenate(cov)


def logits(a, v):
    "The ends of the interval of each study as `auc_interval` has them"
    half = stats.norm.ppf(0.975) * v**0.5 / (a * (1 - a))
    return stats.logistic.cdf(stats.logistic.ppf(a) + np.array([[-1], [1]]) * half)


def plains(a, v):
    return a + np.array([[-1], [1]]) * stats.norm.ppf(0.975) * v**0.5


def booted(truth, who, scores, n=500):
    """The ends of the percentile interval of each study, from sums over pairs of patients instead
    of sorted scans"""
    k = np.bincount(who)[0]
    w, yes, out = draw_patients([f"{i:05}" for i in who], n)[:, ::k].astype("f4"), truth[::k], []
    pos, neg = (scores[:, side].reshape(len(scores), -1, k) for side in (truth, ~truth))
    for i in range(0, len(scores), 50):
        psi = sum(
            (pos[i : i + 50, :, None, a] > neg[i : i + 50, None, :, b]).astype("f4")
            for a in range(k)
            for b in range(k)
        )
        area = np.einsum("srp,rp->sr", w[:, ~yes] @ psi.transpose(0, 2, 1), w[:, yes]) / (
            k * k * w[:, yes].sum(1) * w[:, ~yes].sum(1)
        )
        out.append(np.nanquantile(area, [0.025, 0.975], axis=1))
    return np.concatenate(out, 1)


def covers(ends, truth):
    return float(np.mean((ends[0] <= truth) & (truth <= ends[1])))


@pytest.mark.parametrize("scans", [1, 3])
def test_coverage_of_an_area(scans):
    """Two thousand studies of 120 patients: every interval over patients covers 93 to 97 %, and
    over scans, where patients repeat, less than 85 %"""
    truth, who, scores = many(np.random.default_rng(7), scans=scans)
    area, cov = spread(truth, who, scores)
    area, var, A = area[:, 0], cov[:, 0, 0], stats.norm.cdf(1 / 2**0.5)
    ends = dict(
        logit=logits(area, var), plain=plains(area, var), bootstrap=booted(truth, who, scores)
    )
    for k in range(3):  # these are our functions' numbers
        assert np.allclose(
            auc_interval(truth, scores[k], who)[1:], ends["logit"][:, k]
        ) and np.allclose(auc_interval(truth, scores[k], who, logit=False)[1:], ends["plain"][:, k])
        whole = pd.DataFrame(dict(patient_id=[f"{i:05}" for i in who], y=truth, s=scores[k]))
        assert np.allclose(
            bootstrap(whole, lambda t, w: auc(t.y, t.s, w), n=500)[1:],
            ends["bootstrap"][:, k],
            atol=1e-5,
        )
    held = {k: covers(e, A) for k, e in ends.items()}
    assert all(0.93 <= v <= 0.97 for v in held.values()), held
    if scans == 1:
        return
    area, cov = spread(truth, None, scores)
    wrong = dict(
        delong=covers(logits(area[:, 0], cov[:, 0, 0]), A),
        bootstrap=covers(booted(truth, np.arange(len(who)), scores[:300], 200), A),
    )
    assert max(wrong.values()) < 0.85, wrong


def test_coverage_of_differences_and_the_test_that_takes_scans_as_patients():
    """Two thousand times two networks on the same patients, unequal and equal, and two groups of
    patients"""
    rng = np.random.default_rng(8)
    truth, who, a = many(rng, patients=160)
    b = (
        0.6 * a + 0.8 * (many(rng, patients=160)[2] - truth) + 0.1 * truth
    )  # unit variance in each class, .7 apart, and errors in common
    for second, gap in (
        (b, stats.norm.cdf(1 / 2**0.5) - stats.norm.cdf(0.7 / 2**0.5)),
        (b + 0.3 * truth, 0.0),
    ):
        said = {}
        for name, groups in (("patients", who), ("scans", None)):
            area, cov = spread(truth, groups, a, second)
            d, v = area[:, 0] - area[:, 1], cov[:, 0, 0] + cov[:, 1, 1] - 2 * cov[:, 0, 1]
            assert np.allclose(
                compare_aucs(truth, a[5], second[5], groups)[:3], (d[5], *plains(d, v)[:, 5])
            )
            said[name] = covers(plains(d, v), gap)
        assert 0.93 <= said["patients"] <= 0.97, (
            said
        )  # for equal networks the same as a false alarm in 3 to 7 %
        assert said["scans"] < 0.85, (
            said
        )  # at 5 % the test over scans cries wolf three times as often
    half = np.arange(len(who)) < len(who) // 2
    (one, cov1), (two, cov2) = (spread(truth[h], who[h], a[:, h]) for h in (half, ~half))
    d, v = (one - two)[:, 0], (cov1 + cov2)[:, 0, 0]
    assert (
        np.allclose(compare_groups(truth, a[2], half, who)[:3], (d[2], *plains(d, v)[:, 2]))
        and 0.93 <= covers(plains(d, v), 0) <= 0.97
    )


def test_coverage_of_shares():
    """Wilson, the difference of McNemar, and the rates of a decision over patients; Wilson over
    scans fails"""
    rng = np.random.default_rng(11)
    for n, p in ((40, 0.8), (60, 0.9), (120, 0.95)):
        k = rng.binomial(n, p, STUDIES)
        table = np.array([wilson(i, n) for i in range(n + 1)])
        assert 0.93 <= covers(table[k, 1:].T, p) <= 0.97, (n, p)
    right = rng.random((2, STUDIES, 150)) < np.array([0.85, 0.75])[:, None, None]
    ends = np.array([mcnemar(f, s)[1:3] for f, s in zip(*right, strict=False)]).T
    assert 0.93 <= covers(ends, 0.1) <= 0.97
    truth, who, scores = many(rng, patients=200, same=0.5)
    call, w, sens = scores >= 0.2, draw_patients([f"{i:05}" for i in who], 400), stats.norm.cdf(0.8)
    ends = np.quantile(
        w[:, truth] @ call[:, truth].T / w[:, truth].sum(1, keepdims=True), [0.025, 0.975], axis=0
    )
    at = at_threshold(truth, scores[4], 0.2, [f"{i:05}" for i in who], 400)
    assert (
        np.allclose(at.loc["sensitivity", ["low", "high"]].astype(float), ends[:, 4])
        and 0.93 <= covers(ends, sens) <= 0.97
    )
    naive = np.array([wilson(i, int(truth.sum())) for i in range(int(truth.sum()) + 1)])[
        call[:, truth].sum(1), 1:
    ].T
    assert covers(naive, sens) < 0.9


def test_coverage_of_means():
    "Student over patients, of values and of paired differences; over scans it fails"
    rng = np.random.default_rng(12)
    who = np.repeat(np.arange(30), 4)
    x = 3 + np.repeat(rng.normal(size=(STUDIES, 30)), 4, 1) + 0.5 * rng.normal(size=(STUDIES, 120))
    ends, pairs_, wrong = (
        np.array([f(v) for v in x]).T
        for f in (
            lambda v: mean_interval(v, who)[1:],
            lambda v: paired_t(v, np.ones(120), who)[1:3],
            lambda v: mean_interval(v)[1:],
        )
    )
    assert (
        0.93 <= covers(ends, 3) <= 0.97
        and 0.93 <= covers(pairs_, 2) <= 0.97
        and covers(wrong, 3) < 0.85
    )


# right or wrong, paired numbers, many tests


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (3, 3), (2, 8), (40, 17)])
def test_mcnemar(b, c):
    first, second = np.repeat([1, 0, 1, 0], [b, c, 9, 4]), np.repeat([0, 1, 1, 0], [b, c, 9, 4])
    n = b + c + 13
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c) if b + c else 1
    e, x, y = (mcnemar(first, second, m) for m in ("exact", "chi2", "corrected"))
    assert (
        np.isclose(e.p, min(2 * tail, 1))
        and np.isclose(e.difference, (b - c) / n)
        and e.statistic == b
    )
    assert np.isclose(x.statistic, (b - c) ** 2 / max(b + c, 1)) and np.isclose(
        y.statistic, max(abs(b - c) - 1, 0) ** 2 / max(b + c, 1)
    )
    assert np.isclose(x.p, stats.chi2.sf(x.statistic, 1)) and y.p >= x.p
    d = first.astype(float) - second
    assert np.isclose(e.high - e.difference, stats.norm.ppf(0.975) * d.std() / n**0.5)


def test_paired_t_is_scipys():
    rng = np.random.default_rng(12)
    a = rng.normal(size=20)
    b = a + 0.3 + rng.normal(size=20)
    r = stats.ttest_rel(a, b)
    assert np.allclose(
        paired_t(a, b), ((a - b).mean(), *r.confidence_interval(), r.statistic, r.pvalue)
    )
    assert np.allclose(paired_t(a, b, level=0.8)[1:3], r.confidence_interval(0.8))
    times = rng.integers(1, 5, 20)
    who = np.repeat([f"{i:02}" for i in range(20)], times)
    assert np.allclose(paired_t(np.repeat(a, times), np.repeat(b, times), who), paired_t(a, b))
    assert paired_t(a, a).p == 1 and np.isnan(paired_t(a, a - 1).p) and paired_t(a, a - 1).reason


def test_permutation_is_scipys_and_a_loop():
    rng = np.random.default_rng(13)
    a = rng.normal(size=9)
    b = a + 0.5 + rng.normal(size=9)
    exact = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    ours = paired_permutation(a, b)
    assert np.isclose(ours.p, exact) and ours.swaps == 512
    assert (
        abs(paired_permutation(a, b, n=400).p - exact) < 0.08
        and paired_permutation(a, b, n=400).swaps == 400
    )
    who = np.array(list("aabbbcdde"))
    d, P = a - b, "abcde"
    reached = [
        abs(sum(s[P.index(w)] * x for w, x in zip(who, d, strict=False))) >= abs(d.sum()) - 1e-12
        for s in itertools.product((1, -1), repeat=5)
    ]
    whole = paired_permutation(a, b, groups=who)
    assert (
        np.isclose(whole.p, np.mean(reached))
        and whole.swaps == 32
        and np.isclose(whole.difference, d.mean())
    )
    assert np.allclose(whole, paired_permutation(a, b, lambda x, y: np.mean(x) - np.mean(y), who))
    sure = paired_permutation(np.full(40, 5.0), np.zeros(40), n=99)
    assert sure.p == 0.01  # never 0


def test_permutation_of_areas_keeps_its_level():
    rng, p = np.random.default_rng(14), []
    for _ in range(120):
        truth, a, who = study(rng, 24, 2)
        b = truth + 0.8**0.5 * rng.normal(size=24)[who] + 0.2**0.5 * rng.normal(size=48)
        p.append(
            paired_permutation(
                a, b, lambda x, y, *, t=truth: auc(t, x)[0] - auc(t, y)[0], who, n=59
            ).p
        )
    w = wilson(sum(np.array(p) <= 0.1), 120, 0.999)
    assert w.low < 0.1 < w.high


def step_down(p):
    "Holm by its definition: smallest alpha at which each hypothesis is rejected"
    order, k = np.argsort(p), len(p)
    out, worst = np.zeros(k), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min((k - rank) * p[i], 1.0))
        out[i] = worst
    return out


def test_holm():
    rng = np.random.default_rng(15)
    for k in (1, 2, 5, 30):
        p = rng.random(k) ** 3
        h = holm(p)
        assert (
            np.allclose(h, step_down(p))
            and (h >= p).all()
            and (h <= np.minimum(k * p, 1) + 1e-15).all()
            and (np.argsort(h[np.argsort(p)], kind="stable") == np.arange(k)).all()
        )
    assert np.allclose(holm([0.01, 0.01, 0.02]), [0.03, 0.03, 0.03]) and holm([]).size == 0


# two runs


def test_compare():
    a, b = ward(80, 1, scans=2), ward(80, 1, sharp=0.4, scans=2)
    p = [f"prob_{c}" for c in C3]
    b[p] = (
        0.5 * b[p]
        + 0.5 * np.random.default_rng(0).dirichlet([1, 1, 1], 80)[np.repeat(range(80), 2)]
    )
    t = compare_runs(a, b, n=200)
    assert (
        np.allclose(t.difference, t["first"] - t.second)
        and t.p.isna().sum() == 1
        and t.method.str.contains("patients").all()
    )
    assert np.allclose(
        t.iloc[1, 3:7].astype(float),
        np.array(compare_aucs(a.label == "covid", a.prob_covid, b.prob_covid, a.patient_id))[
            [0, 1, 2, 4]
        ],
    )
    shuffled = compare_runs(a, b.sample(frac=1, random_state=2), n=200)
    pd.testing.assert_frame_equal(t, shuffled)
    pd.testing.assert_frame_equal(compare_runs(a, b[b.columns[::-1]], n=200), t)
    assert compare_runs(a, a, n=50).p.dropna().eq(1).all()
    for bad, says in (
        (b[:-1], "one of the tables only"),
        (b.assign(label="cap"), "column label"),
        (b.assign(patient_id="x"), "column patient_id"),
        (b.assign(scan_id="x"), "repeats"),
        (b.drop(columns="prob_cap"), "prob_cap"),
    ):
        with pytest.raises(PredictionError, match=says):
            compare_runs(a, bad)
    with pytest.raises(PredictionError, match="no class"):
        compare_runs(a, b, "flu")


@pytest.fixture
def release(data_dir):
    """Predictions of the two released runs in the package's names, and the patients they were
    trained on"""
    folder = data_dir / "cc_ccii_tables"
    t = pd.read_csv(folder / "release_predictions.csv").rename(
        columns=dict(p_normal="prob_healthy", p_cp="prob_cap", p_ncp="prob_covid")
    )
    t["label"] = t.label.map(dict(Normal="healthy", CP="cap", NCP="covid"))
    p = [f"prob_{c}" for c in C3]
    t[p] = t[p].div(t[p].sum(axis=1), axis=0)
    return {k: g.drop(columns="run").reset_index(drop=True) for k, g in t.groupby("run")}, set(
        pd.read_csv(folder / "release_split_train_val.csv").patient_id
    )


@pytest.mark.data
def test_release_predictions(release):
    "AUC by scikit-learn, DeLong by pairs, bootstrap and permutation coherent with it"
    (a, b), _ = release[0].values(), release[1]
    y = (a.label == "covid").to_numpy()
    scores = np.stack([t.set_index("scan_id").loc[a.scan_id].prob_covid for t in (a, b)])
    area, cov, _ = pairs(y, scores)
    fast = delong(y, scores)
    assert (
        np.allclose(fast.auc, area)
        and np.allclose(fast.cov, cov)
        and np.allclose(area, [roc_auc_score(y, s) for s in scores])
    )
    for run, wanted in zip(
        (a, b),
        (
            (0.980303575485, 0.988771066456, 0.997238557427),
            (0.910729160046, 0.936141543148, 0.961553926251),
        ),
        strict=False,
    ):  # pROC 1.18.0, ci.auc
        i = auc_interval(run.label == "covid", run.prob_covid, logit=False)
        assert np.allclose((i.low, i.value, i.high), wanted, rtol=1e-9)
    c = compare_aucs(y, *scores)
    assert np.allclose(
        (c.statistic, c.p, c.low, c.high),
        (4.36946944195, 1.24548766396e-05, 0.0290220873071, 0.0762369593076),
        rtol=1e-9,
    )  # pROC 1.18.0, roc.test
    t = compare_runs(a, b, n=1000)
    assert (len(a), a.patient_id.nunique(), int(y.sum())) == (472, 436, 169) and (
        t.p.dropna() < 0.01
    ).all()
    plain, whole, booted = t.low[:3], t.high[:3], t.high[2] - t.low[2]
    assert (
        np.ptp(plain) < 0.004
        and np.ptp(whole) < 0.004
        and abs(booted / (t.high[1] - t.low[1]) - 1) < 0.1
    )
    for run in (a, b):
        i, j = (
            auc_interval(run.label == "covid", run.prob_covid, run.patient_id, logit=False),
            bootstrap(run, metric_statistic()),
        )
        assert np.isclose(i.value, j.value) and abs((j.high - j.low) / (i.high - i.low) - 1) < 0.15


@pytest.mark.data
def test_the_leak_in_the_release(release):
    """Scans of patients that were trained on against the others: both runs are better on what they
    have seen"""
    runs, train = release
    for run, seen, unseen, D in zip(
        runs.values(),
        (0.998873873874, 0.973223223223),
        (0.962372587291, 0.850683148992),
        (2.31785920373, 3.4096358649),
        strict=False,
    ):  # pROC 1.18.0, unpaired
        leaked = run.patient_id.isin(train).to_numpy()
        y = run.label == "covid"
        assert np.allclose(
            [auc(y[s], run.prob_covid[s])[0] for s in (leaked, ~leaked)], (seen, unseen)
        ) and np.isclose(compare_groups(y, run.prob_covid, leaked).statistic, D, rtol=1e-9)
        c = compare_groups(y, run.prob_covid, leaked, run.patient_id)
        assert leaked.sum() == 255 and c.low > 0 and c.p < 0.05
        g = subgroups(run.assign(seen=leaked), "seen").query("measure=='AUC'").set_index("group")
        assert g.value["True"] > g.high["False"] and g.scans.tolist() == [217, 255]


# calibration


def test_reliability_is_sklearns():
    t = ward(400, 3)
    y, p = (t.label == "covid").to_numpy(), t.prob_covid.to_numpy()
    for ours, theirs in (("width", "uniform"), ("count", "quantile")):
        r = reliability(y, p, 8, ours)
        happened, said = calibration_curve(y, p, n_bins=8, strategy=theirs)
        assert (
            np.allclose(r.happened, happened)
            and np.allclose(r.said, said)
            and r.n.sum() == 400
            and (r.low <= r.happened).all()
            and (r.happened <= r.high).all()
        )
    slow = sum(
        s.sum() / 400 * abs(y[s].mean() - p[s].mean())
        for k in range(15)
        if (s := (p >= k / 15) & ((p < (k + 1) / 15) | (k == 14))).any()
    )
    assert np.isclose(ece(y, p), slow)


def test_the_floor_is_the_bias():
    """The mean ECE of labels drawn from the probabilities, by a slow loop; and it falls with the
    root of n"""
    p = ward(120, 4).prob_covid.to_numpy()
    rng = np.random.default_rng(1)
    slow = [ece(rng.random(120) < p, p, 10) for _ in range(150)]
    floor = ece_floor(p, 10)
    assert (
        abs(floor.value - np.mean(slow)) < 4 * np.std(slow) / 150**0.5
        and floor.low < floor.value < floor.high
    )
    assert 1.7 < ece_floor(np.tile(p, 1), 10).value / ece_floor(np.tile(p, 4), 10).value < 2.3
    assert ece_floor(np.repeat([0.0, 1.0], 9)).value == 0


def test_brier():
    t = ward(200, 5)
    y, p = (t.label == "covid").to_numpy(), t.prob_covid.to_numpy()
    P, k = t[[f"prob_{c}" for c in C3]].to_numpy(), np.array([C3.index(c) for c in t.label])
    assert np.isclose(brier(y, p), brier_score_loss(y, p)) and np.isclose(
        brier(k, P), sum(brier(k == j, P[:, j]) for j in range(3))
    )
    q = np.random.default_rng(0).choice(
        [0.1, 0.4, 0.8], 500
    )  # Murphy 1973: reliability - resolution + uncertainty
    z = np.random.default_rng(1).random(500) < q
    parts = [(s.mean(), v, z[s].mean()) for v in (0.1, 0.4, 0.8) for s in [q == v]]
    assert np.isclose(
        brier(z, q),
        sum(w * (v - o) ** 2 for w, v, o in parts)
        - sum(w * (o - z.mean()) ** 2 for w, v, o in parts)
        + z.mean() * (1 - z.mean()),
    )


@pytest.mark.parametrize("sharp", [0.5, 1.0, 2.0, 3.0])
def test_temperature_finds_what_was_done(sharp):
    t = ward(1500, 6, sharp)
    T = fit_temperature(t)
    y = [C3.index(c) for c in t.label]
    grid = np.linspace(0.8 * T, 1.25 * T, 40)
    assert (
        abs(T / sharp - 1) < 0.12
        and abs(
            grid[
                np.argmin(
                    [
                        log_loss(y, apply_temperature(t, g)[[f"prob_{c}" for c in C3]].to_numpy())
                        for g in grid
                    ]
                )
            ]
            - T
        )
        <= grid[1] - grid[0]
    )
    z, p = (
        np.log(t[[f"prob_{c}" for c in C3]].to_numpy()),
        apply_temperature(t, T)[[f"prob_{c}" for c in C3]].to_numpy(),
    )
    assert (
        abs(z[range(1500), y].mean() - (p * z).sum(1).mean()) < 1e-3
    )  # the slope of the loss in 1/T is 0
    assert np.isclose(fit_temperature(apply_temperature(t, T)), 1, atol=1e-3) and np.isclose(
        fit_temperature(apply_temperature(t, 2)) * 2, T, rtol=1e-3
    )


def test_soften():
    t = ward(60, 7)
    p = [f"prob_{c}" for c in C3]
    assert (
        np.allclose(apply_temperature(apply_temperature(t, 2), 3)[p], apply_temperature(t, 6)[p])
        and np.allclose(apply_temperature(t, 1)[p], t[p])
        and np.allclose(apply_temperature(t, 1e6)[p], 1 / 3, atol=1e-4)
    )
    assert (
        apply_temperature(t, 0.01)[p].to_numpy().argmax(1) == t[p].to_numpy().argmax(1)
    ).all() and list(apply_temperature(t, 2).columns) == list(t.columns)
    hard = t.assign(
        **{f"prob_{c}": (t.label == c).astype(float) for c in C3}
    )  # probabilities of exactly 0, as float32 makes them
    hard.loc[:5, "label"] = hard.label[:6].map(dict(healthy="cap", cap="covid", covid="healthy"))
    assert np.isfinite(apply_temperature(hard, 2)[p]).all(axis=None) and fit_temperature(hard) > 1
    for T in (0, -1, np.nan):
        with pytest.raises(PredictionError):
            apply_temperature(t, T)


def test_calibration_never_sees_the_test():
    valid, test = ward(400, 8, 2.0), ward(200, 9, 2.0)
    cool, T = calibrate(valid, test)
    assert T == fit_temperature(valid) and np.allclose(
        cool.prob_covid, apply_temperature(test, T).prob_covid
    )
    relabelled = test.assign(label=test.label.to_numpy()[::-1])
    assert calibrate(valid, relabelled)[1] == T
    with pytest.raises(PredictionError, match="p9-0|is in validation and test"):
        calibrate(pd.concat([valid, test[:1]]), test)
    with pytest.raises(PredictionError, match="no scan is wrong"):
        fit_temperature(valid[valid.label == valid.filter(like="prob_").idxmax(axis=1).str[5:]])


@pytest.mark.parametrize("levels", [4, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_operating_points_by_brute_force(seed, levels):
    rng = np.random.default_rng(seed)
    y, s = rng.random(60) < 0.4, rng.integers(0, levels, 60) / levels
    sens = {t: (s[y] >= t).mean() for t in np.unique(s)}
    J = {t: sens[t] + (s[~y] < t).mean() - 1 for t in sens}
    for want in (0.3, 0.5, 0.9, 1.0):
        assert threshold_at(y, s, want) == max(t for t in sens if sens[t] >= want - 1e-12)
    assert np.isclose(J[youden_threshold(y, s)], max(J.values()))
    t = youden_threshold(y, s)
    (tn, fp), (fn, tp) = confusion_matrix(y, s >= t)
    r = at_threshold(y, s, t)
    assert r[["k", "n"]].to_numpy().tolist() == [
        [tp, tp + fn],
        [tn, tn + fp],
        [tp, tp + fp],
        [tn, tn + fn],
    ]
    assert all(
        np.allclose(
            row[["value", "low", "high"]].astype(float), wilson(row.k, row.n), equal_nan=True
        )
        for _, row in r.iterrows()
    )


def test_rates_over_patients_are_the_bootstrap():
    t = ward(60, 10, scans=3)
    t["prob_covid"] = (t.prob_covid + np.random.default_rng(0).random(180)) / 2
    y = (t.label == "covid").to_numpy()
    r = at_threshold(y, t.prob_covid, 0.4, t.patient_id, n=100)
    slow = bootstrap(
        t,
        lambda f: ((f.label == "covid") & (f.prob_covid >= 0.4)).sum() / (f.label == "covid").sum(),
        n=100,
    )
    assert (
        np.allclose(r.loc["sensitivity", ["value", "low", "high"]].astype(float), slow)
        and (r.method == "bootstrap over patients").all()
    )
    all_right = at_threshold(y, y.astype(float), 0.5, t.patient_id, n=100)
    assert all_right.note.str.contains("too few errors").all()
    assert (
        at_threshold(y[::3], t.prob_covid[::3], 0.4, t.patient_id[::3]).method == "Wilson"
    ).all()


def test_net_benefit_by_loop():
    t = ward(150, 11)
    y, p = (t.label == "covid").to_numpy(), t.prob_covid.to_numpy()
    b = net_benefit(y, p)
    for x in (0.01, 0.2, 0.5, 0.9):
        row = b.loc[b.index[np.argmin(abs(b.index - x))]]
        at = row.name
        assert np.isclose(
            row.network,
            sum((q >= at) * (1.0 if yes else -at / (1 - at)) for q, yes in zip(p, y, strict=False))
            / 150,
        )
        assert np.isclose(row["all"], sum(1.0 if yes else -at / (1 - at) for yes in y) / 150)
    assert (net_benefit(y, np.zeros(150)).network == 0).all() and np.allclose(
        net_benefit(y, np.ones(150)).network, b["all"]
    )
    big = ward(20000, 12)  # calibrated: never below a policy without network
    n = net_benefit(big.label == "covid", big.prob_covid, np.linspace(0.05, 0.9, 18))
    assert (n.network > n[["all", "none"]].max(axis=1) - 0.003).all()


def test_prevalence():
    ppv, npv = predictive_values(0.8, 0.95, np.array([0, 0.01, 0.5, 1]))
    assert (
        np.allclose(ppv[1:3], [8 / (8 + 0.05 * 990), 0.8 / 0.85])
        and ppv[0] == 0
        and npv[0] == 1
        and ppv[3] == 1
        and npv[3] == 0
    )
    x = np.linspace(-3, 4, 50)  # two normals: the posterior is known for every prevalence

    def posterior(pi):
        q = pi * stats.norm.pdf(x, 1) / (pi * stats.norm.pdf(x, 1) + (1 - pi) * stats.norm.pdf(x))
        return pd.DataFrame(dict(prob_healthy=1 - q, prob_covid=q))

    moved = shift_prevalence(
        posterior(0.3), dict(healthy=0.7, covid=0.3), dict(healthy=0.95, covid=0.05)
    )
    assert np.allclose(moved, posterior(0.05))
    t = ward(30, 13)
    old, new = dict(healthy=0.5, cap=0.3, covid=0.2), dict(healthy=0.1, cap=0.2, covid=0.7)
    p = [f"prob_{c}" for c in C3]
    assert np.allclose(
        shift_prevalence(shift_prevalence(t, old, new), new, old)[p], t[p]
    ) and np.allclose(shift_prevalence(t, old, old)[p], t[p])
    assert shift_prevalence(t, old, new).prob_covid.gt(t.prob_covid).all()


def test_subgroups():
    t = ward(300, 14, scans=2)
    t["site"] = np.repeat(np.arange(300) % 3, 2)
    t.loc[:3, "site"] = np.nan
    g = subgroups(t, "site", n=100)
    a = g[g.measure == "AUC"].set_index("group")
    assert (
        len(g) == 12
        and a.scans.sum() == 600
        and a.patients.sum() == 300
        and a.positives.sum() == (t.label == "covid").sum()
        and a.note["not stated"]
    )
    s = (t.site == 1).to_numpy()
    assert np.allclose(
        a.loc["1.0", ["value", "low", "high"]].astype(float),
        auc_interval(t.label[s] == "covid", t.prob_covid[s], t.patient_id[s]),
    )
    raw = [
        compare_groups(t.label == "covid", t.prob_covid, (t.site == k).to_numpy(), t.patient_id).p
        for k in range(3)
    ]
    assert np.allclose(a.p.dropna(), holm(raw))
    mixed = subgroups(t.assign(scan=np.tile(["first", "second"], 300)), "scan", n=50)
    assert (
        mixed.p.isna().all()
        and mixed[mixed.measure == "AUC"].note.eq("is in both groups").all()
        and mixed.value.notna().all()
    )
    whole = subgroups(t.assign(site="one"), "site", n=50)
    assert len(whole) == 3 and whole.p.isna().all()


def test_figures():
    t = ward(200, 15, 2.0)
    y = t.label == "covid"
    r, d = (
        reliability_figure(
            y, {"as trained": t.prob_covid, "soft": apply_temperature(t, 2).prob_covid}
        ),
        decision_figure(y, {"net": t.prob_covid}),
    )
    assert (
        f"ECE {ece(y, t.prob_covid, 10):.3f}" in r.alt
        and "200 scans" in r.alt
        and len(r.axes) == 4
        and "below a policy" in d.alt
    )
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in d.axes) and {
        ax.get_ylabel() for ax in r.axes
    } == {"happened (share)", "scans"}


T = ward(40, 16)
Y = (T.label == "covid").to_numpy()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ece(Y, T.prob_covid * 3), "outside"),
        (lambda: ece(Y, T.prob_covid[:5]), "shape"),
        (lambda: ece(Y + 1, T.prob_covid), "other than 0 and 1"),
        (lambda: ece(Y, T.prob_covid.where(Y)), "outside"),
        (lambda: reliability(Y, T.prob_covid, 0), "0 of them"),
        (lambda: reliability(Y, T.prob_covid, 5, "area"), "unknown kind"),
        (lambda: brier([3], [[0.5, 0.5]]), "does not fit"),
        (lambda: threshold_at(Y, T.prob_covid, 0), "sensitivity 0"),
        (lambda: threshold_at(Y & False, T.prob_covid), "of 0 positive"),
        (lambda: youden_threshold(Y | True, T.prob_covid), "one class"),
        (lambda: threshold_at(Y, T.prob_covid.where(Y)), "not finite"),
        (lambda: youden_threshold(Y, T.prob_covid[1:]), "for 40 scans"),
        (lambda: at_threshold(Y, T.prob_covid.where(Y), 0.5), "not finite"),
        (lambda: at_threshold(Y, T.prob_covid, 0.5, [None] * 40), "gaps"),
        (lambda: net_benefit(Y, T.prob_covid, [1.0]), r"outside \[0,1\)"),
        (lambda: predictive_values(1.2, 0.5, 0.1), "outside"),
        (lambda: predictive_values(1, 0.5, -0.1), "outside"),
        (lambda: shift_prevalence(T, dict(covid=1.0), dict(covid=1.0)), "prevalence"),
        (
            lambda: shift_prevalence(
                T, dict(healthy=1.0, cap=0.0, covid=0.0), dict(healthy=0.5, cap=0.5, covid=0.0)
            ),
            "never seen|prevalence",
        ),
        (lambda: subgroups(T, "site"), "no column 'site'"),
        (lambda: subgroups(T, "label", "flu"), "no class"),
    ],
)
def test_bad_calibration_input_names_the_remedy(call, says):
    with pytest.raises(PredictionError, match=says) as e:
        call()
    assert e.value.remedy
