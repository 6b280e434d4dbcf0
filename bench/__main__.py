"""Run every module of this folder that has a `bench()`, print the ratios, write _bench/results.json.

A ratio is the peer's number over ours: above 1 we need less time, memory or space, below 1 the peer does.

    python -m bench              all of them
    python -m bench preprocess   only those named
"""
import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bench
from covid_ct.scan import write_atomic

PEERS = "covid_ct torch numpy SimpleITK monai torchio captum scikit-learn matplotlib".split()


def versions():
    "Of Python and of whatever took part"
    out = {"python": platform.python_version()}
    for name in PEERS:
        try: out[name] = version(name)
        except PackageNotFoundError: pass
    return out


def hardware():
    "Enough to compare two results, nothing that names a machine"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"cores": os.cpu_count(), "memory_gib": round(memory / 2**30), "processor": platform.machine(), "system": platform.system()}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("only", nargs="*", help="modules to run")
    ap.add_argument("--out", type=Path, default=Path("_bench/results.json"))
    a = ap.parse_args()
    names = a.only or sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if not m.name.startswith("_") and m.name != "gpu")    # `make bench-gpu`
    rows = []
    print(f"{'what':<58} {'ours':>10} {'peer':>10}  {'unit':<6} {'ratio':>7}")
    for name in names:
        for row in importlib.import_module(f"bench.{name}").bench():
            rows.append({"name": row["name"], "ours": row["ours"], "peer": row["peer"], "unit": row["unit"], "ratio": row["peer"] / row["ours"]})
            print(f"{row['name'][:58]:<58} {row['ours']:>10.4g} {row['peer']:>10.4g}  {row['unit']:<6} {rows[-1]['ratio']:>7.2f}", flush=True)
    if not rows: return 0
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(a.out, json.dumps({"results": rows, "versions": versions(), "hardware": hardware()}, indent=1))
    print(f"wrote {a.out}")


if __name__ == "__main__": sys.exit(main())
