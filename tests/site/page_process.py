"""Execute a page in a process of its own that starts with the large libraries imported.

A process that imports them anew takes about four seconds a page, longer than most pages. The
package itself is not among them, so each page imports it as a reader would."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = [
    "torch",
    "matplotlib.pyplot",
    "seaborn",
    "pandas",
    "sklearn.metrics",
    "scipy.stats",
    "scipy.ndimage",
    "skimage.measure",
    "SimpleITK",
    "captum.attr",
    "ipywidgets",
    "accelerate",
    "nbdev.test",
]


def execute(page: Path, environment: dict, log: Path):
    "Run the page with what it prints going to `log`; exit 0 if every cell ran"
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may have changed since the libraries were imported
    from nbdev.config import get_config
    from nbdev.test import test_nb

    try:
        flags = get_config(path=ROOT).tst_flags.split()
        passed, _ = test_nb(page, skip_flags=flags, basepath=ROOT)
    except BaseException:
        traceback.print_exc()
        passed = False
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():  # idle ones would be waited for
        worker.terminate()
    os._exit(0 if passed else 1)


def run_page(page: Path, environment: dict, log: Path) -> tuple[bool, str]:
    "Whether every cell of the page ran, and what it printed"
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=execute, args=(page, environment, log))
    process.start()
    process.join()
    return process.exitcode == 0, log.read_text("utf-8", errors="replace")
