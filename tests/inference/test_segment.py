"""Segmentation slice by slice: what is no volume, the way to slices and back, millilitres, and the
whole way from a scan to a table."""

import numpy as np
import pytest
import torch
from torch import nn

from covid_ct.batches.slices import read_pair
from covid_ct.cohort.adapters import open_cohort
from covid_ct.inference.lesions import shipped_lesion_model
from covid_ct.inference.segment import (
    _neighbour_dissimilarity,
    _require_volume,
    burden,
    class_volumes_ml,
    segment,
    segment_slices,
)
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import GeometryError, NotAChestError, Scan, UnitsError


def test_a_stack_is_no_volume():
    p = make_phantom("covid", 1, (20, 32, 32))
    mixed = np.random.default_rng(0).permutation(
        np.stack([make_phantom("cap", s, (16, 32, 32)).scan.voxels[8] for s in range(12)])
    )
    assert _neighbour_dissimilarity(p.scan.voxels) < 0.5 < 0.9 < _neighbour_dissimilarity(mixed)
    assert _require_volume(p.scan) is p.scan
    stack = Scan(mixed, (1.0, 1.0, 1.0), scan_id="tr_im")
    with pytest.raises(GeometryError, match="tr_im"):
        _require_volume(stack)
    with pytest.raises(GeometryError):
        segment_slices(nn.Conv2d(1, 4, 1), stack, 32)


@pytest.mark.data
def test_the_real_stack_is_no_volume(data_dir):
    rows = open_cohort(data_dir / "medseg100")
    pairs = [read_pair(r, rows.attrs["root"]) for r in rows.to_dict("records")]
    assert len(pairs) == 60 and _neighbour_dissimilarity(np.stack([v for v, _ in pairs])) > 0.9
    assert {int(k) for _, m in pairs for k in np.unique(m)} == {0, 1, 2, 3}


class Bright(nn.Module):
    "Class 3 where the window shows more than a half"

    def forward(self, x):
        return torch.cat(
            [
                torch.zeros_like(x),
                torch.full_like(x, -1e3),
                torch.full_like(x, -1e3),
                100 * (x - 0.5),
            ],
            1,
        )


def test_scan_and_back():
    p = make_phantom("cap", 2, (18, 40, 44))
    model = nn.Sequential(Bright(), nn.BatchNorm2d(4)).train()
    model[1].eval()
    got = segment_slices(model, p.scan, 88)
    direct = (p.scan.voxels + 1350) / 1500 > 0.5
    assert got.shape == p.scan.shape and got.dtype == np.uint8 and set(np.unique(got)) <= {0, 3}
    assert 2 * ((got == 3) & direct).sum() / ((got == 3).sum() + direct.sum()) > 0.97
    assert model.training and not model[1].training  # modes as they were
    ml = class_volumes_ml(got, p.scan)
    assert (
        abs(ml["effusion"] - (got == 3).sum() * np.prod(p.scan.spacing) / 1000) < 1e-6
        and ml["ggo"] == 0
    )
    with pytest.raises(UnitsError):
        segment_slices(model, p.scan.replace(units="uint8"), 32)
    with pytest.raises(GeometryError):
        class_volumes_ml(got, p.scan.replace(geometry_known=False))


CARD = shipped_lesion_model()[1] | dict(
    size=96, window=(-1350.0, 150.0), threshold=0.5, version="toy", sha256="cd" * 32
)


class Marked(nn.Module):
    "Consolidation above 0.8 of the window, ground glass above 0.6"

    def forward(self, x):
        zero = torch.zeros_like(x)
        glass, solid = 60 * (x - 0.6), 120 * (x - 0.8) + 12
        return torch.cat([zero, glass, solid, zero - 1e3], 1)


@pytest.fixture(scope="module")
def ill():
    return make_phantom("covid", 5, (48, 80, 80))


@pytest.fixture(scope="module")
def table(ill):
    return burden(ill.scan, model=(Marked(), CARD), progress=False)


def test_a_scan_alone_gives_lesions_in_its_lungs(ill):
    found = segment(ill.scan.replace(remarks=("seen",)), model=(Marked(), CARD), progress=False)
    assert found.labels.shape == ill.scan.shape and found.labels.dtype == np.uint8
    assert set(np.unique(found.labels)) == {0, 1, 2} and not found.labels[~found.lungs].any()
    assert found.card is CARD and found.warnings[0] == "seen"
    assert len(found.warnings) == len(set(found.warnings))
    mine = segment(ill.scan, ill.lungs, (Marked(), CARD), progress=False)
    assert (mine.lungs == ill.lungs).all()


def test_burden_of_a_scan_alone(ill, table):
    found = table.attrs["found"]
    ml, lungs = ill.scan.grid.voxel_ml, found.lungs
    whole = table.loc["both lungs"]
    assert list(table.index[:3]) == ["right lung", "left lung", "both lungs"]
    assert whole.volume_ml == pytest.approx(lungs.sum() * ml)
    assert whole.involved_ml == pytest.approx((found.labels > 0).sum() * ml)
    assert whole.involved_percent == pytest.approx(100 * (found.labels > 0).sum() / lungs.sum())
    glass = (found.labels == 1).sum() / (found.labels > 0).sum()
    assert whole.ggo_percent == pytest.approx(100 * glass)
    assert table.attrs["weights"] is CARD or table.attrs["weights"] == CARD
    assert table.attrs["severity"]["score"] is None
    assert table.attrs["severity"]["grade"] == "CT-1" and whole.involved_percent < 25
    right = (ill.lobes > 2).sum() / (ill.lobes > 0).sum()
    assert table.loc["right lung"].volume_ml / whole.volume_ml == pytest.approx(right, abs=0.05)


def test_what_is_given_is_not_looked_for(ill, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("called")

    for name in ("lung_mask", "lesion_mask"):
        monkeypatch.setattr(f"covid_ct.inference.segment.{name}", never)
    table = burden(ill.scan, ill.lesions, ill.lobes, report=tmp_path / "r.html")
    severity = table.attrs["severity"]
    assert severity["score"] == table.loc["both lungs"].score and table.attrs["found"] is None
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "Pan et al. 2020" in page and "Morozov et al. 2020" in page and "iframe" in page


def test_the_report_names_the_weights(ill, tmp_path):
    burden(ill.scan, model=(Marked(), CARD), report=tmp_path / "r.html", progress=False)
    page = (tmp_path / "r.html").read_text("utf-8")
    assert (
        "weights version toy" in page and CARD["sha256"][:12] in page and "needs five lobes" in page
    )


def test_no_chest_is_said_or_refused():
    flat = np.full((16, 40, 40), -1000, "i2")
    flat[:, 10:30, 10:30] = 40
    blob = Scan(flat, (4.0, 3.0, 3.0), scan_id="block")
    found = segment(blob, model=(Marked(), CARD), progress=False)
    assert not found.labels.any() and found.warnings[0].startswith("No lung was found")
    with pytest.raises(NotAChestError, match="No lung was found") as e:
        burden(blob, model=(Marked(), CARD), progress=False)
    assert "whole chest" in e.value.remedy


@pytest.mark.parametrize(
    "change,error",
    [(dict(geometry_known=False), GeometryError), (dict(units="uint8"), UnitsError)],
)
def test_burden_needs_hu_and_millimetres(ill, change, error):
    if "units" in change:
        change["voxels"] = np.clip(ill.scan.voxels / 8 + 128, 0, 255).astype("u1")
    with pytest.raises(error):
        burden(ill.scan.replace(**change), model=(Marked(), CARD), progress=False)


def test_the_weights_of_the_package_are_the_default(ill, monkeypatch):
    asked = []

    def shipped():
        asked.append(1)
        return Marked(), CARD

    monkeypatch.setattr("covid_ct.inference.lesions.shipped_lesion_model", shipped)
    found = segment(ill.scan, ill.lungs, progress=False)
    assert asked and found.card == CARD and found.labels.any()
