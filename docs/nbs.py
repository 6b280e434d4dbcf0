"""Run or clean every notebook, index.ipynb included.

python docs/nbs.py run [NB ...]     execute in place (2 at a time), then clean
python docs/nbs.py clean            clean in place
python docs/nbs.py check            exit 1 and name the notebooks that `clean` would change
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nbdev.clean import clean_nb
from stage import ROOT, sources

VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def kept(output):
    """What a reader without a kernel can use: no progress bars, no warnings of the moment, no
    widget without its page"""
    data = output.get("data", {})
    if output["output_type"] == "stream":
        return output["name"] == "stdout"
    if VIEW in data and "text/html" not in data:
        return False
    data.pop(VIEW, None)
    return True


JUDGED = re.compile(r"^(?:ct\.)?(check|scores)\(", re.M)


def is_answer(path, source):
    "Whether a cell belongs to the student: its output is not stored with the page"
    return path.parent.name == "lessons" and bool(JUDGED.search(source))


def cleaned(text, path=Path("x")):
    "The notebook as it is committed"
    nb = json.loads(text)
    clean_nb(nb, allowed_metadata_keys=["language_info"])
    nb["metadata"] = {"kernelspec": KERNEL}
    for c in nb["cells"]:
        if c["cell_type"] == "code":
            answer = is_answer(path, "".join(c["source"]))
            c["outputs"] = [] if answer else [o for o in c["outputs"] if kept(o)]
        for o in c.get("outputs", []):
            o.pop("metadata", None) if o["output_type"] == "stream" else o.update(metadata={})
    return json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def run(path):
    "Execute one notebook where it stands"
    import nbformat
    from nbclient import NotebookClient

    t, nb = time.time(), nbformat.read(path, as_version=4)
    NotebookClient(
        nb,
        timeout=1200,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    path.write_text(cleaned(nbformat.writes(nb), path), encoding="utf-8")
    return path, time.time() - t


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("what", choices=["run", "clean", "check"])
    ap.add_argument("nbs", nargs="*")
    a = ap.parse_args()
    paths = [Path(p).resolve() for p in a.nbs] or [
        p for p in sources() if p.parent.name != "reports"
    ]
    if a.what == "run":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(2) as ex:
            for p, t in ex.map(run, paths):
                print(f"{t:6.1f} s  {p.relative_to(ROOT)}", flush=True)
        return 0
    dirty = [p for p in paths if p.read_text("utf-8") != cleaned(p.read_text("utf-8"), p)]
    for p in dirty:
        if a.what == "clean":
            p.write_text(cleaned(p.read_text("utf-8"), p), encoding="utf-8")
        print("not clean:" if a.what == "check" else "cleaned", p.relative_to(ROOT))
    return int(a.what == "check" and bool(dirty))


if __name__ == "__main__":
    sys.exit(main())
