"""The choice of `make quick` is kept honest: its record names real tests and stays below two
minutes."""

import ast
import subprocess
import sys

import pytest
import quick


def functions(path):
    "The tests of a file, with the classes they are in"
    for node in ast.parse(path.read_text("utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        before = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        yield from (
            before + n.name
            for n in inside
            if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
        )


def test_the_record_is_of_these_tests(root):
    """Nine of ten that are recorded exist, and eight of ten that exist are recorded, or `make
    seconds` has to record anew"""
    there = {f"{p.name}::{n}" for p in (root / "tests").rglob("test_*.py") for n in functions(p)}
    marked = {
        n
        for n in there
        if n.split("::")[0] in ("test_browser_viewer.py", "test_site.py", "test_lab.py")
    }
    recorded = set(quick.recorded())
    gone, unknown = recorded - there, there - recorded - marked
    assert len(gone) < 0.1 * len(recorded), sorted(gone)
    assert len(unknown) < 0.2 * len(there), sorted(unknown)


def test_what_is_quick_ends_in_two_minutes():
    seconds = quick.recorded()
    chosen = {name: s for name, s in seconds.items() if s <= quick.LIMIT}
    assert sum(chosen.values()) < quick.TOTAL
    assert len(chosen) > len(seconds) / 2


def test_pages_and_the_browser_are_not_quick(root):
    "Asked of pytest itself"
    ask = [
        "tests/site/test_pages.py",
        "tests/site/test_lab.py",
        "tests/test_quick.py",
        "--collect-only",
        "-m",
        "quick",
    ]
    r = subprocess.run(
        [sys.executable, "-m", "pytest", *ask, "-p", "no:cacheprovider"],
        cwd=root,
        text=True,
        capture_output=True,
    )
    assert r.returncode == 0 and "test_what_is_quick_ends" in r.stdout
    assert "test_pages.py::test_runs[" not in r.stdout and "test_live_viewer" not in r.stdout


@pytest.mark.parametrize(
    "seconds,marks,want",
    [
        (0, [], True),
        (99, [], False),
        (0, ["slow"], False),
        (0, ["browser"], False),
        (0, ["gpu"], True),
    ],
)
def test_the_rule_by_hand(seconds, marks, want):
    class Item:
        nodeid = "tests/test_a.py::test_b[x-1]"

        def get_closest_marker(self, name):
            return name in marks

    assert quick.is_quick(Item(), {"test_a.py::test_b": seconds}) == want


def test_a_record_becomes_a_table(tmp_path, monkeypatch):
    lines = [
        "0.500\ttests/test_a.py::test_b[x]\n",
        "0.250\ttests/test_a.py::test_b[y]\n",
        "2\ttests/test_a.py::A::test_c\n",
    ]
    (tmp_path / "record").write_text("".join(lines))
    monkeypatch.setattr(quick, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(sys, "argv", ["quick.py", str(tmp_path / "record")])
    assert quick.main() == 0
    assert quick.recorded(tmp_path / "table.csv") == {
        "test_a.py::test_b": 0.75,
        "test_a.py::A::test_c": 2,
    }


def test_seconds_count_what_a_child_used():
    start = quick.used()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert quick.used() - start > 0.05
