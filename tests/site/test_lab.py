"""A real JupyterLab runs a notebook; the live widget answers, and Python and the page hold the
same state."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from test_site import MOVE

CELLS = (
    "from covid_ct.widgets.viewer import VolumeViewer\n"
    "from covid_ct.phantom.chest import make_phantom",
    "p = make_phantom('covid', seed=3, shape=(64,96,96))\n"
    "masks = {'lesions':p.infection, 'lungs':p.lungs}\n"
    "viewer = VolumeViewer(p.scan, masks, title='Phantom')\nviewer",
    "viewer.preset = 'bone'",
    "print('python sees', viewer.index, viewer.preset)",
)


@pytest.fixture()
def lab(tmp_path):
    "The address of a JupyterLab with one notebook, and nothing of this user's settings"
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": kernel}, cells=[nbformat.v4.new_code_cell(c) for c in CELLS]
    )
    (tmp_path / "work").mkdir()
    nbformat.write(nb, tmp_path / "work" / "live.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        **{
            f"{k}_DIR": str(tmp_path / k)
            for k in (
                "JUPYTER_CONFIG",
                "JUPYTER_RUNTIME",
                "JUPYTERLAB_SETTINGS",
                "JUPYTERLAB_WORKSPACES",
            )
        },
    }
    srv = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            "--no-browser",
            "--allow-root",
            "--expose-app-in-browser",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=",
            f"--ServerApp.root_dir={tmp_path / 'work'}",
            "--LabApp.news_url=",
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    base = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{base}/api").read()
            break
        except OSError:
            time.sleep(0.25)
    yield base
    srv.send_signal(signal.SIGINT)
    time.sleep(0.3)
    srv.terminate()
    try:
        srv.wait(20)
    except subprocess.TimeoutExpired:
        srv.kill()


@pytest.mark.slow
def test_live_viewer(lab, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1200})
    page.goto(f"{lab}/lab/tree/live.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    # run-all before the session is ready would open the "Select Kernel" dialog
    page.wait_for_function(
        """() => {
          const c = window.jupyterapp?.shell.currentWidget?.sessionContext;
          return c?.isReady && c.session?.kernel?.status === "idle"; }""",
        timeout=60_000,
    )
    page.evaluate(
        "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
    )  # do not wait for it here
    viewer = page.locator(".jp-OutputArea-output .covid-ct-viewer")
    viewer.locator("[data-ready='1']").wait_for(timeout=60_000)
    viewer.locator("[data-preset=bone][aria-pressed=true]").wait_for(
        timeout=90_000
    )  # Python to page: the third cell
    assert viewer.locator("[data-control=level]").input_value() == "400"
    assert "±4 HU" in viewer.locator(".cct-note").inner_text()  # live: every voxel, no WebP
    before = int(viewer.locator("input[data-control=axial]").input_value())
    got = viewer.evaluate(MOVE)
    assert got["changed"] and got["ms"] < 2000
    viewer.locator("[data-preset=lung]").click()
    page.wait_for_timeout(500)
    page.evaluate(
        """() => {
          const a = window.jupyterapp;
          a.shell.currentWidget.content.activeCellIndex = 3;
          a.commands.execute('notebook:run-cell') }"""
    )
    page.wait_for_function(
        f"""() => document.body.innerText.includes("python sees [{before + 5},")
          && document.body.innerText.includes("lung")""",
        timeout=90_000,
    )  # page to Python
    assert viewer.locator(".cct").get_attribute("data-theme") == "light"
    if os.environ.get("LAB_SHOT"):
        page.screenshot(path=os.environ["LAB_SHOT"])
    page.close()
