"""Class activation maps of a cohort: ours against Captum's LayerGradCam and MONAI's CAM on the same
network, the same volumes and in the same batches.

DARNet *tiny*, volumes of 32×64×64. The maps are compared before anything is timed: all three are
the same but for a constant. Times are milliseconds a scan, the best of some rounds in which all
take turns. Two jobs: the map of one class, and the maps of all three."""

import math
import time
from functools import partial

import numpy as np
import torch

from bench import Case, row

SCANS, BATCH, SIZE = 24, 8, (32, 64, 64)


def network():
    "Untrained, with classes that differ"
    from covid_ct.models.zoo import build
    from covid_ct.train.recipes import recipe

    torch.manual_seed(0)
    r = recipe("darnet", "tiny")
    m = build(r.model, **r.model_kwargs).eval()
    torch.nn.init.normal_(m.fc.weight, 0, 0.5)
    return m


def makers(m):
    """Peer → function of (batch, class), and functions of a batch that give the maps of all
    classes, `(B,K,…)`"""
    from captum.attr import LayerGradCam
    from monai.visualize import CAM

    from covid_ct.explain.cam import all_cams, cam

    plain = dict(upsampler=lambda size: lambda a: a, postprocessing=lambda a: a)
    gradient, theirs = LayerGradCam(m, m.stages[-1]), CAM(m, "stages.3", "fc", **plain)

    def monai(x, k):
        with torch.no_grad():
            return theirs(x, class_idx=[k] * len(x))[:, 0]

    one = {
        "ours": lambda x, k: cam(m, x, k),
        "Captum LayerGradCam": lambda x, k: gradient.attribute(x, target=k)[:, 0].detach(),
        "MONAI CAM": monai,
    }
    every = {
        n: (lambda x, f=f: torch.stack([f(x, k) for k in range(3)], 1)) for n, f in one.items()
    }
    return one, every | {"ours": lambda x: all_cams(m, x)}


def agree(one, every, x):
    """The same maps but for the number of feature voxels, which a gradient of a mean divides by;
    raises `AssertionError`"""
    mine = one["ours"](x, 1)
    n = mine[0].numel()
    np.testing.assert_allclose(n * one["Captum LayerGradCam"](x, 1), mine, rtol=1e-3, atol=1e-4)
    theirs = one["MONAI CAM"](x, 1)
    np.testing.assert_allclose(
        theirs - theirs.mean((1, 2, 3), keepdim=True),
        mine - mine.mean((1, 2, 3), keepdim=True),
        rtol=1e-3,
        atol=1e-4,
    )  # theirs adds the bias to every voxel
    np.testing.assert_allclose(every["ours"](x)[:, 1], mine, rtol=1e-4, atol=1e-5)


def timed(jobs, batches, rounds):
    "Best milliseconds a scan of each, taken in turn, so that a busy machine slows all of them"
    best = dict.fromkeys(jobs, math.inf)
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            for x in batches:
                job(x)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start) / SCANS)
    return best


def rows(what, rounds=3):
    "Of one class, or of all three"
    m, x = network(), torch.rand(SCANS, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    one, every = makers(m)
    batches = x.split(BATCH)
    agree(one, every, batches[0])
    jobs = every if what == "all three classes" else {n: partial(f, k=1) for n, f in one.items()}
    best = timed(jobs, batches, rounds)
    for n in jobs:
        if n != "ours":
            yield row(f"CAM of {SCANS} scans, {what}: {n}", best["ours"], best[n], "ms")


CASES = [Case(f"CAM of {what}", partial(rows, what)) for what in ("one class", "all three classes")]
