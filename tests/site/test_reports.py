"""The reports' long runs are stored as tables. The first section of each report, Findings, reads
them: it runs here, its sentences must be those of the stored page, and the stored tables must be
those that the page shows."""

import ast
import json
import re
import sys

import pytest
from html_table import html_table
from stage import ROOT

REPORTS = ROOT / "nbs" / "reports"
PAGES = sorted(p for p in REPORTS.glob("*.ipynb") if (REPORTS / "tables" / p.stem).is_dir())
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?$")


def cells(page):
    return json.loads(page.read_text("utf-8"))["cells"]


def findings(page):
    "Code cells between the heading Findings and the next one"
    inside, found = False, []
    for cell in cells(page):
        heading = cell["cell_type"] == "markdown" and "".join(cell["source"]).startswith("## ")
        if heading:
            inside = "".join(cell["source"]).startswith("## Findings")
        if inside and cell["cell_type"] == "code":
            found.append(cell)
    return found


def run(source, names):
    "Run a cell; its last line's value"
    *head, last = ast.parse(source).body
    exec(compile(ast.Module(head, []), "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        exec(compile(ast.Module([last], []), "cell", "exec"), names)
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def shown(cell):
    "The sentence that the page stores under a cell"
    return "".join(cell["outputs"][0]["data"]["text/markdown"]) if cell["outputs"] else None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_findings_are_computed_from_the_stored_tables(page, monkeypatch):
    monkeypatch.syspath_prepend(str(REPORTS))
    names, sentences = {}, 0
    for cell in findings(page):
        value = run("".join(cell["source"]), names)
        assert (value and value.data) == shown(cell)
        sentences += value is not None
    assert sentences >= 2
    sys.modules.pop("results")


def same(kept, seen):
    "Whether a stored field is the one that the page shows, which may be rounded"
    if kept == seen or (kept == "" and seen == "NaN"):
        return True
    digits = NUMBER.match(seen)
    if not digits or not NUMBER.match(kept):
        return False
    return abs(float(kept) - float(seen)) <= 0.51 * 10 ** -len(digits[1] or "")


def tables_of(cell):
    outputs = ["".join(o.get("data", {}).get("text/html", [])) for o in cell.get("outputs", [])]
    return [html_table(html) for html in outputs if "<table" in html]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_stored_tables_are_those_of_the_page(page, monkeypatch):
    monkeypatch.syspath_prepend(str(REPORTS))
    from results import stored

    checked = set()
    for cell in cells(page):
        names = re.findall(r"store\(\s*REPORT,\s*'(\w+)'", "".join(cell["source"]))
        tables = tables_of(cell) if names else []
        for name, (columns, index, fields) in zip(names, tables, strict=True):
            kept = stored(page.stem, name)
            assert list(map(str.strip, kept.index)) == list(map(str.strip, index))
            assert kept.shape == (len(index), len(columns))
            for old, new in zip(kept.to_numpy(), fields, strict=True):
                assert all(map(same, old, new)), (name, old, new)
            checked.add(name)
    assert checked == {p.stem for p in (REPORTS / "tables" / page.stem).glob("*.csv")}
    sys.modules.pop("results")


def test_html_table_repeats_spanning_labels():
    html = (
        "<table><thead><tr><th></th><th></th><th colspan='2'>a</th></tr>"
        "<tr><th></th><th></th><th>x</th><th>y</th></tr></thead><tbody>"
        "<tr><th rowspan='2'>r</th><th>1</th><td>10</td><td>11</td></tr>"
        "<tr><th>2</th><td>20</td><td>21</td></tr></tbody></table>"
    )
    columns, index, fields = html_table(html)
    assert columns == ["a | x", "a | y"] and index == ["r | 1", "r | 2"]
    assert fields == [["10", "11"], ["20", "21"]]
