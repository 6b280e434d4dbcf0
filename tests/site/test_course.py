"""The course: verdicts and hints, exercises to fail and to solve, lessons in the wheel."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from stage import ROOT, page_name, sources

import nbs
from covid_ct.course import checks as course
from covid_ct.course.checks import (
    CourseError,
    _for_students,
    _lesson_facts,
    check,
    copy_course,
    exercise,
    lessons,
    scores,
)

importlib.import_module("covid_ct.course.exercises")
COURSE = dict(course._BOOK)
LESSONS = [
    p.relative_to(ROOT).as_posix()
    for p in sources()
    if p.parent.name == "lessons" and not p.name.startswith("0")
]


@pytest.fixture(autouse=True)
def book(monkeypatch):
    "An empty book of exercises"
    monkeypatch.setattr(course, "_BOOK", {})
    monkeypatch.delenv("COVID_CT_COURSE", raising=False)


def cells(page):
    return [
        (c["cell_type"], "".join(c["source"]), c.get("outputs", []))
        for c in json.loads((ROOT / page).read_text("utf-8"))["cells"]
    ]


def text_of(outputs):
    return "\n".join(
        "".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs
    )


SOLUTION = re.compile(
    r"<details>\n<summary>Solution ([\d.]+)</summary>\n\n(.*?)\n\n</details>", re.S
)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def solutions(page):
    "Exercise → the code of its solution"
    md = "\n\n".join(s for t, s, _ in cells(page) if t == "markdown")
    return {name: "\n".join(PYTHON.findall(body)) for name, body in SOLUTION.findall(md)}


def with_solutions(page):
    "The lesson as it is stored, and after each exercise the code of its solution as a cell"
    nb = nbformat.read(ROOT / page, 4)
    out = []
    for c in nb.cells:
        out.append(c)
        if c.cell_type == "markdown":
            for _, body in SOLUTION.findall(c.source):
                out += [nbformat.v4.new_code_cell(code) for code in PYTHON.findall(body)]
    return nbformat.v4.new_notebook(cells=out, metadata=nb.metadata)


def assert_judged(page, log):
    "Each exercise refused its empty answer and accepted its solution; `log`: `COVID_CT_COURSE`"
    said = (
        [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    )
    for name, kind in _lesson_facts(ROOT / page)["exercises"].items():
        of = [s["right"] for s in said if s["name"] == name and s["kind"] == kind]
        assert of and not of[0], f"{page}: exercise {name} accepts its empty answer, or has none"
        assert len(of) > 1 and of[-1], f"{page}: exercise {name} has no solution that is accepted"


@pytest.mark.parametrize("page", LESSONS)
def test_an_exercise_is_written_as_agreed(page):
    "Heading, the student's cell without output, folded solution; the judge is in the library"
    found, number = cells(page), page.split("/")[-1].split("_")[0]
    text = "\n".join(s for t, s, _ in found if t == "markdown")
    facts, solved = _lesson_facts(ROOT / page), solutions(page)
    assert 2 <= len(facts["exercises"]) <= 6 and set(facts["exercises"].values()) <= set(
        course._KINDS
    )
    assert ":::" not in text and "What you will be able to do" in text
    assert set(solved) == set(facts["exercises"])
    for name, kind in facts["exercises"].items():
        assert name.startswith(number + ".") and COURSE[name].kind == kind
        asks = rf"^(?:ct\.)?check\('{re.escape(name)}'"
        student = [o for t, s, o in found if t == "code" and re.search(asks, s, re.M)]
        assert student == [[]], f"{name}: one cell of the student, stored without output"
        assert re.search(asks, solved[name], re.M), f"{name}: the solution calls `check`"
    shown = "".join(s + json.dumps(o) for t, s, o in found if t == "code")
    assert "@exercise" not in shown and "not yet" not in shown


@pytest.mark.parametrize("page", LESSONS)
def test_the_first_hint_is_not_in_a_lesson(page):
    text = (ROOT / page).read_text("utf-8")
    for name in _lesson_facts(ROOT / page)["exercises"]:
        assert COURSE[name].hints[0] not in text, name


def test_every_exercise_has_a_lesson():
    asked = [name for page in LESSONS for name in _lesson_facts(ROOT / page)["exercises"]]
    assert sorted(asked) == sorted(COURSE)


def test_outputs_of_a_student_are_not_stored():
    cell = dict(
        cell_type="code", id="a", metadata={}, execution_count=1, source="ct.check('1.1', 1)"
    )
    shown = dict(output_type="stream", name="stdout", text=["not yet"])
    nb = dict(cells=[{**cell, "outputs": [shown]}], metadata={}, nbformat=4, nbformat_minor=5)
    lesson, other = ROOT / "nbs/lessons/1_x.ipynb", ROOT / "nbs/15_course/01_checks.ipynb"
    assert "not yet" not in nbs.cleaned(json.dumps(nb), lesson)
    assert "not yet" in nbs.cleaned(json.dumps(nb), other)


def test_a_lesson_that_judges_wrongly_is_noticed(tmp_path):
    "An empty answer that is accepted, a solution that never ran: both stop the run of the lessons"
    page, log = LESSONS[0], tmp_path / "log"
    facts = _lesson_facts(ROOT / page)["exercises"]

    def write(rows):
        log.write_text("\n".join(json.dumps(r) for r in rows), "utf-8")

    good = [dict(name=n, kind=k, right=r) for n, k in facts.items() for r in (False, True)]
    write(good)
    assert_judged(page, log)
    write([{**good[0], "right": True}, *good])
    with pytest.raises(AssertionError, match="accepts its empty answer"):
        assert_judged(page, log)
    write(good[2:])
    with pytest.raises(AssertionError, match="or has none"):
        assert_judged(page, log)
    write(good[:-1])
    with pytest.raises(AssertionError, match="no solution"):
        assert_judged(page, log)
    with pytest.raises(AssertionError):
        assert_judged(page, tmp_path / "nothing")


def ask(*hints):
    @exercise("1.1", "derive", hints or ("first", "second"))
    def judge(answer):
        if answer == 7:
            return "seven is the hint of the day"
        return answer == 8

    return judge


def test_hints_rise():
    ask("a", "b")
    said = [check("1.1", x).said for x in (..., None, 1, 2, 3, 4)]
    assert said == [
        "",
        "",
        "a",
        "b",
        "The solution is folded below.",
        "The solution is folded below.",
    ]
    assert scores().loc["1.1"].tolist() == ["derive", 4, False]
    right = check("1.1", 8)
    assert right and right.said == "1 of 1 solved." and scores().solved.all()
    assert not check("1.1", 9) and scores().solved.all()  # what was solved stays solved


def test_a_hint_that_fits_comes_first():
    ask("a", "b")
    assert check("1.1", 7).said == "seven is the hint of the day"
    assert check("1.1", 7).said == "seven is the hint of the day a"
    assert check("1.1", 7).said == "seven is the hint of the day b"


@pytest.mark.parametrize(
    "answer",
    ["eight", [8], np.array([8, 8]), np.zeros((2, 3)), {"a": 8}, lambda x: x, b"8", object()],
)
def test_another_type_is_a_hint(answer):
    ask("a")
    verdict = check("1.1", answer)
    assert not verdict and verdict.said and "Traceback" not in verdict.said


def test_what_the_judge_cannot_use_is_told_with_its_type_and_shape():
    @exercise("1.2", "derive", "hint")
    def judge(answer):
        return math.isclose(answer["volume"] + answer["mask"].sum(), 1)

    assert "list" in check("1.2", [1]).said and "TypeError" in check("1.2", [1]).said
    assert (
        "'volume'" in check("1.2", {"size": 1}).said
        and "KeyError" in check("1.2", {"size": 1}).said
    )

    @exercise("1.3", "derive", "hint")
    def by_element(answer):
        return answer == np.ones(3)

    assert "of shape (3,)" in check("1.3", np.ones(3)).said


def test_a_function_of_the_student_that_fails_is_a_hint():
    @exercise("1.4", "extend", "hint")
    def judge(f):
        return f(0) == 1

    assert "ZeroDivisionError" in check("1.4", lambda x: 1 / x).said

    def stub(x): ...

    before = scores().attempts["1.4"]
    assert check("1.4", stub).said == "" and scores().attempts["1.4"] == before


@pytest.mark.parametrize("answer", [..., None, [1, ...], {"a": {"b": ...}}, (None,)])
def test_untouched_is_no_attempt(answer):
    @exercise("1.5", "predict", "hint")
    def judge(answer):
        raise AssertionError("was asked")

    assert not check("1.5", answer) and course.find_exercise("1.5").attempts == 0


def test_faults_of_an_author_are_errors():
    ask()
    for bad in (
        lambda: exercise("2.1", "think", "h"),
        lambda: exercise("2.1", "derive", ()),
        lambda: check("99.9", 1),
    ):
        with pytest.raises(CourseError):
            bad()
    with pytest.raises(CourseError, match="Known: .*1.1"):
        check("99.9", 1)


def test_what_a_judge_needs_of_the_page_is_given():
    @exercise("1.7", "derive", "hint")
    def judge(answer, total):
        return answer == total / 2

    assert check("1.7", 2, total=4) and not check("1.7", 3, total=4)
    assert "total" in check("1.7", 2).said  # a lesson that forgets it is no traceback


def test_running_the_judge_again_keeps_the_attempts():
    ask()
    check("1.1", 1)
    ask()
    assert scores().attempts["1.1"] == 1


def test_the_log_of_an_instructor(tmp_path, monkeypatch):
    monkeypatch.setenv("COVID_CT_COURSE", str(tmp_path / "log"))
    ask()
    check("1.1", ...)
    check("1.1", 1)
    check("1.1", 8)
    said = [json.loads(line) for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    assert [(s["right"], s["attempts"]) for s in said] == [(False, 0), (False, 1), (True, 2)]


def test_html_says_it_in_words_and_escapes():
    @exercise("1.6", "derive", "is 1 < 2 & 3?")
    def judge(answer):
        return False

    html = check("1.6", 1)._repr_html_()
    assert (
        "not yet" in html and "1 &lt; 2 &amp; 3" in html and " color:" not in html
    )  # the text keeps the colour of its page, light or dark


def test_lessons_need_only_lessons_before_them():
    table = lessons()
    assert all(n < i and n in table.index for i, needs in table.needs.items() for n in needs)
    with pytest.raises(CourseError, match="does not state"):
        _lesson_facts(ROOT / "nbs/00a_scan.ipynb")


def test_copied_lessons_are_whole(tmp_path):
    "No output, no link that leads nowhere, solutions folded"
    for path in copy_course(tmp_path / "course"):
        nb = nbformat.read(path, 4)
        nbformat.validate(nb)
        md = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
        assert "](../" not in md and not re.search(r"^:::", md, re.M), path.name
        assert (
            md.count("<details>")
            == md.count("</details>")
            == len(re.findall(r"<summary>.+</summary>\n\n", md))
        )
        for module in re.findall(r"\(`(covid_ct\.[\w.]+)`\)", md):
            assert importlib.util.find_spec(module), f"{path.name}: {module}"
        for other in re.findall(r"\]\((\d\w+\.ipynb)", md):
            assert (tmp_path / "course" / other).exists(), f"{path.name}: {other}"
        code = [c for c in nb.cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in code)


def test_links_of_copied_lessons_lead_to_a_public_site():
    site = course._site("https://github.com/owner/name")
    pages = {page_name(p).with_suffix(".html").as_posix() for p in sources()}
    for page in LESSONS:
        md = "\n".join(s for t, s, _ in cells(page) if t == "markdown")
        text = course._text_for_students(md, site)
        for url in re.findall(rf"\]\({re.escape(site)}/([^)#\s]*)", text):
            assert url in pages, f"{page}: {url}"


def test_without_solutions(tmp_path):
    for path in copy_course(tmp_path / "exam", solutions=False):
        assert "<summary>Solution" not in path.read_text("utf-8")


def test_nothing_is_replaced(tmp_path):
    out = tmp_path / "course"
    out.mkdir()
    name = LESSONS[1].split("/")[-1]
    (out / name).write_text("my answers")
    with pytest.raises(CourseError, match=name):
        copy_course(out)
    assert [p.name for p in out.iterdir()] == [name] and (out / name).read_text() == "my answers"
    with pytest.raises(CourseError, match="is there already"):
        copy_course(out / name)


def test_copying_twice_changes_nothing():
    "What students get is a fixed point"
    once = _for_students((ROOT / LESSONS[0]).read_text("utf-8"))
    assert _for_students(once) == once


def test_lessons_travel_in_the_wheel(tmp_path):
    "Source archive, from it a wheel, from that the lessons, with no clone in sight"
    src = tmp_path / "src"
    src.mkdir()
    for name in (
        "setup.py",
        "settings.ini",
        "MANIFEST.in",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, src)
    shutil.copytree(
        ROOT / "covid_ct", src / "covid_ct", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "nbs" / "lessons", src / "nbs" / "lessons")
    (src / "nbs" / "lessons" / ".ipynb_checkpoints").mkdir(exist_ok=True)
    (src / "nbs" / "lessons" / ".ipynb_checkpoints" / "1_x-checkpoint.ipynb").write_text("{}")
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            str(tmp_path / "dist"),
            str(src),
        ],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = sorted(n for n in z.namelist() if n.endswith(".ipynb"))
        example = {n for n in z.namelist() if n.startswith("covid_ct/static/example/")}
        z.extractall(tmp_path / "installed")
    assert {Path(n).name for n in example} >= {"config.json", "features.csv", "best.safetensors"}
    names = sorted(p.name for p in (ROOT / "nbs" / "lessons").glob("[0-9]*.ipynb"))
    assert inside == [f"covid_ct/lessons/{n}" for n in names]
    code = (
        "import covid_ct; print(covid_ct.__file__); "
        "from covid_ct.course.checks import copy_course; "
        "print([p.name for p in copy_course('mine')])"
    )
    got = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert got.returncode == 0 and str(tmp_path / "installed") in got.stdout, got.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == names
