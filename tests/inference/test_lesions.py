"""Shipped lesion network: weights and card, the way from a scan to a picture and back, training"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from covid_ct.cohort.adapters import open_cohort
from covid_ct.inference.lesion_training import (
    LesionSlices,
    lesion_counts,
    lesion_labels_of,
    random_views,
    slice_blocks,
    write_lesion_weights,
)
from covid_ct.inference.lesions import (
    WEIGHTS,
    LesionError,
    LesionNet,
    cut_square,
    dense_lung,
    lesion_mask,
    lesion_pictures,
    lung_aspect,
    lung_square,
    paste_square,
    rank_greys,
    shipped_lesion_model,
)
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import GeometryError, Scan
from covid_ct.train.tasks import dice_statistic

REPORTS = Path(__file__).parents[2] / "nbs" / "reports"


@pytest.fixture(scope="module")
def phantom():
    return make_phantom("covid", 1, (16, 96, 96))


@pytest.fixture(scope="module")
def result(phantom):
    return lesion_mask(phantom.scan, phantom.lungs, progress=False)


# weights and card


def test_shipped_weights_are_small_halves_and_those_of_the_card():
    model, card = shipped_lesion_model()
    file = WEIGHTS / "lesions.safetensors"
    tensors = load_file(file)
    assert file.stat().st_size <= 8e6 and sum(p.numel() for p in model.parameters()) <= 4e6
    assert {t.dtype for t in tensors.values()} <= {torch.float16, torch.int64}
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["sha256"]
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert "not for clinical use" in json.dumps(card)


@pytest.mark.parametrize(
    "fault, says",
    [
        ("weights away", "is not there"),
        ("card away", "is not there"),
        ("card cut", "is no JSON"),
        ("byte changed", "its card says"),
        ("other network", "does not fit the network"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, fault, says):
    write_lesion_weights(LesionNet((8, 8)), dict(model=dict(widths=[8, 8])), tmp_path)
    weights, card = tmp_path / "lesions.safetensors", tmp_path / "lesions.json"
    shipped_lesion_model.__wrapped__(str(tmp_path))  # sound as it is
    if fault == "weights away":
        weights.unlink()
    elif fault == "card away":
        card.unlink()
    elif fault == "card cut":
        card.write_text(card.read_text()[:40])
    elif fault == "byte changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        told = json.loads(card.read_text()) | dict(model=dict(widths=[8, 16]))
        card.write_text(json.dumps(told))
    with pytest.raises(LesionError, match=says):
        shipped_lesion_model.__wrapped__(tmp_path)


def test_weights_survive_the_file(tmp_path):
    torch.manual_seed(0)
    net = LesionNet((8, 8), members=2).eval()
    kwargs = dict(widths=[8, 8], members=2)
    write_lesion_weights(net, dict(model=kwargs), tmp_path)
    back, card = shipped_lesion_model.__wrapped__(tmp_path)
    x = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert (net(x).softmax(1) - back(x).softmax(1)).abs().max() < 0.01
    assert card["bytes"] == (tmp_path / "lesions.safetensors").stat().st_size


def test_card_says_what_the_folds_say():
    folds = pd.read_csv(REPORTS / "real_lesions_folds.csv")
    _, card = shipped_lesion_model()
    for key, name in dict(any="any lesion", ggo="ground glass", effusion="effusion").items():
        for pooled, reading in ((False, "per image"), (True, "pooled")):
            value = dice_statistic(key, pooled)(folds, np.ones((1, len(folds))))[0]
            assert f"{name}, {reading}: {value:.2f} (" in card["about"]["held-out slices"]
    assert len(folds) == 60 and list(card["about"])[:2] == ["use", "other scanners"]


# from a scan to pictures and back


def test_ranks_do_not_change_with_the_grey_scale():
    x = torch.rand(2, 1, 16, 16) * (torch.rand(2, 1, 16, 16) < 0.6)
    other = torch.where(x > 0, 0.1 + 0.8 * x**0.5, x)
    assert torch.allclose(rank_greys(x), rank_greys(other), atol=0.02)
    known = torch.tensor([0.0, 0.5, 0.2, 0.5]).view(1, 1, 2, 2)
    assert torch.allclose(rank_greys(known).flatten(), torch.tensor([0, 1 / 3, 0, 1 / 3]))


def test_square_by_hand():
    inside = np.zeros((20, 40), bool)
    inside[5:11, 10:31] = True
    assert lung_square(inside, 1.0, 0.0) == (8 - 11.5, 20.5 - 11.5, 23.0, 23.0)
    row, _, height, width = lung_square(inside, 2.0, 0.0)
    assert (height, width) == (11.5, 23.0) and row == 8 - 11.5 / 2
    assert lung_aspect(inside[None]) == 21 / 6


@pytest.mark.parametrize("stretch", [1.0, 1.4])
def test_a_mask_comes_back_where_it_was(stretch):
    rows, cols = np.mgrid[:80, :100]
    disc = np.hypot((rows - 30) / 20, (cols - 60) / 28) < 1
    square = lung_square(disc, stretch)
    x = torch.from_numpy(disc)[None].float()
    back = paste_square(cut_square(x, square, 128), square, disc.shape)[0].numpy() > 0.5
    assert 2 * (back & disc).sum() / (back.sum() + disc.sum()) > 0.99


def test_pictures_are_black_outside_the_lungs_and_lungs_fill_them(phantom):
    card = dict(size=96, window=(-1200, 300), aspect=1.0)
    x, at, _ = lesion_pictures(phantom.scan, phantom.lungs, card)
    assert set(at) == set(np.flatnonzero(phantom.lungs.any((1, 2)))) and x.max() <= 1
    seen = (x[:, 0] > 1 / 255).numpy()
    assert abs(lung_aspect(seen) - 1) < 0.1
    assert 0.5 < seen[len(seen) // 2].any(0).mean() <= 1


def test_dense_lung_asks_the_neighbourhood():
    v = np.full((5, 21, 21), -850, "i2")
    v[2, 10, 10] = 0  # one voxel, a vessel
    v[:, 3:9, 3:9] = -300  # ground glass
    lungs = np.ones(v.shape, bool)
    found = dense_lung(Scan(v, (1.0, 1.0, 1.0)), lungs, mm=1.0)
    assert found[2, 5, 5] and not found[2, 10, 14] and not found[2, 15, 15]
    assert not dense_lung(Scan(v, (1.0, 1.0, 1.0)), lungs, mm=3.0)[2, 10, 10]
    assert not dense_lung(Scan(v, (1.0, 1.0, 1.0)), np.zeros(v.shape, bool)).any()


def test_dense_lung_in_parts_is_that_of_the_whole():
    v = np.random.default_rng(0).normal(-700, 200, (70, 8, 8)).astype("i2")
    scan, lungs = Scan(v, (1.0, 1.0, 1.0)), np.ones(v.shape, bool)
    whole = dense_lung(scan, lungs)
    for z in (31, 32, 40, 64):
        part = slice(z - 10, min(z + 10, 70))
        alone = dense_lung(scan.replace(voxels=v[part]), lungs[part])
        assert (alone[9:11] == whole[part][9:11]).all()


# a scan


def test_lesions_of_a_phantom_lie_in_its_lungs_and_on_its_lesions(phantom, result):
    labels = result.labels
    assert labels.shape == phantom.scan.shape and labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, 2, 3} and not labels[~phantom.lungs].any()
    found = labels > 0
    truth = phantom.infection & phantom.lungs
    sensitivity, false = found[truth].mean(), found[phantom.lungs & ~truth].mean()
    assert sensitivity > 3 * false and sensitivity > 0.3
    threshold = result.card["threshold"]
    assert not labels[result.prob.astype("f4") < threshold - 0.01].any()


def test_mirror_image_gives_mirrored_lesions(phantom, result):
    flipped = phantom.scan.replace(voxels=phantom.scan.voxels[:, :, ::-1].copy())
    other = lesion_mask(flipped, phantom.lungs[:, :, ::-1].copy(), progress=False)
    a, b = result.labels > 0, other.labels[:, :, ::-1] > 0
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.98


def test_warnings_name_what_is_unlike_the_training(phantom):
    few = slice(4, 6)
    scan, lungs = phantom.scan.replace(voxels=phantom.scan.voxels[few]), phantom.lungs[few]
    thick = scan.replace(spacing=(12.0, *scan.spacing[1:]))
    assert any("12 mm" in w for w in lesion_mask(thick, lungs, progress=False).warnings)
    stack = scan.replace(geometry_known=False)
    assert any("geometry" in w for w in lesion_mask(stack, lungs, progress=False).warnings)
    grey = np.where(lungs, np.clip((scan.voxels + 1200) / 6, 1, 255), 0).astype("u1")
    said = lesion_mask(Scan(grey, scan.spacing, units="uint8"), progress=False).warnings
    assert any("not HU" in w for w in said) and any("No lung mask" in w for w in said)


def test_no_lung_is_said_and_nothing_outlined(phantom):
    water = np.full((16, 32, 32), -1000, "i2")
    water[:, 8:24, 8:24] = 0
    r = lesion_mask(Scan(water, (5.0, 5.0, 5.0)), progress=False)
    assert not r.labels.any() and any("No lung was found" in w for w in r.warnings)
    r = lesion_mask(phantom.scan, np.zeros(phantom.scan.shape, bool), progress=False)
    assert not r.labels.any() and any("empty" in w for w in r.warnings)
    with pytest.raises(GeometryError, match="Give a mask on the grid"):
        lesion_mask(phantom.scan, phantom.lungs[1:], progress=False)


# training


def test_blocks_and_counts_by_hand():
    assert slice_blocks(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    prob = np.zeros((1, 4, 1, 3))
    prob[0, :, 0] = np.transpose([[0.66, 0.34, 0, 0], [0.4, 0.3, 0.2, 0.1], [0.3, 0.1, 0.2, 0.4]])
    labels = lesion_labels_of(prob)
    assert labels.tolist() == [[[0, 1, 3]]]
    t = lesion_counts(np.array([[[1, 1, 0]]]), labels, ["a"]).iloc[0]
    assert (t.true_any, t.found_any, t.both_any) == (2, 2, 1) and t.both_ggo == 1


def test_views_move_image_and_mask_alike_and_keep_black():
    rows, cols = np.mgrid[:64, :64]
    lung = torch.from_numpy(np.hypot(rows - 32, cols - 32) < 24)
    mask = (lung & torch.from_numpy(cols > 36)).long()
    image = (lung * (0.3 + 0.5 * mask)).float()
    n = 16
    x, m = random_views(image.expand(n, 1, 64, 64), mask.expand(n, 64, 64), torch.Generator())
    for i in range(n):
        inside = (x[i, 0] > 1 / 255).numpy()
        assert inside[(m[i] > 0).numpy()].mean() > 0.98 or not m[i].any()
        bright, dark = x[i, 0][m[i] > 0], x[i, 0][torch.from_numpy(inside) & (m[i] == 0)]
        assert bright.mean() > dark.mean()
    again, _ = random_views(image.expand(n, 1, 64, 64), mask.expand(n, 64, 64), torch.Generator())
    assert torch.equal(again, x)


@pytest.mark.data
def test_shipped_network_fits_slices_it_was_trained_on(data_dir):
    cohort = open_cohort(data_dir / "medseg100").sort_values("scan_id").iloc[:4]
    data = LesionSlices(cohort)
    grey = (data.whole_image[:, 0] * 255).round().numpy().astype("u1")
    stack = Scan(grey, (1.0, 1.0, 1.0), units="uint8", geometry_known=False)
    found = lesion_mask(stack, progress=False).labels > 0
    alone = lesion_mask(stack.replace(voxels=grey[:1]), progress=False).labels > 0
    assert (alone[0] == found[0]).mean() > 0.999  # a picture does not depend on the others
    truth = data.whole_mask.numpy() > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.75
