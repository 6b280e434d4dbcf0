"""The viewer without a browser: what it accepts, what it packs, what it draws, what it writes."""

import gzip
import html
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from covid_ct.plot import WINDOWS, window
from covid_ct.scan import DataError, GeometryError, Grid, Map, Scan, VoxelError
from covid_ct.widgets.overlay import slice_profile, view, view_side_by_side
from covid_ct.widgets.pack import (
    _pack_masks,
    _pack_volume,
    _shrink,
    _to_values,
    _untile,
    fit_shape,
    grey_table,
    presets_of,
    script_json,
    shrink_grid,
    tile_slices,
    to_bytes,
)
from covid_ct.widgets.viewer import VolumeViewer, _alt_of, _letters_of, draw_plane, still_image

EVIL = "</script><img src=x onerror=\"document.title='owned'\">&<!--\u2028"
SHAPE = (12, 20, 16)


@pytest.fixture(scope="module")
def scan():
    v = np.random.default_rng(0).integers(-1100, 1100, SHAPE).astype("i2")
    return Scan(v, (5.0, 1.0, 2.0), (10.0, -20.0, -30.0), scan_id="s1")


@pytest.fixture(scope="module")
def masks():
    m = np.zeros(SHAPE, bool)
    m[4:8, 5:9, 10:14] = True
    return {"truth": m, "other": np.roll(m, 2, 1)}


def heat(scan, **kw):
    return Map(
        np.linspace(0, 1, scan.voxels.size).reshape(scan.shape), scan.grid, method="CAM", **kw
    )


# ---------------------------------------------------------------- packing
@pytest.mark.parametrize("units, lo, hi", [("HU", -1024, 1016), ("uint8", 0, 255), ("unit", 0, 1)])
def test_bytes_there_and_back(units, lo, hi):
    x = np.linspace(lo, hi, 1000).reshape(10, 10, 10)
    back = _to_values(to_bytes(x, units), units)
    assert np.abs(back - x).max() <= (hi - lo) / 255 / 2 + 1e-4
    assert (np.diff(back.ravel()) >= 0).all()


def test_windows_agree_with_show():
    for name, (level, width) in presets_of("HU").items():
        if name in WINDOWS:
            assert WINDOWS[name] == (level, width)
        assert (
            np.abs(
                grey_table(level, width) / 255 - window(_to_values(np.arange(256)), level, width)
            ).max()
            < 0.003
        )
    assert list(presets_of("uint8")) == ["full"] and grey_table(
        127.5, 255, "uint8"
    ).tolist() == list(range(256))


@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 4, 4), (30, 2, 100), (5, 100, 2)])
def test_tiles(shape):
    v = np.random.default_rng(1).integers(0, 256, shape).astype("u1")
    mosaic, cols = tile_slices(v)
    assert (_untile(mosaic, cols, shape) == v).all() and max(mosaic.shape) <= 16383


def test_several_pictures_and_too_wide():
    "More slices than a picture holds make several; a side beyond WebP's limit falls back to gzip"
    v = np.zeros((300, 130, 130), "u1")
    v[170:] = 200
    parts, _ = _pack_volume(v)
    assert len(parts) == 2 and sum(p["shape"][0] for p, _ in parts) == 300
    slabs = [
        _untile(np.array(Image.open(io.BytesIO(data)).convert("L")), part["cols"], part["shape"])
        for part, data in parts
    ]
    assert np.abs(np.concatenate(slabs).astype(int) - v).max() < 8
    ((part, _),) = _pack_volume(np.zeros((1, 2, 16400), "u1"))[0]
    assert part["codec"] == "gzip"
    with pytest.raises(DataError, match="codec"):
        _pack_volume(v, "jpeg")


def test_the_stated_error_is_the_error():
    v = np.random.default_rng(2).normal(120, 20, (8, 64, 64)).clip(0, 255).astype("u1")
    ((part, data),) = _pack_volume(v)[0]
    back = _untile(
        np.array(Image.open(io.BytesIO(data)).convert("L")), part["cols"], v.shape
    ).astype(float)
    assert math.isclose(_pack_volume(v)[1], ((back - v) ** 2).mean(), rel_tol=1e-5)


def test_masks_are_exact():
    ms = list(np.random.default_rng(3).random((11, 3, 4, 5)) > 0.5)
    packed = _pack_masks(ms)
    assert len(packed) == 2
    for j, m in enumerate(ms):
        bits = np.frombuffer(gzip.decompress(packed[j // 8][1]), "u1").reshape(m.shape)
        assert ((bits >> j % 8 & 1) == m).all()


def test_shrinking_averages_and_stays_in_place():
    g = Grid((40, 60, 60), (2.0, 0.5, 0.5), (3.0, 4.0, 5.0))
    shape = fit_shape(g, 20_000)
    assert math.prod(shape) <= 20_000 and fit_shape(g, 0) == g.shape == fit_shape(g, 10**9)
    small = shrink_grid(g, shape)
    assert (
        small.spacing[0] == 2 and small.spacing[1] == small.spacing[2] < 2
    )  # only the fine axes grow coarser
    for corner in np.ndindex(2, 2, 2):
        c = np.array(corner)
        assert np.allclose(g.to_mm(c * g.shape - 0.5), small.to_mm(c * small.shape - 0.5))
    z, y, x = np.indices(g.shape)
    ramp = (2 * x + y).astype("u1")  # linear stays linear: nothing moved
    lines = _shrink(ramp, shape).astype(float)
    at = small.to_mm(np.moveaxis(np.indices(small.shape), 0, -1))
    want = g.to_index(at) @ (0, 1, 2)
    assert np.abs(lines - want)[:, 3:-3, 3:-3].max() <= 1.01


# ---------------------------------------------------------------- what is accepted
def test_starts_at_the_lesion(scan, masks):
    v = VolumeViewer(scan, masks)
    assert masks["truth"][tuple(v.index)] and v.preset == "lung" and v.layers == ["truth", "other"]
    assert VolumeViewer(scan).index == [6, 10, 8]
    assert VolumeViewer(scan, maps=heat(scan)).index == [11, 19, 15]


@pytest.mark.parametrize(
    "change",
    [
        dict(preset="lungs"),
        dict(index=[0, 0, 99]),
        dict(index=[1, 2]),
        dict(index=[-1, 0, 0]),
        dict(alpha=2.0),
        dict(alpha=float("nan")),
        dict(window=0.0),
        dict(level=float("inf")),
        dict(layers=["nobody"]),
        dict(map="nobody"),
    ],
    ids=str,
)
def test_wrong_state_raises_and_changes_nothing(scan, masks, change):
    v = VolumeViewer(scan, masks, {"m": heat(scan)})
    ((name, value),) = change.items()
    before = getattr(v, name)
    with pytest.raises(DataError, match=f"VolumeViewer.{name}"):
        setattr(v, name, value)
    assert getattr(v, name) == before


@pytest.mark.parametrize(
    "kw",
    [
        dict(window="brain"),
        dict(index=(0, 0, 50)),
        dict(window=(0, -3)),
        dict(colour="red"),
        dict(alpha=-1.0),
        dict(layers=["x"]),
        dict(map="x"),
    ],
    ids=str,
)
def test_wrong_arguments_raise(scan, kw):
    with pytest.raises(ValueError):
        VolumeViewer(scan, **kw)


def test_layers_of_another_grid_are_refused(scan, masks):
    with pytest.raises(GeometryError, match="mask m"):
        view(scan, masks={"m": masks["truth"][1:]})
    with pytest.raises(VoxelError, match="more than yes and no"):
        view(scan, masks={"m": 2 * masks["truth"].astype(int)})
    moved = Map(heat(scan).values, Grid(scan.shape, scan.spacing, (15.0, -20.0, -30.0)))
    with pytest.raises(GeometryError, match="apart"):
        view(scan, moved)
    with pytest.raises(GeometryError):
        view(scan, {"m": np.zeros((2, 2, 2))})
    with pytest.raises(VoxelError):
        view(scan, {"m": 3 * heat(scan).values})
    with pytest.raises(DataError, match="Scan is needed"):
        VolumeViewer(scan.voxels)
    with pytest.raises(DataError, match="one name"):
        view(scan, [heat(scan, layer="a"), heat(scan, layer="a")])
    assert VolumeViewer(scan, {"m": masks["truth"].astype("u1")}).masks["m"].dtype == bool


def test_window_and_preset_stay_in_step(scan):
    v = VolumeViewer(scan, window=(40, 400))
    assert v.preset == "mediastinum"
    v.preset = "bone"
    assert (v.level, v.window) == (400, 1800)
    v.level = 1.0
    assert v.preset == "custom" and v.window == 1800
    v.set_window(-600, 1500)
    assert v.preset == "lung"


def test_grey_scans_say_so(masks):
    v = np.random.default_rng(0).integers(0, 256, SHAPE).astype("u1")
    w = VolumeViewer(Scan(v, (1, 1, 1), units="uint8"), window="mediastinum")
    assert w.preset == "full" and w.meta["units"] == "uint8" and list(w.meta["presets"]) == ["full"]
    header, _ = w.message()
    assert header["error"] == 0 and "HU" not in header["note"]
    unit = VolumeViewer(Scan(v / 255, (1, 1, 1), units="unit"))
    assert unit.level == pytest.approx(0.5) and unit.window == pytest.approx(1)


# ---------------------------------------------------------------- what is drawn
def test_planes_lie_right():
    "One bright voxel near head, front and left is found where a radiologist expects it"
    v = np.full((10, 12, 14), -1000, "i2")
    v[8, 1, 12] = 1000
    scan = Scan(v, (2.0, 1.0, 1.0))
    table, at = grey_table(0, 2000), (8, 1, 12)

    def place(plane):
        return np.unravel_index(
            np.array(
                draw_plane(to_bytes(v), scan.grid, plane, at, table, scale=4).convert("L")
            ).argmax(),
            np.array(draw_plane(to_bytes(v), scan.grid, plane, at, table, scale=4)).shape[:2],
        )

    for plane, (row, col), size in (
        ("axial", (1.5, 12.5), (12, 14)),
        ("coronal", (3, 12.5), (20, 14)),
        ("sagittal", (3, 1.5), (20, 12)),
    ):
        got = place(plane)
        assert np.abs(np.array(got) / 4 - (row, col)).max() < 1, plane
        assert draw_plane(to_bytes(v), scan.grid, plane, at, table, scale=4).size == (
            4 * size[1],
            4 * size[0],
        )
    assert _letters_of(scan.grid) == [["F", "H"], ["A", "P"], ["R", "L"]]
    assert _letters_of(
        Grid((2, 2, 2), (1, 1, 1), direction=((0, 1, 0), (-1, 0, 0), (0, 0, -1)))
    ) == [["P", "A"], ["F", "H"], ["L", "R"]]


def test_drawing_is_a_function_of_the_state(scan, masks):
    v = VolumeViewer(scan, masks, {"m": heat(scan)})
    first = v.poster()
    seen = {first}
    for change in (
        dict(preset="bone"),
        dict(index=[2, 3, 4]),
        dict(layers=[]),
        dict(alpha=0.9),
        dict(crosshair=False),
        dict(map=""),
    ):
        ((k, x),) = change.items()
        old = getattr(v, k)
        setattr(v, k, x)
        assert v.poster() not in seen, k
        setattr(v, k, old)
        if k == "preset":
            v.preset = "lung"
    assert v.poster() == first


def test_map_fades_out_at_zero(scan):
    b, table = to_bytes(scan.voxels), grey_table(-600, 1500)
    plain = np.array(draw_plane(b, scan.grid, "axial", (3, 4, 5), table, scale=2))
    none = np.array(
        draw_plane(
            b, scan.grid, "axial", (3, 4, 5), table, heat=np.zeros(SHAPE, "u1"), alpha=1.0, scale=2
        )
    )
    full = np.array(
        draw_plane(
            b,
            scan.grid,
            "axial",
            (3, 4, 5),
            table,
            heat=np.full(SHAPE, 255, "u1"),
            alpha=1.0,
            scale=2,
        )
    )
    assert (plain == none).all() and len(np.unique(full.reshape(-1, 3), axis=0)) == 1


def test_letters_need_an_orientation(scan):
    b, table = to_bytes(scan.voxels), grey_table(-600, 1500)
    with_, without = (
        np.array(still_image(b, scan.grid, (1, 2, 3), table, known=k)) for k in (True, False)
    )
    assert (with_ != without).any()


# ---------------------------------------------------------------- what is written
def test_hostile_names_stay_text(scan, masks):
    v = view(scan.replace(scan_id=EVIL), {EVIL: heat(scan)}, {EVIL: masks["truth"]})
    page = v.page()
    assert "<img" not in page and page.count("</script>") == 2 and EVIL not in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert (
        data["state"]["meta"]["title"] == data["state"]["layers"][0] == data["state"]["map"] == EVIL
    )
    frame = v.frame()
    assert (
        frame.count("<img") == 1
        and re.search(r'srcdoc="([^"]*)"', frame)
        and html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page
    )
    assert "onerror=\"" not in frame and "<" not in script_json(EVIL)


def test_page_is_whole(scan, masks, tmp_path):
    v = VolumeViewer(scan, masks, heat(scan), title="A & B")
    page = v.page()
    assert (
        page.startswith('<!doctype html><html lang="en">')
        and "<title>A &amp; B</title>" in page
        and 'name="viewport"' in page
    )
    assert not re.findall(r"(?:src|href)=[\"']?https?:|import\s*\(|fetch\(|@import", page)
    assert v.save(tmp_path / "a.html").read_text("utf-8") == page and [
        f.name for f in tmp_path.iterdir()
    ] == ["a.html"]
    with pytest.raises(DataError, match="no such folder"):
        v.save(tmp_path / "b" / "a.html")
    alt = re.search(r'<img alt="([^"]+)"', v.frame())[1]
    assert (
        "Axial, coronal and sagittal" in alt
        and "outlined: truth, other" in alt
        and "lung window" in alt
    )


def test_large_scans_are_averaged_in_the_page_only(scan, masks):
    v = VolumeViewer(scan, masks, max_voxels=600)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', v.page(), re.S)[1])
    shape = data["state"]["meta"]["shape"]
    assert math.prod(shape) <= 600 and all(
        0 <= i < n for i, n in zip(data["state"]["index"], shape, strict=False)
    )
    assert "averaged to" in data["header"]["note"]
    header, (volume, *_) = v.message()
    assert (
        header["parts"][0]["shape"] == SHAPE
        and (
            np.frombuffer(gzip.decompress(volume), "u1").reshape(SHAPE) == to_bytes(scan.voxels)
        ).all()
    )
    old, new = (
        scan.grid.to_mm(v.index),
        shrink_grid(scan.grid, tuple(shape)).to_mm(data["state"]["index"]),
    )
    assert np.abs(old - new).max() <= max(data["state"]["meta"]["spacing"]) / 2 + 0.01


def test_voxels_are_never_state(scan, masks):
    v = VolumeViewer(scan, masks, heat(scan))
    assert len(json.dumps({k: x for k, x in v.get_state().items() if k != "_esm"})) < 6000
    sent = []
    v.send = lambda content, buffers=None: sent.append((content, buffers))
    v._handle_custom_msg({"kind": "something else"}, [])
    assert not sent
    v._handle_custom_msg({"kind": "want voxels"}, [])
    ((header, buffers),) = sent
    assert (
        header["kind"] == "voxels"
        and [p["role"] for p in header["parts"]] == ["volume", "masks", "map"]
        and len(buffers) == 3
    )
    bundle, _ = v._repr_mimebundle_()
    assert (
        bundle["text/plain"] == _alt_of(v)
        and "data-covid-ct" in bundle["text/html"]
        and "application/vnd.jupyter.widget-view+json" in bundle
    )


def test_compare(scan, masks):
    fig = view_side_by_side(
        scan, {"a": heat(scan), "b": heat(scan)}, masks, planes=("axial", "sagittal")
    )
    panels = [ax for ax in fig.axes if ax.get_xlabel()]
    assert (
        len(panels) == 6
        and {ax.images[1].get_clim() for ax in panels if len(ax.images) > 1} == {(0, 1)}
        and "a, b" in fig.alt
    )
    with pytest.raises(DataError, match="no maps"):
        view_side_by_side(scan, {})
    with pytest.raises(DataError, match="unknown plane"):
        view_side_by_side(scan, [heat(scan)], planes=("oblique",))


# ---------------------------------------------------------------- side by side, and profiles
def test_profile_is_a_mean_of_slices(scan):
    gate = np.linspace(0.1, 0.9, SHAPE[0])
    flat = Map(np.broadcast_to(gate[:, None, None], SHAPE), scan.grid)
    assert np.allclose(slice_profile(flat), gate) and np.allclose(
        slice_profile(flat, "coronal"), gate.mean()
    )
    m = heat(scan)
    for k, plane in enumerate(("axial", "coronal", "sagittal")):
        slow = [np.take(m.values, i, k).mean(dtype=float) for i in range(SHAPE[k])]
        assert np.allclose(slice_profile(m, plane), slow)
    with pytest.raises(DataError, match="unknown plane"):
        slice_profile(m, "oblique")


def test_side_by_side_state_still_and_words(scan, masks):
    v = view(
        scan,
        {"A": heat(scan), "B": Map(1 - heat(scan).values, scan.grid)},
        masks,
        title="T",
        unit="share",
        side="coronal",
    )
    assert (
        v.meta["unit"] == "share"
        and _alt_of(v).startswith("Coronal plane of T")
        and "side by side: the scan, A, B" in _alt_of(v)
    )
    im = np.array(Image.open(io.BytesIO(v.poster(402))).convert("RGB")).astype(int)
    four = [im[:, i * 100 : i * 100 + 98] for i in range(4)]  # scan, outlines, A, B
    assert all(np.abs(four[i] - four[j]).mean() > 1 for i in range(4) for j in range(i))
    assert '"side": "coronal"' in v.page()
    v.side = ""
    assert _alt_of(v).startswith("Axial, coronal and sagittal")
    with pytest.raises(DataError):
        v.side = "all"
    assert (
        v.side == "" and VolumeViewer(scan, side="axial").poster()
    )  # without maps or masks: the scan alone
