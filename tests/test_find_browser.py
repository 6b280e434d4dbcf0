"""The tests' browser: found, got, or missing without an error."""

import os
import stat
import subprocess
import sys

import find_browser as fb
import pytest


@pytest.fixture
def bare(monkeypatch, tmp_path):
    "A machine without any browser; its folder of programs"
    monkeypatch.delenv("COVID_CT_BROWSER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fb, "places", list)
    monkeypatch.setattr(fb, "of_playwright", lambda: None)
    fb.find_browser.cache_clear()
    yield tmp_path
    fb.find_browser.cache_clear()


def program(path, text="exit 0"):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_none_is_found_and_none_is_an_answer(bare, monkeypatch):
    assert fb.find_browser() is None
    program(bare / "microsoft-edge")
    assert fb.candidates() == [str(bare / "microsoft-edge")]
    monkeypatch.setenv("COVID_CT_BROWSER", "none")
    assert fb.candidates() == []
    monkeypatch.setenv("COVID_CT_BROWSER", str(program(bare / "mine")))
    assert fb.candidates() == [str(bare / "mine")]


def test_an_app_counts_as_a_name_does(bare, monkeypatch):
    app = program(bare / "Google Chrome")
    monkeypatch.setattr(fb, "places", lambda: [bare / "missing", app])
    assert fb.find_browser() == str(app)


def test_a_program_that_is_no_browser_does_not_start(tmp_path):
    assert not fb.starts(str(program(tmp_path / "chromium", "exit 127")))


def test_the_second_is_taken_where_the_first_does_not_start(bare, monkeypatch):
    first, second = program(bare / "chromium"), program(bare / "google-chrome")
    monkeypatch.setattr(fb, "starts", lambda path: path == str(second))
    assert fb.candidates()[0] == str(first) and fb.get_browser() == str(second)


@pytest.mark.parametrize("works", ["apt-get", "playwright", "neither"])
def test_ways_are_tried_in_turn_and_none_is_an_error(bare, monkeypatch, capsys, works):
    program(bare / "apt-get", f'echo "$@" >> {bare}/asked')
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(fb, "starts", lambda path: True)
    tried = []

    def attempt(commands):
        tried.append(commands[-1][0 if "apt-get" in commands[-1] else 2])
        if tried[-1] == works:
            program(bare / "chromium")
        return tried[-1] == works

    monkeypatch.setattr(fb, "attempt", attempt)
    assert fb.main() == 0
    out, err = capsys.readouterr()
    assert tried == {"apt-get": ["apt-get"]}.get(works, ["apt-get", "playwright"])
    assert out.strip() == ("none" if works == "neither" else str(bare / "chromium"))
    assert (fb.ADVICE in err) == (works == "neither") and not (bare / "asked").exists()


def test_only_root_is_offered_apt(bare, monkeypatch):
    program(bare / "apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert [w[-1][2] for w in fb.ways()] == ["playwright"]


def test_what_fails_or_hangs_is_given_up():
    assert fb.attempt([[sys.executable, "-c", ""]])
    assert not fb.attempt(
        [[sys.executable, "-c", ""], [sys.executable, "-c", "raise SystemExit(1)"]]
    )
    assert not fb.attempt([["no-such-program"]])
    assert not fb.attempt([[sys.executable, "-c", "import time; time.sleep(60)"]], seconds=0.2)


def test_without_a_browser_its_tests_are_skipped_in_one_line(root):
    "As in continuous integration, over two files"
    env = {**os.environ, "COVID_CT_BROWSER": "none", "CI": "true"}
    ask = [
        "tests/site/test_lab.py",
        "tests/widgets/test_browser_viewer.py",
        "-p",
        "no:cacheprovider",
    ]
    r = subprocess.run(
        [sys.executable, "-m", "pytest", *ask], cwd=root, env=env, text=True, capture_output=True
    )
    lines = [line for line in r.stdout.splitlines() if line.startswith("SKIPPED")]
    assert r.returncode == 0 and len(lines) == 1 and fb.ADVICE in lines[0], r.stdout[-2000:]
    assert " failed" not in r.stdout and " error" not in r.stdout
