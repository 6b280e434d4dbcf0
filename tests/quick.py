"""Which tests belong to `make quick`: those whose functions took little processor time when `make
seconds` ran them.

`seconds.csv` beside this file holds the recorded functions, all their parameters together, child
processes included. A test without a record counts as quick unless it is marked `slow` or
`browser`, or asks for the site."""

import csv
import os
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("seconds.csv")
RECORD = "COVID_CT_SECONDS"  # a file that gets one line a test
LIMIT = 0.8  # seconds of a function, all its parameters
TOTAL = 120  # seconds of all quick tests; two processes share them


def function_of(nodeid: str) -> str:
    "The file and the function of a test, without folder and parameters"
    return nodeid.split("[")[0].rpartition("/")[2]


def used() -> float:
    "Seconds of processor time of this process and of those that it has waited for"
    return sum(os.times()[:4])


def note(nodeid: str, seconds: float):
    "Add a test to the record that the environment names"
    with open(os.environ[RECORD], "a", encoding="utf-8") as f:
        f.write(f"{seconds:.3f}\t{nodeid}\n")


def recorded(path: Path = TABLE) -> dict[str, float]:
    "Function → seconds"
    with open(path, newline="", encoding="utf-8") as f:
        return {r["function"]: float(r["seconds"]) for r in csv.DictReader(f)}


def summed(lines) -> dict[str, float]:
    "Function → seconds, of the lines of a record"
    out = {}
    for line in lines:
        seconds, nodeid = line.rstrip("\n").split("\t")
        name = function_of(nodeid)
        out[name] = out.get(name, 0) + float(seconds)
    return out


def is_quick(item, seconds: dict[str, float]) -> bool:
    "Of a collected test; building the site takes minutes, whoever asks first"
    marked = any(item.get_closest_marker(m) for m in ("slow", "browser"))
    if marked or "site" in getattr(item, "fixturenames", ()):
        return False
    return seconds.get(function_of(item.nodeid), 0) <= LIMIT


def main() -> int:
    "Turn the record into the table"
    found = summed(Path(sys.argv[1]).read_text("utf-8").splitlines())
    with open(TABLE, "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["function", "seconds"])
        table.writerows([name, f"{s:.2f}"] for name, s in sorted(found.items()))
    print(f"{TABLE.name}: {sum(s for s in found.values() if s <= LIMIT):.0f} s of quick tests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
