"""The audit: every fault alone is found and nothing else is, over volumes and over slice images;
baselines; reports; bad input"""

import functools
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covid_ct.audit.audit import audit, run_audit
from covid_ct.audit.findings import CHECKS, file_facts, find_pairs, list_findings
from covid_ct.audit.shortcuts import (
    FACT_SETS,
    guess_labels,
    score_guesses,
    separable,
    shortcut_baselines,
)
from covid_ct.audit.voxels import (
    _far_likeness,
    _step_ratios,
    _wiped_voxels,
    background_facts,
    content_hash,
    count_misplaced,
    informative_slices,
    is_masked,
    repeated_slices,
    slice_direction,
    slice_hashes,
    small_greys,
    vessel_print,
    vessel_similarity,
    widest_step,
)
from covid_ct.cohort.table import read_cohort, write_cohort
from covid_ct.io.read import read, write_mask, write_scan
from covid_ct.phantom.chest import SWITCHES, make_phantom, random_stream
from covid_ct.phantom.cohort import phantom_cohort, phantom_of
from covid_ct.preprocess.lungs import lung_mask
from covid_ct.scan import CohortError, DataError
from covid_ct.widgets.gallery import Gallery, cards_of, gallery, gallery_page

SHAPE = (40, 64, 64)
CALLED = dict(
    masked="masked", reversed="reversed", repeated="repeats", missing="missing", shuffled="order"
)
SEEDS = (7, 33)


@functools.lru_cache(None)
def phantoms(seed):
    "Six patients and their phantoms, each drawn once"
    df = phantom_cohort(6, seed=seed, second_scan=0)
    return df, [phantom_of(r, shape=SHAPE) for r in df.to_dict("records")]


def spoilt(seed, fault):
    """The table with the scans of every third patient spoilt, the phantoms, and the ids of the
    spoilt"""
    df, clean = phantoms(seed)
    hit = [i % 3 == 1 and fault is not None for i in range(len(df))]
    made = [
        SWITCHES[fault](p, random_stream(seed, i)) if h else p
        for i, (p, h) in enumerate(zip(clean, hit, strict=False))
    ]
    return df, made, set(df.scan_id[hit])


def as_volumes(df, made, out):
    for i, p in zip(df.scan_id, made, strict=False):
        write_scan(p.scan, out / f"{i}.nii.gz")
    write_cohort(
        df.assign(path=[f"{i}.nii.gz" for i in df.scan_id])[
            ["patient_id", "scan_id", "label", "path"]
        ],
        out / "cohort.csv",
    )


def as_pictures(df, made, out):
    "Slices from the feet to the head in one window, as PNG, numbered without a gap"
    for r, p in zip(df.itertuples(), made, strict=False):
        folder = out / r.label / r.patient_id / r.scan_id
        folder.mkdir(parents=True)
        grey = np.rint(np.clip((p.scan.voxels + 1250.0) / 1500, 0, 1) * 255).astype("u1")
        for k, s in enumerate(grey):
            Image.fromarray(s).save(folder / f"{k:04d}.png", compress_level=1)
    return out


WRITERS = dict(
    volumes=lambda df, made, out: as_volumes(df, made, out) or out / "cohort.csv",
    pictures=as_pictures,
)


def missed_ml(phantom):
    "Lung that the built-in mask leaves out"
    missed = phantom.lungs & ~lung_mask(phantom.scan)
    return missed.sum() * phantom.scan.grid.voxel_ml


@pytest.mark.parametrize("seed", [SEEDS[0], pytest.param(SEEDS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("fault", [None, *CALLED])
def test_one_fault_alone(fault, kind, seed, tmp_path):
    "Recall 1, no false alarm; a mask that misses much lung may be said of the scans where it does"
    df, made, bad = spoilt(seed, fault)
    a = run_audit(WRITERS[kind](df, made, tmp_path), progress=False)
    found = {(i, c) for i, c in zip(a.findings.scan_id, a.findings.check, strict=False)}
    lungs = {(i, c) for i, c in found if c == "lungs"} if CALLED.get(fault) != "lungs" else set()
    assert all(missed_ml(made[list(df.scan_id).index(i)]) > 200 for i, _ in lungs)
    assert found - lungs == {(i, CALLED[fault]) for i in bad}, a.findings.to_string()
    assert a.clean == (not found) and len(a.facts) == len(df)


@pytest.mark.parametrize(
    "seed", [5, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_leaked_patients(seed):
    """Every scan of a person who stands under two ids, and nobody else; two scans under one id are
    no leak"""
    df = phantom_cohort(8, seed=seed, second_scan=0.1, leaked=3)
    a = audit(df, load=lambda r: phantom_of(r, shape=(48, 96, 96)).scan, progress=False, n=50)
    ids = df.groupby("patient").patient_id.nunique()
    bad = set(df.scan_id[df.patient.isin(ids.index[ids > 1])])
    assert set(a.findings.check) == {"leak"} and set(a.findings.scan_id) == bad, (
        a.findings.to_string()
    )


def test_moved_block_rotation_and_near_swap():
    p = phantoms(SEEDS[0])[1][2]
    g = small_greys(p.scan.voxels)[0]
    assert count_misplaced(g) == 0 == count_misplaced(g[::-1])
    for order in (
        np.r_[15:40, 0:15],
        np.r_[10:20, 0:10, 20:40],
        np.r_[0:12, 20:40, 12:20],
        sorted(range(40), key=str),
    ):
        assert count_misplaced(g[list(order)]) >= 1, order
    assert len(_far_likeness(g[:8])) == 8 and (_far_likeness(g[:8]) == 1).all()


def test_far_likeness_by_loops():
    g = small_greys(phantoms(SEEDS[0])[1][1].scan.voxels)[0].astype("f8")[
        np.random.default_rng(0).permutation(40)
    ]
    for i, f in enumerate(_far_likeness(g)):
        d = [((a - g[i]) ** 2).sum() for a in g]
        far = min(d[j] for j in range(40) if abs(j - i) > 3)
        near = sorted(d[j] for j in range(40) if 0 < abs(j - i) <= 3)[1]
        assert f == pytest.approx(far / near, rel=1e-6)


def test_gaps_do_not_depend_on_contrast_or_direction():
    g = small_greys(phantoms(SEEDS[0])[1][0].scan.voxels)[0].astype("f8")
    assert np.allclose(_step_ratios(g), _step_ratios(g[::-1])[::-1], atol=1e-9)
    assert np.abs(_step_ratios(g) - _step_ratios(0.5 * g)).max() < 0.01
    assert _step_ratios(np.delete(g, 18, 0)).max() > _step_ratios(g).max() and _step_ratios(
        g[:5]
    ).tolist() == [0.0]


@pytest.mark.parametrize("turn", ["flip front", "quarter turn", "mirror"])
def test_direction_needs_no_front(turn):
    s = small_greys(phantoms(SEEDS[0])[1][0].scan.voxels)
    a, b = (
        {
            "flip front": x[:, ::-1],
            "quarter turn": np.rot90(x, axes=(1, 2)),
            "mirror": x[:, :, ::-1],
        }[turn]
        for x in s
    )
    assert slice_direction(a, b) > 0.2 and slice_direction(a[::-1], b[::-1]) == pytest.approx(
        -slice_direction(a, b), abs=1e-6
    )


def test_no_lungs_no_direction():
    v = np.random.default_rng(0).normal(40, 10, (20, 64, 64)).astype("i2")
    assert (
        np.isnan(slice_direction(*small_greys(v)))
        and not is_masked(v)
        and not _wiped_voxels(v).any()
    )
    assert list_findings(
        pd.DataFrame(
            [dict(scan_id="a", patient_id="b", label="c", error="", units="HU", air=np.nan)]
        )
    ).check.tolist() == ["units"]


@pytest.mark.parametrize("severity", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("window", [(-1250, 250), (-1000, 400), (-1350, 150)])
def test_masked_in_any_window(severity, window):
    p = make_phantom("covid", 3, (24, 64, 64), severity=severity)
    cut = SWITCHES["masked"](p, None)

    def grey(v):
        return np.rint(
            np.clip((v - float(window[0])) / (window[1] - window[0]), 0, 1) * 255
        ).astype("u1")

    assert is_masked(cut.scan.voxels) and is_masked(grey(cut.scan.voxels), "uint8")
    assert not is_masked(p.scan.voxels) and not is_masked(grey(p.scan.voxels), "uint8")


def test_names_of_slices():
    v = np.arange(24).reshape(4, 2, 3)
    v[3] = 7
    names = slice_hashes(v)
    assert (
        names[3] == ""
        and len(set(names)) == 4
        and repeated_slices([*names, *names[:2]]) == 2
        and repeated_slices(["", ""]) == 0
    )
    assert (
        content_hash(names)
        == content_hash(names[::-1])
        == content_hash([*names, names[0]])
        != content_hash(names[1:])
    )
    assert slice_hashes(np.asfortranarray(v)) == names


def test_alike_in_blocks_and_by_hand():
    rng = np.random.default_rng(0)
    prints = rng.integers(-127, 128, (9, 8, 8, 8)).astype("i1")
    prints[:, :2] = -128
    prints[4] = prints[1]
    prints[8, 1:] = -128
    c = vessel_similarity(prints, 100)
    assert (
        np.allclose(c, vessel_similarity(prints, 100, block=4), equal_nan=True, atol=1e-5)
        and np.isnan(c[8, :8]).all()
        and c[1, 4] > 0.999
    )
    few = vessel_similarity(prints[:3], 100)  # below ten prints no mean is taken away
    f = prints[:3, 2:].reshape(3, -1).astype("f8")
    assert few[0, 1] == pytest.approx(
        f[0] @ f[1] / np.sqrt((f[0] @ f[0]) * (f[1] @ f[1])), abs=1e-5
    )


def test_reconstructions_of_one_session_are_one_person(data_dir):
    "Two kernels of one real patient, and another one: the first two agree, the third with none"
    home = data_dir / "tcia_lung_pet_ct_dx"
    scans = [
        read(home, series=0),
        read(home, series=1),
        read(data_dir / "cip_small_chest" / "ct-64.nrrd"),
    ]
    c = vessel_similarity([vessel_print(small_greys(s.voxels)[0]) for s in scans])
    assert c[0, 1] > 0.9 and not c[0, 2] > 0.5 and not c[1, 2] > 0.5
    for s in scans:
        g, e = small_greys(s.voxels)
        assert (
            count_misplaced(g) == 0
            and _step_ratios(g).max() < 0.58
            and slice_direction(g, e) > 0.25
            and not is_masked(s.voxels)
        )
        assert (
            slice_direction(g[::-1], e[::-1]) < -0.25
            and _step_ratios(np.delete(g, 30, 0)).max() > 0.58
            and count_misplaced(np.r_[g[20:], g[:20]]) >= 1
        )


def test_masked_pictures_are_seen_as_masked(data_dir):
    "MedSeg ships cut to the lungs"
    files = sorted((data_dir / "medseg100" / "im" / "256").glob("*.png"))[:20]
    assert is_masked(np.stack([np.asarray(Image.open(f).convert("L")) for f in files]), "uint8")


@pytest.mark.data
def test_cc_ccii_from_tables(data_dir, tmp_path):
    a = run_audit(data_dir / "cc_ccii_tables", report=tmp_path / "a.html", progress=False)
    f, t, b = a.facts, a.table(), a.baselines.set_index(["baseline", "what"])
    assert len(f) == 4178 and f.patient_id.nunique() == 2742
    assert f.groupby("label").size().to_dict() == dict(cap=1556, covid=1544, healthy=1078)
    assert f.groupby("label").patient_id.nunique().to_dict() == dict(
        cap=964, covid=929, healthy=849
    )
    assert t.loc["masked", ["cap", "covid", "healthy"]].tolist() == [5, 155, 606] and t.loc[
        "repeats", ["cap", "covid", "healthy"]
    ].tolist() == [228, 103, 71]
    assert (
        t.loc[["order", "reversed"], ["cap", "covid", "healthy"]].sum().tolist() == [96, 63, 0]
        and t.loc["reversed", "all"] == 98
    )
    assert "5 of 1549" in a.verdict and "155 of 1519" in a.verdict and "606 of 966" in a.verdict
    # the forests of others: 0.59 and 0.906, with the flag 0.64 and 0.934; another seed or depth
    # moves these by a hundredth
    for name, accuracy, area in (
        ("slice count", 0.59, 0.906),
        ("slice count and mask", 0.64, 0.934),
    ):
        assert (
            abs(b.value[name, "accuracy"] - accuracy) < 0.02
            and abs(b.value[name, "covid vs healthy"] - area) < 0.01
        )
        assert b.low[name, "covid vs healthy"] < area < b.high[name, "covid vs healthy"]
    assert (
        not a.clean
        and "Class healthy is separable by slice count alone" in a.verdict
        and "healthy" in (tmp_path / "a.html").read_text("utf-8")
    )


# ------------------------------------------------------------------ baselines


def facts_of(seed, shortcuts, n=18):
    df = phantom_cohort(n, seed=seed, second_scan=0.2, shortcuts=shortcuts)
    scans = [phantom_of(r, shape=(16, 64, 64)).scan for r in df.to_dict("records")]
    return (
        df[["patient_id", "scan_id", "label"]]
        .assign(n_slice=[s.shape[0] for s in scans], spacing_z=[s.spacing[0] for s in scans])
        .join(pd.DataFrame([background_facts(s.voxels) for s in scans]))
    )


@pytest.mark.parametrize(
    "shortcut,name,who",
    [
        (None, None, None),
        ("kernel", "background only", "covid"),
        pytest.param("masked", "background only", "healthy", marks=pytest.mark.slow),
        pytest.param("table", "background only", "covid", marks=pytest.mark.slow),
        pytest.param("slices", "file attributes", "covid", marks=pytest.mark.slow),
    ],
)
def test_shortcuts_are_found(shortcut, name, who):
    t = separable(shortcut_baselines(facts_of(3, (shortcut,) if shortcut else ()), 200))
    if name is None:
        assert not len(t), t.to_string()
    else:
        assert f"{who} vs rest" in set(t.what[t.baseline == name]), t.to_string()


def test_baselines_without_a_secret_stay_quiet():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(4):
        f = pd.DataFrame(
            dict(
                patient_id=np.arange(45),
                label=np.repeat(list("abc"), 15),
                n_slice=rng.integers(40, 90, 45),
            )
        )
        alarms += len(separable(shortcut_baselines(f, 200)))
    assert alarms <= 1


def test_patients_stay_whole():
    "A fact that names the patient and nothing else tells nothing, however many scans a patient has"
    rng = np.random.default_rng(1)
    who = np.repeat(np.arange(40), 6)
    f = pd.DataFrame(
        dict(
            patient_id=who,
            label=np.where(rng.permutation(40) % 2, "a", "b")[who],
            n_slice=rng.permutation(40)[who],
        )
    )
    s = score_guesses(guess_labels(f, ("n_slice",)), 200).set_index("what")
    assert s.low["a vs b"] < 0.5 + 0.15 and s.value["a vs b"] < 0.75


def test_scores_against_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    y, p = rng.integers(3, size=120), rng.dirichlet((1, 1, 1), 120)
    g = pd.DataFrame(
        dict(
            patient_id=np.arange(120) // 2,
            label=np.array(list("abc"))[y],
            prob_a=p[:, 0],
            prob_b=p[:, 1],
            prob_c=p[:, 2],
        )
    )
    s = score_guesses(g, 50).set_index("what").value
    assert s["a vs rest"] == pytest.approx(roc_auc_score(y == 0, p[:, 0])) and s[
        "accuracy"
    ] == pytest.approx((p.argmax(1) == y).mean())
    two = y != 1
    assert s["a vs c"] == pytest.approx(
        roc_auc_score(y[two] == 0, p[two, 0] / (p[two, 0] + p[two, 2]))
    )


def test_too_few_patients_say_so():
    f = pd.DataFrame(dict(patient_id=list("abcdefgh"), label=list("xxxxxyyy"), n_slice=range(8)))
    with pytest.raises(CohortError, match="1 class has 5"):
        guess_labels(f, ("n_slice",))
    t = shortcut_baselines(f)
    assert (
        t.value.isna().all()
        and t.note.str.len().gt(0).all()
        and set(t.baseline) <= set(FACT_SETS)
        and not len(separable(t))
    )


# ------------------------------------------------------------------ files, masks, bad input


@pytest.fixture()
def folder(tmp_path):
    "Four small volumes with masks, as a cohort on disk"
    rows = []
    for k in range(4):
        p = phantoms(SEEDS[0])[1][k]
        write_scan(p.scan, tmp_path / f"s{k}.nii.gz")
        write_mask(p.lungs, p.scan, tmp_path / f"m{k}.nii.gz")
        rows.append(
            dict(
                patient_id=f"P{k}",
                scan_id=f"s{k}",
                label=p.label,
                path=f"s{k}.nii.gz",
                lung_mask=f"m{k}.nii.gz",
            )
        )
    write_cohort(pd.DataFrame(rows), tmp_path / "cohort.csv")
    return tmp_path


def checks(folder):
    f = run_audit(folder / "cohort.csv", progress=False).findings
    return sorted(zip(f.scan_id, f.check, strict=False)), f


def test_files_masks_units_and_what_cannot_be_read(folder):
    assert checks(folder)[0] == []
    p = phantoms(SEEDS[0])[1][0]
    write_mask(
        p.lungs[:20],
        p.scan.replace(voxels=p.scan.voxels[:20]),
        folder / "m0.nii.gz",
        overwrite=True,
    )
    write_mask(
        9 * p.lungs.astype("u1"),
        phantoms(SEEDS[0])[1][1].scan,
        folder / "m1.nii.gz",
        overwrite=True,
    )
    (folder / "s2.nii.gz").write_bytes(b"no scan")
    s = phantoms(SEEDS[0])[1][3].scan
    write_scan(
        s.replace(voxels=np.where(s.voxels < -300, -300, s.voxels)),
        folder / "s3.nii.gz",
        overwrite=True,
    )
    seen, f = checks(folder)
    assert (
        [("s0", "mask grid"), ("s1", "mask labels"), ("s2", "unreadable")]
        == [x for x in seen if x[0] != "s3"]
        and ("s3", "units") in seen
        or ("s3", "unreadable") in seen
    )
    assert (f.remedy.str.len() > 10).all() and set(f.check) <= set(CHECKS)


def test_the_same_scan_under_other_ids(folder):
    (folder / "s1.nii.gz").write_bytes((folder / "s0.nii.gz").read_bytes())
    df = read_cohort(folder / "cohort.csv").drop(columns="lung_mask")
    write_cohort(df, folder / "cohort.csv")
    assert {x for x in checks(folder)[0] if x[1] == "leak"} == {("s0", "leak"), ("s1", "leak")}
    write_cohort(df.assign(patient_id=["P0", "P0", "P2", "P3"]), folder / "cohort.csv")
    assert {x for x in checks(folder)[0] if x[1] in ("leak", "duplicate")} == {
        ("s0", "duplicate"),
        ("s1", "duplicate"),
    }


def test_pairs_of_blanks_are_no_copies():
    f = pd.DataFrame(dict(scan_id=range(60), patient_id=range(60), label="x"))
    assert find_pairs(f, [["blank", f"own{i}"] for i in range(60)], [None] * 60) == []
    assert (
        len(
            find_pairs(
                f[:3], [["a", "b"], ["b", "c", "d", "e", "f"], ["a", "b", "z", "y"]], [None] * 3
            )
        )
        == 2
    )


@pytest.mark.parametrize(
    "names,lost,kind",
    [
        (["1.png", "2.png", "10.png"], 7, ".png"),
        (["a.png", "b.png"], 0, ".png"),
        (["im_003.jpg", "im_004.png", "im_005.jpg"], 0, ".jpg+.png"),
    ],
)
def test_file_facts(names, lost, kind, tmp_path):
    for n in names:
        Image.new("L", (4, 4)).save(tmp_path / n)
    assert file_facts(tmp_path) == dict(kind=kind, mode="L", lost_names=lost)


def test_any_error_is_a_row_and_the_batch_goes_on():
    df, made, _ = spoilt(SEEDS[0], None)
    by = dict(zip(df.scan_id, made, strict=False))

    def load(r):
        if r["scan_id"] == df.scan_id[0]:
            raise DataError("scan", "ends early", "Copy it again.")
        if r["scan_id"] == df.scan_id[1]:
            raise MemoryError("too large")
        return by[r["scan_id"]].scan

    a = audit(df, load=load, progress=False)
    assert (
        a.findings.check.tolist() == ["unreadable"] * 2
        and a.findings.remedy[0] == "Copy it again."
        and "MemoryError" in a.findings.value[1]
        and len(a.facts) == 6
    )


@pytest.mark.slow
def test_jobs_change_nothing(folder):
    one, two = (run_audit(folder / "cohort.csv", jobs=j, progress=False) for j in (1, 2))
    assert one.to_json() == two.to_json()


def test_what_a_script_and_a_reader_get(tmp_path):
    df, made, bad = spoilt(SEEDS[0], "reversed")
    a = run_audit(
        as_pictures(df, made, tmp_path / "set"), report=tmp_path / "r.html", progress=False
    )
    said = json.loads(a.to_json())
    assert (
        said["clean"] is False
        and {x["scan_id"] for x in said["findings"]} == bad
        and said["scans"] == 6
        and "NaN" not in a.to_json()
    )
    assert (
        set(a.thumbs) == bad
        and all(fig.alt for fig in a.figures().values())
        and "No scan is in HU" in a.verdict
    )
    page = (tmp_path / "r.html").read_text("utf-8")
    assert page.count("data:image/webp") == len(bad) and all(i in page for i in bad)
    assert a.load(sorted(bad)[0]).shape == SHAPE


def test_no_cohort_is_refused(tmp_path):
    with pytest.raises(CohortError):
        run_audit(tmp_path)
    with pytest.raises(CohortError):
        run_audit(tmp_path / "none.csv")


# ------------------------------------------------------------------ the gallery


def test_gallery_without_a_browser():
    df, made, bad = spoilt(SEEDS[0], "masked")
    by = {i: p.scan for i, p in zip(df.scan_id, made, strict=False)}
    a = audit(df, load=lambda r: by[r["scan_id"]], progress=False)
    g = gallery(a, most=1, max_voxels=20_000)
    assert (
        isinstance(g, Gallery)
        and {c["id"] for c in g.cards} == bad
        and g.viewer.scan.scan_id == g.scan.value
    )
    text = g._repr_mimebundle_()
    text = (text[0] if isinstance(text, tuple) else text)["text/html"]
    assert "data-gallery" in text and text.count("&quot;page&quot;") == 1 and len(text) < 250_000
    empty = gallery(
        audit(
            df,
            load=lambda r: phantoms(SEEDS[0])[1][0].scan.replace(scan_id=r["scan_id"]),
            progress=False,
        ).__class__(a.facts, a.findings[:0], a.baselines)
    )
    assert empty.cards == [] and empty.viewer is None and "Nothing" in empty.words.value


def test_gallery_page_cannot_be_broken_by_text():
    evil = '</script><img src=x onerror="document.title=1">&'
    page = gallery_page(
        cards_of(pd.DataFrame([dict(scan_id=evil, label=evil, check="order", value=evil)])), evil
    )
    assert evil not in page


def test_gallery_lives_in_a_page(browser, tmp_path):
    df, made, bad = spoilt(SEEDS[0], "reversed")
    by = {i: p.scan for i, p in zip(df.scan_id, made, strict=False)}
    a = audit(df, load=lambda r: by[r["scan_id"]], progress=False)
    file = a.report(tmp_path / "audit.html", gallery=gallery(a, most=2, max_voxels=30_000).frame())
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(file.as_uri())
    frame = page.frame_locator("iframe[data-gallery]")
    frame.locator("#cards button").first.scroll_into_view_if_needed()
    assert frame.locator("#cards button").count() == len(bad)
    frame.locator("#cards button").nth(1).click()
    frame.locator("#view canvas").first.wait_for()
    assert "lungs point down" in frame.locator("#words").inner_text() and not errors
    page.close()


def test_telling_slices():
    p = phantoms(SEEDS[0])[1][0]
    g, e = small_greys(np.concatenate([p.scan.voxels, p.scan.voxels[:4]]))
    assert informative_slices(g, e).tolist() == list(range(40))


@pytest.mark.parametrize("seed", range(4))
def test_lost_slices_of_a_fine_scan_are_seen(seed):
    "Between 96 thin slices the gap is plain; thick ones leave doubt, and the page says so"
    for switches, seen in (((), False), (("missing",), True)):
        p = make_phantom(
            ("healthy", "cap", "covid", "ild")[seed],
            seed + 50,
            (96, 96, 96),
            kernel=("soft", "sharp")[seed % 2],
            switches=switches,
        )
        step, limit = widest_step(small_greys(p.scan.voxels)[0])
        assert (step > limit) == seen, (step, limit)


# ------------------------------------------------------------------ the lung mask


def test_a_lung_mask_that_may_be_wrong_is_a_finding():
    "A field of view that cuts both lungs, and a scan without lungs; clean scans have no finding"
    df, made, _ = spoilt(SEEDS[0], None)
    by = dict(zip(df.scan_id, (p.scan for p in made), strict=False))
    v = made[0].scan.voxels
    k = np.flatnonzero(made[0].lungs.any((0, 1)))
    by[df.scan_id[0]] = made[0].scan.replace(voxels=v[:, :, k[0] + 3 : k[-1] - 2])
    by[df.scan_id[1]] = made[1].scan.replace(
        voxels=np.where(made[1].lungs, 40, made[1].scan.voxels).astype("i2")
    )
    f = audit(df, load=lambda r: by[r["scan_id"]], progress=False, n=50).findings
    lungs = f[f.check == "lungs"].set_index("scan_id").value
    assert set(lungs.index) == set(df.scan_id[:2])
    assert "field of view cuts" in lungs[df.scan_id[0]] and "look like lung" in lungs[df.scan_id[1]]
