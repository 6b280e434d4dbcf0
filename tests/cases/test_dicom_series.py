"""DICOM folders that are read right, refused with a remedy that helps, or marked: cases 02, 11, 13,
the rounded positions of 14, and the commas of 16."""

import os

import numpy as np
import pydicom
import pytest
from small_files import chest, numbered, put, rounded, small_scan

from covid_ct.io.dicom import list_series, write_series
from covid_ct.io.read import files_of, read
from covid_ct.scan import DataError, GeometryError, ReadError

SCAN = small_scan()
ROUND = np.hypot(*(np.indices(SCAN.shape[1:]) - np.array([[[9.5]], [[11.5]]]))) > 9


def padded(value, limit=None, signed=0):
    "A change that fills the corners with padding, and names it in the header"

    def change(d, k):
        kind = '<i2' if signed else '<u2'
        v = np.frombuffer(d.PixelData, '<u2').astype('i4').reshape(SCAN.shape[1:])
        v = v - 1024 * signed
        v[ROUND] = value
        if limit is not None:
            v[ROUND & (np.indices(v.shape)[0] % 2 == 0)] = limit
        d.PixelData = v.astype(kind).tobytes()
        d.PixelRepresentation, d.RescaleIntercept = signed, -1024 * (1 - signed)
        d.add_new(0x00280120, 'US', value % 65536)
        if limit is not None:
            d.add_new(0x00280121, 'US', limit % 65536)

    return change


@pytest.mark.parametrize(
    'value, limit, signed',
    [
        (63536, None, 0),
        (65535, None, 0),
        (4095, None, 0),
        (65000, 65535, 0),
        (4000, 4095, 0),
        (3000, None, 1),
        (-2000, None, 1),
    ],
)
def test_padding_becomes_air(tmp_path, value, limit, signed):
    scan = read(write_series(SCAN, tmp_path / 'x', padded(value, limit, signed)))
    want = np.where(ROUND, -1024, SCAN.voxels)
    assert np.array_equal(scan.voxels, want) and scan.voxels.dtype == 'i2'
    assert scan.units == 'HU' and len(scan.remarks) == 1 and '−1024' in scan.remarks[0]


@pytest.mark.parametrize('codec', ['RLELossless', 'DeflatedExplicitVRLittleEndian'])
def test_packed_padding_becomes_air(tmp_path, codec):
    folder = write_series(SCAN, tmp_path / 'x', padded(65535))
    for p in folder.iterdir():
        d = pydicom.dcmread(p)
        if codec == 'RLELossless':
            d.compress(pydicom.uid.RLELossless)
        d.file_meta.TransferSyntaxUID = getattr(pydicom.uid, codec)
        d.save_as(p)
    scan = read(folder)
    assert np.array_equal(scan.voxels, np.where(ROUND, -1024, SCAN.voxels))
    assert any('padding' in r for r in scan.remarks)


def test_a_padding_value_that_is_tissue_needs_its_corners(tmp_path):
    scan = read(write_series(SCAN, tmp_path / 'x', put(PixelPaddingValue=1024)))  # 0 HU
    assert np.array_equal(scan.voxels, SCAN.voxels)


def test_tags_that_change_the_meaning(tmp_path):
    scan = read(write_series(SCAN, tmp_path / 'a', put(PixelAspectRatio=[1, 2])))
    assert any('aspect ratio 1:2' in r for r in scan.remarks)
    scan = read(write_series(SCAN, tmp_path / 'b', put(PixelAspectRatio=[8, 7])))
    assert scan.remarks == ()  # 0.8 to 0.7 mm: no contradiction
    scan = read(write_series(SCAN, tmp_path / 'c', put(LossyImageCompression='01')))
    assert 'lossy compression' in scan.remarks
    table = pydicom.Sequence([pydicom.Dataset()])
    with pytest.raises(ReadError, match='ModalityLUTSequence'):
        read(write_series(SCAN, tmp_path / 'd', put(ModalityLUTSequence=table)))


def test_a_huge_slope_is_a_typed_error(tmp_path):
    for slope in ('1e300', '1e30', '-1e38'):
        with pytest.raises(DataError):
            read(write_series(SCAN, tmp_path / slope, put(RescaleSlope=slope)))


@pytest.mark.parametrize('tags', [dict(BitsStored=65535), dict(BitsStored=17), dict(HighBit=16)])
def test_bits_that_do_not_fit_are_a_typed_error(tmp_path, tags):
    "Found by the fuzzer: 2 to the power of 65,535 is no float"
    with pytest.raises(ReadError, match='bits of a pixel'):
        read(write_series(SCAN, tmp_path / 'x', put(**tags)))


@pytest.mark.parametrize(
    "stream",
    [
        b"\xff\xd8\xff\xc3\x00\x0b\x10\xff\xff\xff\xff\x01\x01\x11\x00",
        # JPEG-LS
        b"\xff\xd8\xff\xe0\x00\x04ab\xff\xf7\x00\x0b\x10\xff\xff\xff\xff\x01\x01\x11\x00",
        # JPEG 2000
        b"\xff\x4f\xff\x51\x00\x29\x00\x00\x00\x00\xff\xff\x00\x00\xff\xff" + bytes(40),
    ],
    ids=["jpeg", "jpeg-ls", "jpeg 2000"],
)
def test_a_packed_picture_of_another_size_is_not_decoded(tmp_path, stream):
    def pack(d, k):
        d.PixelData = pydicom.encaps.encapsulate([stream])
        d["PixelData"].VR = "OB"
        d["PixelData"].is_undefined_length = True
        d.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1

    with pytest.raises(ReadError, match="packed picture has 65535 × 65535"):
        read(write_series(small_scan(), tmp_path / "s", pack))


def test_decimal_commas_are_read(tmp_path):
    folder = write_series(SCAN, tmp_path / 'x')
    for p in folder.iterdir():
        raw = p.read_bytes()
        assert b'0.8\\0.7' in raw
        p.write_bytes(raw.replace(b'0.8\\0.7', b'0,8\\0,7'))
    scan = read(folder)
    assert np.allclose(scan.spacing, SCAN.spacing) and 'decimal commas' in scan.remarks[0]
    for p in folder.iterdir():
        p.write_bytes(p.read_bytes().replace(b'0,8\\0,7', b'0;8\\0;7'))
    with pytest.raises(ReadError, match='PixelSpacing is no number'):
        read(folder)


# acquisitions


def two(folder, z):
    write_series(SCAN, folder, numbered(1), name='A{k}')
    other = SCAN.replace(voxels=SCAN.voxels + np.int16(7))
    return write_series(other, folder, numbered(2, z), name='B{k}')


@pytest.mark.parametrize('z', [1.0, 1.25, 0.0, 400.0])  # in phase, halfway, at one place, above
def test_two_acquisitions_are_named_and_chosen(tmp_path, z):
    folder = two(tmp_path / 'x', z)
    with pytest.raises(ReadError, match=r'2 acquisitions .*1 \(12 slices\), 2 \(12') as e:
        read(folder)
    assert '--acquisition' in e.value.remedy
    for n in (1, '1'):
        assert np.array_equal(read(folder, acquisition=n).voxels, SCAN.voxels)
    second = read(folder, acquisition=2)
    assert np.array_equal(second.voxels, SCAN.voxels + 7)
    assert any('2 acquisitions' in r for r in second.remarks)
    with pytest.raises(ReadError, match='2 acquisitions'):
        read(folder, acquisition=3)


def test_one_volume_in_two_acquisitions_is_read(tmp_path):
    "Step and shoot: the upper half has another number and lies where the lower one ends"

    def change(d, k):
        d.AcquisitionNumber = 1 + (k >= 6)

    assert np.array_equal(read(write_series(SCAN, tmp_path / 'x', change)).voxels, SCAN.voxels)


def test_a_choice_without_effect_is_said(tmp_path):
    scan = read(write_series(SCAN, tmp_path / 'x'), acquisition=2)
    assert np.array_equal(scan.voxels, SCAN.voxels) and 'no effect' in scan.remarks[0]


def test_one_uid_a_slice_is_one_series(tmp_path):
    def change(d, k):
        d.SeriesInstanceUID = f'1.2.3.{k + 1}'

    folder = write_series(SCAN, tmp_path / 'x', change)
    scan = read(folder)
    assert np.array_equal(scan.voxels, SCAN.voxels) and 'UID of its own' in scan.remarks[0]
    assert len(list_series(folder)) == 1


# positions


@pytest.mark.parametrize('step, digits', [(0.625, 1), (0.33, 1), (1.25, 0)])
def test_rounded_positions_are_even(tmp_path, step, digits):
    if digits == 0:
        with pytest.raises(GeometryError):  # rounded to whole millimetres: half a slice off
            read(rounded(SCAN, tmp_path / 'x', step, digits))
        return
    scan = read(rounded(SCAN, tmp_path / 'x', step, digits))
    assert scan.spacing[0] == pytest.approx(step, abs=0.01) and 'taken as even' in scan.remarks[0]


@pytest.mark.parametrize('gone', [1, 5, 10])
def test_a_missing_slice_is_still_noticed(tmp_path, gone):
    def change(d, k):
        d.ImagePositionPatient = [0, 0, round(k * 0.625 + 0.04, 1)]
        return k != gone

    with pytest.raises(GeometryError, match='apart|vary'):
        read(write_series(SCAN, tmp_path / 'x', change))


# links


def test_links_are_followed_once(tmp_path):
    real = write_series(SCAN, tmp_path / 'real' / 'S1')
    (tmp_path / 'linked').mkdir()
    (tmp_path / 'linked' / 'S1').symlink_to(real)
    (tmp_path / 'linked' / 'again').symlink_to(real)
    (real / 'up').symlink_to(tmp_path / 'real')
    (real / 'root').symlink_to('/')
    scan = read(tmp_path / 'linked')
    assert np.array_equal(scan.voxels, SCAN.voxels) and scan.remarks == ()
    assert len(files_of(tmp_path / 'linked')) == len(SCAN.voxels)


@pytest.mark.parametrize('keep', [lambda k: False, lambda k: k % 2 == 0, lambda k: k < 9])
def test_a_link_that_leads_nowhere_is_named(tmp_path, keep):
    real, half = write_series(SCAN, tmp_path / 'real'), tmp_path / 'half'
    half.mkdir()
    for k, p in enumerate(sorted(real.iterdir())):
        (half / p.name).symlink_to(p if keep(k) else tmp_path / 'nowhere' / p.name)
    with pytest.raises(ReadError, match='leads nowhere') as e:
        read(half)
    assert os.path.islink(e.value.source)


def test_slices_appended_twice_are_said(tmp_path, capsys):
    from covid_ct.cli import main
    from covid_ct.io.read import write_scan

    scan = chest()
    v = np.concatenate([scan.voxels, scan.voxels])
    path = write_scan(scan.replace(voxels=v), tmp_path / 'twice.nii.gz')
    assert main(['inspect', str(path)]) == 0
    assert '32 of 64 slices occur more than once' in capsys.readouterr().out
    main(['lungs', str(path), str(tmp_path / 'm.nii.gz')])
    assert 'occur more than once' in capsys.readouterr().err
