"""The map on the front page: a table in index.ipynb and README.md, a diagram on the site."""

import json
import re

TABLE = re.compile(r"^\| *stage *\|.*\n\|[-| ]+\|\n((?:\|.*\|\n?)+)", re.M)


def cells(row):
    return [c.strip() for c in row.strip().strip("|").split("|")]


def rows(notebook):
    "(stage, links, in → out) of each row of the table in index.ipynb"
    text = "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text("utf-8"))["cells"])
    parts = [cells(r) for r in TABLE.search(text)[1].strip().splitlines()]
    return [
        (name, re.findall(r"\]\(([^)#]+\.ipynb)", pages), change) for name, pages, change in parts
    ]


def room(row):
    name, pages, change = cells(row)
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    return f":::{{container}} room room-{slug}\n**{name}**\n\n{pages}\n\n{change}\n:::"


def house(md):
    "Markdown in which that table is a plan: a box for each stage, all its pages in it"
    return TABLE.sub(
        lambda m: (
            "::::{container} house\n"
            + "\n".join(room(r) for r in m[1].strip().splitlines())
            + "\n::::\n"
        ),
        md,
    )
