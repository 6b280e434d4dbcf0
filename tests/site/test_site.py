"""The published site works with no kernel and no network: for the eye, the hand, the keyboard
and the ear."""

import contextlib
import importlib.util
import json
import os
import re
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import public
import pytest
import readme
import refs
import stage

from covid_ct.widgets.pipeline import show_pipeline

# moves the axial slice by five and waits for the next frame
MOVE = """async (el) => {
  const c = el.querySelector("canvas[data-plane=axial]");
  const s = el.querySelector("input[data-control=axial]");
  const px = () => c.getContext("2d").getImageData(0, 0, c.width, c.height).data.join();
  const raf = () => new Promise(requestAnimationFrame), before = px();
  const f = el.querySelector("[data-ready]").dataset;
  const n = Number(f.frames), t = performance.now();
  s.value = Number(s.value) + 5; s.dispatchEvent(new Event("input", { bubbles: true }));
  while (Number(f.frames) <= n) await raf();
  return { changed: before !== px(), ms: performance.now() - t };
}"""


@pytest.fixture(scope="module")
def pages(site):
    "Address -> HTML of each page, without what stands in frames"
    return {
        p.relative_to(site).as_posix(): re.sub(r'srcdoc="[^"]*"', "", p.read_text("utf-8"))
        for p in site.rglob("*.html")
    }


@pytest.fixture(scope="module")
def notebooks(root):
    "Notebook -> its cells"
    found = [root / "index.ipynb", *sorted((root / "nbs").rglob("*.ipynb"))]
    return {
        p.relative_to(root).as_posix(): json.loads(p.read_text("utf-8"))["cells"]
        for p in found
        if ".ipynb_checkpoints" not in p.parts
    }


@pytest.fixture()
def visit(served, browser):
    """Opens a page of the site where nothing else can be reached; errors in it and requests
    elsewhere fail the test"""
    wrong = []
    with contextlib.ExitStack() as stack:

        def go(path, width=1280, height=900, at=served, **more):
            context = browser.new_context(viewport={"width": width, "height": height}, **more)
            stack.callback(context.close)
            page = context.new_page()
            page.on(
                "request",
                lambda r: (
                    wrong.append(r.url)
                    if not r.url.startswith((at, "data:", "blob:", "about:"))
                    else None
                ),
            )
            page.on(
                "pageerror",
                lambda e: (
                    wrong.append(f"{path}: {e}")
                    if "Failed to fetch" not in str(e) or at == served
                    else None
                ),
            )  # no excerpts from file:
            page.goto(f"{at}/{path}")
            return page

        yield go
    assert not wrong


# ---------------------------------------------------------------- the files
def test_no_outside_reference(pages):
    for name, html in pages.items():
        assert not re.findall(
            r'<(?:script|img|iframe)[^>]+src="https?://[^"]+'
            r'|<link[^>]+rel="stylesheet"[^>]+href="https?:',
            html,
        ), name


def test_every_picture_has_alt_text(pages):
    missing = []
    for name, html in pages.items():
        for img in re.findall(r"<img[^>]*>", html):
            alt = re.search(r'alt="([^"]*)"', img)
            if not alt or not alt[1].strip() or re.fullmatch(r"\S*\.(png|svg|jpe?g|webp)", alt[1]):
                missing.append(f"{name}: {img[:120]}")
    assert not missing, "\n".join(missing)


def dead_links(folder, pages):
    """Links within the site that lead to no file or to no place in it, and addresses elsewhere
    that are none"""
    places = {
        name: set(re.findall(r'\s(?:id|name)="([^"]+)"', html)) for name, html in pages.items()
    }
    dead = []
    for name, html in pages.items():
        for url in set(re.findall(r'<a\s[^>]*?href="([^"]*)"', html)) | set(
            re.findall(r'<img\s[^>]*?src="([^"]*)"', html)
        ):
            parts = urlsplit(url)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.scheme or parts.netloc:
                if parts.scheme not in ("http", "https") or not re.fullmatch(
                    r"[\w-]+(\.[\w-]+)+", parts.netloc
                ):
                    dead.append(f"{name}: {url}")
                continue
            target = (folder / name).parent / unquote(parts.path) if parts.path else folder / name
            there = (
                target.resolve().relative_to(folder.resolve()).as_posix()
                if target.exists()
                else None
            )
            if (
                there is None
                or parts.fragment
                and there in places
                and unquote(parts.fragment) not in places[there]
            ):
                dead.append(f"{name}: {url}")
    return dead


def test_no_dead_link(site, pages):
    dead = dead_links(site, pages)
    assert not dead, "\n".join(dead)


def test_dead_links_are_found(tmp_path):
    pages = {
        "a.html": '<a class="x" href="b/c.html#here">1</a><a href="b/c.html#gone">2</a>'
        '<a href="d.html">3</a><a href="https://nowhere">4</a><a href="#top" id="top">5</a>',
        "b/c.html": '<h1 id="here"></h1><a href="../a.html">up</a><img src="x.png">',
    }
    (tmp_path / "b").mkdir()
    for name, html in pages.items():
        (tmp_path / name).write_text(html)
    assert sorted(dead_links(tmp_path, pages)) == [
        "a.html: b/c.html#gone",
        "a.html: d.html",
        "a.html: https://nowhere",
        "b/c.html: x.png",
    ]


def raw_links(html):
    "Links in Markdown that a reader sees as they are written, outside of blocks of code"
    text = re.sub(r"<(pre|script|style|title)\b.*?</\1>", "", html, flags=re.S)
    return re.findall(r"\[[^\[\]<>]*\]\([^)\s<>]+\)", re.sub("<[^>]+>", "", text))


def test_no_link_is_shown_as_text(pages):
    raw = {name: found for name, html in pages.items() if (found := raw_links(html))}
    assert not raw, raw


def test_raw_links_by_hand():
    shown = '<p>a row of [<a href="x"><code>ResNet3d</code></a>](../x.html)</p>'
    assert raw_links(shown) == ["[ResNet3d](../x.html)"]
    assert not raw_links("<pre>[a](b)</pre><p>f[i](x, y) and (see)[1]</p>")
    nested = "a row of [`ResNet3d`](/covid_ct/x.html#y)](../x.ipynb)".replace("[`", "[[`", 1)
    assert stage.one_link(nested) == "a row of [`ResNet3d`](../x.ipynb)"
    twice = "see [the [`fit`](/u) loop](p.ipynb) and [`fit`](/u)"
    assert stage.one_link(twice) == "see [the `fit` loop](p.ipynb) and [`fit`](/u)"


def test_the_side_bar_folds(pages):
    "Subpackages are entries, their pages fold under them"
    tree = re.search(r'<div class="sidebar-tree">(.*?)</aside>', pages["index.html"], re.S)[1]
    tops = re.findall(r'<li class="toctree-l1[^"]*"><a[^>]+href="([^"]+)"', tree)
    assert len(tops) < 25 and "02_io/index.html" in tops
    assert tree.count('class="toctree-checkbox"') >= 10


def test_api_is_documented(pages):
    "The parameters of a function stand on its page as a table"
    html = pages["scan.html"]
    assert "check_same_grid" in html and "to a hundredth of a voxel" in html and "<table" in html


def labelled(notebooks):
    return [
        (name, m[1])
        for name, cells in notebooks.items()
        for c in cells
        if c["cell_type"] == "code"
        for m in [re.search(r"^#\| label: (fig-[\w-]+)", "".join(c["source"]), re.M)]
        if m
        and any(
            "image/png" in o.get("data", {})
            or "data:image/png" in "".join(o.get("data", {}).get("text/html", ""))
            for o in c["outputs"]
        )
    ]


def test_gallery_has_every_figure(pages, notebooks):
    named = re.findall(r'href="[\w/.]+#(fig-[\w-]+)"', pages["figures.html"])
    assert sorted(named) == sorted(label for _, label in labelled(notebooks))


def test_every_page_says_how_to_run_it(pages, notebooks):
    taken = [n for n in notebooks if n != "index.ipynb"]
    assert len(taken) == sum("Open this page in JupyterLab" in html for html in pages.values())
    assert "covid-ct course lessons" in re.sub("<[^>]+>", "", pages["lessons/first_scan.html"])


# ---------------------------------------------------------------- the front page, the README and
# the sources
MAP = "nbs/12_widgets/09_pipeline.ipynb"


def test_map_names_every_page(root, notebooks):
    text = "".join("".join(c["source"]) for c in notebooks[MAP])
    links = re.findall(r"\]\(([^)#]+\.ipynb)", text)
    named = {os.path.normpath(f"{Path(MAP).parent.as_posix()}/{link}") for link in links} | {MAP}
    missing = [n for n in notebooks if n != "index.ipynb" and n not in named]
    assert not missing, missing
    assert all((root / link).exists() for link in named)


def test_the_pipeline_opens_every_subpackage(notebooks):
    "Its diagram marks the subpackage and is stored as the library draws it"
    folders = {
        re.sub(r"^\d+_", "", name.split("/")[1]): name.split("/")[1]
        for name in notebooks
        if name.count("/") == 2 and name.split("/")[1] not in ("lessons", "reports", "15_course")
    }
    for package, folder in folders.items():
        first = min(n for n in notebooks if n.startswith(f"nbs/{folder}/"))
        cells = [c for c in notebooks[first][:6] if c["cell_type"] == "code"]
        call = f"show_pipeline('{package}')"
        outputs = [c["outputs"] for c in cells if call in "".join(c["source"])]
        assert len(outputs) == 1, first
        shown = "".join(outputs[0][0]["data"]["text/html"])
        assert shown == show_pipeline(package)._repr_html_(), f"run {first} again"


def test_the_links_of_a_pipeline_lead_to_pages():
    html = show_pipeline("io")._repr_html_()
    output = {"data": {"text/html": [html]}}
    stage.lead_on(output, lambda url: url.replace("02_io/06_read", "02_io/read"))
    shown = output["data"]["text/html"]
    assert 'href="../02_io/read.html"' in shown and ".ipynb" not in shown
    other = {"data": {"text/html": ['<a href="x.ipynb">x</a>']}}
    stage.lead_on(other, str.upper)
    assert other["data"]["text/html"] == ['<a href="x.ipynb">x</a>']


def test_the_picture_of_the_pipeline_in_the_readme(root):
    "Draws the same stages"
    svg = (root / "docs/_static/pipeline.svg").read_text("utf-8")
    drawn = re.findall(r'<text [^>]*font-weight="bold">(\w+)</text>', svg)
    assert drawn == re.findall(r'font-weight="bold">(\w+)<', show_pipeline().svg())


def test_the_front_page_is_short(notebooks):
    words = sum(
        len("".join(c["source"]).split())
        for c in notebooks["index.ipynb"]
        if c["cell_type"] == "markdown"
    )
    assert words < 750


def test_readme_is_plain(root):
    "A still picture and no widget; what it links to is there"
    text = (root / "README.md").read_text("utf-8")
    assert (
        "<iframe" not in text and "srcdoc" not in text and ":::" not in text and len(text) < 30_000
    )
    for picture in ("viewer.png", "pipeline.svg"):
        assert re.search(rf"!\[[^\]]{{20,}}\]\(docs/_static/{re.escape(picture)}\)", text)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (root / link).exists(), link


def test_links_of_functions_in_the_readme_lead_to_notebooks():
    linked = readme.notebook_links("[`Scan`](/covid_ct/scan.html#scan), [x](/other/scan.html)")
    assert linked == "[`Scan`](nbs/00a_scan.ipynb), [x](/other/scan.html)"


def test_no_made_up_address(root, notebooks):
    """No page, README or citation names a site or a repository of this package, unless
    `git_url` in settings.ini says that there is one"""
    if public.repository(public.setting("git_url")):
        pytest.skip("the repository is public")
    named = re.compile(r"https?://(?:github\.com/covid-ct|covid-ct\.github\.io)[^\s)\"]*")
    texts = {name: json.dumps(cells) for name, cells in notebooks.items()}
    for name in ("README.md", "CITATION.cff", "settings.ini", "CONTRIBUTING.md", "setup.py"):
        texts[name] = (root / name).read_text("utf-8")
    found = {name: named.findall(text) for name, text in texts.items() if named.search(text)}
    assert not found, found


def test_the_one_setting_adds_badges():
    page = "nbs/lessons/1_first_scan.ipynb"
    assert public.badges(page, "") == "" and public.repository("https://example.org/x") is None
    text = public.badges(page, "https://github.com/owner/name")
    for address in (
        f"https://colab.research.google.com/github/owner/name/blob/main/{page}",
        f"https://mybinder.org/v2/gh/owner/name/main?labpath={page}",
    ):
        assert f"]({address})" in text


def test_citation(root):
    "Version, licence and papers are those of settings.ini and references.bib; nobody is invented"
    yaml = pytest.importorskip("yaml")
    cff = yaml.safe_load((root / "CITATION.cff").read_text("utf-8"))
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini", encoding="utf-8")
    cfg = settings["DEFAULT"]
    assert (
        str(cff["version"]) == cfg["version"]
        and cff.get("repository-code", "") == cfg["git_url"]
        and cff["license"] == "Apache-2.0"
    )
    assert cff["authors"] == [{"name": cfg["author"]}] and cff["cff-version"] == "1.2.0"
    ours = [f for f in refs.sources().values() if "page" in f]
    assert len(ours) == 4
    for paper, source in zip(cff["references"], ours, strict=False):
        assert paper["title"] == source["title"] and str(paper["year"]) == source["year"]
        assert [(a["family-names"], a["given-names"]) for a in paper["authors"]] == refs.people(
            source
        )
        assert paper.get("doi") == source.get("doi")
        assert [i["value"] for i in paper.get("identifiers", [])] == [
            f"arXiv:{source[k]}" for k in ["eprint"] if k in source
        ]
        assert (root / "nbs" / f"{source['page']}.ipynb").exists()


def test_sources_are_known(notebooks):
    "Who is named as `Surname et al. 2020` stands in references.bib, and who stands there is named"
    seen, unknown = set(), set()
    for name, cells in notebooks.items():
        for c in cells:
            text = "".join(c["source"])
            if c["cell_type"] == "markdown":
                left = refs.cite(text, "references.md", seen)
                unknown |= {
                    (name, m)
                    for m in re.findall(
                        r"(?<!\[)\b[A-Z][\w-]+ et al\.,? (?:19|20)\d\d",
                        re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`|\$[^$]*\$", "", left),
                    )
                }
            else:
                seen |= {m["key_"] or m.lastgroup for m in refs.known().finditer(text)}
    assert not unknown, unknown
    assert not set(refs.sources()) - seen, "never named: " + ", ".join(
        sorted(set(refs.sources()) - seen)
    )


def test_citing_by_hand():
    seen = set()

    def linked(text):
        return refs.cite(text, "r.md", seen)

    assert linked("Wilson 1927") == "[Wilson 1927](r.md#ref-wilson1927)"
    assert (
        linked("by Ouyang et al. (2020, Eq. 1)")
        == "by [Ouyang et al.](r.md#ref-ouyang2020) (2020, Eq. 1)"
    )
    assert linked("see @chen2020.") == "see [Chen et al. 2020](r.md#ref-chen2020)."
    assert linked("*Reformer*") == "[*Reformer*](r.md#ref-kitaev2020)"
    title = (
        "*Automatic lung segmentation for accurate quantitation of volumetric\n  X-ray CT images*"
    )
    assert linked(title) == f"[{title}](r.md#ref-hu2001)"
    kept = (
        "`Wilson 1927`, $Wilson 1927$, [Wilson 1927](x.md), "
        "Wilson 1928 and the Reformer\n# Wilson 1927"
    )
    assert linked(kept) == kept and seen == {
        "wilson1927",
        "ouyang2020",
        "chen2020",
        "kitaev2020",
        "hu2001",
    }


# ---------------------------------------------------------------- in a browser
def test_front_page_is_alive(visit):
    "What it is, and a viewer that answers, before anybody scrolls"
    page = visit("index.html")
    frame = page.frame_locator("iframe[data-covid-ct]").first
    frame.locator("[data-ready='1']").wait_for(timeout=30_000)
    box = page.locator("iframe[data-covid-ct]").first.bounding_box()
    assert (
        box["y"] < 420
        and box["height"] > 300
        and frame.locator(".covid-ct-viewer").evaluate(MOVE)["changed"]
    )
    assert (
        page.locator("iframe[data-covid-ct]").count() == 1
        and page.locator("nav.pipeline a[href='02_io/read.html']").count() == 1
    )


def test_mathematics_and_search(visit, site):
    page = visit("scan.html")
    page.locator("mjx-container svg").first.wait_for(timeout=20_000)
    for at in (
        {},
        {"at": site.resolve().as_uri()},
    ):  # from a server and from the disk: pages and functions
        page = visit("search.html?q=spacing", **at)
        page.locator("ul.search li a").first.wait_for(timeout=20_000)
        page = visit("search.html?q=check_same_grid", **at)
        page.locator("ul.search li a[href*='scan.html']").first.wait_for(timeout=20_000)


def test_viewer_answers(visit):
    "Without a kernel: the slice moves and the picture changes"
    page = visit("12_widgets/viewer.html")
    page.locator("iframe[data-covid-ct]").first.scroll_into_view_if_needed()
    frame = page.frame_locator("iframe[data-covid-ct]").first
    frame.locator("[data-ready='1']").wait_for(timeout=30_000)
    assert frame.locator(".covid-ct-viewer").evaluate(MOVE)["changed"]


def test_reading_room_answers(visit):
    "The filter leaves fewer cases"
    page = visit("12_widgets/reading_room.html")
    page.locator("iframe[data-room]").first.scroll_into_view_if_needed()
    frame = page.frame_locator("iframe[data-room]").first
    frame.locator(".ccr[data-ready='1']").wait_for(timeout=30_000)
    rows, count = frame.locator(".ccr-list tbody tr[data-id]"), frame.locator("[data-role=count]")
    before = count.inner_text()
    frame.locator("[data-control=search]").fill(rows.first.get_attribute("data-id"))
    assert rows.count() == 1 and count.inner_text() != before


def test_gallery_of_scans_answers(visit):
    "Another scan is chosen, another scan is shown"
    page = visit("12_widgets/gallery.html")
    page.locator("iframe[data-gallery]").first.scroll_into_view_if_needed()
    frame = page.frame_locator("iframe[data-gallery]").first
    kinds = frame.locator("button[data-k]")
    kinds.first.wait_for(timeout=30_000)
    cards = frame.locator("button[data-id]")
    all_of_them = cards.count()
    kinds.nth(1).click()
    assert 0 < cards.count() < all_of_them and kinds.nth(1).get_attribute("aria-pressed") == "true"


PHONE = [
    "index.html",
    "lessons/first_scan.html",
    "08_train/losses.html",
    "12_widgets/reading_room.html",
    "papers/darnet.html",
    "reports/demo.html",
    "figures.html",
    "references.html",
    "search.html?q=lung",
]


def test_phone(visit):
    "Nothing but tables, code and formulas scrolls sideways, each in its own box"
    page, wide = (
        visit(PHONE[0], 390, 844, is_mobile=True, has_touch=True, device_scale_factor=2),
        {},
    )
    for path in PHONE:
        page.goto(re.sub(r"^(https?://[^/]+).*", r"\1/" + path, page.url))
        if over := page.evaluate("document.documentElement.scrollWidth - innerWidth"):
            wide[path] = over
    assert not wide
    page.goto(re.sub(r"^(https?://[^/]+).*", r"\1/index.html", page.url))
    page.locator("label.mobile-header-icon[for=__navigation], .nav-overlay-icon").first.click()
    page.locator(".sidebar-drawer input[name=q]").wait_for(state="visible")


AUDIT = """(options) => axe.run(document, {resultTypes: ["violations"], ...options})
  .then(r => r.violations
  .filter(v => ["serious", "critical"].includes(v.impact))
  .map(v => `${v.id}, ${v.nodes.length} times: ${v.help}: `
    + v.nodes.slice(0, 3).map(n => `${n.target} ${n.html.slice(0, 120)}`).join(" | ")))"""


@pytest.fixture(scope="module")
def axe():
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None:
        pytest.skip("axe-playwright-python is not installed")
    return (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")


@pytest.mark.parametrize(
    "path",
    [
        "index.html",
        "lessons/first_scan.html",
        "scan.html",
        "papers/raunet.html",
        "reports/demo.html",
        "figures.html",
        "references.html",
        "search.html?q=lung",
    ],
)
def test_for_everybody(visit, axe, path):
    "No serious finding of axe, in light and in dark"
    page = visit(path)
    if page.locator("iframe[data-covid-ct]").count():
        page.locator("iframe[data-covid-ct]").first.scroll_into_view_if_needed()
        page.frame_locator("iframe[data-covid-ct]").first.locator("[data-ready='1']").wait_for(
            timeout=30_000
        )
    if "search" in path:
        page.locator("ul.search li a").first.wait_for(timeout=20_000)
    page.wait_for_load_state("load")
    for frame in page.frames:
        frame.evaluate(axe)
    found = page.evaluate(AUDIT, {})
    page.emulate_media(color_scheme="dark")
    found += [
        f"dark: {f}"
        for f in page.evaluate(AUDIT, {"runOnly": ["color-contrast", "link-in-text-block"]})
    ]
    assert not found, "\n".join(found)
