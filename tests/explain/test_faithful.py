"""Scores of explanations: cases by hand, oracles, networks whose reasons are known, networks
that forgot"""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import nn

from covid_ct.explain.attribution import (
    cut_patches,
    integrated_gradients,
    layer_attribution,
    occlusion,
    smooth_grad,
)
from covid_ct.explain.cam import cam, center_gaussian, contrast_cam, grad_cam, grad_cam_pp
from covid_ct.explain.faithfulness import (
    SCORES,
    _cascade_table,
    _overlap_curve,
    _rank_correlation,
    compare_maps,
    curve_area,
    deal_labels,
    deletion,
    infidelities,
    input_size_maps,
    insertion,
    map_average_precision,
    random_pairs,
    randomised_copies,
    score_case,
    score_map,
    score_table,
    sensitivity,
    ssim,
)
from covid_ct.models.darnet import DARNET_ROWS
from covid_ct.scan import DataError, GeometryError

SIZE = (12, 24, 24)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Keep(nn.Module):
    "Lets one cell through"

    def __init__(self, at):
        super().__init__()
        self.register_buffer("only", torch.zeros(3, 6, 6))
        self.only[at] = 1

    def forward(self, x):
        return x * self.only


class OneBlock(nn.Module):
    "Sees one block of 4x4x4 voxels and nothing else"

    def __init__(self, at=(1, 4, 2)):
        super().__init__()
        self.stages = nn.ModuleList([nn.AvgPool3d(4), Keep(at)])
        self.fc = nn.Linear(1, 2)
        self.fc.weight.data[:], self.fc.bias.data[:] = (
            torch.tensor([[-1600.0], [1600.0]]),
            torch.tensor([3.0, -3.0]),
        )

    def features(self, x):
        return self.stages[1](self.stages[0](x))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3, 4)))


WAYS = {
    "CAM": cam,
    "contrast CAM": contrast_cam,
    "Grad-CAM": grad_cam,
    "Grad-CAM++": grad_cam_pp,
    "integrated gradients": partial(integrated_gradients, steps=4),
    "SmoothGrad": partial(smooth_grad, samples=2),
    "layer attribution": layer_attribution,
    "occlusion": partial(occlusion, patches=cut_patches(np.ones(SIZE), 4), fill=0.0),
}


@pytest.mark.parametrize("at", [(1, 4, 2), (0, 0, 5)])
@pytest.mark.parametrize("way", WAYS)
def test_known_block(way, at):
    "Whatever the method: the hottest voxel lies in the block, and the answer goes with it"
    net, x = OneBlock(at), torch.rand(1, 1, *SIZE) * 0.5 + 0.5
    block = np.zeros(SIZE, bool)
    block[tuple(slice(4 * i, 4 * i + 4) for i in at)] = True
    heat = input_size_maps(net, x, WAYS[way], 1)[0]
    assert score_map(heat, block)["pointing"] == 1
    out, back = (
        deletion(net, x, heat, 1, fill=0.0, steps=8),
        insertion(net, x, heat, 1, fill=0.0, steps=8),
    )
    blind = deletion(net, x, np.random.default_rng(0).random(SIZE), 1, fill=0.0, steps=8)
    assert out.prob[0] > 0.99 > 0.01 > out.prob[1] and curve_area(out) < 0.07 < 0.2 < curve_area(
        blind
    )
    assert back.prob.iloc[0] < 0.01 and back.prob.iloc[1] > 0.99 and curve_area(back) > 0.93


def test_scores_by_hand():
    v = np.zeros((2, 2, 2))
    v.flat[:4] = 0.9, 0.6, 0.4, 0.1
    m = np.zeros_like(v, bool)
    m.flat[[0, 2]] = True
    s = score_map(v, m)
    assert s["pointing"] == 1 and s["energy"] == pytest.approx(1.3 / 2)
    c = _overlap_curve(v, m, (0.05, 0.5, 0.95))
    assert np.allclose(c.dice, [2 * 2 / 6, 2 * 1 / 4, 0]) and np.allclose(c.iou, [2 / 4, 1 / 3, 0])
    assert s["dice_best"] == pytest.approx(0.8) and s["auprc"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert np.allclose(c.iou, c.dice / (2 - c.dice))


def test_overlap_is_the_slow_count():
    rng = np.random.default_rng(0)
    v, m = rng.random((5, 6, 7)).astype("f4"), rng.random((5, 6, 7)) < 0.3
    c = _overlap_curve(v, m)
    for t, row in c.iterrows():
        a = v >= np.float32(t)
        assert row.dice == pytest.approx(
            2 * (a & m).sum() / max(1, a.sum() + m.sum())
        ) and row.iou == pytest.approx((a & m).sum() / (a | m).sum())


@pytest.mark.parametrize("levels", [3, 9, 10**6])
def test_auprc_is_average_precision(levels):
    rng = np.random.default_rng(levels)
    v = rng.integers(0, levels, (6, 7, 8)) / levels
    m = rng.random(v.shape) < 0.1 + 0.5 * v
    assert map_average_precision(v, m) == pytest.approx(
        average_precision_score(m.ravel(), v.ravel())
    )
    assert map_average_precision(np.ones_like(v), m) == pytest.approx(m.mean()) and np.isnan(
        map_average_precision(v, np.zeros_like(m))
    )


def test_flat_maps_get_nothing_and_perfect_maps_all():
    m = np.zeros((4, 5, 6), bool)
    m[1:3, 2:4, 2:5] = True
    assert (
        score_map(np.zeros(m.shape), m)["energy"]
        == score_map(np.zeros(m.shape), m)["pointing"]
        == 0
    )
    assert all(v == pytest.approx(1) for v in score_map(m.astype("f4"), m).values())


def test_case_and_table():
    rng = np.random.default_rng(0)
    rows = []
    lungs = np.zeros((6, 8, 8), bool)
    lungs[1:5, 1:7, 1:7] = True
    for i in range(12):
        m = lungs & (rng.random(lungs.shape) < 0.2)
        rows.append(
            score_case(
                {"good": m * 0.9 + 0.05, "noise": rng.random(m.shape)},
                m,
                lungs,
                scan_id=i,
                patient_id=i // 2,
            )
        )
    scores = pd.concat(rows)
    t = score_table(scores, n=200).set_index(["method", "score", "against"])
    assert set(scores.method) == {"good", "noise", "lungs", "centre"} and list(SCORES) == [
        c for c in scores if c in SCORES
    ]
    assert t.low["good", "auprc", "lungs"] > 0 > t.high["noise", "energy", "lungs"]
    own = scores[scores.method == "good"].auprc
    assert t.value["good", "auprc", ""] == pytest.approx(own.mean()) and t.value[
        "good", "auprc", "lungs"
    ] == pytest.approx(own.mean() - scores[scores.method == "lungs"].auprc.mean())
    alone = score_table(scores.assign(patient_id=scores.scan_id), n=200).set_index(
        ["method", "score", "against"]
    )
    assert (
        alone.value["noise", "energy", ""] == t.value["noise", "energy", ""]
        and alone.low["noise", "energy", ""] != t.low["noise", "energy", ""]
    )
    with pytest.raises(DataError, match="no lesions"):
        score_case({}, np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool))
    with pytest.raises(GeometryError, match="differ"):
        _overlap_curve(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))


def ssim_by_hand(a, b, window=7):
    "Wang et al. 2004, Eq. 13, over every whole window"
    windows = [
        np.lib.stride_tricks.sliding_window_view(v, (window,) * v.ndim).reshape(-1, window**v.ndim)
        for v in (a, b)
    ]
    (ma, mb), (va, vb) = ([f(v) for v in windows] for f in (means, variances))
    both = ((windows[0] - ma[:, None]) * (windows[1] - mb[:, None])).sum(1) / (window**a.ndim - 1)
    s = (2 * ma * mb + 1e-4) * (2 * both + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return s.mean()


def means(v):
    return v.mean(1)


def variances(v):
    return v.var(1, ddof=1)


@pytest.mark.parametrize("shape", [(9, 10, 11), (7, 7, 7), (20, 30)])
def test_ssim_by_hand(shape):
    rng = np.random.default_rng(1)
    a = rng.random(shape)
    b = 0.5 * a + 0.5 * rng.random(shape)
    assert (
        ssim(a, b) == pytest.approx(ssim_by_hand(a, b), abs=1e-9)
        and ssim(a, a) == pytest.approx(1)
        and ssim(a, b) == ssim(b, a)
    )


def test_likeness():
    a = np.random.default_rng(0).random((3, 8, 8, 8))
    assert (
        _rank_correlation(a, a**3) == pytest.approx(1)
        and _rank_correlation(a, -a) == pytest.approx(-1)
        and _rank_correlation(a, np.ones_like(a)) == 0
    )
    assert (
        np.allclose(compare_maps(a, a), 1)
        and len(random_pairs(a)) == 3
        and abs(random_pairs(a)["rank"]).max() < 0.2
    )
    with pytest.raises(GeometryError, match="window"):
        ssim(a[0, :5], a[0, :5])


def net():
    return DARNET_ROWS["darnet"](depth=8, width=4, blocks=(1, 1, 1, 1)).eval()


def test_cascade_forgets_from_the_top():
    m = net()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    stream = torch.get_rng_state()
    steps = list(randomised_copies(m, seed=3))
    names = [n for n, _ in steps]
    assert names == [
        "as trained",
        "fc",
        "stages.3",
        "stages.2",
        "stages.1",
        "stages.0",
        "stem.conv",
    ]
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and torch.equal(
        stream, torch.get_rng_state()
    )
    for i, (name, copy) in enumerate(steps):
        for k, p in copy.named_parameters():
            if p.ndim < 2:
                continue  # a norm's 1 and 0 may be set anew to the same
            gone = any(k.startswith(n + ".") for n in names[1 : i + 1])
            assert torch.equal(p, before[k]) != gone, (name, k)
    again = dict(randomised_copies(m, seed=3))["stem.conv"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), steps[-1][1].parameters(), strict=False)
    )
    with pytest.raises(DataError, match="no layer"):
        list(randomised_copies(nn.ReLU()))


def test_cascade_table_sees_through_edges():
    m, x = net(), torch.rand(2, 1, 8, 32, 32)
    for p in m.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0, 0.3)

    def edges(model, x, label=None):
        return (F.avg_pool3d(x, 3, 1, 1) - x).abs()[:, 0]

    cheat, honest = (
        _cascade_table(m, x, f, 1, seeds=(0,)) for f in (edges, partial(grad_cam, layer="stages.0"))
    )
    assert (
        np.allclose(cheat["rank"], 1)
        and np.allclose(cheat.ssim, 1)
        and honest["rank"].iloc[0] == pytest.approx(1)
        and honest["rank"].iloc[-1] < 0.9
    )


GRID = torch.stack(torch.meshgrid(*map(torch.arange, SIZE), indexing="ij"), -1)


def balls(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    at = torch.stack([torch.randint(4, s - 4, (n,), generator=g) for s in SIZE], 1)
    truth = (((GRID - at[:, None, None, None]) ** 2).sum(-1) <= 9) & (y == 1)[:, None, None, None]
    return 0.24 * torch.randn(n, 1, *SIZE, generator=g) + 0.6 * truth[:, None], y, truth


def learner(seed, dealt=False):
    "A network that learned to find balls, or one whose labels were dealt anew"
    torch.manual_seed(seed)
    m = nn.Sequential(
        nn.Conv3d(1, 8, 5, 2, 2, bias=False),
        nn.BatchNorm3d(8, momentum=0.3),
        nn.ReLU(),
        nn.Conv3d(8, 16, 3, 1, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    for i in range(60):
        x, y, _ = balls(16, i)
        if dealt:
            y = torch.tensor(deal_labels(range(16), y.numpy(), 100 * seed + i))
        opt.zero_grad()
        F.cross_entropy(m(x), y).backward()
        opt.step()
    return m.eval()


@pytest.fixture(scope="module")
def seer():
    "A network that learned to find balls, and twelve balls it has not seen"
    m = learner(1)
    x, y, truth = balls(24, 999)
    assert (m(x).argmax(1) == y).float().mean() > 0.9
    return m, x[y == 1], truth[y == 1].numpy()


def test_another_training_says_the_same_and_dealt_labels_do_not(seer):
    """Repeatability over seeds above the level of other scans, and a map of labels without
    meaning off the balls"""
    m, x, truth = seer
    a, b, c = (input_size_maps(n, x, grad_cam, 1) for n in (m, learner(2), learner(1, dealt=True)))
    level = random_pairs(a)["rank"].mean()
    assert (
        compare_maps(a, b)["rank"].mean() > level + 0.1
        and compare_maps(a, b)["rank"].mean() > compare_maps(a, c)["rank"].mean()
    )
    good, again, dealt = (
        np.mean([map_average_precision(h, t) for h, t in zip(maps, truth, strict=False)])
        for maps in (a, b, c)
    )
    assert min(good, again) > 2 * dealt


def test_a_randomised_network_falls_to_the_baselines(seer):
    m, x, truth = seer
    lungs = np.ones(SIZE, bool)

    def judged(nets):
        s = pd.concat(
            [
                score_case(
                    {"map": input_size_maps(n, x[i : i + 1], grad_cam, 1)[0]},
                    truth[i],
                    lungs,
                    scan_id=f"{k}-{i}",
                    patient_id=i,
                )
                for k, n in enumerate(nets)
                for i in range(len(x))
            ]
        )
        return (
            score_table(s, of=("energy", "auprc"), n=200)
            .query("method=='map'")
            .set_index(["score", "against"])
        )

    trained, blank = (
        judged([m]),
        judged([list(randomised_copies(m, 1, s))[-1][1] for s in range(4)]),
    )
    for s in ("energy", "auprc"):
        assert all(trained.low[s, b] > 0 for b in ("lungs", "centre"))
        assert blank.low[s, "centre"] <= 0 and blank.value[s, ""] < 0.5 * trained.value[s, ""]


def test_deletion_order_and_bad_input(seer):
    m, x, truth = seer
    heat = truth[0].astype("f4")
    a, b = deletion(m, x[:1], heat, 1, steps=4), deletion(m, x[:1], heat, 1, steps=4)
    assert (
        a.equals(b)
        and list(a.share) == [0, 0.25, 0.5, 0.75, 1]
        and curve_area(pd.DataFrame(dict(share=[0, 1], prob=[1.0, 0.0]))) == 0.5
    )
    up = insertion(m, x[:1], heat, 1, steps=4)
    assert up.prob.iloc[0] == pytest.approx(a.prob.iloc[-1]) and up.prob.iloc[-1] == pytest.approx(
        a.prob.iloc[0]
    )
    for bad in (dict(x=x[:2]), dict(heat=heat[:5])):
        with pytest.raises(GeometryError, match="same size"):
            deletion(m, **dict(x=x[:1], heat=heat, label=1) | bad)


def test_sensitivity_and_infidelity():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    x = torch.rand(2, 1, 4, 4, 4, dtype=torch.float64)
    w = flat[1].weight[1].detach().view(1, 4, 4, 4).expand(2, -1, -1, -1)
    assert (
        infidelities(flat, x, w, 1).max() < 1e-15 < 1e-9 < infidelities(flat, x, w.flip(1), 1).min()
    )
    assert infidelities(flat, x, 7 * w, 1).max() < 1e-15  # no unit needed
    m, v = net().train(), torch.rand(2, 1, 8, 32, 32)
    # features are ≥ 0, so that the map of class 1 is above 0 whatever was drawn
    with torch.no_grad():
        m.fc.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]]).expand_as(m.fc.weight))
    m.stages[0].eval()
    modes = [k.training for k in m.modules()]
    stream = torch.get_rng_state()
    s = sensitivity(m, v, contrast_cam, 1)
    assert (
        s.shape == (2,)
        and np.array_equal(s, sensitivity(m, v, contrast_cam, 1))
        and (sensitivity(m, v, contrast_cam, 1, radius=1e-6) < s).all()
    )
    infidelities(m, v, np.ones((2, 8, 32, 32), "f4"))
    assert modes == [k.training for k in m.modules()] and torch.equal(stream, torch.get_rng_state())


def test_labels_are_dealt_by_patient():
    who, y = np.repeat(list("abcdefgh"), 2), np.repeat([0, 1] * 4, 2)
    new = deal_labels(who, y, 1)
    assert (
        (new[::2] == new[1::2]).all()
        and sorted(new) == sorted(y)
        and not np.array_equal(new, y)
        and np.array_equal(new, deal_labels(who, y, 1))
    )


def test_centre_is_a_baseline_of_its_own():
    m = np.zeros((9, 9, 9), bool)
    m[4, 4, 4] = True
    t = score_case({}, m, np.ones_like(m)).set_index("method")
    assert t.pointing["centre"] == 1 and t.energy["centre"] == pytest.approx(
        float(center_gaussian(m.shape)[4, 4, 4] / center_gaussian(m.shape).sum()), rel=1e-5
    )
    assert t.energy["lungs"] == pytest.approx(1 / 729)
