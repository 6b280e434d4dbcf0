import math
from dataclasses import replace

import numpy as np
import pytest

from covid_ct.preprocess import resample as P
from covid_ct.preprocess.resample import (
    _USED_BY,
    PREPS,
    Prep,
    Prepared,
    _axis_weights,
    _crop_box,
    _multiply_axes,
    _network_grid,
    faces,
    prepare_scan,
    resample,
    sub_grid,
)
from covid_ct.scan import GeometryError, Grid, Map, NotAChestError, Scan, UnitsError


def oblique(shape=(24, 60, 50), spacing=(5.0, 0.8, 0.7), angles=(0.2, -0.1, 0.15)):
    a, b, c = angles

    def turn(t, i, j):
        return np.array(
            [
                [
                    math.cos(t)
                    if r == s and r in (i, j)
                    else float(r == s)
                    if r == s
                    else (
                        -math.sin(t)
                        if (r, s) == (i, j)
                        else math.sin(t)
                        if (r, s) == (j, i)
                        else 0.0
                    )
                    for s in range(3)
                ]
                for r in range(3)
            ]
        )

    r = turn(a, 0, 1) @ turn(b, 1, 2) @ turn(c, 0, 2)
    assert np.allclose(r @ r.T, np.eye(3))
    return Grid(shape, spacing, (-310.0, -150.0, 40.0), tuple(map(tuple, r.tolist())))


def scan_on(grid, voxels, **kw):
    return Scan(voxels, grid.spacing, grid.origin, grid.direction, **kw)


def places(grid):
    return grid.to_mm(np.stack(np.indices(grid.shape), -1))


# ── weights ───────────────────────────────────────────────────────────────────────────────────────
SIZES = [(n, m) for n in (1, 2, 3, 5, 17, 64, 300, 512) for m in (1, 2, 3, 7, 64, 224, 600)]


@pytest.mark.parametrize("n,m", SIZES)
def test_a_ramp_is_reproduced_exactly_up_to_the_border(n, m):
    f = n / m
    w, c = _axis_weights(n, (f - 1) / 2, f, m), (f - 1) / 2 + f * np.arange(m)
    assert np.allclose(w.sum(1), 1, atol=1e-12)
    if n > 1:
        assert abs(w @ (3 * np.arange(n) - 1000.0) - (3 * c - 1000)).max() <= 1e-9 * 1000


@pytest.mark.parametrize("n,m", SIZES)
def test_held_and_area_weights_are_shares(n, m):
    f = n / m
    for kind in ("hold", "area", "nearest"):
        w = _axis_weights(n, (f - 1) / 2, f, m, kind)
        assert w.min() >= 0 and np.allclose(w.sum(1), 1, atol=1e-12), kind
    w = _axis_weights(n, (f - 1) / 2, f, m, "area")
    assert np.allclose(w.sum(0) * f, 1)  # every voxel of the scan is given away exactly once


def slow_row(n, c, step):
    "The definition, one sample at a time"
    h, over = max(1.0, step), max(0, -c, c - (n - 1))
    h += 2 * over
    w = [max(0.0, 1 - abs(i - c) / h) for i in range(n)]
    w = [x / sum(w) for x in w]
    mean = sum(x * i for i, x in enumerate(w))
    var = sum(x * (i - mean) ** 2 for i, x in enumerate(w))
    return [x * (1 + (c - mean) / var * (i - mean)) for i, x in enumerate(w)] if var else w


def slow_resample(v, size):
    "Three nested sums over float64, voxel by voxel"
    rows = [
        [slow_row(n, (j + 0.5) * n / m - 0.5, n / m) for j in range(m)]
        for n, m in zip(v.shape, size, strict=False)
    ]
    out = np.zeros(size)
    for d in range(size[0]):
        for h in range(size[1]):
            for k in range(size[2]):
                out[d, h, k] = sum(
                    rows[0][d][a] * rows[1][h][b] * rows[2][k][c] * v[a, b, c]
                    for a in range(v.shape[0])
                    for b in range(v.shape[1])
                    for c in range(v.shape[2])
                    if rows[0][d][a] and rows[1][h][b] and rows[2][k][c]
                )
    return out


@pytest.mark.parametrize("size", [(2, 3, 4), (5, 9, 2), (11, 4, 7), (5, 6, 7)])
def test_fast_equals_slow_loops(size):
    v = np.random.default_rng(1).normal(-600, 300, (5, 6, 7))
    g = Grid(v.shape, (3.0, 1.0, 1.0))
    want = slow_resample(v, size)
    to = sub_grid(g, faces(g), size)
    assert np.allclose(resample(v, g, to), want, rtol=1e-12, atol=1e-9)
    single = resample(v.astype("f4"), g, to)
    assert single.dtype == np.float32 and abs(single - want).max() < 2e-3  # HU


def test_the_order_of_axes_and_the_layout_in_memory_do_not_matter():
    v = np.random.default_rng(2).integers(-1000, 1000, (37, 45, 53)).astype("i2")
    ws = [
        _axis_weights(n, (n / m - 1) / 2, n / m, m)
        for n, m in zip(v.shape, (60, 11, 20), strict=False)
    ]
    want = np.einsum("di,hj,wk,ijk->dhw", *ws, v.astype("f8"), optimize=True)
    for u in (
        v,
        np.asfortranarray(v),
        v[:, ::-1, ::-1][:, ::-1, ::-1],
        v.astype("f4"),
        v.astype(">i2"),
    ):
        assert abs(_multiply_axes(u, ws) - want).max() < 5e-3
    assert abs(_multiply_axes(v.astype("f8"), ws) - want).max() < 1e-9


@pytest.mark.parametrize(
    "shape,size",
    [
        ((300, 512, 512), (64, 224, 224)),
        ((40, 512, 512), (64, 224, 224)),
        ((8, 14, 14), (300, 512, 512)),
        ((64, 3, 900), (7, 300, 5)),
    ],
)
def test_no_block_is_so_large_that_the_linear_algebra_library_would_split_it(shape, size):
    for n, m, other in ((shape[1], size[1], shape[2]), (shape[2], size[2], size[1])):
        w = _axis_weights(n, (n / m - 1) / 2, n / m, m)
        blocks = P._blocks(w, other)
        whole = np.zeros_like(w)
        for j, k, b in blocks:
            whole[j, k] = b
        assert (whole == w).all() and (
            max(b.size for *_, b in blocks) * other <= P._FEW_PRODUCTS
            or max(len(b) for *_, b in blocks) <= 4
        )


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    v = np.random.default_rng(4).integers(-1000, 1000, (50, 61, 70)).astype("i2")
    ws = [
        _axis_weights(n, (n / m - 1) / 2, n / m, m)
        for n, m in zip(v.shape, (20, 25, 30), strict=False)
    ]

    def run(n):
        monkeypatch.setenv("OMP_NUM_THREADS", n)
        return _multiply_axes(v, ws)

    assert (
        P._thread_count() >= 1
        and (run("1") == run("3")).all()
        and (run("1") == run("2,1")).all()
        and P._thread_count() == 2
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert P._thread_count() >= 1


def test_an_error_in_a_thread_is_raised(monkeypatch):
    def broken(*a):
        raise MemoryError("no room")

    monkeypatch.setattr(P, "_slab", broken)
    with pytest.raises(MemoryError, match="no room"):
        _multiply_axes(np.ones((4, 4, 4)), [np.eye(4)] * 3)


def test_slices_that_become_more_but_smaller_are_made_small_first(monkeypatch):
    v = np.random.default_rng(6).normal(size=(5, 40, 40))
    ws = [
        _axis_weights(n, (n / m - 1) / 2, n / m, m)
        for n, m in zip(v.shape, (30, 8, 9), strict=False)
    ]
    shapes, slab = [], P._slab
    monkeypatch.setattr(P, "_slab", lambda v, *a: (shapes.append(v.shape), slab(v, *a)))
    assert np.allclose(_multiply_axes(v, ws), np.einsum("di,hj,wk,ijk->dhw", *ws, v, optimize=True))
    assert set(shapes) == {(5, 40, 40), (5, 8, 9)}


def test_smaller_is_antialiased_like_scikit_image_and_closer_to_the_truth():
    transform = pytest.importorskip("skimage.transform")
    z, y, x = np.meshgrid(*(np.arange(n) for n in (40, 96, 96)), indexing="ij")

    def f(z, y, x):
        return 300 * np.cos(z / 9) + 200 * np.sin(y / 12) * np.cos(x / 15)

    clean = f(z, y, x)
    noisy = clean + np.random.default_rng(0).normal(0, 60, clean.shape)
    size = (16, 32, 32)
    g = Grid(clean.shape, (1.0, 1.0, 1.0))
    to = sub_grid(g, faces(g), size)
    c = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(clean.shape, size, strict=False)]
    true = f(*np.meshgrid(*c, indexing="ij"))
    inner = (slice(2, -2),) * 3

    def rms(a):
        return float(np.sqrt(np.mean((a - true)[inner] ** 2)))

    ours = resample(noisy, g, to)
    oracle = transform.resize(
        noisy, size, order=1, anti_aliasing=True, mode="edge", preserve_range=True
    )
    plain = transform.resize(
        noisy, size, order=1, anti_aliasing=False, mode="edge", preserve_range=True
    )
    assert rms(ours) < 0.35 * rms(plain)
    assert rms(ours) < 1.1 * rms(oracle)
    assert np.sqrt(np.mean((ours - oracle)[inner] ** 2)) < 0.25 * np.sqrt(
        np.mean((plain - oracle)[inner] ** 2)
    )


def test_larger_is_linear_interpolation_like_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    v = np.random.default_rng(3).normal(0, 100, (9, 10, 11))
    g = Grid(v.shape, (1.0, 1.0, 1.0))
    to = sub_grid(g, faces(g), (18, 31, 11))
    at = np.stack(
        np.meshgrid(
            *((np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(v.shape, to.shape, strict=False)),
            indexing="ij",
        )
    )
    want = ndimage.map_coordinates(v, at, order=1, mode="nearest")
    inside = np.all([(a >= 0) & (a <= n - 1) for a, n in zip(at, v.shape, strict=False)], axis=0)
    assert abs(resample(v, g, to) - want)[inside].max() < 1e-10
    assert abs(resample(v, g, to, "hold") - want).max() < 1e-10


# ── grids ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "shape", [(64, 224, 224), (8, 14, 14), (24, 60, 50), (1, 1, 1), (100, 7, 201)]
)
def test_a_ramp_in_mm_stays_a_ramp_in_mm_on_an_oblique_grid(shape):
    g = oblique()
    to = sub_grid(g, faces(g), shape)
    assert np.allclose(to.size_mm, g.size_mm)
    ramp, want = places(g), places(to)
    for a in range(3):
        got, scale = resample(ramp[..., a], g, to), abs(want).max()
        assert abs(got - want[..., a]).max() < 1e-9 * scale
        single = resample(ramp[..., a].astype("f4"), g, to)
        assert abs(single - want[..., a]).max() < 2e-6 * scale


def test_turned_grids_wrong_shapes_and_unknown_kinds_are_refused():
    g = oblique()
    v = np.zeros(g.shape)
    with pytest.raises(GeometryError, match="turned"):
        resample(v, g, replace(g, direction=Grid((1, 1, 1), (1, 1, 1)).direction))
    with pytest.raises(GeometryError, match="shape"):
        resample(v[1:], g, g)
    with pytest.raises(ValueError, match="cubic"):
        resample(v, g, g, "cubic")


def test_outside_the_scan_is_fill():
    g = Grid((4, 4, 4), (1.0, 1.0, 1.0))
    out = resample(np.full(g.shape, 5.0), g, sub_grid(g, [(-2.5, 5.5)] * 3, (8, 8, 8)), fill=-7)
    assert (out[2:-2, 2:-2, 2:-2] == 5).all() and (out == -7).sum() == 8**3 - 4**3
    away = sub_grid(g, [(50, 60)] * 3, (3, 3, 3))
    assert (resample(np.ones(g.shape), g, away, fill=2) == 2).all()


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────
def test_rows_of_darnet():
    assert PREPS["darnet"].size == (64, 224, 224) and PREPS["darnet"].window == (-1350, 150)
    r = PREPS["darnet_release"]
    g = Grid((30, 512, 512), (1.0, 1.0, 1.0))
    s = Scan(np.zeros(g.shape, "u1"), g.spacing, units="uint8", geometry_known=False)
    assert _crop_box(s, r)[1:].tolist() == [[47.5, 463.5]] * 2  # 48 pixels from each side
    with pytest.raises(ValueError):
        Prep(size=None)
    with pytest.raises(ValueError):
        Prep(crop="body")
    with pytest.raises(ValueError):
        Prep(window=(150, -1350))


def test_crops():
    g = Grid((40, 100, 100), (2.0, 1.0, 1.0))
    s = scan_on(g, np.zeros(g.shape, "i2"))
    lungs = np.zeros(g.shape, bool)
    lungs[10:20, 30:50, 5:95] = True
    assert _crop_box(s, Prep(crop="lungs", margin=6.0), lungs).tolist() == [
        [6.5, 22.5],
        [23.5, 55.5],
        [-0.5, 99.5],
    ]
    assert _crop_box(s, Prep(crop=40.0)).tolist() == [[9.5, 29.5], [29.5, 69.5], [29.5, 69.5]]
    assert _crop_box(s, Prep(crop=(20.0, 40.0, 200.0))).tolist() == [
        [14.5, 24.5],
        [29.5, 69.5],
        [-50.5, 149.5],
    ]
    with pytest.raises(NotAChestError, match="empty"):
        _crop_box(s, Prep(crop="lungs"), lungs & False)
    with pytest.raises(GeometryError, match="shape"):
        _crop_box(s, Prep(crop="lungs"), lungs[1:])
    with pytest.raises(ValueError, match="lung_mask"):
        _crop_box(s, Prep(crop="lungs"))
    flat = s.replace(geometry_known=False)
    for prep in (Prep(crop=40.0), Prep(spacing=(2.0, 2.0, 2.0)), Prep(crop="lungs")):
        with pytest.raises(GeometryError, match="spacing is unknown"):
            _crop_box(flat, prep, lungs)
    assert _crop_box(flat, Prep()).tolist() == faces(g).tolist()


def test_spacing_size_and_both():
    g = Grid((40, 100, 100), (2.0, 1.0, 1.0))
    assert _network_grid(g, faces(g), Prep(size=None, spacing=(4.0, 2.0, 2.5))).shape == (
        20,
        50,
        40,
    )
    both = _network_grid(g, faces(g), Prep(size=(50, 30, 100), spacing=(2.0, 2.0, 1.0)))
    assert both.spacing == (2.0, 2.0, 1.0) and both.shape == (50, 30, 100)

    def middle(q):
        return q.to_mm((np.array(q.shape) - 1) / 2)

    assert np.allclose(middle(both), middle(g))


def test_prepare_windows_and_is_read_only():
    g = Grid((8, 16, 16), (2.0, 1.0, 1.0))
    hu = np.full(g.shape, -600, "i2")
    hu[4:], hu[:2] = 3000, -3024
    p = prepare_scan(scan_on(g, hu), Prep(size=(8, 16, 16)))
    assert p.voxels.dtype == np.float32 and not p.voxels.flags.writeable
    assert (p.voxels[2:4] == 0.5).all() and (p.voxels[4:] == 1).all() and (p.voxels[:2] == 0).all()
    padded = prepare_scan(
        scan_on(g, hu), Prep(size=(10, 16, 16), spacing=(2.0, 1.0, 1.0), fill=0.25)
    )
    assert (padded.voxels[[0, -1]] == 0.25).all() and (padded.voxels[1:-1] == p.voxels).all()
    for fill in (0.0, 1.0, 0.3):
        edge = prepare_scan(
            scan_on(g, hu.astype("f8")), Prep(size=(10, 16, 16), spacing=(2.0, 1.0, 1.0), fill=fill)
        ).voxels
        assert (
            abs(edge[[0, -1]] - fill).max() < 1e-6
            and edge.dtype == np.float32
            and 0 <= edge.min()
            and edge.max() <= 1
        )
    assert hu.max() == 3000 and hu.min() == -3024  # the scan is not changed


def test_units():
    v = np.zeros((4, 8, 8), "u1")
    with pytest.raises(UnitsError):
        prepare_scan(Scan(v.astype("i2") - 500, (1, 1, 1)), PREPS["darnet_release"])
    grey = Scan(v + 255, (1, 1, 1), units="uint8", geometry_known=False)
    assert prepare_scan(grey, PREPS["darnet_release"]).voxels.min() > 1 - 1e-5


def test_lungs_may_be_a_function_that_is_asked_only_when_needed():
    g = Grid((20, 40, 40), (2.0, 2.0, 2.0))
    s = scan_on(g, np.random.default_rng(0).integers(-1000, 100, g.shape, dtype="i2"))

    def find(scan):
        m = np.zeros(scan.shape, bool)
        m[5:15, 10:30, 10:30] = True
        return m

    def never(scan):
        raise AssertionError("asked")

    a, b = (
        prepare_scan(s, PREPS["darnet_tiny"], find),
        prepare_scan(s, PREPS["darnet_tiny"], find(s)),
    )
    assert (a.voxels == b.voxels).all() and a.grid == b.grid
    prepare_scan(s, PREPS["darnet"], never)


# ── back and forward ──────────────────────────────────────────────────────────────────────────────
PREPARATIONS = [
    Prep(size=(16, 32, 32)),
    Prep(size=(64, 40, 30), crop=(60.0, 30.0, 25.0)),
    Prep(size=(12, 20, 20), crop="lungs", margin=3.0),
    Prep(size=None, spacing=(2.0, 2.0, 2.0)),
    Prep(size=(20, 40, 40), spacing=(4.0, 1.5, 1.5)),
    Prep(size=(20, 30, 30), trim=(0.1, 0.1, 0.05)),
]


@pytest.mark.parametrize("prep", PREPARATIONS)
def test_a_place_goes_there_and_comes_back(prep):
    """A bump at a known place in mm, on an oblique anisotropic scan: found there in the network and
    again on the way back"""
    g = oblique()
    lungs = np.zeros(g.shape, bool)
    lungs[4:20, 10:50, 8:44] = True
    at = g.to_mm((12, 31, 23))
    bump = np.exp(-((places(g) - at) ** 2).sum(-1) / (2 * 4.0**2))
    p = prepare_scan(scan_on(g, (bump * 1500 - 1350).astype("f4")), prep, lungs)

    def centre(v, grid):
        return (places(grid) * v[..., None]).sum((0, 1, 2)) / v.sum()

    off = p.grid.to_index(centre(p.voxels.astype("f8"), p.grid)) - p.grid.to_index(at)
    assert abs(off).max() < 0.5
    back = p.back(p.voxels)
    assert (
        back.shape == g.shape and back.dtype == np.float32 and 0 <= back.min() and back.max() <= 1
    )
    assert abs(g.to_index(centre(back.astype("f8"), g)) - (12, 31, 23)).max() < 0.5
    nearest = p.back(p.voxels, order=0)
    assert abs(g.to_index(centre(nearest.astype("f8"), g)) - (12, 31, 23)).max() < 0.5


@pytest.mark.parametrize("feature", [(8, 14, 14), (4, 8, 8), (16, 32, 32), (40, 70, 90)])
def test_maps_of_any_feature_size_land_where_they_were_lit(feature):
    g = oblique()
    p = prepare_scan(scan_on(g, np.zeros(g.shape, "i2")), Prep(size=(16, 32, 32)))
    heat = np.zeros(feature)
    lit = tuple(n // 2 for n in feature)
    heat[lit] = 1
    back = p.back(heat)
    step = np.array(p.grid.shape) / feature
    want = p.grid.to_mm((np.array(lit) + 0.5) * step - 0.5)
    got = (places(g) * back[..., None].astype("f8")).sum((0, 1, 2)) / back.sum()
    assert abs(g.to_index(got) - g.to_index(want)).max() < 0.5
    Map(back, g, "covid", "layer4", "CAM")


def test_back_keeps_the_range_and_is_zero_outside_the_crop():
    g = oblique()
    p = prepare_scan(
        scan_on(g, np.zeros(g.shape, "i2")), Prep(size=(8, 16, 16), crop=(60.0, 24.0, 21.0))
    )
    ones = p.back(np.ones((3, 5, 5)))
    box = _crop_box(scan_on(g, np.zeros(g.shape, "i2")), p.prep)
    i = np.stack(np.indices(g.shape), -1)
    inside = np.all((i >= box[:, 0]) & (i <= box[:, 1]), axis=-1)
    assert (ones[inside] == 1).all() and (ones[~inside] == 0).all()
    rough = p.back(np.random.default_rng(0).random((8, 14, 14)))
    assert 0 <= rough.min() and rough.max() <= 1
    with pytest.raises(GeometryError):
        p.back(np.ones((2, 8, 14, 14)))


def test_forward_keeps_volume_and_labels():
    g = oblique()
    rng = np.random.default_rng(5)
    mask = np.zeros(g.shape, bool)
    mask[5:18, 20:45, 12:40] = rng.random((13, 25, 28)) > 0.3
    p = prepare_scan(scan_on(g, np.zeros(g.shape, "i2")), Prep(size=(9, 17, 13)))
    share = p.forward(mask, fraction=True)
    assert 0 <= share.min() and share.max() <= 1
    assert np.isclose(share.sum(dtype="f8") * p.grid.voxel_ml, mask.sum() * g.voxel_ml, rtol=1e-5)
    assert p.forward(mask).dtype == bool and (p.forward(mask) == (share >= 0.5 - 1e-6)).all()
    assert not p.forward(mask & False).any() and p.forward(mask | True).all()
    labels = np.zeros(g.shape, "u1")
    labels[:, :, :25], labels[:, :, 25:] = 3, 5
    got = p.forward(labels)
    assert (
        got.dtype == np.uint8
        and set(np.unique(got)) == {3, 5}
        and (got[..., :6] == 3).all()
        and (got[..., 7:] == 5).all()
    )
    assert (p.forward(labels * 0) == 0).all()
    with pytest.raises(GeometryError):
        p.forward(mask[1:])


def test_mask_and_voxels_go_the_same_way():
    g = oblique()
    mask = np.zeros(g.shape, bool)
    mask[6:15, 15:45, 10:35] = True
    p = prepare_scan(scan_on(g, np.where(mask, 150, -1350).astype("i2")), Prep(size=(12, 30, 25)))
    assert (p.forward(mask) == (p.voxels >= 0.5)).mean() > 0.98
    assert isinstance(p, Prepared)


@pytest.mark.slow
def test_full_size_is_fast_and_lean():
    import time
    import tracemalloc

    v = np.random.default_rng(0).integers(-1000, 400, (300, 512, 512), dtype="i2")
    s = Scan(v, (1.0, 0.7, 0.7))
    prepare_scan(s, PREPS["darnet"])
    start = time.process_time()
    prepare_scan(s, PREPS["darnet"])
    seconds = time.process_time() - start
    tracemalloc.start()
    prepare_scan(s, PREPS["darnet"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 3  # 0.2 s on a quiet core; process time, so that neighbours do not decide
    assert peak < 1.2 * v.nbytes  # never the whole scan in float32


# units: which rows take which scans
def grey_scan(seed=4):
    v = np.random.default_rng(seed).integers(0, 256, (20, 30, 28)).astype("u1")
    return Scan(v, (1, 1, 1), units="uint8", geometry_known=False, scan_id="pictures")


def test_the_row_of_the_paper_takes_8_bit_scans_as_they_are():
    "Grey 0 … 255 becomes 0 … 1, without a window, a lung mask or a crop; the scan says so"
    scan = grey_scan()
    ready = prepare_scan(scan, PREPS["darnet"], never_asked)
    exact = resample(scan.voxels / 255, scan.grid, ready.grid)
    assert ready.voxels.shape == (64, 224, 224)
    assert np.abs(ready.voxels - np.clip(exact, 0, 1)).max() < 1e-5
    assert ready.lungs == "none" and "8-bit" in ready.remarks[0]
    assert np.allclose(ready.grid.size_mm, scan.grid.size_mm)  # the whole picture, nothing cut off


def never_asked(scan):
    raise AssertionError("no lungs are needed")


def test_hu_still_go_through_the_window():
    ramp = np.linspace(-1350, 150, 16800).reshape(20, 30, 28)
    scan = scan_on(Grid(ramp.shape, (1.0, 1.0, 1.0)), ramp)
    ready = prepare_scan(scan, PREPS["darnet"])
    assert ready.remarks == () and abs(ready.voxels.min()) < 0.02 and ready.voxels.max() > 0.98


@pytest.mark.parametrize("row", [k for k, p in PREPS.items() if "uint8" not in p.takes])
def test_a_refused_unit_names_the_recipes_that_take_it(row):
    with pytest.raises(UnitsError, match="HU needed, the voxels are 'uint8'") as e:
        prepare_scan(grey_scan(), PREPS[row], never_asked)
    assert "darnet/paper" in e.value.remedy and "darnet/release" in e.value.remedy
    assert e.value.source == "pictures"


def test_the_other_units_name_what_takes_them_too():
    hu = scan_on(Grid((6, 6, 6), (1.0, 1.0, 1.0)), np.full((6, 6, 6), -500))
    with pytest.raises(UnitsError, match="darnet/paper.*dual_sampling/paper"):
        prepare_scan(hu, PREPS["darnet_release"])
    unit = Scan(np.random.default_rng(0).random((6, 6, 6)).astype("f4"), (1, 1, 1), units="unit")
    with pytest.raises(UnitsError, match="Convert the scan to HU"):
        prepare_scan(unit, PREPS["darnet"])


def test_every_row_names_a_recipe_that_uses_it():
    from covid_ct.train.recipes import RECIPES

    small = {k for k in PREPS if k.endswith("_small")}  # of the records, for `reproduce`
    assert set(_USED_BY) == set(PREPS) - small
    for row, name in _USED_BY.items():
        assert RECIPES[tuple(name.split("/"))].prep == row


def test_a_prepared_scan_says_whose_lungs_were_used():
    v = np.full((20, 30, 28), -1000)
    lungs = np.zeros(v.shape, bool)
    lungs[4:16, 8:22, 6:22] = True
    scan = scan_on(Grid(v.shape, (1.0, 1.0, 1.0)), v)
    assert prepare_scan(scan, PREPS["darnet_tiny"], lungs).lungs == "own"
    assert prepare_scan(scan, PREPS["darnet_tiny"], lambda s: lungs).lungs == "built-in"
    assert prepare_scan(scan, PREPS["darnet"], lungs).lungs == "none"
