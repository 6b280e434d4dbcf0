"""The sources in references.bib: their names on pages become links, and one page lists all."""

import functools
import re
from pathlib import Path

BIB = Path(__file__).with_name("references.bib")
AT = [("doi", "doi", "https://doi.org/"), ("arXiv", "eprint", "https://arxiv.org/abs/")]
KEEP = re.compile(
    r"(^#[^\n]*|^:[\w-]+:[^\n]*|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|<[^>\n]*>)",
    re.M | re.S,
)  # never touched


@functools.cache
def sources():
    "Key -> fields, in the order of the file"
    out = {}
    for key, body in re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}", BIB.read_text("utf-8"), re.S | re.M):
        out[key] = dict(re.findall(r"^\s*(\w+) = \{(.*)\},$", body, re.M))
    return out


def people(fields):
    "(family, given) of each author; the last is `others` where not all are named"
    return [(n.partition(", ")[0], n.partition(", ")[2]) for n in fields["author"].split(" and ")]


def label(fields):
    "`Wilson 1927`, `Hanley and McNeil 1982`, `Ouyang et al. 2020`"
    who = [family for family, _ in people(fields)]
    return (
        (
            who[0]
            if len(who) == 1
            else f"{who[0]} and {who[1]}"
            if len(who) == 2 and who[1] != "others"
            else f"{who[0]} et al."
        )
        + " "
        + fields["year"]
    )


def names_of(fields):
    "How prose may call a source, as a pattern: people and year, or title"
    who, year = (
        [re.escape(family) for family, _ in people(fields) if family != "others"],
        fields["year"],
    )
    more = (
        rf"(?: et al\.?|(?:, [A-Z][\w -]+)*,? (?:and |& )?{who[-1]})"
        if len(who) > 1
        else r"(?: et al\.?)?"
    )
    named = rf"{who[0]}{more}(?:,? {year}| \({year}\)|(?= \({year}))"
    title, short = (
        re.escape(t).replace(r"\ ", r"\s+")  # a title may run over the end of a line
        for t in (fields["title"], fields.get("shorttitle", fields["title"]))
    )
    return (
        rf"\b{named}(?![-\w])|{who[0]}{more}: {short}|(?i:\*{title}\*|\*{short}\*"
        + (rf"|{short}" if short.count(r"\s+") > 2 else "")
        + ")"
    )


@functools.cache
def known():
    named = "|".join(f"(?P<{key}>{names_of(f)})" for key, f in sources().items())
    return re.compile(
        rf"(?=[\[@*A-ZÇŁÉ])(?:\[?@(?P<key_>{'|'.join(sources())})\]?(?![\w-])|{named})"
    )


def cite(md, to, seen):
    """Markdown with a link from each source that it calls by label, title or key to the page of
    references; `seen` collects the keys"""

    def one(m):
        key = m["key_"] or m.lastgroup
        seen.add(key)
        return f"[{label(sources()[key]) if m['key_'] else m[0]}]({to}#ref-{key})"

    parts = KEEP.split(md)
    parts[::2] = [known().sub(one, p) for p in parts[::2]]
    return "".join(parts)


def entry(key, fields, cited):
    "One source, with its addresses and the pages that call it"
    who = [f"{given[:1]}. {family}" if given else "others" for family, given in people(fields)]
    who = ", ".join(who[:-1]) + (" and " if len(who) > 1 else "") + who[-1]
    where = fields.get("journal") or fields.get("booktitle")
    links = [
        f"[{kind}:{fields[field]}]({at}{fields[field]})"
        for kind, field, at in AT
        if field in fields
    ]
    ends = "" if fields["title"][-1] in ".?!" else "."
    text = [
        f"{who} ({fields['year']}). *{fields['title']}*{ends}",
        f"{where}." * bool(where),
        " · ".join(links),
    ]
    pages = ", ".join(f"[{title}]({page})" for page, title in cited)
    return f"(ref-{key})=\n`{key}` {' '.join(t for t in text if t)}\n" + (
        f"\n:::{{container}} cited\nNamed on: {pages}\n:::\n" if cited else ""
    )


def page(cited):
    "The page of references; `cited` maps a key to the (page, title) that call it"
    ours = [k for k, f in sources().items() if "page" in f]
    rest = sorted(set(sources()) - set(ours), key=lambda k: (label(sources()[k]).casefold(), k))

    def listed(keys):
        return "\n".join(entry(k, sources()[k], cited.get(k, [])) for k in keys)

    return (
        "# References\n\n_What the pages lean on, each with the pages that name it_\n\n"
        "Pages name a source as the field does, *Ouyang et al. 2020*; the name is a link to this "
        "page. The first word of an entry is its key in `docs/references.bib`.\n\n"
        f"## The four systems\n\n{listed(ours)}\n## All others\n\n{listed(rest)}"
    )
