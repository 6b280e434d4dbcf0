"""Build the site from the notebooks, with packages from the index only: no network, no kernel.

    python docs/build.py            -> _docs/ (HTML; open _docs/index.html)
    python docs/build.py --stage    -> _build/src/ only

1. nbdev's own processors over every notebook (`#| hide`, `show_doc`, links of symbols).
2. The few Quarto constructs in use become MyST.
3. Sphinx with myst-nb and Furo, warnings as errors.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import nbformat
from stage import ROOT, STAGE, sources, stage

OUT, WORK = ROOT / "_docs", ROOT / "_build"          # myst-nb writes beside its output folder, so that one lies deeper
ROOMS = {"tutorials": "Tutorials", "papers": "Papers, one page each", "core": "Reference", "reports": "Reports"}


def toctree(pages):
    "The side bar: one caption a room, pages in the order of their numbers"
    out = []
    for room, caption in ROOMS.items():
        of_room = [p[:-6] for p in pages if p.startswith(room + "/")]
        if of_room: out.append("```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```" % (caption, "\n".join(of_room)))
    return "\n\n".join([*out, "```{toctree}\n:hidden:\n:caption: Project\n\nCONTRIBUTING\n```"])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--stage", action="store_true", help="stop before Sphinx")
    a, t0 = ap.parse_args(), time.time()
    shutil.rmtree(WORK, ignore_errors=True)
    STAGE.mkdir(parents=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as ex: pages = list(ex.map(stage, sources()))
    index = nbformat.read(STAGE / "index.ipynb", 4)
    index.cells.append(nbformat.v4.new_markdown_cell(toctree(pages)))
    nbformat.write(index, STAGE / "index.ipynb")
    shutil.copytree(ROOT / "docs/_static", STAGE / "docs/_static")             # pictures of the front page
    shutil.copy(ROOT / "CONTRIBUTING.md", STAGE)
    print(f"staged {len(pages)} notebooks in {time.time() - t0:.1f} s")
    if a.stage: return
    t0 = time.time()
    r = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", str(ROOT / "docs"),
                        "-d", str(WORK / "doctrees"), str(STAGE), str(WORK / "html")])
    if r.returncode == 0:
        shutil.rmtree(OUT, ignore_errors=True)
        shutil.move(WORK / "html", OUT)
        print(f"site in {time.time() - t0:.1f} s: open {OUT.relative_to(ROOT)}/index.html")
    sys.exit(r.returncode)


if __name__ == "__main__": main()
