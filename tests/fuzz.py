"""Feed the readers broken files until something other than our own errors comes back

    python tests/fuzz.py --minutes 10            a long run; failing files are kept in --keep
    python tests/fuzz.py --cases 300 --seed 7    a bounded one
    python tests/fuzz.py --seed 7 --replay 42    one case again

Each family of readers has a child process with little memory and little time, so that a crash, a
hang or a flood is a finding and not the end. Half of the cases are bytes gone wrong, half are the
faults of public bug reports: fields, tags, names and links."""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
MEMORY, SECONDS = 2 * 2**30, 20  # above what the libraries take when loaded; for one file
KINDS = (
    "nii nii.gz mha packed.mha mhd nrrd packed.nrrd nhdr "
    "dicom rle jpeg2000 jpeg deflated enhanced png jpg tif"
).split()


def seeds(folder):
    "One small good input of every kind, by name; a folder where the kind needs one"
    import pydicom
    import SimpleITK as sitk
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    from covid_ct.io.dicom import write_series
    from covid_ct.scan import Scan

    rng = np.random.default_rng(0)
    v = rng.integers(-1024, 900, (5, 12, 14)).astype("i2")
    v[:2] = -1000
    scan = Scan(v, (2.5, 0.8, 0.7), (-10.5, 3.25, -17.75), patient_id="p", scan_id="s")
    image = sitk.GetImageFromArray(v)
    image.SetSpacing(scan.spacing[::-1])
    image.SetOrigin(scan.origin[::-1])
    found = {}
    for kind in KINDS:
        where = folder / kind.replace(".", "_")
        where.mkdir(parents=True)
        if kind in ("nii", "nii.gz", "mha", "packed.mha", "mhd", "nrrd", "packed.nrrd", "nhdr"):
            found[kind] = where / f"x.{kind.split('.', 1)[-1] if 'packed' in kind else kind}"
            sitk.WriteImage(image, str(found[kind]), "packed" in kind or kind == "nii.gz")
            continue
        found[kind] = where
        if kind in ("png", "jpg", "tif"):
            for k in range(5):
                sitk.WriteImage(
                    sitk.GetImageFromArray(((v[k] + 1024) / 8).astype("u1")),
                    str(where / f"{k}.{kind}"),
                )
        elif kind in ("jpeg2000", "jpeg"):
            for k in range(5):
                im = sitk.GetImageFromArray(v[k : k + 1])
                tags = {
                    "0008|0060": "CT",
                    "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
                    "0020|000e": "1.2.3",
                    "0028|1052": "-1024",
                    "0028|1053": "1",
                    "0028|0030": "0.8\\0.7",
                    "0020|0032": f"0\\0\\{2.5 * k}",
                    "0020|0037": "1\\0\\0\\0\\1\\0",
                }
                for tag, x in tags.items():
                    im.SetMetaData(tag, x)
                w = sitk.ImageFileWriter()
                w.SetImageIO("GDCMImageIO")
                w.KeepOriginalImageUIDOn()
                w.UseCompressionOn()
                w.SetCompressor(kind.upper())
                w.SetFileName(str(where / f"{k}.dcm"))
                w.Execute(im)
        else:
            write_series(scan, where)
            for p in list(where.iterdir()):
                d = pydicom.dcmread(p)
                if kind == "rle":
                    d.compress(pydicom.uid.RLELossless)
                    d.save_as(p)
                if kind == "deflated":
                    d.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
                    d.save_as(p)
            if kind == "enhanced":

                def of(**tags):
                    d = Dataset()
                    for k, x in tags.items():
                        setattr(d, k, x)
                    return Sequence([d])

                parts = [pydicom.dcmread(where / f"IM{k + 1}") for k in range(5)]
                shutil.rmtree(where)
                where.mkdir()
                d = parts[0]
                d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
                d.PixelData, d.NumberOfFrames = b"".join(p.PixelData for p in parts), 5
                d.SharedFunctionalGroupsSequence = of(
                    PlaneOrientationSequence=of(ImageOrientationPatient=d.ImageOrientationPatient),
                    PixelMeasuresSequence=of(PixelSpacing=d.PixelSpacing),
                )
                d.PerFrameFunctionalGroupsSequence = Sequence(
                    [
                        of(
                            PlanePositionSequence=of(ImagePositionPatient=p.ImagePositionPatient),
                            PixelValueTransformationSequence=of(
                                RescaleSlope=1, RescaleIntercept=-1024
                            ),
                        )[0]
                        for p in parts
                    ]
                )
                for tag in (
                    "ImagePositionPatient",
                    "ImageOrientationPatient",
                    "PixelSpacing",
                    "RescaleSlope",
                    "RescaleIntercept",
                ):
                    delattr(d, tag)
                d.save_as(where / "e.dcm")
    return found


ODD = [0, 1, 2, 127, 128, 255, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1]
WORDS = [
    b"-1",
    b"0",
    b"1e309",
    b"nan",
    b"99999999999999999999",
    b"4294967295",
    b"65535 65535 65535",
    b"",
    b"LIST",
    b"../../x",
    b"%d",
    b"\0" * 40,
    b"A" * 3000,
    b"\n" * 3000,
]


def bend(b, rng):
    "Bytes of a file, damaged in one of a dozen ways"
    b, n = bytearray(b), max(1, len(b))
    head = min(n, 700)
    at = int(rng.integers(head if rng.random() < 0.7 else n))
    how = int(rng.integers(12))
    if how == 0:
        return bytes(b[: int(rng.integers(n))])  # cut
    if how == 1:
        b[at : at + 1] = bytes([int(rng.integers(256))])  # one byte
    if how == 2:  # a few bytes
        for i in rng.integers(0, head if rng.random() < 0.5 else n, int(rng.integers(2, 40))):
            b[i : i + 1] = bytes([int(rng.integers(256))])
    if how == 3:
        b[at : at + 2] = struct.pack("<H", ODD[int(rng.integers(9))])  # an odd number
    if how == 4:
        b[at : at + 4] = struct.pack("<I", ODD[int(rng.integers(12))])
    if how == 5:
        b[at : at + 8] = struct.pack("<d", [np.nan, np.inf, -1e300, 0, 1e18][int(rng.integers(5))])
    if how == 6:
        del b[at : at + int(rng.integers(1, 64))]  # lost bytes
    if how == 7:
        b[at:at] = rng.bytes(int(rng.integers(1, 64)))  # added bytes
    if how == 8:
        b[at : at + 40] = b[:40]  # repeated bytes
    if how == 9:
        return (
            rng.bytes(int(rng.integers(0, 4000)))
            if rng.random() < 0.3
            else bytes(b[:at]) + rng.bytes(n - at)
        )
    if how == 10:  # a word for a number in a text header
        digits = [i for i in range(head) if 48 <= b[i] < 58]
        if digits:
            i = digits[int(rng.integers(len(digits)))]
            b[i : i + 1] = WORDS[int(rng.integers(len(WORDS)))]
    if how == 11:
        b[at : at + 200] = bytes(len(b[at : at + 200]))  # zeros
    return bytes(b)


def bend_inside(b, rng):
    "Damage under a good packing, where a checksum no longer helps"
    return gzip.compress(bend(gzip.decompress(b), rng), 1)


VALUES = (
    "", "0", "-1", "16", "99999999999999999999", "nan", "inf", "1e300", "0 0 0", "none none none",
    "(1,0,0) (1,0,0) (0,0,1)", "(1,0.1,0) (0,1,0) (0,0,1)", "(0,0) (1)", "1 0 0", "-0.7 0.8 2.5",
    "0,7 0,8 2,5", "True", "LIST", "x%03d.raw", "../x.raw", "/dev/zero", "none.raw", "MET_OTHER",
    "block", "bzip2", "hex", "RAS", "scanner-xyz", "MET_FLOAT", "double", "1 1 1 1 1 1 1 1 1",
)  # fmt: skip
FIELDS = {  # byte of a NIfTI header → its type and odd values
    40: ("<h", (0, 1, 2, 4, 7, 8, -3)),
    42: ("<h", (0, 1, -14, 30000)),
    70: ("<h", (0, 1, 2, 128, 1536, 2304)),
    76: ("<f", (-1, 0, np.nan)),
    80: ("<f", (-0.7, 0, 1, 7, np.nan, np.inf, 1e30)),
    88: ("<f", (-2.5, 0, 1, 2.6, 25, 1e-30)),
    108: ("<f", (0, 340, 1e9, -352, np.nan)),
    112: ("<f", (0, 1e38, -1e38, np.nan, 1e-30)),
    116: ("<f", (1e38, np.inf)),
    123: ("<b", (0, 1, 3, 8)),
    252: ("<h", (0, 1, 2, -1)),
    254: ("<h", (0, 1, 3, -1)),
    256: ("<f", (0.5, 1, 2, np.nan)),
    268: ("<f", (1e30, np.nan)),
    280: ("<f", (0, 1, -1, 0.71, np.nan)),
    284: ("<f", (0.001, 0.02, 0.5)),
    344: ("<i", (0, 3222382)),
}
TAGS = {
    "PixelSpacing": ("0,8\\0,7", "0\\0", "-1\\1", "1", "nan\\1", "1e300\\1", ""),
    "ImagePositionPatient": ("0\\0", "0\\0\\1e300", "0\\0\\0", "a\\b\\c"),
    "ImageOrientationPatient": ("1\\0\\0\\1\\0\\0", "0\\0\\0\\0\\0\\0", "1\\0\\0\\0\\0.97\\-0.26"),
    "RescaleSlope": ("1e300", "0", "-1", "1e30", "0,5", "nan"),
    "RescaleIntercept": ("1e300", "-1024,0", "", "-99999"),
    "AcquisitionNumber": ("1", "2", "3", "-1", "x"),
    "SeriesInstanceUID": ("1.2.3", "1.2.4", "", "x" * 64),
    "Modality": ("", "MR", "CT"),
    "ImageType": ("ORIGINAL", "ORIGINAL\\PRIMARY\\LOCALIZER"),
    "NumberOfFrames": ("0", "2", "99999999"),
    "RescaleType": ("US", "HU", "OD"),
    "PixelAspectRatio": ("1\\2", "0\\0", "1"),
    "GantryDetectorTilt": ("15", "x", "1e9"),
}
NUMBERS = {
    0x00280010: (0, 1, 65535),  # rows
    0x00280011: (0, 1, 65535),
    0x00280002: (0, 3, 65535),  # samples
    0x00280100: (1, 8, 12, 32, 64, 65535),  # bits
    0x00280101: (0, 1, 12, 17, 65535),
    0x00280102: (0, 7, 15, 65535),
    0x00280103: (0, 1, 2),
    0x00280120: (0, 24, 63536, 65535),  # padding
    0x00280121: (0, 24, 63536, 65535),
}  # fmt: skip


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def bend_text(b, rng):
    "A text header with a line that has another value, is gone, or comes twice"
    end = b.find(b"\n\n") if b.startswith(b"NRRD") else b.find(b"\n", b.find(b"ElementDataFile"))
    lines, rest = b[: max(0, end)].split(b"\n"), b[max(0, end) :]
    k = int(rng.integers(1, max(2, len(lines))))
    if k >= len(lines):
        return b
    how = rng.random()
    if how < 0.15:
        del lines[k]
    elif how < 0.25:
        lines.insert(k, lines[k])
    else:
        mark = b": " if b.startswith(b"NRRD") else b" = "
        lines[k] = lines[k].partition(mark.strip())[0].strip() + mark + pick(rng, VALUES).encode()
    return b"\n".join(lines) + rest


def bend_fields(b, rng):
    "A NIfTI header with odd values in some of its fields"
    packed = b[:2] == b"\x1f\x8b"
    b = bytearray(gzip.decompress(b) if packed else b)
    for at in rng.permutation(list(FIELDS))[: int(rng.integers(1, 4))]:
        kind, values = FIELDS[int(at)]
        raw = struct.pack(kind, pick(rng, values))
        b[at : at + len(raw)] = raw
    return gzip.compress(bytes(b), 1) if packed != (rng.random() < 0.1) else bytes(b)


def bend_tags(files, rng):
    "Slices with odd values of one tag, in one, some or all of them"
    import pydicom

    some = rng.random(len(files)) < pick(rng, (0.2, 0.5, 1.1))
    keyword = pick(rng, list(TAGS))
    number = pick(rng, list(NUMBERS))
    text = rng.random() < 0.6
    value = pick(rng, TAGS[keyword] if text else NUMBERS[number])
    for p in [p for p, hit in zip(files, some, strict=True) if hit]:
        raw = p.read_bytes()
        tag = pydicom.datadict.tag_for_keyword(keyword) if text else number
        head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        at = raw.find(head, 132)
        if at < 0:
            continue
        size = struct.unpack_from("<H", raw, at + 6)[0]
        new = value.encode() + b" " * (len(value) % 2) if text else struct.pack("<H", value)
        raw = raw[: at + 6] + struct.pack("<H", len(new)) + new + raw[at + 8 + size :]
        p.write_bytes(raw)


def bend_folder(files, rng):
    "Names of any bytes, links that lead nowhere or in a circle"
    p = pick(rng, files)
    how = int(rng.integers(4))
    if how == 0:
        os.rename(p, os.path.join(os.fsencode(p.parent), b"\xe9\xff" + os.fsencode(p.name)))
    elif how == 1:
        p.unlink()
        p.symlink_to(p.parent / "nowhere")
    elif how == 2:
        (p.parent / "up").symlink_to(p.parent)
    else:
        shutil.copy(p, p.with_name("again" + p.name))


def known_fault(kind, files, path, rng):
    "One fault of the list of public bug reports, in a good copy"
    if rng.random() < 0.1:
        bend_folder(files, rng)
    elif kind.startswith("nii"):
        path.write_bytes(bend_fields(path.read_bytes(), rng))
    elif path.is_file():
        path.write_bytes(bend_text(path.read_bytes(), rng))
    elif kind in ("dicom", "rle", "jpeg", "jpeg2000", "enhanced"):
        bend_tags(files, rng)
    else:
        bend_folder(files, rng)


def damaged(kind, source, out, rng):
    "A damaged copy of a good input; returns the path to read"
    shutil.rmtree(out, ignore_errors=True)
    if rng.random() < 0.5:
        shutil.copytree(source if source.is_dir() else source.parent, out)
        path = out if source.is_dir() else out / source.name
        known_fault(kind, sorted(out.iterdir()), path, rng)
        return path
    if source.is_dir():
        shutil.copytree(source, out)
        files = sorted(out.iterdir())
        hit, path = (
            [files[int(i)] for i in set(rng.integers(0, len(files), int(rng.integers(1, 4))))],
            out,
        )
        if rng.random() < 0.2:
            hit, path = files[:1], files[0]
        if rng.random() < 0.2:
            once = bend(files[0].read_bytes(), rng)  # the same damage in all of them
            for f in files:
                f.write_bytes(once)
            return path
    else:
        shutil.copytree(source.parent, out)
        files = sorted(out.iterdir())
        path = out / source.name
        hit = [files[int(rng.integers(len(files)))]]
    for f in hit:
        b = f.read_bytes()
        f.write_bytes(
            bend_inside(b, rng) if kind == "nii.gz" and rng.random() < 0.6 else bend(b, rng)
        )
    return path


def bombs(folder):
    "Inputs that promise or unpack to far more than they are, by name"
    import pydicom

    from covid_ct.io.dicom import write_series
    from covid_ct.scan import Scan

    folder.mkdir(parents=True, exist_ok=True)

    def nifti(dim, kind=4):
        h = bytearray(352)
        h[:4] = struct.pack("<i", 348)
        h[344:348] = b"n+1\0"
        h[108:112] = struct.pack("<f", 352)
        h[40:56] = struct.pack("<8h", 3, *dim, 1, 1, 1, 1)
        h[70:74] = struct.pack("<2h", kind, 16)
        h[76:108] = struct.pack("<8f", *[1] * 8)
        h[254:256] = b"\1\0"
        h[280:328] = struct.pack("<12f", -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0)
        h[252:254] = b"\1\0"
        return bytes(h)

    def put(name, b):
        (folder / name).write_bytes(b)
        return folder / name

    def zeros(mb):
        return gzip.compress(bytes(2**20 * mb), 1)

    found = {
        "raw promise of 1e9 voxels": put("a.nii", nifti((1000, 1000, 1000)) + bytes(600)),
        "packed promise of 1e9 voxels": put(
            "b.nii.gz", gzip.compress(nifti((1000, 1000, 1000)) + bytes(600))
        ),
        "32767 cubed": put("c.nii", nifti((32767, 32767, 32767)) + bytes(600)),
        "gzip bomb behind a small promise": put(
            "d.nii.gz", gzip.compress(nifti((16, 16, 16)) + bytes(2**20 * 200), 1)
        ),
        "bomb of many gzip members": put(
            "e.nii.gz", gzip.compress(nifti((16, 16, 16))) + zeros(20) * 10
        ),
        "mha": put(
            "f.mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 1000 1000 1000\nElementType = MET_SHORT\n"
            b"ElementSpacing = 1 1 1\nElementDataFile = LOCAL\n" + bytes(600),
        ),
        "packed mha": put(
            "g.mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 10 10 10\nElementType = MET_SHORT\n"
            b"ElementSpacing = 1 1 1\nCompressedData = True\nElementDataFile = LOCAL\n"
            + zlib.compress(bytes(2**20 * 200), 1),
        ),
        "nrrd": put(
            "h.nrrd",
            b"NRRD0004\ntype: short\ndimension: 3\nsizes: 1000 1000 1000\n"
            b"space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
            b"endian: little\nencoding: raw\n\n" + bytes(600),
        ),
        "blank lines": put("i.mha", b"ObjectType = Image" + b"\n" * 65000),
    }
    scan = Scan(
        np.arange(5 * 64).reshape(5, 8, 8).astype("i2"), (2.5, 1, 1), patient_id="p", scan_id="s"
    )
    for name, tags in {
        "pixels": dict(Rows=65535, Columns=65535),
        "frames": dict(NumberOfFrames=2000000000),
        "no rows": dict(Rows=0, NumberOfFrames=2000000000),
    }.items():
        found[f"dicom, {name}"] = write_series(
            scan, folder / name.replace(" ", "_"), lambda d, k, tags=tags: d.update(tags)
        )

        def packed(d, k, tags=tags):
            d.update(tags)
            d.PixelData = pydicom.encaps.encapsulate([bytes(100)])
            d["PixelData"].VR = "OB"
            d["PixelData"].is_undefined_length = True
            d.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless

        found[f"packed dicom, {name}"] = write_series(
            scan, folder / ("packed_" + name.replace(" ", "_")), packed
        )
    where = write_series(scan, folder / "deflated")
    d = pydicom.dcmread(where / "IM1")
    d.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    d.ImageComments = " " * 1000
    d.PixelData = bytes(2**20 * 200)
    d.save_as(where / "IM1")
    found["deflated dicom of 200 MB"] = where
    return found


def answer(path):
    "What reading a path gives: 'read', 'refused', or the trace of what should not be"
    import warnings

    from covid_ct.io.dicom import list_series
    from covid_ct.io.read import read
    from covid_ct.scan import DataError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if Path(path).is_dir():
                list_series(path)
            s = read(path, allow_unknown_geometry=True)
            assert (
                np.isfinite(
                    [float(s.voxels.min()), float(s.voxels.max()), *s.spacing, *s.origin]
                ).all()
                and s.voxels.ndim == 3
            )
        return "read"
    except DataError as e:
        return "refused" if e.remedy and e.fault else f"no remedy: {e}"
    except MemoryError:
        return "out of memory"
    except BaseException:
        return traceback.format_exc()


def child(tasks, answers):
    "Read what comes until None comes"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 2**31, MEMORY + 2**31))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    while (path := tasks.recv()) is not None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        text = answer(path)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        # GDCM takes 740 MB for any JPEG stream that it cannot decode, before it refuses it
        answers.send(text if grown < 1000 else f"took {grown} MB more")


class Reader:
    "A child process that reads, replaced when it dies or sleeps"

    def __init__(self):
        self.start()

    def start(self):
        ctx = multiprocessing.get_context(
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        there, self.tasks = ctx.Pipe(False)
        self.answers, back = ctx.Pipe(False)
        self.process = ctx.Process(target=child, args=(there, back), daemon=True)
        self.process.start()
        there.close()
        back.close()

    def __call__(self, path, seconds=SECONDS):
        self.tasks.send(str(path))
        text = None
        try:
            text = (
                self.answers.recv()
                if self.answers.poll(seconds)
                else f"still reading after {seconds} s"
            )
        except (EOFError, ConnectionError):
            self.process.join(5)
            text = f"crashed: exit code {self.process.exitcode}"
        if text.startswith(("still", "crashed")):
            self.close()
            self.start()
        return text

    def close(self):
        self.process.kill()
        self.process.join()


def keep_case(bad, keep, kind, seed, i, text):
    "The files of a failure, and a line with its seed in `seeds.csv`"
    shutil.copytree(bad, keep / f"{seed}_{i}", symlinks=True, dirs_exist_ok=True)
    with open(keep / "seeds.csv", "a") as f:
        f.write(f"{kind},{seed},{i},{text.strip().splitlines()[-1][:80]!r}\n")


def family(kind):
    "Which reader a kind belongs to; each has a process of its own"
    kind = kind.removeprefix("packed.")
    if kind.startswith("nii"):
        return "nifti"
    return {"mha": "meta", "mhd": "meta", "nrrd": "nrrd", "nhdr": "nrrd"}.get(
        kind, "pictures" if kind in ("png", "jpg", "tif") else "dicom"
    )


class Readers(dict):
    "A `Reader` for each family, started when it is first needed"

    def __missing__(self, name):
        self[name] = Reader()
        return self[name]

    def close(self):
        for reader in self.values():
            reader.close()


def run(seed=0, cases=None, minutes=None, keep=None, kinds=KINDS, only=None):
    "Damage and read until the time or the number is used up; returns counts and the failures"
    counts, failures, end = (
        {k: dict(read=0, refused=0) for k in kinds},
        [],
        time.time() + 60 * (minutes or 1e6),
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Readers()) as readers:
        good, i = seeds(Path(folder) / "good"), only or 0
        for kind in kinds:
            if (text := readers[family(kind)](good[kind], 60)) != "read":
                failures.append((kind, "the good file", text))
        cases = only + 1 if only is not None else cases
        while time.time() < end and (cases is None or i < cases):
            kind = kinds[i % len(kinds)]
            rng = np.random.default_rng([seed, i])
            path = damaged(kind, good[kind], Path(folder) / "bad", rng)
            text = readers[family(kind)](path)
            if text in counts[kind]:
                counts[kind][text] += 1
            else:
                failures.append((kind, [seed, i], text))
                if keep:
                    keep_case(Path(folder) / "bad", Path(keep), kind, seed, i, text)
            i += 1
    return counts, failures


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--minutes", type=float)
    ap.add_argument("--cases", type=int)
    ap.add_argument("--seed", type=int, default=int(time.time()))
    ap.add_argument(
        "--keep", type=Path, default=Path("_bench/fuzz"), help="folder for the files that failed"
    )
    ap.add_argument("--replay", type=int, help="number of one case of --seed, as in seeds.csv")
    ap.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    a = ap.parse_args()
    if not (a.minutes or a.cases or a.replay is not None):
        a.minutes = 5
    counts, failures = run(a.seed, a.cases, a.minutes, a.keep, a.kinds, a.replay)
    print(json.dumps(dict(seed=a.seed, counts=counts, failures=len(failures)), indent=1))
    for kind, which, text in failures:
        print(f"\n{kind} {which}\n{text}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
