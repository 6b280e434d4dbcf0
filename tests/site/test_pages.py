"""The notebooks are the source: they run, they are clean, and the library and README.md are what
they make."""

import csv
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from page_process import run_page
from stage import ROOT, sources
from test_course import LESSONS, assert_judged, with_solutions

import nbs

RUFF = ROOT / "tests" / "ruff_left.csv"  # findings that are still to be mended, by rule
PAGES = [p.relative_to(ROOT).as_posix() for p in sources()]
EXECUTED = [p for p in PAGES if not p.startswith("nbs/reports/")]


def cells(page):
    return json.loads((ROOT / page).read_text("utf-8"))["cells"]


def environment(folder):
    "Of a page that is run: one thread, unless the caller's environment says otherwise"
    fixed = dict(MPLBACKEND="agg", TMPDIR=str(folder), COVID_CT_COURSE=str(folder / "course"))
    return {"OMP_NUM_THREADS": "1", **os.environ, **fixed}


def test_threads_are_the_callers_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert environment(tmp_path)["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment(tmp_path)["OMP_NUM_THREADS"] == "1"


def run_lesson(page, folder):
    "A lesson with the code of its solutions, in a fresh process"
    nbformat.write(with_solutions(page), folder / "lesson.ipynb")
    ran, printed = run_page(
        folder / "lesson.ipynb", environment(folder), folder.with_suffix(".log")
    )
    assert ran, printed[-4000:]
    assert_judged(page, folder / "course")


@pytest.mark.parametrize("page", EXECUTED)
def test_runs(page, tmp_path):
    """Top to bottom in a fresh kernel, leaving nothing behind; in a lesson, each exercise
    refuses its unsolved cell and accepts its solution"""
    before = {p for p in (ROOT / page).parent.iterdir()}
    if page in LESSONS:
        run_lesson(page, tmp_path)
    else:
        ran, printed = run_page(ROOT / page, environment(tmp_path), tmp_path.with_suffix(".log"))
        assert ran, printed[-4000:]
    assert {p for p in (ROOT / page).parent.iterdir() if "checkpoint" not in p.name} <= before, (
        "the page left files beside itself"
    )


@pytest.mark.parametrize("page", PAGES)
def test_tidy(page):
    "Clean, small, with outputs, and a text behind every picture"
    text = (ROOT / page).read_text("utf-8")
    assert text == nbs.cleaned(text, ROOT / page), "run `make export`"
    assert len(text) < 1_100_000
    ran = 0
    for c in cells(page):
        if c["cell_type"] != "code":
            continue
        source = "".join(c["source"])
        assert not re.search(r"^from .* import \*", source, re.M)
        assert not any(o["output_type"] == "error" for o in c["outputs"])
        ran += bool(c["outputs"])
        if any("image/png" in o.get("data", {}) for o in c["outputs"]):
            assert re.search(r"^#\| fig-alt: *\S", source, re.M), (
                f"a figure without alt text: {source[:200]}"
            )
    assert ran, "the page is stored without its outputs: run `make run`"


def test_ruff_finds_no_more():
    "Modules, notebooks and tests, with the settings of pyproject.toml; what is left only shrinks"
    ruff = shutil.which(
        "ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if ruff is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [ruff, "check", "--no-cache", "--statistics", "--output-format", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    found = {r["code"]: r["count"] for r in json.loads(done.stdout)}
    with open(RUFF, newline="", encoding="utf-8") as f:
        allowed = {r["rule"]: int(r["findings"]) for r in csv.DictReader(f)}
    more = {rule: n for rule, n in found.items() if n > allowed.get(rule, 0)}
    assert not more, f"`ruff check` finds more than {RUFF.name} allows: {more}"
    fewer = {rule: found.get(rule, 0) for rule in allowed if found.get(rule, 0) < allowed[rule]}
    assert not fewer, f"better than {RUFF.name} says, lower it there: {fewer}"


def test_export_in_sync(tmp_path):
    "A fresh export gives the library that is committed, and leaves nothing out"
    for d in ("nbs", "covid_ct"):
        shutil.copytree(
            ROOT / d,
            tmp_path / d,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for py in (tmp_path / "covid_ct").rglob("*.py"):
        if py.name != "__init__.py":  # written by hand: the public face
            py.unlink()
    subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=tmp_path,
        check=True,
    )
    names = {
        p.relative_to(r).as_posix()
        for r in (ROOT, tmp_path)
        for p in (r / "covid_ct").rglob("*.py")
    }
    _, differ, missing = filecmp.cmpfiles(ROOT, tmp_path, sorted(names), shallow=False)
    assert not differ and not missing, f"run `make export`: {differ} {missing}"


def test_readme_in_sync():
    r = subprocess.run(
        [sys.executable, "docs/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stderr[-500:]
