"""What every command keeps: checked outputs, one read, few imports, its own options, any stream."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import covid_ct
from covid_ct.cli import main, parser
from covid_ct.io.dicom import write_series
from covid_ct.io.read import write_mask, write_scan
from covid_ct.models.zoo import build
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import DataError, WriteError, check_writable, write_atomic
from covid_ct.train.loop import fit
from covid_ct.train.recipes import change, recipe
from covid_ct.widgets.terminal import UsageError, as_options, options_of

LIB = Path(covid_ct.__file__).parent
OF_SCANS = ("inspect", "lungs", "segment", "predict", "explain", "burden")
OF_COHORTS = ("audit", "prepare", "train", "evaluate")
SMALL = {"classes": 3, "depth": 32, "width": 4, "blocks": [1, 1, 1, 1], "strides": [1, 2, 2, 1]}


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def refused(capsys, *argv):
    "The one line of a command that ends with exit code 2 and prints nothing else"
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("covid-ct: "), err
    return err


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A chest, the lower half of it, its lesions, two runs: names of scans, outlines"
    d, p = tmp_path_factory.mktemp("terminal"), make_phantom("covid", seed=3, shape=(48, 80, 80))
    write_scan(p.scan, d / "chest.nii.gz")
    half = p.scan.replace(voxels=p.scan.voxels[:24])
    write_scan(half, d / "half.nii.gz")
    write_mask(p.lesions > 0, p.scan, d / "lesions.nii.gz")
    write_mask(p.lesions[:24] > 0, half, d / "half_lesions.nii.gz")
    write_series(p.scan, d / "series")
    one = dict(scan_id=["a", "b"], patient_id=["a", "b"])
    r = change(recipe("darnet", "tiny"), epochs=1, milestones=(), model_kwargs=SMALL)
    names = dict(image=torch.rand(2, 1, 32, 64, 64), label=torch.tensor([0, 2]), **one)
    fit(build(r.model, **r.model_kwargs), [names], [names], r, d / "names", progress=False)
    r = change(recipe("raunet", "tiny"), epochs=1)
    outlines = dict(
        image=torch.rand(2, 1, 64, 64),
        mask=torch.zeros(2, 64, 64).long(),
        slice=torch.tensor([0, 1]),
        **one,
    )
    fit(build(r.model, **r.model_kwargs), [outlines], [outlines], r, d / "outlines", progress=False)
    return d


def fresh(*argv, **env):
    "A command in an interpreter of its own"
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from covid_ct.cli import main; sys.exit(main())",
            *map(str, argv),
        ],
        capture_output=True,
        env={**os.environ, **env},
    )


# ---- once each, and few imports


@pytest.mark.parametrize(
    "argv",
    [
        ("inspect", "chest.nii.gz"),
        ("inspect", "chest.nii.gz", "--report", "r.html"),
        ("inspect", "series", "--report", "r.html"),
        ("lungs", "chest.nii.gz", "once.nii.gz", "--overwrite"),
        ("predict", "chest.nii.gz", "--run", "names", "--report", "r.html"),
        ("burden", "chest.nii.gz", "--lesions", "lesions.nii.gz", "--report", "r.html"),
    ],
    ids=" ".join,
)
def test_read_once_lungs_once(capsys, work, monkeypatch, argv):
    import covid_ct.inference.predict
    import covid_ct.inference.segment
    import covid_ct.io.read
    import covid_ct.preprocess.lung_warnings
    import covid_ct.preprocess.lungs

    calls = []
    preprocess = covid_ct.preprocess
    inference = covid_ct.inference
    modules = inference.predict, inference.segment, covid_ct.io.read, preprocess.lungs
    for module in (*modules, preprocess.lung_warnings):
        for name in ("read", "lung_mask"):
            if not hasattr(module, name):
                continue

            f = getattr(module, name)

            def counted(*a, name=name, f=f, **k):
                calls.append(name)
                return f(*a, **k)

            monkeypatch.setattr(module, name, counted)
    monkeypatch.chdir(work)
    assert run(capsys, *argv)[0] == 0
    assert sorted(calls) == ["lung_mask", "read"]


@pytest.mark.parametrize(
    "argv, none_of",
    [
        (("--help",), "torch SimpleITK scipy pandas sklearn matplotlib pydicom PIL joblib"),
        (
            ("inspect", "--help"),
            "torch SimpleITK scipy pandas sklearn matplotlib pydicom PIL joblib",
        ),
        (("--version",), "torch SimpleITK scipy pandas sklearn matplotlib numpy.testing"),
        (
            ("inspect", "{d}/chest.nii.gz"),
            "torch pandas sklearn matplotlib scipy.stats accelerate anywidget",
        ),
        (
            ("inspect", "{d}/series"),
            "torch pandas sklearn matplotlib scipy.stats accelerate anywidget",
        ),
        (
            ("lungs", "{d}/chest.nii.gz", "{d}/light.nii.gz", "--overwrite"),
            "torch pandas sklearn matplotlib scipy.stats accelerate",
        ),
        (
            ("predict", "{d}/chest.nii.gz", "--run", "{d}/names"),
            "sklearn scipy.stats captum anywidget",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_imports_of_a_command(work, argv, none_of):
    "A command loads nothing heavy that it does not use"
    code = (
        "import sys\nfrom covid_ct.cli import main\n"
        "try: code = main(sys.argv[2:])\nexcept SystemExit as e: code = e.code or 0\n"
        "print(code, [m for m in sys.argv[1].split() if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, none_of, *(a.format(d=work) for a in argv)],
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr


# ---- a mask that may be wrong says so


def test_mask_warnings_are_shown(capsys, work, tmp_path):
    "The lower half of a chest: four commands say that the lungs are cut, in text, JSON and page"
    cut, said = work / "half.nii.gz", "The scan cuts the lungs"
    page = tmp_path / "r.html"
    code, out, _ = run(capsys, "inspect", cut, "--report", page)
    assert code == 0 and f"warning     {said}" in out and said in page.read_text("utf-8")
    assert any(said in w for w in json.loads(run(capsys, "inspect", cut, "--json")[1])["warnings"])
    assert f"warning: {said}" in run(capsys, "lungs", cut, tmp_path / "a.nii.gz")[2]
    found = json.loads(run(capsys, "lungs", cut, tmp_path / "b.nii.gz", "--json")[1])
    assert any(said in w for w in found["warnings"]) and found["lung_volume_l"] > 0
    page.unlink()
    code, out, _ = run(capsys, "predict", cut, "--run", work / "names", "--report", page)
    assert code == 0 and said in out and said in page.read_text("utf-8")
    assert any(
        said in w
        for w in json.loads(run(capsys, "predict", cut, "--run", work / "names", "--json")[1])[
            "warnings"
        ]
    )
    page.unlink()
    code, _, err = run(
        capsys, "burden", cut, "--lesions", work / "half_lesions.nii.gz", "--report", page
    )
    assert code == 0 and said in err and said in page.read_text("utf-8")
    assert said not in run(capsys, "inspect", work / "chest.nii.gz")[1]


# ---- the wrong kind of run


def test_the_wrong_kind_of_run(capsys, work):
    assert "covid-ct segment" in refused(
        capsys, "predict", work / "chest.nii.gz", "--run", work / "outlines"
    )
    assert "covid-ct predict" in refused(
        capsys, "segment", work / "chest.nii.gz", work / "s.nii.gz", "--run", work / "names"
    )
    assert not (work / "s.nii.gz").exists()


# ---- outputs

OUTPUTS = [
    ("inspect chest.nii.gz --report {}", "page"),
    ("predict chest.nii.gz --run names --report {}", "page"),
    ("burden chest.nii.gz --lesions lesions.nii.gz --report {}", "page"),
    ("audit c.csv --report {}", "page"),
    ("cases names --html {}", "page"),
    ("explain chest.nii.gz --run names --out {}.nii.gz", "mask"),
    ("export names {}", "page"),
    ("lungs chest.nii.gz {}.nii.gz", "mask"),
    ("segment chest.nii.gz {}.nii.gz --run outlines", "mask"),
    ("evaluate c.csv --run names --out {}", "file"),
    ("prepare c.csv {}", "folder"),
    ("train c.csv {}", "folder"),
    ("study s.toml --out {}", "folder"),
    ("report names --paper darnet --out {}", "folder"),
    ("reproduce darnet phantoms --out {}", "folder"),
    ("course {}", "folder"),
    ("demo --out {}", "folder"),
    ("fetch ct_seg {}", "folder"),
]


def test_every_output_is_listed():
    "Whatever option of a command names an output is checked, and is in the list above"
    ap = parser()
    sub = next(a for a in ap._actions if a.dest == "command").choices
    named = {c: {a.dest for a in p._actions} & {"out", "report", "html"} for c, p in sub.items()}
    checked = {c: set(p.get_default("outputs") or {}) for c, p in sub.items()}
    assert named == checked
    assert sorted(c for c, o in named.items() if o) == sorted(
        line.split()[0] for line, _ in OUTPUTS
    )


@pytest.mark.parametrize("line, kind", OUTPUTS, ids=lambda x: x.split()[0])
def test_an_output_that_cannot_be_made(capsys, work, monkeypatch, tmp_path, line, kind):
    "Something in the way: one line, before anything is read, and nothing is written"
    import covid_ct.io.read

    monkeypatch.setattr(covid_ct.io.read, "read", lambda *a, **k: pytest.fail("was read first"))
    monkeypatch.chdir(work)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dir.nii.gz").mkdir()
    bad = [tmp_path / "file" / "x"]
    bad += (
        [tmp_path]
        if kind in ("page", "file")
        else [tmp_path / "file"]
        if kind == "folder"
        else [tmp_path / "dir"]
    )
    if kind == "page":
        bad.append(tmp_path / "nowhere" / "x.html")
    if Path("/proc").is_dir():
        bad.append(Path("/proc/nothing_here"))
    for out in bad:
        err = refused(capsys, *line.format(out).split())
        assert str(out) in err or str(out.parent) in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir.nii.gz", "file"]


def test_an_output_is_never_the_input(capsys, work):
    scan, page = work / "chest.nii.gz", work / "series" / next((work / "series").iterdir()).name
    before = scan.read_bytes(), page.read_bytes()
    refused(capsys, "lungs", scan, scan, "--overwrite")
    refused(capsys, "segment", scan, scan, "--run", work / "outlines", "--overwrite")
    refused(capsys, "inspect", scan, "--report", scan)
    refused(capsys, "inspect", work / "series", "--report", page)
    refused(
        capsys,
        "burden",
        scan,
        "--lesions",
        work / "lesions.nii.gz",
        "--report",
        work / "lesions.nii.gz",
    )
    assert before == (scan.read_bytes(), page.read_bytes())


def test_a_full_disk(capsys, work, tmp_path, monkeypatch):
    "The system refuses to write in the end: one line, the old page as it was, nothing beside it"
    page = tmp_path / "r.html"
    page.write_text("old")

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refused(capsys, "inspect", work / "chest.nii.gz", "--report", page)
    assert page.read_text() == "old" and list(tmp_path.iterdir()) == [page]
    with pytest.raises(WriteError):
        write_atomic(page, "new")


def test_a_system_error_without_a_path(capsys, monkeypatch, tmp_path):
    import covid_ct.course.checks

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(covid_ct.course.checks, "copy_course", full)
    assert "covid-ct course" in refused(capsys, "course", tmp_path / "c")


def test_check_writable_leaves_nothing(tmp_path):
    for out, how in ((tmp_path / "a" / "b", dict(folder=True)), (tmp_path / "a.html", {})):
        assert check_writable(out, **how) == out
    assert not list(tmp_path.iterdir())


# ---- options


def remedies(module):
    "Texts of errors in a module, with the line they stand in"
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")):
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value, f"{module.name}:{part.lineno}"


def test_an_option_that_is_recommended_exists():
    "Arguments that readers name are options of every command that reads"
    ap, commands = parser(), OF_SCANS + OF_COHORTS
    every = set().union(
        *(
            options_of(ap, c)
            for c in (
                "demo",
                "study",
                "report",
                "reproduce",
                "cases",
                "export",
                "course",
                "fetch",
                "models",
                *commands,
            )
        )
    )
    named = {}
    for module in sorted(LIB.rglob("*.py")):
        for text, where in remedies(module):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
                assert option in every, f"{where}: {text}"
            if module.parent.name == "io":
                for argument in re.findall(r"\b(?:pass|Pass|with) (\w+)=", text):
                    named.setdefault(argument, where)
    assert {"allow_unknown_geometry", "tilt", "series", "overwrite"} <= set(named)
    for argument in set(named) - {"units"}:  # a unit is a column of a cohort
        option = "--" + argument.replace("_", "-")
        of = {"overwrite": ("lungs", "segment", "explain"), "series": OF_SCANS}
        for c in of.get(argument, commands):
            assert option in options_of(ap, c), f"{named[argument]}: covid-ct {c} has no {option}"


def tilted(folder):
    "A series whose gantry leans by 15 degrees"
    v, angle = make_phantom("covid", seed=3, shape=(32, 64, 64)).scan, np.radians(15)

    def lean(d, k):
        d.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(angle)), float(-np.sin(angle))]

    write_series(v, folder, lean)
    return folder


def test_a_remedy_can_be_followed(capsys, tmp_path):
    "A tilted series: the option in the message is the one that helps"
    f = tilted(tmp_path / "tilt")
    err = refused(capsys, "lungs", f, tmp_path / "m.nii.gz")
    assert "--tilt correct" in err and "tilt='" not in err and "on the command line" not in err
    assert run(capsys, "lungs", f, tmp_path / "m.nii.gz", "--tilt", "correct")[0] == 0
    assert "--overwrite" in refused(capsys, "lungs", f, tmp_path / "m.nii.gz", "--tilt", "correct")
    csv = tmp_path / "c.csv"
    csv.write_text("patient_id,scan_id,label,path\nP,S,covid,tilt\n")
    argv = "prepare", csv, tmp_path / "cache", "--recipe", "darnet/tiny", "--jobs", "1"
    assert run(capsys, *argv)[0] == 1
    assert run(capsys, *argv, "--tilt", "correct")[0] == 0
    csv.write_text("patient_id,scan_id,label,path,tilt\nP,S,covid,tilt,correct\n")
    assert run(capsys, *argv[:2], tmp_path / "cache2", *argv[3:])[0] == 0


def test_words_of_the_command_line():
    known = {"--tilt", "--overwrite", "--recompute"}
    assert as_options("pass overwrite=True.", known) == "pass --overwrite."
    assert (
        as_options("Use quarter=False or tilt='correct'.", known)
        == "Use quarter=False or --tilt correct."
    )
    assert (
        as_options(
            "pass tilt='correct' (on the command line --tilt correct; in a cohort, correct) now",
            known,
        )
        == "pass --tilt correct now"
    )
    assert (
        as_options("pass a=True (on the command line --other)", known)
        == "pass a=True (on the command line --other)"
    )


@pytest.mark.parametrize(
    "line",
    [
        "audit c.csv --jobs 0",
        "prepare c.csv out --jobs -1",
        "study s.toml --out o --jobs 0",
        "train c.csv o --workers -1",
        "evaluate c.csv --run r --workers x",
        "train c.csv o --fold -1",
        "train c.csv o --save-minutes nan",
        "segment a b.nii.gz --run r --size 0",
        "demo --epochs 0",
        "report r --paper darnet --out o --draws 0",
        "",
        "nothing",
        "inspect",
        "inspect a --what",
        "inspect a --tilt left",
        "predict a",
    ],
)
def test_wrong_options(capsys, monkeypatch, tmp_path, line):
    "One line, exit code 2, nothing written; callers of the parser get a typed error"
    monkeypatch.chdir(tmp_path)
    assert "--help" in refused(capsys, *line.split())
    with pytest.raises(UsageError):
        parser().parse_args(line.split())
    assert issubclass(UsageError, DataError) and not list(tmp_path.iterdir())


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"covid-ct {covid_ct.__version__}\n"


# ---- streams


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_streams_that_carry_little(work, encoding):
    "Windows redirects in cp1252: the text arrives, with plain characters"
    env = dict(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    done = fresh("inspect", work / "chest.nii.gz", **env)
    lines = done.stdout.decode(encoding).splitlines()
    bars = next(x for x in lines if x.startswith("values")).split("|")[1]
    assert (
        done.returncode == 0 and not done.stderr and "48" in lines[0] and "?" not in "".join(lines)
    )
    assert len(bars) == 42 and "@" in bars and set(bars) <= set(" .:-=+*#@")
    if encoding == "ascii":
        return
    done = fresh("models", **env)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) > 15


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("argv", [("models",), ("--help",), ("train", "--help")], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(argv, unbuffered):
    "The reader has left before the first line"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from covid_ct.cli import main; sys.exit(main())",
            *argv,
        ],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    quiet = {141} if argv == ("models",) else {0, 141}  # argparse drops a help nobody reads
    assert done.returncode in quiet and done.stderr == b""
