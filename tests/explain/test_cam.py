"Class activation maps: identities, an oracle, state, bad input, geometry"

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import nn

from covid_ct.explain.cam import (
    CAM_METHODS,
    all_cams,
    attention_maps,
    baseline_maps,
    cam,
    center_gaussian,
    contrast_cam,
    evaluating,
    explain,
    find_layer,
    grad_cam,
    grad_cam_pp,
    normalise_maps,
    to_scan_space,
)
from covid_ct.models.darnet import DARNET_ROWS
from covid_ct.models.dual_sampling import DUAL_ROWS
from covid_ct.models.prior_attention import PARL_ROWS
from covid_ct.models.raunet import RAUNET_ROWS
from covid_ct.preprocess.resample import Prep, prepare_scan
from covid_ct.scan import DataError, GeometryError, Map, Scan
from covid_ct.widgets.overlay import view, view_side_by_side


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net(row="darnet"):
    m = DARNET_ROWS[row](depth=8, width=4).double().eval()
    for p in m.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0, 0.3)
    return m


X = torch.rand(3, 1, 8, 32, 48, generator=torch.Generator().manual_seed(1)).double()


class Corner(nn.Module):
    "Looks at the feature voxel (1, 0, 3) and nothing else"

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 3)
        self.fc.weight.data[:, 0], self.fc.bias.data[:] = torch.tensor([-1.0, 0.0, 5.0]), 0.0

    def features(self, x):
        f = F.avg_pool3d(x, 4)
        only = torch.zeros_like(f)
        only[:, :, 1, 0, 3] = 1
        return f * only

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3, 4)))


@pytest.mark.parametrize("row", DARNET_ROWS)
@pytest.mark.parametrize("label", [0, 2])
def test_mean_is_the_logit_less_the_bias(row, label):
    m = net(row)
    torch.testing.assert_close(
        cam(m, X, label).mean((1, 2, 3)), (m(X)[:, label] - m.fc.bias[label]).detach()
    )


def test_map_is_the_slow_sum():
    m = net()
    f, w = m.features(X).detach(), m.fc.weight.detach()
    slow = torch.stack(
        [
            torch.stack([w[2] @ f[b].flatten(1)[:, v] for v in range(f[0, 0].numel())]).view(
                f.shape[2:]
            )
            for b in range(3)
        ]
    )
    torch.testing.assert_close(cam(m, X, 2), slow)


@pytest.mark.parametrize("layer", [None, "stages.3", "stages.1", "stages.0.1", "stem"])
def test_captum(layer):
    m = net()
    name, module = find_layer(m, layer)
    theirs = LayerGradCam(m, module).attribute(X.clone().requires_grad_(), target=1)[:, 0].detach()
    torch.testing.assert_close(grad_cam(m, X, 1, layer, relu=False), theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_cam(m, X, 1, layer), theirs.relu(), atol=1e-5, rtol=1e-5)


def test_grad_cam_is_cam_over_n():
    m = net()
    c = cam(m, X, 1)
    torch.testing.assert_close(grad_cam(m, X, 1), c.relu() / c[0].numel())


def test_labels():
    m = net()
    own = m(X).argmax(1)
    torch.testing.assert_close(cam(m, X), cam(m, X, own))
    torch.testing.assert_close(
        cam(m, X, [0, 1, 2]), torch.stack([cam(m, X, k)[k] for k in range(3)])
    )
    torch.testing.assert_close(
        grad_cam(m, X, torch.tensor([0, 1, 2])),
        torch.stack([grad_cam(m, X, k)[k] for k in range(3)]),
    )
    for bad in (3, -1, [0, 1, 5]):
        for f in CAM_METHODS.values():
            with pytest.raises(DataError, match="no class"):
                f(m, X, bad)


def test_batch_equals_singles_in_one_forward():
    m, calls = net(), []
    single = {k: torch.cat([f(m, x[None], 1) for x in X]) for k, f in CAM_METHODS.items()}
    with m.stem.register_forward_hook(lambda *a: calls.append(1)):
        for k, f in CAM_METHODS.items():
            torch.testing.assert_close(f(m, X, 1), single[k])
    assert len(calls) == len(CAM_METHODS)


def test_contrast_ignores_what_classes_share():
    m = net()
    a = contrast_cam(m, X, 1)
    m.fc.weight.data += torch.randn(m.fc.in_features).double()
    torch.testing.assert_close(contrast_cam(m, X, 1), a)
    torch.testing.assert_close(sum(contrast_cam(m, X, k) for k in range(3)), torch.zeros_like(a))


def test_hand_made_network():
    x = torch.rand(4, 1, 16, 16, 16)
    for f in (cam, contrast_cam, partial(grad_cam, layer=None)):
        if isinstance(f, partial):
            continue
        found = f(Corner(), x, 2).flatten(1).argmax(1)
        assert [tuple(map(int, torch.unravel_index(i, (4, 4, 4)))) for i in found] == [
            (1, 0, 3)
        ] * 4


def state(m):
    return [(k.training, len(k._forward_hooks), len(k._backward_hooks)) for k in m.modules()]


@pytest.mark.parametrize("f", CAM_METHODS.values())
def test_leaves_no_trace(f):
    m = net().train()
    m.stages[0].eval()
    m.fc.weight.requires_grad_(False)
    before, buffers = state(m), {k: v.clone() for k, v in m.state_dict().items()}
    needs = [p.requires_grad for p in m.parameters()]
    f(m, X, 1)
    for bad in (dict(label=9), dict(x=X[:, :, :5])):
        with pytest.raises(DataError):
            f(m, **dict(x=X, label=1) | bad)
    assert state(m) == before and needs == [p.requires_grad for p in m.parameters()]
    assert all(torch.equal(v, buffers[k]) for k, v in m.state_dict().items()) and all(
        p.grad is None for p in m.parameters()
    )


def test_evaluating_restores_after_an_error():
    m = net().train()
    m.stages[2].eval()
    before = state(m)
    with pytest.raises(KeyError), evaluating(m):
        m.stages[0].train()
        raise KeyError
    assert state(m) == before


def test_grad_cam_without_gradients():
    m = net()
    want = grad_cam(m, X, 1)
    for p in m.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        got = grad_cam(m, X, 1)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad


def test_any_head():
    m = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    )
    x = torch.rand(2, 1, 4, 5, 6)
    assert grad_cam(m, x, 1).shape == (2, 4, 5, 6) and find_layer(m)[0] == "0"
    with pytest.raises(DataError, match="Grad-CAM"):
        cam(m, x, 1)
    with pytest.raises(GeometryError, match="feature map"):
        grad_cam(m, x, 1, "4")
    for layer in ("nowhere", nn.ReLU()):
        with pytest.raises(DataError, match="no layer"):
            grad_cam(m, x, 1, layer)


def test_normalise():
    m = torch.stack(
        [torch.linspace(-3, 5, 8).view(2, 2, 2), torch.full((2, 2, 2), 7.0), torch.zeros(2, 2, 2)]
    )
    n = normalise_maps(m)
    torch.testing.assert_close(n[0].flatten(), torch.linspace(0, 1, 8))
    assert not n[1:].any()
    torch.testing.assert_close(normalise_maps(m[0]), n[0])
    torch.testing.assert_close(normalise_maps(m[0].double() * 1e-12).float(), n[0])
    assert torch.isfinite(normalise_maps(m * 1e-40)).all() and normalise_maps(m * 1e-40).max() <= 1


def test_center_gaussian():
    for shape in ((5, 7, 9), (4, 6, 8)):
        g = center_gaussian(shape)
        assert (
            g.shape == shape
            and g.max() == 1
            and g.min() > 0
            and np.allclose(g, g[::-1, ::-1, ::-1])
        )
    g = center_gaussian((41, 41, 41), sigma=0.25)
    assert g[20, 20, 20] == 1 and g[20, 20, 20 + 10] == pytest.approx(
        np.exp(-0.5 * (10 / (0.25 * 41)) ** 2), rel=1e-5
    )


# ---- onto the scan
def make_scan():
    rng = np.random.default_rng(0)
    return Scan(
        rng.normal(-600, 100, (24, 40, 36)).astype("i2"),
        (2.5, 1.1, 0.9),
        (-30.0, 12.0, 7.0),
        scan_id="s",
    )


def test_explain_lies_on_the_scan():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(16, 16, 16)))
    m = explain(Corner(), q, s, "covid")
    assert (
        m.grid == s.grid and m.values.shape == s.shape and (m.label, m.method) == ("covid", "CAM")
    )
    assert 0 <= m.values.min() and 0.5 < m.values.max() <= 1
    z, y, x = np.unravel_index(m.values.argmax(), s.shape)
    assert 6 <= z < 12 and 0 <= y < 10 and 27 <= x < 36  # the cell (1, 0, 3) of 4 x 4 x 4
    assert np.array_equal(m.values, explain(Corner(), q, s, 2).values)


def test_explain_outside_the_crop_is_zero():
    s = make_scan()
    lungs = np.zeros(s.shape, bool)
    lungs[6:18, 10:30, 8:28] = True
    q = prepare_scan(s, Prep(size=(16, 16, 16), crop="lungs", margin=0.0), lungs)
    m = explain(Corner(), q, s, "covid")
    assert (
        m.values.max() > 0
        and not m.values[:4].any()
        and not m.values[20:].any()
        and not m.values[:, :8].any()
    )


def test_explain_for_every_method_and_a_dull_network():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(8, 32, 32)))
    m = net().float().train()
    for method in CAM_METHODS:
        out = explain(m, q, s, "cap", method)
        assert out.method == method and out.label == "cap" and out.layer == "stages.3"
    assert m.training
    nn.init.zeros_(m.fc.weight)
    assert not explain(m, q, s, "cap").values.any()


def test_explain_refuses():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(16, 16, 16)))
    good = dict(model=Corner(), prepared=q, scan=s, label="covid")
    for bad, error, text in (
        (dict(label="flu"), DataError, "flu"),
        (dict(method="magic"), DataError, "magic"),
        (dict(label=7), DataError, "no class"),
        (dict(label=-1), DataError, "no class"),
        (dict(scan=s.replace(spacing=(1.0, 1.0, 1.0))), GeometryError, "voxels apart"),
        (dict(scan=s.replace(voxels=s.voxels[1:])), GeometryError, "shapes differ"),
    ):
        with pytest.raises(error, match=text):
            explain(**good | bad)


def test_explain_needs_no_data_module():
    "Anything with voxels, scan_grid and back will do"
    s = make_scan()
    duck = SimpleNamespace(
        voxels=np.random.rand(16, 16, 16).astype("f4"),
        scan_grid=s.grid,
        back=lambda v: np.full(s.shape, v.max()),
    )
    assert explain(Corner(), duck, s, "covid").values.max() == 1


def test_baselines():
    s = make_scan()
    lungs = s.voxels > -600
    b = baseline_maps(s, lungs)
    assert (
        set(b) == {"centre", "lungs"}
        and all(m.grid == s.grid for m in b.values())
        and np.array_equal(b["lungs"].values > 0, lungs)
    )


# ---- all classes, Grad-CAM++, layers
def test_all_classes_in_one_forward():
    m, calls = net(), []
    want = (
        torch.stack([cam(m, X, k) for k in range(3)], 1),
        torch.stack([contrast_cam(m, X, k) for k in range(3)], 1),
    )
    with m.stem.register_forward_hook(lambda *a: calls.append(1)):
        got = all_cams(m, X), all_cams(m, X, contrast=True)
    torch.testing.assert_close(got, want)
    assert len(calls) == 2
    torch.testing.assert_close(got[0].mean((2, 3, 4)) + m.fc.bias.detach(), m(X).detach())


@pytest.mark.parametrize("layer", ["stages.3", "stages.1"])
def test_grad_cam_pp_is_the_slow_sum(layer):
    m = net()
    kept = {}
    at = find_layer(m, layer)[1]
    hook = at.register_forward_hook(lambda k, i, o: kept.update(f=o))
    logit = m(X)[:, 1]
    hook.remove()
    g, f = torch.autograd.grad(logit.sum(), kept["f"])[0], kept["f"].detach()
    slow = torch.zeros(len(X), *f.shape[2:], dtype=f.dtype)
    for b in range(len(X)):
        for c in range(f.shape[1]):
            alpha = torch.where(
                g[b, c] != 0, g[b, c] ** 2 / (2 * g[b, c] ** 2 + g[b, c] ** 3 * f[b, c].sum()), 0
            )
            slow[b] += (alpha * g[b, c].relu()).sum() * f[b, c]
    ours = grad_cam_pp(m, X, 1, layer)
    torch.testing.assert_close(ours, slow.relu(), atol=1e-9, rtol=1e-6)
    assert ours.max() > 0


def test_grad_cam_pp_hears_only_what_pulls_up():
    m = net()
    m.fc.weight.data[1] = -m.fc.weight.data[1].abs()
    assert not grad_cam_pp(m, X, 1).any() and grad_cam_pp(m, X, 2).any()
    f = m.features(X).detach()
    w = m.fc.weight.data[2]
    torch.testing.assert_close(
        grad_cam_pp(m, X, 2),
        torch.einsum("bcdhw,bc->bdhw", f, w.relu() / (2 + w * f.mean((2, 3, 4)))).relu(),
    )


def test_explain_takes_layers_and_functions():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(8, 32, 32)))
    m = net().float()
    m.fc.weight.data[1] = m.fc.weight.data[1].abs()
    a = explain(m, q, s, "cap", "Grad-CAM", layer="stages.1")
    assert (
        a.layer == "stages.1"
        and a.method == "Grad-CAM"
        and not np.array_equal(a.values, explain(m, q, s, "cap", "Grad-CAM").values)
    )

    def my_own(model, x, label):
        return grad_cam(model, x, label, "stages.1")

    b = explain(m, q, s, "cap", my_own)
    assert np.array_equal(a.values, b.values) and (b.method, b.layer) == ("my own", "")
    assert np.array_equal(
        a.values, explain(m, q, s, "cap", partial(grad_cam, layer="stages.1")).values
    )
    for method in ("CAM", "contrast CAM"):
        with pytest.raises(DataError, match="last features"):
            explain(m, q, s, "cap", method, layer="stages.1")


# ---- where a map lands
class Bright(nn.Module):
    "Adds up what is bright, in cells of n voxels"

    def __init__(self, n):
        super().__init__()
        self.n, self.fc = n, nn.Linear(1, 2)
        self.fc.weight.data[:, 0], self.fc.bias.data[:] = torch.tensor([-1.0, 1.0]), 0.0

    def features(self, x):
        return F.avg_pool3d((x - 0.3).relu(), self.n)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3, 4)))


def turned(a, b, c):
    "Directions of an oblique scan"

    def rot(t, i, j):
        return np.array(
            [
                [
                    np.cos(t)
                    if r == k and r in (i, j)
                    else float(r == k)
                    if r not in (i, j) or k not in (i, j)
                    else np.sin(t) * (1 if r == i else -1)
                    for k in range(3)
                ]
                for r in range(3)
            ]
        )

    return rot(a, 0, 1) @ rot(b, 1, 2) @ rot(c, 0, 2)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("crop", ["none", "lungs"])
def test_lands_within_half_a_voxel_on_an_oblique_scan(n, crop):
    """A blob of known place in the patient, a scan that is turned and anisotropic, a network of
    another size"""
    shape, spacing, direction = (30, 52, 44), (3.1, 0.9, 1.3), turned(0.3, -0.2, 0.5)
    assert (
        np.allclose(direction @ direction.T, np.eye(3)) and abs(direction - np.eye(3)).max() > 0.2
    )
    s = Scan(np.zeros(shape, "i2"), spacing, (-40.0, 15.0, 8.0), tuple(map(tuple, direction)))
    centre = s.grid.to_mm((14.3, 27.6, 19.2))
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    off = s.grid.to_mm(index) - centre
    s = s.replace(voxels=(-1350 + 1500 * np.exp(-(off**2).sum(-1) / (2 * 7.0**2))).astype("i2"))
    lungs = np.zeros(shape, bool)
    lungs[3:27, 6:48, 3:38] = True
    q = prepare_scan(s, Prep(size=(32, 40, 48), crop=crop, margin=0.0), lungs)
    for method in ("CAM", "contrast CAM"):
        m = explain(Bright(n), q, s, 1, method, classes=("no", "yes"))
        w = m.values.astype("f8") ** 2
        found = (w[..., None] * index).sum((0, 1, 2)) / w.sum()
        assert abs(found - (14.3, 27.6, 19.2)).max() < 0.5, (n, crop, found)
        assert np.linalg.norm(m.grid.to_mm(found) - centre) < 0.5 * max(spacing)


def test_a_map_of_another_geometry_is_refused():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(16, 16, 16)))
    m = explain(Corner(), q, s, "covid")
    assert view(s, m).map and view_side_by_side(s, {"CAM": m})
    other = (
        s.replace(spacing=(2.5, 1.1, 1.0)),
        s.replace(origin=(-29.0, 12.0, 7.0)),
        s.replace(direction=((1, 0, 0), (0, 0, 1), (0, 1, 0))),
        s.replace(voxels=s.voxels[:-1]),
    )
    for wrong in other:
        for show in (
            lambda wrong=wrong: view(wrong, m),
            lambda wrong=wrong: view_side_by_side(wrong, {"CAM": m}),
            lambda wrong=wrong: to_scan_space(np.ones((2, 2, 2)), q, wrong),
            lambda wrong=wrong: attention_maps(net(), q, wrong),
        ):
            with pytest.raises(GeometryError):
                show()
    with pytest.raises(GeometryError, match="its grid"):
        Map(m.values[:-1], s.grid)


def test_bring_back_keeps_or_stretches():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(16, 16, 16)))
    v = torch.full((4, 4, 4), 0.25)
    v[2, 2, 2] = 0.5
    assert (
        to_scan_space(v, q, s).values.max() == 1
        and to_scan_space(v, q, s, stretch=False).values.max() <= 0.5
        and to_scan_space(v, q, s, stretch=False).values.min() == 0.25
    )
    assert not to_scan_space(np.zeros((2, 2, 2)), q, s).values.any()


# ---- what a network says of its own attention
def test_depth_and_channel_gates():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(8, 32, 32)))
    m = net().float().train()
    x = torch.tensor(q.voxels)[None, None]
    maps = attention_maps(m, q, s)
    with evaluating(m), torch.no_grad():
        gates = m.outputs(x)
    assert (
        m.training
        and len(maps) == 16
        and all(k.grid == s.grid and k.label == "" for k in maps.values())
        and not any(k._forward_hooks for k in m.modules())
    )
    first = maps["depth gate stages.0.0.gates.depth"]
    assert np.ptp(first.values, axis=(1, 2)).max() < 1e-6
    assert first.values.min() == pytest.approx(
        float(gates["depth_gates"][0].mean(1).min()), abs=1e-6
    )  # a share, not stretched
    for ca, g in zip(
        [k for n, k in maps.items() if n.startswith("channel")],
        gates["channel_gates"],
        strict=False,
    ):
        assert g.min() - 1e-6 <= ca.values.min() and ca.values.max() <= g.max() + 1e-6
    same = {n: p for n, p in m.named_modules() if n.endswith("gates.channel")}[
        "stages.0.0.gates.channel"
    ].gate
    with torch.no_grad():
        same.fc2.weight.zero_()
        same.fc2.bias.fill_(torch.logit(torch.tensor(0.3)))
    assert np.allclose(
        attention_maps(m, q, s)["channel gate stages.0.0.gates.channel"].values, 0.3, atol=1e-5
    )  # all channels alike: the same share everywhere


def test_one_map_of_each_kind():
    "The finest layer of each kind, the last of those that are equally fine"
    s = make_scan()
    q = prepare_scan(s, Prep(size=(8, 32, 32)))
    torch.manual_seed(0)
    m = DARNET_ROWS["darnet"](classes=3, depth=8, width=4, blocks=(2, 1, 1, 1)).eval()
    few, every = attention_maps(m, q, s, every=False), attention_maps(m, q, s)
    assert (
        list(few) == ["depth gate stages.0.1.gates.depth", "channel gate stages.0.1.gates.channel"]
        and len(every) == 10
    )
    assert all(np.array_equal(v.values, every[k].values) for k, v in few.items())
    p = PARL_ROWS["pa-66-m"](depth=32, width=4, blocks=(1, 1, 1, 1), hidden=16)
    assert list(attention_maps(p, prepare_scan(s, Prep(size=(32, 32, 32))), s, every=False)) == [
        "prior attention unit 1"
    ]


def test_online_attention_and_prior_maps():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(8, 32, 32)))
    cube = prepare_scan(s, Prep(size=(32, 32, 32)))
    m = DUAL_ROWS["attention-rn34"](depth=8, width=8, blocks=(1, 1, 1), strides=(1, 1, 1)).eval()
    got = attention_maps(m, q, s)
    a = m.outputs(torch.tensor(q.voxels)[None, None])["attention"][0, 0].detach().numpy()
    assert list(got) == ["online attention"] and np.allclose(
        got["online attention"].values, q.back(a).clip(0, 1), atol=1e-5
    )
    p = PARL_ROWS["pa-66-m"](depth=32, width=4, blocks=(1, 1, 1, 1), hidden=16)
    units = attention_maps(p, cube, s)
    assert [k for k in units] == [f"prior attention unit {i}" for i in (1, 2, 3, 4)] and all(
        k.values.max() == 1 for k in units.values()
    )
    with torch.no_grad(), evaluating(p):
        raw = p.outputs(torch.tensor(cube.voxels)[None, None])["attention_maps"][0][0].numpy()
    assert np.unravel_index(
        units["prior attention unit 1"].values.argmax(), s.shape
    ) == np.unravel_index(cube.back(raw).argmax(), s.shape)
    for row, hidden in (
        ("sa-66", (16, 16)),
        ("sa-66-m", 16),
    ):  # the multi-task twin has no prior either
        assert (
            list(
                attention_maps(
                    PARL_ROWS[row](depth=32, width=4, blocks=(1, 1, 1, 1), hidden=hidden), cube, s
                )
            )[0]
            == "self-attention unit 1"
        )
    with pytest.raises(DataError, match="no attention"):
        attention_maps(
            PARL_ROWS["wa-66-m"](depth=32, width=4, blocks=(1, 1, 1, 1), hidden=16), cube, s
        )


def test_lsh_buckets():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(24, 40, 36)))
    m = RAUNET_ROWS["raunet"](widths=(8, 16, 32), cardinality=2, chunk=16, rounds=3)
    got = attention_maps(m, q, s, at=(5, 30, 7))
    top = got["LSH bucket decode.1.attend"].values
    assert (
        list(got) == ["LSH bucket decode.0.attend", "LSH bucket decode.1.attend"]
        and top[5, 30, 7] == pytest.approx(1)
        and not top[:4].any()
        and not top[7:].any()
    )
    with torch.no_grad(), evaluating(m):
        b = m.outputs(torch.tensor(q.voxels[5])[None, None])["buckets"][1]
    assert np.allclose(top[5], (b == b[..., 30:31, 7:8]).float().mean((0, 2))[0].numpy(), atol=1e-5)
    with pytest.raises(GeometryError, match="outside"):
        attention_maps(m, q, s, at=(5, 99, 7))


def test_networks_without_attention_are_named():
    s = make_scan()
    q = prepare_scan(s, Prep(size=(8, 32, 32)))
    with pytest.raises(DataError, match="outputs"):
        attention_maps(Corner(), q, s)
    with pytest.raises(DataError, match="no attention"):
        attention_maps(net("darnet-none").float(), q, s)
