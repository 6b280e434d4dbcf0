"Lobes: hull, bends, votes, fissures, conventions, bad input"

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull, Delaunay

from covid_ct.inference.lobes import (
    _REFINED,
    FISSURES,
    LOBE_PREPS,
    LobeBatches,
    LobeError,
    _coarse_lungs,
    _convex_hull,
    _fissure,
    _fissure_error,
    bend_anatomy,
    lobe_input,
    lobe_net,
    lobe_scores,
    refined_crop,
    segment_lobes,
    vote_lobes,
)
from covid_ct.io.labels import LOBES
from covid_ct.phantom.chest import PHANTOM_MASKS, make_phantom
from covid_ct.preprocess.resample import Prep
from covid_ct.scan import DataError, GeometryError, NotAChestError, UnitsError

SMALL = Prep(size=(24, 18, 24), crop="lungs", margin=5.0, window=(-1250.0, 250.0))


@pytest.fixture(scope="module")
def phantom():
    return make_phantom("covid", seed=3, shape=(48, 64, 64), severity=0.15)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ---- hull
def test_hull_against_triangulation():
    "Slow reference: a voxel lies in the hull if a simplex of the triangulation holds it"
    rng = np.random.default_rng(0)
    for _ in range(5):
        m = rng.random((9, 8, 10)) < 0.03
        m[4, 4, 5] = True
        m[:2, :2, :2] |= rng.random((2, 2, 2)) < 0.5
        at = np.argwhere(m)
        want = (Delaunay(at).find_simplex(np.argwhere(np.ones_like(m)), tol=1e-9) >= 0).reshape(
            m.shape
        )
        assert (_convex_hull(m) >= m).all() and (
            _convex_hull(m) != want
        ).sum() <= 2  # rounding on a facet


def test_hull_against_half_spaces(phantom):
    z, y, x = np.ogrid[tuple(map(slice, phantom.lungs.shape))]
    slow = np.ones(phantom.lungs.shape, bool)
    for a, b, c, d in ConvexHull(np.argwhere(phantom.lungs)).equations:
        slow &= a * z + b * y + c * x + d <= 1e-3
    assert (slow == _convex_hull(phantom.lungs)).all()


def test_hull_of_a_box_is_the_box():
    m = np.zeros((6, 7, 8), bool)
    m[1:4, 2:6, 3:5] = True
    assert (_convex_hull(m) == m).all()


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((4, 4, 4), bool),
        np.eye(4, dtype=bool)[None].repeat(1, 0),
        np.pad(np.ones((1, 3, 3), bool), 1),
    ],
)
def test_flat_hulls_are_refused(mask):
    with pytest.raises(LobeError, match="hull"):
        _convex_hull(mask)


def test_hull_brings_back_a_lesion_at_the_wall(phantom):
    z, y, _ = np.indices(phantom.lungs.shape, sparse=True)
    rim = phantom.lungs & (abs(z - 24) < 3) & (y > 40)  # five slices of both backs, as if dense
    assert rim.sum() > 200 and _convex_hull(phantom.lungs & ~rim)[rim].mean() > 0.8


# ---- coarse lungs
def test_two_lungs(phantom):
    assert (_coarse_lungs(phantom.scan, phantom.lungs) == phantom.lungs).all()


def test_from_the_scan_alone(phantom):
    mask = _coarse_lungs(phantom.scan)
    assert 2 * (mask & phantom.lungs).sum() / (mask.sum() + phantom.lungs.sum()) > 0.9


@pytest.mark.parametrize(
    "mask,error,says",
    [
        (lambda p: p.lobes > 2, LobeError, "one lung"),
        (lambda p: np.isin(p.lobes, (1, 2)), LobeError, "one lung"),
        (lambda p: p.lungs & False, LobeError, "empty"),
        (lambda p: p.lungs[1:], GeometryError, "shape"),
    ],
)
def test_not_two_lungs(phantom, mask, error, says):
    with pytest.raises(error, match=says):
        _coarse_lungs(phantom.scan, mask(phantom))
    with pytest.raises(error, match=says):
        segment_lobes(lobe_net(), phantom.scan, SMALL, mask(phantom))


def test_not_a_chest(phantom):
    with pytest.raises(NotAChestError):
        _coarse_lungs(
            phantom.scan.replace(
                voxels=np.where(phantom.lungs, 40, phantom.scan.voxels).astype("i2")
            )
        )
    with pytest.raises(UnitsError):
        _coarse_lungs(
            phantom.scan.replace(voxels=np.zeros(phantom.scan.shape, "u1"), units="uint8")
        )


# ---- input
def test_input(phantom):
    x = lobe_input(phantom.scan, LOBE_PREPS["tiny"], phantom.lungs)
    assert (
        x.voxels.shape == (48, 36, 48)
        and not x.voxels[~x.kept].any()
        and not x.voxels.flags.writeable
        and x.kept[x.forward(phantom.lungs)].all()
    )
    assert (
        LOBE_PREPS["paper"].size == (128, 96, 128)
        and _REFINED.size == (96, 96, 96)
        and (_REFINED.window[1] - _REFINED.window[0], sum(_REFINED.window) / 2) == (1500, -500)
    )
    assert tuple(8 * n for n in LOBE_PREPS["tiny"].size) == tuple(
        3 * n for n in LOBE_PREPS["paper"].size
    )


def test_outside_the_hull_does_not_matter(phantom):
    v = np.array(phantom.scan.voxels)
    v[~_convex_hull(phantom.lungs)] = 1000
    far = phantom.lungs
    a, b = (lobe_input(s, SMALL, far) for s in (phantom.scan, phantom.scan.replace(voxels=v)))
    deep = a.forward(far, fraction=True) == 1
    assert (
        np.abs(a.voxels - b.voxels)[deep].mean() < 0.02
    )  # but for the last voxel, which resampling mixes


# ---- bends
def test_bend(phantom):
    a, b, c = bend_anatomy(phantom, 1), bend_anatomy(phantom, 1), bend_anatomy(phantom, 2)
    assert (
        (a.lobes == b.lobes).all()
        and (a.lobes != c.lobes).any()
        and (a.scan.voxels == b.scan.voxels).all()
    )
    for k in PHANTOM_MASKS:
        assert (
            getattr(a, k).dtype == getattr(phantom, k).dtype
            and getattr(a, k).shape == phantom.scan.shape
        )
    assert ((a.lobes > 0) == a.lungs).mean() > 0.999 and a.scan.voxels.dtype == np.int16
    assert (
        abs(np.median(a.scan.voxels[a.lungs]) - np.median(phantom.scan.voxels[phantom.lungs])) < 40
    )  # masks went with the picture
    still = bend_anatomy(phantom, 5, mm=0.0)
    assert (still.lobes == phantom.lobes).all() and (still.scan.voxels == phantom.scan.voxels).all()


def test_bend_is_measured_in_mm():
    "The same patient on another grid is bent by as many mm"

    def far(shape):
        return np.nanmean(
            [
                _fissure_error(bend_anatomy(p, s).lobes, p.lobes, p.scan.spacing)["left oblique"]
                for s in range(3)
                for p in [make_phantom("healthy", seed=1, shape=shape)]
            ]
        )

    assert 0.5 < far((32, 40, 40)) / far((48, 56, 56)) < 2


# ---- fissures and scores
def test_fissures_by_hand():
    true = np.ones((20, 4, 4), "u1")
    true[:8] = 2
    for n in range(4):
        found = np.ones_like(true)
        found[: 8 + n] = 2
        assert _fissure_error(found, true, (2.5, 1, 1))["left oblique"] == 2.5 * n
    assert np.isnan(_fissure_error(true, true, (1, 1, 1))["right horizontal"])
    three = np.full((9, 3, 3), 3, "u1")
    three[3:6] = 4
    three[:3] = 5
    assert (
        _fissure(three, "right oblique").sum() == _fissure(three, "right horizontal").sum() == 9
        and not _fissure(three, "left oblique").any()
    )


def test_scores(phantom):
    s = lobe_scores(phantom.lobes, phantom.lobes, phantom.scan.spacing)
    assert (
        set(s) == {*LOBES, *FISSURES}
        and all(s[k] == 1 for k in LOBES)
        and all(s[k] == 0 for k in FISSURES)
    )
    a, b = bend_anatomy(phantom, 1), phantom
    x, y = (
        lobe_scores(a.lobes, b.lobes, b.scan.spacing),
        lobe_scores(b.lobes, a.lobes, b.scan.spacing),
    )
    assert (
        all(np.isclose(x[k], y[k]) for k in x)
        and all(0 < x[k] < 1 for k in LOBES)
        and all(x[k] > 0 for k in FISSURES)
    )
    wide = lobe_scores(a.lobes, b.lobes, tuple(2 * v for v in b.scan.spacing))
    assert all(np.isclose(wide[k], 2 * x[k]) for k in FISSURES) and all(
        wide[k] == x[k] for k in LOBES
    )
    with pytest.raises(GeometryError):
        lobe_scores(a.lobes[1:], b.lobes, (1, 1, 1))


# ---- votes
def test_vote_of_the_truth(phantom):
    for name, least in (("tiny", 0.97), ("paper", 0.985)):
        q = lobe_input(phantom.scan, LOBE_PREPS[name], phantom.lungs)
        share = np.stack([q.forward(phantom.lobes == k, fraction=True) for k in range(6)])
        found = vote_lobes(share, q, phantom.lungs, 2.0)
        assert (
            found.dtype == np.uint8
            and ((found > 0) == phantom.lungs).all()
            and min(lobe_scores(found, phantom.lobes, phantom.scan.spacing)[k] for k in LOBES)
            > least
        )


def test_reach_adds_what_the_mask_missed(phantom):
    missed = phantom.lungs & ~np.isin(phantom.lesions, (1, 2, 3))
    q = lobe_input(phantom.scan, LOBE_PREPS["paper"], phantom.lungs)
    share = np.stack([q.forward(phantom.lobes == k, fraction=True) for k in range(6)])
    never, sure = (vote_lobes(share, q, missed, r) for r in (2.0, 0.9))
    assert (
        ((never > 0) == missed).all()
        and (sure > 0)[phantom.lungs].mean() > 0.95 > (never > 0)[phantom.lungs].mean()
        and (sure > 0)[~phantom.lungs].mean() < 0.01
    )


def test_segment_restores_the_mode_and_covers_the_lungs(phantom):
    net = lobe_net((4, 8)).train()
    found = segment_lobes(net, phantom.scan, SMALL, phantom.lungs, reach=2.0)
    assert (
        net.training
        and found.shape == phantom.scan.shape
        and ((found > 0) == phantom.lungs).all()
        and found.max() <= 5
    )
    assert (segment_lobes(net, phantom.scan, SMALL, phantom.lungs, reach=2.0) == found).all()


def test_learns():
    from covid_ct.train.losses import SegmentationLoss

    p = make_phantom("healthy", seed=4, shape=(32, 40, 40))
    (batch,) = LobeBatches([p], SMALL, mm=0.0, fresh=False)
    net, loss, log = lobe_net((4, 8)), SegmentationLoss(dice=1.0), []
    opt = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(20):
        total, _ = loss(net.outputs(batch["image"]), batch)
        opt.zero_grad()
        total.backward()
        opt.step()
        log.append(total.item())
    assert log[-1] < 0.8 * log[0] and all(
        w.grad.abs().sum() > 0 for n, w in net.named_parameters() if n.endswith("weight")
    )


# ---- batches
def test_batches(phantom):
    ps = [phantom, *(make_phantom("healthy", seed=s, shape=(32, 40, 40)) for s in (1, 2))]
    b = LobeBatches(ps, SMALL)
    first, again = list(b), list(b)
    assert (
        len(b) == len(first) == 2
        and [len(x["image"]) for x in first] == [2, 1]
        and first[0]["mask"].dtype == torch.int64
    )
    assert all(
        torch.equal(x["image"], y["image"]) and torch.equal(x["mask"], y["mask"])
        for x, y in zip(first, again, strict=False)
    )
    assert sorted(i for x in first for i in x["scan_id"]) == sorted(p.scan.scan_id for p in ps)
    b.set_epoch(1)
    assert not torch.equal(next(iter(b))["image"], first[0]["image"])
    fixed = LobeBatches(ps, SMALL, fresh=False)
    a = [x["image"] for x in fixed]
    fixed.set_epoch(3)
    assert all(torch.equal(x, y["image"]) for x, y in zip(a, fixed, strict=False))
    with pytest.raises(LobeError):
        LobeBatches([])


# ---- crop
def test_refined_crop(phantom):
    c = refined_crop(phantom.scan, phantom.lobes)
    at = np.argwhere(c.forward(phantom.lungs))
    assert (
        c.voxels.shape == (96, 96, 96)
        and (at.min(0) <= 1).all()
        and (at.max(0) >= 94).all()
        and 0 <= c.voxels.min() < c.voxels.max() <= 1
    )
    with pytest.raises(LobeError, match="empty"):
        refined_crop(phantom.scan, 0 * phantom.lobes)
    assert issubclass(LobeError, DataError)


def test_fits_by_a_recipe(tmp_path):
    "The training loop takes network, batches and loss as they are"
    from covid_ct.train.loop import fit
    from covid_ct.train.recipes import Recipe, sourced_fields

    r = Recipe(
        "lobes",
        "test",
        ("outside", *LOBES),
        task="segment",
        batch_size=2,
        lr=1e-2,
        epochs=1,
        loss="segmentation",
        loss_kwargs=dict(dice=1.0),
        keep="dice",
        sources={k: "test" for k in sourced_fields()},
    )
    ps = [make_phantom("healthy", seed=s, shape=(32, 40, 40)) for s in (1, 2)]
    run = fit(
        lobe_net((4, 8)),
        LobeBatches(ps, SMALL),
        LobeBatches(ps[:1], SMALL, mm=0.0, fresh=False),
        r,
        tmp_path / "run",
        progress=False,
    )
    assert {"train_dice", "train_cross_entropy", "valid_dice"} <= set(run.history) and set(
        run.predictions.scan_id
    ) == {ps[0].scan.scan_id}
