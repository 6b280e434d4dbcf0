"""Speed, memory and error beside other packages.

Each module declares `CASES`. A case is run in a process of its own and yields rows. A ratio is
the peer's number over ours: above 1 we need less time, memory or space. Memory is the peak of a
process that does the work, above the peak of a process that only prepares it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT / "tests"),) if p not in sys.path]


class BenchError(RuntimeError):
    "A number that cannot be used, or a process that failed"


@dataclass(frozen=True)
class Case:
    "Rows that are measured together; `limit` seconds may pass until the next of them"

    name: str
    rows: Callable[[], Iterator[dict]]
    limit: float = 120


def row(name: str, ours: float, peer: float, unit: str) -> dict:
    """What a case yields; the only place where a ratio is made. Raises `BenchError` unless both
    are positive"""
    if not (ours > 0 and peer > 0):
        raise BenchError(f"{name}: {ours:.4g} {unit} beside {peer:.4g} {unit} give no ratio")
    numbers = dict(ours=ours, peer=peer, ratio=peer / ours)
    return dict(name=name, unit=unit) | {k: float(f"{v:.4g}") for k, v in numbers.items()}


def trouble(name: str, error: Exception | str) -> dict:
    "A row without numbers"
    said = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return dict(name=name, trouble=f"{kind}{said[-1][:300]}")


def peak_mb() -> float:
    "Largest resident memory of this process, in MB (10⁶ bytes)"
    status = Path("/proc/self/status")  # `ru_maxrss` of Linux starts with the parent's peak
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


def stage(target: str, work: bool, *args) -> dict:
    """In this process: a generator `module:function` up to its first `yield`, and on to what it
    yields next if `work`"""
    module, name = target.split(":")
    steps = getattr(import_module(module), name)(*args)
    next(steps)
    if not work:
        return dict(peak=peak_mb())
    start = time.perf_counter()
    told = next(steps) or {}
    return dict(seconds=time.perf_counter() - start, peak=peak_mb()) | told


def alone(target: str, work: bool, *args) -> dict:
    """`stage` in a process of its own. Raises `BenchError` with the last line that a failed one
    wrote"""
    call = [
        sys.executable,
        "-c",
        "import bench, json, sys; a = json.loads(sys.argv[1]); "
        "print('\\n' + json.dumps(bench.stage(*a)))",
        json.dumps([target, work, *args]),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    r = subprocess.run(call, capture_output=True, text=True, env=env)
    if r.returncode:
        raise BenchError((r.stderr.strip().splitlines() or [f"exit {r.returncode}"])[-1])
    return json.loads(r.stdout.splitlines()[-1])


def measured(target: str, *args) -> dict:
    "What the work told, its seconds, and `mb`: its peak above that of the preparation alone"
    base, full = alone(target, False, *args), alone(target, True, *args)
    return full | dict(mb=full["peak"] - base["peak"])
