"""Volume files whose headers contradict themselves, are broken, or have a name that is no text:
cases 03, 04, 14 and 16 of the list of public faults, and what ITK makes of good headers."""

import gzip
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from small_files import SPACING, nifti_bytes, small_scan, write_header_and_raw, write_nifti

from covid_ct.io.read import read, read_mask, write_mask
from covid_ct.io.volume import volume_header
from covid_ct.scan import DataError, GeometryError, ReadError

SCAN = small_scan()
X, Y, Z = SPACING[::-1]


@pytest.mark.parametrize(
    'pixdim, sform',
    [
        ((1, 1, 1), None),
        ((X, Y, 1), None),
        (None, [[-X, 0, 0, 0], [0, -Y, 0, 0], [0, 0, 5, 0]]),
        (None, [[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0]]),
    ],
)
def test_sizes_that_contradict_each_other_are_named(tmp_path, pixdim, sform):
    path = write_nifti(SCAN, tmp_path / 'x.nii.gz', pixdim=pixdim, sform=sform)
    with pytest.raises(GeometryError, match='sform has voxels of .*, its pixdim of'):
        read(path)
    assert not read(path, allow_unknown_geometry=True).geometry_known


def test_sizes_that_differ_a_little_follow_the_sform(tmp_path):
    path = write_nifti(SCAN, tmp_path / 'x.nii', pixdim=(X, Y, Z * 1.05))
    scan = read(path)
    assert np.allclose(scan.spacing, SPACING) and 'sform is taken' in scan.remarks[0]


def test_a_negative_size_is_its_amount(tmp_path):
    scan = read(write_nifti(SCAN, tmp_path / 'x.nii', pixdim=(X, -Y, Z)))
    assert np.allclose(scan.spacing, SPACING) and 'negative' in scan.remarks[0]


def test_two_places_that_disagree_are_named(tmp_path):
    path = write_nifti(SCAN, tmp_path / 'x.nii', codes=(1, 1))  # its quaternion is 0: no flip
    assert any('sform and qform' in r for r in read(path).remarks)


@pytest.mark.parametrize('shear, read_it', [(0.0005, True), (0.1, False)])
def test_a_shear_is_measured_in_voxels(tmp_path, shear, read_it):
    path = write_nifti(
        SCAN, tmp_path / 'x.nii', sform=[[-X, shear, 0, 0], [0, -Y, 0, 0], [0, 0, Z, 0]]
    )
    if read_it:
        scan = read(path)
        assert np.array_equal(scan.voxels, SCAN.voxels) and 'nearest rigid' in scan.remarks[0]
        middle = (np.array(SCAN.shape) - 1) / 2
        want = [Z * middle[0], Y * middle[1], X * middle[2] - shear * middle[1]]
        assert np.allclose(scan.grid.to_mm(middle), want, atol=1e-4)
        return
    with pytest.raises(GeometryError, match='right angles') as e:
        read(path)
    _follow(e.value.remedy, path)


def _follow(remedy, path):
    nib = pytest.importorskip('nibabel')
    processing = pytest.importorskip('nibabel.processing')
    assert 'resample_to_output' in remedy
    even = processing.resample_to_output(nib.load(path), order=1, cval=-1000)
    nib.save(even, path.with_name('even.nii'))
    assert read(path.with_name('even.nii')).units == 'HU'


def test_gzip_under_another_name_is_read(tmp_path):
    (tmp_path / 'x.nii').write_bytes(gzip.compress(nifti_bytes(SCAN)))
    (tmp_path / 'Y.NII.GZ').write_bytes(gzip.compress(nifti_bytes(SCAN)))
    scan = read(tmp_path / 'x.nii')
    assert np.array_equal(scan.voxels, SCAN.voxels) and 'gzip' in scan.remarks[0]
    assert read(tmp_path / 'Y.NII.GZ').remarks == ()


def test_an_ending_in_capitals_is_written(tmp_path):
    path = write_mask(SCAN.voxels > 0, SCAN, tmp_path / 'OUT.NII.GZ')
    assert np.array_equal(read(path, units='uint8').voxels > 0, SCAN.voxels > 0)


# names that are no text


NAMES = [b'P\xe9', '患者'.encode('gbk')]


def _odd_names(tmp_path):
    for name in NAMES:
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(folder)
        path = os.path.join(folder, b'a' + name + b'.nii.gz')
        with open(path, 'wb') as f:
            f.write(gzip.compress(nifti_bytes(SCAN)))
        yield path


@pytest.mark.skipif(sys.platform != 'linux', reason='names of any bytes')
def test_names_of_any_bytes(tmp_path):
    for path in map(os.fsdecode, _odd_names(tmp_path)):
        scan = read(path)
        mask = write_mask(scan.voxels > 0, scan, path + '.mha')
        assert np.array_equal(read_mask(mask, scan) > 0, SCAN.voxels > 0)
        scan.scan_id.encode('utf-8')  # can be printed and stored


@pytest.mark.skipif(sys.platform != 'linux', reason='names of any bytes')
def test_names_of_any_bytes_in_the_c_locale(tmp_path):
    code = (
        'import sys\nfrom covid_ct.io.read import *\n'
        'for p in sys.argv[1:]:\n'
        '    s = read(p); m = write_mask(s.voxels > 0, s, p + ".mha")\n'
        '    print(int(read_mask(m, s).sum()))'
    )
    done = subprocess.run(
        [sys.executable.encode(), b'-c', code.encode(), *_odd_names(tmp_path)],
        capture_output=True,
        env={**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0'},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(int((SCAN.voxels > 0).sum())).encode()] * 2


# headers that are broken on purpose

META = 'ObjectType = Image\nNDims = 3\nDimSize = 24 20 12\nElementType = MET_SHORT\n'
META += 'ElementSpacing = 0.7 0.8 2.5\nElementDataFile = LOCAL\n'
NRRD = 'NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 24 20 12\n'
NRRD += 'space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\nendian: little\nencoding: raw\n\n'
BREAKS = [
    ('sizes: 24 20 12', 'sizes: 24 20 -12'),
    ('sizes: 24 20 12', 'sizes: 24 20'),
    ('sizes: 24 20 12', 'sizes: 99999999999999999999 20 12'),
    ('dimension: 3', 'dimension: 16'),
    ('space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)', 'space directions: none none none'),
    ('(0,0,2.5)', '(0,0,nan)'),
    ('(0,0,2.5)', '(0,0,0)'),
    ('(0,0,2.5)', '(0,0)'),
    ('type: short', 'type: block'),
    ('encoding: raw', 'encoding: bzip2'),
    ('encoding: raw', 'encoding: raw\ndata file: ../x.raw'),
    ('encoding: raw', 'encoding: raw\ndata file: none.raw'),
    ('encoding: raw', 'encoding: raw\nbyte skip: -2'),
    ('NDims = 3', 'NDims = 99999'),
    ('DimSize = 24 20 12', 'DimSize = 24 20 0'),
    ('DimSize = 24 20 12', 'DimSize = 24 20 x'),
    ('0.7 0.8 2.5', '0.7 0.8'),
    ('0.7 0.8 2.5', '0 0.8 2.5'),
    ('0.7 0.8 2.5', 'inf 0.8 2.5'),
    ('ElementType = MET_SHORT', 'ElementType = MET_OTHER'),
    ('ElementSpacing', 'TransformMatrix = 1 0 0\nElementSpacing'),
    ('ElementSpacing', 'TransformMatrix = 0 0 0 0 0 0 0 0 0\nElementSpacing'),
    ('ElementDataFile = LOCAL', 'ElementDataFile = /etc/passwd'),
    ('ElementDataFile = LOCAL', 'ElementDataFile = LIST'),
    ('ElementDataFile = LOCAL', 'CompressedData = True\nElementDataFile = LOCAL'),
]


@pytest.mark.parametrize('old, new', BREAKS, ids=lambda x: x[:40])
def test_a_broken_header_is_refused_before_a_native_reader(tmp_path, monkeypatch, old, new):
    head, name = (NRRD, 'x.nrrd') if old in NRRD else (META, 'x.mha')
    assert old in head
    for function in ('ReadImage', 'ImageFileReader'):
        monkeypatch.setattr(sitk, function, lambda *a, **k: pytest.fail('a native reader'))
    good = tmp_path / f'good_{name}'
    good.write_bytes(head.encode() + SCAN.voxels.tobytes())
    assert np.array_equal(read(good).voxels, SCAN.voxels)
    bad = tmp_path / name
    bad.write_bytes(head.replace(old, new).encode() + SCAN.voxels.tobytes())
    with pytest.raises(DataError) as e:
        read(bad)
    assert e.value.remedy and isinstance(e.value, (ReadError, GeometryError))


def test_a_data_file_named_in_utf8(tmp_path):
    path = write_header_and_raw(SCAN, tmp_path)
    (tmp_path / 'a.raw').rename(tmp_path / 'ü.raw')
    path.write_bytes(path.read_bytes().replace(b'a.raw', 'ü.raw'.encode()))
    assert np.array_equal(read(path).voxels, SCAN.voxels)


# the reference: ITK's own geometry of good headers


def _itk(path):
    r = sitk.ImageFileReader()
    r.SetFileName(str(path))
    r.ReadImageInformation()
    R = np.reshape(r.GetDirection(), (3, 3))[::-1, ::-1]
    return r.GetSpacing()[::-1], r.GetOrigin()[::-1], R


@pytest.mark.parametrize('end', ['.nii', '.mha', '.nrrd'])
def test_the_grid_is_itks(tmp_path, end):
    rng = np.random.default_rng(1)
    for k in range(12):
        image = sitk.GetImageFromArray(np.zeros((4, 5, 6), 'i2'))
        image.SetSpacing(rng.uniform(0.3, 3, 3))
        image.SetOrigin(rng.uniform(-99, 99, 3))
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        flip = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        image.SetDirection((turn if k % 2 else flip).ravel())
        path = tmp_path / f'x{end}'
        sitk.WriteImage(image, str(path))
        grid = volume_header(path)[1]
        for ours, itks in zip((grid.spacing, grid.origin, grid.direction), _itk(path), strict=True):
            assert np.allclose(ours, itks, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('space', ['RAS', 'left-anterior-superior', 'left-posterior-superior'])
def test_the_spaces_of_nrrd_are_itks(tmp_path, space):
    head = NRRD.replace('left-posterior-superior', space)
    head = head.replace('endian', 'space origin: (10,-3,5)\nendian')
    path = tmp_path / 'x.nrrd'
    path.write_bytes(head.encode() + SCAN.voxels.tobytes())
    grid = volume_header(path)[1]
    for ours, itks in zip((grid.spacing, grid.origin, grid.direction), _itk(path), strict=True):
        assert np.allclose(ours, itks)


@pytest.mark.parametrize('codes', [(q, s) for q in range(3) for s in range(4) if q or s])
def test_which_place_of_a_nifti_counts_is_itks_choice(tmp_path, codes):
    nib = pytest.importorskip('nibabel')
    rng = np.random.default_rng(2)
    a, b = np.eye(4), np.eye(4)
    sizes = rng.uniform(0.5, 3, 3)
    for m in (a, b):
        m[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * sizes
        m[:3, 3] = rng.uniform(-9, 9, 3)
    image = nib.Nifti1Image(np.zeros((6, 5, 4), 'i2'), None)
    image.header.set_zooms(sizes)
    image.header['xyzt_units'] = 3 if codes == (1, 1) else 2  # micrometres once
    image.set_qform(a, codes[0])
    image.set_sform(b, codes[1])
    nib.save(image, tmp_path / 'x.nii')
    grid = volume_header(tmp_path / 'x.nii')[1]
    itks = _itk(tmp_path / 'x.nii')
    for ours, theirs in zip((grid.spacing, grid.origin, grid.direction), itks, strict=True):
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
