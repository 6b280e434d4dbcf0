"""One nbdev notebook -> one MyST notebook under _build/src/. Imported, never run: IPython takes
over `__main__`."""

import functools
import inspect
import json
import os
import re
from importlib import import_module
from pathlib import Path, PurePosixPath

import public
import refs
from fastcore.docments import DocmentTbl, ShowDocRenderer
from gallery import picture, thumbnail
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "_build" / "src"  # not _proc: nbdev and Quarto keep theirs there
TAKE = "notebooks"  # the pages to download, in that folder
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")  # the prefix that nbdev drops
CALLOUT = re.compile(
    r"^(:{3,})\s*\{\.callout-(note|tip|warning|caution|important)([^}]*)\}\s*\n(.*?)^\1[ \t]*$",
    re.S | re.M,
)
SOLVED = re.compile(
    r"\{\.callout-\w+[^}]*collapse=\"true\"[^}]*\}\s*\n#+ Solution.*?^:::+\s*\Z", re.S | re.M
)  # ends a cell


def page_name(src: Path) -> PurePosixPath:
    "Where a notebook's page goes, relative to the site: nbdev's own rule"
    rel = src.relative_to(ROOT / "nbs") if (ROOT / "nbs") in src.parents else src.relative_to(ROOT)
    return PurePosixPath(rel.parent.as_posix()) / NUMBER.sub("", rel.name.lower())


def by_number(path):
    "Sorts 2 before 10"
    parts = re.split(r"(\d+)", path.relative_to(ROOT).as_posix())
    return [int(t) if k % 2 else t for k, t in enumerate(parts)]


def sources():
    nbs = [
        p
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
    ]
    return [ROOT / "index.ipynb", *sorted(nbs, key=by_number)]


# ---------------------------------------------------------------- markdown
GFM = re.compile(
    r"^<!-- readme -->\n(.*?)^<!-- /readme -->[ \t]*\n?", re.S | re.M
)  # README.md alone
NESTED = re.compile(r"\[([^\[\]]*)\[(`[^`]+`)\]\([^)\s]*\)([^\[\]]*)\]\(")


def callouts(md):
    def one(m):
        kind = m[2]
        title, body = (re.search(r'title="([^"]*)"', m[3]) or [None, None])[1], m[4]
        h = re.match(r"\s*#+\s+(.+)\n", body)
        if h and not title:
            title, body = h[1], body[h.end() :]
        head = f"{m[1]}{{admonition}} {title}\n:class: {kind}" if title else f"{m[1]}{{{kind}}}"
        fold = re.search(r'collapse="(true|false)"', m[3])
        extra = f"\n:collapsible: {'closed' if fold[1] == 'true' else 'open'}" if fold else ""
        return f"{head}{extra}\n\n{body.strip()}\n{m[1]}"

    return CALLOUT.sub(one, md)


def one_link(md):
    "nbdev links every name of the library; where it stands in a link already, that one is kept"
    return NESTED.sub(r"[\1\2\3](", md)


def to_myst(md, links, cite=lambda md: md):
    "Quarto's constructs as MyST; `links` maps an address, `cite` links the sources that are named"
    md = one_link(md)
    parts = re.split(r"(^```.*?^```\s*$)", callouts(GFM.sub("", md)), flags=re.S | re.M)
    for i in range(0, len(parts), 2):
        p = parts[i]
        p = re.sub(r"\$\$\s*\{#(eq-[\w-]+)\}", r"$$ (\1)", p)
        p = re.sub(r"^(#+ .*?)\s*\{#([\w-]+)\}\s*$", r"(\2)=\n\1", p, flags=re.M)
        p = re.sub(
            r"(?<![\w`\[])@(eq|fig|tbl|sec)-([\w-]+)",
            lambda m: "{{{}}}`{}-{}`".format(
                {"eq": "eq", "sec": "ref"}.get(m[1], "numref"), m[1], m[2]
            ),
            p,
        )
        parts[i] = cite(re.sub(r"(\]\()([^)\s]+)(\))", lambda m: m[1] + links(m[2]) + m[3], p))
    return "".join(parts)


def open_here(rel, room):
    "How to run this page, folded under its title"
    take = f"{{download}}`Take this notebook </{TAKE}/{rel}>`"
    home = os.path.relpath("index.ipynb", rel.parent)
    how = {
        "lessons": f"With [covid_ct installed]({home}#three-ways-in), the lessons come along:\n\n"
        "```sh\npip install jupyterlab\ncovid-ct course lessons\n"
        f"jupyter lab lessons/{rel.name}\n```\n\nOr {take.replace('Take', 'take')} alone.",
        "reports": "This page keeps the results of long runs; its first cells say which command "
        f"makes them. {take} to read the code; in a clone of the repository, `make lab` opens "
        f"`nbs/{rel}`.",
    }.get(
        room,
        f"{take}, without its outputs. With [covid_ct installed]({home}#three-ways-in) it runs "
        f"where you put it:\n\n```sh\npip install jupyterlab\njupyter lab {rel.name}\n```\n\n"
        f"In a clone of the repository, `make lab` opens them all; this one is `nbs/{rel}`.",
    )
    badges = public.badges(f"nbs/{rel}", public.setting("git_url"))
    return (
        ":::{admonition} Open this page in JupyterLab\n:class: open-here\n"
        f":collapsible: closed\n\n{how}\n:::" + (f"\n\n{badges}" if badges else "")
    )


def take_away(src):
    "The notebook to download: as it is, without outputs"
    nb = json.loads(src.read_text("utf-8"))
    for c in nb["cells"]:
        c.update(outputs=[], execution_count=None) if c["cell_type"] == "code" else None
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


def lead_on(output, links):
    "The links of a pipeline diagram, from notebooks to pages of the site"
    html = "".join(output.get("data", {}).get("text/html", ""))
    if not html.startswith('<nav class="pipeline"'):
        return

    def page(m):
        return f'href="{links(m[1]).removesuffix(".ipynb")}.html"'

    output["data"]["text/html"] = re.sub(r'href="([^"#]+\.ipynb)"', page, html)


# ---------------------------------------------------------------- one notebook
def label(name, is_class=False):
    """The anchor of a symbol, from its module and name; docutils folds case, so that `Recipe`
    and `recipe` need to differ"""
    return re.sub(r"[^\w.]+", "-", f"api-{name}").lower() + ("-class" if is_class else "")


@functools.cache
def anchors():
    "URL that nbdev gives a symbol -> our anchor, for all that `show_doc` shows"
    out = {}
    for module, symbols in import_module(f"{get_config().lib_name}._modidx").d["syms"].items():
        shown = getattr(import_module(module), "__all__", ())
        for name, (url, _) in symbols.items():
            symbol = name.removeprefix(module + ".")
            if symbol in shown:
                out[url] = label(name, inspect.isclass(getattr(import_module(module), symbol)))
    return out


class TableRenderer(ShowDocRenderer):
    "show_doc as a heading, a signature, a summary and a table of the parameters"

    module = ""

    def _repr_markdown_(self):
        lookup = NbdevLookup()
        home = (
            self.module if self.sym.__module__ == "__main__" else self.sym.__module__
        )  # a page runs its own cells as __main__
        name = f"{home}.{self.sym.__qualname__}"
        src = lookup.code(name) if public.repository(public.setting("git_url")) else None
        sig = re.sub(r"\s*#[^\n]*", "", str(self.dm))
        sig = re.sub(r"\(\s+", "(", re.sub(r",?\s*\n\)", ")", re.sub(r",\s*\n\s+", ", ", sig)))
        if inspect.isclass(self.sym):
            sig = sig.replace("def ", "class ", 1)
        sig = re.sub(r"<(?:class|function) '?(?:[\w.]+\.)?(\w+)[^>]*>", r"\1", sig)
        out = [f"({label(name, inspect.isclass(self.sym))})="]
        out += [f"{'#' * self.title_level} {self.nm}", ""]
        if src:
            out += [f"[source]({src}){{.source-link}}", ""]
        table = re.sub(
            r"^\|\s+\|", "| **Name** |", str(DocmentTbl(self.sym))
        )  # no empty head of a column
        out += ["```python", sig, "```", "", self.docs or "", "", table]
        return "\n".join(out)


def process(src: Path):
    "The notebook after nbdev's own processors, and its front matter"
    os.environ["IN_TEST"] = "1"
    cwd = os.getcwd()
    os.chdir(src.parent)
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults

    get_config()["renderer"] = f"{__name__}.TableRenderer"
    nb = read_nb(src)
    exp = re.search(r"#\| default_exp (\S+)", "\n".join(c.source for c in nb.cells[:2]))
    TableRenderer.module = f"{get_config().lib_name}.{exp[1]}" if exp else ""
    nb.metadata.pop("widgets", None)  # execnb cannot write a jslink's state, and we need none
    FilterDefaults()(nb)
    os.chdir(cwd)
    return nb, getattr(nb, "frontmatter_", {})


def stage(src: Path):
    "Write one staged page; what the gallery and the references need to know of it"
    import nbformat

    nb, fm = process(src)
    cfg = get_config()
    site = cfg.doc_host.rstrip("/") + cfg.doc_baseurl.rstrip("/") + "/"
    here = page_name(src)
    rel = (
        None if src == ROOT / "index.ipynb" else src.relative_to(ROOT / "nbs")
    )  # the front page is run by everybody
    cited, figures = set(), []
    cite = functools.partial(
        refs.cite, to=os.path.relpath("references.md", here.parent), seen=cited
    )

    def links(url):
        if url.startswith(site):  # a link that nbdev made
            page, _, anchor = url[len(site) :].partition("#")
            target = PurePosixPath(page).with_suffix(".ipynb")
            known = anchors().get(url[len(site) :])
            return f"#{known}" if known else os.path.relpath(target, here.parent)
        path, _, anchor = url.partition("#")
        if path == "docs/references.bib":
            return "references.md"
        if path.endswith(".ipynb") and "://" not in path:
            target = page_name((src.parent / path).resolve())
            return os.path.relpath(target, here.parent) + (f"#{anchor}" if anchor else "")
        return url

    new = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        }
    )

    def md(s):
        return new.cells.append(nbformat.v4.new_markdown_cell(to_myst(s, links, cite)))

    if fm.get("title"):
        md(f"# {fm['title']}\n\n" + (f"_{fm['description']}_" if fm.get("description") else ""))
    if rel:
        new.cells.append(nbformat.v4.new_markdown_cell(open_here(rel, here.parent.name)))
        (STAGE / TAKE / rel.parent).mkdir(parents=True, exist_ok=True)
        (STAGE / TAKE / rel).write_text(take_away(src), "utf-8")
    solved = False  # after a folded solution its code and output are folded too
    for c in nb.cells:
        if c.cell_type == "raw":
            continue
        s = c.source
        if c.cell_type == "markdown":
            solved = bool(SOLVED.search(s))
            if not s.startswith("<!-- WARNING"):
                md(s)
            continue
        opts = {}
        while m := re.match(r"#\|\s*([\w-]+):\s*(.*)\n?", s):
            opts[m[1]] = m[2].strip().strip('"')
            s = s[m.end() :]
        outs = json.loads(json.dumps(list(c.get("outputs", [])), default=lambda o: dict(o)))
        for o in outs:
            lead_on(o, links)
            if "text/markdown" in o.get("data", {}):  # a computed sentence
                told = "".join(o["data"]["text/markdown"])
                o["data"]["text/markdown"] = to_myst(told, links, cite)
        if opts.get("include") == "false":
            continue
        if opts.get("output") == "asis":
            for o in outs:
                md("".join(o["data"]["text/markdown"] if "data" in o else o["text"]))
            continue
        tags = []
        if opts.get("echo") == "false":
            tags.append("remove-input")
        if opts.get("output") == "false":
            tags.append("remove-output")
        if solved or "code-fold" in opts:
            tags.append("hide-cell" if solved or "solution" in opts else "hide-input")
        judge = re.search(r"^@exercise\(\s*['\"]([\d.]+)", s, re.M)
        folded = (
            f"Solution {opts['solution']}: the code"
            if "solution" in opts
            else f"Exercise {judge[1]}: the judge"
            if judge
            else "Solution: the code and what it says"
            if solved
            else ""
        )
        figure = {"image": {"alt": opts["fig-alt"]}} if "fig-alt" in opts else {}
        if opts.get("label", "").startswith("fig-"):
            figure["figure"] = {
                "name": opts["label"],
                "caption": to_myst(opts.get("fig-cap", ""), links, cite),
            }
        cell = nbformat.v4.new_code_cell(s, metadata={"tags": tags} if tags else {})
        for o in outs:
            for k, v in o.get("data", {}).items():
                if isinstance(v, list):
                    o["data"][k] = "".join(v)
            if isinstance(o.get("text"), list):
                o["text"] = "".join(o["text"])
        pictures = [o for o in outs if picture(o)]
        one = pictures[-1:] if "figure" in figure else pictures  # a label stands once
        cell.outputs = [nbformat.from_dict(o) for o in (one if figure and one else outs)]
        if figure or folded:
            cell.metadata["mystnb"] = figure | ({"code_prompt_show": folded} if folded else {})
        if "figure" in figure and pictures:
            figures.append(
                dict(
                    label=opts["label"],
                    caption=opts.get("fig-cap", ""),
                    alt=opts.get("fig-alt", ""),
                    thumb=thumbnail(picture(one[0])),
                )
            )
        new.cells.append(cell)
        if (
            figure
            and one
            and (
                rest := [o for o in outs if o not in pictures and "image/png" not in one[0]["data"]]
            )
        ):  # beside a picture in HTML
            new.cells.append(
                nbformat.v4.new_code_cell(
                    "",
                    metadata={"tags": ["remove-input"]},
                    outputs=[nbformat.from_dict(o) for o in rest],
                )
            )
    dst = STAGE / here
    dst.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new, dst)
    return dict(
        page=here.as_posix(),
        title=fm.get("title", here.stem),
        about=fm.get("description", ""),
        figures=figures,
        cited=sorted(cited),
    )
