"""One epoch over prepared scans of 64×224×224: our memory-mapped cache and loader, and MONAI's
CacheDataset, with the same augmentation; and a whole epoch of training on cached phantoms of
32×64×64: ours from the cache to the weights, and MONAI's CacheDataset, DataLoader and ResNet-18 in
a bare loop

    EPOCH_SCANS=200 python -m bench epoch   more scans than 40

Both read what was prepared before: two bytes a voxel in our folder, the same voxels as float32
in MONAI's memory (its cache is filled before the clock starts, ours is in the page cache).
Batches of 4; flip, rotation of ±5°, shifts of ±5 px and zooms of 0.9 … 1.1 in the plane; the
consumer adds up every batch. MONAI once with its DataLoader and once with its ThreadDataLoader.
A second run has a consumer that is busy for a while with every batch, as a network on an
accelerator is, and counts how long it waits for each but the first. Each side runs in a process
of its own. Memory is its peak above that of a process that holds the same package with one scan
in its cache, so that a cache in memory is counted and the package is not."""

import math
import os
import tempfile
import time
from functools import partial

import numpy as np

from bench import Case, measured, row

SIZE, BATCH, SCANS, BUSY = (64, 224, 224), 4, int(os.environ.get("EPOCH_SCANS", 40)), 0.4
FEW = BATCH  # scans of the process that memory is compared with


def cohort(n=SCANS):
    import pandas as pd

    return pd.DataFrame(
        [
            dict(
                patient_id=f"P{i:03d}",
                scan_id=f"S{i:03d}",
                label=("healthy", "cap", "covid")[i % 3],
            )
            for i in range(n)
        ]
    )


def never(row):
    raise AssertionError("prepared during the epoch")


def dataset(folder, n=SCANS):
    from covid_ct.batches.loaders import ScanDataset
    from covid_ct.preprocess.resample import Prep

    return ScanDataset(cohort(n), Prep(size=SIZE), load=never, cache=folder)


def write(folder):
    "Prepared scans of smooth noise, as `prepare_cohort` would leave them"
    d, rng = dataset(folder), np.random.default_rng(0)
    for i in range(SCANS):
        coarse = rng.integers(0, 65535, (16, 56, 56), dtype="u2")
        d.cache.put(d.row(i), {"image": coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)})


def ours(folder, n):
    from covid_ct.batches.augment import AUGMENTS
    from covid_ct.batches.loaders import make_loader
    from covid_ct.batches.samplers import UniformSampler

    d = dataset(folder, n)
    loader = make_loader(d, BATCH, UniformSampler(d.cohort), augment=AUGMENTS["darnet"])
    return lambda: (b["image"] for b in loader)


def monai(folder, n, threaded=False):
    from monai.data import CacheDataset, DataLoader, ThreadDataLoader
    from monai.transforms import Compose, Lambda, RandAffine, RandFlip

    d, a, z = dataset(folder, n), math.radians(5), (0.0, 0.0)

    def load(i):
        return d[i]["image"]

    views = [
        RandFlip(0.5, 2),
        RandAffine(
            1.0,
            rotate_range=((-a, a), z, z),
            translate_range=(z, (-5, 5), (-5, 5)),
            scale_range=(z, (-0.1, 0.1), (-0.1, 0.1)),
            padding_mode="zeros",
        ),
    ]
    data = CacheDataset(
        list(range(n)), Compose([Lambda(load), *views]), progress=False, num_workers=1
    )
    loader = (ThreadDataLoader if threaded else DataLoader)(
        data, batch_size=BATCH, shuffle=True, num_workers=0
    )
    return lambda: iter(loader)


SIDES = {"ours": ours, "monai": monai, "monai_threaded": partial(monai, threaded=True)}


def side(name, folder):
    "An epoch of a few scans; then the best of two whole epochs, and how long a busy consumer waits"
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    for x in SIDES[name](folder, FEW)():
        torch.as_tensor(x).sum()
    yield
    epoch = SIDES[name](folder, SCANS)
    next(iter(epoch()))
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        for x in epoch():
            float(torch.as_tensor(x).sum())
        best = min(best, time.perf_counter() - start)
    waits, asked = [], time.perf_counter()
    for n, _ in enumerate(epoch()):
        waits.append(time.perf_counter() - asked)
        time.sleep(BUSY)
        asked = time.perf_counter()
        if n == 10:
            break
    yield dict(seconds=best, waits=float(np.mean(waits[1:])))


def trained(scans=32, size=(32, 64, 64), epochs=3):
    """Seconds of a whole epoch, ours and MONAI's: reading, views, forward, backward, step. The
    same phantoms, the same geometry, the same views; epochs in turn"""
    import statistics
    from functools import partial

    import torch
    import torch.nn.functional as F
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import Compose, RandAffined, RandFlipd

    from bench.loop import resnet18_pair
    from covid_ct.batches.augment import AUGMENTS
    from covid_ct.batches.loaders import ScanDataset, make_loader
    from covid_ct.batches.samplers import UniformSampler
    from covid_ct.phantom.cohort import phantom_cohort, phantom_of
    from covid_ct.preprocess.resample import Prep
    from covid_ct.train.loop import _make_accelerator, _WithOutputs
    from covid_ct.train.losses import build_loss
    from covid_ct.train.optimize import train_step

    with tempfile.TemporaryDirectory() as folder:
        d = ScanDataset(
            phantom_cohort(scans, seed=3, second_scan=0),
            Prep(size=size),
            load=partial(phantom_of, shape=size),
            cache=folder,
        )
        for i in range(scans):
            d[i]  # prepared before the clock starts
        net, peer = resnet18_pair(size[0])
        acc = _make_accelerator("no")
        wrapped, opt = acc.prepare(_WithOutputs(net), torch.optim.Adam(net.parameters(), 1e-3))
        loader, loss = (
            make_loader(d, BATCH, UniformSampler(d.cohort), augment=AUGMENTS["darnet"]),
            build_loss("cross_entropy"),
        )
        a, z = math.radians(5), (0.0, 0.0)
        views = [
            RandFlipd("image", prob=0.5, spatial_axis=2),
            RandAffined(
                "image",
                prob=1.0,
                rotate_range=((-a, a), z, z),
                translate_range=(z, (-5, 5), (-5, 5)),
                scale_range=(z, (-0.1, 0.1), (-0.1, 0.1)),
                padding_mode="zeros",
            ),
        ]
        theirs = DataLoader(
            CacheDataset(
                [{k: torch.as_tensor(d[i][k]) for k in ("image", "label")} for i in range(scans)],
                Compose(views),
                progress=False,
                num_workers=1,
            ),
            batch_size=BATCH,
            shuffle=True,
            num_workers=0,
        )
        peer.train()
        bare = torch.optim.Adam(peer.parameters(), 1e-3)

        def ours(epoch):
            loader.set_epoch(epoch)
            wrapped.train()
            for batch in loader:
                train_step(wrapped, batch, loss, opt, acc)

        def monais(epoch):
            for b in theirs:
                total = F.cross_entropy(peer(b["image"].as_tensor()), b["label"])
                bare.zero_grad()
                total.backward()
                bare.step()

        seconds = {}
        for epoch in range(epochs + 1):
            for f in (ours, monais):
                start = time.perf_counter()
                f(epoch)
                seconds.setdefault(f, []).append(time.perf_counter() - start)
    return tuple(statistics.median(seconds[f][1:]) for f in (ours, monais))


def cached():
    "Time, waiting and memory beside both loaders of MONAI"
    peers = {
        "monai": "MONAI CacheDataset, DataLoader",
        "monai_threaded": "MONAI CacheDataset, ThreadDataLoader",
    }
    said = {
        "seconds": (f"epoch of {SCANS} cached scans, augmented", "s"),
        "mb": (f"memory of an epoch of {SCANS} scans", "MB"),
        "waits": (f"wait for a batch of {BATCH} after {BUSY} s of other work", "s"),
    }
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        mine = measured("bench.epoch:side", "ours", folder)
        for peer, name in peers.items():
            theirs = measured("bench.epoch:side", peer, folder)
            for key, (what, unit) in said.items():
                yield row(f"{what}: {name}", mine[key], theirs[key], unit)


def training():
    "A whole epoch of training"
    yield row(
        "whole epoch of training on cached phantoms: MONAI pipeline and ResNet-18", *trained(), "s"
    )


CASES = [Case("epoch of cached scans", cached, 240), Case("epoch of training", training, 200)]
