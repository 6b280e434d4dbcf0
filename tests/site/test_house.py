"""Rules of the whole package: who imports whom, what `import` costs, what every public name
says of itself.

    python tests/site/test_house.py     counts long cells and functions: tests/long_*.csv"""

import ast
import csv
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.docments import docments

import covid_ct

LIB = Path(covid_ct.__file__).parent
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages([str(LIB)], "covid_ct.")
    if not m.name.endswith("._modidx")
)


def test_import_is_light():
    """The package costs next to nothing, and its commands load nothing heavy before they are
    asked to"""
    code = (
        "import sys; before = len(sys.modules); import covid_ct, covid_ct.cli; "
        "heavy = ('torch', 'SimpleITK', 'matplotlib', 'sklearn', 'pandas'); "
        "print(len(sys.modules) - before, *(m for m in heavy if m in sys.modules))"
    )
    modules, *heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not heavy and int(modules) < 250, (modules, heavy)


def public(module):
    m = importlib.import_module(module)
    for name in getattr(m, "__all__", ()):
        obj = getattr(m, name)
        if (inspect.isfunction(obj) or inspect.isclass(obj)) and obj.__module__ == module:
            yield name, obj


@pytest.mark.parametrize("module", MODULES)
def test_documented(module):
    "Every public name has a docstring, every parameter a comment, every return an annotation"
    missing = []
    for name, obj in public(module):
        if not (obj.__doc__ or "").strip() or obj.__doc__.startswith(f"{name}("):
            missing.append(f"{name}: no docstring")
        if inspect.isclass(obj):
            continue
        said, sig = docments(obj, full=True), inspect.signature(obj)
        for p, q in sig.parameters.items():
            if q.kind in (q.VAR_POSITIONAL, q.VAR_KEYWORD):
                continue  # docments does not read these
            if not said[p].docment:
                missing.append(f"{name}: {p} has no comment")
        yields = inspect.isgeneratorfunction(inspect.unwrap(obj))
        if not yields and sig.return_annotation is sig.empty:
            missing.append(f"{name}: no return annotation")
    assert not missing, "\n".join(missing)


def test_no_trace_of_a_machine():
    "No path of a machine, no home folder, in anything that is committed"
    root = LIB.parent
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True
    ).stdout.split("\n")
    if not any(tracked):
        tracked = [str(p.relative_to(root)) for p in root.glob("covid_ct/**/*.py")]
    bad = []
    for f in filter(None, tracked):
        p = root / f
        if (
            p.suffix in {".py", ".ipynb", ".md", ".ini", ".txt", ".js", ".toml", ""}
            and p.is_file()
            and p.name != "test_house.py"
        ):
            bad += [
                f"{f}: {m}"
                for m in re.findall(
                    r"/(?:home|root|Users|work)/\w[\w./-]*|/tmp/[\w./-]+",
                    p.read_text("utf-8", errors="ignore"),
                )
            ]
    assert not bad, "\n".join(bad[:20])


LONG_FUNCTIONS = Path(__file__).parents[1] / "long_functions.csv"
FUNCTION, CELL = 40, 25  # lines, as the style guide says
LONG = Path(__file__).parents[1] / "long_cells.csv"  # pages over the cell's budget, and how often


def pages():
    found = [LIB.parent / "index.ipynb", *(LIB.parent / "nbs").rglob("*.ipynb")]
    hidden = [p for p in found if any(n[0] in "._" for n in p.relative_to(LIB.parent).parts)]
    return sorted(set(found) - set(hidden))


def cells_of(page):
    return json.loads(page.read_text("utf-8"))["cells"]


def name_of(page):
    return page.relative_to(LIB.parent).as_posix()


def lines_of(node):
    return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


def long_functions(source):
    """Name and lines of the functions and methods over the cap; one inside of another counts for
    both"""
    nodes = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [(n.name, lines_of(n)) for n in nodes if lines_of(n) > FUNCTION]


def is_long(source):
    """Whether an exported cell is over its budget: a class or a function that stands alone stays
    whole"""
    if not source.startswith("#| export") or len(source.splitlines()) <= CELL:
        return False
    body = ast.parse(source).body
    return len(body) > 1 or not isinstance(body[0], (ast.ClassDef, ast.FunctionDef))


def long_cells():
    "Page → number of exported cells over the budget"
    counts = {name_of(p): sum(is_long("".join(c["source"])) for c in cells_of(p)) for p in pages()}
    return {name: n for name, n in counts.items() if n}


def test_budgets_by_hand():
    f = "def f():\n" + "    x = 1\n" * 39
    assert not long_functions(f) and long_functions("@staticmethod\n" + f) == [("f", 41)]
    assert long_functions("class A:\n    def g(self):\n" + "        x = 1\n" * 40) == [("g", 41)]
    assert not is_long("#| export\n" + f) and is_long("#| export\ny = 1\n" + f)
    assert not is_long("#| export\n" + "x = 1\n" * 24) and is_long("#| export\n" + "x = 1\n" * 25)
    assert not is_long(f + "y = 1\n" * 99)


def functions_over_the_cap():
    "Module and name → lines"
    return {
        f"{p.relative_to(LIB).as_posix()}:{name}": n
        for p in sorted(LIB.rglob("*.py"))
        if p.name != "_modidx.py"
        for name, n in long_functions(p.read_text("utf-8"))
    }


def test_no_function_over_40_lines():
    "But for those that are listed, each with its lines; the list only gets shorter"
    with open(LONG_FUNCTIONS, newline="", encoding="utf-8") as f:
        allowed = {r["function"]: int(r["lines"]) for r in csv.DictReader(f)}
    found = functions_over_the_cap()
    more = {name: n for name, n in found.items() if n > allowed.get(name, 0)}
    assert not more, f"functions of more than {FUNCTION} lines: {more}"
    gone = sorted(set(allowed) - set(found))
    assert not gone, f"better than {LONG_FUNCTIONS.name} says, shorten it there: {gone}"


def test_no_exported_cell_over_25_lines():
    "But for the pages that are listed, each with how many; the list only gets shorter"
    with open(LONG, newline="", encoding="utf-8") as f:
        allowed = {r["page"]: int(r["cells"]) for r in csv.DictReader(f)}
    found = long_cells()
    more = {name: n for name, n in found.items() if n > allowed.get(name, 0)}
    assert not more, f"cells of more than {CELL} lines that are not one definition: {more}"
    fewer = {name: found.get(name, 0) for name in allowed if found.get(name, 0) < allowed[name]}
    assert not fewer, f"better than {LONG.name} says, shorten it there: {fewer}"


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.stem)
def test_a_page_opens_with_title_and_line(page):
    first = next("".join(c["source"]) for c in cells_of(page) if c["cell_type"] == "markdown")
    assert re.fullmatch(r"# .+\n\n> .+", first), (
        "the title cell holds the title and one line, the site drops the rest"
    )


if __name__ == "__main__":
    with open(LONG, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([("page", "cells"), *long_cells().items()])
    with open(LONG_FUNCTIONS, "w", newline="", encoding="utf-8") as f:
        rows = [("function", "lines"), *functions_over_the_cap().items()]
        csv.writer(f, lineterminator="\n").writerows(rows)
