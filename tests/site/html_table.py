"The fields of a table that pandas wrote as HTML"

from html.parser import HTMLParser


class _Rows(HTMLParser):
    "Cells of a table row by row: (is a header, text, rows that it spans)"

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            spans = {k: int(v) for k, v in attrs if k in ("rowspan", "colspan")}
            down, right = spans.get("rowspan", 1), spans.get("colspan", 1)
            self.rows[-1].append(dict(header=tag == "th", text="", down=down, right=right))
            self.open = True

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.open = False

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1]["text"] += data


def filled(rows):
    "Rows of (is a header, text), with spanning cells repeated"
    out, waiting = [], {}
    for row in rows:
        cells, queue = [], list(row)
        while queue or len(cells) in waiting:
            if len(cells) in waiting:
                cell, left = waiting.pop(len(cells))
                if left > 1:
                    waiting[len(cells)] = (cell, left - 1)
                cells.append(cell)
                continue
            c = queue.pop(0)
            cell = (c["header"], c["text"].strip())
            for _ in range(c["right"]):
                if c["down"] > 1:
                    waiting[len(cells)] = (cell, c["down"] - 1)
                cells.append(cell)
        out.append(cells)
    return out


def html_table(html):
    "Columns, index and fields of a pandas table, labels of several levels joined by ' | '"
    parser = _Rows()
    parser.feed(html)
    rows = filled([r for r in parser.rows if r])
    body = [r for r in rows if not all(header for header, _ in r)]
    head = [r for r in rows if all(header for header, _ in r)]
    levels = sum(header for header, _ in body[0])
    head = [[text for _, text in r] for r in head]
    head = [r[levels:] for r in head if any(r[levels:])]
    index = [" | ".join(text for _, text in r[:levels]) for r in body]
    fields = [[text for _, text in r[levels:]] for r in body]
    return [" | ".join(labels) for labels in zip(*head, strict=True)], index, fields
