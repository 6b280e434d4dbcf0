"""One nbdev notebook -> one MyST notebook under _build/src/. Imported, never run: IPython takes over `__main__`."""
import functools
import inspect
import json
import os
import re
from importlib import import_module
from pathlib import Path, PurePosixPath

from fastcore.docments import DocmentTbl, ShowDocRenderer
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "_build" / "src"                    # not _proc: nbdev and Quarto keep theirs there
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")          # the prefix that nbdev drops
CALLOUT = re.compile(r"^(:{3,})\s*\{\.callout-(note|tip|warning|caution|important)([^}]*)\}\s*\n(.*?)^\1[ \t]*$", re.S | re.M)


def page_name(src: Path) -> PurePosixPath:
    "Where a notebook's page goes, relative to the site: nbdev's own rule"
    rel = src.relative_to(ROOT / "nbs") if (ROOT / "nbs") in src.parents else src.relative_to(ROOT)
    return PurePosixPath(rel.parent.as_posix()) / NUMBER.sub("", rel.name.lower())


def sources():
    nbs = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]
    return [ROOT / "index.ipynb", *sorted(nbs, key=lambda p: p.relative_to(ROOT).as_posix())]


# ---------------------------------------------------------------- markdown
def callouts(md):
    def one(m):
        kind = m[2]
        title, body = (re.search(r'title="([^"]*)"', m[3]) or [None, None])[1], m[4]
        h = re.match(r"\s*#+\s+(.+)\n", body)
        if h and not title: title, body = h[1], body[h.end():]
        head = f"{m[1]}{{admonition}} {title}\n:class: {kind}" if title else f"{m[1]}{{{kind}}}"
        extra = "\n:class: dropdown" if "collapse" in m[3] and not title else " dropdown" if "collapse" in m[3] else ""
        return f"{head}{extra}\n{body.strip()}\n{m[1]}"
    return CALLOUT.sub(one, md)


def to_myst(md, links):
    parts = re.split(r"(^```.*?^```\s*$)", md, flags=re.S | re.M)
    for i in range(0, len(parts), 2):
        p = callouts(parts[i])
        p = re.sub(r"\$\$\s*\{#(eq-[\w-]+)\}", r"$$ (\1)", p)
        p = re.sub(r"^(#+ .*?)\s*\{#([\w-]+)\}\s*$", r"(\2)=\n\1", p, flags=re.M)
        p = re.sub(r"(?<![\w`\[])@(eq|fig|tbl|sec)-([\w-]+)",
                   lambda m: "{%s}`%s-%s`" % ({"eq": "eq", "sec": "ref"}.get(m[1], "numref"), m[1], m[2]), p)
        parts[i] = re.sub(r"(\]\()([^)\s]+)(\))", lambda m: m[1] + links(m[2]) + m[3], p)
    return "".join(parts)


# ---------------------------------------------------------------- one notebook
def label(name, is_class=False):
    "The anchor of a symbol, from its module and name; docutils folds case, so that `Recipe` and `recipe` need to differ"
    return re.sub(r"[^\w.]+", "-", f"api-{name}").lower() + ("-class" if is_class else "")


@functools.cache
def anchors():
    "URL that nbdev gives a symbol -> our anchor, for all that `show_doc` shows"
    out = {}
    for module, symbols in import_module(f"{get_config().lib_name}._modidx").d["syms"].items():
        shown = getattr(import_module(module), "__all__", ())
        for name, (url, _) in symbols.items():
            symbol = name.removeprefix(module + ".")
            if symbol in shown: out[url] = label(name, inspect.isclass(getattr(import_module(module), symbol)))
    return out


class TableRenderer(ShowDocRenderer):
    "show_doc as a heading, a signature, a summary and a table of the parameters"
    module = ""
    def _repr_markdown_(self):
        lookup = NbdevLookup()
        home = self.module if self.sym.__module__ == "__main__" else self.sym.__module__     # a page runs its own cells as __main__
        name = f"{home}.{self.sym.__qualname__}"
        src = lookup.code(name)
        sig = re.sub(r"\s*#[^\n]*", "", str(self.dm))
        sig = re.sub(r"\(\s+", "(", re.sub(r",?\s*\n\)", ")", re.sub(r",\s*\n\s+", ", ", sig)))
        if inspect.isclass(self.sym): sig = sig.replace("def ", "class ", 1)
        sig = re.sub(r"<(?:class|function) '?(?:[\w.]+\.)?(\w+)[^>]*>", r"\1", sig)
        out = [f"({label(name, inspect.isclass(self.sym))})="]
        out += [f"{'#' * self.title_level} {self.nm}", ""]
        if src: out += [f"[source]({src}){{.source-link}}", ""]
        out += ["```python", sig, "```", "", self.docs or "", "", str(DocmentTbl(self.sym))]
        return "\n".join(out)


def process(src: Path):
    "The notebook after nbdev's own processors, and its front matter"
    os.environ["IN_TEST"] = "1"
    cwd = os.getcwd(); os.chdir(src.parent)
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults
    get_config()["renderer"] = f"{__name__}.TableRenderer"
    nb = read_nb(src)
    exp = re.search(r"#\| default_exp (\S+)", "\n".join(c.source for c in nb.cells[:2]))
    TableRenderer.module = f"{get_config().lib_name}.{exp[1]}" if exp else ""
    nb.metadata.pop("widgets", None)                     # execnb cannot write a jslink's state, and we need none
    FilterDefaults()(nb)
    os.chdir(cwd)
    return nb, getattr(nb, "frontmatter_", {})


def stage(src: Path):
    import nbformat
    nb, fm = process(src)
    cfg = get_config()
    site = cfg.doc_host.rstrip("/") + cfg.doc_baseurl.rstrip("/") + "/"
    here = page_name(src)

    def links(url):
        if url.startswith(site):                         # a link that nbdev made
            page, _, anchor = url[len(site):].partition("#")
            target = PurePosixPath(page).with_suffix(".ipynb")
            known = anchors().get(url[len(site):])
            return f"#{known}" if known else os.path.relpath(target, here.parent)
        path, _, anchor = url.partition("#")
        if path.endswith(".ipynb") and "://" not in path:
            target = page_name((src.parent / path).resolve())
            return os.path.relpath(target, here.parent) + (f"#{anchor}" if anchor else "")
        return url

    new = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    md = lambda s: new.cells.append(nbformat.v4.new_markdown_cell(to_myst(s, links)))
    if fm.get("title"): md(f"# {fm['title']}\n\n" + (f"_{fm['description']}_" if fm.get("description") else ""))
    for c in nb.cells:
        if c.cell_type == "raw": continue
        s = c.source
        if c.cell_type == "markdown":
            if not s.startswith("<!-- WARNING"): md(s)
            continue
        opts = {}
        while m := re.match(r"#\|\s*([\w-]+):\s*(.*)\n?", s):
            opts[m[1]] = m[2].strip().strip('"'); s = s[m.end():]
        outs = json.loads(json.dumps(list(c.get("outputs", [])), default=lambda o: dict(o)))
        if opts.get("include") == "false": continue
        if opts.get("output") == "asis":
            for o in outs: md("".join(o["data"]["text/markdown"] if "data" in o else o["text"]))
            continue
        tags = []
        if opts.get("echo") == "false": tags.append("remove-input")
        if opts.get("output") == "false": tags.append("remove-output")
        if "code-fold" in opts: tags.append("hide-input")
        figure = {"image": {"alt": opts["fig-alt"]}} if "fig-alt" in opts else {}
        if opts.get("label", "").startswith("fig-"):
            figure["figure"] = {"name": opts["label"], "caption": opts.get("fig-cap", "")}
        cell = nbformat.v4.new_code_cell(s, metadata={"tags": tags} if tags else {})
        for o in outs:
            for k, v in o.get("data", {}).items():
                if isinstance(v, list): o["data"][k] = "".join(v)
            if isinstance(o.get("text"), list): o["text"] = "".join(o["text"])
        pictures = [o for o in outs if "image/png" in o.get("data", {})]
        cell.outputs = [nbformat.from_dict(o) for o in (pictures if figure and pictures else outs)]
        if figure: cell.metadata["mystnb"] = figure
        new.cells.append(cell)
    dst = STAGE / here
    dst.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new, dst)
    return here.as_posix()
