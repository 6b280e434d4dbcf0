"""What holds the house together: who imports whom, what `import` costs, what every public name says of itself."""
import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import covid_ct
import pytest
from fastcore.docments import docments

LIB = Path(covid_ct.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(LIB)], "covid_ct.") if not m.name.endswith("._modidx"))
# the stages, and what each may import beside the shared scan, phantom and show
ORDER = {"data": "archive sets labels header volume dicom io catalog layouts public content checks baselines audit preprocess lungs split augment sample slices cache load",
         "models": "blocks attention online lsh spatial resnet3d unet sliding darnet dual_sampling raunet prior_attention zoo measures"}
MAY = {"data": {"data", "evaluate"}, "models": {"models"}, "train": {"train", "data", "models", "evaluate"}, "evaluate": {"evaluate"},
       "explain": {"explain", "evaluate"}, "browse": {"browse"}}
SHARED = {"scan", "anatomy", "parenchyma", "states", "phantom", "show", "__version__"}


def imports(path):
    "The covid_ct modules that a file imports, absolute, wherever in the file"
    package = ["covid_ct", *path.relative_to(LIB).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if name.startswith("covid_ct"):
                if name == "covid_ct" or (LIB / Path(*name.split(".")[1:])).is_dir(): yield from (f"{name}.{a.name}" for a in node.names)
                else: yield name
        elif isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.startswith("covid_ct"))


@pytest.mark.parametrize("path", [p for s in MAY for p in sorted((LIB / s).glob("*.py")) if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_rivers(path):
    "data and models never import each other; inside each, only from what comes before; in data only the audit asks `evaluate` for its metrics"
    stage = path.parent.name
    for name in imports(path):
        parts = name.split(".")[1:]
        if not parts: continue
        if parts[0] in SHARED: continue
        assert parts[0] in MAY[stage], f"{path.stem} imports {name}"
        assert not (stage == "data" and parts[0] == "evaluate") or path.stem in ("audit", "baselines"), f"{path.stem} imports {name}"
        if stage in ORDER and parts[0] == stage:
            order = ORDER[stage].split()
            assert order.index(parts[1]) < order.index(path.stem), f"{path.stem} imports {name}, which comes later"


def test_import_is_light():
    "The package costs next to nothing, and its commands load nothing heavy before they are asked to"
    code = "import time,sys; t=time.perf_counter(); import covid_ct, covid_ct.cli; print(time.perf_counter()-t, sum(m in sys.modules for m in ('torch','SimpleITK','matplotlib','sklearn')))"
    seconds, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert heavy == "0" and float(seconds) < .5


def public(module):
    m = importlib.import_module(module)
    for name in getattr(m, "__all__", ()):
        obj = getattr(m, name)
        if (inspect.isfunction(obj) or inspect.isclass(obj)) and obj.__module__ == module: yield name, obj


@pytest.mark.parametrize("module", MODULES)
def test_documented(module):
    "Every public name has a docstring, every parameter a comment, every return an annotation"
    missing = []
    for name, obj in public(module):
        if not (obj.__doc__ or "").strip() or obj.__doc__.startswith(f"{name}("): missing.append(f"{name}: no docstring")
        if inspect.isclass(obj): continue
        said, sig = docments(obj, full=True), inspect.signature(obj)
        for p, q in sig.parameters.items():
            if q.kind in (q.VAR_POSITIONAL, q.VAR_KEYWORD): continue             # docments does not read these
            if not said[p].docment: missing.append(f"{name}: {p} has no comment")
        yields = inspect.isgeneratorfunction(inspect.unwrap(obj))
        if not yields and sig.return_annotation is sig.empty: missing.append(f"{name}: no return annotation")
    assert not missing, "\n".join(missing)


def test_no_trace_of_a_machine():
    "No path of a machine, no home folder, in anything that is committed"
    root = LIB.parent
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True).stdout.split("\n")
    if not any(tracked): tracked = [str(p.relative_to(root)) for p in root.glob("covid_ct/**/*.py")]
    bad = []
    for f in filter(None, tracked):
        p = root / f
        if p.suffix in {".py", ".ipynb", ".md", ".ini", ".txt", ".js", ".toml", ""} and p.is_file() and p.name != "test_house.py":
            bad += [f"{f}: {m}" for m in re.findall(r"/(?:home|root|Users|work)/\w[\w./-]*|/tmp/[\w./-]+", p.read_text("utf-8", errors="ignore"))]
    assert not bad, "\n".join(bad[:20])


def test_page_budgets():
    "No exported cell over 60 lines, no page without a title and a line below it"
    for page in (LIB.parent / "nbs").rglob("*.ipynb"):
        if any(p[0] in "._" for p in page.relative_to(LIB.parent).parts): continue
        cells = json.loads(page.read_text("utf-8"))["cells"]
        first = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        assert re.fullmatch(r"# .+\n\n> .+", first), f"{page.name}: the title cell holds the title and one line, the site drops the rest"
        for c in cells:
            s = "".join(c["source"])
            if s.startswith("#| export"): assert len(s.splitlines()) <= 80, f"{page.name}: {s[:80]}"
