"Class activation maps: identities, an oracle, state, bad input, geometry"
from functools import partial
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from captum.attr import LayerGradCam
from covid_ct.data.preprocess import Prep, prepare
from covid_ct.explain.cam import METHODS, baselines, cam, center_gaussian, contrast_cam, explain, find_layer, grad_cam, inspecting, normalise
from covid_ct.models.darnet import DARNET_ROWS
from covid_ct.scan import DataError, GeometryError, Scan


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def net(row="darnet"):
    m = DARNET_ROWS[row](depth=8, width=4).double().eval()
    for p in m.parameters():
        if p.ndim == 2: nn.init.normal_(p, 0, .3)
    return m


X = torch.rand(3, 1, 8, 32, 48, generator=torch.Generator().manual_seed(1)).double()


class Corner(nn.Module):
    "Looks at the feature voxel (1, 0, 3) and nothing else"
    def __init__(self):
        super().__init__(); self.fc = nn.Linear(1, 3)
        self.fc.weight.data[:, 0], self.fc.bias.data[:] = torch.tensor([-1., 0., 5.]), 0.
    def features(self, x):
        f = F.avg_pool3d(x, 4); only = torch.zeros_like(f); only[:, :, 1, 0, 3] = 1
        return f * only
    def forward(self, x): return self.fc(self.features(x).mean((2, 3, 4)))


@pytest.mark.parametrize("row", DARNET_ROWS)
@pytest.mark.parametrize("label", [0, 2])
def test_mean_is_the_logit_less_the_bias(row, label):
    m = net(row)
    torch.testing.assert_close(cam(m, X, label).mean((1, 2, 3)), (m(X)[:, label] - m.fc.bias[label]).detach())


def test_map_is_the_slow_sum():
    m = net(); f, w = m.features(X).detach(), m.fc.weight.detach()
    slow = torch.stack([torch.stack([w[2] @ f[b].flatten(1)[:, v] for v in range(f[0, 0].numel())]).view(f.shape[2:]) for b in range(3)])
    torch.testing.assert_close(cam(m, X, 2), slow)


@pytest.mark.parametrize("layer", [None, "stages.3", "stages.1", "stages.0.1", "stem"])
def test_captum(layer):
    m = net(); name, module = find_layer(m, layer)
    theirs = LayerGradCam(m, module).attribute(X.clone().requires_grad_(), target=1)[:, 0].detach()
    torch.testing.assert_close(grad_cam(m, X, 1, layer, relu=False), theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_cam(m, X, 1, layer), theirs.relu(), atol=1e-5, rtol=1e-5)


def test_grad_cam_is_cam_over_n():
    m = net(); c = cam(m, X, 1)
    torch.testing.assert_close(grad_cam(m, X, 1), c.relu() / c[0].numel())


def test_labels():
    m = net(); own = m(X).argmax(1)
    torch.testing.assert_close(cam(m, X), cam(m, X, own))
    torch.testing.assert_close(cam(m, X, [0, 1, 2]), torch.stack([cam(m, X, k)[k] for k in range(3)]))
    torch.testing.assert_close(grad_cam(m, X, torch.tensor([0, 1, 2])), torch.stack([grad_cam(m, X, k)[k] for k in range(3)]))
    for bad in (3, -1, [0, 1, 5]):
        for f in METHODS.values():
            with pytest.raises(DataError, match="no class"): f(m, X, bad)


def test_batch_equals_singles_in_one_forward():
    m, calls = net(), []
    single = {k: torch.cat([f(m, x[None], 1) for x in X]) for k, f in METHODS.items()}
    with m.stem.register_forward_hook(lambda *a: calls.append(1)):
        for k, f in METHODS.items(): torch.testing.assert_close(f(m, X, 1), single[k])
    assert len(calls) == len(METHODS)


def test_contrast_ignores_what_classes_share():
    m = net(); a = contrast_cam(m, X, 1)
    m.fc.weight.data += torch.randn(m.fc.in_features).double()
    torch.testing.assert_close(contrast_cam(m, X, 1), a)
    torch.testing.assert_close(sum(contrast_cam(m, X, k) for k in range(3)), torch.zeros_like(a))


def test_hand_made_network():
    x = torch.rand(4, 1, 16, 16, 16)
    for f in (cam, contrast_cam, partial(grad_cam, layer=None)):
        if isinstance(f, partial): continue
        found = f(Corner(), x, 2).flatten(1).argmax(1)
        assert [tuple(map(int, torch.unravel_index(i, (4, 4, 4)))) for i in found] == [(1, 0, 3)] * 4


def state(m): return [(k.training, len(k._forward_hooks), len(k._backward_hooks)) for k in m.modules()]


@pytest.mark.parametrize("f", METHODS.values())
def test_leaves_no_trace(f):
    m = net().train(); m.stages[0].eval(); m.fc.weight.requires_grad_(False)
    before, buffers = state(m), {k: v.clone() for k, v in m.state_dict().items()}
    needs = [p.requires_grad for p in m.parameters()]
    f(m, X, 1)
    for bad in (dict(label=9), dict(x=X[:, :, :5])):
        with pytest.raises(DataError): f(m, **dict(x=X, label=1) | bad)
    assert state(m) == before and needs == [p.requires_grad for p in m.parameters()]
    assert all(torch.equal(v, buffers[k]) for k, v in m.state_dict().items()) and all(p.grad is None for p in m.parameters())


def test_inspecting_restores_after_an_error():
    m = net().train(); m.stages[2].eval(); before = state(m)
    with pytest.raises(KeyError), inspecting(m): m.stages[0].train(); raise KeyError
    assert state(m) == before


def test_grad_cam_without_gradients():
    m = net(); want = grad_cam(m, X, 1)
    for p in m.parameters(): p.requires_grad_(False)
    with torch.no_grad(): got = grad_cam(m, X, 1)
    torch.testing.assert_close(got, want); assert not got.requires_grad


def test_any_head():
    m = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.rand(2, 1, 4, 5, 6)
    assert grad_cam(m, x, 1).shape == (2, 4, 5, 6) and find_layer(m)[0] == "0"
    with pytest.raises(DataError, match="Grad-CAM"): cam(m, x, 1)
    with pytest.raises(GeometryError, match="feature map"): grad_cam(m, x, 1, "4")
    for layer in ("nowhere", nn.ReLU()):
        with pytest.raises(DataError, match="no layer"): grad_cam(m, x, 1, layer)


def test_normalise():
    m = torch.stack([torch.linspace(-3, 5, 8).view(2, 2, 2), torch.full((2, 2, 2), 7.), torch.zeros(2, 2, 2)])
    n = normalise(m)
    torch.testing.assert_close(n[0].flatten(), torch.linspace(0, 1, 8)); assert not n[1:].any()
    torch.testing.assert_close(normalise(m[0]), n[0]); torch.testing.assert_close(normalise(m[0].double() * 1e-12).float(), n[0])
    assert torch.isfinite(normalise(m * 1e-40)).all() and normalise(m * 1e-40).max() <= 1


def test_center_gaussian():
    for shape in ((5, 7, 9), (4, 6, 8)):
        g = center_gaussian(shape)
        assert g.shape == shape and g.max() == 1 and g.min() > 0 and np.allclose(g, g[::-1, ::-1, ::-1])
    g = center_gaussian((41, 41, 41), sigma=.25)
    assert g[20, 20, 20] == 1 and g[20, 20, 20 + 10] == pytest.approx(np.exp(-.5 * (10 / (.25 * 41)) ** 2), rel=1e-5)


# ---- onto the scan
def make_scan():
    rng = np.random.default_rng(0)
    return Scan(rng.normal(-600, 100, (24, 40, 36)).astype("i2"), (2.5, 1.1, .9), (-30., 12., 7.), scan_id="s")


def test_explain_lies_on_the_scan():
    s = make_scan(); q = prepare(s, Prep(size=(16, 16, 16)))
    m = explain(Corner(), q, s, "covid")
    assert m.grid == s.grid and m.values.shape == s.shape and (m.label, m.method) == ("covid", "CAM")
    assert 0 <= m.values.min() and .5 < m.values.max() <= 1
    z, y, x = np.unravel_index(m.values.argmax(), s.shape)
    assert 6 <= z < 12 and 0 <= y < 10 and 27 <= x < 36                  # the cell (1, 0, 3) of 4 x 4 x 4
    assert np.array_equal(m.values, explain(Corner(), q, s, 2).values)


def test_explain_outside_the_crop_is_zero():
    s = make_scan(); lungs = np.zeros(s.shape, bool); lungs[6:18, 10:30, 8:28] = True
    q = prepare(s, Prep(size=(16, 16, 16), crop="lungs", margin=0.), lungs)
    m = explain(Corner(), q, s, "covid")
    assert m.values.max() > 0 and not m.values[:4].any() and not m.values[20:].any() and not m.values[:, :8].any()


def test_explain_for_every_method_and_a_dull_network():
    s = make_scan(); q = prepare(s, Prep(size=(8, 32, 32))); m = net().float().train()
    for method in METHODS:
        out = explain(m, q, s, "cap", method)
        assert out.method == method and out.label == "cap" and out.layer == "stages.3"
    assert m.training
    nn.init.zeros_(m.fc.weight)
    assert not explain(m, q, s, "cap").values.any()


def test_explain_refuses():
    s = make_scan(); q = prepare(s, Prep(size=(16, 16, 16)))
    good = dict(model=Corner(), prepared=q, scan=s, label="covid")
    for bad, error, text in ((dict(label="flu"), DataError, "flu"), (dict(method="magic"), DataError, "magic"), (dict(label=7), DataError, "no class"),
                             (dict(label=-1), DataError, "no class"), (dict(scan=s.replace(spacing=(1., 1., 1.))), GeometryError, "voxels apart"),
                             (dict(scan=s.replace(voxels=s.voxels[1:])), GeometryError, "shapes differ")):
        with pytest.raises(error, match=text): explain(**good | bad)


def test_explain_needs_no_data_module():
    "Anything with voxels, scan_grid and back will do"
    s = make_scan()
    duck = SimpleNamespace(voxels=np.random.rand(16, 16, 16).astype("f4"), scan_grid=s.grid, back=lambda v: np.full(s.shape, v.max()))
    assert explain(Corner(), duck, s, "covid").values.max() == 1


def test_baselines():
    s = make_scan(); lungs = s.voxels > -600; b = baselines(s, lungs)
    assert set(b) == {"centre", "lungs"} and all(m.grid == s.grid for m in b.values()) and np.array_equal(b["lungs"].values > 0, lungs)
