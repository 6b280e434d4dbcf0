"""Readers and writers against hand-made files, SimpleITK, pydicom and nibabel; every fault gets a
typed error and no noise"""

import base64
import gzip
import json
import re
import shutil
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from fuzz import bombs
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from scipy.ndimage import map_coordinates

from covid_ct.io.dicom import decode, list_series, untilt, write_series
from covid_ct.io.dicom_header import _slow, _walk, find_damage, find_foreign, read_header, slices_of
from covid_ct.io.read import (
    files_of,
    orientation,
    read,
    read_mask,
    reorient,
    write_map,
    write_mask,
    write_scan,
)
from covid_ct.scan import (
    DataError,
    GeometryError,
    Grid,
    Map,
    ReadError,
    Scan,
    UnitsError,
    VoxelError,
    check_same_grid,
)


def chest(shape=(12, 20, 24), seed=0):
    "A made-up scan without any symmetry, on a grid with odd numbers"
    rng = np.random.default_rng(seed)
    v = rng.integers(-1024, 1500, shape).astype('i2')
    v[:2] = -1000
    return Scan(
        v, (2.5, 0.8, 0.7), (-101.5, 33.25, -17.75), patient_id='somebody', scan_id=f's{seed}'
    )


@pytest.fixture
def scan():
    return chest()


UNTURNED = np.eye(3)


def write(scan, path, code='LPS', turn=UNTURNED, voxels=None):
    "Write with SimpleITK alone, along `code`, turned by a rotation (xyz)"
    v, g = reorient(scan.voxels if voxels is None else voxels, scan.grid, 'LPS', code)
    im = sitk.GetImageFromArray(np.ascontiguousarray(v))
    im.SetSpacing(g.spacing[::-1])
    im.SetOrigin(g.origin[::-1])
    im.SetDirection((turn @ np.array(g.direction)[::-1, ::-1]).ravel())
    sitk.WriteImage(im, str(path))
    return path


def spin(deg, a=1, b=2):
    R = np.eye(3)
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    R[a, a] = R[b, b] = c
    R[a, b], R[b, a] = -s, s
    return R


def put(tag, value):
    def change(d, k):
        setattr(d, tag, value(d, k) if callable(value) else value)

    return change


# orientation


def test_reorient_is_itks_in_all_48_codes(scan):
    im = sitk.GetImageFromArray(scan.voxels)
    im.SetSpacing(scan.spacing[::-1])
    im.SetOrigin(scan.origin[::-1])
    codes = [
        a + b + c
        for axes in ('LPS', 'PSL', 'SLP', 'LSP', 'SPL', 'PLS')
        for a in pair(axes[0])
        for b in pair(axes[1])
        for c in pair(axes[2])
    ]
    assert len(set(codes)) == 48
    for code in codes:
        v, g = reorient(scan.voxels, scan.grid, 'LPS', code)
        itk = sitk.DICOMOrient(im, code)
        assert np.array_equal(v, sitk.GetArrayViewFromImage(itk)) and orientation(g) == code
        assert np.allclose(g.origin[::-1], itk.GetOrigin()) and np.allclose(
            g.spacing[::-1], itk.GetSpacing()
        )
        back, h = reorient(v, g, code, 'LPS')
        assert (
            np.array_equal(back, scan.voxels)
            and np.allclose(h.origin, scan.origin, atol=1e-12)
            and h.direction == scan.direction
        )


def pair(c):
    return next(p for p in ('LR', 'PA', 'SI') if c in p)


# volume files


@pytest.mark.parametrize('end', ['.nii', '.nii.gz', '.mha', '.mhd', '.nrrd'])
@pytest.mark.parametrize('code', ['LPS', 'RAS', 'LAS', 'LIP', 'ASR'])
def test_formats_and_orientations(tmp_path, scan, end, code):
    s = read(write(scan, tmp_path / f'x{end}', code))
    assert (
        np.array_equal(s.voxels, scan.voxels)
        and s.units == 'HU'
        and s.stored_as == code
        and s.scan_id == 'x'
        and s.voxels.dtype == 'i2'
    )
    check_same_grid(s, scan)


def test_nifti_equals_nibabel(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    im = nib.load(write(scan, tmp_path / 'x.nii.gz', 'RAS', spin(9)))
    s = read(tmp_path / 'x.nii.gz')
    ijk = np.array([3, 7, 5])
    ras = im.affine @ [*ijk, 1]
    lps = ras[:3] * [-1, -1, 1]
    at = np.round(s.grid.to_index(lps[::-1])).astype(int)
    assert (
        np.allclose(s.grid.to_index(lps[::-1]), at, atol=1e-3)
        and s.voxels[tuple(at)] == np.asarray(im.dataobj)[tuple(ijk)]
    )


def test_scaled_and_big_endian_nifti(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    for head in (nib.Nifti1Header(endianness='>'), nib.Nifti1Header()):
        im = nib.Nifti1Image(scan.voxels.transpose(2, 1, 0), np.diag([-0.7, -0.8, 2.5, 1]), head)
        im.set_qform(im.affine, 1)
        im.header.set_data_dtype('i2')
        if head.endianness != '>':
            im.header.set_slope_inter(2, -24)
        nib.save(im, tmp_path / 'x.nii.gz')
        want = np.asarray(nib.load(tmp_path / 'x.nii.gz').dataobj).transpose(2, 1, 0)
        s = read(tmp_path / 'x.nii.gz')
        assert (
            np.array_equal(s.voxels, np.maximum(want, -1024)) or np.abs(s.voxels - want).max() < 1
        )
        whole = (tmp_path / 'x.nii.gz').read_bytes()
        (tmp_path / 'y.nii.gz').write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(ReadError):
            read(tmp_path / 'y.nii.gz')


@pytest.mark.parametrize('end', ['.nii', '.nii.gz', '.mha', '.mhd', '.nrrd'])
@pytest.mark.parametrize('what', ['half', 'empty', 'text', 'most', 'missing'])
def test_damaged_volumes(tmp_path, scan, end, what):
    p = write(scan, tmp_path / f'x{end}')
    body = tmp_path / 'x.raw' if end == '.mhd' and what in ('half', 'most') else p
    whole = body.read_bytes()
    if what == 'missing':
        p.unlink()
    else:
        body.write_bytes(
            dict(
                half=whole[: len(whole) // 2],
                empty=b'',
                text=b'no scan at all\n' * 50,
                most=whole[:-40],
            )[what]
        )
    with pytest.raises(ReadError) as e:
        read(p)
    assert p.name in str(e.value) and e.value.remedy


def test_a_flipped_byte_is_noticed(tmp_path, scan):
    big = chest((40, 64, 64))
    p = write(big, tmp_path / 'x.nii.gz')
    whole = p.read_bytes()
    silent = 0
    for at in np.linspace(400, len(whole) - 40, 12).astype(int):
        p.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            silent += not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(p))), big.voxels)
        except RuntimeError:
            pass
        with pytest.raises(DataError):
            read(p)
    assert silent > 0  # else ITK looks by itself and our check can go


def test_mhd_without_its_raw(tmp_path, scan):
    p = write(scan, tmp_path / 'x.mhd')
    (tmp_path / 'x.raw').unlink()
    with pytest.raises(ReadError, match='x.raw'):
        read(p)


def test_unknown_geometry_is_refused_or_stamped(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    im = nib.Nifti1Image(scan.voxels.transpose(2, 1, 0), None)
    im.header.set_zooms((0.7, 0.8, 2.5))
    nib.save(im, tmp_path / 'a.nii.gz')
    p = write(scan, tmp_path / 'b.mha')
    raw = p.read_bytes()
    p.write_bytes(
        b'\n'.join(s for s in raw.split(b'\n', 20) if not s.startswith(b'ElementSpacing'))
    )
    for name in ('a.nii.gz', 'b.mha'):
        with pytest.raises(GeometryError, match='geometry is unknown'):
            read(tmp_path / name)
        s = read(tmp_path / name, allow_unknown_geometry=True)
        assert not s.geometry_known and 'unknown' in s.remarks[0]


@pytest.mark.parametrize('at', [268, 272, 292])  # places of the q- and s-form
def test_places_that_are_no_numbers(tmp_path, scan, at):
    p = write(scan, tmp_path / 'x.nii')
    raw = p.read_bytes()
    p.write_bytes(raw[:at] + np.array([np.nan], '<f4').tobytes() + raw[at + 4 :])
    try:
        s = read(p)
    except DataError:
        return
    assert np.isfinite([*s.spacing, *s.origin, *np.ravel(s.direction)]).all()
    check_same_grid(s, scan)  # the other form was whole


def test_sheared_nifti_is_refused(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    a = np.diag([0.7, 0.8, 2.5, 1])
    a[1, 2] = 1.0
    nib.save(nib.Nifti1Image(scan.voxels.transpose(2, 1, 0), a), tmp_path / 'x.nii.gz')
    with pytest.raises(DataError):
        read(tmp_path / 'x.nii.gz')


@pytest.mark.parametrize(
    'shape,error',
    [
        ((20, 24), GeometryError),
        ((1, 20, 24), GeometryError),
        ((2, 4, 20, 24), GeometryError),
        ((1, 12, 20, 24), None),
    ],
)
def test_dimensions(tmp_path, shape, error):
    v = np.random.default_rng(0).integers(-1024, 900, shape).astype('i2')
    sitk.WriteImage(sitk.GetImageFromArray(v, isVector=False), str(tmp_path / 'x.nii.gz'))
    if error is None:
        assert np.array_equal(read(tmp_path / 'x.nii.gz').voxels, v[0])
    else:
        with pytest.raises(error, match='volume'):
            read(tmp_path / 'x.nii.gz')


def test_colours_are_refused(tmp_path):
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((4, 8, 8, 3), 'u1'), isVector=True),
        str(tmp_path / 'x.nrrd'),
    )
    with pytest.raises(ReadError, match='colours'):
        read(tmp_path / 'x.nrrd')


# values and units


def test_values(tmp_path, scan):
    f = scan.voxels.astype('f4')
    for bad in (np.nan, np.inf, -np.inf):
        for end in ('.nii', '.nii.gz', '.mha', '.nrrd'):
            g = f.copy()
            g[1, 2, 3] = bad
            write(scan, tmp_path / f'x{end}', voxels=g)
            with pytest.raises(VoxelError, match='1 voxels are NaN'):
                read(tmp_path / f'x{end}')
    write(scan, tmp_path / 'c.nii.gz', voxels=np.full(scan.shape, -1000, 'i2'))
    with pytest.raises(VoxelError, match='every voxel'):
        read(tmp_path / 'c.nii.gz')
    for voxels, units, kind in (
        (f, 'HU', 'i2'),
        (f + 0.25, 'HU', 'f4'),
        ((scan.voxels.clip(0, 255)).astype('u1'), 'uint8', 'u1'),
        (f.clip(0, 255) / 255, 'unit', 'f4'),
        (scan.voxels.astype('i4'), 'HU', 'i2'),
    ):
        s = read(write(scan, tmp_path / 'v.nii.gz', voxels=voxels))
        assert (
            s.units == units
            and s.voxels.dtype == kind
            and np.array_equal(s.voxels, np.maximum(voxels.astype('f8'), -1024))
        )
    with pytest.raises(UnitsError, match='neither|not HU'):
        read(write(scan, tmp_path / 'u.nii.gz', voxels=scan.voxels + 1024))
    s = read(tmp_path / 'u.nii.gz', units='HU')
    assert s.units == 'HU' and 'perhaps not HU' in s.remarks[-1]
    with pytest.raises(UnitsError):
        read(write(scan, tmp_path / 'w.nii.gz'), units='uint8')


@pytest.mark.parametrize('pad', [-3024, -2048, -2000])
def test_padding(tmp_path, scan, pad):
    v = scan.voxels.copy()
    v[:, :3, :3] = pad
    s = read(write(scan, tmp_path / 'x.nii.gz', voxels=v))
    assert np.array_equal(s.voxels, np.maximum(v, -1024)) and str(pad) in s.remarks[0]


def test_lost_intercept_with_padding_is_no_hu(tmp_path, scan):
    v = scan.voxels + 1024
    v[:, :3, :3] = -2000
    with pytest.raises(UnitsError):
        read(write(scan, tmp_path / 'x.nii.gz', voxels=v.astype('i2')))


# pictures


def pictures(folder, n=11, shape=(16, 18), end='png', offset=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    v = rng.integers(0, 256, (n, *shape)).astype('u1')
    for k in range(n):
        sitk.WriteImage(sitk.GetImageFromArray(v[k]), str(folder / f'{k + offset}.{end}'))
    return v


@pytest.mark.parametrize('end', ['png', 'bmp', 'tif', 'jpg'])
def test_pictures_sort_as_people_count(tmp_path, end):
    v = pictures(tmp_path / 'p', end=end)
    with pytest.raises(GeometryError, match='geometry is unknown'):
        read(tmp_path / 'p')
    s = read(tmp_path / 'p', allow_unknown_geometry=True)
    assert (
        s.units == 'uint8' and not s.geometry_known and s.spacing == (1, 1, 1) and s.scan_id == 'p'
    )
    assert (
        np.array_equal(s.voxels, v)
        if end != 'jpg'
        else np.abs(s.voxels.astype(int) - v).mean() < 40
    )


def test_odd_pictures(tmp_path):
    v = pictures(tmp_path / 'p')
    sitk.WriteImage(sitk.GetImageFromArray(v[4]), str(tmp_path / 'p' / '5.png'))
    sitk.WriteImage(sitk.GetImageFromArray(v[10]), str(tmp_path / 'p' / '11.jpg'))
    said = ' '.join(read(tmp_path / 'p', allow_unknown_geometry=True).remarks)
    assert '1 slices repeat' in said and 'mixed endings' in said
    sitk.WriteImage(sitk.GetImageFromArray(v[0][:9]), str(tmp_path / 'p' / '3.png'))
    with pytest.raises(GeometryError, match='3.png'):
        read(tmp_path / 'p', allow_unknown_geometry=True)
    (tmp_path / 'p' / '3.png').write_bytes(b'\x89PNG not really')
    with pytest.raises(ReadError, match='3.png'):
        read(tmp_path / 'p', allow_unknown_geometry=True)
    with pytest.raises(GeometryError, match='one picture'):
        read(tmp_path / 'p' / '1.png', allow_unknown_geometry=True)


# DICOM


def test_dicom_is_the_scan_whatever_the_names(tmp_path, scan):
    rng = np.random.default_rng(3)
    order = rng.permutation(12)
    folder = write_series(
        scan, tmp_path / 'd', put('InstanceNumber', lambda d, k: int(order[k])), name='x{k}'
    )
    for k in range(12):
        (folder / f'x{k + 1}').rename(folder / f'{order[k]:03d}.dcm')
    s = read(folder)
    assert np.array_equal(s.voxels, scan.voxels) and s.units == 'HU' and s.source == str(folder)
    check_same_grid(s, scan)


def test_no_identity_leaves_the_reader(tmp_path, scan):
    s = read(write_series(scan, tmp_path / 'd', put('PatientName', 'Doe^Jane')))
    assert (
        'somebody' not in repr(vars(s))
        and 'Doe' not in repr(vars(s))
        and len(s.patient_id) == len(s.scan_id) == 8
    )
    t = read(write_series(chest(seed=4), tmp_path / 'e'))
    assert t.patient_id == s.patient_id and t.scan_id != s.scan_id
    assert read(tmp_path / 'd', patient_id='P1', scan_id='a').patient_id == 'P1'


def shift(axis, mm):
    return put(
        'ImagePositionPatient',
        lambda d, k: [float(x) + mm(k) * (i == axis) for i, x in enumerate(d.ImagePositionPatient)],
    )


TRAPS = {
    'missing slice': (lambda d, k: k != 5, '5 and 6 of 11, at .*1 missing'),
    'two missing': (lambda d, k: k not in (5, 6), '2 missing'),
    'uneven': (shift(2, lambda k: 0.6 * (k > 6)), 'mm apart'),
    'twin': (shift(2, lambda k: -2.5 * (k == 4)), 'where another one lies'),
    'all at one place': (shift(2, lambda k: -2.5 * k), '12 of 12'),
    'tilt': (shift(1, lambda k: k), 'tilted by 21.8°'),
    'jump': (shift(0, lambda k: 9 * (k > 6)), 'sideways by 9.0 mm'),
    'orientations': (
        put(
            'ImageOrientationPatient',
            lambda d, k: [0, 1, 0, 0, 0, -1] if k < 2 else [1, 0, 0, 0, 1, 0],
        ),
        'mixed orientations',
    ),
    'skew': (put('ImageOrientationPatient', [1, 0, 0, 0.5, 0.8, 0]), 'right angles'),
    'pixel spacing': (
        put('PixelSpacing', lambda d, k: [0.8, 0.7 + 0.1 * (k == 3)]),
        'several pixel spacings',
    ),
    'no position': (
        lambda d, k: delattr(d, 'ImagePositionPatient') if k == 3 else None,
        'has no position',
    ),
    'one slice': (lambda d, k: k == 3, 'one slice'),
    'no spacing': (lambda d, k: delattr(d, 'PixelSpacing'), 'has no position'),
}


@pytest.mark.parametrize('name', TRAPS)
def test_geometry_traps(tmp_path, scan, name, capfd):
    change, words = TRAPS[name]
    write_series(scan, tmp_path / 'd', change)
    with pytest.raises(GeometryError, match=words) as e:
        read(tmp_path / 'd')
    assert e.value.source == str(tmp_path / 'd') and e.value.remedy and not any(capfd.readouterr())
    row = list_series(tmp_path / 'd').iloc[0]
    assert not row.readable and row.why_not == e.value.fault


FOREIGN = {
    'MR': dict(Modality='MR'),
    'PT': dict(Modality='PT'),
    'RTSTRUCT': dict(Modality='RTSTRUCT'),
    'SEG': dict(Modality='SEG'),
    'localizer': dict(ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']),
    'secondary capture': dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.7'),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_foreign_files_are_named_or_left_out(tmp_path, scan, name):
    write_series(scan, tmp_path / 'all', lambda d, k: d.update(FOREIGN[name]))
    with pytest.raises(ReadError, match=name):
        read(tmp_path / 'all')
    write_series(scan, tmp_path / 'd')
    write_series(
        chest(seed=9), tmp_path / 'd', lambda d, k: d.update(FOREIGN[name]) or k == 2, name='odd{k}'
    )
    s = read(tmp_path / 'd')
    assert np.array_equal(s.voxels, scan.voxels) and name in ' '.join(s.remarks)


def test_damage_stops_the_series(tmp_path, scan):
    good = write_series(scan, tmp_path / 'd', name='{k}.dcm')
    last = good / '12.dcm'
    whole = last.read_bytes()
    for body in (
        b'',
        *(whole[:n] for n in range(140, len(whole) - 1, 97)),
        whole[:-1],
        b'text' * 100,
    ):
        last.write_bytes(body)
        with pytest.raises(ReadError, match='12.dcm|ends early'):
            read(good)
    last.write_bytes(whole)
    write_series(
        scan,
        tmp_path / 'rgb',
        lambda d, k: put('PhotometricInterpretation', 'MONOCHROME1')(d, k) if k == 4 else None,
    )
    with pytest.raises(ReadError, match='MONOCHROME1'):
        read(tmp_path / 'rgb')
    (good / 'README').write_text('hello')
    shutil.copy(good / '3.dcm', good / 'copy of 3.dcm')
    s = read(good)
    assert (
        np.array_equal(s.voxels, scan.voxels)
        and 'byte for byte' in ' '.join(s.remarks)
        and 'not DICOM' in ' '.join(s.remarks)
    )


def test_rescale_per_slice(tmp_path, scan):
    lines = [(1, -1024), (2, -1024), (0.5, -1000.5)]

    def change(d, k):
        d.RescaleSlope, d.RescaleIntercept = lines[k % 3]

    v = read(write_series(scan, tmp_path / 'd', change)).voxels
    want = np.stack(
        [
            (scan.voxels[k].astype(float) + 1024) * lines[k % 3][0] + lines[k % 3][1]
            for k in range(12)
        ]
    )
    assert v.dtype == 'f4' and np.array_equal(v, np.maximum(want, -1024))


def test_missing_rescale_needs_air(tmp_path, scan):
    def bare(d, k):
        del d.RescaleSlope, d.RescaleIntercept

    with pytest.raises(UnitsError):
        read(write_series(scan, tmp_path / 'd', bare))


def test_headers_without_preamble_deflated_and_rle(tmp_path, scan):
    folder = write_series(scan, tmp_path / 'a')
    for p in folder.iterdir():
        d = pydicom.dcmread(p)
        raw = p.read_bytes()
        p.write_bytes(raw[132:] if p.name == 'IM3' else raw)
    assert np.array_equal(read(folder).voxels, scan.voxels)
    for p in (folder := write_series(scan, tmp_path / 'b')).iterdir():
        d = pydicom.dcmread(p)
        d.compress(pydicom.uid.RLELossless)
        d.save_as(p)
    assert np.array_equal(read(folder).voxels, scan.voxels)
    for p in (folder := write_series(scan, tmp_path / 'c')).iterdir():
        d = pydicom.dcmread(p)
        d.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        d.save_as(p)
    assert np.array_equal(read(folder).voxels, scan.voxels)


@pytest.mark.parametrize('codec', ['JPEG', 'JPEG2000'])
def test_compressed_by_itk(tmp_path, scan, codec, capfd):
    for k in range(12):
        im = sitk.GetImageFromArray(scan.voxels[k : k + 1])
        im.SetSpacing((0.7, 0.8, 2.5))
        im.SetOrigin((0, 0, 2.5 * k))
        for tag, v in {
            '0008|0060': 'CT',
            '0008|0016': '1.2.840.10008.5.1.4.1.1.2',
            '0020|000e': '1.2.3',
            '0028|1052': '-1024',
            '0028|1053': '1',
            '0020|0032': f'0\\0\\{2.5 * k}',
            '0020|0037': '1\\0\\0\\0\\1\\0',
        }.items():
            im.SetMetaData(tag, v)
        w = sitk.ImageFileWriter()
        w.SetImageIO('GDCMImageIO')
        w.KeepOriginalImageUIDOn()
        w.UseCompressionOn()
        w.SetCompressor(codec)
        w.SetFileName(str(tmp_path / f'{k}.dcm'))
        w.Execute(im)
    assert 'JPEG' in pydicom.dcmread(tmp_path / '0.dcm').file_meta.TransferSyntaxUID.name
    capfd.readouterr()
    assert np.array_equal(read(tmp_path).voxels, scan.voxels) and not any(capfd.readouterr())
    whole = (tmp_path / '7.dcm').read_bytes()
    (tmp_path / '7.dcm').write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ReadError):
        read(tmp_path)


def enhanced(scan, path, lines=None, drop=None):
    "The same scan as one multi-frame file, frames in scrambled order"
    folder = write_series(scan, path.parent / 'parts')
    parts = [
        pydicom.dcmread(folder / f'IM{k + 1}')
        for k in np.random.default_rng(0).permutation(scan.shape[0])
        if k != drop
    ]
    shutil.rmtree(folder)
    d = parts[0]

    def wrap(**tags):
        return Sequence([(lambda g: [setattr(g, k, v) for k, v in tags.items()] and g)(Dataset())])

    def group(**parts):
        return (lambda g: [setattr(g, k + 'Sequence', v) for k, v in parts.items()] and g)(
            Dataset()
        )

    shared = group(
        PlaneOrientation=wrap(ImageOrientationPatient=d.ImageOrientationPatient),
        PixelMeasures=wrap(PixelSpacing=d.PixelSpacing),
    )
    frames = [
        group(
            PlanePosition=wrap(ImagePositionPatient=p.ImagePositionPatient),
            PixelValueTransformation=wrap(
                RescaleSlope=(lines or [1] * 99)[i], RescaleIntercept=-1024, RescaleType='HU'
            ),
        )
        for i, p in enumerate(parts)
    ]
    d.PixelData = b''.join(p.PixelData for p in parts)
    d.NumberOfFrames = len(parts)
    for tag in (
        'ImagePositionPatient',
        'ImageOrientationPatient',
        'PixelSpacing',
        'RescaleSlope',
        'RescaleIntercept',
    ):
        delattr(d, tag)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2.1'
    d.SharedFunctionalGroupsSequence, d.PerFrameFunctionalGroupsSequence = (
        Sequence([shared]),
        Sequence(frames),
    )
    d.save_as(path)
    return path


def test_enhanced_multiframe(tmp_path, scan):
    s = read(enhanced(scan, tmp_path / 'e.dcm'))
    assert np.array_equal(s.voxels, scan.voxels)
    check_same_grid(s, scan)
    with pytest.raises(GeometryError, match='1 missing'):
        read(enhanced(scan, tmp_path / 'g.dcm', drop=5))
    order, lines = np.random.default_rng(0).permutation(12), [1, 2] * 6
    v = read(
        enhanced(scan, tmp_path / 'f.dcm', lines=lines)
    ).voxels  # GDCM would take the first line for all
    want = np.stack(
        [
            (scan.voxels[k].astype('i4') + 1024) * lines[list(order).index(k)] - 1024
            for k in range(12)
        ]
    )
    assert np.array_equal(v, want)
    d = pydicom.dcmread(tmp_path / 'f.dcm')
    d.compress(pydicom.uid.RLELossless)
    (tmp_path / 'p').mkdir()
    d.save_as(tmp_path / 'p' / 'f.dcm')
    with pytest.raises(UnitsError, match='different rescale'):
        read(tmp_path / 'p')
    d = pydicom.dcmread(tmp_path / 'e.dcm')
    d.compress(pydicom.uid.RLELossless)
    d.save_as(tmp_path / 'p' / 'f.dcm')
    assert np.array_equal(read(tmp_path / 'p').voxels, scan.voxels)


def test_oblique_and_coronal_dicom(tmp_path, scan):
    for code, R in (('LPS', spin(7)), ('LIP', np.eye(3)), ('PSL', spin(5, 0, 1))):
        v, g = reorient(scan.voxels, scan.grid, 'LPS', code)
        D = R @ np.array(g.direction)[::-1, ::-1]
        if np.linalg.det(D) < 0:
            D[:, 2] *= -1
        s = scan.replace(
            voxels=np.ascontiguousarray(v),
            spacing=g.spacing,
            origin=g.origin,
            direction=D[::-1, ::-1],
        )
        r = read(write_series(s, tmp_path / code))
        i = (3, 4, 5)
        j = np.round(r.grid.to_index(s.grid.to_mm(i))).astype(int)
        assert (
            np.allclose(r.grid.to_index(s.grid.to_mm(i)), j, atol=1e-2)
            and r.voxels[tuple(j)] == s.voxels[i]
            and orientation(r.grid) == 'LPS'
        )
        m = sitk.ReadImage(str(write_scan(r, tmp_path / f'{code}.nii.gz')))
        assert m.GetSize() == s.shape[::-1] and np.allclose(
            m.GetOrigin(), s.origin[::-1], atol=1e-3
        )


def test_several_series(tmp_path, scan):
    other = chest(seed=2)
    write_series(scan, tmp_path / 'd' / 'a', put('ConvolutionKernel', 'L'))
    write_series(other, tmp_path / 'd' / 'b', put('ConvolutionKernel', 'B'))
    with pytest.raises(ReadError, match=r"2 CT series found: \[0\].*'L'.*\[1\].*'B'"):
        read(tmp_path / 'd')
    t = list_series(tmp_path / 'd')
    assert (
        t.readable.all()
        and list(t.kernel) == ['L', 'B']
        and t['shape'][0] == (12, 20, 24)
        and t.spacing[0] == (2.5, 0.8, 0.7)
    )
    for which, want in (
        (0, scan),
        (1, other),
        ('1', other),
        (t.scan_id[1], other),
        (pydicom.dcmread(next((tmp_path / 'd' / 'b').iterdir())).SeriesInstanceUID, other),
        ('kernel B', other),
        (np.int64(0), scan),
    ):
        assert np.array_equal(read(tmp_path / 'd', series=which).voxels, want.voxels)
    for wrong in (2, -1, 'nothing like it', 'kernel'):
        with pytest.raises(ReadError, match='match series='):
            read(tmp_path / 'd', series=wrong)


def test_dicomdir_is_the_folder(tmp_path, scan):
    write_series(scan, tmp_path / 'IMAGES')
    (tmp_path / 'DICOMDIR').write_bytes(b'anything')
    assert np.array_equal(read(tmp_path / 'DICOMDIR').voxels, scan.voxels)


# paths


def test_paths(tmp_path, scan):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'notes.txt').write_text('x')
    (tmp_path / 'x.dcm').touch()
    (tmp_path / 'y.dcm').write_text('no DICOM')
    for name, words in (
        ('none', 'does not exist'),
        ('empty', 'empty folder'),
        ('notes.txt', 'no scan'),
        ('x.dcm', '0 bytes|not DICOM'),
        ('y.dcm', 'not DICOM'),
    ):
        with pytest.raises(ReadError, match=words):
            read(tmp_path / name)
    write(scan, tmp_path / 'empty' / 'a.nii.gz')
    assert read(tmp_path / 'empty').scan_id == 'a'
    write(scan, tmp_path / 'empty' / 'b.nii.gz')
    with pytest.raises(ReadError, match='2 volume files'):
        read(tmp_path / 'empty')
    with pytest.raises(TypeError):
        read(tmp_path / 'empty' / 'a.nii.gz', patient='x')


# writers


@pytest.mark.parametrize('end', ['.nii', '.nii.gz', '.mha', '.nrrd'])
@pytest.mark.parametrize(
    'code,turn',
    [
        ('LPS', np.eye(3)),
        ('RAS', np.eye(3)),
        ('LAS', np.eye(3)),
        ('LIP', np.eye(3)),
        ('RAS', spin(12)),
        ('PIR', spin(4, 0, 1)),
    ],
)
def test_written_on_the_files_own_grid(tmp_path, scan, end, code, turn):
    src = sitk.ReadImage(str(write(scan, tmp_path / f'x{end}', code, turn)))
    s = read(tmp_path / f'x{end}')
    m = s.voxels > 200
    for im, want in (
        (write_scan(s, tmp_path / f's{end}'), sitk.GetArrayFromImage(src)),
        (write_mask(m, s, tmp_path / f'm{end}'), sitk.GetArrayFromImage(src) > 200),
    ):
        im = sitk.ReadImage(str(im))
        tol = 1e-4
        assert im.GetSize() == src.GetSize() and np.array_equal(sitk.GetArrayFromImage(im), want)
        for f in ('GetSpacing', 'GetOrigin', 'GetDirection'):
            assert np.allclose(getattr(im, f)(), getattr(src, f)(), atol=tol), f
    assert np.array_equal(read_mask(tmp_path / f'm{end}', s), m) and np.array_equal(
        read(tmp_path / f's{end}').voxels, s.voxels
    )


def test_writers_refuse(tmp_path, scan, monkeypatch):
    m = scan.voxels > 0
    p = write_mask(m, scan, tmp_path / 'new' / 'm.nii.gz')
    old = p.read_bytes()
    with pytest.raises(DataError, match='exists already'):
        write_mask(~m, scan, p)
    with pytest.raises(GeometryError, match='shape'):
        write_mask(m[:-1], scan, tmp_path / 'n.nii.gz')
    with pytest.raises(GeometryError):
        write_map(Map(m * 0.5, scan.replace(origin=(0, 0, 0)).grid), scan, tmp_path / 'n.nii.gz')
    with pytest.raises(VoxelError, match='labels'):
        write_mask(m * 0.5, scan, tmp_path / 'n.nii.gz')
    with pytest.raises(VoxelError, match='labels'):
        write_mask(m * 300, scan, tmp_path / 'n.nii.gz')
    with pytest.raises(DataError, match='ending'):
        write_mask(m, scan, tmp_path / 'n.png')

    def full(*a):
        Path(a[1]).write_bytes(b'half')
        raise RuntimeError('no space left on device')

    monkeypatch.setattr(sitk, 'WriteImage', full)
    with pytest.raises(DataError, match='no space left'):
        write_mask(~m, scan, p, overwrite=True)
    assert (
        p.read_bytes() == old
        and [f.name for f in p.parent.iterdir()] == ['m.nii.gz']
        and not (tmp_path / 'n.nii.gz').exists()
    )
    monkeypatch.undo()
    write_mask(~m, scan, p, overwrite=True)
    assert np.array_equal(read_mask(p, scan), ~m)


def test_map_and_labels(tmp_path, scan):
    v = np.random.default_rng(0).random(scan.shape).astype('f4')
    p = write_map(Map(v, scan.grid), scan.replace(stored_as='RAS'), tmp_path / 'h.nii.gz')
    im = sitk.ReadImage(str(p))
    assert im.GetPixelIDTypeAsString() == '32-bit float' and np.array_equal(
        sitk.GetArrayFromImage(im), v[:, ::-1, ::-1]
    )
    lobes = np.random.default_rng(0).integers(0, 6, scan.shape)
    assert np.array_equal(read_mask(write_mask(lobes, scan, tmp_path / 'l.nii.gz')), lobes)
    with pytest.raises(VoxelError, match='labels'):
        read_mask(p)
    with pytest.raises(GeometryError, match='voxels apart'):
        read_mask(tmp_path / 'l.nii.gz', scan.replace(origin=(0, 0, 0)))
    assert not read_mask(write_mask(lobes > 9, scan, tmp_path / 'none.nii.gz'), scan).any()


# identity

PERSON = dict(
    PatientName='Plantedname^Janeplant',
    PatientID='PLANTED-ID-77',
    PatientBirthDate='19430207',
    PatientAddress='Plantedroad 12',
    OtherPatientNames='Maidenplant^J',
    InstitutionName='Plantedhospital',
    InstitutionAddress='Plantedtown',
    ReferringPhysicianName='Drplanted^R',
    OperatorsName='Operplanted',
    StationName='CTPLANTED',
    AccessionNumber='ACC19991231',
    StudyID='ST8812345',
    StudyDate='19991231',
    StudyDescription='chest of Plantedname',
    ProtocolName='PROTOPLANTED',
    ImageComments='tell Mrs Plantedname',
    DeviceSerialNumber='SN-PLANTED-9',
    SeriesDescription='Thorax Plantedname 1.0 born 19430207 Plantedhospital',
    ConvolutionKernel=['B70f', 'Drplanted'],
    PatientComments='commentplanted',
)
PLANTED = [
    'plantedname',
    'janeplant',
    'planted-id',
    '19430207',
    'plantedroad',
    'maidenplant',
    'plantedhospital',
    'plantedtown',
    'drplanted',
    'operplanted',
    'ctplanted',
    'acc19991231',
    'st8812345',
    '19991231',
    'protoplanted',
    'sn-planted',
    'commentplanted',
    'privateplant',
    'plantedfolder',
    'plantedfile',
    '1.2.840.99.19430207',
]


def person(folder):
    "A series that names a person wherever a header, a file or a folder can"

    def change(d, k):
        for tag, v in PERSON.items():
            setattr(d, tag, v)
        d.add_new(0x00091001, 'LO', 'privateplant')
        d.add_new(0x00091002, 'UN', b'privateplant')
        d.SeriesInstanceUID = '1.2.840.99.19430207.1'
        d.StudyInstanceUID = '1.2.840.99.19430207.2'
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = f'1.2.840.99.19430207.1.{k}'

    return write_series(chest((12, 40, 44)), folder, change, name='plantedfile_{k}.dcm')


def search(*places):
    "What of `PLANTED` stands in texts and files, also packed ones and ones inside base64"
    hits = []
    for p in places:
        blobs = [p.encode()] if isinstance(p, str) else [p.read_bytes()]
        if not isinstance(p, str) and p.suffix == '.gz':
            blobs.append(gzip.decompress(blobs[0]))
        blobs += [
            base64.b64decode(m + b'=' * (-len(m) % 4))
            for m in re.findall(rb'[A-Za-z0-9+/]{64,}={0,2}', blobs[0])
        ]
        for b in list(blobs):
            for at in (m.start() for m in re.finditer(rb'\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08', b)):
                try:
                    blobs.append(zlib.decompressobj(47).decompress(b[at:], 1 << 24))
                except zlib.error:
                    pass
        text = b'\n'.join(blobs).lower()
        hits += [
            (w, str(p)[:40]) for w in PLANTED if w.encode() in text or w.encode('utf-16-le') in text
        ]
    return hits


def test_no_identity_in_any_output(tmp_path):
    from covid_ct.cohort.table import check_cohort, write_cohort

    folder = person(tmp_path / 'plantedfolder')
    s = read(folder)
    out = tmp_path / 'out'
    out.mkdir()
    for end in ('.nii', '.nii.gz', '.mha', '.nrrd'):
        write_scan(s, out / f's{end}')
        write_mask(s.voxels > 0, s, out / f'm{end}')
        write_map(Map((s.voxels > 0) * 0.5, s.grid), s, out / f'h{end}')
    df = pd.DataFrame(
        [dict(patient_id=s.patient_id, scan_id=s.scan_id, label='covid', path='s.nii.gz')]
    )
    write_cohort(check_cohort(df, out), out / 'cohort.csv')
    t = list_series(tmp_path)
    assert t.description[0] == 'Thorax 1.0 born' and t.kernel[0] == 'B70f'
    private = {**vars(s), 'source': ''}  # the path that the caller gave stays in memory
    assert search('chest of Plantedname') and search(*folder.iterdir())  # it can find
    assert not search(*out.iterdir(), t.to_csv(), t.to_json(), t.to_html(), repr(private), repr(s))
    back = read(out / 's.nii.gz')
    assert not search(repr(vars(back)).replace(str(tmp_path), ''))
    for change in (
        lambda d: d.update(dict(Modality='PLANTEDNAME')),
        lambda d: setattr(d, 'RescaleType', 'DRPLANTED'),
        lambda d: setattr(d, 'PhotometricInterpretation', 'PLANTEDNAME'),
        lambda d: setattr(d, 'SOPClassUID', '1.2.840.99.19430207.9'),
    ):
        shutil.rmtree(tmp_path / 'e', ignore_errors=True)
        shutil.copytree(folder, tmp_path / 'e')
        for p in (tmp_path / 'e').iterdir():
            d = pydicom.dcmread(p)
            change(d)
            d.save_as(p)
        try:
            said = repr(read(tmp_path / 'e').remarks)
        except DataError as e:
            said = e.fault + e.remedy
        assert not search(said), said
    for p in (tmp_path / 'e').iterdir():
        p.write_bytes(
            (folder / p.name)
            .read_bytes()
            .replace(b'IS\x02\x00', b'XX\x02\x00')
            .replace(b'2.5\\', b'Plantedname')[:-700]
        )
    with pytest.raises(DataError) as e:
        read(tmp_path / 'e')
    assert not search(e.value.fault.replace('plantedfile', '') + e.value.remedy)


def test_no_identity_in_reports(tmp_path):
    """Facts and pages made of a scan; the page is called what the caller calls it, here a folder
    without a name"""
    from covid_ct.inference.predict import inspect

    folder = person(tmp_path / 'a')
    facts = inspect(folder, report=tmp_path / 'r.html')
    assert not search(json.dumps({**facts, 'path': ''}))
    assert not search(tmp_path / 'r.html')


def test_no_identity_of_a_volume_file(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    im = nib.load(write(scan, tmp_path / 'x.nii.gz'))
    im.header['descrip'], im.header['aux_file'], im.header['db_name'] = (
        b'chest of Plantedname',
        b'plantedfile',
        b'Janeplant',
    )
    im.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'Plantedname 19430207'))
    nib.save(im, tmp_path / 'y.nii.gz')
    assert search(tmp_path / 'y.nii.gz')
    s = read(tmp_path / 'y.nii.gz')
    assert np.array_equal(s.voxels, scan.voxels)
    out = [write_scan(s, tmp_path / f'o{e}') for e in ('.nii.gz', '.mha', '.nrrd')]
    assert not search(*out)


# a tilted gantry


def leaning(scan, folder, deg, axis=1, back=False):
    "A series of a gantry tilted about the axis from left to right: the table moves along z alone"
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))

    def change(d, k):
        k = len(scan.voxels) - 1 - k if back else k
        d.ImagePositionPatient, d.ImageOrientationPatient = (
            [-20.0, -30.0, 2.5 * k],
            [1, 0, 0, 0, c, -s],
        )

    return write_series(scan, folder, change)


@pytest.mark.parametrize('deg', [-20, -3, 8, 18])
def test_a_known_tilt_is_set_upright(tmp_path, scan, deg):
    p = leaning(scan, tmp_path / 'd', deg)
    with pytest.raises(GeometryError, match=f"tilted by {abs(deg):.1f}°.*tilt='correct'"):
        read(p)
    s = read(p, tilt='correct')
    said = [r for r in s.remarks if 'corrected' in r]
    assert (
        len(said) == 1
        and f'{abs(deg):.1f}°' in said[0]
        and np.allclose(s.spacing, (2.5 * np.cos(np.radians(deg)), 0.8, 0.7), atol=1e-6)
    )
    R = np.array(s.direction)
    assert np.allclose(R.T @ R, np.eye(3), atol=1e-6) and orientation(s.grid) == 'LPS'
    check_upright(s, sorted(p.iterdir()))
    room = abs(11 * 2.5 * np.sin(np.radians(deg))) / 0.8
    assert s.shape == (12, 20 + int(np.ceil(room)), 24) and (s.voxels == -1024).any()
    m = write_mask(s.voxels > 0, s, tmp_path / 'm.nii.gz')
    assert np.array_equal(read_mask(m, s), s.voxels > 0)


def test_upright_moves_a_line_exactly():
    "A ramp is what linear interpolation keeps exactly, whole pixels are moved untouched"
    v = np.tile(np.arange(20.0, dtype='f4') * 10, (3, 15, 1))
    off = np.array([[0, 0], [0, 0.25], [0, -1.5]])
    out, g = untilt(v, Grid(v.shape, (1.0, 1.0, 1.0)), off)
    assert out.shape == (3, 15, 23) and g.origin == (0, 0, -2)  # from −2 to +1
    for k, dx in enumerate((0, 0.25, -1.5)):
        x = np.arange(23) - 2
        inside = (x - dx >= 0) & (x - dx <= 19)
        assert np.allclose(out[k, 0, inside], 10 * (x - dx)[inside])
    w = np.random.default_rng(0).integers(-1000, 1000, (2, 6, 7)).astype('i2')
    out, _ = untilt(w, Grid(w.shape, (1.0, 1.0, 1.0)), np.array([[0, 0], [2, -1]]))
    assert (
        np.array_equal(out[0, :6, 1:], w[0])
        and np.array_equal(out[1, 2:, :7], w[1])
        and (out[0, 6:] == -1024).all()
    )


def test_tilt_is_asked_for_by_name(tmp_path, scan):
    p = write_series(scan, tmp_path / 'd')
    assert np.array_equal(read(p, tilt='correct').voxels, scan.voxels)  # upright already: untouched
    with pytest.raises(DataError, match='tilt='):
        read(p, tilt='fix')
    jump = write_series(scan, tmp_path / 'e', shift(0, lambda k: 9 * (k > 6)))
    with pytest.raises(GeometryError, match='sideways'):
        read(jump, tilt='correct')


# what volume files promise


def test_promises_that_cannot_be_kept(tmp_path):
    for name, p in bombs(tmp_path / 'b').items():
        start = time.perf_counter()
        tracemalloc.start()
        with pytest.raises(DataError) as e:
            read(p, allow_unknown_geometry=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert e.value.remedy and peak < 160e6 and time.perf_counter() - start < 8, (
            name,
            peak,
            str(e.value),
        )


def test_voxels_of_every_packing_and_type(tmp_path, scan):
    nib = pytest.importorskip('nibabel')
    for kind in ('i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8', 'f4', 'f8'):
        v = np.random.default_rng(0).integers(0, 100, (5, 7, 9)).astype(kind)
        v[0, 0, 0] = 101
        im = sitk.GetImageFromArray(v)
        for name in ('x.nii', 'x.nii.gz', 'x.mha', 'x.mhd', 'x.nrrd'):
            for pack in (False, True):
                if pack and name == 'x.nii':
                    continue
                sitk.WriteImage(im, str(tmp_path / name), pack)
                assert np.array_equal(read(tmp_path / name, units='uint8').voxels, v), (
                    kind,
                    name,
                    pack,
                )
        for e in '<>':
            h = nib.Nifti1Header(endianness=e)
            h.set_data_dtype(np.dtype(kind))
            i = nib.Nifti1Image(v.T, np.diag([-1, -1, 1, 1]), h)
            i.set_qform(i.affine, 1)
            nib.save(i, tmp_path / 'n.nii.gz')
            assert np.array_equal(read(tmp_path / 'n.nii.gz', units='uint8').voxels, v), (kind, e)
    nib.save(nib.Nifti2Image(v.T, np.diag([-1, -1, 1, 1])), tmp_path / 'n2.nii')
    with pytest.raises(ReadError, match='second version'):
        read(tmp_path / 'n2.nii')


def test_many_gzip_members_and_header_fields(tmp_path, scan):
    write(scan, tmp_path / 'x.nii')
    raw = (tmp_path / 'x.nii').read_bytes()
    named = gzip.compress(raw)
    named = (
        named[:3]
        + bytes([4 | 8 | 16])
        + named[4:10]
        + b'\5\0extra'
        + b'chest.nii\0'
        + b'a comment\0'
        + named[10:]
    )
    for body in (
        b''.join(gzip.compress(raw[i : i + 777]) for i in range(0, len(raw), 777)),
        named,
        gzip.compress(raw) + bytes(100),
    ):
        (tmp_path / 'y.nii.gz').write_bytes(body)
        assert np.array_equal(read(tmp_path / 'y.nii.gz').voxels, scan.voxels)


# headers, walked by hand and by pydicom


@pytest.mark.parametrize(
    'syntax', [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian]
)
@pytest.mark.parametrize('open_end', [True, False])
def test_both_header_readers_agree(tmp_path, scan, syntax, open_end):
    def change(d, k):
        inner = Dataset()
        inner.CodeValue = 'x'
        deep = Dataset()
        deep.ReferencedSOPInstanceUID = '1.2'
        inner.ReferencedImageSequence = Sequence([deep])
        d.ProcedureCodeSequence = Sequence([inner, inner])
        d.add_new(0x00091001, 'UN', b'private')
        d.WindowCenter = [40, -600]
        d['ProcedureCodeSequence'].is_undefined_length = open_end
        inner.is_undefined_length_sequence_item = open_end
        d.PatientName = 'Ä^B'
        d.SpecificCharacterSet = 'ISO_IR 192'

    p = write_series(scan, tmp_path / 'd', change) / 'IM4'
    d = pydicom.dcmread(p)
    d.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(
        p,
        d,
        implicit_vr=syntax == pydicom.uid.ImplicitVRLittleEndian,
        little_endian=True,
        enforce_file_format=True,
    )
    fast = _walk(p.read_bytes())
    with open(p, 'rb') as f:
        slow = _slow(f, True)
    assert (
        fast.at == slow.at
        and fast.syntax == slow.syntax == syntax
        and slices_of(fast, p) == slices_of(slow, p)
    )
    assert {
        k: str(v)
        for k, v in fast.items()
        if k
        not in (
            'ImagePositionPatient',
            'ImageOrientationPatient',
            'PixelSpacing',
            'ImageType',
            'RescaleSlope',
            'RescaleIntercept',
        )
    } == {
        k: str(v)
        for k, v in slow.items()
        if k in fast
        and k
        not in (
            'ImagePositionPatient',
            'ImageOrientationPatient',
            'PixelSpacing',
            'ImageType',
            'RescaleSlope',
            'RescaleIntercept',
        )
    }


@pytest.mark.parametrize('stored,signed', [(12, 0), (12, 1), (16, 0), (16, 1), (8, 0)])
def test_bits_beyond_those_stored(tmp_path, scan, stored, signed):
    "Old overlays lie in the unused bits; values may be signed"
    rng = np.random.default_rng(0)
    lo, hi = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    px = rng.integers(lo, hi + 1, scan.shape)
    px[:, :5] = max(lo, -900) if signed else 100

    def change(d, k):
        junk = rng.integers(0, 2 ** (16 - stored), px[k].shape) << stored if stored < 16 else 0
        d.BitsStored, d.HighBit, d.PixelRepresentation, d.RescaleIntercept = (
            stored,
            stored - 1,
            signed,
            0 if signed else -1024,
        )
        d.PixelData = (((px[k] & (2**stored - 1)) | junk) & 0xFFFF).astype('<u2').tobytes()

    s = read(write_series(scan, tmp_path / 'd', change), units='HU')
    want = px + (0 if signed else -1024)
    assert np.array_equal(s.voxels, np.maximum(want, -1024))


# real data


@pytest.mark.data
def test_two_kernels_voxel_for_voxel(data_dir):
    for folder in ('A0001_lungkernel_L', 'A0001_softkernel_B'):
        s = read(data_dir / 'tcia_lung_pet_ct_dx' / folder)
        assert (
            s.shape == (64, 512, 512)
            and np.allclose(s.spacing, (5, 0.841796875, 0.841796875))
            and s.units == 'HU'
            and s.voxels.dtype == 'i2'
        )
        ds = sorted(
            map(pydicom.dcmread, (data_dir / 'tcia_lung_pet_ct_dx' / folder).glob('*.dcm')),
            key=lambda d: d.ImagePositionPatient[2],
        )
        want = np.stack(
            [d.pixel_array.astype('i4') * int(d.RescaleSlope) + int(d.RescaleIntercept) for d in ds]
        )
        assert (
            np.array_equal(s.voxels, want)
            and np.allclose(s.origin[::-1], ds[0].ImagePositionPatient)
            and -1010 < np.median(s.voxels[s.voxels < -950]) < -960
        )
    both = data_dir / 'tcia_lung_pet_ct_dx'
    assert list(list_series(both)[:2].kernel) == ['L', 'B']
    with pytest.raises(ReadError, match='2 CT series'):
        read(both)
    assert read(both, series='kernel B').scan_id == read(both / 'A0001_softkernel_B').scan_id


@pytest.mark.data
def test_real_volumes_equal_nibabel(data_dir):
    nib = pytest.importorskip('nibabel')
    p = data_dir / 'totalsegmentator' / 'example_ct.nii.gz'
    s = read(p)
    im = nib.as_closest_canonical(nib.load(p))
    want = np.asarray(im.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
    assert np.array_equal(s.voxels, np.maximum(want, -1024))
    a, b = (
        read(data_dir / 'cip_small_chest' / 'ct-64.nrrd'),
        read(data_dir / 'cip_small_chest' / 'ct-64Dicom'),
    )
    assert np.array_equal(a.voxels, b.voxels) and np.allclose(a.spacing, b.spacing, atol=1e-3)
    assert read_mask(data_dir / 'cip_small_chest' / 'wholeLung-64.nrrd', a).any()


def by_pydicom(files):
    "The stack as pydicom alone gives it, sorted by position along the normal, in HU"
    ds = [pydicom.dcmread(f) for f in files]
    n = np.cross(*np.array(ds[0].ImageOrientationPatient, float).reshape(2, 3))
    ds.sort(key=lambda d: float(np.dot(n, np.array(d.ImagePositionPatient, float))))
    return ds, np.stack(
        [
            d.pixel_array * float(d.get('RescaleSlope', 1)) + float(d.get('RescaleIntercept', 0))
            for d in ds
        ]
    )


# every folder with files and every single file of odd_dicom: read (shape, spacing) or refused
# (type, words)
ODD = {
    'dcm_qa_ct/GE_tilt_head': (GeometryError, 'tilted by 18.5'),
    'dcm_qa_ct/Philips_localizer': (ReadError, 'localizer'),
    'dicom2nifti_failing/gantrytilting/001': (GeometryError, 'tilted by 14.0'),
    'dicom2nifti_failing/notavolume/001': (GeometryError, 'where another'),
    'dicom2nifti_failing/sliceincrement/001': (
        ReadError,
        r'2 acquisitions .* slices 3 and 4 of 4, .*1 missing',
    ),
    'dicom2nifti_failing/sliceorientation/001': (ReadError, 'modality MR'),
    'dicom2nifti_compressed_mr/compressed_j2k/001': (ReadError, 'modality MR'),
    'dicom2nifti_compressed_mr/compressed_jpeg/001': (ReadError, 'modality MR'),
    'pydicom': (ReadError, '6 CT series found'),
    'pydicom/dicomdirtests': (ReadError, '3 CT series found'),
    'pydicom/dicomdirtests/DICOMDIR': (ReadError, '3 CT series found'),
    **{f'pydicom/dicomdirtests/77654033/CR{k}': (ReadError, 'modality CR') for k in (1, 2, 3)},
    'pydicom/dicomdirtests/77654033/CT2': (GeometryError, '202.5 mm apart'),
    'pydicom/dicomdirtests/98892001/CT2N': (ReadError, 'localizer'),
    'pydicom/dicomdirtests/98892001/CT5N': ((5, 16, 16), (2.5, 0.48828125, 0.48828125)),
    **{f'pydicom/dicomdirtests/98892003/MR{k}': (ReadError, 'modality MR') for k in (1, 2, 700)},
    'pydicom/dicomdirtests/TINY_ALPHA': (ReadError, 'no image'),
    'pydicom/dicomdirtests/TINY_ALPHA/PT000000/ST000000/SE000000': (ReadError, 'no image'),
    **{
        f'pydicom/{n}.dcm': (GeometryError, 'one slice')
        for n in ('693_J2KI', 'CT_small', 'J2K_pixelrep_mismatch')
    },
    'pydicom/no_meta.dcm': (ReadError, 'not DICOM'),
    **{
        f'pydicom/{n}.dcm': (ReadError, f'modality {m}')
        for n, m in {
            'JPEG-lossy': 'NM',
            'JPEG2000': 'NM',
            'MR_small': 'MR',
            'MR_small_RLE': 'MR',
            'MR_small_jp2klossless': 'MR',
            'badVR': 'RTDOSE',
            'image_dfl': 'OT',
            'liver_1frame': 'SEG',
            'rtdose': 'RTDOSE',
            'rtplan': 'RTPLAN',
            'rtstruct': 'RTSTRUCT',
        }.items()
    },
}


@pytest.mark.data
def test_the_table_of_odd_dicom_is_complete(data_dir):
    odd = data_dir / 'odd_dicom'
    there = {p for p in odd.rglob('*') if p.is_dir() and any(f.is_file() for f in p.iterdir())} | {
        p for p in (odd / 'pydicom').iterdir() if p.suffix == '.dcm'
    }
    assert {p.relative_to(odd).as_posix() for p in there} | {
        'pydicom/dicomdirtests/DICOMDIR'
    } == set(ODD)


@pytest.mark.data
@pytest.mark.parametrize('name', ODD)
def test_odd_dicom(data_dir, name, capfd):
    kind, words = ODD[name]
    p = data_dir / 'odd_dicom' / name
    capfd.readouterr()
    if isinstance(kind, tuple):
        s = read(p)
        ds, want = by_pydicom(sorted(p.iterdir()))
        assert (
            s.shape == kind
            and np.allclose(s.spacing, words, atol=1e-6)
            and np.array_equal(s.voxels, np.maximum(want, -1024))
            and np.allclose(s.origin[::-1], ds[0].ImagePositionPatient)
        )
    else:
        with pytest.raises(kind, match=words) as e:
            read(p)
        assert e.value.remedy and str(data_dir) in e.value.source
    assert not any(capfd.readouterr())


@pytest.mark.data
def test_real_slices_equal_pydicom(data_dir):
    "Every CT slice of the real data that pydicom can decode here, packed ones too, pixel for pixel"
    n, packed = 0, 0
    for p in sorted(data_dir.rglob('*')):
        if (
            not p.is_file()
            or 'annotation' in str(p)
            or p.suffix in ('.png', '.gz', '.csv', '.md', '.nrrd', '.xml', '.txt', '.pdf')
        ):
            continue
        try:
            h = read_header(p)
        except Exception:
            continue
        if h is None or find_foreign(h) or find_damage(h, p):
            continue
        if n % 3 and 'A0001' in str(p):
            n += 1
            continue  # every third of the long ones
        d = pydicom.dcmread(p)
        try:
            want = d.pixel_array * float(d.get('RescaleSlope', 1)) + float(
                d.get('RescaleIntercept', 0)
            )
        except RuntimeError:
            continue  # no decoder for it in pydicom
        assert np.array_equal(decode(slices_of(h, p), p)[0], want), p
        n += 1
        packed += d.file_meta.TransferSyntaxUID.is_compressed
    assert n > 200 and packed > 20


@pytest.mark.data
def test_not_a_chest_and_single_slices(data_dir):
    s = read(data_dir / 'totalsegmentator' / 'example_ct_dicom')
    _, want = by_pydicom(sorted((data_dir / 'totalsegmentator' / 'example_ct_dicom').iterdir()))
    assert (
        s.shape == want.shape
        and np.array_equal(s.voxels, np.maximum(want, -1024))
        and s.units == 'HU'
    )  # JPEG 2000
    for p in sorted((data_dir / 'tcia_covid19_ny_sbu').glob('*/*')):
        with pytest.raises(
            DataError,
            match='one slice|series found|where another|pixel sizes|pixel spacings|missing'
            '|orientations|mm apart',
        ):
            read(p)


@pytest.mark.data
def test_a_real_tilt_is_set_upright(data_dir):
    p = data_dir / 'odd_dicom' / 'dicom2nifti_failing' / 'gantrytilting'
    s = read(p, tilt='correct')
    assert any('tilt of 14.0° corrected' in r for r in s.remarks)
    check_upright(s, sorted(p.rglob('*.dcm')))


def check_upright(s, files):
    "Each voxel is what its own slice has at that place of the patient, by another interpolator"
    ds, want = by_pydicom(files)
    k, j, i = np.meshgrid(*map(np.arange, s.shape), indexing='ij')
    mm = s.grid.to_mm(np.stack([k, j, i], -1))[..., ::-1]
    flips = (
        float(
            np.dot(
                np.array(s.direction)[::-1, ::-1][:, 2],
                np.cross(*np.array(ds[0].ImageOrientationPatient, float).reshape(2, 3)),
            )
        )
        < 0
    )
    for n, (d, v) in enumerate(zip(ds, want, strict=False)):
        r, c = np.array(d.ImageOrientationPatient, float).reshape(2, 3)
        rel = mm[len(ds) - 1 - n if flips else n] - np.array(d.ImagePositionPatient, float)
        row, col = rel @ c / float(d.PixelSpacing[0]), rel @ r / float(d.PixelSpacing[1])
        inside = (row >= 0) & (row <= v.shape[0] - 1) & (col >= 0) & (col <= v.shape[1] - 1)
        assert np.abs(rel @ np.cross(r, c)).max() < 0.02  # the plane is the slice's own
        got = s.voxels[len(ds) - 1 - n if flips else n]
        true = map_coordinates(np.maximum(v, -1024), [row, col], order=1, mode='nearest')
        assert (
            inside.mean() > 0.5
            and np.abs(got - true)[inside].max() <= 0.51 + 1e-3 * np.abs(np.gradient(v)[0]).max()
        )


@pytest.mark.data
def test_every_real_path_answers(data_dir, capfd):
    "No path under the data raises anything but a DataError, and nothing is printed"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for p in [
            q for q in sorted(data_dir.rglob('*')) if q.is_dir() or q.parent.name == 'pydicom'
        ]:
            try:
                read(p)
            except DataError as e:
                assert e.remedy and e.source
    assert not any(capfd.readouterr())


# de-identified exports

IDS = (
    'Modality',
    'SeriesInstanceUID',
    'StudyInstanceUID',
    'PatientID',
    'SOPInstanceUID',
    'InstanceNumber',
    'SOPClassUID',
)


def without(*tags):
    def change(d, k):
        for t in tags:
            delattr(d, t)

    return change


def blanked(*tags):
    def change(d, k):
        for t in tags:
            setattr(d, t, '  ' if k % 2 and t in ('Modality', 'PatientID') else '')

    return change


@pytest.mark.parametrize('change', [without, blanked])
@pytest.mark.parametrize('tags', [*((t,) for t in IDS), ('Modality', 'SeriesInstanceUID'), IDS])
def test_a_de_identified_folder_is_read_with_a_remark(tmp_path, scan, tags, change):
    "One missing tag, or all: the same voxels in HU, own ids, and a remark that lists the tags"
    s = read(write_series(scan, tmp_path / 'd', change(*tags)))
    assert np.array_equal(s.voxels, scan.voxels) and s.units == 'HU' and len(s.scan_id) == 8
    check_same_grid(s, scan)
    said = ' '.join(s.remarks)
    assert all((t in said) == (t in tags) for t in IDS if t != 'InstanceNumber')
    assert s.patient_id == '' if 'PatientID' in tags else len(s.patient_id) == 8
    (row,) = list_series(tmp_path / 'd').to_dict('records')
    assert row['readable'] and row['scan_id'] == s.scan_id


def test_a_complete_folder_has_no_such_remark(tmp_path, scan):
    assert read(write_series(scan, tmp_path / 'd')).remarks == ()


def test_without_an_id_two_scans_still_differ(tmp_path, scan):
    a = read(write_series(scan, tmp_path / '0', without(*IDS)))
    b = read(write_series(chest(seed=4), tmp_path / '1', without(*IDS)))
    assert a.scan_id != b.scan_id and read(tmp_path / '0').scan_id == a.scan_id


def test_without_modality_and_class_the_values_decide(tmp_path, scan):
    "MR without a modality is no CT by its class; without both, values that are no HU are refused"

    def mr(d, k):
        del d.Modality
        d.SOPClassUID = '1.2.840.10008.5.1.4.1.1.4'

    write_series(scan, tmp_path / 'mr', mr)
    with pytest.raises(ReadError, match='not a CT image .class MR'):
        read(tmp_path / 'mr')

    def shifted(d, k):
        without('Modality', 'SOPClassUID')(d, k)
        d.RescaleIntercept = 0

    write_series(scan, tmp_path / 'values', shifted)
    with pytest.raises(UnitsError, match='not HU'):
        read(tmp_path / 'values')


TELL = [
    dict(ConvolutionKernel=('SHARP', 'SOFT')),
    dict(SeriesDescription=('thin', 'thick')),
    dict(SeriesNumber=(1, 2)),
    dict(PatientID=('a', 'b')),
    dict(StudyInstanceUID=('1.2', '1.3')),
]


@pytest.mark.parametrize('tell', TELL)
def test_nameless_series_that_can_be_told_apart_are_a_choice(tmp_path, scan, tell):
    ((tag, values),) = tell.items()
    other = chest(seed=2)
    for s, v in zip((scan, other), values, strict=False):

        def change(d, k, v=v):
            del d.SeriesInstanceUID
            setattr(d, tag, v)

        write_series(s, tmp_path / 'd', change, name=f'{values.index(v)}-{{k}}')
    with pytest.raises(ReadError, match='2 CT series found'):
        read(tmp_path / 'd')
    assert np.array_equal(read(tmp_path / 'd', series=0).voxels, scan.voxels)
    second = list_series(tmp_path / 'd').scan_id[1]
    assert np.array_equal(read(tmp_path / 'd', series=second).voxels, other.voxels)


def test_nameless_series_in_two_folders_are_a_choice(tmp_path, scan):
    ids = without('SeriesInstanceUID', 'StudyInstanceUID')
    for i, s in enumerate((scan, chest(seed=2))):
        write_series(s, tmp_path / 'd' / str(i), ids)
    with pytest.raises(ReadError, match='2 CT series found'):
        read(tmp_path / 'd')
    assert np.array_equal(read(tmp_path / 'd', series=0).voxels, scan.voxels)


def test_nameless_series_that_cannot_be_told_apart_are_refused(tmp_path, scan):
    ids = without('SeriesInstanceUID', 'StudyInstanceUID')
    for i, s in enumerate((scan, chest(seed=2))):
        write_series(s, tmp_path / 'd', ids, name=f'{i}-{{k}}')
    with pytest.raises(GeometryError, match='lie where another one lies') as e:
        read(tmp_path / 'd')
    assert e.value.source == str(tmp_path / 'd') and e.value.remedy


@pytest.mark.parametrize('which', [0, 5, 11])
def test_a_slice_without_a_series_among_others_is_refused(tmp_path, scan, which):
    "Also the last one, without which the rest would be a volume"
    lost = without('SeriesInstanceUID')
    write_series(scan, tmp_path / 'd', lambda d, k: lost(d, k) if k == which else None)
    for series in (None, 0, 1):
        with pytest.raises(ReadError, match='1 of 12 CT files name no series') as e:
            read(tmp_path / 'd', series=series)
        assert e.value.source == str(tmp_path / 'd') and 'folder of its own' in e.value.remedy


def test_copies_without_an_id_are_still_copies(tmp_path, scan):
    folder = write_series(scan, tmp_path / 'd', without('SOPInstanceUID', 'SeriesInstanceUID'))
    shutil.copy(folder / 'IM4', folder / 'copy of IM4')
    s = read(folder)
    assert np.array_equal(s.voxels, scan.voxels) and 'byte for byte' in ' '.join(s.remarks)


def test_a_damaged_file_without_ids_still_stops_the_series(tmp_path, scan):
    folder = write_series(scan, tmp_path / 'd', without('SeriesInstanceUID'))
    whole = (folder / 'IM12').read_bytes()
    (folder / 'IM12').write_bytes(whole[:-300])
    with pytest.raises(ReadError, match='IM12.*ends early') as e:
        read(folder)
    assert e.value.remedy


# what is read, and how remedies are named


def test_files_of_a_path_are_all_that_reading_opens(tmp_path, scan):
    deep = write_series(scan, tmp_path / 'study' / 'DICOM' / 'S1')
    (tmp_path / 'study' / '.hidden').write_text('x')
    assert files_of(tmp_path / 'study') == sorted(deep.iterdir())
    (tmp_path / 'study' / 'DICOMDIR').write_bytes(b'x')
    assert len(files_of(tmp_path / 'study' / 'DICOMDIR')) == 13
    bodies = {
        '.mhd': 'x.raw',
        '.nhdr': 'x.raw',
        '.mha': 'x.mha',
        '.nrrd': 'x.nrrd',
        '.nii.gz': 'x.nii.gz',
    }
    for end, body in bodies.items():
        (tmp_path / f'{end[1:]}-x').mkdir()
        p = write(scan, tmp_path / f'{end[1:]}-x' / f'x{end}')
        assert {f.name for f in files_of(p)} == {p.name, body}
    with pytest.raises(ReadError, match='does not exist'):
        files_of(tmp_path / 'none')
    (tmp_path / 'odd.mhd').write_text('no header at all')
    assert files_of(tmp_path / 'odd.mhd') == [tmp_path / 'odd.mhd']


def test_remedies_name_the_option_of_the_command_line(tmp_path, scan):
    pictures(tmp_path / 'p')
    with pytest.raises(GeometryError) as e:
        read(tmp_path / 'p')
    option = 'allow_unknown_geometry=True (on the command line --allow-unknown-geometry'
    assert option in e.value.remedy
    write_series(scan, tmp_path / 'tilt', shift(1, lambda k: k))
    with pytest.raises(GeometryError, match='on the command line --tilt correct'):
        read(tmp_path / 'tilt')
    write_series(scan, tmp_path / 'two' / 'a')
    write_series(chest(seed=2), tmp_path / 'two' / 'b')
    with pytest.raises(ReadError, match='on the command line --series'):
        read(tmp_path / 'two')
    write_scan(scan, tmp_path / 'x.nii.gz')
    with pytest.raises(DataError, match='on the command line --overwrite'):
        write_scan(scan, tmp_path / 'x.nii.gz')
