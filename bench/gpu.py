"""Each system at the size of its paper on the GPU that is there: a training step in plain float32
and as we run it, and what the paper's protocol would take.

    python -m bench.gpu     measures, prints, writes nbs/reports/gpu_<device>.json; or says: no GPU
    python -m bench.gpu --tiny   the tiny recipes, on whatever there is; prints and writes nothing

Steps go through the package's own `train_step`; batches are noise and lie on the device already.
Four engines, each adding one thing: eager float32 as PyTorch comes, bfloat16, channels last,
compile. Where a batch does not fit it is cut into parts whose gradients are summed. FLOPs are
counted by PyTorch (what is recomputed counts again) and set beside what a large matrix product
of the same type reaches on the same device."""

import argparse
import gc
import json
import math
import platform
import re
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import row

REPORTS = Path(__file__).resolve().parent.parent / "nbs" / "reports"
ENGINES = {
    "eager float32": dict(),
    "bfloat16": dict(precision="bf16"),
    "bfloat16, channels last": dict(precision="bf16", channels_last=True),
    "bfloat16, channels last, compiled": dict(precision="bf16", channels_last=True, compile=True),
}
FIRST, OURS = [*ENGINES][0], [*ENGINES][-1]
PROTOCOL = dict(  # trainings, training scans, scans that validate after each epoch, source
    darnet=(
        5,
        round(0.8 * 3238),
        round(0.2 * 3238),
        "Shi et al. 2021, Table I and IV-A: 3,238 scans in five folds",
    ),
    dual_sampling=(
        10,
        round(0.8 * 2186),
        round(0.2 * 2186),
        "Ouyang et al. 2020, IV: 2,186 scans in five folds, one network for each way of sampling",
    ),
    raunet=(10, 6 * 90, 10, "Chen et al. 2020, III: ten folds of 100 slices, each in six versions"),
    prior_attention=(
        5,
        1000,
        60,
        "Wang et al. 2020, V: five folds, epochs of 100 steps of 10 scans, 60 scans that validate",
    ),
)
NOTHING = (
    "No GPU here, so nothing was measured and nothing written. "
    "On a machine with one, `make bench-gpu` fills nbs/reports/."
)


def batch_of(recipe, shape, n, device):
    "Noise with whatever the recipe's loss asks for"
    g = torch.Generator().manual_seed(0)
    b = dict(
        image=torch.rand(n, *shape, generator=g),
        label=torch.arange(n) % len(recipe.classes),
        scan_id=[f"s{i}" for i in range(n)],
        patient_id=[f"p{i}" for i in range(n)],
    )
    if recipe.task == "segment":
        b["mask"] = torch.randint(len(recipe.classes), (n, *shape[1:]), generator=g)
    if recipe.loss == "attention":
        b["infection"] = (torch.rand(n, *shape, generator=g) > 0.95).float()
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in b.items()}


def shape_of(recipe):
    "Of one input, channels first"
    from covid_ct.models.zoo import ROWS
    from covid_ct.preprocess.resample import PREPS

    return (
        (1, *PREPS[recipe.prep].size)
        if recipe.prep
        else ROWS[recipe.model].input_size
        if not recipe.model_kwargs
        else (1, 64, 64)
    )


def prepared(recipe, device, precision="no", channels_last=False, compile=False, seed=0):
    "Network, optimizer, loss and accelerator, as `fit` prepares them"
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from covid_ct.models.zoo import build
    from covid_ct.train.loop import _WithOutputs
    from covid_ct.train.losses import build_loss
    from covid_ct.train.optimize import make_optimizer

    AcceleratorState._reset_state(reset_partial_state=True)
    acc = Accelerator(mixed_precision=precision, cpu=device == "cpu")
    torch.manual_seed(seed)
    model = build(recipe.model, **recipe.model_kwargs).to(device)
    net = _WithOutputs(model, channels_last)
    if compile:
        net.compile()
    return (
        *acc.prepare(net, make_optimizer(model, recipe)),
        build_loss(recipe.loss, **recipe.loss_kwargs),
        acc,
    )


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def clear(device):
    "Forget what was compiled and free what nobody holds"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def timed(call, device, n, warm):
    "Seconds of each of `n` calls, and of the warm-up"

    def once():
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - start

    first = sum(once() for _ in range(warm))
    return [once() for _ in range(n)], first


def measure(recipe, shape, device, parts=1, steps=10, warm=3, **engine):
    "A training step and a look at a batch: seconds, memory, losses"
    from covid_ct.train.optimize import train_step

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    net, opt, loss, acc = prepared(recipe, device, **engine)
    b, losses = batch_of(recipe, shape, recipe.batch_size, device), []
    net.train()
    seconds, first = timed(
        lambda: losses.append(train_step(net, b, loss, opt, acc, parts)["loss"]),
        device,
        steps,
        warm,
    )
    peak = torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else None
    few = {k: v[: math.ceil(recipe.batch_size / parts)] for k, v in b.items()}
    net.eval()
    with torch.inference_mode():
        look, _ = timed(lambda: net(few["image"]), device, max(2, steps // 3), 2)
    return dict(
        step_s=statistics.median(seconds),
        look_s=statistics.median(look) / len(few["image"]),
        first_s=first,
        peak_mb=peak,
        parts=parts,
        losses=[losses[0], losses[-1]],
    )


def fitting(recipe, shape, device, **kw):
    "The same in as few parts as fit into the memory; None if not even single scans do"
    parts = 1
    while parts <= recipe.batch_size:
        try:
            return measure(recipe, shape, device, parts, **kw)
        except torch.cuda.OutOfMemoryError:
            parts *= 2
        clear(device)


def flops(recipe, shape, device):
    "Floating-point operations of a training step, for one scan"
    from covid_ct.train.optimize import train_step

    net, opt, loss, acc = prepared(recipe, device)
    with FlopCounterMode(display=False) as counter:
        train_step(net.train(), batch_of(recipe, shape, 2, device), loss, opt, acc)
    return counter.get_total_flops() / 2


def matmul_peak(device, dtype, n=8192, repeats=10):
    """Operations a second of the best of some products of two square matrices; float32 in the
    mode that convolutions run in"""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / min(timed(lambda: a @ b, device, repeats, 2)[0])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def hours(recipe, system, step, look):
    "Of all trainings of the paper, validation included, loading not"
    trainings, train, valid, _ = PROTOCOL[system]
    return (
        trainings
        * recipe.epochs
        * (math.ceil(train / recipe.batch_size) * step + valid * look)
        / 3600
    )


def system_row(system, device, tiny=False, peaks=None, **kw):
    "All engines of one system; an engine that fails is told, not hidden"
    from covid_ct.train.recipes import change, recipe

    r = recipe(system, "tiny" if tiny else "paper")
    r = change(r, "bench", precision="no")
    shape = shape_of(r)
    each, out = flops(r, shape, device), {}
    for name, engine in ENGINES.items():
        clear(device)
        try:
            m = fitting(r, shape, device, **engine, **kw)
        except Exception as e:
            first = next(iter(str(e).strip().splitlines()), "")
            out[name] = dict(trouble=f"{type(e).__name__}: {first[:200]}")
            continue
        if m is None:
            out[name] = dict(trouble="does not fit, not even scan by scan")
            continue
        rate = each * r.batch_size / m["step_s"]
        out[name] = m | dict(
            scans_per_s=r.batch_size / m["step_s"],
            flops_per_s=rate,
            share_of_peak=rate / (peaks or {})["bf16" if engine.get("precision") else "no"]
            if peaks
            else None,
            protocol_hours=hours(r, system, m["step_s"], m["look_s"]),
        )
    return dict(
        system=system,
        recipe=f"{r.system} {r.name}",
        input=list(shape),
        batch=r.batch_size,
        flops_per_scan=each,
        protocol=PROTOCOL[system][3],
        engines=out,
    )


def report(device="cuda", tiny=False, systems=PROTOCOL, n=8192, **kw):
    "Everything, as JSON can hold it"
    gpu = torch.cuda.get_device_properties(0) if device != "cpu" else None
    peaks = {
        k: matmul_peak(device, t, n) for k, t in (("no", torch.float32), ("bf16", torch.bfloat16))
    }
    rows = []
    for s in systems:
        rows.append(system_row(s, device, tiny, peaks, **kw))
        print(line(rows[-1]), flush=True)
    return dict(
        device=gpu.name if gpu else platform.machine(),
        memory_gb=gpu.total_memory / 1e9 if gpu else None,
        matmul_flops_per_s=dict(float32=peaks["no"], bfloat16=peaks["bf16"]),
        tf32=torch.backends.cudnn.allow_tf32,
        versions=dict(
            torch=torch.__version__, cuda=torch.version.cuda, covid_ct=version("covid_ct")
        ),
        systems=rows,
    )


def line(row):
    "One system in one line"
    a, b = row["engines"][FIRST], row["engines"][OURS]
    if "trouble" in a or "trouble" in b:
        return f"{row['system']}: " + "; ".join(
            f"{k}: {v['trouble']}" for k, v in row["engines"].items() if "trouble" in v
        )
    return (
        f"{row['system']}: {1e3 * a['step_s']:.1f} ms a step in eager float32, "
        f"{1e3 * b['step_s']:.1f} ms as we run it; {b['scans_per_s']:.1f} scans a second"
        + (f", {b['peak_mb'] / 1e3:.1f} GB" if b["peak_mb"] else "")
        + (f", {b['share_of_peak']:.0%} of the matrix peak" if b["share_of_peak"] else "")
        + f"; the paper's protocol takes {b['protocol_hours']:.1f} h"
    )


def place(device):
    "Where the numbers of a device lie"
    return REPORTS / f"gpu_{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def bench():
    "Measures, writes, and gives rows; none without a GPU"
    if not torch.cuda.is_available():
        print(NOTHING)
        return []
    from covid_ct.scan import write_atomic

    r = report()
    out = place(r["device"])
    write_atomic(out, json.dumps(r, indent=1) + "\n")
    print(f"wrote {out.relative_to(REPORTS.parent.parent)}")
    return [
        row(
            f"{s['system']}: training step at the paper's size",
            1e3 * s["engines"][OURS]["step_s"],
            1e3 * s["engines"][FIRST]["step_s"],
            "ms",
        )
        for s in r["systems"]
        if not any("trouble" in s["engines"][k] for k in (FIRST, OURS))
    ]


def main(argv=None):
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--tiny", action="store_true", help="the tiny recipes, here and now")
    a = ap.parse_args(argv)
    if a.tiny:
        report("cuda" if torch.cuda.is_available() else "cpu", tiny=True, n=1024, steps=3, warm=1)
    else:
        bench()
    return 0


if __name__ == "__main__":
    sys.exit(main())
