"""From file to network input: ours, MONAI and TorchIO on the same file, in time and in error

    python bench/preprocess.py        prints a JSON list of rows: name, ours, peer, unit, ratio (peer / ours, above 1 is better)"""
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SIZE, SHAPE, SPACING, WINDOW = (64, 224, 224), (300, 512, 512), (1.0, 0.7, 0.7), (-1350.0, 150.0)


def pattern():
    "Smooth detail that the network's grid can hold, so that the right answer is known; `SHAPE` voxels in HU"
    z, y, x = (np.arange(n) * s + s / 2 for n, s in zip(SHAPE, SPACING))
    wave = lambda a, mm: np.cos(2 * math.pi * a / mm)
    plane = 200 * np.outer(wave(y, 90), wave(x, 70)) + 60 * wave(y, 14)[:, None] + 60 * wave(x, 17)
    return ((-600 + 150 * wave(z, 120) + 30 * wave(z, 40))[:, None, None] + plane).astype("f4")


def write(path, noise):
    "The pattern as int16 .nii.gz, written by nibabel: with noise everywhere, or rounded inside a body so that it packs well"
    import nibabel
    v, rng = pattern(), np.random.default_rng(0)
    if noise:
        for part in v: part += rng.normal(0, noise, part.shape)
    else:
        y, x = np.ogrid[-1:1:SHAPE[1] * 1j, -1:1:SHAPE[2] * 1j]
        v = np.where((y ** 2 + (x / .9) ** 2 < .8), np.round(v / 25) * 25, -1024)
    v = np.rint(v).astype("i2")
    nibabel.save(nibabel.Nifti1Image(v.T, np.diag([*SPACING[::-1], 1])), path)
    return v


def reference(v):
    "Gaussian of half the reduction, then linear interpolation at the new centres, in float64 (scikit-image's antialiased resize)"
    def weights(n, m):
        f = n / m
        sigma, w = max(0, (f - 1) / 2), np.zeros((m, n))
        reach = int(4 * sigma + .5)
        taps = np.exp(-.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-9)) ** 2)
        for j in range(m):
            c = min(max((j + .5) * f - .5, 0), n - 1)
            for i, share in ((int(c), 1 - c % 1), (min(int(c) + 1, n - 1), c % 1)):
                for t, tap in zip(range(-reach, reach + 1), taps / taps.sum()): w[j, min(max(i + t, 0), n - 1)] += share * tap
        return w
    a, b, c = (weights(n, m) for n, m in zip(v.shape, SIZE))
    return b @ np.tensordot(a, v.astype("f8"), 1) @ c.T


def ours(path):
    from covid_ct.data.io import read
    from covid_ct.data.preprocess import PREPS, prepare
    return prepare(read(path), PREPS["darnet"]).voxels[:, ::-1, ::-1]  # back to the order of the file, x and y grow to the left and front


def monai(path, antialias=False):
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize, ScaleIntensityRange, Spacing
    chain = Compose([LoadImage(image_only=True), EnsureChannelFirst(), Spacing((1, 1, 1), mode="bilinear"),
                     ScaleIntensityRange(*WINDOW, 0, 1, clip=True), Resize(SIZE[::-1], mode="trilinear", anti_aliasing=antialias)])
    return np.asarray(chain(str(path)))[0].T


def torchio(path):
    import torchio as tio
    chain = tio.Compose([tio.Resample(1), tio.Clamp(*WINDOW), tio.RescaleIntensity((0, 1), in_min_max=WINDOW), tio.Resize(SIZE[::-1])])
    return chain(tio.ScalarImage(path)).data[0].numpy().T


def decode(path):
    import SimpleITK as sitk
    return sitk.GetArrayViewFromImage(sitk.ReadImage(str(path))).shape


def timed(run, path, repeats):
    "Best wall time of some runs (the first also warms up imports), and the result"
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter(); out = run(path); best = min(best, time.perf_counter() - start)
    return best, out


def bench(repeats=3):
    "Rows of name, ours, peer, unit and ratio"
    unit = lambda hu: np.clip((hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
    error = lambda x, true: float(np.sqrt(np.mean((x.astype("f8") - true)[2:-2, 2:-2, 2:-2] ** 2))) * (WINDOW[1] - WINDOW[0])
    row = lambda name, ours, peer, unit: dict(name=name, ours=round(ours, 4), peer=round(peer, 4), unit=unit, ratio=round(peer / ours, 3))
    slow, rows = lambda p: monai(p, True), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packs_well.nii.gz"
        write(path, 0)
        seconds, _ = timed(ours, path, repeats)
        for name, run in {"MONAI": monai, "TorchIO": torchio, "decoding alone (SimpleITK)": decode}.items():
            rows.append(row(f"file to 64×224×224, a file that packs well, {name}", seconds, timed(run, path, repeats)[0], "s"))
        path = Path(folder) / "noisy.nii.gz"
        v = write(path, 60.0)
        true, still = unit(reference(v)), unit(reference(pattern()))
        seconds, mine = timed(ours, path, repeats)
        for name, run, n in (("MONAI", monai, repeats), ("MONAI antialiased", slow, 1), ("TorchIO", torchio, repeats)):
            t, x = timed(run, path, n)
            rows += [row(f"file to 64×224×224, noise of 60 HU, {name}", seconds, t, "s"),
                     row(f"error against an antialiased float64 reference, {name}", error(mine, true), error(x, true), "HU"),
                     row(f"error against the pattern without noise, {name}", error(mine, still), error(x, still), "HU")]
        rows.append(row("file to 64×224×224, noise of 60 HU, decoding alone (SimpleITK)", seconds, timed(decode, path, repeats)[0], "s"))
    return rows


if __name__ == "__main__":
    print(json.dumps(bench(), indent=1, ensure_ascii=False))
