import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from portable import SHIFT, shift_seeds

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
if os.environ.get(SHIFT): shift_seeds(int(os.environ[SHIFT]))


def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()): item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def root(): return ROOT


@pytest.fixture(scope="session")
def data_dir():
    "The folder of real scans, or a skip that says why"
    folder = os.environ.get("COVID_CT_DATA")
    if not folder: pytest.skip("COVID_CT_DATA is not set: no real scans here")
    if not Path(folder).is_dir(): pytest.fail(f"COVID_CT_DATA={folder} is not a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built once, also when several workers ask for it"
    temp = tmp_path_factory.getbasetemp()
    shared = temp.parent if "PYTEST_XDIST_WORKER" in os.environ else temp
    with FileLock(shared / "site.lock"):
        if not (shared / "site.built").exists():
            r = subprocess.run([sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True)
            assert r.returncode == 0, r.stdout + r.stderr
            (shared / "site.built").touch()
    return ROOT / "_docs"


@pytest.fixture(scope="session")
def served(site):
    "Its address on a file server of this machine"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    srv = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{srv.server_address[1]}"
    srv.shutdown()


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium"
    names = "chromium", "chromium-browser", "google-chrome", "microsoft-edge"
    exe = next((p for n in names if (p := shutil.which(n))), None)
    if not exe and os.environ.get("CI"): pytest.fail("no Chromium: .ci/run installs one")
    if not exe: pytest.skip("no Chromium or Chrome on this machine")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=FLAGS)
        yield b
        b.close()
