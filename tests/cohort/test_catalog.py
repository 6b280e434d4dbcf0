"Cohort tables: the schema, folders, phantoms on disk, rows that load"

import numpy as np
import pandas as pd
import pytest

from covid_ct.cohort.table import (
    check_cohort,
    cohort_from_folder,
    load_mask,
    load_row,
    read_cohort,
    write_cohort,
)
from covid_ct.io.dicom import write_series
from covid_ct.phantom import cohort as phantoms
from covid_ct.phantom.cohort import phantom_cohort, phantom_of, write_phantom_cohort
from covid_ct.scan import CohortError, GeometryError, ReadError

SHAPE = (16, 40, 40)


@pytest.fixture
def table(tmp_path):
    for n in 'abc':
        (tmp_path / f'{n}.nii.gz').touch()
    return pd.DataFrame(
        dict(
            patient_id=['P1', 'P1', 'P2'],
            scan_id=list('abc'),
            label=['covid', 'covid', 'cap'],
            path=[f'{n}.nii.gz' for n in 'abc'],
        )
    )


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp('phantoms')
    asked = phantom_cohort(4, seed=3)
    return out, asked, write_phantom_cohort(out, asked, shape=SHAPE, progress=False)


def test_good_table_passes_and_is_a_copy(table, tmp_path):
    df = check_cohort(table.assign(extra=1), tmp_path)
    assert (
        list(df.columns) == [*table.columns, 'extra']
        and df.attrs['root'] == str(tmp_path.resolve())
        and 'root' not in table.attrs
    )
    assert check_cohort(df).equals(df)  # the root travels along


@pytest.mark.parametrize(
    'change,words',
    [
        (
            dict(path=['a.nii.gz', 'x.nii.gz', 'c.nii.gz']),
            r'row 1 \(b\): path x.nii.gz does not exist',
        ),
        (dict(scan_id=['a', 'b', 'b']), r"rows \[1, 2\]: scan_id 'b' occurs 2 times"),
        (dict(label=['covid', 'covid', 'flu']), r"row 2 \(c\): unknown label 'flu'"),
        (dict(infection_ratio=[0.1, 1.5, 0]), r'row 1 \(b\): infection_ratio 1.5'),
        (dict(infection_ratio=[0.1, 0.2, -0.1]), 'row 2'),
        (dict(infection_ratio=['.1', 'much', '0']), r'row 1 \(b\): infection_ratio much'),
        (dict(patient_id=['P1', None, 'P2']), r'row 1 \(b\): patient_id is empty'),
        (dict(patient_id=['P1', 'P1', ' ']), 'row 2'),
        (dict(label=['covid', np.nan, 'cap']), 'row 1'),
        (dict(lung_mask=[None, 'a.nii.gz', 'gone.nii.gz']), r'row 2 \(c\): lung_mask gone.nii.gz'),
        (dict(path=['a.nii.gz', '', 'c.nii.gz']), r'row 1 \(b\): path is empty'),
    ],
)
def test_bad_rows_are_named(table, tmp_path, change, words):
    with pytest.raises(CohortError, match=words) as e:
        check_cohort(table.assign(**change), tmp_path)
    assert e.value.remedy


def test_bad_tables(table, tmp_path):
    with pytest.raises(CohortError, match='no column patient_id, label'):
        check_cohort(table.drop(columns=['patient_id', 'label']), tmp_path)
    with pytest.raises(CohortError, match='no rows'):
        check_cohort(table[:0], tmp_path)
    assert check_cohort(table.assign(label='flu'), tmp_path, labels=('flu',)) is not None
    with pytest.raises(CohortError, match='does not exist'):
        read_cohort(tmp_path / 'none.csv')
    (tmp_path / 'bad.csv').write_bytes(b'\xff\xfe\x00"a,\n')
    (tmp_path / 'empty.csv').touch()
    for n in ('bad.csv', 'empty.csv'):
        with pytest.raises(CohortError):
            read_cohort(tmp_path / n)


def test_csv_round_trip_keeps_zeros_and_roots(table, tmp_path):
    df = check_cohort(
        table.assign(
            patient_id=['007', '007', '010'],
            scan_id=['01', '02', '1'],
            lung_mask=['a.nii.gz', None, None],
            path=[str(tmp_path.resolve() / p) for p in table.path],
        ),
        tmp_path,
    )
    assert list(df.path) == list(table.path)
    back = read_cohort(write_cohort(df, tmp_path / 't.csv'))
    assert (
        list(back.scan_id) == ['01', '02', '1']
        and list(back.patient_id) == ['007', '007', '010']
        and pd.isna(back.lung_mask[1])
    )
    (tmp_path / 'sub').mkdir()
    (tmp_path / 't.csv').rename(tmp_path / 'sub' / 't.csv')
    with pytest.raises(CohortError, match='does not exist below'):
        read_cohort(tmp_path / 'sub' / 't.csv')
    assert len(read_cohort(tmp_path / 'sub' / 't.csv', root=tmp_path)) == 3


def test_phantoms_on_disk_are_the_phantoms(written):
    out, asked, df = written
    assert list(df.scan_id) == list(asked.scan_id) and not list(out.rglob('.*'))
    for r in df.to_dict('records'):
        p, s = phantom_of(r, shape=SHAPE), load_row(r, out)
        assert (
            np.array_equal(s.voxels, p.scan.voxels)
            and s.patient_id == r['patient_id']
            and s.scan_id == r['scan_id']
            and np.allclose(s.spacing, p.scan.spacing)
        )
        for c, m in dict(
            lung_mask=p.lungs, infection_mask=p.infection, lobe_mask=p.lobes, lesion_mask=p.lesions
        ).items():
            assert np.array_equal(load_mask(r, c, out, s), m)
        assert r['infection_ratio'] == pytest.approx(p.infection_ratio, abs=1e-6)


def test_writing_resumes_and_refuses_another(written):
    out, asked, df = written
    first, gone = out / df.path[0], out / df.lobe_mask[1]
    stamp = first.stat().st_mtime_ns
    gone.unlink()
    (out / 'cohort.csv').unlink()
    again = write_phantom_cohort(out, asked, shape=SHAPE, progress=False)
    assert (
        again.equals(df)
        and first.stat().st_mtime_ns == stamp
        and gone.exists()
        and (out / 'cohort.csv').exists()
    )
    with pytest.raises(CohortError, match='another'):
        write_phantom_cohort(out, asked, shape=(16, 40, 44), progress=False)
    with pytest.raises(CohortError, match='another'):
        write_phantom_cohort(out, asked[:2], shape=SHAPE, progress=False)


def test_killed_in_the_middle_leaves_no_half_file(tmp_path, monkeypatch):
    asked = phantom_cohort(2, seed=5)
    real, calls = phantoms.write_mask, []

    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*a, **k)

    monkeypatch.setattr(phantoms, 'write_mask', dies)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_cohort(tmp_path, asked, shape=SHAPE, progress=False)
    assert not (tmp_path / 'cohort.csv').exists()
    monkeypatch.undo()
    df = write_phantom_cohort(tmp_path, asked, shape=SHAPE, progress=False)
    assert all(
        np.array_equal(load_row(r, tmp_path).voxels, phantom_of(r, shape=SHAPE).scan.voxels)
        for r in df.to_dict('records')
    )


def test_generic_folder(written, tmp_path):
    out, asked, df = written
    found = cohort_from_folder(out).set_index('scan_id').loc[list(df.scan_id)]
    for c in ('patient_id', 'label', 'path', 'lung_mask', 'infection_mask', 'lobe_mask'):
        assert list(found[c]) == list(df[c])
    assert set(cohort_from_folder(out).attrs['left_out']) == {'cohort.csv', 'phantoms.json'}
    s = load_row(df.iloc[0], out)
    for n in ('1', '2'):
        write_series(s, tmp_path / 'NCP' / '7' / n)
    write_series(s, tmp_path / 'Normal' / '8' / '1')
    (tmp_path / 'NCP' / '7' / 'notes.txt').write_text('x')
    (tmp_path / 'NCP' / '7' / '3').mkdir()
    got = cohort_from_folder(tmp_path)
    assert (
        list(got.label) == ['covid', 'covid', 'healthy']
        and list(got.scan_id) == ['7-1', '2', '8-1']
        and got.patient_id.tolist() == ['7', '7', '8']
    )
    assert set(got.attrs['left_out']) == {'NCP/7/notes.txt', 'NCP/7/3'} and np.array_equal(
        load_row(got.iloc[2], tmp_path).voxels, s.voxels
    )
    (tmp_path / 'Flu').mkdir()
    with pytest.raises(CohortError, match="'Flu'"):
        cohort_from_folder(tmp_path)
    assert (
        len(
            cohort_from_folder(tmp_path, labels={'NCP': 'covid', 'Normal': 'healthy', 'Flu': 'cap'})
        )
        == 3
    )
    for bad in (tmp_path / 'none', tmp_path / 'Flu'):
        with pytest.raises(CohortError):
            cohort_from_folder(bad)


def test_rows_that_do_not_load(written):
    out, asked, df = written
    r = df.iloc[0]
    with pytest.raises(CohortError, match='no path'):
        load_row(asked.iloc[0])
    with pytest.raises(ReadError, match='does not exist'):
        load_row(r)
    with pytest.raises(CohortError, match='no liver_mask'):
        load_mask(r, 'liver_mask', out)
    with pytest.raises(GeometryError):
        load_mask(r, 'lung_mask', out, load_row(r, out).replace(origin=(0, 0, 0)))


def test_a_table_is_the_phantoms_again(written):
    out, asked, df = written
    back = read_cohort(out / 'cohort.csv')
    assert back.equals(df) and phantom_of(back.iloc[0], shape=SHAPE).label == df.label[0]
