"""The published site works with no kernel and no network."""
import re

# moves the axial slice by five and waits for the next frame
MOVE = """async (el) => {
  const c = el.querySelector("canvas[data-plane=axial]"), s = el.querySelector("input[data-control=axial]");
  const px = () => c.getContext("2d").getImageData(0, 0, c.width, c.height).data.join();
  const raf = () => new Promise(requestAnimationFrame), before = px(), f = el.querySelector("[data-ready]").dataset;
  const n = Number(f.frames), t = performance.now();
  s.value = Number(s.value) + 5; s.dispatchEvent(new Event("input", { bubbles: true }));
  while (Number(f.frames) <= n) await raf();
  return { changed: before !== px(), ms: performance.now() - t };
}"""


def test_no_outside_reference(site):
    for p in site.rglob("*.html"):
        html = re.sub(r'srcdoc="[^"]*"', "", p.read_text("utf-8"))
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?://[^"]+|<link[^>]+rel="stylesheet"[^>]+href="https?:', html), p


def test_every_picture_has_alt_text(site):
    missing = []
    for p in site.rglob("*.html"):
        for img in re.findall(r"<img[^>]*>", re.sub(r'srcdoc="[^"]*"', "", p.read_text("utf-8"))):
            alt = re.search(r'alt="([^"]*)"', img)
            if not alt or not alt[1].strip() or re.fullmatch(r"\S*\.(png|svg|jpe?g)", alt[1]): missing.append(f"{p.name}: {img[:120]}")
    assert not missing, "\n".join(missing)


def test_api_is_documented(site):
    "The parameters of a function stand on its page as a table"
    html = (site / "core/scan.html").read_text("utf-8")
    assert "check_same_grid" in html and "to a hundredth of a voxel" in html and "<table" in html


def test_mathematics_and_search(served, browser):
    page = browser.new_page()
    page.goto(f"{served}/core/scan.html")
    page.locator("mjx-container svg").first.wait_for(timeout=20_000)
    page.goto(f"{served}/search.html?q=spacing")
    page.locator("ul.search li a").first.wait_for(timeout=20_000)
    page.close()


def test_viewer_answers(served, browser):
    "Without a kernel: the slice moves, the picture changes, nothing is asked of the network"
    page, outside, errors = browser.new_page(), [], []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((served, "data:", "blob:", "about:")) else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(f"{served}/core/viewer.html")
    page.locator("iframe[data-covid-ct]").first.scroll_into_view_if_needed()
    frame = page.frame_locator("iframe[data-covid-ct]").first
    frame.locator("[data-ready='1']").wait_for(timeout=30_000)
    got = frame.locator(".covid-ct-viewer").evaluate(MOVE)
    assert got["changed"] and not outside and not errors
    page.close()
