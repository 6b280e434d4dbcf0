"""What our loop costs over a bare PyTorch loop, and a training step of DARNet without gates beside MONAI's ResNet-18."""
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def _batches(n, size, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [dict(image=torch.rand(size, 1, *shape, generator=g), label=torch.randint(3, (size,), generator=g), scan_id=[f"{i}-{j}" for j in range(size)],
                 patient_id=[f"{i}-{j}" for j in range(size)]) for i in range(n)]


def _bare(model, train, epochs):
    "The five lines"
    opt = torch.optim.Adam(model.parameters(), 1e-3); model.train(); seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for b in train:
            loss = F.cross_entropy(model(b["image"]), b["label"])
            opt.zero_grad(); loss.backward(); opt.step()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / len(train)


def _ours(model, train, epochs):
    "The same steps through our epoch, progress bar included"
    from covid_ct.train.loop import WithOutputs, make_accelerator, train_epoch
    from covid_ct.train.losses import CrossEntropy
    from tqdm.auto import tqdm
    acc = make_accelerator("no"); net, opt = acc.prepare(WithOutputs(model), torch.optim.Adam(model.parameters(), 1e-3)); seconds = []
    with tqdm(total=epochs * len(train), leave=False) as bar:
        def after(told): bar.set_postfix_str(f"loss {told['loss']:.3f}", refresh=False); bar.update()
        for _ in range(epochs):
            start = time.perf_counter(); train_epoch(net, train, CrossEntropy(), opt, acc, after=after); seconds.append(time.perf_counter() - start)
    return min(seconds) / len(train)


def _overhead():
    make = lambda: nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 3))
    train = _batches(20, 8, (16, 32, 32))
    _bare(make(), train, 1); _ours(make(), train, 1)
    pairs = [(_ours(make(), train, 3), _bare(make(), train, 3)) for _ in range(3)]
    ours, bare = (1e3 * min(p[i] for p in pairs) for i in (0, 1))
    return dict(name="training step, small network: fit against a bare loop", ours=round(ours, 3), peer=round(bare, 3), unit="ms", ratio=round(ours / bare, 3))


def _run_folder():
    "What an epoch costs on top of its steps: validation metrics, checkpoints, tables"
    from covid_ct.models.zoo import build
    from covid_ct.train.loop import fit
    from covid_ct.train.recipes import change, recipe
    r = change(recipe(), "bench", epochs=3, milestones=()); train, valid = _batches(3, 4, (32, 64, 64)), _batches(1, 4, (32, 64, 64), 1)
    with tempfile.TemporaryDirectory() as d:
        run = fit(build(r.model, **r.model_kwargs), train, valid, r, Path(d) / "r", progress=False)
        ours = float(run.history.seconds.min())
    model = build(r.model, **r.model_kwargs); bare = _bare(model, train, 2) * len(train)
    start = time.perf_counter()
    with torch.inference_mode():
        for b in valid: model.eval()(b["image"])
    bare += time.perf_counter() - start
    return dict(name="epoch of DARNet tiny: fit with validation and checkpoints against bare steps", ours=round(ours, 3), peer=round(bare, 3), unit="s", ratio=round(ours / bare, 3))


def _steps_ms(models, x, y, repeats=5):
    "Median step of each, taken in turn, so that a busy machine slows all of them"
    opts, seconds = [torch.optim.Adam(m.parameters(), 1e-3) for m in models], [[] for _ in models]
    for _ in range(repeats):
        for model, opt, s in zip(models, opts, seconds):
            start = time.perf_counter()
            opt.zero_grad(); F.cross_entropy(model.train()(x), y).backward(); opt.step()
            s.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(s[1:]) for s in seconds]


def _monai():
    "The stem of both: 3×7×7, stride 1×2×2, no pooling; four stages of two blocks from 16 channels on"
    from covid_ct.models.zoo import build
    from monai.networks.nets import ResNet
    ours = build("darnet-none", classes=3, depth=32, width=16)
    peer = ResNet("basic", [2, 2, 2, 2], [16, 32, 64, 128], spatial_dims=3, n_input_channels=1, conv1_t_size=(3, 7, 7), conv1_t_stride=(1, 2, 2), no_max_pool=True, num_classes=3, shortcut_type="B")
    b = _batches(1, 2, (32, 64, 64))[0]; x, y = b["image"], b["label"]
    size = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    with torch.no_grad(): assert ours(x).shape == peer(x).shape
    assert abs(size[0] / size[1] - 1) < .02, size
    a, p = _steps_ms((ours, peer), x, y)
    return dict(name=f"training step, ResNet-18 of the same geometry ({size[0]:,} parameters; MONAI's has {size[1]:,})", ours=round(a, 1), peer=round(p, 1), unit="ms", ratio=round(a / p, 3))


def bench():
    return [_overhead(), _run_folder(), _monai()]


if __name__ == "__main__":
    for row in bench(): print(row)
