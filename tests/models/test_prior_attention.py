"Prior attention: exact numbers, twins, silence, who learns from whom, bad input"

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from covid_ct.models.blocks import count_parameters
from covid_ct.models.prior_attention import (
    PARL,
    PARL_CLASSES,
    PARL_OURS,
    PARL_ROWS,
    SARL,
    WARL,
    Branch,
    DoubleNet,
    SingleNet,
    size_table,
)
from covid_ct.models.spatial_attention import SpatialAttention, spatial_softmax
from covid_ct.scan import GeometryError, UnitsError
from covid_ct.train.losses import MultiTask

TOTALS = {
    "wa-66": 15_959_851,
    "sa-66": 15_959_851,
    "wa-66-m": 15_988_903,
    "sa-66-m": 15_988_903,
    "pa-66-m": 15_988_903,
}
SMALL = dict(depth=16, width=4, blocks=(1, 1), hidden=8)
ROWS = PARL_ROWS | PARL_OURS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def meta(row):
    with torch.device("meta"):
        return ROWS[row]()


def small(row, **kw):
    return ROWS[row](**SMALL | (dict(hidden=(10, 8)) if row in ("wa-66", "sa-66") else {}) | kw)


def double(unit=PARL, **kw):
    return DoubleNet(unit, **SMALL | kw)


# ---- Table I
@pytest.mark.parametrize("row", TOTALS)
def test_totals(row):
    m = meta(row)
    assert (
        count_parameters(m, running=True) == TOTALS[row]
        and sum(isinstance(k, nn.Conv3d) for k in m.modules()) == 66
    )
    assert all(k.bias is not None for k in m.modules() if isinstance(k, (nn.Conv3d, nn.Linear)))
    assert (
        sum(isinstance(k, nn.BatchNorm3d) for k in m.modules()) == 66
        and m.feature_shape == (256, 3, 3, 3)
        and m.fc.out_features == 3
    )


@pytest.mark.parametrize("row", TOTALS)
def test_output_sizes(row):
    q, two = ((3, 4, 9, 3), 1) if "-m" not in row else ((2, 2, 2, 2), 2)
    want, c, n = [(16, 48, 48, 48)], 16, 48
    for k in q:
        want += [(c, n, n, n)] * k
        c, n = 2 * c, n // 2
        want.append((c, n, n, n))
    table = size_table(meta(row))
    assert [r["shape"] for r in table if len(r["shape"]) == 4] == want * two
    assert sum(r["parameters"] for r in table) == TOTALS[row]
    linear = {
        k: (m.in_features, m.out_features)
        for k, m in meta(row).named_modules()
        if isinstance(m, nn.Linear)
    }
    if two == 1:
        assert linear == dict(fc1=(6912, 1488), fc2=(1488, 512), fc=(512, 3))
    else:
        assert linear == {
            "fc1.detection": (6912, 512),
            "fc1.kind": (6912, 512),
            "heads.detection": (512, 2),
            "heads.kind": (512, 2),
            "fc2": (1024, 512),
            "fc": (512, 3),
        }


def test_ours():
    assert count_parameters(meta("pa-66-m-learned"), running=True) == TOTALS["pa-66-m"] + 8
    assert count_parameters(meta("pa-66-m-mean"), running=True) == TOTALS["pa-66-m"]
    assert PARL_CLASSES == ("healthy", "ild", "covid") and set(PARL_ROWS) == set(TOTALS)


def test_which_branch_has_attention():
    for row, n in dict(zip(TOTALS, (0, 19, 0, 8, 8), strict=False)).items():
        names = [k for k, m in meta(row).named_modules() if isinstance(m, SpatialAttention)]
        assert len(names) == n and all(k.startswith(("kind.", "branch.")) for k in names)


# ---- spatial softmax and the term
def test_softmax_is_torchs():
    o = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(o)
    ours, theirs = spatial_softmax(o), o.flatten(2).softmax(2).view_as(o)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad((s * r).sum(), o)[0] for s in (ours, theirs)))


def test_softmax_of_half_precision_sums_to_one():
    o = torch.randn(1, 2, 40, 40, 40).bfloat16()
    s = spatial_softmax(o)
    assert s.dtype == torch.float32 and torch.allclose(
        s.sum((2, 3, 4)), torch.ones(1, 2), rtol=1e-4
    )
    assert spatial_softmax(torch.full((1, 1, 2, 2, 2), 3e4)).isfinite().all()


def test_limits_of_the_term():
    o, x = (
        torch.randn(1, 2, 3, 3, 3, dtype=torch.float64),
        torch.randn(1, 2, 3, 3, 3, dtype=torch.float64),
    )
    assert not SpatialAttention(0.0)(o, x).any()
    torch.testing.assert_close(SpatialAttention(2.0)(o, x), 2 * SpatialAttention()(o, x))
    torch.testing.assert_close(SpatialAttention(mean=True)(o, x), 27 * SpatialAttention()(o, x))
    peak = torch.zeros_like(o)
    peak[..., 1, 1, 1] = 1e3
    want = torch.zeros_like(x)
    want[..., 1, 1, 1] = x[..., 1, 1, 1]
    torch.testing.assert_close(SpatialAttention()(peak, x), want)


@pytest.mark.parametrize(
    "kw", [dict(), dict(gamma=3.0, learn=True), dict(mean=True), dict(match=(3, 2))]
)
def test_term_gradients(kw):
    attend = SpatialAttention(**kw).double()
    o, x = (
        torch.randn(1, c, 2, 2, 3, dtype=torch.float64, requires_grad=True)
        for c in (3 if "match" in kw else 2, 2)
    )
    assert torch.autograd.gradcheck(attend, (o, x))
    for p in attend.parameters():
        assert torch.autograd.grad(attend(o, x).square().sum(), p)[0].abs().sum() > 0


def test_learned_gamma_moves():
    net = DoubleNet(partial(PARL, attend=partial(SpatialAttention, learn=True)), **SMALL)
    gammas = [p for n, p in net.named_parameters() if n.endswith("gamma")]
    MultiTask()(net.outputs(torch.rand(3, 1, 16, 16, 16)), dict(label=torch.arange(3)))[
        0
    ].backward()
    assert len(gammas) == 2 and all(p.grad.abs() > 0 for p in gammas)


def test_maps_that_do_not_fit():
    with pytest.raises(GeometryError, match="does not fit"):
        SpatialAttention()(torch.zeros(1, 2, 3, 3, 3), torch.zeros(1, 2, 3, 3, 4))


# ---- units
def unit(kind, like=None, **kw):
    m = kind(4, **kw).double()
    if like is not None:
        m.load_state_dict(like.state_dict(), strict=False)
    return m


def test_twins_with_equal_weights_and_input():
    x = torch.randn(2, 4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    detect = unit(WARL)
    own, lent = unit(SARL, detect), unit(PARL, detect)
    a, b = own(x), lent(x, detect(x)[1])
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    torch.testing.assert_close(*(torch.autograd.grad(y[0].square().sum(), x)[0] for y in (a, b)))


def by_loops(u, x, o):
    "Eq. 3-6 voxel by voxel: x + h(x) + γ S(o) x, S a softmax over the voxels of each channel"
    h, rows = u.h(x), []
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            voxels = [
                (z, y, k)
                for z in range(x.shape[2])
                for y in range(x.shape[3])
                for k in range(x.shape[4])
            ]
            total = sum(o[b, c][v].exp() for v in voxels)
            rows += [
                x[b, c][v] + h[b, c][v] + u.attend.gamma * o[b, c][v].exp() / total * x[b, c][v]
                for v in voxels
            ]
    return torch.stack(rows).view_as(x)


def test_unit_against_loops():
    "Values and all gradients in float64: input, prior, every weight and a learned γ"
    x, o = (torch.randn(2, 4, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in "xo")
    r = torch.randn_like(x)
    learned = partial(SpatialAttention, 1.7, learn=True)
    lent, own = unit(PARL, attend=learned), unit(SARL, attend=learned)
    for ours, theirs, leaves in (
        (lent(x, o)[0], by_loops(lent, x, o), [x, o, *lent.parameters()]),
        (own(x)[0], by_loops(own, x, own.h(x)), [x, *own.parameters()]),
    ):
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(
            *(torch.autograd.grad((f * r).sum(), leaves) for f in (ours, theirs)), strict=False
        ):
            torch.testing.assert_close(a, b)


def test_prior_matters():
    x, o = torch.randn(2, 1, 4, 3, 3, 3, dtype=torch.float64)
    assert not torch.equal(unit(PARL)(x, o)[0], unit(PARL)(x, 2 * o)[0])
    own = unit(SARL)
    assert torch.equal(own(x, o)[0], own(x)[0])  # self-attention does not listen


def test_silence_equals_no_attention():
    "The whole network: γ = 0 is WA-66-M, weight for weight"
    x = torch.rand(2, 1, 16, 16, 16)
    mute, bare = (
        DoubleNet(partial(PARL, attend=partial(SpatialAttention, 0.0)), **SMALL),
        double(WARL),
    )
    bare.load_state_dict(mute.state_dict())
    for train in (True, False):
        a, b = (m.train(train).outputs(x) for m in (mute, bare))
        assert all(torch.equal(a[k], b[k]) for k in ("logits", "detection", "type", "features"))


def test_silent_detection_branch_leaves_a_flat_map():
    "O = 0 everywhere: PARL is WARL plus x/N in every unit"
    net = double()
    x = torch.rand(1, 1, 16, 16, 16)
    for group in net.detection.groups:
        for u in group:
            nn.init.zeros_(u.h[2].norm.weight)
            nn.init.zeros_(u.h[2].norm.bias)

    class Flat(WARL):
        def forward(self, x, prior=None, seen=None):
            f, h = super().forward(x)
            return f + x / x[0, 0].numel(), h

    bare = double(Flat)
    bare.load_state_dict(net.state_dict())
    a, b = (m.eval().outputs(x) for m in (net, bare))
    torch.testing.assert_close(a["logits"], b["logits"])
    assert all(torch.allclose(m, m.flatten()[0].expand_as(m)) for m in a["attention_maps"])


def test_pairs_of_units_meet():
    "Unit i of the type branch gets the correction of unit i of the detection branch"
    got, gave = [], []

    class Spy(PARL):
        def forward(self, x, prior, seen=None):
            got.append(prior)
            return super().forward(x, prior, seen)

    net = DoubleNet(Spy, **SMALL | dict(blocks=(2, 1)))
    for g in net.detection.groups:
        for u in g:
            u.h.register_forward_hook(lambda m, i, o: gave.append(o))
    net(torch.rand(1, 1, 16, 16, 16))
    assert len(got) == len(gave) == 3 and all(a is b for a, b in zip(got, gave, strict=False))


# ---- who learns from whom
class Deaf(SpatialAttention):
    def forward(self, o, x, seen=None):
        return super().forward(o.detach(), x, seen)


@pytest.mark.parametrize(
    "unit,hears",
    [
        (WARL, False),
        (SARL, False),
        (PARL, True),
        (partial(PARL, attend=partial(SpatialAttention, 0.0)), False),
        (partial(PARL, attend=Deaf), False),
    ],
)
def test_type_loss_reaches_detection_only_through_attention(unit, hears):
    net = double(unit)
    total, _ = MultiTask(scales=(0.0, 1.0, 0.0))(
        net.outputs(torch.rand(3, 1, 16, 16, 16)), dict(label=torch.arange(3))
    )
    net.zero_grad()
    total.backward()

    def pull(*parts):
        return sum(
            float(p.grad.abs().sum()) for m in parts for p in m.parameters() if p.grad is not None
        )

    assert (pull(net.detection) > 0) == hears
    assert (
        pull(net.fc1["detection"], net.heads["detection"], net.fc, net.fc2) == 0
        and pull(net.kind) > 0
        and pull(net.heads["kind"]) > 0
    )
    borrowed = [p.grad for g in net.detection.groups for u in g for p in u.parameters()]
    if hears:
        assert all(g is not None and g.abs().sum() > 0 for g in (borrowed[0], borrowed[-1]))
    last = [p.grad for p in net.detection.transitions[-1].parameters()]
    assert all(g is None or not g.any() for g in last)  # nothing behind the last unit is borrowed


def test_detection_loss_never_reaches_the_type_branch():
    net = double()
    MultiTask(scales=(1.0, 0.0, 0.0))(
        net.outputs(torch.rand(3, 1, 16, 16, 16)), dict(label=torch.arange(3))
    )[0].backward()
    assert all(
        p.grad is None or not p.grad.any()
        for m in (net.kind, net.fc1["kind"], net.heads["kind"])
        for p in m.parameters()
    )


@pytest.mark.parametrize("row", ROWS)
def test_every_row_learns(row):
    net = small(row)
    x, y = F.interpolate(torch.randn(6, 1, 4, 4, 4), 16, mode="trilinear"), torch.arange(6) % 3
    out = net.outputs(x)
    loss = (
        MultiTask()(out, dict(label=y))[0] if "type" in out else F.cross_entropy(out["logits"], y)
    )
    loss.backward()

    def bias_before_norm(n):
        return n.endswith(
            "conv.bias"
        )  # a norm takes the bias out again: gradient 0 but for rounding

    assert not [
        n
        for n, p in net.named_parameters()
        if p.grad is None or not (p.grad.abs().sum() > 0 or bias_before_norm(n))
    ]


# ---- the network
def test_outputs():
    x = torch.rand(2, 1, 16, 16, 16)
    for row in ROWS:
        net = small(row).eval()
        o = net.outputs(x)
        assert (
            torch.equal(o["logits"], net(x))
            and o["logits"].shape == (2, 3)
            and o["features"].shape[1:] == net.feature_shape == (16, 2, 2, 2)
        )
        assert [tuple(m.shape) for m in o["attention_maps"]] == (
            [] if row.startswith("wa") else [(2, 8, 8, 8), (2, 4, 4, 4)]
        )
        for m in o["attention_maps"]:
            torch.testing.assert_close(m.sum((1, 2, 3)), torch.ones(2))
            assert (m > 0).all()
        if "-m" in row:
            assert o["detection"].shape == o["type"].shape == (2, 2)
    assert double(classes=4).outputs(x)["type"].shape == (2, 3)


def test_patients_do_not_mix():
    net, x = double().eval(), torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(x[:1]))
        torch.testing.assert_close(net(x.flip(0)).flip(0), net(x))


@pytest.mark.parametrize(
    "shape,error",
    [
        ((1, 1, 16, 16, 8), GeometryError),
        ((1, 1, 8, 16, 16), GeometryError),
        ((1, 16, 16, 16), GeometryError),
        ((1, 3, 16, 16, 16), GeometryError),
    ],
)
def test_wrong_shapes(shape, error):
    for net in (double(), SingleNet(**SMALL | dict(hidden=(10, 8)))):
        with pytest.raises(error, match="Net"):
            net(torch.rand(shape))


def test_integers_are_refused():
    with pytest.raises(UnitsError):
        double()(torch.zeros(1, 1, 16, 16, 16, dtype=torch.uint8))


def test_odd_edges():
    for depth, edge in ((17, 3), (20, 3), (31, 4)):
        net = double(depth=depth)
        assert net.edge == edge and net.eval()(torch.rand(1, 1, *(depth,) * 3)).shape == (1, 3)


def test_parts():
    net = DoubleNet(PARL, **SMALL, norm=lambda c: nn.GroupNorm(2, c))
    assert not any(isinstance(m, nn.BatchNorm3d) for m in net.modules()) and net(
        torch.rand(1, 1, 16, 16, 16)
    ).shape == (1, 3)
    assert Branch(WARL, (1, 1), 4)(torch.rand(1, 1, 16, 16, 16))[0].shape == (1, 16, 2, 2, 2)


def test_state_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    a, x = small("pa-66-m-learned").eval(), torch.rand(1, 1, 16, 16, 16)
    save_file(a.state_dict(), tmp_path / "w.safetensors")
    b = small("pa-66-m-learned").eval()
    b.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(a(x), b(x))


def test_export():
    net, x = double().eval(), torch.rand(2, 1, 16, 16, 16)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_overfits():
    x, y = torch.rand(6, 1, 16, 16, 16), torch.tensor([0, 0, 1, 1, 2, 2])
    net = double(width=8, hidden=32)
    opt = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    for _ in range(60):
        loss = MultiTask()(net.outputs(x), dict(label=y))[0]
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.3


@pytest.mark.slow
def test_full_size():
    net = PARL_ROWS["pa-66-m"]().eval()
    with torch.no_grad():
        o = net.outputs(torch.rand(1, 1, 96, 96, 96))
    assert o["logits"].isfinite().all() and [tuple(m.shape[1:]) for m in o["attention_maps"]] == [
        (n,) * 3 for n in (48, 24, 12, 6) for _ in "ab"
    ]


# ---- with the rest of the package
def test_fits_by_a_recipe(tmp_path):
    "The loop trains them as they are; each part of Eq. 7 gets a column; the run can be loaded"
    from covid_ct.train.loop import fit, load_run, predict_batches
    from covid_ct.train.recipes import Recipe, sourced_fields

    r = Recipe(
        "prior_attention",
        "test",
        PARL_CLASSES,
        model="pa-66-m",
        model_kwargs=dict(depth=16, width=4, blocks=(1, 1), hidden=8),
        batch_size=10,
        optimizer="sgd",
        lr=1e-2,
        epochs=2,
        decay=0.95,
        decay_every=1,
        loss="multi_task",
        keep="accuracy",
        sources={k: "test" for k in sourced_fields()},
    )

    def batch(labels):
        return dict(
            image=torch.rand(len(labels), 1, 16, 16, 16),
            label=torch.tensor(labels),
            scan_id=[f"s{i}" for i in range(len(labels))],
            patient_id=[f"p{i}" for i in range(len(labels))],
        )

    train, valid = (
        [batch([0] * 4 + [1] * 3 + [2] * 3) for _ in range(2)],
        [batch([0, 1, 2] * 2), batch([0, 0])],
    )
    run = fit(ROWS[r.model](**r.model_kwargs), train, valid, r, tmp_path / "run", progress=False)
    assert {"train_detection", "train_type", "train_combined"} <= set(run.history) and len(
        run.history
    ) == 2
    model, again, _ = load_run(tmp_path / "run")
    assert again == r and torch.equal(model(valid[0]["image"]), run.model.eval()(valid[0]["image"]))
    assert set(predict_batches(model, valid, PARL_CLASSES).columns) >= {
        "prob_healthy",
        "prob_ild",
        "prob_covid",
    }
