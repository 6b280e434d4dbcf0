"""What commands do to files and say of errors: cases 07, 08, 10, 16 and 17, empty names, JSON."""

import argparse
import ast
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from small_files import chest, numbered, put, small_scan, write_header_and_raw, write_nifti

import covid_ct
from covid_ct.cli import _check, _show_facts, main, parser
from covid_ct.io.dicom import write_series
from covid_ct.io.read import read, write_mask, write_scan
from covid_ct.scan import DataError, WriteError
from covid_ct.widgets.terminal import options_of

LIB = Path(covid_ct.__file__).parent
READS = ('inspect', 'lungs', 'segment', 'predict', 'explain', 'burden', 'audit', 'prepare', 'train')
READS += ('evaluate', 'cases')


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def state(folder):
    return {p: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Scans of several formats, masks, a cohort, links"
    d, scan = tmp_path_factory.mktemp('commands'), small_scan()
    write_scan(scan, d / 'scan.nii.gz')
    write_mask(scan.voxels > 0, scan, d / 'lesions.nii.gz')
    write_mask(scan.voxels > 0, scan, d / 'lobes.nii.gz')
    write_series(scan, d / 'series', name='{k}.html')  # a slice may have any name
    write_header_and_raw(scan, d)
    header = (d / 'a.mhd').read_bytes()
    (d / 'voxels.mha').write_bytes((d / 'a.raw').read_bytes())
    (d / 'b.mhd').write_bytes(header.replace(b'a.raw', b'voxels.mha'))
    (d / 'link.nii.gz').symlink_to(d / 'scan.nii.gz')
    (d / 'folder').symlink_to(d)
    os.link(d / 'scan.nii.gz', d / 'hard.nii.gz')
    os.link(d / 'scan.nii.gz', d / 'told.csv')
    (d / 'c.csv').write_text('patient_id,scan_id,label,path\nP,S,covid,told.csv\n')
    return d


INPUTS = [
    'lungs scan.nii.gz scan.nii.gz --overwrite',
    'lungs scan.nii.gz link.nii.gz --overwrite',
    'lungs link.nii.gz scan.nii.gz --overwrite',
    'lungs scan.nii.gz hard.nii.gz --overwrite',
    'lungs scan.nii.gz ./folder/scan.nii.gz --overwrite',
    'lungs b.mhd voxels.mha --overwrite',
    'explain scan.nii.gz --run . --out scan.nii.gz --overwrite',
    'inspect series --report series/3.html',
    'inspect series/3.html --report series/3.html',
    'burden scan.nii.gz --lesions lesions.nii.gz --lobes lobes.nii.gz --report lobes.nii.gz',
    'evaluate c.csv --run . --out told.csv',
    'evaluate c.csv --run . --out c.csv',
    'prepare series series',
    'train series series',
]


@pytest.mark.parametrize('line', INPUTS)
def test_no_command_writes_onto_what_it_reads(capsys, work, monkeypatch, line):
    monkeypatch.chdir(work)
    before = state(work)
    code, out, err = run(capsys, *line.split())
    assert code == 2 and not out and err.count('\n') == 1 and 'overwritten' in err, err
    assert state(work) == before


def test_no_function_writes_onto_the_source_of_its_scan(work):
    scan = read(work / 'b.mhd')
    with pytest.raises(WriteError, match='a part of what is read'):
        write_mask(scan.voxels > 0, scan, work / 'voxels.mha', overwrite=True)


# outputs that cannot be made


@pytest.mark.parametrize(
    'line',
    [
        'inspect scan.nii.gz --report series',
        'inspect scan.nii.gz --report /proc/x.html',
        'lungs scan.nii.gz /proc/x.nii.gz',
        'burden scan.nii.gz --lesions lesions.nii.gz --report series',
        'prepare c.csv c.csv',
        'evaluate c.csv --run . --out scan.nii.gz',
        'cases . --html series',
        'export . series',
        'audit c.csv --jobs 0',
        'prepare c.csv out --jobs 0',
        'train c.csv out --workers -1',
    ],
)
def test_an_untyped_error_is_none(capsys, work, monkeypatch, line):
    monkeypatch.chdir(work)
    before = state(work)
    code, out, err = run(capsys, *line.split())
    assert code == 2 and not out and err.count('\n') == 1 and state(work) == before
    code, out, err = run(capsys, *line.split(), '--json')
    error = json.loads(err)['error']
    assert code == 2 and not out and set(error) == {'file', 'fault', 'remedy'}
    assert error['file'] and error['fault'] and error['remedy']


@pytest.mark.parametrize('line', ["inspect ''", "lungs scan.nii.gz ''", "inspect ' '"])
def test_an_empty_name_is_refused(capsys, work, monkeypatch, line):
    monkeypatch.chdir(work)
    argv = [w.strip("'") for w in re.findall(r"'[^']*'|\S+", line)]
    code, out, err = run(capsys, *argv)
    assert code == 2 and 'is empty' in err and not out
    with pytest.raises(DataError, match='empty'):
        read('')


# JSON, help and lists


def test_every_command_speaks_json():
    sub = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    lacking = [c for c in sub.choices if '--json' not in options_of(parser(), c)]
    assert lacking == []


def test_help_lists_the_recipes(capsys):
    for command in ('train', 'prepare'):
        with pytest.raises(SystemExit):
            main([command, '--help'])
        told = ' '.join(capsys.readouterr().out.split())
        assert 'darnet/paper' in told and 'prior_attention/tiny' in told


def test_a_list_of_series_says_why_one_cannot_be_read():
    row = dict(index=0, slices=3, description='chest', kernel='B', readable=True, why_not='')
    rows = [row, row | dict(index=1, readable=False, why_not='slices of several pixel sizes')]
    text = _show_facts(dict(shape=None, series=rows, warnings=[]))
    assert 'several pixel sizes' in text.splitlines()[1] and 'cannot' not in text.splitlines()[0]


def test_a_series_of_a_file_has_no_effect_and_that_is_said(capsys, work):
    code, out, _ = run(capsys, 'inspect', work / 'scan.nii.gz', '--series', '3')
    assert code == 0 and 'series has no effect' in out


def test_a_zip_is_read(capsys, tmp_path):
    import shutil

    scan = small_scan()
    write_series(scan, tmp_path / 'in' / 'S1')
    shutil.make_archive(str(tmp_path / 'x'), 'zip', tmp_path / 'in')
    assert np.array_equal(read(tmp_path / 'x.zip').voxels, scan.voxels)
    shutil.make_archive(str(tmp_path / 'y'), 'gztar', tmp_path / 'in')
    code, _, err = run(capsys, 'inspect', tmp_path / 'y.tar.gz')
    assert code == 2 and 'Unpack it' in err


def test_a_name_of_a_person_is_not_repeated(capsys, tmp_path):
    folder = tmp_path / 'Plantedname_Jane'
    folder.mkdir()
    path, page = write_scan(chest(), folder / 'Plantedname.nii.gz'), tmp_path / 'r.html'
    write_series(small_scan(), folder / 'Plantedname')
    for argv in (('inspect', path), ('inspect', folder / 'Plantedname')):
        code, out, err = run(capsys, *argv, '--json', '--report', page)
        assert code == 0 and 'Planted' not in out + err + page.read_text('utf-8')
        assert re.fullmatch('[0-9a-f]{8}', json.loads(out)['scan_id'])
    lungs = folder / 'Plantedname_lungs.nii.gz'
    out = json.loads(run(capsys, 'lungs', path, lungs, '--json')[1])
    assert out['file'] == lungs.name  # as asked for, without its folder


# remedies


def texts(module):
    "All texts of a module, joined where a call or a bracket joins them"
    for node in ast.walk(ast.parse(module.read_text('utf-8'))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, f'{module.name}:{node.lineno}'
        if isinstance(node, ast.JoinedStr):
            parts = [v.value for v in node.values if isinstance(v, ast.Constant)]
            yield ''.join(map(str, parts)), f'{module.name}:{node.lineno}'


def remedies():
    "Options that messages of the package recommend, and where"
    found = {}
    for module in sorted(LIB.rglob('*.py')):
        for text, where in texts(module):
            if 'on the command line' in text:
                for option in re.findall(r'(?<![\w-])--[a-z][\w-]*', text):
                    found.setdefault(option, []).append(where)
    return found


# option → how it is tried; those of training are tried where training is tested
TRIED = {'--tilt', '--allow-unknown-geometry', '--overwrite', '--series', '--acquisition'}
ELSEWHERE = {'--masks', '--set', '--unchecked', '--batch-size', '--recompute'}


def test_every_remedy_is_tried():
    found = remedies()
    assert TRIED <= set(found) and set(found) <= TRIED | ELSEWHERE, found
    for c in READS:
        options = options_of(parser(), c)
        assert {'--tilt', '--allow-unknown-geometry', '--acquisition', '--units'} <= options, c


def lean(d, k):
    cos, sin = float(np.cos(np.radians(15))), float(np.sin(np.radians(15)))
    d.ImageOrientationPatient = [1, 0, 0, 0, cos, -sin]


def several(scan, folder):
    write_series(scan, folder, put(ConvolutionKernel='A'), name='A{k}')
    sharp = scan.replace(scan_id='sharp')
    return write_series(sharp, folder, put(ConvolutionKernel='B'), name='B{k}')


def phases(scan, folder):
    write_series(scan, folder, numbered(1), name='A{k}')
    return write_series(scan, folder, numbered(2, 1.0), name='B{k}')


FAULTS = {
    '--tilt correct': lambda scan, p: write_series(scan, p, lean),
    '--allow-unknown-geometry': lambda scan, p: write_nifti(
        scan, p.with_suffix('.nii'), pixdim=(1, 1, 1)
    ),
    '--series 0': several,
    '--acquisition 2': phases,
}


@pytest.mark.parametrize('option', FAULTS)
def test_a_remedy_helps(capsys, tmp_path, option):
    "The option that a message names is the one that helps, for a scan and for a cohort"
    path = FAULTS[option](small_scan(), tmp_path / 'x')
    code, _, err = run(capsys, 'inspect', path)
    if option.startswith('--series'):
        assert code == 0
        err = str(pytest.raises(DataError, read, path).value)
    else:
        assert code == 2
    assert option.split()[0] in err
    code, out, err = run(capsys, 'inspect', path, *option.split())
    assert code == 0, err
    assert 'shape' in out


def test_a_cohort_takes_the_same_choices(tmp_path):
    from covid_ct.cohort.table import load_row, read_cohort

    scan = small_scan()
    phases(scan, tmp_path / 'phases')
    several(scan, tmp_path / 'several')
    text = 'patient_id,scan_id,label,path,acquisition,series\n'
    text += 'P,a,covid,phases,2,\nQ,b,covid,several,,1\n'
    (tmp_path / 'c.csv').write_text(text)
    cohort = read_cohort(tmp_path / 'c.csv')
    for row in cohort.to_dict('records'):
        assert np.array_equal(load_row(row, tmp_path).voxels, scan.voxels)


def test_an_overwrite_is_asked_for(capsys, tmp_path):
    path = write_scan(chest(), tmp_path / 'a.nii.gz')
    assert run(capsys, 'lungs', path, tmp_path / 'm.nii.gz')[0] == 0
    code, _, err = run(capsys, 'lungs', path, tmp_path / 'm.nii.gz')
    assert code == 2 and '--overwrite' in err
    assert run(capsys, 'lungs', path, tmp_path / 'm.nii.gz', '--overwrite')[0] == 0


def test_the_check_alone_reads_nothing_where_nothing_is_there(tmp_path):
    "A large cohort is not opened to check a page that does not exist yet"
    args = argparse.Namespace(
        command='audit', path=str(tmp_path / 'none.csv'), report=str(tmp_path / 'r.html')
    )
    args.outputs = dict(report='page')
    _check(args)
