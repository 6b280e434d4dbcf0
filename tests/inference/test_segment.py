"""Segmentation of a scan slice by slice: what is no volume, the way to slices and back, millilitres."""

import numpy as np
import pytest
import torch
from torch import nn

from covid_ct.batches.slices import read_pair
from covid_ct.cohort.adapters import open_cohort
from covid_ct.inference.segment import (
    _neighbour_dissimilarity,
    _require_volume,
    class_volumes_ml,
    segment_slices,
)
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import GeometryError, Scan, UnitsError


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
