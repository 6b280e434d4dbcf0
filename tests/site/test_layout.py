"""The layout: a page has the path of its module, numbers give the order of reading, and imports
go one way."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "covid_ct"
NUMBER = re.compile(r"^(\d+[a-z]?)_")
BASE = {"scan", "plot"}
# what each subpackage may import from beside itself and `scan`
MAY = {
    "io": set(),
    "cohort": {"io"},
    "phantom": {"plot", "io", "cohort"},
    "preprocess": {"plot", "io", "cohort"},
    "batches": {"plot", "io", "cohort", "preprocess"},
    "models": set(),
    "widgets": {"plot"},
    "evaluate": {"plot", "io", "widgets"},
    "explain": {"plot", "models", "evaluate"},
    "audit": {"plot", "io", "cohort", "preprocess", "evaluate", "widgets"},
    "train": {"plot", "io", "cohort", "preprocess", "batches", "models", "evaluate", "phantom"},
    "inference": {
        "audit",
        "plot",
        "io",
        "cohort",
        "preprocess",
        "batches",
        "models",
        "train",
        "evaluate",
        "explain",
        "widgets",
        "phantom",
    },
}
MAY["papers"] = {"plot", "phantom", *MAY} - {"papers"}
ORDER = {  # within a subpackage, only from what comes before
    "phantom": "anatomy parenchyma states chest slices cohort layouts",
    "io": "archive labels header_grid volume dicom_header slice_groups dicom read",
    "cohort": "datasets table adapters splits",
    "audit": "voxels one_scan findings shortcuts audit",
    "preprocess": "resample body lungs lung_warnings cache",
    "batches": "augment samplers slices loaders",
    "papers": "published records darnet_record dual_sampling_record raunet_record "
    "prior_attention_record "
    "runs tables figures checklist report plan reproduce",
}


def pages():
    "Path below `nbs/` and module of each page that exports"
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts):
            continue
        cells = json.loads(path.read_text("utf-8"))["cells"]
        found = re.search(
            r"^#\| default_exp ([\w.]+)", "\n".join("".join(c["source"]) for c in cells[:2]), re.M
        )
        yield path.relative_to(ROOT / "nbs"), found[1] if found else None


def as_module(path):
    return ".".join(NUMBER.sub("", part) for part in path.with_suffix("").parts)


def test_a_page_has_the_path_of_its_module():
    "A paper's page is one page and holds its network, which is the one exception"
    odd = [(str(path), module) for path, module in pages() if module and module != as_module(path)]
    networks = {
        f"models.{as_module(path).partition('.')[2]}"
        for path, _ in pages()
        if path.parts[0] == "papers"
    }
    assert [
        pair for pair in odd if not (pair[0].startswith("papers") and pair[1] in networks)
    ] == []


def test_only_lessons_and_reports_export_nothing():
    assert {path.parts[0] for path, module in pages() if not module} == {"lessons", "reports"}


def test_no_number_stands_twice_in_a_folder():
    "Files and folders share one sequence"
    for folder in {p.parent for p, _ in pages()} | {Path(".")}:
        names = {p.name for p in (ROOT / "nbs" / folder).iterdir() if NUMBER.match(p.name)}
        numbers = [NUMBER.match(n)[1] for n in names]
        assert len(set(numbers)) == len(numbers), f"{folder}: {sorted(names)}"


def test_few_modules_at_the_top():
    assert {p.stem for p in LIB.glob("*.py")} <= {
        "__init__",
        "_modidx",
        "scan",
        "plot",
        "pipeline",
        "demo",
        "course",
        "exercises",
        "cli",
    }


def imports(path):
    "The covid_ct modules that a file imports, absolute, wherever in the file, and the names"
    package = ["covid_ct", *path.relative_to(LIB).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if name == "covid_ct" or name.startswith("covid_ct."):
                yield name, [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names if a.name.split(".")[0] == "covid_ct")


FILES = [p for s in MAY for p in sorted((LIB / s).glob("*.py")) if p.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_imports_go_one_way(path):
    own = path.parent.name
    for name, _ in imports(path):
        parts = name.split(".")[1:]
        if not parts or parts[0] == "scan":
            continue
        assert parts[0] == own or parts[0] in MAY[own], f"{own}.{path.stem} imports {name}"
        if parts[0] == own and own in ORDER:
            order = ORDER[own].split()
            assert order.index(parts[1]) < order.index(path.stem), (
                f"{path.stem} imports {name}, which comes later"
            )


@pytest.mark.parametrize(
    "path",
    [
        *FILES,
        *(LIB / f"{n}.py" for n in ("scan", "plot", "demo", "cli")),
    ],
    ids=lambda p: f"{p.parent.name}.{p.stem}",
)
def test_no_private_name_crosses_a_module(path):
    private = [
        f"{name}.{n}"
        for name, names in imports(path)
        for n in names
        if n.startswith("_") and not n.startswith("__") and name != "covid_ct._modidx"
    ]
    assert not private, private
