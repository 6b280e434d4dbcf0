"""Tables in every usual dialect and encoding, names of any bytes in a cohort, changed inputs: cases
01, 04 and 16."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_files import small_scan, write_header_and_raw, write_nifti
from toys import PREP

from covid_ct.audit.audit import audit
from covid_ct.cohort.adapters import open_cohort
from covid_ct.cohort.table import read_cohort, write_cohort
from covid_ct.io.dicom import write_series
from covid_ct.preprocess.cache import prepare
from covid_ct.scan import CohortError

TEXT = 'patient_id,scan_id,label,path,infection_ratio,note\n患,S,covid,a.nii,0.25,"x, y"\n'
LATIN = TEXT.replace('患', 'Müller')


@pytest.mark.parametrize(
    'raw, said',
    [
        (TEXT.encode(), ''),
        (TEXT.encode('utf-8-sig'), ''),
        (TEXT.encode('gbk'), 'gb18030'),
        (TEXT.encode('utf-16'), 'utf-16'),
        (LATIN.encode('cp1252'), 'cp1252'),
        (TEXT.replace('0.25', '0#25').replace(',', ';').replace('#', ',').encode(), 'semicolons'),
        (TEXT.replace(',', '\t').encode(), 'tabs'),
        (TEXT.replace(',', ' , ').encode(), ''),
    ],
    ids='utf8 bom gbk utf16 cp1252 semicolons tabs padded'.split(),
)
def test_dialects_and_encodings(tmp_path, raw, said):
    write_nifti(small_scan(), tmp_path / 'a.nii')
    (tmp_path / 'c.csv').write_bytes(raw)
    df = read_cohort(tmp_path / 'c.csv')
    assert df.patient_id[0] in ('患', 'Müller') and df.infection_ratio[0] == 0.25
    assert df.scan_id[0] == 'S' and said in ' '.join(df.attrs['notes'])
    assert bool(df.attrs['notes']) == bool(said)


def test_what_is_no_table_is_named(tmp_path):
    csv = tmp_path / 'c.csv'
    for raw in (b'\x89PNG\0\0\0', b'', b'a,b\n1,2\n'):
        csv.write_bytes(raw)
        with pytest.raises(CohortError) as e:
            read_cohort(csv)
        assert e.value.source == str(csv) and e.value.remedy


@pytest.mark.skipif(sys.platform != 'linux', reason='names of any bytes')
def test_a_cohort_with_a_name_that_is_no_text(tmp_path):
    "One file has a Latin-1 name and one is broken: all others are read, the table says which"
    for label, patient in (('covid', b'P\xe9'), ('cap', b'P1'), ('healthy', b'P2')):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), label.encode(), patient)))
        folder.mkdir(parents=True)
        write_nifti(small_scan(), folder / 'a.nii.gz')
    (tmp_path / 'cap' / 'P1' / 'b.nii.gz').write_bytes(b'broken')
    cohort = open_cohort(tmp_path)
    found = audit(cohort, progress=False, n=20)
    assert found.facts.error.ne('').sum() == 1
    found.report(tmp_path / 'r.html')
    done = prepare(cohort, PREP, tmp_path / 'cache', jobs=1, progress=False)
    assert done.made == 3 and len(done.failures) == 1
    table = read_cohort(write_cohort(cohort, tmp_path / 'c.csv'), tmp_path)
    assert list(table.path) == list(cohort.path)


# a cache that notices


@pytest.mark.parametrize('layout', ['nested', 'header', 'link', 'zip'])
def test_a_changed_input_is_prepared_again(tmp_path, layout):
    def write(scan):
        if layout == 'nested':
            write_series(scan, tmp_path / 'x' / 'DICOM' / 'deep')
            return 'x'
        if layout == 'zip':
            write_series(scan, tmp_path / 'in')
            shutil.make_archive(str(tmp_path / 'x'), 'zip', tmp_path / 'in')
            return 'x.zip'
        path = write_header_and_raw(scan, tmp_path)
        if layout == 'link' and not (tmp_path / 'link.mhd').exists():
            (tmp_path / 'link.mhd').symlink_to(path)
        return 'link.mhd' if layout == 'link' else path.name

    first, counts, path = small_scan(), [], ''
    second = first.replace(voxels=np.where(first.voxels > 0, 100, first.voxels))
    for scan in (first, None, second):
        path = write(scan) if scan is not None else path
        table = pd.DataFrame([dict(patient_id='P', scan_id='S', label='covid', path=path)])
        done = prepare(table, PREP, tmp_path / 'cache', jobs=1, progress=False, root=tmp_path)
        assert done.failures.empty, done.failures
        counts.append((done.made, done.found))
    assert counts == [(1, 0), (0, 1), (1, 0)]
