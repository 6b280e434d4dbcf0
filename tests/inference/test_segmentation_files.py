"Lesions as files: read back voxel for voxel, names and geometry, identifiers, bad input"

import builtins
import json
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from covid_ct.inference.segmentation_files import (
    LESION_SEGMENTS,
    MissingExtraError,
    check_segmentation,
    facts_path,
    segmentation_facts,
    slicer_fields,
    write_dicom_seg,
    write_seg_nrrd,
    write_segmentation,
)
from covid_ct.io.dicom import write_series
from covid_ct.io.dicom_header import PERSON_TAGS
from covid_ct.io.read import read, read_mask, write_scan
from covid_ct.phantom.chest import make_phantom
from covid_ct.scan import DataError, GeometryError, ReadError, VoxelError

CARD = dict(version="7", sha256="ab" * 32, licence="CC0")
NUMBERS = np.array([0, 1, 2, 4], "u1")


@pytest.fixture(scope="module")
def phantom():
    return make_phantom("covid", seed=0, shape=(20, 40, 44))


@pytest.fixture(scope="module")
def classes(phantom):
    "Labels without any symmetry, each class somewhere else"
    out = np.zeros(phantom.scan.shape, "u1")
    out[2:5, 3:9, 5:20], out[7, 8:12, 30:33], out[15:18, 20, 2:4] = 1, 2, 3
    return out


def with_tags(header, k):
    "Slices under names of another order, with a person in the header"
    header.PatientName, header.PatientBirthDate = "Test^Person", "19700101"
    header.FrameOfReferenceUID = "1.2.826.7"
    header.OperatorsName = "Somebody^Else"


@pytest.fixture(scope="module")
def series(phantom, tmp_path_factory):
    d = tmp_path_factory.mktemp("seg") / "series"
    write_series(phantom.scan, d, with_tags, name="x{k}")
    order = np.random.default_rng(1).permutation(phantom.scan.shape[0])
    for k, j in enumerate(order):
        (d / f"x{k + 1}").rename(d / f"IM{j + 1}")
    return d


def put_back(path, scan):
    "Classes of a DICOM segmentation: each frame at the place that its own header names"
    d = pydicom.dcmread(path)
    shared = d.SharedFunctionalGroupsSequence[0]
    axes = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert np.allclose(axes, [1, 0, 0, 0, 1, 0])
    assert np.allclose(shared.PixelMeasuresSequence[0].PixelSpacing, scan.spacing[1:])
    found = np.zeros(scan.shape, "u1")
    for frame, group in zip(d.pixel_array, d.PerFrameFunctionalGroupsSequence, strict=True):
        at = group.PlanePositionSequence[0].ImagePositionPatient
        index = scan.grid.to_index([float(x) for x in at[::-1]])
        k = round(float(index[0]))
        assert np.allclose(index, (k, 0, 0), atol=1e-3)
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert not found[k][frame > 0].any()
        found[k][frame > 0] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        yield k, str(source)
    yield d, found


@pytest.mark.parametrize("code", ["LPS", "RAS", "SPL"])
def test_slicer_reads_names_colours_extents_and_voxels(code, phantom, classes, tmp_path):
    scan = phantom.scan.replace(stored_as=code)
    path = write_seg_nrrd(classes, scan, tmp_path / "a.b.seg.nrrd", about=dict(weights="7"))
    image = sitk.ReadImage(str(path))
    stored, keys = sitk.GetArrayFromImage(image), image.GetMetaDataKeys()
    assert image.GetMetaData("Segmentation_MasterRepresentation") == "Binary labelmap"
    assert image.GetMetaData("weights") == "7" and "Segment3_Name" not in keys
    for i, s in enumerate(LESION_SEGMENTS):
        told = {k: image.GetMetaData(f"Segment{i}_{k}") for k in ("Name", "Color", "LabelValue")}
        assert told["Name"] == s.name and int(told["LabelValue"]) == s.value
        assert np.allclose([float(c) for c in told["Color"].split()], s.colour)
        at = np.argwhere(stored == s.value)
        ends = np.stack([at.min(0), at.max(0)], 1)[::-1]
        want = ends.ravel().tolist()
        assert [int(v) for v in image.GetMetaData(f"Segment{i}_Extent").split()] == want
        assert "^".join(s.code) in image.GetMetaData(f"Segment{i}_Tags")
    assert np.array_equal(read_mask(path, scan), NUMBERS[classes])
    # the header is text that Slicer reads line by line
    head = path.read_bytes().split(b"\n\n")[0].decode("ascii")
    assert head.startswith("NRRD") and "Segment1_Name:=consolidation" in head


def test_an_empty_segment_has_an_empty_extent():
    fields = slicer_fields(np.zeros((2, 3, 4), "u1"))
    assert {fields[f"Segment{i}_Extent"] for i in range(3)} == {"0 -1 0 -1 0 -1"}


def test_dicom_seg_voxel_for_voxel(series, classes, tmp_path):
    scan = read(series)
    path = write_dicom_seg(classes, scan, tmp_path / "a.dcm", card=CARD)
    *frames, (d, found) = put_back(path, scan)
    assert np.array_equal(found, classes) and len(frames) == 3 + 1 + 3
    headers = [pydicom.dcmread(f, stop_before_pixels=True) for f in series.iterdir()]
    of_slice = {str(h.SOPInstanceUID): float(h.ImagePositionPatient[2]) for h in headers}
    step, low = scan.spacing[0], scan.origin[0]
    assert all(of_slice[uid] == pytest.approx(low + k * step, abs=1e-3) for k, uid in frames)
    assert d.StudyInstanceUID == headers[0].StudyInstanceUID and d.Modality == "SEG"
    assert d.ReferencedSeriesSequence[0].SeriesInstanceUID == headers[0].SeriesInstanceUID
    assert d.SeriesInstanceUID != headers[0].SeriesInstanceUID
    assert d.FrameOfReferenceUID == "1.2.826.7"
    one = d.SegmentSequence[1]
    assert [s.SegmentLabel for s in d.SegmentSequence] == [s.name for s in LESION_SEGMENTS]
    assert one.SegmentedPropertyTypeCodeSequence[0].CodeValue == "95436008"
    algorithm = one.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmVersion == "7" and CARD["sha256"] in algorithm.AlgorithmParameters


def texts(d):
    "All values of a dataset and its sequences, by keyword"
    for e in d.iterall():
        if e.VR not in ("SQ", "OB", "OW") and str(e.value or ""):
            yield e.keyword, str(e.value)


def test_dicom_seg_says_no_more_about_a_person_than_its_source(series, classes, tmp_path):
    d = pydicom.dcmread(write_dicom_seg(classes, read(series), tmp_path / "a.dcm"))
    source = pydicom.dcmread(next(series.iterdir()), stop_before_pixels=True)
    person = {*PERSON_TAGS, "PatientSex", "PatientAge", "StudyDate", "StudyTime", "StudyID"}
    for keyword, value in texts(d):
        if keyword in person - {"StationName"}:
            assert value == str(source.get(keyword)), keyword
    assert d.PatientName == "Test^Person" and "OperatorsName" not in d
    for f in series.iterdir():  # and without a name there is none
        bare = pydicom.dcmread(f)
        del bare.PatientName, bare.PatientBirthDate, bare.OperatorsName, bare.FrameOfReferenceUID
        bare.PatientID = ""
        (tmp_path / "bare").mkdir(exist_ok=True)
        bare.save_as(tmp_path / "bare" / f.name)
    scan = read(tmp_path / "bare")
    path = write_dicom_seg(classes, scan, tmp_path / "b.dcm")
    *_, (d, found) = put_back(path, scan)
    assert np.array_equal(found, classes) and not {k for k, _ in texts(d)} & person


def test_one_of_two_series_and_the_wrong_one(phantom, series, classes, tmp_path):
    write_series(phantom.scan.replace(scan_id="two", origin=(9.0, 0, 0)), tmp_path / "b" / "two")
    for f in series.iterdir():
        (tmp_path / "b" / f.name).write_bytes(f.read_bytes())
    scan = read(tmp_path / "b", series=read(series).scan_id)
    path = write_dicom_seg(classes, scan, tmp_path / "a.dcm")
    *_, (d, found) = put_back(path, scan)
    uid = pydicom.dcmread(next(series.iterdir())).SeriesInstanceUID
    assert np.array_equal(found, classes)
    assert d.ReferencedSeriesSequence[0].SeriesInstanceUID == uid
    with pytest.raises(GeometryError, match="not the series of this scan"):
        write_dicom_seg(classes, scan, tmp_path / "c.dcm", source=tmp_path / "b" / "two")
    assert not (tmp_path / "c.dcm").exists()


def test_no_series_no_dicom(phantom, series, classes, tmp_path):
    nii = write_scan(phantom.scan, tmp_path / "chest.nii.gz")
    for source in (nii, tmp_path / "gone", None):
        with pytest.raises(ReadError) as e:
            write_dicom_seg(classes, phantom.scan.replace(source=str(source or "")), "x.dcm")
        assert ".seg.nrrd" in e.value.remedy
    with pytest.raises(ReadError, match="no DICOM series"):
        check_segmentation(tmp_path / "a.dcm", nii)
    first = pydicom.dcmread(next(series.iterdir()))
    del first.SOPInstanceUID
    (tmp_path / "s").mkdir()
    for f in series.iterdir():
        (tmp_path / "s" / f.name).write_bytes(f.read_bytes())
    first.save_as(tmp_path / "s" / next(series.iterdir()).name)
    for f in (tmp_path / "s").iterdir():
        bare = pydicom.dcmread(f)
        del bare.StudyInstanceUID
        bare.save_as(f)
    with pytest.raises(ReadError, match="StudyInstanceUID"):  # before the work
        check_segmentation(tmp_path / "b.dcm", tmp_path / "s")
    with pytest.raises(ReadError, match="StudyInstanceUID"):
        write_dicom_seg(classes, read(tmp_path / "s"), tmp_path / "b.dcm")


def test_the_missing_extra_is_named(monkeypatch, series, classes, tmp_path):
    whole = builtins.__import__
    monkeypatch.setattr(
        "covid_ct.inference.segmentation_files.importlib.import_module",
        lambda name: whole("no_such_library_of_this_name"),
    )
    for call in (
        lambda: check_segmentation(tmp_path / "a.dcm"),
        lambda: write_dicom_seg(classes, read(series), tmp_path / "a.dcm"),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install covid_ct\[seg\]"):
            call()
    check_segmentation(tmp_path / "a.seg.nrrd")  # needs no extra
    assert not list(tmp_path.iterdir())


def test_by_ending_with_the_facts_beside_it(series, classes, tmp_path):
    scan = read(series)
    found = SimpleNamespace(labels=classes, card=CARD, warnings=["Odd."])
    for name in ("a.nii.gz", "a.b.seg.nrrd", "c.dcm"):
        path = write_segmentation(found, scan, tmp_path / name)
        facts = json.loads(facts_path(path).read_text("utf-8"))
        assert facts["weights"] == CARD and facts["warnings"] == ["Odd."]
        assert "not for clinical use" in facts["use"]
        with pytest.raises(DataError, match="exists already"):
            write_segmentation(found, scan, path)
        write_segmentation(found, scan, path, overwrite=True)
    assert {p.name for p in tmp_path.glob("*.json")} == {"a.json", "a.b.json", "c.json"}
    assert np.array_equal(read_mask(tmp_path / "a.nii.gz", scan), NUMBERS[classes])
    ml = {s["name"]: s["volume_ml"] for s in segmentation_facts(classes, scan)["segments"]}
    assert ml["ground glass"] == pytest.approx((classes == 1).sum() * scan.grid.voxel_ml, abs=1e-3)
    unknown = segmentation_facts(classes, scan.replace(geometry_known=False))
    assert {s["volume_ml"] for s in unknown["segments"]} == {None}


@pytest.mark.parametrize("name", ["a.png", "a", "a.seg", "seg.nrrd.txt"])
def test_other_endings_are_refused(name, phantom, classes, tmp_path):
    with pytest.raises(DataError, match="no ending that is written here"):
        write_segmentation(classes, phantom.scan, tmp_path / name)


@pytest.mark.parametrize("bad", [np.full((20, 40, 44), 4, "u1"), np.zeros((20, 40, 44), "f4")])
def test_other_labels_are_refused(bad, phantom, tmp_path):
    with pytest.raises(VoxelError, match="whole numbers"):
        write_segmentation(bad, phantom.scan, tmp_path / "a.seg.nrrd")
    with pytest.raises(GeometryError):
        write_segmentation(np.zeros((3, 4, 5), "u1"), phantom.scan, tmp_path / "a.seg.nrrd")
    assert not list(tmp_path.iterdir())


@pytest.mark.data
def test_a_real_series(data_dir, tmp_path):
    "Compressed slices of a real scan, in an order that their names do not follow"
    folder = data_dir / "covid_ct_md" / "P001"
    few = tmp_path / "few"
    few.mkdir()
    headers = {f: pydicom.dcmread(f, stop_before_pixels=True) for f in folder.iterdir()}
    by_height = sorted(headers, key=lambda f: float(headers[f].ImagePositionPatient[2]))
    for f in by_height[60:72]:
        (few / f.name).write_bytes(f.read_bytes())
    scan = read(few)
    classes = np.zeros(scan.shape, "u1")
    classes[(scan.voxels > -700) & (scan.voxels < -300)] = 1
    classes[3, 100:300, 50:200] = 2
    *_, (_, found) = put_back(write_dicom_seg(classes, scan, tmp_path / "a.dcm"), scan)
    assert np.array_equal(found, classes) and (classes == 1).sum() > 10_000
