"""Results are computed in code cells, not typed into text. This test lists what looks like a result
in Markdown cells: decimals, percentages, and "all", "every" or "most" beside a table. Each finding
of a reviewed page has a reason in tests/results_in_text.csv; of other pages the number is kept and
may only shrink.

    python tests/site/test_results.py     writes the list again and keeps the reasons
"""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "results_in_text.csv"
HIDDEN = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|<[^>\n]*>|^#.*?$"
    r"|\b(?:Solution|[Ee]xercise|[Rr]un|Apache|Python) \d+\.\d+",
    re.S | re.M,
)  # code, mathematics, addresses, headings, names with a number
NUMBER = re.compile(r"(?<![\w.,])[−-]?\d+\.\d+(?![\w.]*\d)|(?<![\w.,])\d+(?:\.\d+)? ?%")
WORD = re.compile(r"\b(?:[Aa]ll|[Ee]very|[Mm]ost)\b")
OPEN = "not reviewed yet"


def pages():
    found = [ROOT / "index.ipynb", *(ROOT / "nbs").rglob("*.ipynb")]
    names = [p.relative_to(ROOT).as_posix() for p in found]
    return sorted(n for n in names if not re.search(r"(^|/)[._]", n))


def has_table(cell):
    "Whether a cell shows a table"
    if cell["cell_type"] == "markdown":
        return bool(re.search(r"^\|[ :|-]+\|$", "".join(cell["source"]), re.M))
    shown = ("".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"])
    return any("<table" in html for html in shown)


def findings(cells):
    "(cell, text) of what looks like a result"
    out = []
    for k, cell in enumerate(cells):
        if cell["cell_type"] != "markdown":
            continue
        text = HIDDEN.sub(" ", "".join(cell["source"]))
        found = NUMBER.findall(text)
        if any(has_table(c) for c in cells[max(0, k - 1) : k + 2]):
            found += WORD.findall(text)
        out += [(cell["id"], f) for f in dict.fromkeys(found)]
    return out


def of_page(name):
    return findings(json.loads((ROOT / name).read_text("utf-8"))["cells"])


def listed():
    "Page → rows of the list"
    out = {}
    with open(LIST, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            out.setdefault(row["page"], []).append(row)
    return out


@pytest.mark.parametrize("page", pages())
def test_what_looks_like_a_result_has_a_reason(page):
    rows, found = listed().get(page, []), of_page(page)
    if rows and rows[0]["reason"] == OPEN:
        assert len(found) <= int(rows[0]["text"]), "more numbers typed into text than before"
        return
    known = {(r["cell"], r["text"]) for r in rows if r["reason"].strip()}
    assert not set(found) - known, "compute it in a code cell, or give a reason in the list"


def test_findings_by_hand():
    def md(text, id="a"):
        return dict(cell_type="markdown", id=id, source=[text])

    table = dict(cell_type="code", id="t", source="", outputs=[{"data": {"text/html": "<table>"}}])
    assert findings([md("The AUC is 0.93, in 12 % of all patients.")]) == [
        ("a", "0.93"),
        ("a", "12 %"),
    ]
    assert findings([table, md("Every row.")]) == [("a", "Every")]
    assert findings([md("| a |\n|---|\n\nmost rows")]) == [("a", "most")]
    assert not findings([md("`0.93`, $x=0.5$, [a](b1.2), 1.2.3, exercise 1.2\n\n# 0.5")])


def test_the_list_names_pages():
    assert set(listed()) <= set(pages())


if __name__ == "__main__":
    old = listed() if LIST.exists() else {}
    rows = [("page", "cell", "text", "reason")]
    for page in pages():
        was = old.get(page, [])
        if not old or (was and was[0]["reason"] == OPEN):
            rows.append((page, "*", len(of_page(page)), OPEN))
            continue
        why = {(r["cell"], r["text"]): r["reason"] for r in was}
        rows += [(page, *f, why.get(f, "")) for f in of_page(page)]
    with open(LIST, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
