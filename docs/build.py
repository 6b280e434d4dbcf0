"""Build the site from the notebooks, with packages from the index only: no network, no kernel.

    python docs/build.py            -> _docs/ (HTML; open _docs/index.html)
    python docs/build.py --stage    -> _build/src/ only

1. nbdev's own processors over every notebook (`#| hide`, `show_doc`, links of symbols).
2. The few Quarto constructs in use become MyST; what is named of references.bib becomes a link.
3. Two pages made of the others: the gallery of figures and the references.
4. Sphinx with myst-nb and Furo, warnings as errors.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import PurePosixPath

import gallery
import nbformat
import refs
from stage import ROOT, STAGE, sources, stage

OUT, WORK = (
    ROOT / "_docs",
    ROOT / "_build",
)  # myst-nb writes beside its output folder, so that one lies deeper
ABOUT = "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"  # of the repository, on the site too
FOLDERS = {
    "lessons": "The course",
    "papers": "Papers",
    "": "Basics, commands",
    "01_phantom": "Phantom",
    "02_io": "Reading files",
    "03_cohort": "Cohorts",
    "04_audit": "Audit",
    "05_preprocess": "Preprocessing",
    "06_batches": "Batches",
    "07_models": "Models",
    "08_train": "Training",
    "09_inference": "Inference",
    "10_evaluate": "Evaluation",
    "11_explain": "Explanations",
    "12_widgets": "Widgets",
    "15_course": "Lessons and exercises in code",
    "reports": "Reports",
}  # folder of nbs/ -> its caption, in the order of the side bar


def groups(pages):
    "Folder -> its pages, in the order of their numbers"
    out = {}
    for folder_name in FOLDERS:
        here = [
            p
            for p in pages
            if p["page"] != "index.ipynb" and p["page"].rpartition("/")[0] == folder_name
        ]
        out[folder_name] = sorted(
            here, key=lambda p: "for_instructors" in p["page"]
        )  # theirs comes last
    return {folder_name: here for folder_name, here in out.items() if here}


def toctree(names, caption=""):
    "A hidden table of contents, which makes the side bar"
    head = f":hidden:\n:caption: {caption}\n" if caption else ":hidden:\n"
    return "```{toctree}\n" + head + "\n" + "\n".join(names) + "\n```\n"


def overview(folder_name, pages):
    "The page of a subpackage: its pages, each with its line; they fold under it in the side bar"
    name = PurePosixPath(folder_name or "basics")
    folder = folder_name + "/" if folder_name else ""
    inside = [p["page"].removeprefix(folder) for p in pages]
    rows = [f"- [{p['title']}]({f}): {p['about']}" for p, f in zip(pages, inside, strict=True)]
    text = f"# {FOLDERS[folder_name]}\n\n" + "\n".join(rows) + "\n\n"
    text += toctree([f.rsplit(".", 1)[0] for f in inside])
    at = f"{folder}index.md" if folder_name else f"{name}.md"
    (STAGE / at).write_text(text, "utf-8")
    return at.rsplit(".", 1)[0]


def side_bar(pages):
    "One entry for each subpackage, its pages folded under it"
    entries = {
        folder_name: overview(folder_name, here) for folder_name, here in groups(pages).items()
    }
    first = [entries.pop(r) for r in ("lessons", "papers")]
    return "\n".join(
        [
            toctree(first, "Learn"),
            toctree(list(entries.values()), "Reference"),
            toctree(["figures", "references", "CONTRIBUTING", "CHANGELOG"], "About"),
        ]
    )


def made(pages):
    "Write the pages that are made of the others"
    cited = {}
    for p in pages:
        for key in p["cited"]:
            cited.setdefault(key, []).append((p["page"], p["title"]))
    (STAGE / "references.md").write_text(refs.page(cited), "utf-8")
    (STAGE / "figures.md").write_text(gallery.page(pages, FOLDERS, STAGE / "figures"), "utf-8")


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--stage", action="store_true", help="stop before Sphinx")
    a, t0 = ap.parse_args(), time.time()
    shutil.rmtree(WORK, ignore_errors=True)
    STAGE.mkdir(parents=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as ex:
        pages = list(ex.map(stage, sources()))
    index = nbformat.read(STAGE / "index.ipynb", 4)
    index.cells.append(nbformat.v4.new_markdown_cell(side_bar(pages)))
    nbformat.write(index, STAGE / "index.ipynb")
    shutil.copytree(ROOT / "docs/_static", STAGE / "docs/_static")  # pictures of the front page
    for name in ABOUT:
        shutil.copy(ROOT / name, STAGE)
    made(pages)
    print(f"staged {len(pages)} notebooks in {time.time() - t0:.1f} s")
    if a.stage:
        return
    t0 = time.time()
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "-c",
            str(ROOT / "docs"),
            "-d",
            str(WORK / "doctrees"),
            str(STAGE),
            str(WORK / "html"),
        ]
    )
    if r.returncode == 0:
        shutil.rmtree(OUT, ignore_errors=True)
        shutil.move(WORK / "html", OUT)
        print(f"site in {time.time() - t0:.1f} s: open {OUT.relative_to(ROOT)}/index.html")
    sys.exit(r.returncode)


if __name__ == "__main__":
    main()
