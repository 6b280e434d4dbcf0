"""Pages and tests that train or draw, under other instruction sets, numbers of threads and seeds.

    python tests/portable.py                             everything, hours; earlier rows are kept
    python tests/portable.py nbs/papers/3_raunet.ipynb   only the page or file of tests named
    python tests/portable.py --capability avx2 --threads 2 --seeds 0 7
    python tests/portable.py --again                     run once more what failed

A seed is a shift: 0 is what the page or test asks for, k adds k to each seed that is given to
torch. `--onednn` holds the convolutions of oneDNN to the same instruction set as the rest of
torch. Each result goes to _portable/results.csv as soon as it is there, beside a digest of the
page or test: one that has been changed since is run again."""

import argparse
import csv
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
SHIFT = "COVID_CT_SEED_SHIFT"
CAPABILITIES = dict(default="SSE41", avx2="AVX2", avx512="AVX512_CORE")
FIELDS = [
    "what",
    "digest",
    "capability",
    "threads",
    "seed",
    "onednn",
    "result",
    "seconds",
    "message",
]
KEY = FIELDS[:6]
DRAWS = re.compile(
    r"manual_seed|torch\.(rand|randn|randint|randperm)\b|backward\(|\bfit\(|train_\w+\(|"
    r"cross_validate\(|study\(|\bdemo\(|build\("
)


def shift_seeds(by: int):
    "Add `by` to each seed that this process gives to torch from here on"
    import torch

    seed_all = torch.manual_seed

    class Shifted(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(int(seed) + by)

    torch.manual_seed = lambda seed: seed_all(int(seed) + by)
    torch.Generator = Shifted


def subjects() -> list[str]:
    "The pages that are executed and the files of tests that train or draw with torch"
    sys.path[:0] = [str(ROOT / "docs")]
    from stage import sources

    pages = [p for p in sources() if p.parent.name != "reports"]
    found = [*pages, *sorted((ROOT / "tests").rglob("test_*.py"))]
    return [p.relative_to(ROOT).as_posix() for p in found if DRAWS.search(p.read_text("utf-8"))]


def capabilities() -> list[str]:
    "Those that this processor has, the smallest first"
    import torch

    names = list(CAPABILITIES)
    best = torch.backends.cpu.get_cpu_capability().lower()
    return names[: names.index(best) + 1] if best in names else names[:1]


def run_page(page: str) -> int:
    "Execute a page in this process, its seeds shifted as the environment says"
    shift_seeds(int(os.environ.get(SHIFT, 0)))
    from nbdev.test import test_nb

    passed, _ = test_nb(ROOT / page, skip_flags=["slow"], basepath=ROOT)
    return 0 if passed else 1


def command(what: str) -> list[str]:
    "What executes a page or a file of tests"
    if what.endswith(".ipynb"):
        return [sys.executable, __file__, "--page", what]
    marks = "not browser and not gpu"
    return [
        sys.executable,
        "-m",
        "pytest",
        what,
        "-p",
        "no:cacheprovider",
        "-m",
        marks,
        "--timeout=0",
    ]


def environment(case: dict, folder: str) -> dict:
    "Of a case: instruction set, threads, seed, and a folder for what the page leaves"
    limit = (
        {"ONEDNN_MAX_CPU_ISA": CAPABILITIES[case["capability"]]} if case["onednn"] == "yes" else {}
    )
    return {
        **os.environ,
        **limit,
        "ATEN_CPU_CAPABILITY": case["capability"],
        "OMP_NUM_THREADS": case["threads"],
        "MKL_NUM_THREADS": case["threads"],  # torch asks for it too
        SHIFT: case["seed"],
        "MPLBACKEND": "agg",
        "PYTHONUTF8": "1",
        "TMPDIR": folder,
        "COVID_CT_COURSE": str(Path(folder, "course")),
    }


def told(text: str) -> str:
    "The tests that failed, or the last error of a page, on one line"
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", text, re.M)
    if failed:
        return " ".join(failed)
    cell = re.findall(r"^While Executing (Cell #\d+)", text, re.M)
    line = re.findall(r'^  File "<ipython-input.*\n +(.*)$', text, re.M)
    error = re.findall(r"^\w*(?:Error|Exception|Interrupt)\b(?! in /).*$", text, re.M)
    parts = [*cell[-1:], *line[-1:], *error[-1:]]
    return " | ".join(parts)[:400] or text.strip()[-200:].replace("\n", " ")


def run(case: dict, limit: float) -> dict:
    "The case with result, seconds and message"
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="portable_") as folder:
        try:
            r = subprocess.run(
                command(case["what"]),
                cwd=ROOT,
                env=environment(case, folder),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit,
            )
            result, text = "passed" if r.returncode == 0 else "failed", r.stdout + r.stderr
        except subprocess.TimeoutExpired:
            result, text = "too long", f"stopped after {limit:.0f} s"
    message = "" if result == "passed" else told(text)
    return case | dict(result=result, seconds=round(time.monotonic() - start, 1), message=message)


def digest(what: str) -> str:
    return hashlib.sha256((ROOT / what).read_bytes()).hexdigest()[:12]


def cases(a) -> list[dict]:
    "Every combination that is asked for, page by page"
    whats = [Path(w).as_posix() for w in a.what] or subjects()
    choices = itertools.product(whats, a.capability or capabilities(), a.threads, a.seeds)
    onednn = "yes" if a.onednn else "no"
    return [
        dict(what=w, digest=digest(w), capability=c, threads=str(t), seed=str(s), onednn=onednn)
        for w, c, t, s in choices
    ]


def known(path: Path) -> list[dict]:
    "The rows that an earlier run wrote"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write(path: Path, rows: list[dict]):
    "All rows, by way of a file beside"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, FIELDS)
        table.writeheader()
        table.writerows(rows)
    part.replace(path)


def arguments(argv=None):
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        "what", nargs="*", help="pages and files of tests; all that train or draw if none"
    )
    ap.add_argument("--capability", nargs="+", choices=list(CAPABILITIES), help="all that are here")
    ap.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    ap.add_argument("--seeds", nargs="+", type=int, default=[0, 101, 202, 303], help="shifts")
    ap.add_argument("--onednn", action="store_true", help="the same instruction set for oneDNN")
    ap.add_argument("--jobs", type=int, default=1, help="cases at a time")
    ap.add_argument("--limit", type=float, default=1200, help="seconds that a case may take")
    ap.add_argument("--again", action="store_true", help="run once more what did not pass")
    ap.add_argument("--list", action="store_true", help="only say what would be run")
    ap.add_argument("--out", type=Path, default=ROOT / "_portable" / "results.csv")
    ap.add_argument("--page", help=argparse.SUPPRESS)
    return ap.parse_args(argv)


def main(argv=None) -> int:
    a = arguments(argv)
    if a.page:
        return run_page(a.page)
    wanted, rows, lock = cases(a), known(a.out), Lock()

    def key(r):
        return tuple(r[k] for k in KEY)

    done = {key(r) for r in rows if r["result"] == "passed" or not a.again}
    todo = [c for c in wanted if key(c) not in done]
    print(f"{len(wanted)} cases, {len(todo)} to run")
    if a.list:
        for c in todo:
            print(*(c[k] for k in KEY))
        return 0

    def one(case):
        row = run(case, a.limit)
        with lock:
            rows[:] = [r for r in rows if key(r) != key(row)] + [row]
            write(a.out, rows)
            print(
                f"{row['result']:8} {row['seconds']:7.1f} s  {row['what']}  {row['capability']}, "
                f"{row['threads']} threads, seed +{row['seed']}  {row['message']}",
                flush=True,
            )

    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(one, todo))
    bad = [r for r in rows if key(r) in {key(c) for c in wanted} and r["result"] != "passed"]
    print(f"{len(bad)} of {len(wanted)} cases did not pass: {a.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
