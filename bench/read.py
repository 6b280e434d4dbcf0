"""Reading alone: ours with every check, against bare decoding and against MONAI and TorchIO on the
same files

A row of decoding alone compares us, checks and all, with what SimpleITK takes to unpack the
voxels and do nothing else."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from bench import Case, row
from bench.preprocess import timed, write


def ours(path):
    from covid_ct.io.read import read

    return read(path).voxels


def sitk_file(path):
    import SimpleITK as sitk

    return sitk.GetArrayViewFromImage(sitk.ReadImage(str(path))).shape


def sitk_folder(path):
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(
        sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
    )


def monai(path):
    from monai.transforms import LoadImage

    return LoadImage(image_only=True)(str(path))


def torchio(path):
    import torchio as tio

    return tio.ScalarImage(path).data


def headers(path):
    from covid_ct.io.dicom import list_series

    return list_series(path)


def headers_pydicom(path):
    import pydicom

    ds = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted(Path(path).iterdir())]
    return sorted(
        (
            float(d.ImagePositionPatient[2]),
            *map(float, d.PixelSpacing),
            *map(float, d.ImageOrientationPatient),
        )
        for d in ds
    )


def volume_rows(name, path, want, repeats):
    "Rows of one packed file, whose voxels we know"
    seconds, v = timed(ours, path, repeats)
    assert np.array_equal(v[:, ::-1, ::-1], np.maximum(want, -1024)), (
        "read something else than was written"
    )
    for peer, run in {
        "decoding alone (SimpleITK)": sitk_file,
        "MONAI LoadImage": monai,
        "TorchIO": torchio,
    }.items():
        yield row(f"read .nii.gz, {name}, {peer}", seconds, timed(run, path, repeats)[0], "s")


def folder_rows(name, path, want, repeats):
    "Rows of one DICOM folder"
    seconds, v = timed(ours, path, repeats)
    assert np.array_equal(v, np.maximum(want, -1024)), "read something else than was written"
    for peer, run in {
        "SimpleITK series reader": sitk_folder,
        "MONAI LoadImage": monai,
        "TorchIO": torchio,
    }.items():
        yield row(
            f"read 300 DICOM slices, {name}, {peer}", seconds, timed(run, path, repeats)[0], "s"
        )
    mine, theirs = (timed(f, path, repeats)[0] for f in (headers, headers_pydicom))
    yield row("headers of 300 DICOM slices, sorted and checked, pydicom", mine, theirs, "s")


def packed(name, noise, repeats=3):
    "One packed file"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        yield from volume_rows(name, path, write(path, noise), repeats)


def series(repeats=3):
    "300 DICOM files of noise"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "series"
        yield from folder_rows("as scanners write them", path, write(path, 60.0), repeats)


CASES = [
    Case("read a file that packs well", partial(packed, "packs well", 0)),
    Case("read a file of noise", partial(packed, "noise of 60 HU", 60.0)),
    Case("read 300 DICOM files", series, 180),
]
