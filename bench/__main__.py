"""Run every module of this folder that declares `CASES`, print the ratios, write
_bench/results.json after each row.

A ratio is the peer's number over ours: above 1 we need less time, memory or space, below 1 the peer
does. A row that fails or takes too long is reported, and the others go on.

    python -m bench              all of them
    python -m bench preprocess   only those named
"""

import argparse
import json
import os
import pkgutil
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bench
from bench import trouble
from covid_ct.scan import write_atomic

PEERS = (
    "covid_ct torch numpy SimpleITK monai torchio captum scikit-learn matplotlib ipyniivue".split()
)
MARK = "row:"


def versions():
    "Of Python and of whatever took part"
    out = {"python": platform.python_version()}
    for name in PEERS:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            pass
    return out


def hardware():
    "Enough to compare two results, nothing that names a machine"
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "processor": platform.machine(),
        "system": platform.system(),
    }


def modules():
    "The names of those that declare cases; the GPU's has a command of its own"
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__))
    return [n for n in names if n not in ("__main__", "gpu")]


def run_case(module, number):
    "In this process: the rows of one case, each printed as it comes"
    case = import_module(f"bench.{module}").CASES[number]
    for row in case.rows():
        print(f"\n{MARK}{json.dumps(row)}", flush=True)


def end(process):
    "Stop a process and what it started"
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        process.kill()
    process.wait()


def lines_of(process):
    "A queue of the lines that it writes, None at the end"
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def started(module, number, errors):
    "The process of a case"
    command = [sys.executable, "-m", "bench", "--case", module, str(number)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=bench.ROOT,
        start_new_session=True,
    )


def rows_of(module, number, case, until, errors):
    "The rows of a case as they come; last a row of trouble where it failed or was stopped"
    process = started(module, number, errors)
    lines, begun = lines_of(process), time.monotonic()
    try:
        while (
            line := lines.get(timeout=max(0.01, min(begun + case.limit, until) - time.monotonic()))
        ) is not None:
            if not line.startswith(MARK):
                continue
            yield json.loads(line[len(MARK) :])
            begun = time.monotonic()
        if process.wait():
            yield trouble(case.name, last_line(errors) or f"exit {process.returncode}")
    except queue.Empty:
        yield trouble(case.name, f"stopped {time.monotonic() - begun:.0f} s after the row before")
    finally:
        end(process)


def last_line(errors):
    "Of what a process wrote to its standard error"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def told(row):
    "One row as one line"
    if "trouble" in row:
        return f"{row['name'][:70]:<70} not measured: {row['trouble']}"
    return (
        f"{row['name'][:70]:<70} {row['ours']:>10.4g} {row['peer']:>10.4g}  {row['unit']:<6} "
        f"{row['ratio']:>7.2f}"
    )


def declared(names):
    "Module, number and case of all cases; a module that cannot be imported is a row of trouble"
    for name in names:
        try:
            cases = import_module(f"bench.{name}").CASES
        except Exception as e:
            yield name, 0, trouble(name, e)
        else:
            yield from ((name, i, case) for i, case in enumerate(cases))


def collect(names, until):
    "The rows of all cases of the modules, one process after the other"
    for name, number, case in declared(names):
        if isinstance(case, dict):
            yield case
        elif time.monotonic() > until:
            yield trouble(case.name, "not run: the time is up")
        else:
            with tempfile.TemporaryFile() as errors:
                yield from rows_of(name, number, case, until, errors)


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("only", nargs="*", help=f"modules to run: {', '.join(modules())}")
    ap.add_argument("--out", type=Path, default=Path("_bench/results.json"))
    ap.add_argument(
        "--minutes", type=float, default=18, help="when no further row is begun or waited for"
    )
    ap.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.case:
        return run_case(a.case[0], int(a.case[1]))
    if unknown := set(a.only) - set(modules()):
        ap.error(f"no such module: {', '.join(sorted(unknown))}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    rows, about = [], {"versions": versions(), "hardware": hardware()}
    print(f"{'what':<70} {'ours':>10} {'peer':>10}  {'unit':<6} {'ratio':>7}")
    for row in collect(a.only or modules(), time.monotonic() + 60 * a.minutes):
        rows.append(row)
        write_atomic(a.out, json.dumps({"results": rows, **about}, indent=1, ensure_ascii=False))
        print(told(row), flush=True)
    missing = sum("trouble" in r for r in rows)
    print(f"{len(rows) - missing} rows measured, {missing} not: {a.out}")
    return 1 if missing == len(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
