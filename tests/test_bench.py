"""The benchmark's own logic: one ratio, memory that means something, rows that fail alone,
results after every row."""

import importlib
import json
import subprocess
import sys
import time

import pytest

import bench
from bench import BenchError, Case
from bench import __main__ as command

MODULES = command.modules()


def fill(mb):
    "A stage that takes so many MB"
    import numpy as np

    yield
    yield dict(sum=float(np.ones(int(mb * 1e6 / 8)).sum()))


def broken():
    yield
    raise ValueError("of no use")


def good():
    yield bench.row("good", 1, 2, "s")


def fails():
    yield bench.row("before", 4, 2, "s")
    raise ZeroDivisionError("float division by zero")


def hangs():
    yield bench.row("soon", 1, 1, "s")
    time.sleep(60)


CASES = [Case("good", good), Case("fails", fails), Case("hangs", hangs, 8), Case("again", good)]


@pytest.fixture
def toy(monkeypatch):
    "This file as a module of the benchmark, for children too"
    monkeypatch.setitem(sys.modules, "bench.toy", sys.modules[__name__])
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_bench, bench.__main__ as m; "
        "sys.modules['bench.toy'] = test_bench; m.run_case('toy', int(sys.argv[1]))"
    )

    def started(module, number, errors):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(number)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=bench.ROOT,
            start_new_session=True,
        )

    monkeypatch.setattr(command, "started", started)
    monkeypatch.setattr(command, "modules", lambda: ["toy"])


def test_a_ratio_is_the_peer_s_number_over_ours():
    assert bench.row("a", 2, 6, "s") == dict(name="a", unit="s", ours=2, peer=6, ratio=3)
    for ours, peer in ((0, 1), (1, 0), (-1, 1), (float("nan"), 1)):
        with pytest.raises(BenchError, match="a: .* no ratio"):
            bench.row("a", ours, peer, "s")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_declares_its_rows_alike(name):
    "Cases with names and limits; ratios and dictionaries of rows are made in one place only"
    module = importlib.import_module(f"bench.{name}")
    assert module.CASES and all(
        isinstance(c, Case) and c.name and callable(c.rows) and 0 < c.limit <= 300
        for c in module.CASES
    )
    text = open(module.__file__, encoding="utf-8").read()
    assert "ratio=" not in text and "ru_maxrss" not in text and "\ndef bench(" not in text


def test_memory_is_what_the_work_adds():
    "100 and 200 MB, although the process that asks is larger than both"
    import numpy as np

    held = np.ones(40_000_000)
    for mb in (100, 200):
        got = bench.measured("test_bench:fill", mb)
        assert got["mb"] == pytest.approx(mb, rel=0.1) and got["sum"] == pytest.approx(mb * 1e6 / 8)
    assert bench.peak_mb() > held.nbytes / 1e6 > 300


def test_a_process_that_fails_says_why():
    with pytest.raises(BenchError, match="ValueError: of no use"):
        bench.measured("test_bench:broken")


def test_one_command_runs_all(toy, tmp_path, monkeypatch, capsys):
    """A case that fails after a row, and one that hangs: both are told, the others measured, and
    each row was written at once"""
    out, written = tmp_path / "a" / "results.json", []
    whole = command.write_atomic

    def write(path, text):
        written.append(len(json.loads(text)["results"]))
        return whole(path, text)

    monkeypatch.setattr(command, "write_atomic", write)
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out)])
    assert command.main() == 0
    rows = json.loads(out.read_text())["results"]
    assert written == [1, 2, 3, 4, 5, 6]
    assert [r.get("ratio", r["name"]) for r in rows] == [2, 0.5, "fails", 1, "hangs", 2]
    assert "ZeroDivisionError" in rows[2]["trouble"] and "stopped" in rows[4]["trouble"]
    assert "4 rows measured, 2 not" in capsys.readouterr().out


def test_when_the_time_is_up_it_ends(toy, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out), "--minutes", "0"])
    assert command.main() == 1
    rows = json.loads(out.read_text())["results"]
    assert [r["name"] for r in rows] == ["good", "fails", "hangs", "again"]
    assert all("time is up" in r["trouble"] for r in rows[1:])


def test_a_module_that_cannot_be_imported_is_one_row():
    rows = list(command.collect(["no_such_module"], time.monotonic() + 9))
    assert len(rows) == 1 and "ModuleNotFoundError" in rows[0]["trouble"]
