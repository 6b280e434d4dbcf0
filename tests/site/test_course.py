"""The course: verdicts and hints, exercises to fail and to solve, lessons in the wheel."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile

import nbformat
import numpy as np
import pytest
from stage import ROOT, page_name, sources

from covid_ct import course
from covid_ct.course import (
    CourseError,
    _for_students,
    _lesson_facts,
    check,
    copy_course,
    exercise,
    lessons,
    scores,
    solution,
)

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


def assert_judged(page, log):
    "Each exercise refused its unsolved cell and accepted its solution; `log`: `COVID_CT_COURSE`"
    said = (
        [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    )
    for name, kind in _lesson_facts(ROOT / page)["exercises"].items():
        of = {
            by: [
                s["right"]
                for s in said
                if s["by"] == by and s["name"] == name and s["kind"] == kind
            ]
            for by in ("check", "solution")
        }
        assert of["check"] and not any(of["check"]), (
            f"{page}: exercise {name} accepts its unsolved cell, or has none"
        )
        assert of["solution"] == [True], (
            f"{page}: exercise {name} has no solution that its judge accepts"
        )


@pytest.mark.parametrize("page", LESSONS)
def test_an_exercise_is_written_as_agreed(page):
    "Heading, folded judge, student's cell, folded reason and solution; stored *not yet* and \
*right*"
    found, number = cells(page), page.split("/")[-1].split("_")[0]
    facts = _lesson_facts(ROOT / page)
    assert 2 <= len(facts["exercises"]) <= 6 and set(facts["exercises"].values()) <= set(
        course._KINDS
    )
    assert all(name.startswith(number + ".") for name in facts["exercises"])
    assert re.search(
        r"What you will be able to do|\*\*Goals",
        "\n".join(s for t, s, _ in found if t == "markdown"),
    )
    for name in facts["exercises"]:
        code = [(s, text_of(o)) for t, s, o in found if t == "code"]
        q = re.escape(name)
        judge = [s for s, _ in code if re.search(rf"@exercise\(\s*['\"]{q}['\"]", s)]
        assert len(judge) == 1 and judge[0].startswith("#| code-fold: true"), (
            f"{name}: one judge, folded: its cell begins with `#| code-fold: true`"
        )
        student = [o for s, o in code if re.search(rf"^check\(['\"]{q}['\"]", s, re.M)]
        assert student and all("not yet" in o and ": right" not in o for o in student), (
            f"{name}: the student's cell is not stored with `not yet`"
        )
        solved = [
            (s, o) for s, o in code if s.startswith(f"#| solution: {name}\n#| code-fold: true\n")
        ]
        assert (
            len(solved) == 1
            and re.search(rf"solution\(['\"]{q}['\"]", solved[0][0].splitlines()[-1])
            and "right" in solved[0][1]
        ), f"{name}: one folded solution, stored with `right`"
        assert (
            sum(
                bool(re.search(rf'^:::.*collapse="true".*\n## Solution {q}$', s, re.M))
                for t, s, _ in found
                if t == "markdown"
            )
            == 1
        ), f"{name}: a folded reason"


def test_a_lesson_that_judges_wrongly_is_noticed(tmp_path):
    "An unsolved cell that is accepted, a solution that never ran: both stop the run of the lessons"
    page, log = LESSONS[0], tmp_path / "log"
    facts = _lesson_facts(ROOT / page)["exercises"]

    def write(rows):
        log.write_text("\n".join(json.dumps(r) for r in rows), "utf-8")

    good = [
        dict(by=by, name=n, kind=k, right=by == "solution")
        for n, k in facts.items()
        for by in ("check", "solution")
    ]
    write(good)
    assert_judged(page, log)
    write([*good, {**good[0], "right": True}])
    with pytest.raises(AssertionError, match="accepts its unsolved cell"):
        assert_judged(page, log)
    write(good[1:])
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
        "a",
        "a",
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
    assert check("1.4", stub).said == "hint" and scores().attempts["1.4"] == before


@pytest.mark.parametrize("answer", [..., None, [1, ...], {"a": {"b": ...}}, (None,)])
def test_untouched_is_no_attempt(answer):
    @exercise("1.5", "predict", "hint")
    def judge(answer):
        raise AssertionError("was asked")

    assert not check("1.5", answer) and scores().attempts["1.5"] == 0


def test_faults_of_an_author_are_errors():
    ask()
    for bad in (
        lambda: exercise("2.1", "think", "h"),
        lambda: exercise("2.1", "derive", ()),
        lambda: check("9.9", 1),
        lambda: solution("1.1", 9),
        lambda: solution("1.1", ...),
    ):
        with pytest.raises(CourseError):
            bad()
    with pytest.raises(CourseError, match="Known: 1.1"):
        check("9.9", 1)


def test_a_solution_counts_for_nobody():
    ask()
    assert solution("1.1", 8) and scores().loc["1.1"].tolist() == ["derive", 0, False]


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
    solution("1.1", 8)
    said = [json.loads(line) for line in (tmp_path / "log").read_text("utf-8").splitlines()]
    assert [(s["by"], s["right"], s["attempts"]) for s in said] == [
        ("check", False, 0),
        ("check", False, 1),
        ("check", True, 2),
        ("solution", True, 0),
    ]


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
    with pytest.raises(CourseError, match="does not declare"):
        _lesson_facts(ROOT / "nbs/00a_scan.ipynb")


def test_copied_lessons_are_whole_and_folded(tmp_path):
    taken = copy_course(tmp_path / "course")
    site = {page_name(p).with_suffix(".html").as_posix() for p in sources()} | {"index.html"}
    home = re.escape(course._site_link("../../index").removesuffix("index.html"))
    for path in taken:
        nb = nbformat.read(path, 4)
        nbformat.validate(nb)
        md = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
        assert "](../" not in md and not re.search(r"^:::", md, re.M), path.name
        assert (
            md.count("<details>")
            == md.count("</details>")
            == len(re.findall(r"<summary>.+</summary>\n\n", md))
        )
        for url in re.findall(rf"\]\({home}([^)#\s]*)", md):
            assert url in site, f"{path.name}: {url}"
        for other in re.findall(r"\]\((\d\w+\.ipynb)", md):
            assert (tmp_path / "course" / other).exists(), f"{path.name}: {other}"
        for c in nb.cells:
            if c.cell_type != "code":
                continue
            assert not c.outputs and c.execution_count is None
            assert bool(c.metadata.get("jupyter", {}).get("source_hidden")) == (
                "#| code-fold: true" in c.source or "\n@exercise(" in "\n" + c.source
            )
            assert c.metadata or not c.source.startswith("#| solution")


def test_without_solutions(tmp_path):
    for path in copy_course(tmp_path / "exam", solutions=False):
        text = path.read_text("utf-8")
        assert "#| solution" not in text and "<summary>Solution" not in text


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
        z.extractall(tmp_path / "installed")
    names = sorted(p.name for p in (ROOT / "nbs" / "lessons").glob("[0-9]*.ipynb"))
    assert inside == [f"covid_ct/lessons/{n}" for n in names]
    code = "import covid_ct; print(covid_ct.__file__); from covid_ct.course import copy_course; \
print([p.name for p in copy_course('mine')])"
    got = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert got.returncode == 0 and str(tmp_path / "installed") in got.stdout, got.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == names
