"""Result tables of the reports, kept beside them as CSV, so that a report's first section can
state and check its results without the run that made them"""

import re
from pathlib import Path

import pandas as pd

TABLES = Path(__file__).parent / "tables"


def _flat(labels):
    return [" | ".join(map(str, k)) if isinstance(k, tuple) else str(k) for k in labels]


def store(report, name, table):
    "Write one table of a report, with single-line headers, and return it unchanged"
    flat = table.set_axis(_flat(table.index)).set_axis(_flat(table.columns), axis=1)
    (TABLES / report).mkdir(parents=True, exist_ok=True)
    flat.to_csv(TABLES / report / f"{name}.csv", encoding="utf-8", lineterminator="\n")
    return table


def stored(report, name):
    "A stored table; an empty field is the empty string, because all fields are read as text"
    path = TABLES / report / f"{name}.csv"
    return pd.read_csv(path, index_col=0, dtype=str, keep_default_na=False)


def numbers(text):
    "All numbers in a field: '97.5 (95.0 … 100.0)' gives 97.5, 95.0 and 100.0"
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", str(text).replace("−", "-"))]


def value(text):
    "The first number in a field"
    return numbers(text)[0]
