"""Online attention and the dual-sampling network: equations against loops, rows, bad input."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from covid_ct.models.blocks import count_parameters
from covid_ct.models.dual_sampling import (
    DUAL_ROWS,
    DUAL_TABLE_ROWS,
    RATIO_GROUPS,
    AttentionResNet,
    Mixing,
    PoolStem,
    check_ratio,
    combine_predictions,
    ratio_group,
    search_mixing,
)
from covid_ct.models.online_cam import (
    OnlineAttention,
    class_map,
    rescale_to_unit,
    soft_mask,
    upsample_map,
)
from covid_ct.models.resnet3d import feature_size
from covid_ct.phantom.chest import make_phantom
from covid_ct.preprocess.resample import Prep, prepare_scan
from covid_ct.scan import CohortError, DataError, GeometryError
from covid_ct.train.dual import (
    _branches,
    _check_protocol_cohort,
    _dual_scores,
    dual_metrics,
    group_table,
    paired_table,
    protocol,
    result_table,
)
from covid_ct.train.losses import AttentionLoss, LossError, attention_error


def tiny(**kw):
    torch.manual_seed(0)
    net = AttentionResNet(**{**dict(width=4, blocks=(1, 1, 1, 1), depth=20), **kw})
    nn.init.normal_(net.fc.weight, 0, 0.5)
    return net


# --- Eq. 1-4 against loops, float64 ---


def loop_map(f, w, label):
    out = torch.zeros(len(f), 1, *f.shape[2:], dtype=f.dtype)
    for b in range(len(f)):
        for d in range(f.shape[2]):
            for h in range(f.shape[3]):
                for v in range(f.shape[4]):
                    s = sum(w[label[b], c] * f[b, c, d, h, v] for c in range(f.shape[1]))
                    if s > 0:
                        out[b, 0, d, h, v] = s
    return out


def loop_loss(t, m):
    "Eq. 3 voxel by voxel"
    up = low = 0.0
    for a, b in zip(t.flatten(), m.flatten(), strict=False):
        up, low = up + (a - b) ** 2, low + a + b
    return up / low


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eq_1_to_4(seed):
    "Values and gradients of features and weights, through map, range, mask and loss"
    g = torch.Generator().manual_seed(seed)
    f, w = (
        torch.randn(2, 3, 2, 3, 2, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_(),
    )
    y, mask = torch.tensor([1, 0]), (torch.rand(2, 1, 2, 3, 2, generator=g) > 0.5).double()
    fast = attention_error(
        soft_mask(rescale_to_unit(class_map(f, w, torch.tensor([1, 1]), detach=False))), mask
    )
    slow = []
    for b in range(2):
        a = loop_map(f[b : b + 1], w, [1])
        a = (a - a.min()) / (a.max() - a.min())
        slow.append(loop_loss(1 / (1 + torch.exp(-100 * (a - 0.4))), mask[b]))
    torch.testing.assert_close(fast, torch.stack(slow))
    for one, two in zip(
        torch.autograd.grad(fast.sum(), (f, w), retain_graph=True),
        torch.autograd.grad(sum(slow), (f, w), retain_graph=True),
        strict=False,
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
    z = torch.randn(2, 2, generator=g, dtype=torch.float64).requires_grad_()
    total, _ = AttentionLoss()(
        dict(logits=z, attention=soft_mask(rescale_to_unit(class_map(f, w, torch.tensor([1, 1]))))),
        dict(label=y, infection=mask),
    )
    p = (z[:, 1] - z[:, 0]).sigmoid()
    hand = -(p[0].log() + (1 - p[1]).log()) / 2 + 0.5 * slow[0]
    torch.testing.assert_close(total, hand)
    for one, two in zip(
        torch.autograd.grad(total, (z, f)), torch.autograd.grad(hand, (z, f)), strict=False
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_upsample_is_trilinear():
    "By hand along one axis: sample points at -1/4, 1/4, 3/4, 5/4 of the coarse grid"
    m = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1)
    assert upsample_map(m, (4, 1, 1)).flatten().tolist() == [1.0, 1.5, 2.5, 3.0]


# --- copied weights ---


@pytest.mark.parametrize("detach", [True, False])
def test_copied_weights(detach):
    net = tiny(attention=partial(OnlineAttention, detach=detach)).double()
    x = torch.rand(2, 1, 20, 24, 28).double()
    batch = dict(
        label=torch.tensor([1, 1]), infection=(torch.rand(2, 1, 20, 24, 28) > 0.8).double()
    )
    o = net.outputs(x)
    only = attention_error(o["attention"], batch["infection"]).sum()
    g = torch.autograd.grad(
        only, [net.fc.weight, net.fc.bias, net.stem.conv.conv.weight], allow_unused=True
    )
    assert g[1] is None and g[2].abs().sum() > 0
    assert g[0] is None if detach else g[0].abs().sum() > 0
    total, _ = AttentionLoss()(net.outputs(x), batch)
    total.backward()
    assert net.fc.weight.grad.abs().sum() > 0


def test_copied_weights_are_those_of_now():
    "The copy is taken at every pass, not at construction"
    net = tiny().eval()
    x = torch.rand(1, 1, 20, 24, 24)
    a = net.outputs(x)["class_map"]
    with torch.no_grad():
        net.fc.weight.neg_()
    b = net.outputs(x)["class_map"]
    assert (a * b).abs().max() == 0 and b.abs().sum() + a.abs().sum() > 0
    assert not list(net.attention.parameters())


# --- range and mask ---


def test_no_range_is_empty_not_nan():
    for v in (0.0, 3.0):
        m = torch.full((2, 1, 3, 3, 3), v, requires_grad=True)
        t = soft_mask(rescale_to_unit(m))
        t.sum().backward()
        assert torch.isfinite(t).all() and t.max() < 1e-15 and torch.isfinite(m.grad).all()


def test_each_volume_has_its_own_range():
    m = torch.rand(3, 1, 4, 4, 4) * torch.tensor([1.0, 100.0, 1e-6]).view(3, 1, 1, 1, 1) + 5
    s = rescale_to_unit(m)
    assert torch.equal(s.amin((1, 2, 3, 4)), torch.zeros(3)) and torch.equal(
        s.amax((1, 2, 3, 4)), torch.ones(3)
    )
    torch.testing.assert_close(s[1], rescale_to_unit(m[1:2])[0])


def test_soft_mask():
    assert soft_mask(torch.tensor(0.4, dtype=torch.float64)) == 0.5
    assert (
        abs(float(soft_mask(torch.tensor(0.41, dtype=torch.float64))) - 1 / (1 + np.exp(-1.0)))
        < 1e-12
    )


def test_half_precision_stays_finite():
    net = tiny()
    x = torch.rand(2, 1, 20, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        o = net.outputs(x)
    assert o["features"].dtype == torch.bfloat16 and o["attention"].dtype == torch.float32
    assert (
        torch.isfinite(o["attention"]).all()
        and 0 <= o["attention"].min() <= o["attention"].max() <= 1
    )


# --- options ---


def test_options():
    net = tiny().eval()
    x = torch.rand(2, 1, 20, 24, 28)
    o = net.outputs(x)

    def look(**kw):
        return OnlineAttention(**kw)(o["features"], net.fc, x.shape[2:], o["logits"])

    assert torch.equal(look()[0], look(detach=False)[0])
    assert torch.equal(look(label=lambda z: torch.tensor([1, 1]))[1], look(label=1)[1])
    a, b = look(label=0)[1], look(label=1)[1]
    pick = look(label=lambda z: torch.tensor([0, 1]))[1]
    assert torch.equal(pick[0], a[0]) and torch.equal(pick[1], b[1])
    assert (
        look(steps=(rescale_to_unit, upsample_map))[0].shape
        == look()[0].shape
        == (2, 1, 20, 24, 28)
    )
    assert look(steps=(upsample_map,))[0].shape == x.shape


def test_bad_options():
    net = tiny()
    f = torch.rand(1, 32, 2, 2, 2)
    with pytest.raises(DataError, match="no class"):
        class_map(f, net.fc.weight, torch.tensor([2]))
    with pytest.raises(GeometryError, match="for 5 channels"):
        class_map(f[:, :5], net.fc.weight, torch.tensor([1]))


# --- the network ---


def test_full_size_on_paper():
    with torch.device("meta"):
        net = AttentionResNet()
    assert net.stride == (16, 16, 16) and feature_size(net, (138, 256, 256)) == (512, 9, 16, 16)
    o = net.outputs(torch.zeros(1, 1, 138, 256, 256, device="meta"))
    assert (
        o["features"].shape == (1, 512, 9, 16, 16)
        and o["attention"].shape == (1, 1, 138, 256, 256)
        and o["class_map"].shape == (1, 1, 9, 16, 16)
    )
    assert (
        sum(isinstance(m, nn.Conv3d) for s in net.stages for b in s for m in (b.conv1, b.conv2)) + 2
        == 34
    )


def monai(width):
    "MONAI's ResNet-34, last stage of stride 1, no biases before the norms of its shortcuts"
    from monai.networks.nets import ResNet

    peer = ResNet(
        "basic",
        [3, 4, 6, 3],
        [width, 2 * width, 4 * width, 8 * width],
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_size=7,
        conv1_t_stride=2,
        num_classes=2,
        shortcut_type="B",
    )
    peer.layer4[0].conv1.stride = peer.layer4[0].downsample[0].stride = (1, 1, 1)
    for stage in (peer.layer2, peer.layer3, peer.layer4):
        stage[0].downsample[0].bias = None
    return peer


def test_parameters_against_monai():
    with torch.device("meta"):
        ours, peer = AttentionResNet(), monai(64)
    assert count_parameters(ours) == sum(p.numel() for p in peer.parameters()) == 63_470_658


def test_values_against_monai():
    "The same weights give the same logits, at a width of 8"
    torch.manual_seed(0)
    ours, peer = AttentionResNet(width=8, depth=40).eval(), monai(8).eval()
    for k, v in ours.named_buffers():
        if k.endswith("running_var"):
            v.uniform_(0.5, 2)
    mine, state = (
        [v for k, v in ours.state_dict().items() if "num_batches" not in k],
        peer.state_dict(),
    )
    names = [k for k in state if "num_batches" not in k]
    assert [state[n].shape for n in names] == [
        v.shape for v in mine
    ]  # both list convolution, norm, convolution, norm, shortcut in this order
    peer.load_state_dict({**state, **dict(zip(names, mine, strict=False))})
    x = torch.rand(2, 1, 40, 48, 52)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-5)


def test_stem():
    stem = PoolStem(1, 4)
    assert stem.stride == (4, 4, 4) and stem(torch.zeros(2, 1, 17, 16, 33)).shape == (2, 4, 5, 4, 9)
    assert PoolStem(1, 4, pool=(1, 2, 2)).stride == (2, 4, 4)


def test_without_attention():
    net = DUAL_ROWS["rn34"](width=4, blocks=(1, 1, 1, 1), depth=20)
    o = net.outputs(torch.rand(2, 1, 20, 24, 24))
    assert set(o) == {"logits", "features"}
    with pytest.raises(LossError, match="attention"):
        AttentionLoss()(
            o, dict(label=torch.tensor([0, 1]), infection=torch.zeros(2, 1, 20, 24, 24))
        )


def test_mask_on_another_grid():
    o = tiny().outputs(torch.rand(2, 1, 20, 24, 24))
    with pytest.raises(LossError, match="do not fit"):
        AttentionLoss()(
            o, dict(label=torch.tensor([0, 1]), infection=torch.zeros(2, 1, 20, 24, 25))
        )
    with pytest.raises(LossError, match="infection"):
        AttentionLoss()(o, dict(label=torch.tensor([0, 1])))
    p = make_phantom("covid", 1, (24, 32, 32))
    ready = prepare_scan(p.scan, Prep(size=(24, 32, 32), keep="lungs"), lungs=p.lungs)
    with pytest.raises(GeometryError):
        ready.forward(p.infection[1:])
    with pytest.raises(GeometryError):
        prepare_scan(p.scan, Prep(size=(24, 32, 32), keep="lungs"), lungs=p.lungs[:, 1:])


@pytest.mark.parametrize("name", DUAL_TABLE_ROWS)
def test_variants_train(name):
    v = DUAL_TABLE_ROWS[name]
    assert (
        v.network in DUAL_ROWS
        and set(v.samplers) <= {"us", "ss"}
        and (v.loss == "attention") == (v.network == "attention-rn34")
    )


def test_prep_keeps_the_lungs():
    p = make_phantom("cap", 2, (40, 64, 64))
    ready = prepare_scan(
        p.scan,
        Prep(size=(138, 256, 256), spacing=(2.5, 1.4336, 1.4336), keep="lungs"),
        lungs=p.lungs,
    )
    kept = ready.forward(p.lungs)
    assert ready.voxels.shape == (138, 256, 256) and (ready.voxels[~kept] == 0).all()
    assert abs(kept.sum() * ready.grid.voxel_ml / (p.lungs.sum() * p.scan.grid.voxel_ml) - 1) < 0.03


# --- Eq. 5 ---


def test_eq_5_by_hand():
    got = combine_predictions([0.8] * 5, [0.2] * 5, [0, 0.001, 0.01, 0.030, 0.5])
    np.testing.assert_allclose(
        got,
        [0.35 * 0.8 + 0.65 * 0.2, *[0.96 * 0.8 + 0.04 * 0.2] * 3, 0.35 * 0.8 + 0.65 * 0.2],
        atol=1e-15,
    )


def test_eq_5_in_loops():
    rng = np.random.default_rng(3)
    us, ss = rng.random((2, 400))
    ratio = rng.choice([0, 0.0005, 0.001, 0.0011, 0.0299, 0.03, 0.0301, 0.6, 1], 400)
    slow = []
    for a, b, r in zip(us, ss, ratio, strict=False):
        w = 0.35 if r < 0.001 or r > 0.030 else 0.96
        slow.append(w * a + (1 - w) * b)
    np.testing.assert_allclose(combine_predictions(us, ss, ratio), slow, atol=1e-15)


def test_eq_5_stays_between():
    rng = np.random.default_rng(0)
    a, b, r = rng.random((3, 500))
    p = combine_predictions(a, b, r)
    assert (p >= np.minimum(a, b) - 1e-12).all() and (p <= np.maximum(a, b) + 1e-12).all()


@pytest.mark.parametrize(
    "ratio,word",
    [
        ([0.1, np.nan], "scan 1"),
        ([0.1, 1.2], "outside"),
        ([-0.1, 0], "outside"),
        (["a", 0.1], "number"),
        (None, "has no infection ratio|not a number"),
    ],
)
def test_bad_ratios(ratio, word):
    for f in (
        check_ratio,
        ratio_group,
        lambda r: combine_predictions([0.1, 0.2], [0.1, 0.2], r),
        Mixing(),
    ):
        with pytest.raises(CohortError, match=word):
            f(ratio)


def test_shapes_of_the_ensemble():
    with pytest.raises(CohortError, match="one order"):
        combine_predictions([0.1], [0.1, 0.2], [0.1, 0.2])


def slow_search(us, ss, ratio, covid):
    "Every weight for both regions, accuracy first"
    best = {}
    for name, at in (
        ("rare", (ratio < 0.001) | (ratio > 0.03)),
        ("middle", (ratio >= 0.001) & (ratio <= 0.03)),
    ):
        score = {}
        for i in range(101):
            w = i / 100
            p = w * us[at] + (1 - w) * ss[at]
            score[i] = int(((p >= 0.5) == covid[at]).sum())
        best[name] = [i / 100 for i, s in score.items() if s == max(score.values())]
    return best


def test_search():
    rng = np.random.default_rng(4)
    n = 300
    y = rng.random(n) < 0.5
    r = rng.choice([0.0001, 0.01, 0.2], n)
    us, ss = (np.clip(y * 0.3 + rng.normal(0.35, 0.3, n), 0, 1) for _ in range(2))
    m, best = search_mixing(us, ss, r, y), slow_search(us, ss, r, y)
    assert any(abs(m.rare - w) < 1e-9 for w in best["rare"]) and any(
        abs(m.middle - w) < 1e-9 for w in best["middle"]
    )

    def acc(mix):
        return ((combine_predictions(us, ss, r, mix) >= 0.5) == y).mean()

    assert acc(m) >= max(
        acc(Mixing()), acc(Mixing(rare=1, middle=1)), acc(Mixing(rare=0, middle=0))
    )


def test_search_needs_both():
    r = np.array([0.01, 0.2])
    p = np.array([0.2, 0.8])
    with pytest.raises(CohortError, match="one class only"):
        search_mixing(p, p, r, [True, True])
    with pytest.raises(CohortError, match="no scan of the middle size"):
        search_mixing(p, p, np.array([0.2, 0.2]), [True, False])
    with pytest.raises(CohortError, match="no scan of a rare size"):
        search_mixing(p, p, np.array([0.01, 0.01]), [True, False])


def test_groups():
    assert ratio_group([0.0049, 0.005, 0.03, 0.031]).tolist() == [
        RATIO_GROUPS[0],
        RATIO_GROUPS[1],
        RATIO_GROUPS[1],
        RATIO_GROUPS[2],
    ]


# --- the protocol ---


def cohort(n=120, folds=3):
    rng = np.random.default_rng(0)
    label = np.array(["cap", "covid"])[np.arange(n) % 2]
    rows = pd.DataFrame(
        dict(
            scan_id=[f"s{i}" for i in range(n)],
            patient_id=[f"p{i}" for i in range(n)],
            label=label,
            infection_ratio=rng.choice([0.0005, 0.004, 0.01, 0.05, 0.2], n),
        )
    )
    return rows.assign(fold=np.where(np.arange(n) >= n - 30, -1, np.arange(n) // 2 % folds))


def told(seen=None):
    "A network that knows its own name, its sampler and its fold"

    def fit_one(network, loss, sampler, train, valid, seed):
        if seen is not None:
            seen.append(
                (
                    network,
                    loss,
                    type(sampler).__name__,
                    set(train.scan_id),
                    set(valid.scan_id),
                    len(sampler),
                )
            )
        shift = (
            dict(UniformSampler=0.1, SizeBalancedSampler=0.3)[type(sampler).__name__]
            + 0.05 * (network == "rn34")
            + 0.01 * len(seen or [])
        )
        return lambda rows: np.clip(
            (rows.label == "covid") * 0.4 + shift + rows.infection_ratio, 0, 1
        )

    return fit_one


def test_protocol_trains_each_network_once_per_fold():
    seen, c = [], cohort()
    results = protocol(c, told(seen))
    assert (
        len(seen) == 9
        and len(_branches()) == 3
        and {s[2] for s in seen} == {"UniformSampler", "SizeBalancedSampler"}
    )
    test = set(c.scan_id[c.fold < 0])
    for *_, train, valid, n in seen:
        assert not train & valid and not (train | valid) & test and n == len(train)
    for v in DUAL_TABLE_ROWS:
        t = results[results.variant == v]
        assert (
            sorted(t.scan_id[t.part == "valid"]) == sorted(c.scan_id[c.fold >= 0])
            and (t[t.part == "test"].groupby("scan_id").size() == 3).all()
        )


def test_ensemble_rows():
    r = protocol(cohort(), told()).set_index(["part", "fold", "scan_id"])
    us, ss, ds = (r[r.variant == f"Attention RN34 + {k}"].prob for k in ("US", "SS", "DS"))
    q = r[r.variant == "RN34 + US"].infection_ratio
    w = np.where((q < 0.001) | (q > 0.03), 0.35, 0.96)
    np.testing.assert_allclose(ds, w * us + (1 - w) * ss)


def test_tables_by_hand():
    r = protocol(cohort(), told([]))
    two, three = result_table(r), group_table(r)
    t = r[(r.variant == "RN34 + US") & (r.part == "test")]
    sens = [
        ((s.prob >= 0.5) & (s.label == "covid")).sum() / (s.label == "covid").sum()
        for _, s in t.groupby("fold")
    ]
    assert two.test["sensitivity", "RN34 + US"] == pytest.approx(np.mean(sens)) and two["std"][
        "sensitivity", "RN34 + US"
    ] == pytest.approx(np.std(sens, ddof=1))
    tv = r[(r.variant == "Attention RN34 + SS") & (r.part == "valid") & (r.infection_ratio > 0.03)]
    assert three[RATIO_GROUPS[2], "TV"]["specificity", "Attention RN34 + SS"] == pytest.approx(
        ((tv.prob < 0.5) & (tv.label == "cap")).sum() / (tv.label == "cap").sum()
    )
    assert set(three.columns.get_level_values(0)) == set(RATIO_GROUPS)


def test_score_against_scikit_learn():
    from sklearn.metrics import f1_score, roc_auc_score

    rng = np.random.default_rng(1)
    y = rng.random(200) < 0.4
    p = rng.random(200).round(2)
    p[p == 0.5] = 0.51
    s = _dual_scores(pd.DataFrame(dict(label=np.where(y, "covid", "cap"), prob=p)))
    assert (
        s["AUC"] == pytest.approx(roc_auc_score(y, p))
        and s["F1"] == pytest.approx(f1_score(y, p >= 0.5, average="macro"))
        and s["accuracy"] == pytest.approx(((p >= 0.5) == y).mean())
    )


@pytest.mark.parametrize(
    "sensitivity,specificity,printed",
    [(0.856, 0.870, 0.798), (0.872, 0.907, 0.825), (0.868, 0.876, 0.811), (0.869, 0.901, 0.820)],
)
def test_f1_is_the_papers(sensitivity, specificity, printed):
    "Table II, test set: F1 from printed sensitivity, specificity, 2,295 COVID and 501 CAP scans"
    hit, free = round(sensitivity * 2295), round(specificity * 501)
    prob = np.r_[np.ones(hit), np.zeros(2295 - hit), np.zeros(free), np.ones(501 - free)]
    got = _dual_scores(pd.DataFrame(dict(label=["covid"] * 2295 + ["cap"] * 501, prob=prob)))
    assert (
        abs(got["F1"] - printed) < 0.003
        and abs(got["sensitivity"] - sensitivity) < 0.001
        and abs(got["specificity"] - specificity) < 0.001
    )


def test_readings_of_weighted_cohorts():
    "A scan that is drawn twice counts twice"
    rng = np.random.default_rng(2)
    t = pd.DataFrame(dict(label=np.array(["cap", "covid"])[np.arange(40) % 2], prob=rng.random(40)))
    w = rng.integers(0, 3, (5, 40))
    many = dual_metrics(t, w)
    for j in range(5):
        one = _dual_scores(t.iloc[np.repeat(np.arange(40), w[j])])
        assert all(many[k][j] == pytest.approx(v) for k, v in one.items())


def test_paired():
    r = protocol(cohort(), told([]))
    t = paired_table(r)
    one = t[(t.variant == "Attention RN34 + SS") & (t.reading == "models, accuracy")].iloc[0]
    acc = {
        v: np.array(
            [
                _dual_scores(s)["accuracy"]
                for _, s in r[(r.variant == v) & (r.part == "test")].groupby("fold")
            ]
        )
        for v in ("Attention RN34 + SS", "RN34 + US")
    }
    d = acc["Attention RN34 + SS"] - acc["RN34 + US"]
    assert (
        one.pairs == 3
        and one.difference == pytest.approx(d.mean())
        and (
            np.isnan(one.t)
            if np.ptp(d) == 0
            else one.t == pytest.approx(d.mean() / (d.std(ddof=1) / 3**0.5))
        )
    )
    assert set(t.variant) == set(DUAL_TABLE_ROWS) - {"RN34 + US"}


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda c: c.drop(columns="infection_ratio"), "infection_ratio"),
        (lambda c: c.drop(columns="fold"), "fold"),
        (lambda c: c.assign(infection_ratio=c.infection_ratio * 100), "outside"),
        (lambda c: c.assign(infection_ratio=c.infection_ratio.where(c.index != 3)), "no infection"),
        (lambda c: c[c.fold >= 0], "no test set"),
        (lambda c: c.assign(label="ild"), "label"),
        (lambda c: c[c.label == "covid"], "cap"),
        (lambda c: c[(c.label == "cap") | (c.infection_ratio > 0.03)], "covid_small"),
        (lambda c: c[c.fold != -1].iloc[:0], "no "),
    ],
)
def test_bad_cohorts(change, word):
    with pytest.raises(CohortError, match=word):
        protocol(_check_protocol_cohort(change(cohort())), told())


# --- trained from a cohort by its recipe ---


@pytest.mark.parametrize("call", ["train_fold", "train", "cross_validate"])
def test_every_path_asks_for_the_masks_of_the_recipe(tmp_path, monkeypatch, call):
    "The attention loss needs lungs and infection; the test set is asked for no mask"
    from covid_ct.cohort.splits import split_patients
    from covid_ct.phantom.cohort import phantom_cohort, phantom_of
    from covid_ct.preprocess.resample import PREPS
    from covid_ct.train import study
    from covid_ct.train.recipes import change, recipe

    monkeypatch.setitem(PREPS, "brick", Prep(size=(8, 16, 16)))
    small = dict(classes=2, depth=8, width=4, blocks=(1, 1, 1), strides=(1, 1, 1))
    r = change(
        recipe("dual_sampling", "tiny"),
        "test",
        prep="brick",
        model_kwargs=small,
        epochs=1,
        milestones=(),
    )
    assert r.masks == ("lung", "infection") and recipe("darnet", "paper").masks == ()
    cohort = phantom_cohort(12, seed=4, labels=("cap", "covid"), second_scan=0)
    cohort = split_patients(cohort, folds=2, test=0.2)
    asked, real = [], study.ScanDataset

    def noted(rows, *a, **kw):
        asked.append((set(rows.fold), kw["masks"]))
        return real(rows, *a, **kw)

    monkeypatch.setattr(study, "ScanDataset", noted)
    kw = dict(progress=False, load=partial(phantom_of, shape=(16, 32, 32)))
    if call == "train_fold":
        assert (
            study.train_fold(cohort, 0, r, tmp_path / "r", **kw)
            .history.train_attention.notna()
            .all()
        )
    if call == "train":
        assert study.train(cohort, r, tmp_path / "r", **kw).history.train_attention.notna().all()
    if call == "cross_validate":
        assert study.cross_validate(cohort, r, tmp_path / "r", **kw).notna().any(axis=None)
    assert (
        all(masks == (() if folds == {-1} else r.masks) for folds, masks in asked)
        and len({*map(str, asked)}) >= 3
    )
