"""The reading room: tables and notes, the page in a browser, the live room in JupyterLab."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_lab
from playwright.sync_api import expect
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve
from test_viewer import EVIL

from covid_ct.cohort.table import check_cohort
from covid_ct.evaluate.metrics import energy_in
from covid_ct.inference.cases import (
    _CaseLoader,
    _load_networks,
    _look,
    reading_room,
    room_json,
    room_text,
)
from covid_ct.io.dicom import write_series
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import DataError, GeometryError, Map, Scan
from covid_ct.train.recipes import recipe
from covid_ct.widgets.cases import (
    CaseError,
    NoteConflict,
    Notes,
    Rules,
    _check_predictions,
    case_table,
    read_index,
    read_predictions,
    roc_points,
    runs_in,
    thumbnail_of,
    thumbnail_sheets,
    write_index,
)
from covid_ct.widgets.reading_room import (
    ReadingRoom,
    _pack_case,
    _pick_cases,
    _try_case,
    _volumes_of,
)

CLASSES = ("healthy", "cap", "covid")
lab = test_lab.lab  # a JupyterLab of its own, with the cells below


def answers(n=60, skill=1.3, seed=0):
    rng = np.random.default_rng(seed)
    label = np.random.default_rng(9).choice(CLASSES, n)
    z = rng.normal(size=(n, 3)) + skill * np.array([[k == c for c in CLASSES] for k in label])
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return pd.DataFrame(
        {
            "scan_id": [f"S{i:04}" for i in range(n)],
            "patient_id": [f"P{i // 2:03}" for i in range(n)],
            "label": label,
        }
        | {f"prob_{c}": p[:, k] for k, c in enumerate(CLASSES)}
    )


def about(n=60):
    rng = np.random.default_rng(5)
    return pd.DataFrame(
        {
            "scan_id": [f"S{i:04}" for i in range(n)],
            "infection_ratio": rng.uniform(0, 0.1, n),
            "outside_lung": rng.uniform(0, 1, n),
            "outside_lesion": rng.uniform(0.8, 1, n),
        }
    )


@pytest.fixture(scope="module")
def phantom():
    return make_phantom("covid", seed=3, shape=(24, 48, 48))


def case_of(p):
    return {
        "scan": p.scan,
        "masks": {"lesions": p.infection, "lungs": p.lungs},
        "maps": [
            Map(p.infection.astype("f4"), p.scan.grid, "covid", method="CAM"),
            Map(1 - p.infection.astype("f4"), p.scan.grid, "cap", method="CAM"),
        ],
    }


@pytest.fixture()
def room(phantom, tmp_path):
    p = phantom
    thumb = thumbnail_of(p.scan, Map(p.infection.astype("f4"), p.scan.grid), p.infection)

    def load(i):
        return case_of(p)

    r = ReadingRoom(
        case_table([answers(), answers(seed=1)], about()),
        load,
        {f"S{i:04}": np.roll(thumb, i, 1) for i in range(50)},
        tmp_path / "run" / "cases" / "notes.json",
        title="Sixty cases",
    )
    r.sent = []
    r.send = lambda m, b=(): r.sent.append((m, list(b)))
    return r


# ---------------------------------------------------------------- what a run must hold
@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda d: None, "holds no predictions.csv"),
        (lambda d: (d / "predictions.csv").write_text("", "utf-8"), "cannot be read"),
        (
            lambda d: answers().assign(part="valid").to_csv(d / "predictions.csv", index=False),
            "no rows of the part 'test'",
        ),
        (
            lambda d: (
                answers().drop(columns="patient_id").to_csv(d / "predictions.csv", index=False)
            ),
            "no column patient_id",
        ),
        (
            lambda d: answers().assign(prob_cap=np.nan).to_csv(d / "predictions.csv", index=False),
            r"row 0 \(S0000\)",
        ),
        (
            lambda d: (
                answers()
                .drop(columns=["prob_cap", "prob_covid"])
                .to_csv(d / "predictions.csv", index=False)
            ),
            "two or more classes",
        ),
        (
            lambda d: pd.concat([answers()] * 2).to_csv(d / "predictions.csv", index=False),
            "occurs twice",
        ),
        (
            lambda d: answers().assign(label="ild").to_csv(d / "predictions.csv", index=False),
            "'ild' has no probability",
        ),
    ],
    ids=["none", "empty", "part", "column", "nan", "masks", "twice", "label"],
)
def test_bad_runs_say_why(tmp_path, make, fault):
    make(tmp_path)
    with pytest.raises(CaseError, match=fault) as e:
        read_predictions(runs_in(tmp_path)[0])
    assert e.value.remedy and str(tmp_path) in e.value.source


def test_folds_are_found(tmp_path):
    with pytest.raises(CaseError, match="no folder"):
        runs_in(tmp_path / "x")
    for k in range(3):
        (tmp_path / f"fold_{k}").mkdir()
        answers(seed=k).assign(part="test").to_csv(
            tmp_path / f"fold_{k}" / "predictions.csv", index=False
        )
    assert [p.name for p in runs_in(tmp_path)] == ["fold_0", "fold_1", "fold_2"]
    r = reading_room(tmp_path)
    assert len(r.rows) == 60 and "networks disagree" in r.meta["filters"] and r.load is None


# ---------------------------------------------------------------- the table
def test_table_is_what_loops_say():
    a, b = answers(), answers(seed=1).sample(frac=1, random_state=0)  # another order
    t, second = case_table([a, b]), b.set_index("scan_id")
    for k, r in enumerate(t.itertuples()):
        p = np.array(
            [[getattr(a.iloc[k], f"prob_{c}"), second.loc[r.scan_id, f"prob_{c}"]] for c in CLASSES]
        )
        m = p.mean(1)
        assert r.predicted == CLASSES[m.argmax()] and r.loss == pytest.approx(
            -np.log(m[CLASSES.index(r.label)])
        )
        assert r.margin == pytest.approx(
            sorted(m)[2] - sorted(m)[1]
        ) and r.disagree == pytest.approx(max(abs(x - y) for x, y in p))
        assert r.votes == len({int(p[:, j].argmax()) for j in range(2)})
    with pytest.raises(CaseError, match="other scans"):
        case_table([a, answers(50)])
    certain = _check_predictions(
        pd.DataFrame(
            {
                "scan_id": ["a"],
                "patient_id": ["p"],
                "label": ["x"],
                "prob_x": [0.0],
                "prob_y": [1.0],
            }
        )
    )
    assert np.isfinite(case_table(certain).loss[0])


def test_filters_at_their_edges():
    t = case_table(answers()).assign(
        infection_ratio=[0, 0.02, 0.0199, np.nan] * 15,
        outside_lung=[0.5, 0.49, np.nan, 1] * 15,
        outside_lesion=[np.nan, 0.98, 1, np.nan] * 15,
        sure=0.8,
        margin=0.2,
    )
    flags = {k: v for k, (_, v) in Rules().flags(t).items()}
    assert (
        flags["small infection"] == [False, False, True, False] * 15
    ).all()  # no infection is no small infection
    assert (flags["looks outside the lung"] == [True, False, False, True] * 15).all()
    assert (flags["misses the lesions"] == [False, False, True, False] * 15).all()
    assert (flags["confident and wrong"] == flags["wrong"]).all() and not flags["doubtful"].any()


def test_roc_is_scikit_learns():
    t = case_table(answers()).round({"prob_covid": 2})  # with ties
    y = t.label == "covid"
    fpr, tpr, cut = roc_curve(y, t.prob_covid, drop_intermediate=False)
    points = np.array(roc_points(t, "covid"))
    assert (
        np.allclose(points[:, 1], fpr)
        and np.allclose(points[:, 2], tpr)
        and np.allclose(points[1:, 0], cut[1:])
    )
    assert np.trapezoid(points[:, 2], points[:, 1]) == pytest.approx(roc_auc_score(y, t.prob_covid))


# ---------------------------------------------------------------- thumbnails and the index
def test_thumbnails(phantom):
    p, g = phantom, phantom.scan.grid
    heat = np.zeros(g.shape, "f4")
    heat[5, 10, 10] = 1
    seen = thumbnail_of(p.scan, Map(heat, g))
    lone = p.scan.replace(voxels=np.where(np.arange(24)[:, None, None] == 5, p.scan.voxels, 3000))
    assert (seen == thumbnail_of(lone, Map(heat, g))).all() and (seen != thumbnail_of(p.scan)).any()
    assert ((thumbnail_of(p.scan, None, p.infection) == (255, 47, 214)).all(-1)).any() and (
        thumbnail_of(p.scan, Map(np.zeros(g.shape), g)) == thumbnail_of(p.scan)
    ).all()
    grey = Scan(np.arange(300, dtype="u1").reshape(1, 20, 15), (5, 1, 4), units="uint8")
    assert thumbnail_of(grey).shape == (72, 72, 3)
    with pytest.raises(GeometryError):
        thumbnail_of(p.scan, Map(heat[1:], Scan(heat[1:], (1, 1, 1)).grid))
    assert [d["count"] for d, _ in thumbnail_sheets(np.zeros((801, 72, 72, 3), "u1"))] == [
        400,
        400,
        1,
    ]


def test_index_there_and_back(tmp_path):
    thumbs = np.random.default_rng(0).integers(0, 256, (3, 72, 72, 3)).astype("u1")
    write_index(tmp_path, about(3), thumbs)
    a, t = read_index(tmp_path)
    assert (
        (t == thumbs).all()
        and a.scan_id.tolist() == ["S0000", "S0001", "S0002"]
        and np.allclose(a.outside_lung, about(3).outside_lung)
    )
    np.save(tmp_path / "thumbs.npy", thumbs[:2])
    with pytest.raises(CaseError, match="do not fit"):
        read_index(tmp_path)
    (tmp_path / "thumbs.npy").write_bytes(b"x")
    with pytest.raises(CaseError, match="cannot be read"):
        read_index(tmp_path)


# ---------------------------------------------------------------- notes
def test_nobodys_note_is_lost(tmp_path):
    a, b = Notes(tmp_path / "new" / "notes.json", "A"), Notes(tmp_path / "new" / "notes.json", "B")
    first = a.save("s", "mine")
    with pytest.raises(NoteConflict) as e:
        b.save("s", "theirs")
    assert e.value.theirs == first and a.read()["s"]["text"] == "mine"
    time.sleep(0.002)
    second = b.save("s", "both", first["at"])
    with pytest.raises(NoteConflict):
        a.save("s", "again", first["at"])  # what A saw is no longer there
    assert a.read() == {"s": second} and second["by"] == "B"
    b.save("t", "other case")
    assert set(a.read()) == {"s", "t"}


def test_notes_of_several_processes(tmp_path):
    code = "import sys; from covid_ct.widgets.cases import Notes\nfor k in range(15): \
Notes(sys.argv[1], sys.argv[2]).save(f'{sys.argv[2]}{k}', 'x')"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "notes.json"), who])
        for who in "ab"
    ]
    assert [j.wait(60) for j in jobs] == [0, 0]
    assert len(Notes(tmp_path / "notes.json").read()) == 30 and os.listdir(tmp_path) == [
        "notes.json"
    ]


def test_notes_in_trouble(tmp_path):
    path = tmp_path / "notes.json"
    for text in ("{", "[]", '{"s": "text"}'):
        path.write_text(text, "utf-8")
        with pytest.raises(CaseError):
            Notes(path).save("s", "new")
        assert path.read_text("utf-8") == text  # what somebody may still repair is left alone
    with pytest.raises(CaseError, match="cannot be written"):
        Notes(path / "below" / "notes.json").save("s", "x")
    path.unlink()
    old = Path(f"{path}.lock")
    old.touch()
    os.utime(old, (time.time() - 60,) * 2)  # a crash left it behind
    assert Notes(path).save("s", "x")["text"] == "x" and not old.exists()


# ---------------------------------------------------------------- the room without a browser
def test_room_answers(room, tmp_path):
    room._answer(None, {"kind": "want cases"}, [])
    first = json.loads(json.dumps(room.sent[-1][0], allow_nan=False))
    assert len(first["cases"]) == 60 and len(first["roc"]) == len(room.roc) and first["notes"] == {}
    want = confusion_matrix(room.table.label, room.table.predicted, labels=CLASSES)
    got = [
        [sum(c["label"] == a and c["predicted"] == b for c in first["cases"]) for b in CLASSES]
        for a in CLASSES
    ]
    assert (np.array(got) == want).all()
    room._answer(None, {"kind": "want thumbs"}, [])
    assert room.sent[-1][0]["sheets"][0]["count"] == 50 and room.sent[-1][1][0][:4] == b"RIFF"
    room._answer(None, {"kind": "want case", "id": "S0007"}, [])
    m, b = room.sent[-1]
    assert (
        m["state"]["map"] == "CAM covid"
        and m["header"]["note"].endswith("±4 HU")
        and len(b) == len(m["header"]["parts"])
    )
    n = len(room.sent)
    room._answer(None, {"kind": "want case", "id": "../../etc"}, [])
    assert len(room.sent) == n
    room._answer(None, {"kind": "note", "id": "S0007", "text": EVIL, "seen": ""}, [])
    assert (
        room.sent[-1][0]["entry"]["text"] == EVIL
        and json.loads((tmp_path / "run" / "cases" / "notes.json").read_text("utf-8"))["S0007"][
            "text"
        ]
        == EVIL
    )
    room._answer(None, {"kind": "note", "id": "S0007", "text": "", "seen": ""}, [])
    assert room.sent[-1][0]["theirs"]["text"] == EVIL
    room._answer(None, {"kind": "note", "id": "nobody", "text": "x"}, [])
    assert "Nothing was saved" in room.sent[-1][0]["fault"]
    assert (
        len(json.dumps({k: v for k, v in room.get_state().items() if not k.startswith("_")})) < 5000
    )  # no case is widget state


def test_room_refuses(room):
    for k, v in {"chosen": "S9999", "show": "bad"}.items():
        with pytest.raises(CaseError):
            setattr(room, k, v)
    with pytest.raises(CaseError, match="no class"):
        ReadingRoom(room.table, positive="ild")
    with pytest.raises(CaseError, match="no cases"):
        ReadingRoom(room.table[:0])
    assert ReadingRoom(room.table).meta["saves"] is False


def test_faults_reach_the_reader_without_paths():
    def broken(i):
        raise DataError(
            "/archive/MUELLER_HANS/ct.nii", "at /archive/MUELLER_HANS/ct.nii ends early", "Copy it."
        )

    assert _try_case(broken, "a") == ({"fault": "at the file ends early. Copy it."}, [])
    assert (
        "ZeroDivisionError" in _try_case(lambda i: 1 / 0, "a")[0]["fault"]
        and "cohort" in _try_case(None, "a")[0]["fault"]
    )


def test_page_budget_and_pick(room):
    whole, used = _volumes_of(room, most=6, max_voxels=20_000)
    assert len(whole) == 6 and used == sum(len(json.dumps(v)) for v in whole.values())
    some, less = _volumes_of(room, most=6, budget=used // 2, max_voxels=20_000)
    assert 1 <= len(some) < 6 and less <= used // 2
    ids = _pick_cases(room.rows, 9)
    assert {f for r in room.rows if r["id"] in ids for f in r["flags"]} == {
        f for r in room.rows for f in r["flags"]
    }
    page = room.page(most=2, max_voxels=20_000)
    assert "2 of 60 cases carry" in page and "://" not in page.replace("http://www.w3.org", "")
    room.notes.save("S0001", "a private thought")
    assert "a private thought" in room.page(most=0) and "a private thought" not in room.page(
        most=0, notes=False
    )


def test_hostile_names_stay_text_in_the_page(phantom):
    t = answers(3).replace(
        {"scan_id": {"S0001": EVIL}, "label": {"cap": "covid", "healthy": "covid"}}
    )
    r = ReadingRoom(case_table(t), lambda i: _pack_case(phantom.scan), title=EVIL)
    assert EVIL not in r.frame() and r.page().count("</script>") == 2


def test_a_thousand_cases_open_in_seconds():
    n, thumbs = 1000, np.random.default_rng(0).integers(0, 90, (1000, 72, 72, 3)).astype("u1")
    t = time.perf_counter()
    r = ReadingRoom(
        case_table([answers(n), answers(n, seed=1)], about(n)),
        thumbs=([f"S{i:04}" for i in range(n)], thumbs),
    )
    seconds = time.perf_counter() - t
    assert seconds < 3 and len(json.dumps(r.cases())) < 1_000_000


# ---------------------------------------------------------------- from a run folder and a cohort
@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    "Three phantoms as DICOM with a patient's name in each file, and a run that saw one batch"
    import torch

    from covid_ct.models.zoo import build
    from covid_ct.preprocess.resample import PREPS, prepare_scan
    from covid_ct.train.loop import fit
    from covid_ct.train.recipes import change

    d, r = tmp_path_factory.mktemp("reading"), change(recipe("darnet", "tiny"), epochs=1)
    made = [make_phantom(k, seed=i, shape=(32, 64, 64)) for i, k in enumerate(CLASSES)]

    def named(h, k):
        h.PatientName, h.PatientBirthDate, h.InstitutionName = "MUELLER^HANS", "19500101", "ST MARY"

    for i, p in enumerate(made):
        write_series(p.scan, d / f"MUELLER_HANS_{i}", named)
    x = np.stack([prepare_scan(p.scan, PREPS[r.prep], lungs=p.lungs).voxels for p in made])[:, None]
    batch = {
        "image": torch.tensor(x),
        "label": torch.arange(3),
        "scan_id": list("abc"),
        "patient_id": list("pqr"),
    }
    fit(
        build(r.model, **r.model_kwargs),
        [batch],
        [batch],
        r,
        d / "run",
        about={"trained_on": "three phantoms"},
        progress=False,
    )
    cohort = check_cohort(
        pd.DataFrame(
            {
                "patient_id": list("pqr"),
                "scan_id": list("abc"),
                "label": CLASSES,
                "path": [f"MUELLER_HANS_{i}" for i in range(3)],
            }
        ),
        d,
    )
    return d, cohort, made


def test_a_run_is_read(a_run, tmp_path):
    d, cohort, made = a_run
    r = reading_room(d / "run", cohort, part="valid", progress=False)
    assert (
        r.faults == {}
        and [q["id"] for q in r.rows] == list("abc")
        and r.table.outside_lung.between(0, 1).all()
        and r.table.outside_lesion.isna().all()
    )
    found = r.load("b")
    assert (
        {"depth gate", "channel gate"} <= set(found["maps"])
        and set(found["masks"]) == {"lungs"}
        and energy_in(found["maps"][f"CAM {r.table.predicted[1]}"].values, found["masks"]["lungs"])
        == pytest.approx(1 - r.table.outside_lung[1], abs=1e-6)
    )
    page = r.save(tmp_path / "out.html", most=3, max_voxels=20_000).read_text("utf-8")
    assert "3 of 3 cases carry" in page and not any(
        s in page for s in ("MUELLER", "19500101", "ST MARY", str(d))
    )  # nor in a path
    assert "3 cases" in room_text(r) and [q["id"] for q in json.loads(room_json(r))] == list("abc")
    stamp = (d / "run" / "cases" / "index.csv").stat().st_mtime_ns
    reading_room(d / "run", cohort, part="valid", progress=False)
    assert (d / "run" / "cases" / "index.csv").stat().st_mtime_ns == stamp  # looked at once
    (tmp_path / "other").mkdir()
    answers(3).assign(part="valid").to_csv(tmp_path / "other" / "predictions.csv", index=False)
    with pytest.raises(CaseError, match="other scans"):
        reading_room([d / "run", tmp_path / "other"], part="valid")
    with pytest.raises(CaseError, match="none of the scans"):
        reading_room(d / "run", cohort.assign(scan_id=list("xyz")), part="valid")


OWN = {
    "darnet": ("darnet-ca", dict(depth=32, width=4, blocks=(1, 1, 1, 1)), ["channel gate"]),
    "darnet both": (
        "darnet",
        dict(depth=32, width=4, blocks=(1, 1, 1, 1)),
        ["depth gate", "channel gate"],
    ),
    "dual_sampling": (
        "attention-rn34",
        dict(depth=24, width=4, blocks=(1, 1, 1), strides=(1, 1, 1)),
        ["online attention"],
    ),
    "without": ("rn34", dict(depth=24, width=4, blocks=(1, 1, 1), strides=(1, 1, 1)), []),
    "prior_attention": (
        "pa-66-m",
        dict(depth=32, width=4, blocks=(1, 1, 1, 1), hidden=16),
        ["prior attention"],
    ),
    "self-attention": (
        "sa-66-m",
        dict(depth=32, width=4, blocks=(1, 1, 1, 1), hidden=16),
        ["self-attention"],
    ),
    "raunet": (
        "raunet",
        dict(widths=(8, 16), cardinality=2, heads=1, chunk=16, rounds=1),
        ["LSH bucket"],
    ),
}


@pytest.mark.parametrize("which", OWN)
def test_every_system_shows_its_own_attention(which, phantom):
    "Beside the map of the class, one map of each kind inside the network, as `attention_maps`"
    from covid_ct.explain.cam import attention_maps
    from covid_ct.models.zoo import build
    from covid_ct.plot import find_centre
    from covid_ct.preprocess.resample import PREPS, Prep, prepare_scan

    row, size, kinds = OWN[which]
    system = {"without": "dual_sampling", "self-attention": "prior_attention"}.get(
        which, which.split()[0]
    )
    net, r, p = build(row, **size).eval(), recipe(system, "tiny"), phantom
    at, lungs = find_centre(p.scan, {"lesions": p.infection}), lambda s: p.lungs
    found = _CaseLoader(None, None, {"run": (net, r)}, None).maps(p.scan, ["covid"], lungs, at)
    assert list(found)[-len(kinds) :] == kinds if kinds else all(k.endswith("covid") for k in found)
    assert len(found) == len(kinds) + (r.task == "classify") and all(
        m.grid == p.scan.grid for m in found.values()
    )
    if kinds:
        ready = prepare_scan(p.scan, PREPS[r.prep] if r.prep else Prep(p.scan.shape), lungs=p.lungs)
        every = attention_maps(net, ready, p.scan, at)
        for k in kinds:
            assert any(
                np.array_equal(found[k].values, m.values) and m.method == k for m in every.values()
            )
    if which == "raunet":
        assert (
            found["LSH bucket"].values[at] > 0.9
            and not found["LSH bucket"].values[: at[0] - 1].any()
        )
    plain = (
        _CaseLoader(None, None, {"run": (net, r)}, None).maps(p.scan, ["covid"], lungs)
        if r.task == "classify"
        else {}
    )
    assert not set(plain) & set(
        kinds
    )  # the numbers of the table come from the maps of the answer alone
    two = _CaseLoader(None, None, {"a": (net, r), "b": (net, r)}, None).maps(
        p.scan, ["covid"], lungs, at
    )
    assert {f"{k}, {n}" for k in kinds for n in "ab"} <= set(two) and len(two) == 2 * len(found)


def test_missing_scans_and_weights_leave_the_rest(a_run, tmp_path):
    d, cohort, _ = a_run
    table = case_table(read_predictions(d / "run", "valid"))
    loader = _CaseLoader(
        cohort.assign(path=["gone", *cohort.path[1:]]),
        d,
        {},
        table,
        _load_networks({"run": tmp_path})[1],
    )
    seen, thumbs, faults = _look(loader, tmp_path / "cases", progress=False)
    assert (
        list(seen.scan_id) == ["b", "c"]
        and len(thumbs) == 2
        and list(faults) == ["a"]
        and seen.outside_lung.isna().all()
    )
    r = ReadingRoom(
        case_table(read_predictions(d / "run", "valid"), seen), loader, (list(seen.scan_id), thumbs)
    )
    m, b = _try_case(r.load, "b")
    assert (
        "No map of attention" in m["fault"] and len(b) == 2 and "fault" in _try_case(r.load, "a")[0]
    )


# ---------------------------------------------------------------- the page in a browser
@pytest.fixture()
def opened(browser, tmp_path):
    "Opens a room's page; whatever goes wrong in it fails the test"
    pages, wrong = [], []

    def go(html, width=1400, height=1000, **context):
        (tmp_path / "room.html").write_text(html, "utf-8")
        page = browser.new_page(viewport={"width": width, "height": height}, **context)
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on(
            "request",
            lambda r: (
                wrong.append(r.url)
                if not r.url.startswith(("file:", "data:", "blob:", "about:"))
                else None
            ),
        )
        page.goto((tmp_path / "room.html").as_uri())
        return page

    yield go
    for p in pages:
        p.close()
    assert not wrong


def ids(page):
    return page.locator(".ccr-list tbody tr[data-id]").evaluate_all(
        "(rows) => rows.map((r) => r.dataset.id)"
    )


def test_page_filters_sorts_and_opens(room, opened):
    room.notes.save("S0003", "lesion behind the heart")
    page = opened(room.page(most=4, max_voxels=20_000))
    page.locator(".ccr[data-ready='1']").wait_for(timeout=20_000)
    rows = {r["id"]: r for r in room.rows}
    assert ids(page) == [r["id"] for r in sorted(room.rows, key=lambda r: -r["loss"])]
    for name in room.meta["filters"]:
        page.locator(f"[data-filter='{name}']").click()
        assert set(ids(page)) == {i for i, r in rows.items() if name in r["flags"]}, name
    page.locator("[data-filter=noted]").click()
    assert ids(page) == ["S0003"]
    page.locator("[data-control=clear]").click()
    page.locator(".ccr-matrix button[data-cell='covid as cap']").click()
    assert set(ids(page)) == {
        i for i, r in rows.items() if (r["label"], r["predicted"]) == ("covid", "cap")
    }
    page.locator("[data-control=search]").fill("p00 covid")
    assert all(i in rows and rows[i]["label"] == "covid" for i in ids(page)) and page.locator(
        "[data-role=count]"
    ).inner_text().startswith(f"{len(ids(page))} of 60")
    page.locator("[data-control=clear]").click()
    page.locator("th[data-key=margin] button").click()
    assert (
        page.locator("th[data-key=margin]").get_attribute("aria-sort") == "descending"
        and ids(page)[0] == max(room.rows, key=lambda r: r["margin"])["id"]
    )
    page.locator("th[data-key=margin] button").click()
    assert ids(page)[0] == min(room.rows, key=lambda r: r["margin"])["id"]
    box = page.locator(".ccr-roc").bounding_box()  # the ROC curve: click, then choose a side
    page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.25)
    t = room.roc[int(page.locator("[data-control=roc]").input_value())][0]
    p = room.table.set_index("scan_id").prob_covid.round(5)
    wrong = {i for i, r in rows.items() if (r["label"] == "covid") != (p[i] >= round(t, 5))}
    assert set(ids(page)) == wrong and 0 < len(wrong) < 60
    page.locator("[data-kind=FN]").click()
    assert set(ids(page)) == {i for i in wrong if rows[i]["label"] == "covid"}
    page.locator("[data-control=clear]").click()
    page.locator("[data-filter='scan in this page']").click()
    first = ids(page)[-1]
    page.locator(f"tr[data-id={first}]").click()
    page.locator(f".ccr[data-open={first}] .cct[data-ready='1']").wait_for(timeout=20_000)
    z = page.locator("input[data-control=axial]")
    before = int(z.input_value())
    page.locator("canvas[data-plane=axial]").press("ArrowUp")
    expect(z).to_have_value(str(before + 1))
    assert (
        page.locator("[data-control=note]").get_attribute("readonly") is not None
        and page.locator("[data-control=save]").count() == 0
    )
    page.locator("[data-filter=noted]").click()
    page.locator("tr[data-id=S0003]").click()
    assert page.locator("[data-control=note]").input_value() == "lesion behind the heart"


def test_page_by_keyboard(room, opened):
    page = opened(room.page(most=0))
    page.locator(".ccr[data-ready='1']").wait_for(timeout=20_000)
    order = ids(page)
    page.locator("[data-control=search]").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "TR":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert (
        page.locator(".ccr-case h3").first.inner_text() == order[2]
        and page.locator("tr[aria-selected=true]").get_attribute("data-id") == order[2]
    )
    page.locator("[data-control=after]").press("Enter")
    assert page.locator(".ccr-case h3").first.inner_text() == order[3]
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button,input,select,textarea,svg[role=img],\
[role=grid]')].filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim())).\
map((e) => e.outerHTML)"""
    )
    assert not nameless


OVERLAPS = """() => { const seen = [...document.querySelectorAll('.ccr-top > *, .ccr-chips > *, \
.ccr-list, .ccr-box, .ccr-head > *, .cct, .cct-bar > *, .cct-group > *, .ccr-kinds > \
*')].filter((e) => e.offsetParent);
  const box = (e) => e.getBoundingClientRect(), bad = [];
  for (const a of seen) for (const b of seen) { if (a === b || a.contains(b) || b.contains(a)) \
continue; const p = box(a), q = box(b);
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom \
- 1) bad.push(a.className + ' | ' + b.className); }
  return bad; }"""


@pytest.mark.parametrize("width", [1024, 1920])
def test_nothing_overlaps(room, opened, width):
    page = opened(
        room.page(most=1, max_voxels=20_000),
        width=width,
        color_scheme="dark" if width == 1024 else "light",
    )
    page.locator(".ccr .cct[data-ready='1']").wait_for(timeout=20_000)
    for side in ("", "axial"):
        page.locator("select[data-control=side]").select_option(side)
        page.wait_for_timeout(100)
        assert (
            page.evaluate(OVERLAPS) == []
            and page.evaluate("document.documentElement.scrollWidth") <= width
        )
    assert page.evaluate(
        "() => { const l = document.querySelector('.ccr-list'); return l.scrollWidth <= \
l.clientWidth + 1; }"
    )
    contrast = """() => { const lum = (s) => { const [r, g, b] = s.match(/[\\d.]+/g).map((v) => v \
/ 255).map((v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)); return .2126 * r + \
.7152 * g + .0722 * b; };
      const back = lum(getComputedStyle(document.querySelector('.ccr')).backgroundColor);
      return ['.ccr-right', '.ccr-wrong', '.ccr-count', '.ccr-list td'].map((q) => { const l = \
lum(getComputedStyle(document.querySelector(q)).color); return (Math.max(l, back) + .05) / \
(Math.min(l, back) + .05); }); }"""
    assert min(page.evaluate(contrast)) >= 4.5


def test_thousand_rows_and_a_frame(browser, opened):
    "A thousand cases are there in seconds; in a frame the room takes the place of the still"
    n = 1000
    r = ReadingRoom(
        case_table(answers(n), about(n)),
        thumbs=([f"S{i:04}" for i in range(n)], np.zeros((n, 72, 72, 3), "u1")),
    )
    page = opened(f"<!doctype html><body>{r.frame()}</body>")
    t = time.perf_counter()
    frame = page.frame_locator("iframe[data-room]")
    frame.locator(".ccr[data-ready='1'][data-thumbs='1000']").wait_for(timeout=20_000)
    assert time.perf_counter() - t < 6
    made = frame.locator(".ccr-list tbody tr[data-id]").count()
    assert made < 200
    frame.locator(".ccr-list").evaluate("(e) => { e.scrollTop = e.scrollHeight; }")
    frame.locator(".ccr-list tbody tr[data-id]").nth(made).wait_for(state="attached", timeout=5000)
    assert (
        not page.locator("img[data-fallback]").is_visible()
        and page.locator("iframe").bounding_box()["height"] > 400
    )
    still = opened(r.frame(), java_script_enabled=False)
    assert still.locator("img").is_visible() and "1000 cases" in still.locator("img").get_attribute(
        "alt"
    )


# ---------------------------------------------------------------- live, in a JupyterLab
@pytest.fixture()
def cells(monkeypatch):
    monkeypatch.setattr(
        test_lab,
        "CELLS",
        (
            "import numpy as np, pandas as pd\nfrom covid_ct.widgets.cases import \
case_table\nfrom covid_ct.widgets.reading_room import ReadingRoom\nfrom covid_ct.phantom.chest \
import make_phantom",
            "p, q = make_phantom('covid', seed=3, shape=(24,48,48)), \
np.random.default_rng(0).uniform(size=20)\n"
            "said = pd.DataFrame(dict(scan_id=[f'S{i:02}' for i in range(20)], patient_id='P', \
label=['cap','covid']*10, prob_cap=q, prob_covid=1-q))\n"
            "room = ReadingRoom(case_table(said), lambda i: dict(scan=p.scan, \
masks={'lesions':p.infection}), notes='run/cases/notes.json', title='Live')\nroom",
            "room.show = 'wrong'",
            "print('python sees', room.chosen)",
        ),
    )


@pytest.mark.slow
def test_live_room(cells, lab, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1400, "height": 1400})
    page.set_default_timeout(90_000)  # a busy machine is not a fault

    def run_all():
        page.goto(f"{lab}/lab/tree/live.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function(
            "() => { const c = window.jupyterapp?.shell.currentWidget?.sessionContext; return \
c?.isReady && c.session?.kernel?.status === 'idle'; }",
            timeout=60_000,
        )
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.locator(".jp-OutputArea-output .ccr[data-ready='1']").wait_for(timeout=60_000)
        page.locator("[data-filter=wrong][aria-pressed=true]").wait_for(
            timeout=90_000
        )  # Python to page: the third cell

    run_all()
    chosen = ids(page)[0]
    page.locator(f"tr[data-id={chosen}]").click()
    page.locator(f".ccr[data-open={chosen}] .cct[data-ready='1']").wait_for(timeout=90_000)
    assert "±4 HU" in page.locator(".cct-note").inner_text()  # live: every voxel, no WebP
    assert page.locator(".covid-ct-viewer").evaluate(test_lab.MOVE)["changed"]
    page.locator("[data-control=note]").fill("vessel taken for a lesion")
    page.locator("[data-control=save]").click()
    page.locator("[data-role=note]", has_text="saved by reader").wait_for(timeout=60_000)
    path = tmp_path / "work" / "run" / "cases" / "notes.json"
    stored = json.loads(path.read_text("utf-8"))
    assert stored[chosen]["text"] == "vessel taken for a lesion"
    Notes(path, "somebody else").save(chosen, "no, a vessel", stored[chosen]["at"])  # meanwhile
    page.locator("[data-control=note]").fill("mine")
    page.locator("[data-control=save]").click()
    page.get_by_role("button", name="Keep both").click()
    page.locator("[data-role=note]", has_text="saved by reader").wait_for(timeout=60_000)
    run_all()  # a reload, and the note is still there
    page.locator("[data-filter=noted]").click()
    page.locator(f"tr[data-id={chosen}]").click()
    page.wait_for_function(
        """() => document.querySelector('[data-control=note]').value === "no, a vessel\\nmine" """,
        timeout=60_000,
    )
    page.evaluate(
        "() => { const a = window.jupyterapp, n = a.shell.currentWidget.content; \
n.activeCellIndex = 3; a.commands.execute('notebook:run-cell') }"
    )
    page.wait_for_function(
        f"""() => document.body.innerText.includes("python sees {chosen}")""", timeout=90_000
    )
    if os.environ.get("LAB_SHOT"):
        page.screenshot(path=os.environ["LAB_SHOT"])
    page.evaluate(
        "async () => { await window.jupyterapp.serviceManager.sessions.shutdownAll(); }"
    )  # a busy machine's server may else wait for its kernel for ever
    page.close()
