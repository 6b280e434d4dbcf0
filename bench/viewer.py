"""The viewer against drawing three planes in Python, and its page against other ways to carry the same voxels."""
import gzip
import io
import statistics
import time

import numpy as np
from covid_ct.browse.pack import to_bytes
from covid_ct.browse.viewer import VolumeViewer
from covid_ct.phantom import make_phantom
from covid_ct.scan import Scan
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SHAPE = (128, 256, 256)


def chest():
    "A phantom of 128 × 256 × 256, grown from a small one: what counts here is its size and its noise"
    p = make_phantom("covid", seed=3, shape=(64, 128, 128), noise=0.)
    up = lambda v: v.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    noise = np.random.default_rng(0).normal(0, 25, SHAPE)
    return Scan((up(p.scan.voxels) + noise).astype("i2"), tuple(s / 2 for s in p.scan.spacing)), up(p.infection)


def median_ms(f, n):
    times = []
    for i in range(n):
        t = time.perf_counter()
        f(i)
        times.append(1000 * (time.perf_counter() - t))
    return statistics.median(times)


def in_python(scan):
    "Three panels whose slice moves, drawn by matplotlib and encoded as the PNG that a notebook would get"
    d, h, w = scan.shape
    fig = Figure(figsize=(12, 4))
    FigureCanvasAgg(fig)
    v, axes = scan.voxels, fig.subplots(1, 3)
    planes = [ax.imshow(im, cmap="gray", vmin=-1350, vmax=150) for ax, im in zip(axes, (v[0], v[::-1, h // 2], v[::-1, :, w // 2]))]

    def move(i):
        planes[0].set_data(v[20 + i])
        fig.savefig(io.BytesIO(), format="png")
    return median_ms(move, 8)


def in_browser(page_html):
    "From the slider's move to the next painted frame, and the share of it that drawing takes; None without a browser"
    import shutil
    exe = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if not exe: return None
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=["--no-sandbox", "--disable-gpu"])
        page = b.new_page(viewport={"width": 1400, "height": 800})
        page.set_content(page_html)
        page.locator("[data-ready='1']").wait_for(timeout=60_000)
        got = page.evaluate("""async () => {
          const s = document.querySelector('input[data-control=axial]'), f = document.querySelector('[data-ready]').dataset, out = [];
          for (let i = 0; i < 30; i++) {
            const n = Number(f.frames), t = performance.now();
            s.value = 20 + i; s.dispatchEvent(new Event('input', { bubbles: true }));
            while (Number(f.frames) <= n) await new Promise(requestAnimationFrame);
            out.push([performance.now() - t, Number(f.drawMs)]);
          }
          return out; }""")
        b.close()
    return [statistics.median(column) for column in zip(*got)]


def row(name, ours, peer, unit): return {"name": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ours / peer}


def bench():
    scan, lesion = chest()
    viewer = VolumeViewer(scan, {"lesions": lesion})
    t = time.perf_counter()
    page = viewer.page()
    pack = time.perf_counter() - t
    raw = to_bytes(scan.voxels)
    t = time.perf_counter()
    zipped = gzip.compress(raw.tobytes(), 6)
    zip_s = time.perf_counter() - t
    rows = [row("viewer: page of 128×256×256 against gzip in base64", len(page.encode()) / 1e6, len(zipped) * 4 / 3e6, "MB"),
            row("viewer: packing that page against gzip", pack, zip_s, "s")]
    painted = in_browser(page)
    if painted:
        still = in_python(scan)
        rows += [row("viewer: slice to painted frame against matplotlib's redraw", painted[0], still, "ms"),
                 row("viewer: drawing alone against matplotlib's redraw", painted[1], still, "ms")]
    return rows
