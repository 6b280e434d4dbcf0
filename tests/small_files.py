"""Small scans on disk with one fault each, for the tests of tests/cases"""

import gzip
import struct

import numpy as np
import SimpleITK as sitk

from covid_ct.io.dicom import write_series
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import Scan

SPACING = (2.5, 0.8, 0.7)


def small_scan(shape=(12, 20, 24)):
    "Air around a block of tissue, so that it is taken for HU; no two slices are alike"
    v = np.full(shape, -1000, 'i2')
    v[:, 4:-4, 4:-4] = np.random.default_rng(0).integers(-900, 300, (shape[0], *_inner(shape)))
    return Scan(v, SPACING, (-10.5, 3.25, -17.75), patient_id='p', scan_id='s')


def _inner(shape):
    return shape[1] - 8, shape[2] - 8


def chest(shape=(32, 64, 64)):
    return make_phantom('covid', seed=3, shape=shape).scan


def nifti_bytes(scan, pixdim=None, sform=None, codes=(0, 1)):
    "A NIfTI-1 file; `pixdim` (x,y,z) and `sform` (3,4) in RAS take the place of the right ones"
    x, y, z = scan.spacing[::-1]
    if sform is None:
        sform = [[-x, 0, 0, 0], [0, -y, 0, 0], [0, 0, z, 0]]
    h = bytearray(352)
    h[:4] = struct.pack('<i', 348)
    h[344:348] = b'n+1\0'
    h[40:56] = struct.pack('<8h', 3, *scan.shape[::-1], 1, 1, 1, 1)
    h[70:74] = struct.pack('<2h', 4, 16)
    h[76:108] = struct.pack('<8f', 1, *(pixdim or (x, y, z)), 0, 0, 0, 0)
    h[108:112] = struct.pack('<f', 352)
    h[123] = 2
    h[252:256] = struct.pack('<2h', *codes)
    h[280:328] = np.asarray(sform, '<f4').tobytes()
    return bytes(h) + scan.voxels.astype('<i2').tobytes()


def write_nifti(scan, path, **fault):
    raw = nifti_bytes(scan, **fault)
    path.write_bytes(gzip.compress(raw, 1) if path.name.lower().endswith('.gz') else raw)
    return path


def write_header_and_raw(scan, folder, end='.mhd'):
    "A header and its voxels in a file beside it"
    image = sitk.GetImageFromArray(scan.voxels)
    image.SetSpacing(scan.spacing[::-1])
    sitk.WriteImage(image, str(folder / f'a{end}'))
    return folder / f'a{end}'


def rounded(scan, folder, step, digits=1):
    "A series whose positions are rounded"

    def change(d, k):
        d.ImagePositionPatient = [0, 0, round(k * step + 0.04, digits)]

    return write_series(scan, folder, change)


def put(**tags):
    "A change of `write_series` that sets tags"
    return lambda d, k: d.update(tags)


def numbered(n, z=0.0):
    "A change of `write_series` that makes its slices acquisition `n`, `z` mm higher"

    def change(d, k):
        d.AcquisitionNumber = n
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = f'{d.SOPInstanceUID}.{n}'
        x, y, h = d.ImagePositionPatient
        d.ImagePositionPatient = [x, y, float(h) + z]

    return change
