"""A bounded run of tests/fuzz.py: damaged files of every kind give a scan or a typed error, never a
crash, a hang or a flood"""

import dataclasses
import os
import time
import warnings

import fuzz
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs resource limits of a POSIX system"
)


def test_bounded():
    counts, failures = fuzz.run(seed=20, cases=120 * len(fuzz.KINDS), minutes=1)
    assert not failures, "\n\n".join(
        f"{kind} {which}\n{text}" for kind, which, text in failures[:5]
    )
    assert (
        all(sum(c.values()) for c in counts.values())
        and sum(c["refused"] for c in counts.values()) > 30
    )


def test_two_header_readers_never_differ(tmp_path):
    "A damaged header that our walk and pydicom both accept means the same to both"
    from covid_ct.io.dicom_header import _slow, _walk, find_damage, find_foreign, slices_of

    good, both = (fuzz.seeds(tmp_path / "good")["dicom"] / "IM3").read_bytes(), 0
    p = tmp_path / "x"
    for i in range(600):
        b = fuzz.bend(good, np.random.default_rng([8, i]))
        p.write_bytes(b)
        try:
            fast = _walk(b)
            with open(p, "rb") as f, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                slow = _slow(f, True)
            if any(find_foreign(h) or find_damage(h, p) for h in (fast, slow)):
                continue
            a, b = (
                [dataclasses.replace(s, uid="") for s in slices_of(h, p)] for h in (fast, slow)
            )  # but for zeros inside a uid
        except Exception:
            continue
        assert a == b, i
        both += 1
    assert both > 30


def test_it_is_the_same_for_the_same_seed(tmp_path):
    good = fuzz.seeds(tmp_path / "good")
    for kind in ("nii.gz", "dicom"):
        a, b = (
            fuzz.damaged(kind, good[kind], tmp_path / name, np.random.default_rng([3, 9]))
            for name in "ab"
        )

        def read(p):
            return [
                f.read_bytes() for f in sorted(p.parent.rglob("*") if p.is_file() else p.rglob("*"))
            ]

        assert read(a) == read(b) and read(a) != [
            f.read_bytes()
            for f in sorted(
                good[kind].parent.rglob("*") if good[kind].is_file() else good[kind].rglob("*")
            )
        ]


@pytest.mark.parametrize("fault", ["crash", "hang", "flood", "other"])
def test_it_can_fail(tmp_path, monkeypatch, fault):
    "What the run looks for is found when it is there"
    (tmp_path / "x").write_text("x")
    monkeypatch.setattr(
        fuzz, "child", {"crash": _crash, "hang": _hang, "flood": _flood, "other": _other}[fault]
    )
    reader = fuzz.Reader()
    try:
        text = reader(tmp_path / "x", 3 if fault == "hang" else 30)
    finally:
        reader.close()
    assert {
        "crash": "crashed: exit code",
        "hang": "still reading",
        "flood": "MB more",
        "other": "ZeroDivisionError",
    }[fault] in text


def _run(tasks, answers, answer):
    fuzz.answer = answer
    fuzz.__dict__["_child"](tasks, answers)


fuzz._child = fuzz.child


def _crash(tasks, answers):
    _run(tasks, answers, lambda p: os.abort())


def _hang(tasks, answers):
    _run(tasks, answers, lambda p: time.sleep(60))


def _flood(tasks, answers):
    _run(tasks, answers, lambda p: (np.ones(15 * 10**7), "read")[1])


def _other(tasks, answers):
    _run(tasks, answers, lambda p: str(ZeroDivisionError("ZeroDivisionError")))
