"""`import covid_ct as ct` is enough for what most people need, and costs nothing before it is
used."""

import inspect
import json
import subprocess
import sys

import pytest

import covid_ct as ct

HEAVY = (
    "torch",
    "SimpleITK",
    "matplotlib",
    "pandas",
    "numpy",
    "sklearn",
    "seaborn",
    "captum",
    "ipywidgets",
)
PACKAGES = {"audit": "run_audit", "train": "train", "evaluate": "evaluate", "explain": "explain"}


def test_the_import_is_lazy_and_quick():
    code = (
        "import sys, time; t = time.process_time(); import covid_ct; t = time.process_time() - t;"
        f" print(t, [m for m in {HEAVY} if m in sys.modules])"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split(" ", 1)
    assert heavy.strip() == "[]" and float(seconds) < 0.1


@pytest.mark.parametrize("name", ct.__all__)
def test_every_name_is_there_and_documented(name):
    assert callable(getattr(ct, name)) and getattr(ct, name).__doc__.strip()


def test_few_names():
    assert 20 <= len(ct.__all__) <= 35 and set(PACKAGES) <= set(ct.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_subpackage_can_be_called_and_imported_from(package, monkeypatch):
    here = getattr(ct, package)
    assert inspect.ismodule(here) and here is sys.modules[f"covid_ct.{package}"]
    module, name = here._main
    __import__(module)
    monkeypatch.setattr(sys.modules[module], name, lambda *a, **k: (a, k))
    assert here(1, two=2) == ((1,), {"two": 2})


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError):
        _ = ct.no_such_name


def test_the_readme_s_lines_use_only_the_public_face(root):
    "The five lines of the front page run as they stand"
    cells = json.loads((root / "index.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    program = "\n".join(c for c in code if "covid_ct" in c or "ct." in c)
    imported = [line for line in program.splitlines() if "import" in line]
    assert set(imported) == {"import covid_ct as ct"}
    exec(compile(program, "index.ipynb", "exec"), {})
