"""Two paths of parts, any size, and a window that leaves no trace."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from covid_ct.inference.sliding_window import (
    _BLENDS,
    _blend_weights,
    _slabs,
    _sliding_bytes,
    _window_starts,
    class_probabilities,
    dry_run,
    likeliest_class,
    segment_masks,
    segmentation_target,
    sliding_window,
)
from covid_ct.io.read import read_mask, write_mask
from covid_ct.models.blocks import count_parameters
from covid_ct.models.cost import LiveMemory
from covid_ct.models.unet import (
    Bottlenecks,
    ConvDown,
    ConvUp,
    DoubleConv,
    PoolDown,
    UNet,
    layer_class,
    vb_net,
)
from covid_ct.phantom.chest import make_phantom
from covid_ct.preprocess.resample import Prep, prepare_scan
from covid_ct.scan import GeometryError, UnitsError


def dense(dims=3, cin=1, classes=2, seed=0, kernel=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        layer_class("Conv", dims, cin, 4, kernel, padding=kernel // 2),
        nn.ReLU(),
        layer_class("Conv", dims, 4, classes, kernel, padding=kernel // 2),
    ).eval()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("down", [PoolDown, ConvDown])
@pytest.mark.parametrize("up", [ConvUp])
def test_any_size(dims, down, up):
    net = UNet(dims, 2, 3, widths=(2, 3, 4), down=down, up=up).eval()
    for size in ((1, 1, 1), (5, 6, 7), (8, 8, 8), (9, 4, 13)):
        assert net(torch.zeros(1, 2, *size[:dims])).shape == (1, 3, *size[:dims])


def test_big_odd_slice():
    assert UNet(2, 1, 4, widths=(2, 2, 2, 2, 2)).eval()(torch.zeros(1, 1, 369, 369)).shape == (
        1,
        4,
        369,
        369,
    )


def test_conv_down_reads_all_of_an_odd_axis():
    down = ConvDown(2, 1, 1).eval()
    x = torch.zeros(1, 1, 5, 5, requires_grad=True)
    nn.init.ones_(down.step[0].weight)
    down(x + 1).sum().backward()
    assert (x.grad > 0).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_parameters_by_hand(dims):
    k, u = 3**dims, 2**dims
    want = (
        k * (1 * 2 + 2 * 2)
        + 8
        + k * (2 * 4 + 4 * 4)
        + 16
        + u * 4 * 2
        + 2
        + k * (4 * 2 + 2 * 2)
        + 8
        + 2 * 2
        + 2
    )
    assert count_parameters(UNet(dims, 1, 2, widths=(2, 4))) == want


def test_vb_net_channels():
    "Both halves stay together on the way up, as in V-Net"
    with torch.device("meta"):
        net = vb_net()
    assert (
        [d.cout for d in net.decode] == [256, 128, 64, 32]
        and net.head.in_channels == 32
        and net.multiple == 16
    )
    assert [len(d.rows) for d in net.decode] == [3, 3, 2, 1]
    assert Bottlenecks(3, 8, 8, 2).rows[1][1][0].weight.shape == (4, 4, 3, 3, 3)


def test_bottlenecks_are_a_sum():
    "With the last norm at zero the block is the ReLU of its shortcut"
    b = Bottlenecks(3, 6, 6, 2).eval()
    nn.init.zeros_(b.rows[-1][-1][1].weight)
    x = torch.randn(2, 6, 3, 4, 5)
    assert torch.equal(b(x), x.relu())


def test_gradients_reach_everything():
    for net in (UNet(3, 1, 2, widths=(3, 4, 5)), vb_net(widths=(4, 8, 8), repeats=(1, 2, 1))):
        net(torch.rand(2, 1, 9, 8, 7)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_outputs_are_forward():
    net = UNet(2, 1, 3, widths=(3, 4)).eval()
    x = torch.rand(2, 1, 11, 6)
    out = net.outputs(x)
    assert torch.equal(out["logits"], net(x)) and torch.equal(
        net.head(out["features"]), out["logits"]
    )


def test_shift_by_the_grid():
    "Far from the rim, the answer moves with the image, in steps of the coarsest grid"
    net = UNet(2, 1, 2, widths=(2, 3, 3)).eval()
    x = torch.zeros(1, 1, 80, 80)
    x[..., 30:50, 30:50] = torch.rand(20, 20)
    a, b = net(x), net(x.roll((4, 8), (2, 3)))
    assert torch.allclose(
        a.roll((4, 8), (2, 3))[..., 32:48, 36:52], b[..., 32:48, 36:52], atol=1e-5
    )


def test_bad_images():
    net = UNet(3, 1, 2, widths=(2, 2))
    for x, error, word in (
        (torch.zeros(1, 8, 8, 8), GeometryError, r"\(B,1,D,H,W\)"),
        (torch.zeros(1, 2, 8, 8, 8), GeometryError, "cin"),
        (torch.zeros(1, 1, 0, 8, 8), GeometryError, "this is"),
        (torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16), UnitsError, "int16"),
    ):
        with pytest.raises(error, match=word):
            net(x)
    with pytest.raises(GeometryError, match="dims=4"):
        UNet(4)
    with pytest.raises(GeometryError, match="3 widths and 2 repeats"):
        vb_net(widths=(4, 8, 8), repeats=(1, 1))


# --- windows ---


@pytest.mark.parametrize("kind", _BLENDS)
def test_weights_sum_to_one(kind):
    for n in (1, 7, 16, 31, 64):
        for window in (1, 4, 16, 31):
            for overlap in (0, 0.25, 0.5, 0.9):
                for align in (1, 4):
                    if align > window:
                        continue
                    seen = np.zeros(n)
                    for a, b, w in _blend_weights(n, window, overlap, kind, align):
                        assert (
                            0 <= a < b <= n and b - a <= window and (window >= n or a % align == 0)
                        )
                        seen[a:b] += w
                    np.testing.assert_allclose(seen, 1, atol=1e-12)


def test_windows_that_do_not_work():
    for kw, word in (
        (dict(window=0), "0 voxels"),
        (dict(window=4, overlap=1.0), "overlap 1.0"),
        (dict(window=8, overlap=0.5, margin=3), "no window"),
        (dict(window=4, kind="cosine"), "cosine"),
    ):
        with pytest.raises(GeometryError, match=word):
            _blend_weights(**{**dict(n=40), **kw})


def slow_sliding(model, x, window, overlap, kind):
    "One window after the other, weights in a volume of their own, in float64"
    total, weight = None, torch.zeros(x.shape[1:], dtype=torch.float64)
    spans = [_window_starts(n, w, overlap) for n, w in zip(x.shape[1:], window, strict=False)]

    def g(k):
        return np.asarray(_BLENDS[kind]((2 * np.arange(k) - (k - 1)) / k), float)

    for z in spans[0]:
        for y in spans[1]:
            for v in spans[2]:
                box = tuple(slice(*s) for s in (z, y, v))
                w = torch.tensor(
                    g(z[1] - z[0])[:, None, None] * g(y[1] - y[0])[:, None] * g(v[1] - v[0])
                )
                with torch.no_grad():
                    out = model(x[(None, slice(None), *box)])[0].double()
                if total is None:
                    total = torch.zeros(len(out), *x.shape[1:], dtype=torch.float64)
                total[(slice(None), *box)] += out * w
                weight[box] += w
    return total / weight


@pytest.mark.parametrize("kind", _BLENDS)
@pytest.mark.parametrize("overlap", [0, 0.5, 0.6])
def test_slow_twin(kind, overlap):
    net, x = dense(cin=2), torch.rand(2, 23, 18, 9)
    got = sliding_window(net, x, (8, 7, 12), overlap, kind)
    assert torch.allclose(got.double(), slow_sliding(net, x, (8, 7, 12), overlap, kind), atol=1e-5)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_monai(overlap):
    from monai.inferers import sliding_window_inference

    net, x = dense(), torch.rand(1, 30, 25, 21)
    with torch.no_grad():
        peer = sliding_window_inference(
            x[None], (12, 10, 8), 4, net, overlap=overlap, mode="constant"
        )[0]
    assert torch.allclose(sliding_window(net, x, (12, 10, 8), overlap, "constant"), peer, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [lambda: (dense(), 2), lambda: (UNet(3, 1, 2, widths=(3, 4)).eval(), 9)],
    ids=["two convolutions", "U-Net"],
)
def test_equals_the_whole(make):
    "With a margin of what the network sees, on the network's own grid"
    torch.manual_seed(3)
    (net, reach), x = make(), torch.rand(1, 33, 31, 26)
    with torch.no_grad():
        whole = net(x[None])[0]
    for kind in _BLENDS:
        assert (
            sliding_window(net, x, (26, 24, 24), 0.8, kind, margin=reach) - whole
        ).abs().max() < 1e-5
    assert (sliding_window(net, x, (26, 24, 24), 0.8, "constant") - whole).abs().max() > 1e-3


def test_one_window_is_the_whole():
    net, x = UNet(3, 1, 2, widths=(2, 3)).eval(), torch.rand(1, 9, 10, 11)
    with torch.no_grad():
        assert torch.allclose(sliding_window(net, x, (64, 64, 64)), net(x[None])[0], atol=1e-6)


def test_slices_too():
    net, x = dense(2), torch.rand(1, 40, 33)
    with torch.no_grad():
        whole = net(x[None])[0]
    assert torch.allclose(sliding_window(net, x, (16, 16), margin=2), whole, atol=1e-5)
    with pytest.raises(ValueError):
        sliding_window(net, x, (16, 16, 16))


def test_slabs_come_in_order_and_finish_is_applied():
    net, x = dense(classes=3), torch.rand(1, 21, 9, 8)
    parts = [(s, z.clone()) for s, z in _slabs(net, x, (6, 9, 8))]
    assert [s.start for s, _ in parts] == [0] + [s.stop for s, _ in parts][:-1] and parts[-1][
        0
    ].stop == 21
    whole = torch.cat([z for _, z in parts], 1)
    assert torch.equal(whole, sliding_window(net, x, (6, 9, 8)))
    assert torch.equal(
        sliding_window(net, x, (6, 9, 8), finish=likeliest_class), whole.argmax(0).byte()
    )
    assert torch.allclose(
        sliding_window(net, x, (6, 9, 8), finish=class_probabilities).sum(0),
        torch.ones(21, 9, 8),
        atol=1e-6,
    )


def test_mode_and_memory_map(tmp_path):
    net, x = (
        UNet(3, 1, 2, widths=(2, 3)).train(),
        np.random.default_rng(0).random((1, 12, 9, 8), "f4"),
    )
    np.save(tmp_path / "v.npy", x)
    a, b = (
        sliding_window(net, x, (8, 8, 8)),
        sliding_window(net, np.load(tmp_path / "v.npy", mmap_mode="r"), (8, 8, 8)),
    )
    assert torch.equal(a, b) and net.training and all(m.training for m in net.modules())


# --- bytes ---


def test_bytes_by_hand():
    net = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, 3, padding=1))
    out, peak = dry_run(net, (1, 1, 16, 16, 16))
    assert out.shape == (1, 4, 16, 16, 16) and peak == 4 * 16**3 * (1 + 8 + 8)


def test_dry_run_touches_nothing():
    net = UNet(3, 1, 2, widths=(2, 3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    dry_run(net, (1, 1, 8, 8, 8))
    assert net.training and all(
        torch.equal(v, before[k]) and v.device.type == "cpu" for k, v in net.state_dict().items()
    )


def test_sliding_bytes_are_those_that_lived():
    "The prediction holds the tensors that really lived, and not twice as many"
    net, x = UNet(3, 1, 3, widths=(4, 8)).eval(), torch.rand(1, 48, 40, 40)
    for finish in (lambda z: z, likeliest_class):
        need = _sliding_bytes(net, x.shape, (16, 16, 16), finish)["total"]
        with LiveMemory() as alive:
            sliding_window(net, x, (16, 16, 16), finish=finish)
        assert 0.5 * need <= alive.peak <= 1.05 * need, (alive.peak, need)


def test_limit():
    net, x = dense(), torch.rand(1, 32, 32, 32)
    need = _sliding_bytes(net, x.shape, (16, 16, 16), likeliest_class)["total"]
    sliding_window(net, x, (16, 16, 16), finish=likeliest_class, limit=need)
    with pytest.raises(GeometryError, match="limit"):
        sliding_window(net, x, (16, 16, 16), finish=likeliest_class, limit=need - 1)


# --- masks ---


class Threshold(nn.Module):
    "Lung where it is dark, infection where it is grey: a network that needs no training"

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        k = (x > 0.1).long() + (x > 0.5).long()
        return 50 * nn.functional.one_hot(k[:, 0], 3).movedim(-1, 1).float()[:, [0, 1, 2]] + self.w


def test_segment_on_the_grid_of_the_scan():
    p = make_phantom("covid", 3, (24, 32, 32), severity=0.2)
    ready = prepare_scan(p.scan, Prep(size=(24, 32, 32)))
    got = segment_masks(Threshold(), ready, (16, 16, 16))
    assert set(got) == {"lungs", "infection"} and all(
        m.shape == p.scan.shape and m.dtype == bool for m in got.values()
    )
    assert (got["lungs"] == (ready.voxels > 0.1)).mean() > 0.999 and not (
        got["infection"] & ~got["lungs"]
    ).any()


def test_target():
    p = make_phantom("covid", 3, (24, 32, 32), severity=0.2)
    ready = prepare_scan(p.scan, Prep(size=(24, 32, 32)))
    t = segmentation_target(ready, p.lungs, p.infection)
    assert (
        t.dtype == np.int64
        and ((t > 0) == p.lungs).all()
        and ((t == 2) == (p.infection & p.lungs)).all()
    )
    with pytest.raises(GeometryError, match="differ in shape"):
        segmentation_target(ready, p.lungs, p.infection[1:])
    with pytest.raises(GeometryError):
        segmentation_target(ready, p.lungs[1:], p.infection[1:])


def test_a_mask_of_another_tool_takes_the_place(tmp_path):
    "From a file the classifier's input is that from the array; another grid is refused"
    p = make_phantom("covid", 3, (24, 32, 32), severity=0.2)
    row = Prep(size=(24, 32, 32), keep="lungs")
    file = write_mask(p.lungs, p.scan, tmp_path / "lungs.nii.gz")
    got, wanted = (
        prepare_scan(p.scan, row, lungs=read_mask(file, p.scan).astype(bool)),
        prepare_scan(p.scan, row, lungs=p.lungs),
    )
    assert np.array_equal(got.voxels, wanted.voxels) and np.array_equal(
        prepare_scan(p.scan, row, lungs=lambda scan: p.lungs).voxels, wanted.voxels
    )
    with pytest.raises(GeometryError, match="apart"):
        read_mask(file, p.scan.replace(spacing=(4.0, 4.0, 4.0)))
    with pytest.raises(GeometryError):
        prepare_scan(p.scan, row, lungs=p.lungs[:, ::2])


def test_pickles():
    "Blocks made by a closure must not keep the network from being sent to a worker"
    net = vb_net(widths=(4, 8), repeats=(1, 1)).eval()
    x = torch.rand(1, 1, 6, 6, 6)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    assert isinstance(net.encode[1], Bottlenecks) and isinstance(UNet().encode[0], DoubleConv)
