"""The viewer against drawing three planes in Python, its page against other ways to carry the same
voxels, and live in JupyterLab against its peers.

The peers are matplotlib behind `ipywidgets.interact`, and ipyniivue (WebGL) where it is
installed. Without a GPU the browser draws WebGL in software, which is what a server's JupyterLab
seen through a remote desktop does too, but not what a workstation does."""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import BenchError, Case, row
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import Scan
from covid_ct.widgets.pack import to_bytes
from covid_ct.widgets.viewer import VolumeViewer

SHAPE = (128, 256, 256)


def chest():
    """A phantom of 128 × 256 × 256, grown from a small one: what counts here is its size and its
    noise"""
    p = make_phantom("covid", seed=3, shape=(64, 128, 128), noise=0.0)

    def up(v):
        return v.repeat(2, 0).repeat(2, 1).repeat(2, 2)

    noise = np.random.default_rng(0).normal(0, 25, SHAPE)
    return Scan((up(p.scan.voxels) + noise).astype("i2"), tuple(s / 2 for s in p.scan.spacing)), up(
        p.infection
    )


def median_ms(f, n):
    times = []
    for i in range(n):
        t = time.perf_counter()
        f(i)
        times.append(1000 * (time.perf_counter() - t))
    return statistics.median(times)


def in_python(scan):
    """Three panels whose slice moves, drawn by matplotlib and encoded as the PNG that a notebook
    would get"""
    d, h, w = scan.shape
    fig = Figure(figsize=(12, 4))
    FigureCanvasAgg(fig)
    v, axes = scan.voxels, fig.subplots(1, 3)
    planes = [
        ax.imshow(im, cmap="gray", vmin=-1350, vmax=150)
        for ax, im in zip(axes, (v[0], v[::-1, h // 2], v[::-1, :, w // 2]), strict=False)
    ]

    def move(i):
        planes[0].set_data(v[20 + i])
        fig.savefig(io.BytesIO(), format="png")

    return median_ms(move, 8)


@contextlib.contextmanager
def chromium():
    "A headless browser. Raises `BenchError` where there is none"
    from find_browser import ADVICE, find_browser, open_browser
    from playwright.sync_api import sync_playwright

    exe = find_browser()
    if not exe:
        raise BenchError(ADVICE)
    with sync_playwright() as p:
        b = open_browser(p, exe)
        yield b
        b.close()


def in_browser(page_html):
    """Seconds until the page is ready, then milliseconds from the slider's move to the next
    painted frame, and the share of it that drawing takes"""
    with chromium() as b, tempfile.TemporaryDirectory() as d:
        (Path(d) / "page.html").write_text(page_html, "utf-8")
        page = b.new_page(viewport={"width": 1400, "height": 800})
        t = time.perf_counter()
        page.goto((Path(d) / "page.html").as_uri())
        page.locator("[data-ready='1']").wait_for(timeout=60_000)
        ready = time.perf_counter() - t
        got = page.evaluate("""async () => {
          const s = document.querySelector('input[data-control=axial]');
          const f = document.querySelector('[data-ready]').dataset, out = [];
          for (let i = 0; i < 30; i++) {
            const n = Number(f.frames), t = performance.now();
            s.value = 20 + i; s.dispatchEvent(new Event('input', { bubbles: true }));
            while (Number(f.frames) <= n) await new Promise(requestAnimationFrame);
            out.push([performance.now() - t, Number(f.drawMs)]);
          }
          return out; }""")
    return [ready, *(statistics.median(column) for column in zip(*got, strict=False))]


# ---------------------------------------------------------------- live, in a JupyterLab
LIVE = {  # name → the cell that shows a scan, what to press for the next slice, and the key
    "ours": (
        "from covid_ct.widgets.viewer import VolumeViewer\nfrom covid_ct.io.read import read\n"
        "VolumeViewer(read('chest.nii.gz'))",
        "canvas[data-plane=axial]",
        "ArrowUp",
    ),
    "matplotlib": (
        "import matplotlib.pyplot as plt\nfrom covid_ct.io.read import read\n"
        "from ipywidgets import IntSlider, interact\nv = read('chest.nii.gz').voxels\n"
        "def show(z):\n    fig, axes = plt.subplots(1, 3, figsize=(12,4))\n"
        "    for ax, im in zip(axes, (v[z], v[::-1,128], v[::-1,:,128])): "
        "ax.imshow(im, cmap='gray', vmin=-1350, vmax=150)\n    plt.show()\n"
        "interact(show, z=IntSlider(64, 0, 127));",
        ".noUi-handle",
        "ArrowRight",
    ),
    "ipyniivue": (
        "from ipyniivue import NiiVue\nnv = NiiVue(height=400)\n"
        "nv.load_volumes([{'path': 'chest.nii.gz'}])\nnv",
        ".jp-OutputArea-output canvas",
        "wheel",
    ),
}
# how many pixels of the first picture in an output are neither black nor white nor the background,
# and a number that changes with the picture
LOOK = """() => {
  const out = document.querySelector('.jp-OutputArea-output');
  const of = out && ([...out.querySelectorAll('canvas[data-plane=axial]')][0]
    || [...out.querySelectorAll('canvas, img')].find((e) => e.width > 200));
  if (!of || of.width < 200) return [0, 0];
  const c = Object.assign(document.createElement('canvas'), { width: 200, height: 80 });
  const x = c.getContext('2d');
  x.drawImage(of, 0, 0, 200, 80);
  const px = x.getImageData(0, 0, 200, 80).data;
  let n = 0, sum = 0;
  for (let i = 0; i < px.length; i += 4) {
    if (px[i] > 20 && px[i] < 235) n++;
    sum = (sum * 31 + px[i]) % 1000003;
  }
  return [n, sum]; }"""
# WebGL keeps its picture, so that it can be read back
KEEP = """const f = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (k, o) {
  return f.call(this, k, k.startsWith('webgl') ? { ...o, preserveDrawingBuffer: true } : o); };"""
IDLE = """() => {
  const c = window.jupyterapp?.shell.currentWidget?.sessionContext;
  return c?.isReady && c.session?.kernel?.status === 'idle'; }"""
RUN = """(i) => {
  const a = window.jupyterapp;
  a.shell.currentWidget.content.activeCellIndex = i;
  a.commands.execute('notebook:run-cell'); }"""
# remember the picture and when the next event comes; then wait for another picture
WATCH = f"""(event) => {{
  window.seen = ({LOOK})()[1];
  window.moved = 0;
  const now = () => {{ window.moved = performance.now(); }};
  addEventListener(event, now, {{ capture: true, once: true }}); }}"""
CHANGED = f"""async () => {{
  const look = {LOOK}, end = performance.now() + 10000;
  while (performance.now() < end) {{
    const s = look()[1];
    if (s && s !== window.seen) return performance.now() - window.moved;
    await new Promise(requestAnimationFrame);
  }}
  return NaN; }}"""


@contextlib.contextmanager
def lab(folder):
    "The address of a JupyterLab on a folder, with nothing of this user's settings"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        **{
            f"{k}_DIR": str(folder / ".lab" / k)
            for k in (
                "JUPYTER_CONFIG",
                "JUPYTER_RUNTIME",
                "JUPYTERLAB_SETTINGS",
                "JUPYTERLAB_WORKSPACES",
            )
        },
    }
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), env.get("PYTHONPATH", "")]
    )
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
            f"--ServerApp.root_dir={folder}",
            "--LabApp.news_url=",
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api").read()
            break
        except OSError:
            time.sleep(0.25)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        srv.terminate()
        srv.wait(20)


def in_lab(scan, names):
    """For each viewer: seconds from running its cell, imports done, to a picture, and
    milliseconds from a key or wheel to another picture"""
    import nbformat

    from covid_ct.io.read import write_scan

    out = {}
    with tempfile.TemporaryDirectory() as d, chromium() as b:
        write_scan(scan, Path(d) / "chest.nii.gz")
        for n in names:
            nb = nbformat.v4.new_notebook(
                metadata={
                    "kernelspec": {
                        "name": "python3",
                        "display_name": "python3",
                        "language": "python",
                    }
                }
            )
            imports = [
                line for line in LIVE[n][0].splitlines() if line.startswith(("import", "from"))
            ]
            nb.cells = [
                nbformat.v4.new_code_cell("\n".join(imports)),
                nbformat.v4.new_code_cell(LIVE[n][0]),
            ]
            nbformat.write(nb, Path(d) / f"{n}.ipynb")
        with lab(Path(d)) as base:
            for n in names:
                out[n] = one_in_lab(b, f"{base}/lab/tree/{n}.ipynb?reset", *LIVE[n][1:])
    return out


def one_in_lab(browser, url, handle, key, moves=8):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.add_init_script(KEEP)
    page.goto(url)
    page.wait_for_function(IDLE, timeout=90_000)
    page.evaluate(RUN, 0)
    page.wait_for_timeout(500)
    page.wait_for_function(IDLE, timeout=90_000)
    page.wait_for_timeout(500)
    t = time.perf_counter()
    page.evaluate(RUN, 1)
    page.wait_for_function(f"() => ({LOOK})()[0] > 800", timeout=120_000, polling=20)
    ready, times = time.perf_counter() - t, []
    page.wait_for_timeout(1500)
    target = page.locator(handle).first
    if key == "wheel":
        box = target.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    else:
        target.focus()
    for _ in range(moves):
        page.evaluate(WATCH, "wheel" if key == "wheel" else "keydown")
        page.mouse.wheel(0, 120) if key == "wheel" else page.keyboard.press(key)
        times.append(page.evaluate(CHANGED))
        page.wait_for_timeout(300)
    page.close()
    return ready, statistics.median(times)


def saved_mb(scan):
    """Megabytes that a saved notebook holds for a living ipyniivue: the widget states, front end
    and voxels"""
    from ipyniivue import NiiVue
    from ipywidgets.embed import embed_data

    from covid_ct.io.read import write_scan

    with tempfile.TemporaryDirectory() as d:
        write_scan(scan, Path(d) / "chest.nii.gz")
        nv = NiiVue()
        nv.load_volumes([{"path": str(Path(d) / "chest.nii.gz")}])
        return len(json.dumps(embed_data(views=[nv])["manager_state"])) / 1e6


def shown():
    "The scan, its viewer, and the page"
    scan, lesion = chest()
    viewer = VolumeViewer(scan, {"lesions": lesion})
    return scan, viewer, viewer.page()


def size():
    "The page against gzip in base64"
    scan, viewer, _ = shown()
    t = time.perf_counter()
    page = viewer.page()
    pack = time.perf_counter() - t
    raw = to_bytes(scan.voxels)
    t = time.perf_counter()
    zipped = gzip.compress(raw.tobytes(), 6)
    zip_s = time.perf_counter() - t
    yield row(
        "viewer: page of 128×256×256 against gzip in base64",
        len(page.encode()) / 1e6,
        len(zipped) * 4 / 3e6,
        "MB",
    )
    yield row("viewer: packing that page against gzip", pack, zip_s, "s")


def painting():
    "In a browser, against matplotlib in Python"
    scan, _, page = shown()
    painted, still = in_browser(page), in_python(scan)
    yield row("viewer: slice to painted frame against matplotlib's redraw", painted[1], still, "ms")
    yield row("viewer: drawing alone against matplotlib's redraw", painted[2], still, "ms")


def live(peer):
    "In JupyterLab, against one other viewer"
    if importlib.util.find_spec(peer) is None:
        raise BenchError(f"{peer} is not installed")
    got = in_lab(chest()[0], ["ours", peer])
    for i, (what, unit) in enumerate((("cell to picture", "s"), ("key to next slice", "ms"))):
        yield row(
            f"viewer: {what} in JupyterLab against {peer}", got["ours"][i], got[peer][i], unit
        )


def saved():
    "What a saved notebook holds"
    scan, viewer, _ = shown()
    yield row(
        "viewer: alive in a saved notebook against ipyniivue",
        len(viewer.frame().encode()) / 1e6,
        saved_mb(scan),
        "MB",
    )


CASES = [
    Case("viewer: page", size),
    Case("viewer: in a browser", painting),
    Case("viewer: in JupyterLab, matplotlib", partial(live, "matplotlib"), 180),
    Case("viewer: in JupyterLab, ipyniivue", partial(live, "ipyniivue"), 180),
    Case("viewer: saved notebook", saved),
]
