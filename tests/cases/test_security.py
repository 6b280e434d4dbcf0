"""What SECURITY.md promises, each line with a test."""

import ast
import re
import stat
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from small_files import chest, put, small_scan, write_header_and_raw

import covid_ct
from covid_ct.cli import main
from covid_ct.cohort.table import check_cohort, read_cohort
from covid_ct.io.archive import unzip
from covid_ct.io.dicom import write_series
from covid_ct.io.read import read, write_scan
from covid_ct.scan import CohortError, ReadError

ROOT = Path(__file__).resolve().parents[2]
LIB = Path(covid_ct.__file__).parent
EVIL = '<script>alert(1)</script>'


def test_the_page_names_tests_that_exist():
    page = (ROOT / 'SECURITY.md').read_text('utf-8')
    named = re.findall(r'`(tests/[\w/]+\.py)::(test_\w+)`', page)
    assert len(named) >= 12
    for file, test in named:
        assert f'def {test}(' in (ROOT / file).read_text('utf-8'), f'{file}::{test}'


# archives


def zipped(path, name, mode=0):
    with zipfile.ZipFile(path, 'w') as z:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        z.writestr(info, b'../../../target')
    return path


@pytest.mark.parametrize(
    'name, mode',
    [
        ('../out.nii.gz', 0),
        ('a/../../out.nii.gz', 0),
        ('/out.nii.gz', 0),
        ('C:/out.nii.gz', 0),
        ('a\\..\\out.nii.gz', 0),
        ('link.nii.gz', stat.S_IFLNK | 0o777),
        ('device', stat.S_IFCHR | 0o600),
    ],
)
def test_an_archive_stays_in_its_folder(tmp_path, name, mode):
    path = zipped(tmp_path / 'x.zip', name, mode)
    for use in (read, lambda p: unzip(p, tmp_path / 'deep' / 'out')):
        with pytest.raises(ReadError, match='member'):
            use(path)
    kept = {p.name for p in tmp_path.rglob('*') if p.is_file()}
    assert kept == {'x.zip'}


def test_an_archive_that_grows_without_limit_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('a.nii', bytes(2**27))
    with pytest.raises(ReadError, match='grow more than'):
        read(tmp_path / 'x.zip')


# names, links, tables


def test_a_header_does_not_point_out_of_its_folder(tmp_path):
    path = write_header_and_raw(small_scan(), tmp_path)
    for name in (b'../a.raw', b'/etc/passwd', b'x/../../a.raw'):
        bad = tmp_path / 'bad.mhd'
        bad.write_bytes(path.read_bytes().replace(b'a.raw', name))
        with pytest.raises(ReadError, match='outside its folder'):
            read(bad)


@pytest.mark.parametrize('text', ['=1+1', '+cmd|x', '@SUM(A1)', '-2+3', '\tx'])
@pytest.mark.parametrize('column', ['patient_id', 'scan_id', 'path'])
def test_a_formula_is_no_name(tmp_path, text, column):
    (tmp_path / text).write_text('x')
    row = dict(patient_id='P', scan_id='S', label='covid', path='P') | {column: text}
    with pytest.raises(CohortError, match='formula'):
        check_cohort(pd.DataFrame([row]), tmp_path)


def test_a_negative_number_is_no_formula(tmp_path):
    (tmp_path / '-12').write_text('x')
    (tmp_path / 'c.csv').write_text('patient_id,scan_id,label,path\n-3,-1.5,covid,-12\n')
    assert read_cohort(tmp_path / 'c.csv').patient_id[0] == '-3'


def test_names_and_tags_do_not_become_markup(tmp_path, capsys):
    page, scan = tmp_path / 'r.html', chest()
    tags = put(SeriesDescription=EVIL, ConvolutionKernel=EVIL[:16], RescaleType=EVIL[:16])
    write_series(scan, tmp_path / 'dicom', tags)
    write_scan(scan, tmp_path / f'{EVIL[:8]}.nii.gz')
    for path in (tmp_path / 'dicom', tmp_path / f'{EVIL[:8]}.nii.gz'):
        assert main(['inspect', str(path), '--report', str(page)]) == 0
        text = page.read_text('utf-8')
        assert 'alert(1)' not in text and f'{EVIL[:8]}alert' not in text
        assert f'{EVIL[:8]}.nii' not in text
        capsys.readouterr()


# code in data


def test_nothing_is_loaded_by_pickle():
    odd = []
    for module in sorted(LIB.rglob('*.py')):
        for node in ast.walk(ast.parse(module.read_text('utf-8'))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, 'module', '') or '']
                odd += [f'{module.name}: {n}' for n in names if n.split('.')[0] == 'pickle']
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == 'np.load' and given.get('allow_pickle') != 'False':
                odd.append(f'{module.name}: np.load')
            if name == 'torch.load' and given.get('weights_only') != 'True':
                odd.append(f'{module.name}: torch.load')
            if name in ('eval', 'exec', 'os.system', 'yaml.load'):
                odd.append(f'{module.name}: {name}')
    assert odd == []


def test_text_that_is_no_number_is_not_repeated(tmp_path):
    "A header that cannot be read may hold a name where a number should be"
    folder = write_series(small_scan(), tmp_path / 'x')
    for p in folder.iterdir():
        p.write_bytes(p.read_bytes().replace(b'0.8\\0.7', b'Doe\\Jan'))
    with pytest.raises(ReadError) as e:
        read(folder)
    assert 'Doe' not in str(e.value) and 'PixelSpacing' in str(e.value)
