"Networks: exact counts, twins, gates, bad input, export. What no page should show, or only once"

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from covid_ct.models import zoo
from covid_ct.models.attention import ChannelAttention, DepthAttention, depth_curve
from covid_ct.models.blocks import ResidualBlock, conv, count_parameters, init_weights
from covid_ct.models.darnet import BOTH_GATES, DARNET_CLASSES, DARNET_ROWS, DARNet
from covid_ct.models.resnet3d import ResNet3d, Stem, feature_size, resnet_stages, stage_table
from covid_ct.scan import DataError, GeometryError, UnitsError

COUNTS = {
    "darnet-none": 33_148_995,
    "darnet-ca": 33_238_075,
    "darnet-da": 35_148_083,
    "darnet": 35_237_163,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(row="darnet", **kw):
    return zoo.build(row, **dict(depth=8, width=4) | kw)


# ---- exact numbers
@pytest.mark.parametrize("row", COUNTS)
def test_counts(row):
    d = zoo.describe(row)
    assert d["trainable_parameters"] == COUNTS[row]
    assert d["parameters_with_running_statistics"] == COUNTS[row] + 2 * 4800
    assert (
        d["convolutions"] == 20
        and d["feature_size"] == (512, 8, 14, 14)
        and d["input_size"] == (1, 64, 224, 224)
    )
    assert set(d) == {
        "name",
        "paper",
        "system",
        "input_size",
        "classes",
        "trainable_parameters",
        "parameters_with_running_statistics",
        "feature_size",
        "convolutions",
    }


def test_rows_and_table():
    assert set(DARNET_ROWS) == set(COUNTS) <= set(zoo.ROWS)
    assert [r["name"] for r in zoo.describe_all()] == list(zoo.ROWS)
    with pytest.raises(DataError, match="darnet-ca"):
        zoo.build("nothing")
    with pytest.raises(DataError, match="nothing"):
        zoo.describe("nothing")


def test_describing_allocates_nothing():
    made = []
    keep, zoo.ROWS["darnet"] = (
        zoo.ROWS["darnet"],
        replace(zoo.ROWS["darnet"], build=lambda **kw: made.append(keep.build(**kw)) or made[-1]),
    )
    try:
        zoo.describe("darnet")
    finally:
        zoo.ROWS["darnet"] = keep
    assert made and all(p.is_meta for p in made[0].parameters())


def test_stages():
    with torch.device("meta"):
        model = DARNet()
    rows = stage_table(model)
    assert [r["shape"] for r in rows] == [
        (64, 64, 112, 112),
        (64, 64, 112, 112),
        (128, 32, 56, 56),
        (256, 16, 28, 28),
        (512, 8, 14, 14),
        (3,),
    ]
    assert [r["module"] for r in rows] == [
        "stem",
        "stages.0",
        "stages.1",
        "stages.2",
        "stages.3",
        "fc",
    ]
    assert sum(r["parameters"] for r in rows) == COUNTS["darnet"]
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_anatomy_of_the_network():
    with torch.device("meta"):
        model = DARNet()
    stem = model.stem.conv.conv
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == (
        (3, 7, 7),
        (1, 2, 2),
        (1, 3, 3),
        None,
    )
    assert not any(isinstance(m, (nn.MaxPool3d, nn.AvgPool3d)) for m in model.modules())
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    assert [len(s) for s in model.stages] == [2, 2, 2, 2]
    first = [s[0] for s in model.stages]
    assert isinstance(first[0].shortcut, nn.Identity) and all(
        b.shortcut.conv.kernel_size == (1, 1, 1) for b in first[1:]
    )
    assert all(isinstance(s[1].shortcut, nn.Identity) for s in model.stages)
    for s, c, d in zip(model.stages, (64, 128, 256, 512), (64, 32, 16, 8), strict=False):
        for b in s:
            assert list(b.gates) == ["depth", "channel"]
            assert b.gates["depth"].gate.fc1.weight.shape == (d, 4096) and b.gates[
                "depth"
            ].gate.fc2.weight.shape == (4096, d)
            assert b.gates["channel"].gate.fc1.weight.shape == (c // 16, c)


# ---- parts
def test_conv_stays_in_place():
    m = nn.Sequential(
        *[conv(1, 1, k, s) for k, s in (((3, 7, 7), (1, 2, 2)), (3, 2), (3, 2))]
    ).double()
    for c in m:
        nn.init.ones_(c.weight)
    x = torch.rand(1, 1, 40, 96, 96).double().requires_grad_()
    (g,) = torch.autograd.grad(m(x)[0, 0, 5, 6, 6], x)
    for axis, stride, i in ((0, 4, 5), (1, 8, 6), (2, 8, 6)):
        weight = g[0, 0].sum([a for a in range(3) if a != axis])
        at = torch.arange(len(weight)).double()
        assert float((weight * at).sum() / weight.sum()) == pytest.approx(stride * i, abs=1e-9)


def test_silenced_block_is_the_identity():
    deep = nn.Sequential(*[ResidualBlock(2, 2) for _ in range(30)])
    for b in deep:
        nn.init.zeros_(b.norm2.weight)
    x = torch.rand(1, 2, 3, 4, 4, requires_grad=True)
    y = deep(x)
    y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones_like(x))


def test_init():
    m = init_weights(ResNet3d(resnet_stages(16), gates=BOTH_GATES, depth=16))
    for k in m.modules():
        if isinstance(k, nn.Conv3d) and k.weight.numel() > 5000:
            assert (
                k.weight.std().item() == pytest.approx((2 / k.weight[0].numel()) ** 0.5, rel=0.06)
                and k.bias is None
            )
        if isinstance(k, nn.Linear):
            assert not k.bias.any()
            if k.weight.numel() > 2000:
                assert k.weight.std().item() == pytest.approx(0.01, rel=0.1)
        if isinstance(k, nn.BatchNorm3d):
            assert (k.weight == 1).all() and not k.bias.any()


@pytest.mark.parametrize("gate", [ChannelAttention(64), DepthAttention(64, 8)])
def test_fresh_gate_halves(gate):
    x = torch.randn(2, 64, 8, 4, 4)
    torch.testing.assert_close(gate(x), x / 2, rtol=0.01, atol=1e-4)
    for p in gate.parameters():
        nn.init.zeros_(p)
    assert torch.equal(gate(x), x / 2)


def test_gates_equal_their_equations():
    x = torch.randn(2, 4, 3, 2, 5).double()
    for m, keep in ((ChannelAttention(4).double(), ""), (DepthAttention(4, 3).double(), "d")):
        for p in m.parameters():
            nn.init.normal_(p)
        g, out = m.gate, torch.empty_like(x)
        for b in range(2):
            z = (
                torch.stack([x[b, i].mean() for i in range(4)])
                if not keep
                else torch.stack([x[b, i, j].mean() for i in range(4) for j in range(3)])
            )
            w = torch.sigmoid(g.fc2.weight @ torch.relu(g.fc1.weight @ z + g.fc1.bias) + g.fc2.bias)
            for i in range(4):
                for j in range(3):
                    out[b, i, j] = (w[i * 3 + j] if keep else w[i]) * x[b, i, j]
        torch.testing.assert_close(m(x), out)
        assert torch.autograd.gradcheck(m, x[:1].clone().requires_grad_())


def test_depth_gate_refuses_another_depth():
    with pytest.raises(GeometryError, match=r"8.*have 7"):
        DepthAttention(4, 8)(torch.rand(1, 4, 7, 3, 3))


def test_depth_curve():
    g = torch.rand(2, 5, 7)
    torch.testing.assert_close(
        depth_curve(g), torch.stack([sum(g[:, c, d] for c in range(5)) / 5 for d in range(7)], 1)
    )


# ---- the network
@pytest.mark.parametrize("row", COUNTS)
def test_every_row_learns(row):
    "Patients that differ: the few hidden units of a gate can all be shut for inputs that are alike"
    model, x = (
        tiny(row, depth=16),
        F.interpolate(torch.randn(6, 1, 4, 4, 4), (16, 32, 32), mode="trilinear"),
    )
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()
    missed = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not missed


@pytest.mark.parametrize(
    "row,depth,channel",
    [("darnet", 8, 8), ("darnet-ca", 0, 8), ("darnet-da", 8, 0), ("darnet-none", 0, 0)],
)
def test_outputs(row, depth, channel):
    model, x = tiny(row).eval(), torch.rand(2, 1, 8, 32, 48)
    o = model.outputs(x)
    assert set(o) == {"logits", "features", "depth_gates", "channel_gates"}
    assert torch.equal(o["logits"], model(x)) and torch.equal(o["features"], model.features(x))
    assert len(o["depth_gates"]) == depth and len(o["channel_gates"]) == channel
    if depth:
        assert [tuple(g.shape) for g in o["depth_gates"]] == [
            (2, c, d) for c, d in ((4, 8), (8, 4), (16, 2), (32, 1)) for _ in "ab"
        ]
    if channel:
        assert [tuple(g.shape) for g in o["channel_gates"]] == [
            (2, c) for c in (4, 8, 16, 32) for _ in "ab"
        ]
    torch.testing.assert_close(o["logits"], model.fc(o["features"].mean((2, 3, 4))))
    assert feature_size(model, x.shape[2:]) == tuple(o["features"].shape[1:])


def test_gates_are_named_modules():
    model, kept = tiny().eval(), []
    gate = dict(model.named_modules())["stages.1.0.gates.depth.gate"]
    with gate.register_forward_hook(lambda m, i, o: kept.append(o)):
        o = model.outputs(torch.rand(1, 1, 8, 32, 32))
    assert torch.equal(kept[0], o["depth_gates"][2])


def test_gates_weigh_the_correction_only():
    "Gates shut: what remains of a block is its shortcut"
    model = tiny().eval()
    for b in (b for s in model.stages for b in s):
        nn.init.zeros_(b.gates["channel"].gate.fc2.weight)
        nn.init.constant_(b.gates["channel"].gate.fc2.bias, -1e4)
    x = torch.rand(1, 1, 8, 32, 32)
    f = model.stem(x)
    for s in model.stages:
        for b in s:
            f = torch.relu(b.shortcut(f))
    torch.testing.assert_close(model.features(x), f)


def test_patients_do_not_mix():
    model, x = tiny().eval(), torch.rand(2, 1, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
        torch.testing.assert_close(model(x.flip(0)).flip(0), model(x))


def test_seed_makes_the_weights():
    a, b, c = (torch.manual_seed(s) and tiny().state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(
    "shape", [(1, 1, 7, 32, 32), (1, 8, 32, 32), (1, 3, 8, 32, 32), (8, 32, 32), (1, 1, 32, 32)]
)
def test_wrong_shapes(shape):
    with pytest.raises(GeometryError) as e:
        tiny()(torch.rand(shape))
    assert isinstance(e.value, ValueError) and "DARNet" in str(e.value)


def test_wrong_depth_names_both():
    model = DARNet(width=4)
    with pytest.raises(ValueError, match=r"built for depth 64.*has 32.*depth=32"):
        model(torch.rand(1, 1, 32, 16, 16))
    DARNet(width=4, depth=32)(torch.rand(2, 1, 32, 16, 16))
    for f in (model.features, model.outputs):
        with pytest.raises(GeometryError):
            f(torch.rand(1, 1, 32, 16, 16))


def test_integers_are_refused():
    with pytest.raises(UnitsError, match="uint8"):
        tiny()(torch.zeros(1, 1, 8, 32, 32, dtype=torch.uint8))


def test_only_the_depth_gate_fixes_the_depth():
    for row in ("darnet-ca", "darnet-none"):
        assert tiny(row).eval()(torch.rand(1, 1, 11, 32, 32)).shape == (1, 3)
    for depth in (5, 20, 33):
        assert tiny(depth=depth).eval()(torch.rand(1, 1, depth, 16, 16)).shape == (1, 3)


def test_parts():
    def group(c):
        return nn.GroupNorm(4, c)

    m = ResNet3d(
        resnet_stages(8, (1, 1), (1, 2)),
        norm=group,
        stem=lambda i, o, n: Stem(i, o, n, 5, (2, 2, 2)),
        classes=2,
    )
    assert m.stride == (4, 4, 4) and not any(isinstance(k, nn.BatchNorm3d) for k in m.modules())
    assert m(torch.rand(1, 1, 16, 16, 16)).shape == (1, 2)


def test_counting():
    m = nn.Sequential(conv(2, 3), nn.BatchNorm3d(3))
    assert (
        count_parameters(m) == 2 * 3 * 27 + 6
        and count_parameters(m, running=True) == 2 * 3 * 27 + 12
    )
    m[0].weight.requires_grad_(False)
    assert count_parameters(m) == 6


def test_export():
    model, x = tiny().eval(), torch.rand(2, 1, 8, 16, 16)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_state_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    a, x = tiny().eval(), torch.rand(1, 1, 8, 16, 16)
    save_file(a.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(9)
    b = tiny().eval()
    b.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(a(x), b(x))


def test_overfits():
    x, y = torch.rand(3, 1, 8, 32, 32), torch.arange(3)
    model = tiny(width=8)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.1


def test_classes_are_fixed():
    assert DARNET_CLASSES == ("healthy", "cap", "covid")


@pytest.mark.slow
def test_full_size_forward():
    "The real thing once: 35 million parameters, 64 x 224 x 224"
    torch.set_num_threads(os.cpu_count())
    model, x = DARNet().eval(), torch.rand(1, 1, 64, 224, 224)
    with torch.no_grad():
        o = model.outputs(x)
    assert (
        o["logits"].shape == (1, 3)
        and torch.isfinite(o["logits"]).all()
        and o["features"].shape == (1, 512, 8, 14, 14)
    )
    assert [tuple(g.shape[1:]) for g in o["depth_gates"]] == [
        (c, d) for c, d in ((64, 64), (128, 32), (256, 16), (512, 8)) for _ in "ab"
    ]
    assert all((g - 0.5).abs().max() < 0.4 for g in o["depth_gates"] + o["channel_gates"])
