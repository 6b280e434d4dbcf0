import numpy as np
import pytest

from covid_ct.phantom.chest import make_phantom
from covid_ct.preprocess.body import (
    find_trachea,
    flood_airways,
    hu_warnings,
    inside_body,
    regions,
    wide_airways,
    working_copy,
)
from covid_ct.preprocess.lung_warnings import lung_region, mask_warnings
from covid_ct.preprocess.lungs import (
    _choose_lungs,
    _closed,
    _fill_lung,
    _grown,
    costal_gaps,
    dice,
    lung_mask,
    lung_volume_l,
    two_sides,
)
from covid_ct.scan import NotAChestError, ReadError, Scan, UnitsError

SHAPE = (64, 96, 96)


@pytest.fixture(scope="module")
def healthy():
    return make_phantom("healthy", seed=5, shape=SHAPE)


def changed(p, voxels, **kw):
    return p.scan.replace(voxels=voxels, **kw)


# ── measures ──────────────────────────────────────────────────────────────────────────────────────
def test_dice_by_hand():
    assert dice([1, 1, 0, 0], [1, 0, 1, 0]) == 0.5
    assert dice([0, 0], [0, 0]) == 1 and dice([1, 1], [0, 0]) == 0 and dice([1], [1]) == 1
    a, b = np.random.default_rng(0).random((2, 5, 6, 7)) > 0.5
    assert (
        dice(a, b)
        == dice(b, a)
        == 2 * sum(x and y for x, y in zip(a.flat, b.flat, strict=False)) / (a.sum() + b.sum())
    )
    with pytest.raises(ValueError, match="shapes"):
        dice(np.ones((2, 2)), np.ones((2, 3)))


def test_volume_in_litres():
    s = Scan(np.arange(8, dtype="i2").reshape(2, 2, 2), (10.0, 5.0, 4.0))
    assert lung_volume_l(np.ones((2, 2, 2), bool), s) == pytest.approx(8 * 200 / 1e6)


# ── pieces ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "mm,spacing",
    [
        (3.0, (1.0, 1.0, 1.0)),
        (4.0, (2.0, 1.5, 1.0)),
        (5.0, (8.0, 1.0, 1.0)),
        (0.5, (1.0, 1.0, 1.0)),
    ],
)
def test_growing_by_a_ball_is_a_distance(mm, spacing):
    ndimage = pytest.importorskip("scipy.ndimage")
    m = np.random.default_rng(1).random((9, 14, 15)) > 0.985
    assert m.any()
    assert (
        _grown(m, mm, spacing)
        == (ndimage.distance_transform_edt(~m, sampling=spacing) <= mm + 1e-6)
    ).all()
    assert not _grown(m & False, mm, spacing).any()


def test_closing_fills_a_gap_and_no_more():
    m = np.zeros((12, 40, 40), bool)
    m[2:10, 5:35, 5:35] = True
    m[4:8, 18:23, 5:35] = False  # a canal 5 mm wide
    assert (_closed(m, 3.0, (1.0, 1.0, 1.0)) >= m).all() and _closed(m, 3.0, (1.0, 1.0, 1.0))[
        5, 20, 15
    ]
    assert not _closed(m, 1.5, (1.0, 1.0, 1.0))[5, 20, 15]
    assert not _closed(m & False, 3.0, (1.0, 1.0, 1.0)).any()


def test_holes_are_filled_but_bays_are_not():
    m = np.zeros((3, 60, 60), bool)
    m[:, 5:55, 5:55] = True
    m[1, 20:45, 20:45] = False
    assert _fill_lung(m, (5.0, 1.0, 1.0))[1, 32, 32]
    m[:, 20:45, 45:] = False
    assert not _fill_lung(m, (5.0, 1.0, 1.0))[1, 32, 52]


def test_two_sides_and_one():
    m = np.zeros((30, 60, 90), bool)
    m[2:28, 10:50, 5:42], m[2:28, 10:50, 48:85] = True, True
    m[10:20, 12:14, 42:48] = True  # they touch in front
    side = two_sides(m, (3.0, 2.5, 2.5))
    assert set(np.unique(side)) == {0, 1, 2} and ((side > 0) == m).all()
    assert (side[:, :, :42][m[:, :, :42]] == 1).all() and (side[:, :, 48:][m[:, :, 48:]] == 2).all()
    only = m.copy()
    only[:, :, 45:] = False
    assert set(np.unique(two_sides(only, (3.0, 2.5, 2.5)))) == {0, 1}
    assert not two_sides(m & False, (3.0, 2.5, 2.5)).any()


def test_the_liver_behind_a_thin_recess_is_no_gap():
    """A crescent of lung around a dome: what it hides from the ribs stays out; a bite out of its
    outer side goes in"""
    y, x = np.ogrid[:120, :120]
    r = np.hypot(y - 60, x - 60)
    ring = np.repeat(((r < 50) & (r > 40) & (x > 40))[None], 6, 0)
    s = Scan(np.full(ring.shape, 50, "f4") + np.arange(120), (5.0, 2.0, 2.0))
    assert not costal_gaps([ring], s)[0][:, r < 36].any()
    bite = np.repeat(((r < 50) & (x > 30))[None], 6, 0)
    hole = np.repeat((np.hypot(y - 60, x - 110) < 8)[None], 6, 0)
    gap = costal_gaps([bite & ~hole], s)[0]
    assert (
        not (gap & np.repeat((r > 52)[None], 6, 0)).any()
        and (gap & hole & bite).sum() > 0.3 * (hole & bite).sum()
    )
    assert (_fill_lung(bite & ~hole | gap, s.spacing) & hole & bite).sum() > 0.5 * (
        hole & bite
    ).sum()
    bone = s.replace(voxels=np.full(ring.shape, 600, "f4") + np.arange(120))
    assert not costal_gaps([bite & ~hole], bone)[0].any()


def test_trachea_and_bronchi_are_found_and_do_not_leak(healthy):
    copy = working_copy(healthy.scan)
    inside = inside_body(copy)
    air = inside & (copy.voxels < -400)
    seed = find_trachea(air, inside, copy.spacing)
    tubes = flood_airways(copy.voxels, seed, copy.spacing)
    truth = working_copy(changed(healthy, healthy.airways.astype("f4"))).voxels > 0.3
    assert seed.any() and (seed & truth).sum() > 0.8 * seed.sum()
    assert lung_volume_l(tubes, copy) < 0.15
    lungs = _choose_lungs(air & ~tubes, copy)
    assert (
        wide_airways(tubes, copy.spacing) & healthy.lungs
    ).sum() < 0.02 * healthy.lungs.sum() and lungs.any()
    assert not find_trachea(air & False, inside, copy.spacing).any()


# ── phantoms ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "label,seed",
    [("healthy", 11), ("healthy", 12), ("ild", 13), ("covid", 14), ("covid", 15), ("cap", 16)],
)
def test_phantoms(label, seed):
    p = make_phantom(label, seed=seed, shape=SHAPE)
    m = lung_mask(p.scan)
    assert m.dtype == bool and m.shape == p.scan.shape
    assert dice(m, p.lungs) > (0.95 if label in ("healthy", "ild") else 0.92)
    if label in ("healthy", "ild"):
        assert abs(lung_volume_l(m, p.scan) / lung_volume_l(p.lungs, p.scan) - 1) < 0.05
    if label == "covid":
        assert m[p.infection].mean() > 0.5  # the rest is consolidation at the chest wall
    assert (m & p.airways).sum() < 0.25 * p.airways.sum()


def test_full_resolution_follows_the_scan_and_not_its_copy():
    p = make_phantom("healthy", seed=6, shape=(40, 256, 256))
    assert working_copy(p.scan).shape != p.scan.shape
    assert dice(lung_mask(p.scan), p.lungs) > 0.96


def corrupt(p, name):
    "The harm, and the lungs that are left"
    v, lungs = p.scan.voxels, p.lungs
    y, x = np.ogrid[-1 : 1 : v.shape[1] * 1j, -1 : 1 : v.shape[2] * 1j]
    right = np.arange(v.shape[2]) < v.shape[2] // 2
    if name.startswith("padding"):
        return changed(
            p, np.where((y**2 + x**2 > 1)[None], int(name.split()[1]), v).astype("i2")
        ), lungs
    if name == "right lung white":
        return changed(p, np.where(lungs & right, 40, v).astype("i2")), lungs & ~right
    if name == "left lung white":
        return changed(p, np.where(lungs & ~right, 40, v).astype("i2")), lungs & right
    if name == "noise":
        return changed(p, v + np.random.default_rng(0).normal(0, 100, v.shape).astype("f4")), lungs
    if name == "clipped":
        return changed(p, np.clip(v, -1000, 200)), lungs
    if name == "prone":
        return changed(p, v[:, ::-1]), lungs[:, ::-1]
    if name == "slices reversed":
        return changed(p, v[::-1]), lungs[::-1]
    k = np.flatnonzero(lungs.any((0, 1)))
    cut = slice(k[0] + 2, k[-1] - 1)
    if name == "narrow":
        return changed(p, v[:, :, cut]), lungs[:, :, cut]
    if name == "thick":
        return changed(p, v[::2], spacing=(p.scan.spacing[0] * 2, *p.scan.spacing[1:])), lungs[::2]
    raise KeyError(name)


@pytest.mark.parametrize(
    "name",
    [
        "padding -3024",
        "padding -2048",
        "padding 0",
        "right lung white",
        "left lung white",
        "noise",
        "clipped",
        "prone",
        "slices reversed",
        "narrow",
        "thick",
    ],
)
def test_what_real_scans_do(healthy, name):
    scan, lungs = corrupt(healthy, name)
    assert dice(lung_mask(scan), lungs) > 0.95


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────
def test_not_a_chest(healthy):
    v, z = healthy.scan.voxels, np.flatnonzero(healthy.lungs.any((1, 2)))
    body = np.where(healthy.lungs, 40, v).astype("i2")
    for bad in (v[: z[0] + (z[-1] - z[0]) // 6], body, v[z[-1] :]):
        with pytest.raises(NotAChestError) as e:
            lung_mask(changed(healthy, bad, source="odd.nii.gz"))
        assert (
            e.value.source == "odd.nii.gz"
            and " l that look like lung" in e.value.fault
            and "chest" in e.value.remedy
        )
    air = np.full(v.shape, -1000, "i2") + np.arange(v.shape[2], dtype="i2")
    with pytest.raises(NotAChestError):
        lung_mask(changed(healthy, air))
    with pytest.raises(NotAChestError, match="masked"):
        lung_mask(changed(healthy, np.where(healthy.lungs, v, -1024).astype("i2")))


def test_not_hu(healthy):
    v = healthy.scan.voxels
    grey = np.clip((v + 1350.0) / 1500 * 255, 0, 255).astype("u1")
    for bad in (
        changed(healthy, grey, units="uint8"),
        changed(healthy, np.clip(v, -160, 240)),
        changed(healthy, v.astype("i4").clip(-1024) + 1024),
        changed(healthy, (v / 1000).astype("f4")),
    ):
        with pytest.raises(UnitsError):
            lung_mask(bad)


def test_warnings_are_sentences(healthy):
    v = healthy.scan.voxels
    assert hu_warnings(healthy.scan) == ()
    for bad, word in (
        (np.clip(v, -160, 240), "air peak"),
        (np.clip(v, -1024, 250), "highest"),
        (np.clip(v, -900, 3000), "lowest"),
        (np.where(healthy.lungs, v, -1024), "masked"),
        (np.where(v < -990, -3024, v), "padding"),
    ):
        said = hu_warnings(changed(healthy, bad.astype("i2")))
        assert any(word in s for s in said) and all(
            s[0].isupper() and s.endswith(".") for s in said
        )
    assert (
        "uint8"
        in hu_warnings(changed(healthy, (v // 16 + 64).clip(0, 255).astype("u1"), units="uint8"))[0]
    )


def test_regions_count_every_voxel():
    m = np.random.default_rng(3).random((5, 9, 9)) > 0.6
    for in_plane in (False, True):
        labels, size = regions(m, in_plane)
        assert size.sum() == m.size and size[0] == (~m).sum() and ((labels > 0) == m).all()
    assert len(regions(m, True)[1]) >= len(regions(m)[1])


# ── warnings about a mask ─────────────────────────────────────────────────────────────────────────
def spoilt(p, name):
    "A scan and a mask that is wrong in one way"
    m, v = p.lungs.copy(), p.scan.voxels
    x = np.arange(m.shape[2])
    z = np.flatnonzero(m.any((1, 2)))
    middle = slice(z[0] + len(z) // 2, z[0] + len(z) // 2 + 4)
    if name == "slices":
        m[middle] = False
    if name == "jump":
        m[middle, :, x < m.shape[2] // 2] = False
    if name == "right":
        m[:, :, x < m.shape[2] // 2] = False
    if name == "left":
        m[:, :, x > m.shape[2] // 2] = False
    if name == "small":
        return p.scan.replace(spacing=np.divide(p.scan.spacing, 1.6)), m
    if name == "large":
        return p.scan.replace(spacing=np.multiply(p.scan.spacing, 1.4)), m
    if name == "empty":
        return p.scan, m & False
    if name == "narrow":
        k = np.flatnonzero(m.any((0, 1)))
        cut = slice(k[0] + 3, k[-1] - 2)
        return p.scan.replace(voxels=v[:, :, cut]), m[:, :, cut]
    if name == "short":
        return p.scan.replace(voxels=v[: middle.start]), m[: middle.start]
    if name == "padded":
        k = np.flatnonzero(m.any((0, 1)))
        out = np.broadcast_to(x < k[0] + 3, v.shape)
        return p.scan.replace(voxels=np.where(out, -3024, v).astype("i2")), m & ~out
    return p.scan, m


@pytest.mark.parametrize(
    "name,word",
    [
        ("slices", "No lung in"),
        ("jump", "jumps by"),
        ("right", "right lung is missing"),
        ("left", "left lung is missing"),
        ("small", "Both lungs of an adult"),
        ("large", "Both lungs of an adult"),
        ("empty", "is empty"),
        ("narrow", "field of view cuts"),
        ("padded", "field of view cuts"),
        ("short", "its last slice"),
    ],
)
def test_a_wrong_mask_says_so(healthy, name, word):
    scan, mask = spoilt(healthy, name)
    said = mask_warnings(mask, scan)
    assert any(word in s for s in said), said
    assert all(s[0].isupper() and s.endswith(".") for s in said)


@pytest.mark.parametrize("label", ["healthy", "cap", "covid", "ild"])
@pytest.mark.parametrize(
    "knobs", [dict(shape=(40, 64, 64)), dict(shape=SHAPE), dict(shape=SHAPE, slice_mm=10)]
)
def test_a_right_mask_says_nothing(label, knobs):
    "A large effusion lies outside the right mask too: its sentence, and no other, may be there"
    for seed in range(4):
        p = make_phantom(label, seed, **knobs)
        said = mask_warnings(p.lungs, p.scan)
        if p.effusion.sum() * p.scan.grid.voxel_ml > 200:
            said = tuple(s for s in said if "lung is expected on the" not in s)
        assert said == ()


def test_a_mask_of_another_grid_is_refused(healthy):
    with pytest.raises(ValueError, match="does not fit"):
        mask_warnings(healthy.lungs[1:], healthy.scan)


# ── real scans ────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.data
def test_the_small_chest_of_the_chest_imaging_platform(data_dir):
    from covid_ct.io.read import read, read_mask

    scan = read(data_dir / "cip_small_chest/ct-64.nrrd")
    truth = read_mask(data_dir / "cip_small_chest/wholeLung-64.nrrd", scan).astype(bool)
    m = lung_mask(scan)
    assert dice(m, truth) >= 0.98
    assert abs(m.sum() / truth.sum() - 1) < 0.05
    assert dice(lung_mask(read(data_dir / "cip_small_chest/ct-64Dicom")), m) > 0.999


@pytest.mark.data
def test_two_kernels_of_one_patient_agree(data_dir):
    from covid_ct.io.read import read

    scans = [
        read(data_dir / "tcia_lung_pet_ct_dx" / k)
        for k in ("A0001_lungkernel_L", "A0001_softkernel_B")
    ]
    masks = [lung_mask(s) for s in scans]
    litres = [lung_volume_l(m, s) for m, s in zip(masks, scans, strict=False)]
    assert abs(litres[0] / litres[1] - 1) < 0.03 and 3 < litres[0] < 8
    assert dice(*masks) >= 0.99
    assert hu_warnings(scans[0]) == hu_warnings(scans[1]) == ()


@pytest.mark.data
def test_a_real_chest_cut_and_padded(data_dir):
    from covid_ct.io.read import read

    s = read(data_dir / "cip_small_chest/ct-64.nrrd")
    m, v = lung_mask(s), s.voxels
    y, x = np.ogrid[-1 : 1 : v.shape[1] * 1j, -1 : 1 : v.shape[2] * 1j]
    for pad in (-3024, 0):
        assert (
            dice(lung_mask(s.replace(voxels=np.where((y**2 + x**2 > 1)[None], pad, v))), m) > 0.99
        )
    cut = slice(5, 59)
    assert dice(lung_mask(s.replace(voxels=v[:, :, cut])), m[:, :, cut]) > 0.97
    z = np.flatnonzero(m.any((1, 2)))
    with pytest.raises(NotAChestError, match="no trachea"):
        lung_mask(s.replace(voxels=v[: z[0] + (z[-1] - z[0]) // 4]))
    half = s.replace(voxels=v[::2], spacing=(2 * s.spacing[0], *s.spacing[1:]))  # slices of 8 mm
    assert dice(lung_mask(half), m[::2]) > 0.97


@pytest.mark.data
@pytest.mark.parametrize("name", ["example_ct.nii.gz", "example_ct_sm.nii.gz", "example_ct_dicom"])
def test_the_abdomen_is_refused(data_dir, name):
    from covid_ct.io.read import read

    refusals = (
        (NotAChestError, ReadError) if name.endswith("dicom") else NotAChestError
    )  # its headers name no series
    with pytest.raises(refusals):
        lung_mask(read(data_dir / "totalsegmentator" / name))


# ── sick chests ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "state",
    [
        "raised_diaphragm",
        "one_lung",
        "emphysema",
        "cavities",
        "bronchiectasis",
        "contrast",
        "arms",
        "zoomed",
    ],
)
def test_states_of_sick_patients(state):
    for seed in (0, 3):
        p = make_phantom("healthy", seed, SHAPE, states=(state,))
        assert dice(lung_mask(p.scan), p.lungs) >= 0.97


@pytest.mark.parametrize(
    "state,word",
    [
        ("total_pneumothorax", "is not counted as lung"),
        ("pneumothorax", "is not counted as lung"),
        ("one_lung", "lung is missing"),
        ("zoomed", "field of view cuts"),
    ],
)
def test_states_that_a_warning_names(state, word):
    p = make_phantom("healthy", 1, SHAPE, states=(state,))
    m = lung_mask(p.scan)
    assert any(word in s for s in mask_warnings(m, p.scan))
    middle = p.lungs.shape[2] // 2
    for half in (np.s_[:, :, :middle], np.s_[:, :, middle:]):  # the healthy lung is whole
        if p.lungs[half].sum() > 0.5 * p.lungs.sum():
            assert m[half][p.lungs[half]].mean() > 0.95


def test_dense_covid_at_the_wall_is_kept():
    lost, ill = 0, 0
    for seed in range(6):
        p = make_phantom("covid", seed, (64, 128, 128))
        m = lung_mask(p.scan)
        sick = p.infection & p.lungs
        lost, ill = lost + (sick & ~m).sum(), ill + sick.sum()
        assert dice(m, p.lungs) >= 0.97
    assert lost / ill < 0.03


@pytest.mark.data
@pytest.mark.parametrize("name,litres", [("cap001", (5, 7)), ("P001", (5.5, 7))])
def test_sick_patients(data_dir, name, litres):
    "No slice without lung, both lungs, no warning; the bright spine and the trachea are outside"
    from scipy import ndimage

    from covid_ct.io.read import read

    scan = read(data_dir / "covid_ct_md" / name)
    m = lung_mask(scan)
    z = np.flatnonzero(m.any((1, 2)))
    assert len(z) == z[-1] - z[0] + 1 and len(z) > 135
    side = two_sides(m, scan.spacing)
    right, left = (lung_volume_l(side == k, scan) for k in (1, 2))
    assert min(right, left) > 0.75 * max(right, left) and litres[0] < right + left < litres[1]
    assert mask_warnings(m, scan) == ()
    bone = scan.voxels > 250
    assert (m & ndimage.binary_opening(bone, iterations=2)).sum() < 0.001 * m.sum()
    copy = working_copy(scan, 3.0)
    inside = inside_body(copy)
    seed = find_trachea(inside & (copy.voxels < -880), inside, copy.spacing)
    z, y, x = (
        np.round((np.argwhere(seed) + 0.5) * np.divide(scan.shape, copy.shape) - 0.5).astype(int).T
    )
    assert seed.any() and m[z, y, x].mean() < 0.02


# ── the region that masking keeps ─────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("seeds", [range(0, 4), range(4, 8)])
def test_the_region_keeps_dense_disease_in_both_classes(seeds):
    share = {}
    for label in ("cap", "covid"):
        lost, size = [], []
        for seed in seeds:
            p = make_phantom(label, seed, SHAPE)
            region, ill = lung_region(p.scan), p.infection & p.lungs
            lost.append((ill & ~region).sum() / ill.sum())
            size.append(region.sum() / p.lungs.sum())
        assert np.mean(lost) < 0.02 and max(lost) < 0.05
        share[label] = np.mean(size)
    assert abs(share["cap"] - share["covid"]) < 0.1  # the region does not tell the class


@pytest.mark.parametrize("state", ["lobar_consolidation", "effusion"])
def test_the_region_keeps_what_a_sick_side_lacks_and_a_warning_names_it(state):
    for seed in (0, 1):
        p = make_phantom("healthy", seed, SHAPE, states=(state,))
        m = lung_mask(p.scan)
        region = lung_region(p.scan, m)
        assert (region >= m).all() and region[p.lungs].mean() > 0.99
        assert any("lung is expected on the" in s for s in mask_warnings(m, p.scan))


def test_the_region_of_a_turned_chest():
    "The plane of a chest that is shifted from slice to slice is tilted"
    p = make_phantom("cap", 2, SHAPE)
    v, m, lungs = p.scan.voxels.copy(), lung_mask(p.scan), p.lungs.copy()
    m = m.copy()
    for z in range(len(v)):
        k = round((z - 32) / 10)
        v[z], m[z], lungs[z] = (np.roll(a[z], k, axis=1) for a in (v, m, lungs))
    region = lung_region(changed(p, v), m)
    assert region[lungs].mean() > 0.99


def test_a_healthy_chest_gets_no_warning_of_missing_lung():
    for seed in range(6):
        p = make_phantom("healthy", seed, SHAPE)
        assert not any("is expected" in s for s in mask_warnings(lung_mask(p.scan), p.scan))


def test_the_region_of_what_is_not_hu_or_empty_is_the_mask(healthy):
    grey = changed(healthy, np.full(SHAPE, 7, "u1") + np.arange(96, dtype="u1"), units="uint8")
    assert (lung_region(grey, healthy.lungs) == healthy.lungs).all()
    assert not lung_region(healthy.scan, healthy.lungs & False).any()
