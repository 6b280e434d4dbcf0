"""The commands as a script meets them: exit codes, JSON, one line of error, whole files."""

import json

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from covid_ct.cli import main
from covid_ct.inference.lesions import shipped_lesion_model
from covid_ct.io.dicom import write_series
from covid_ct.io.read import write_mask, write_scan
from covid_ct.phantom.chest import make_phantom
from covid_ct.phantom.cohort import phantom_cohort, write_phantom_cohort
from covid_ct.preprocess.lungs import dice


@pytest.fixture(scope="module")
def chest(tmp_path_factory):
    "A phantom as a volume in RAS, and as a DICOM folder"
    d, p = tmp_path_factory.mktemp("cli"), make_phantom("covid", seed=3, shape=(48, 80, 80))
    write_scan(p.scan.replace(stored_as="RAS"), d / "chest.nii.gz")
    write_series(p.scan, d / "series")
    return d, p


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_models_json(capsys):
    code, out, _ = run(capsys, "models", "--json")
    rows = {r["name"]: r for r in json.loads(out)}
    want = {
        "darnet": 35_237_163,
        "darnet-ca": 33_238_075,
        "darnet-da": 35_148_083,
        "darnet-none": 33_148_995,
    }
    assert code == 0 and {k: rows[k]["trainable_parameters"] for k in want} == want
    assert rows["darnet"]["input_size"] == [1, 64, 224, 224] and rows["darnet"]["feature_size"] == [
        512,
        8,
        14,
        14,
    ]
    assert all(rows[k]["parameters_with_running_statistics"] - v == 9600 for k, v in want.items())
    keras = {
        "wa-66": 15_959_851,
        "sa-66": 15_959_851,
        "wa-66-m": 15_988_903,
        "sa-66-m": 15_988_903,
        "pa-66-m": 15_988_903,
    }
    assert {k: rows[k]["parameters_with_running_statistics"] for k in keras} == keras and all(
        rows[k]["convolutions"] == 66 for k in keras
    )


@pytest.mark.parametrize("name", ["chest.nii.gz", "series"])
def test_inspect_json(capsys, chest, name):
    d, p = chest
    code, out, err = run(capsys, "inspect", d / name, "--json")
    f = json.loads(out)
    assert code == 0 and not err and f["shape"] == [48, 80, 80] and f["units"] == "HU"
    assert f["orientation"] == ("RAS" if name.endswith("gz") else "LPS") and len(f["series"]) == (
        name == "series"
    )
    assert np.allclose(f["spacing"], p.scan.spacing, atol=1e-3) and f["warnings"] == []


def test_lungs_in_the_scans_own_geometry(capsys, chest, tmp_path):
    d, p = chest
    out = tmp_path / "lungs.nii.gz"
    assert run(capsys, "lungs", d / "chest.nii.gz", out)[0] == 0
    mask, scan = sitk.ReadImage(str(out)), sitk.ReadImage(str(d / "chest.nii.gz"))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(mask, what)(), getattr(scan, what)(), atol=1e-4), what
    assert dice(sitk.GetArrayFromImage(sitk.DICOMOrient(mask, "LPS")) > 0, p.lungs) > 0.95
    assert run(capsys, "lungs", d / "chest.nii.gz", out)[0] == 2  # never overwritten unasked


@pytest.mark.parametrize(
    "argv, said",
    [
        (("inspect", "nowhere"), "nowhere"),
        (("lungs", "{d}/text.nii.gz", "{d}/out.nii.gz"), "text.nii.gz"),
        (("lungs", "{d}/brick.nii.gz", "{d}/out.nii.gz"), "brick.nii.gz"),
        (("predict", "{d}/chest.nii.gz", "--run", "{d}/no_run"), "no_run"),
        (("predict", "{d}/chest.nii.gz", "--run", "{d}/series"), "series"),
        (("inspect", "{d}/empty"), "empty"),
    ],
)
def test_bad_input(capsys, chest, argv, said):
    d, p = chest
    (d / "empty").mkdir(exist_ok=True)
    (d / "text.nii.gz").write_text("no image")
    if not (d / "brick.nii.gz").exists():
        v = np.where(np.random.default_rng(0).random(p.scan.shape) < 0.5, -1000, 40).astype("i2")
        v[8:40, 20:60, 20:60] = 40
        write_scan(p.scan.replace(voxels=v), d / "brick.nii.gz")
    code, out, err = run(capsys, *(a.format(d=d) for a in argv))
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err
    assert not (d / "out.nii.gz").exists()


def test_demo_refuses_too_few(capsys, tmp_path):
    code, _, err = run(capsys, "demo", "--patients", 5, "--out", tmp_path / "d")
    assert code == 2 and "30" in err and not (tmp_path / "d").exists()


def test_burden(capsys, chest, tmp_path):
    d, p = chest
    write_mask(p.lesions, p.scan, tmp_path / "lesions.nii.gz")
    write_mask(p.lobes, p.scan, tmp_path / "lobes.nii.gz")
    code, out, err = run(
        capsys,
        "burden",
        d / "chest.nii.gz",
        "--lesions",
        tmp_path / "lesions.nii.gz",
        "--lobes",
        tmp_path / "lobes.nii.gz",
        "--report",
        tmp_path / "r.html",
        "--json",
    )
    rows = {r["region"]: r for r in json.loads(out)}
    inside = np.isin(p.lesions, (1, 2, 3, 5)) & (p.lobes > 0)
    assert (
        code == 0
        and not err
        and rows["both lungs"]["involved_percent"]
        == pytest.approx(100 * inside.sum() / (p.lobes > 0).sum(), abs=0.05)
    )
    assert (tmp_path / "r.html").stat().st_size > 10_000
    code, out, _ = run(
        capsys, "burden", d / "chest.nii.gz", "--lesions", tmp_path / "lesions.nii.gz", "--json"
    )
    sides = {r["region"]: r for r in json.loads(out)}
    assert (
        code == 0
        and sides["left lung"]["volume_ml"]
        == pytest.approx(rows["left lung"]["volume_ml"], rel=0.06)
        and sides["both lungs"]["score"] is None
    )
    code, out, err = run(
        capsys,
        "burden",
        d / "chest.nii.gz",
        "--lesions",
        tmp_path / "lesions.nii.gz",
        "--lobes",
        tmp_path / "lobes.nii.gz",
        "--convention",
        "luna16",
    )
    assert code == 2 and err.count("\n") == 1 and "lobes.nii.gz" in err


@pytest.fixture
def toy_weights(monkeypatch):
    "A threshold in place of the shipped network"
    card = shipped_lesion_model()[1] | dict(
        size=64, window=(-1350.0, 150.0), threshold=0.5, version="toy", sha256="ef" * 32
    )

    def threshold(x):
        zero = torch.zeros_like(x)
        return torch.cat([zero, 60 * (x - 0.6), zero - 1e3, zero - 1e3], 1)

    class Toy(torch.nn.Module):
        def forward(self, x):
            return threshold(x)

    monkeypatch.setattr("covid_ct.inference.lesions.shipped_lesion_model", lambda: (Toy(), card))
    return card


@pytest.mark.parametrize("name", ["a.nii.gz", "a.seg.nrrd", "a.dcm"])
def test_segment_needs_nothing_but_a_scan(name, capsys, chest, toy_weights, tmp_path):
    d, p = chest
    source = d / ("series" if name.endswith("dcm") else "chest.nii.gz")
    code, out, err = run(capsys, "segment", source, tmp_path / name, "--json")
    told = json.loads(out)
    assert code == 0 and not err and told["weights"]["sha256"] == toy_weights["sha256"]
    assert told["weights"]["version"] == "toy" and told["file"] == name
    beside = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert beside == {k: v for k, v in told.items() if k != "file"}
    assert told["segments"][0]["volume_ml"] > 1 and "not for clinical use" in told["use"]
    code, out, err = run(capsys, "segment", source, tmp_path / name)
    assert code == 2 and "exists already" in err and err.count("\n") == 1
    code, out, err = run(capsys, "segment", source, tmp_path / name, "--overwrite")
    assert (
        code == 0 and "by weights version toy" in out and "lesions" in err and "ground glass" in out
    )


def test_segment_refuses_early(capsys, chest, tmp_path, monkeypatch):
    d, _ = chest

    def never(*args, **kwargs):
        raise AssertionError("read")

    monkeypatch.setattr("covid_ct.io.read.read", never)
    for argv, says in (
        ((d / "chest.nii.gz", tmp_path / "a.dcm"), "DICOM folder"),
        ((d / "chest.nii.gz", tmp_path / "a.png"), "no ending"),
        ((d / "chest.nii.gz", tmp_path / "a.nii.gz", "--size", 64), "--run"),
    ):
        code, out, err = run(capsys, "segment", *argv)
        assert code == 2 and says in err and err.count("\n") == 1 and not out
    code, _, err = run(capsys, "burden", d / "chest.nii.gz", "--out", tmp_path / "a.dcm")
    assert code == 2 and "DICOM folder" in err and not list(tmp_path.iterdir())


def test_burden_needs_nothing_but_a_scan(capsys, chest, toy_weights, tmp_path):
    d, p = chest
    argv = ("burden", d / "chest.nii.gz", "--report", tmp_path / "p.html")
    code, out, err = run(capsys, *argv, "--out", tmp_path / "a.seg.nrrd", "--json")
    told = json.loads(out)
    rows = {r["region"]: r for r in told["regions"]}
    assert code == 0 and not err and told["weights"]["sha256"] == toy_weights["sha256"]
    whole, sides = rows["both lungs"], (rows["left lung"], rows["right lung"])
    assert whole["involved_ml"] == pytest.approx(sum(s["involved_ml"] for s in sides), abs=1e-3)
    assert told["severity"]["score"] is None and told["severity"]["grade"].startswith("CT-")
    beside = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert beside["segments"][0]["volume_ml"] == pytest.approx(whole["involved_ml"], abs=1e-2)
    page = (tmp_path / "p.html").read_text("utf-8")
    assert "weights version toy" in page and "iframe" in page and "not for clinical use" in page
    code, out, err = run(capsys, *argv)
    assert code == 0 and "Morozov et al. 2020" in out and "needs five lobes" in out


def test_burden_of_no_chest(capsys, toy_weights, tmp_path):
    block = np.full((16, 40, 40), -1000, "i2")
    block[:, 10:30, 10:30] = 40
    image = sitk.GetImageFromArray(block)
    image.SetSpacing((3.0, 3.0, 4.0))
    sitk.WriteImage(image, str(tmp_path / "block.nii.gz"))
    argv = ("burden", tmp_path / "block.nii.gz", "--report", tmp_path / "p.html")
    code, out, err = run(capsys, *argv, "--json")
    assert code == 2 and not out and "No lung was found" in err and err.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


def test_audit_and_prepare(capsys, tmp_path):
    rows = phantom_cohort(6, seed=1, second_scan=0)
    rows["switches"] = ["masked"] + [""] * 5
    write_phantom_cohort(tmp_path / "c", rows, shape=(32, 64, 64), progress=False)
    code, out, _ = run(
        capsys,
        "audit",
        tmp_path / "c" / "cohort.csv",
        "--json",
        "--report",
        tmp_path / "audit.html",
        "--jobs",
        "1",
    )
    found = json.loads(out)
    assert code == 1 and not found["clean"] and (tmp_path / "audit.html").exists()
    assert {f["scan_id"] for f in found["findings"]} == {rows.scan_id[0]}
    code, out, _ = run(
        capsys,
        "prepare",
        tmp_path / "c",
        tmp_path / "cache",
        "--recipe",
        "darnet_release",
        "--jobs",
        "1",
    )
    failed = pd.concat(map(pd.read_csv, (tmp_path / "cache").rglob("failures.csv")))
    assert (
        code == 1 and "6 failed" in out and len(failed) == 6 and failed.remedy.notna().all()
    )  # 8 bit is asked for, these are HU
    code, out, _ = run(
        capsys,
        "prepare",
        tmp_path / "c" / "cohort.csv",
        tmp_path / "cache",
        "--recipe",
        "nothing/here",
    )
    assert code == 2


def test_fetch_says_what_there_is(capsys, tmp_path):
    code, _, err = run(capsys, "fetch", "nothing", tmp_path / "f")
    assert code == 2 and "cc_ccii" in err and not (tmp_path / "f").exists()


def test_train_evaluate_export(capsys, caplog, tmp_path):
    "A network from a table of files to a file for elsewhere; its own patients are refused"
    rows = phantom_cohort(18, seed=4, second_scan=0)
    write_phantom_cohort(tmp_path / "c", rows, shape=(32, 48, 48), progress=False)
    other = phantom_cohort(3, seed=77, second_scan=0)
    write_phantom_cohort(tmp_path / "other", other, shape=(32, 48, 48), progress=False)
    small = [
        "--set",
        "epochs=1",
        "milestones=[]",
        "batch_size=4",
        'model_kwargs={"classes":3,"depth":32,"width":4,"blocks":[1,1,1,1],"strides":[1,2,2,1]}',
    ]
    code, out, err = run(
        capsys,
        "train",
        tmp_path / "c" / "cohort.csv",
        tmp_path / "run",
        "--recipe",
        "darnet/tiny",
        "--cache",
        tmp_path / "cache",
        *small,
    )
    assert code == 0 and "finished 1 of 1" in out, err
    assert (tmp_path / "run" / "split.csv").exists()
    code, out, _ = run(
        capsys,
        "evaluate",
        tmp_path / "other" / "cohort.csv",
        "--run",
        tmp_path / "run",
        "--json",
        "--out",
        tmp_path / "told.csv",
    )
    table = json.loads(out)
    assert (
        code == 0
        and {"AUC", "accuracy"} <= {r["metric"] for r in table}
        and pd.read_csv(tmp_path / "told.csv").scan_id.tolist() == other.scan_id.tolist()
    )
    code, _, err = run(capsys, "evaluate", tmp_path / "c" / "cohort.csv", "--run", tmp_path / "run")
    assert code == 2 and "patient" in err and err.count("\n") == 1
    explains_and_groups(capsys, tmp_path, other)
    pytest.importorskip("onnxruntime")
    caplog.clear()
    code, out, err = run(capsys, "export", tmp_path / "run", tmp_path / "m.onnx")
    assert code == 0 and not err and (tmp_path / "m.onnx").stat().st_size > 10_000
    assert [r.name for r in caplog.records if r.name.startswith(("torch.onnx", "onnx"))] == []
    for bad in (
        ["--set", "epochs"],
        ["--set", "wings=2"],
        ["--recipe", "darnet/huge"],
        ["--set", "lr=fast"],
    ):
        code, _, err = run(capsys, "train", tmp_path / "c" / "cohort.csv", tmp_path / "new", *bad)
        assert code == 2 and err.count("\n") == 1 and not (tmp_path / "new").exists()


def explains_and_groups(capsys, tmp_path, other):
    "The run of the test above: calibration, subgroups, maps by several methods, their checks"
    table, scan = tmp_path / "other" / "cohort.csv", tmp_path / "scan.nii.gz"
    groups = pd.read_csv(table).assign(scanner=["A", "A", "B"])
    groups.to_csv(table, index=False)
    run_of = ["--run", tmp_path / "run", "--json"]
    code, out, _ = run(capsys, "evaluate", table, *run_of, "--by", "scanner")
    rows = json.loads(out)
    ece = next(r for r in rows if r["metric"] == "ECE")
    assert code == 0 and 0 <= ece["value"] <= 1 and "calibrated" in ece["note"]
    assert {r["group"] for r in rows if "group" in r} == {"A", "B"}
    code, out, err = run(capsys, "evaluate", table, *run_of, "--by", "weather")
    assert code == 2 and not out and "weather" in err and err.count("\n") == 1
    write_scan(make_phantom("covid", seed=3, shape=(32, 48, 48)).scan, scan)
    for method in ("CAM", "Grad-CAM", "integrated-gradients"):
        to = tmp_path / f"{method}.nii.gz"
        extra = ["--check", "--report", tmp_path / "map.html"] if method == "CAM" else []
        code, out, _ = run(
            capsys,
            "explain",
            scan,
            *run_of,
            "--method",
            method,
            "--label",
            "covid",
            "--out",
            to,
            *extra,
        )
        found, heat = json.loads(out), sitk.ReadImage(str(to))
        assert code == 0 and found["label"] == "covid"
        assert np.allclose(heat.GetSpacing(), sitk.ReadImage(str(scan)).GetSpacing())
        assert sitk.GetArrayFromImage(heat).max() <= 1
        if extra:
            assert [c["map"] for c in found["checks"]] == ["CAM", "centre", "lungs"]
            assert all(0 <= c[k] <= 1 for c in found["checks"] for k in ("deletion", "insertion"))
    assert (tmp_path / "map.html").stat().st_size > 10_000
    bad = tmp_path / "bad.nii.gz"
    code, _, err = run(capsys, "explain", scan, *run_of, "--label", "flu", "--out", bad)
    assert code == 2 and "flu" in err and err.count("\n") == 1 and not bad.exists()


def test_report(capsys, tmp_path):
    "A paper's tables from a finished run; another paper's runs are refused in one line"
    import numpy as np
    import pandas as pd

    from covid_ct.train.recipes import recipe, to_dict

    r, at, rng = recipe("darnet", "tiny"), tmp_path / "run", np.random.default_rng(0)
    at.mkdir()
    (at / "config.json").write_text(
        json.dumps(
            dict(
                system="darnet",
                recipe=to_dict(r),
                recipe_hash=r.hash,
                seed=0,
                status="finished",
                trained_on="phantoms",
                versions={},
                hardware={},
                model=dict(kind="DARNet", parameters=1),
            )
        )
    )
    label = np.repeat(r.classes, 8)
    p = rng.dirichlet(np.ones(3), len(label))
    pd.DataFrame(
        dict(
            part="test",
            scan_id=[f"s{i}" for i in range(len(label))],
            patient_id=[f"p{i // 2}" for i in range(len(label))],
            label=label,
            **{f"prob_{c}": p[:, i] for i, c in enumerate(r.classes)},
        )
    ).to_csv(at / "predictions.csv", index=False)
    code, out, _ = run(
        capsys,
        "report",
        at,
        "--paper",
        "darnet",
        "--out",
        tmp_path / "out",
        "--draws",
        "50",
        "--format",
        "md",
        "csv",
    )
    assert (
        code == 0
        and "tables.md" in out
        and not (tmp_path / "out" / "report.html").exists()
        and "phantoms" in (tmp_path / "out" / "tables.md").read_text("utf-8")
    )
    code, _, err = run(capsys, "report", at, "--paper", "raunet", "--out", tmp_path / "other")
    assert (
        code == 2
        and err.count("\n") == 1
        and "no run of this system" in err
        and not (tmp_path / "other").exists()
    )


def test_course(capsys, tmp_path):
    code, out, _ = run(capsys, "course", tmp_path / "lessons")
    assert (
        code == 0
        and "1_first_scan.ipynb" in out
        and (tmp_path / "lessons" / "1_first_scan.ipynb").exists()
    )
    code, _, err = run(capsys, "course", tmp_path / "lessons")
    assert code == 2 and err.count("\n") == 1 and "may hold your answers" in err
