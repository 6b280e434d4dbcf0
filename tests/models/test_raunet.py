"""The residual attention U-Net, its slices and their traps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from covid_ct.batches.augment import SIX_VIEWS
from covid_ct.batches.slices import (
    SliceDataset,
    _body_box,
    augmented_six,
    fit_slice,
    read_pair,
)
from covid_ct.cohort.adapters import open_cohort
from covid_ct.io.labels import SLICE_CLASSES, lesion_classes, lesion_labels
from covid_ct.models.blocks import count_parameters
from covid_ct.models.raunet import RAUNET_ROWS, RAUNet, ResNeXtBlock
from covid_ct.models.unet import UNet
from covid_ct.phantom.layouts import write_layout
from covid_ct.phantom.slices import phantom_slices
from covid_ct.scan import (
    CohortError,
    DataError,
    GeometryError,
    ReadError,
    UnitsError,
    VoxelError,
)
from covid_ct.train.losses import SegmentationLoss

SMALL = dict(widths=(8, 16, 32), cardinality=4, chunk=16)


# ---- blocks and network


def test_grouped_convolution_is_a_sum_of_branches():
    "Values and every gradient, with copied weights, in evaluation and in training"
    torch.manual_seed(0)
    block, C = ResNeXtBlock(2, 5, 12, 3).double(), 3
    n = 6 // C
    for bn in (block.squeeze[1], block.look[1], block.spread[1], block.shortcut[1]):
        for p in (bn.weight, bn.bias):
            nn.init.normal_(p, 1, 0.3)

    def norm(bn, y, s=slice(None)):
        return F.batch_norm(y, None, None, bn.weight[s], bn.bias[s], True)

    def branches(x):
        out = 0
        for j in range(C):
            s = slice(j * n, (j + 1) * n)
            y = norm(block.squeeze[1], F.conv2d(x, block.squeeze[0].weight[s]), s).relu()
            y = norm(block.look[1], F.conv2d(y, block.look[0].weight[s], padding=1), s).relu()
            out = out + F.conv2d(y, block.spread[0].weight[:, s])
        return (
            norm(block.spread[1], out)
            + norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight))
        ).relu()

    x = torch.randn(4, 5, 6, 7).double().requires_grad_()
    r = torch.randn(4, 12, 6, 7).double()
    wrt = [x, *block.parameters()]
    a, b = (torch.autograd.grad((f(x) * r).sum(), wrt) for f in (block, branches))
    assert (block(x) - branches(x)).abs().max() < 1e-10
    for g, h in zip(a, b, strict=False):
        assert (g - h).abs().max() < 1e-9 and g.abs().sum() > 0


def test_cardinality_must_divide():
    with pytest.raises(DataError, match="divisor"):
        RAUNet(widths=(8, 16), cardinality=3)


def test_counts():
    with torch.device("meta"):
        assert {k: count_parameters(b()) for k, b in RAUNET_ROWS.items()} == {
            'raunet': 20_316_292,
            'raunet-a': 16_138_372,
            'raunet-r': 35_214_596,
            'raunet-unet': 31_036_676,
        }


@pytest.mark.parametrize("row", RAUNET_ROWS)
@pytest.mark.parametrize("size", [(16, 16), (29, 23), (37, 5)])
def test_rows_any_size_every_gradient(row, size):
    torch.manual_seed(0)
    net = RAUNET_ROWS[row](**SMALL)
    out = net.outputs(torch.rand(2, 1, *size))
    assert out["logits"].shape == (2, 4, *size) and len(out["buckets"]) == (
        2 if row in ("raunet", "raunet-r") else 0
    )
    out["logits"].square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    net.eval()
    x = torch.rand(1, 1, *size)
    assert torch.equal(net(x), net.outputs(x)["logits"])


def test_without_both_it_is_the_unet():
    ours, plain = RAUNET_ROWS["raunet-unet"](**SMALL).eval(), UNet(2, 1, 4, SMALL["widths"]).eval()
    plain.load_state_dict({k.replace(".convs.", "."): v for k, v in ours.state_dict().items()})
    x = torch.rand(1, 1, 21, 30)
    assert torch.equal(ours(x), plain(x))


def test_silenced_attention_is_no_attention():
    torch.manual_seed(0)
    m, without = RAUNet(**SMALL).eval(), RAUNET_ROWS["raunet-a"](**SMALL).eval()
    without.load_state_dict({k: v for k, v in m.state_dict().items() if ".attend." not in k})
    for d in m.decode:
        nn.init.normal_(d.attend.out.weight)
    x = torch.rand(1, 1, 20, 20)
    assert (m(x) - without(x)).abs().max() > 1e-4
    for d in m.decode:
        nn.init.zeros_(d.attend.out.weight)
    assert torch.equal(m(x), without(x))


def overfit(x, y, steps, lr=1e-2, widths=(12, 24, 48)):
    torch.manual_seed(0)
    net = RAUNet(widths=widths, cardinality=3, heads=1, chunk=32, rounds=1)
    opt = torch.optim.Adam(net.parameters(), lr)
    loss_of = SegmentationLoss(
        (1.0, 5.0, 5.0, 5.0), dice=1.0
    )  # lesions are small: alike, some seeds need more steps
    for step in range(steps):
        if step == int(0.7 * steps):
            opt.param_groups[0]["lr"] = lr / 5
        loss, _ = loss_of(dict(logits=net(x)), dict(mask=y))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        p = net.eval()(x).argmax(1)
    return {
        c: float(2 * ((p == k) & (y == k)).sum() / ((p == k).sum() + (y == k).sum()))
        for k, c in enumerate(SLICE_CLASSES)
        if (y == k).any()
    }


def test_learns_four_phantom_slices_by_heart():
    d = SliceDataset(phantom_slices(4, 32, seed=5), 32)
    learned = overfit(d.image, d.mask, 80)
    assert len(learned) >= 3 and min(learned.values()) > 0.95, learned


@pytest.mark.slow
@pytest.mark.data
def test_learns_four_real_slices_by_heart(data_dir):
    every = SliceDataset(open_cohort(data_dir / "medseg100"), 48)
    three = [i for i in range(len(every)) if len(every.mask[i].unique()) == 4][:2]
    some = [i for i in range(len(every)) if len(every.mask[i].unique()) == 3][:2]
    x, y = every.image[three + some], every.mask[three + some]
    learned = overfit(x, y, 200)
    assert set(learned) == set(SLICE_CLASSES) and min(learned.values()) > 0.95, learned


# ---- slices


def save(path, v):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(v).save(path)
    return path


@pytest.fixture
def pair(tmp_path):
    "A public pair on disk, on its side, and what it shows upright"
    image, m = (np.arange(1600) % 256).astype("u1").reshape(40, 40), np.zeros((40, 40), "u1")
    m[5:20, 5:15], m[8:14, 8:14], m[30:35, 10:30] = 85, 170, 255
    (
        save(tmp_path / "set/im/256/i07.png", image.T),
        save(tmp_path / "set/mask/multi/256/z07.png", m.T),
    )
    rows = open_cohort(tmp_path / "set")
    return (
        dict(
            rows.iloc[0],
            path=str(tmp_path / "set/im/256/i07.png"),
            infection_mask=str(tmp_path / "set/mask/multi/256/z07.png"),
        ),
        image,
        m,
    )


def test_pair(pair, tmp_path):
    row, image, m = pair
    v, k = read_pair(row)
    assert (
        v.dtype == np.float32
        and np.array_equal(v, image.astype("f4") / 255)
        and (k == m // 85).all()
    )  # upright again
    assert row["patient_id"] == "unknown"
    rgb = save(tmp_path / "rgb.png", np.dstack([image.T] * 3))
    assert (read_pair(row | dict(path=rgb))[0] == v).all()
    rows = open_cohort(tmp_path / "set")
    d = SliceDataset(rows, 40, crop=False)
    assert (
        torch.equal(d.image[0, 0], torch.from_numpy(v))
        and torch.equal(d.mask[0], torch.from_numpy(k).long())
        and d.slice_id == ["07"]
    )


def test_bad_pairs(pair, tmp_path):
    row, _, m = pair

    def mask(v):
        return row | dict(infection_mask=save(tmp_path / f"{np.random.randint(1 << 30)}.png", v))

    with pytest.raises(VoxelError, match="77"):
        read_pair(mask(np.where(m == 85, 77, m).astype("u1")))
    with pytest.raises(GeometryError, match="20"):
        read_pair(mask(m[::2, ::2].copy()))
    soft = np.array(
        Image.fromarray(m).resize((20, 20), Image.BILINEAR).resize((40, 40), Image.BILINEAR)
    )
    with pytest.raises(VoxelError, match="labels"):
        read_pair(mask(soft))
    with pytest.raises(UnitsError, match="grey"):
        read_pair(row | dict(path=save(tmp_path / "d.png", np.dstack([m, m, 0 * m]))))
    with pytest.raises(UnitsError, match="8-bit"):
        read_pair(row | dict(path=save(tmp_path / "e.png", m.astype("u2") * 100)))
    (tmp_path / "f.png").write_bytes(b"no picture")
    with pytest.raises(ReadError):
        read_pair(row | dict(path=tmp_path / "f.png"))
    with pytest.raises(ReadError):
        read_pair(row | dict(infection_mask=tmp_path / "gone.png"))
    save(tmp_path / "set/im/256/i08.png", m)
    with pytest.raises(CohortError, match="infection_mask"):
        SliceDataset(open_cohort(tmp_path / "set"), 16)  # a picture without a mask
    with pytest.raises(VoxelError):
        SliceDataset([dict(image=np.zeros((8, 8)), mask=np.full((8, 8), 4), slice_id="x")])
    with pytest.raises(GeometryError):
        SliceDataset([dict(image=np.zeros((8, 8)), mask=np.zeros((8, 7)), slice_id="x")])
    with pytest.raises(CohortError):
        SliceDataset([])


def test_pairs_and_stack_are_one_reader(tmp_path):
    "PNG pairs (8 bit, on their side, cut to the lungs) and a stack (HU): same slices and classes"
    from covid_ct.phantom.cohort import phantom_cohort

    asked = phantom_cohort(3, seed=4, labels=("covid",), second_scan=0)
    for layout in ("medseg100_png", "medseg100"):
        write_layout(asked, tmp_path / layout, layout, (16, 40, 40))
    png, stack = (
        SliceDataset(open_cohort(tmp_path / layout), 40, crop=False, window=(-1250, 250))
        for layout in ("medseg100_png", "medseg100")
    )
    assert len(png) == len(stack) and torch.equal(png.mask, stack.mask) and (png.mask > 0).any()
    inside = png.image > 0
    assert inside.any() and (png.image - stack.image)[inside].abs().max() < 0.0025


def test_classes():
    assert lesion_classes(np.arange(6)).tolist() == [0, 1, 2, 1, 3, 1]
    k = np.random.default_rng(0).integers(0, 4, (3, 5, 6)).astype("u1")
    assert (
        lesion_labels(k).dtype == np.uint8
        and (lesion_classes(lesion_labels(k)) == k).all()
        and set(np.unique(lesion_labels(k))) == {0, 1, 2, 4}
    )


def test_phantom_slices():
    a, b = phantom_slices(6, 32, seed=2), phantom_slices(6, 32, seed=2)
    assert all(
        (s["image"] == t["image"]).all() and (s["mask"] == t["mask"]).all()
        for s, t in zip(a, b, strict=False)
    )
    assert len({s["slice_id"] for s in a}) == 6 and len({s["patient_id"] for s in a}) == 3
    assert {int(v) for s in a for v in np.unique(s["mask"])} == {0, 1, 2, 3}
    wet = np.concatenate([s["image"][s["mask"] == 3] for s in a])
    assert -60 < np.median(wet) < 60  # fluid


def test_size():
    image, mask = np.zeros((60, 50), "f4"), np.zeros((60, 50), "u1")
    image[10:40, 10:40], mask[20:25, 20:30], image[2:4, 2:6] = 0.5, 3, 1  # body, lesion, a word
    assert _body_box(image) == (slice(10, 40), slice(10, 40))
    x, y = fit_slice(image, mask, 30)
    assert torch.equal(x, torch.full((30, 30), 0.5)) and torch.equal(
        y, torch.from_numpy(mask[10:40, 10:40]).long()
    )
    x, y = fit_slice(image, mask, 60)
    assert set(y.unique().tolist()) == {0, 3} and int((y == 3).sum()) == 4 * 50
    assert fit_slice(np.zeros((8, 6)), size=4)[0].shape == (4, 4)  # nothing to crop to
    with pytest.raises(GeometryError):
        fit_slice(image, mask[1:], 30)


def test_the_crop_cuts_no_body_and_no_label():
    image, mask = np.zeros((80, 70), "f4"), np.zeros((80, 70), "u1")
    image[20:50, 20:50], image[5, 60], image[70, 10] = (
        0.5,
        0.02,
        0.3,
    )  # body, a dark speck, a grey one: both are body
    assert _body_box(image) == (slice(5, 71), slice(10, 61))
    image[5, 60], image[2:4, 2:6] = 0, 1  # only a white word is cut
    assert _body_box(image) == (slice(20, 71), slice(10, 50))
    mask[15, 66] = 2  # a label on black
    assert _body_box(image, mask) == (slice(15, 71), slice(10, 67))
    assert (
        int((fit_slice(image, mask, 57)[1] == 2).sum()) == 1
        and fit_slice(image, mask, 57)[0].max() == 0.5
    )


@pytest.mark.data
def test_the_crop_of_the_real_slices(data_dir):
    "No lit or labelled pixel is lost, not even of slice 39: a quarter of its mask is on black"
    rows = open_cohort(data_dir / "medseg100")
    black = {}
    for r in rows.to_dict("records"):
        v, m = read_pair(r, rows.attrs["root"])
        box = _body_box(v, m)
        assert (m[box] > 0).sum() == (m > 0).sum() and (v[box] > 0.01).sum() == (v > 0.01).sum(), r[
            "scan_id"
        ]
        black[r["scan_id"]] = ((m > 0) & (v == 0)).sum() / max(1, (m > 0).sum())
    assert max(black, key=black.get) == "039" and black["039"] > 0.25


def test_two_lungs_stay_two():
    image = np.zeros((50, 50))
    image[5:20, 5:45] = 1
    image[30:45, 5:45] = 0.6
    assert _body_box(image) == (slice(5, 45), slice(5, 45))


def test_six_views():
    image, mask = torch.rand(2, 1, 12, 12), torch.randint(0, 4, (2, 12, 12))
    x, y = augmented_six(image, mask)
    assert x.shape == (12, 1, 12, 12) and y.shape == (12, 12, 12) and y.dtype == mask.dtype
    for k in range(4):
        assert torch.equal(torch.rot90(x[2 * k : 2 * k + 2], k, (-2, -1)), image) and torch.equal(
            torch.rot90(y[2 * k : 2 * k + 2], k, (-2, -1)), mask
        )
    assert (y[8:10, :3] == 0).all() and (x[8:10, 0, :, :3] == 0).all() and len(SIX_VIEWS) == 6


def test_six_views_by_hand():
    "Classes 0 and 3 side by side: an average would make 1 and 2; one pixel through both scales"
    image, mask = torch.zeros(1, 1, 9, 9), torch.zeros(1, 9, 9).long()
    image[0, 0, 3:6, 3:6], mask[0, 3:6, 3:6] = 0.5, 3
    x, y = augmented_six(image, mask)
    assert y.unique().tolist() == [0, 3] and y[4].nonzero().tolist() == [
        [4, 4]
    ]  # pixel q shows 2q: of −1 … 1 only the middle
    assert y[5].nonzero().tolist() == [
        [i, j] for i in range(2, 7) for j in range(2, 7)
    ]  # q shows q/1.5: ±2 shows ±1.33, still inside
    assert ((x[5] > 0) & (x[5] < 0.5)).any() and x[5, 0, 4, 4] == 0.5  # the image is interpolated


@pytest.mark.slow
def test_full_size_forward_and_backward():
    "The paper's network at the paper's size, one slice; half the channels, to save time"
    net = RAUNet(widths=(32, 64, 128, 256, 512))
    x = torch.rand(1, 1, 369, 369)
    loss, _ = SegmentationLoss()(dict(logits=net(x)), dict(mask=torch.randint(0, 4, (1, 369, 369))))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


# ---- trained and evaluated from a cohort of slices

TINY = dict(widths=(4, 8), cardinality=2, chunk=16, heads=1, rounds=1)


def toy_paper():
    from covid_ct.train.recipes import change, recipe

    return change(
        recipe("raunet", "paper"), "test", epochs=1, batch_size=8, slice_size=33, model_kwargs=TINY
    )


def check_run(run, rows, folder):
    "A run of slices: its size, its parts, its split, its test set"
    import pandas as pd

    from covid_ct.train.run_folder import run_split

    assert run.config["recipe"]["slice_size"] == 33 and run.config["recipe"]["name"].startswith(
        "paper (changed: "
    )
    split = run_split(folder)
    told = pd.read_csv(folder / "predictions.csv", dtype=str)
    assert set(split.scan_id) == set(rows.scan_id)
    for part, fold in (("valid", 0), ("test", -1)):
        assert set(told[told.part == part].scan_id) == set(split[split.fold == fold].scan_id)
    assert {"true_ggo", "found_ggo", "both_ggo"} <= set(told) and told.patient_id.nunique() == len(
        told
    )


@pytest.mark.parametrize("layout", ["medseg100_png", "medseg100"])
def test_the_papers_recipe_trains_on_slices(tmp_path, layout):
    "Both layouts of MedSeg; no patient is known, and the run says so; evaluated as it was trained"
    from covid_ct.phantom.cohort import phantom_cohort
    from covid_ct.scan import SplitError
    from covid_ct.train.run_folder import refuse_trained, run_split
    from covid_ct.train.study import evaluate, train

    rows = phantom_cohort(7, seed=3, labels=("covid",), second_scan=0)
    write_layout(rows, tmp_path / "set", layout, shape=(24, 64, 64))
    cohort = open_cohort(tmp_path / "set")
    masked = cohort[cohort.infection_mask.notna()]
    run = train(tmp_path / "set", toy_paper(), tmp_path / "run", progress=False, workers=0)
    check_run(run, masked, tmp_path / "run")
    said, card = run.config["warnings"], (tmp_path / "run" / "model_card.md").read_text("utf-8")
    assert "Patients are unknown" in said[-1] and all(f"**{w}**" in card for w in said)
    left = len(cohort) - len(masked)
    assert len(said) == 1 + bool(left) and (
        not left or said[0].startswith(f"{left} of {len(cohort)} slices")
    )
    split = run_split(tmp_path / "run")
    held = masked[masked.scan_id.isin(split.scan_id[split.fold == -1])]
    found = evaluate(tmp_path / "run", held)
    mine = run.predictions[run.predictions.part == "test"]
    for k in ("true_ggo", "found_ggo"):
        assert found[k].tolist() == mine[k].tolist()
    with pytest.raises(SplitError, match="both sides"):
        evaluate(tmp_path / "run", masked)
    with pytest.raises(SplitError):
        refuse_trained(tmp_path / "run", masked)


def test_folds_of_slices(tmp_path):
    "Cross-validation and phantoms in memory go the same way"
    import pandas as pd

    from covid_ct.train.study import cross_validate

    rows = pd.DataFrame(phantom_slices(20, 40, seed=2))
    rows = rows.assign(scan_id=rows.slice_id, label="covid")
    t = cross_validate(rows, toy_paper(), tmp_path / "cv", progress=False)
    assert (
        list(t.columns) == [*(f"fold_{k}" for k in range(5)), "mean", "std"]
        and ("pooled", "Dice mean") in t.index
    )
    parts = [pd.read_csv(tmp_path / "cv" / f"fold_{k}" / "split.csv") for k in range(5)]
    assert all(p.equals(parts[0]) for p in parts)


def test_volumes_and_slices_without_masks_are_no_cohort_of_slices(tmp_path):
    from covid_ct.phantom.cohort import phantom_cohort, write_phantom_cohort
    from covid_ct.train.study import train

    volumes = write_phantom_cohort(
        tmp_path / "c",
        phantom_cohort(10, seed=1, labels=("covid",), second_scan=0),
        shape=(24, 32, 32),
        jobs=1,
    )
    with pytest.raises(GeometryError, match="volume of 24 slices, one slice"):
        train(volumes, toy_paper(), tmp_path / "r", progress=False)
    with pytest.raises(CohortError, match="no slice with an infection_mask"):
        train(volumes.drop(columns="infection_mask"), toy_paper(), tmp_path / "r", progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.data
def test_the_papers_recipe_trains_on_medseg(data_dir, tmp_path):
    "The public slices, at toy size"
    from covid_ct.train.study import train

    cohort = open_cohort(data_dir / "medseg100")
    run = train(data_dir / "medseg100", toy_paper(), tmp_path / "run", progress=False)
    check_run(run, cohort, tmp_path / "run")
    assert len(run.predictions[run.predictions.part == "test"]) == 12 and np.isfinite(
        run.history.valid_dice_pooled[0]
    )
