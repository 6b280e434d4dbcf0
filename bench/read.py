"""Reading alone: ours with every check, against bare decoding and against MONAI and TorchIO on the same files

    python bench/read.py        prints a JSON list of rows: name, ours, peer, unit, ratio (peer / ours, above 1 is better)

A row of decoding alone compares us, checks and all, with what SimpleITK takes to unpack the voxels and do nothing else."""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.preprocess import SPACING, timed, write  # noqa: E402


def ours(path):
    from covid_ct.data.io import read
    return read(path).voxels


def sitk_file(path):
    import SimpleITK as sitk
    return sitk.GetArrayViewFromImage(sitk.ReadImage(str(path))).shape


def sitk_folder(path):
    import SimpleITK as sitk
    return sitk.GetArrayFromImage(sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))))


def monai(path):
    from monai.transforms import LoadImage
    return LoadImage(image_only=True)(str(path))


def torchio(path):
    import torchio as tio
    return tio.ScalarImage(path).data


def headers(path):
    from covid_ct.data.io import list_series
    return list_series(path)


def headers_pydicom(path):
    import pydicom
    ds = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted(Path(path).iterdir())]
    return sorted((float(d.ImagePositionPatient[2]), *map(float, d.PixelSpacing), *map(float, d.ImageOrientationPatient)) for d in ds)


def volume_rows(name, path, want, repeats):
    "Rows of one packed file, whose voxels we know"
    seconds, v = timed(ours, path, repeats)
    assert np.array_equal(v[:, ::-1, ::-1], np.maximum(want, -1024)), "read something else than was written"
    for peer, run in {"decoding alone (SimpleITK)": sitk_file, "MONAI LoadImage": monai, "TorchIO": torchio}.items():
        yield f"read .nii.gz, {name}, {peer}", seconds, timed(run, path, repeats)[0]


def folder_rows(name, path, want, repeats):
    "Rows of one DICOM folder"
    seconds, v = timed(ours, path, repeats)
    assert np.array_equal(v, np.maximum(want, -1024)), "read something else than was written"
    for peer, run in {"SimpleITK series reader": sitk_folder, "MONAI LoadImage": monai, "TorchIO": torchio}.items():
        yield f"read 300 DICOM slices, {name}, {peer}", seconds, timed(run, path, repeats)[0]
    yield "headers of 300 DICOM slices, sorted and checked, pydicom", timed(headers, path, repeats)[0], timed(headers_pydicom, path, repeats)[0]


def bench(repeats=3):
    "Rows of name, ours, peer, unit and ratio"
    from covid_ct.data.catalog import write_series
    from covid_ct.scan import Scan
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, noise in {"packs well": 0, "noise of 60 HU": 60.0}.items():
            path = Path(folder) / f"{noise:.0f}.nii.gz"
            want = write(path, noise)
            rows += volume_rows(name, path, want, repeats)
            path.unlink()
        series = write_series(Scan(want, SPACING, patient_id="bench", scan_id="bench"), Path(folder) / "series")
        rows += folder_rows("as scanners write them", series, want, repeats)
    return [dict(name=n, ours=round(a, 4), peer=round(b, 4), unit="s", ratio=round(b / a, 3)) for n, a, b in rows]


if __name__ == "__main__": print(json.dumps(bench(), indent=1, ensure_ascii=False))
