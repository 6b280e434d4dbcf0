"""From file to network input, the same chain in our package, MONAI and TorchIO on the same files:
time, and error

The chain is the one that the guides of both peers show: spacing 1 mm, window -1350 … 150 HU to
[0,1], the central 280 × 320 × 320 mm, 64 × 224 × 224 voxels. Defaults throughout; for MONAI also
with float32 instead of its default float64, and with its anti-aliasing. Files: 512 × 512 × 300
int16 of 0.7 × 0.7 × 1 mm, once smooth and quantised, so that it packs well, once with noise of 60
HU, and the latter as a series of 300 DICOM files. Each time is the best of some runs, files in the
page cache.

The error is a root mean square in HU inside the volume. What a value should be is computed in
float64 from the file, filtered against aliasing and interpolated at the place where *that*
package says the voxel lies (its own affine): conventions about half voxels cost nobody anything."""

import math
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from bench import Case, row

SIZE, SHAPE, SPACING, WINDOW, BOX = (
    (64, 224, 224),
    (300, 512, 512),
    (1.0, 0.7, 0.7),
    (-1350.0, 150.0),
    (280, 320, 320),
)


def pattern(places=None):
    """Smooth detail that the network's grid can hold, in HU, at `places` (three lists of voxel
    indices); None: at every voxel of the file"""
    z, y, x = (
        (np.asarray(i) + 0.5) * s
        for i, s in zip(places or map(np.arange, SHAPE), SPACING, strict=False)
    )

    def wave(a, mm):
        return np.cos(2 * math.pi * a / mm)

    plane = 200 * np.outer(wave(y, 90), wave(x, 70)) + 60 * wave(y, 14)[:, None] + 60 * wave(x, 17)
    return ((-600 + 150 * wave(z, 120) + 30 * wave(z, 40))[:, None, None] + plane).astype("f4")


def volume(noise):
    "The pattern as int16: with noise everywhere, or rounded inside a body so that it packs well"
    v, rng = pattern(), np.random.default_rng(0)
    if noise:
        for part in v:
            part += rng.normal(0, noise, part.shape)
    else:
        y, x = np.ogrid[-1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
        v = np.where((y**2 + (x / 0.9) ** 2 < 0.8), np.round(v / 25) * 25, -1024)
    return np.rint(v).astype("i2")


def write(path, noise):
    "The volume as .nii.gz by nibabel, or as a folder of DICOM slices; returns its voxels"
    import nibabel

    from covid_ct.io.dicom import write_series
    from covid_ct.scan import Scan

    v = volume(noise)
    if Path(path).suffix == ".gz":
        nibabel.save(nibabel.Nifti1Image(v.T, np.diag([*SPACING[::-1], 1])), path)
    else:
        write_series(Scan(v, SPACING, patient_id="P", scan_id="S"), path)
    return v


def reference(v, places, steps):
    """Gaussian of half the reduction, then linear interpolation at `places`, in float64
    (scikit-image's antialiased resize)"""

    def weights(n, centres, f):
        sigma, w = max(0, (f - 1) / 2), np.zeros((len(centres), n))
        reach = int(4 * sigma + 0.5)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-9)) ** 2)
        for j, c in enumerate(np.clip(centres, 0, n - 1)):
            for i, share in ((int(c), 1 - c % 1), (min(int(c) + 1, n - 1), c % 1)):
                for t, tap in zip(range(-reach, reach + 1), taps / taps.sum(), strict=False):
                    w[j, min(max(i + t, 0), n - 1)] += share * tap
        return w

    a, b, c = (weights(*k) for k in zip(v.shape, places, steps, strict=False))
    return b @ np.tensordot(a, v.astype("f8"), 1) @ c.T


def ours(path):
    "Voxels in the order of the file, and the function that tells their places in it"
    from covid_ct.io.read import read
    from covid_ct.preprocess.resample import Prep, prepare_scan

    scan = read(path)
    out = prepare_scan(scan, Prep(size=SIZE, crop=tuple(map(float, BOX)), window=WINDOW))
    turned = [
        scan.stored_as[2 - a] != "LPS"[2 - a] for a in range(3)
    ]  # the file's axes grow to the other side

    def where():
        start, step = scan.grid.to_index(out.grid.origin), np.divide(out.grid.spacing, scan.spacing)
        lines = [s + d * np.arange(n) for s, d, n in zip(start, step, SIZE, strict=False)]
        return [
            m - 1 - line[::-1] if t else line
            for line, m, t in zip(lines, SHAPE, turned, strict=False)
        ]

    return out.voxels[tuple(slice(None, None, -1 if t else 1) for t in turned)], where


def by_affine(x, affine, file_affine):
    "The same from an image `(W,H,D)` and two affines without rotation"
    to = np.linalg.inv(np.asarray(file_affine, float)) @ np.asarray(affine, float)
    return np.asarray(x).T, lambda: [
        to[a, 3] + to[a, a] * np.arange(n) for a, n in zip((2, 1, 0), SIZE, strict=False)
    ]


def monai(path, antialias=False, kind=np.float64):
    from monai.transforms import (
        CenterSpatialCrop,
        Compose,
        EnsureChannelFirst,
        LoadImage,
        Resize,
        ScaleIntensityRange,
        Spacing,
    )

    load = (
        LoadImage(image_only=True)
        if path.suffix == ".gz"
        else LoadImage("pydicomreader", image_only=True)
    )
    chain = Compose(
        [
            load,
            EnsureChannelFirst(),
            Spacing((1, 1, 1), mode="bilinear", dtype=kind),
            ScaleIntensityRange(*WINDOW, 0, 1, clip=True),
            CenterSpatialCrop(BOX[::-1]),
            Resize(SIZE[::-1], mode="trilinear", anti_aliasing=antialias),
        ]
    )
    out = chain(str(path))
    return by_affine(out[0].numpy(), out.affine, np.diag([*SPACING[::-1], 1]))


def torchio(path):
    import torchio as tio

    chain = tio.Compose(
        [
            tio.Resample(1),
            tio.Clamp(*WINDOW),
            tio.RescaleIntensity((0, 1), in_min_max=WINDOW),
            tio.CropOrPad(BOX[::-1]),
            tio.Resize(SIZE[::-1]),
        ]
    )
    out = chain(tio.ScalarImage(path))
    return by_affine(out.data[0].numpy(), out.affine, np.diag([*SPACING[::-1], 1]))


def decode(path):
    import SimpleITK as sitk

    if path.suffix == ".gz":
        return sitk.GetArrayViewFromImage(sitk.ReadImage(str(path))), None
    r = sitk.ImageSeriesReader()
    r.SetFileNames(r.GetGDCMSeriesFileNames(str(path)))
    return sitk.GetArrayViewFromImage(r.Execute()), None


def timed(run, path, repeats):
    "Best wall time of some runs (the first also warms up imports), and the result"
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        out = run(path)
        best = min(best, time.perf_counter() - start)
    return best, out


def errors(x, where, v):
    "Against the filtered file and against the pattern without noise, in HU"

    def unit(hu):
        return np.clip((hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)

    inner, places = (slice(2, -2),) * 3, where()

    def rms(true):
        return float(np.sqrt(np.mean((x.astype("f8") - unit(true))[inner] ** 2))) * (
            WINDOW[1] - WINDOW[0]
        )

    return rms(reference(v, places, [p[1] - p[0] for p in places])), rms(pattern(places))


PEERS = {"MONAI": monai, "TorchIO": torchio, "decoding alone (SimpleITK)": decode}
MORE = {
    "MONAI, float32": partial(monai, kind=np.float32),
    "MONAI, anti-aliased": partial(monai, antialias=True),
}


def rows(name, file, noise, peers, repeats=2):
    "Time of one file beside each peer, and of the noisy file the errors too"
    import warnings

    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        v = write(path, noise)
        seconds, mine = timed(ours, path, 3)
        for peer, run in peers.items():
            took, (x, where) = timed(run, path, repeats)
            yield row(f"{name} to 64×224×224, {peer}", seconds, took, "s")
            if where is None or path.stem != "noisy.nii":
                continue
            for what, a, b in zip(
                ("the filtered file", "the pattern without noise"),
                errors(*mine, v),
                errors(x, where, v),
                strict=False,
            ):
                yield row(f"error against {what}, {peer}", a, b, "HU")


CASES = [
    Case(
        "a file that packs well",
        partial(rows, "a file that packs well", "packs_well.nii.gz", 0, PEERS),
    ),
    Case("a file of noise", partial(rows, "a file of noise", "noisy.nii.gz", 60.0, PEERS), 180),
    Case(
        "a file of noise, other settings",
        partial(rows, "a file of noise", "noisy.nii.gz", 60.0, MORE, 1),
        180,
    ),
    Case("300 DICOM files", partial(rows, "300 DICOM files", "series", 60.0, PEERS), 180),
]
