import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import quick
from filelock import FileLock
from find_browser import ADVICE, find_browser, open_browser
from portable import SHIFT, shift_seeds

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
if os.environ.get(SHIFT):
    shift_seeds(int(os.environ[SHIFT]))


def pytest_collection_modifyitems(items):
    seconds = quick.recorded()
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
        if quick.is_quick(item, seconds):
            item.add_marker(pytest.mark.quick)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "Records what a test costs where that is asked for"
    start = quick.used()
    try:
        return (yield)
    finally:
        if quick.RECORD in os.environ:
            quick.note(item.nodeid, quick.used() - start)


def pytest_runtest_setup(item):
    "From here and not by a mark, so that the summary has one line for all"
    if item.get_closest_marker("browser") and not find_browser():
        pytest.skip(ADVICE)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def data_dir():
    "The folder of real scans, or a skip that says why"
    folder = os.environ.get("COVID_CT_DATA")
    if not folder:
        pytest.skip("COVID_CT_DATA is not set: no real scans here")
    if not Path(folder).is_dir():
        pytest.fail(f"COVID_CT_DATA={folder} is not a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built once, also when several workers ask for it"
    temp = tmp_path_factory.getbasetemp()
    shared = temp.parent if "PYTEST_XDIST_WORKER" in os.environ else temp
    with FileLock(shared / "site.lock"):
        if not (shared / "site.built").exists():
            r = subprocess.run(
                [sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True
            )
            assert r.returncode == 0, r.stdout + r.stderr
            (shared / "site.built").touch()
    return ROOT / "_docs"


@pytest.fixture(scope="session")
def served(site):
    "Its address on a file server of this machine"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    srv = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{srv.server_address[1]}"
    srv.shutdown()


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium"
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as p:
        try:
            b = open_browser(p, find_browser())
        except Error:
            pytest.skip(ADVICE)
        yield b
        b.close()
