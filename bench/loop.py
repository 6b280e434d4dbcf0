"""What our loop costs over a bare PyTorch loop, and a training step of DARNet without gates beside
MONAI's ResNet-18.

Ours is `fit` as a researcher calls it, with its bar, gradient norm, checks and states. Between
any two of its steps a twin of the network takes the same step in five bare lines, so that a busy
machine slows both alike; medians over the pairs are compared."""

import contextlib
import copy
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bench import Case, row


def _batches(n, size, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        dict(
            image=torch.rand(size, 1, *shape, generator=g),
            label=torch.randint(3, (size,), generator=g),
            scan_id=[f"{i}-{j}" for j in range(size)],
            patient_id=[f"{i}-{j}" for j in range(size)],
        )
        for i in range(n)
    ]


def bare_step(model):
    "The five lines"
    opt = torch.optim.Adam(model.parameters(), 1e-3)

    def step(b):
        loss = F.cross_entropy(model.train()(b["image"]), b["label"])
        opt.zero_grad()
        loss.backward()
        opt.step()

    return step


def bare_look(model):
    "Validation without any metric"

    @torch.inference_mode()
    def look(b):
        model.eval()(b["image"])

    return look


class Pairs:
    """Batches; the bare twin works on each before it is handed out. What passes until the next
    is asked for is ours, whatever `fit` does then"""

    def __init__(self, batches, twin):
        self.batches, self.twin, self.bare, self.ours, self.epochs = batches, twin, [], [], []

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch):
        self.epochs.append(time.perf_counter())

    def __iter__(self):
        for b in self.batches:
            start = time.perf_counter()
            self.twin(b)
            middle = time.perf_counter()
            self.bare.append(middle - start)
            yield b
            self.ours.append(time.perf_counter() - middle)


def compare(model, recipe, shape, train=10, valid=3, epochs=3):
    """Seconds of a step, ours and bare; seconds of an epoch with validation, tables and
    checkpoints, ours and bare"""
    from covid_ct.train.loop import Engine, fit
    from covid_ct.train.recipes import change

    r, twin = (
        change(recipe, "bench", epochs=epochs + 1, milestones=(), schedule="step"),
        copy.deepcopy(model),
    )
    a, b = (
        Pairs(_batches(train, r.batch_size, shape), bare_step(twin)),
        Pairs(_batches(valid, r.batch_size, shape, 1), bare_look(twin)),
    )
    with tempfile.TemporaryDirectory() as d, contextlib.redirect_stderr(io.StringIO()):
        fit(model, a, b, r, Path(d) / "r", engine=Engine(show="bar"))
    steps = [statistics.median(x[train:]) for x in (a.ours, a.bare)]  # the first epoch warms up

    def chunk(x, n, e):
        return sum(x[n * e : n * (e + 1)])

    bare = [
        chunk(a.bare, train, e) + chunk(b.bare, valid, e) for e in range(epochs)
    ]  # the last epoch's end is not seen
    whole = [end - start - s for start, end, s in zip(a.epochs, a.epochs[1:], bare, strict=False)]
    return *steps, *map(statistics.median, (whole[1:], bare[1:]))


def small():
    "A network whose step takes next to nothing"
    from covid_ct.train.recipes import change, recipe

    net = nn.Sequential(
        nn.Conv3d(1, 8, 3, 2, 1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    toy = change(
        recipe(),
        "bench",
        system="toy",
        name="toy",
        prep="",
        model="",
        model_kwargs={},
        augment="none",
    )
    ours, bare, *_ = compare(net, toy, (16, 32, 32), 40, 2, 5)
    yield row("step of a small network, fit beside a bare loop", 1e3 * ours, 1e3 * bare, "ms")
    yield row(
        "fixed cost of a step: the difference, beside the bare step",
        1e3 * (ours - bare),
        1e3 * bare,
        "ms",
    )


def darnet():
    "DARNet tiny on noise of its size"
    from covid_ct.models.zoo import build
    from covid_ct.preprocess.resample import PREPS
    from covid_ct.train.recipes import recipe

    r = recipe()
    ours, bare, whole, bare_whole = compare(build(r.model, **r.model_kwargs), r, PREPS[r.prep].size)
    yield row("step of DARNet tiny, fit beside a bare loop", 1e3 * ours, 1e3 * bare, "ms")
    yield row("epoch of DARNet tiny with validation and checkpoints", whole, bare_whole, "s")


def _steps(models, x, y, repeats=5):
    "Median seconds of a step of each, taken in turn, so that a busy machine slows all of them"
    steps, seconds = [bare_step(m) for m in models], [[] for _ in models]
    for _ in range(repeats):
        for step, s in zip(steps, seconds, strict=False):
            start = time.perf_counter()
            step(dict(image=x, label=y))
            s.append(time.perf_counter() - start)
    return [statistics.median(s[1:]) for s in seconds]


def resnet18_pair(depth=32):
    """DARNet without gates and MONAI's network of the same geometry: 3×7×7 stem of stride 1×2×2,
    no pooling; four stages of two blocks from 16 channels on"""
    from monai.networks.nets import ResNet

    from covid_ct.models.zoo import build

    ours = build("darnet-none", classes=3, depth=depth, width=16)
    peer = ResNet(
        "basic",
        [2, 2, 2, 2],
        [16, 32, 64, 128],
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_size=(3, 7, 7),
        conv1_t_stride=(1, 2, 2),
        no_max_pool=True,
        num_classes=3,
        shortcut_type="B",
    )
    return ours, peer


def monai():
    "A training step of both networks"
    ours, peer = resnet18_pair()
    b = _batches(1, 2, (32, 64, 64))[0]
    x, y = b["image"], b["label"]
    size = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    with torch.no_grad():
        assert ours(x).shape == peer(x).shape
    assert abs(size[0] / size[1] - 1) < 0.02, size
    name = "training step, ResNet-18 of the same geometry "
    name += f"({size[0]:,} parameters; MONAI's has {size[1]:,})"
    yield row(name, *(1e3 * s for s in _steps((ours, peer), x, y)), "ms")


CASES = [
    Case("fit of a small network", small),
    Case("fit of DARNet tiny", darnet, 200),
    Case("step of a ResNet-18", monai),
]
