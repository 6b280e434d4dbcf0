"""Public sets: archives that attack, labels that do not belong, every layout written and read back,
its faults"""

import functools
import hashlib
import http.server
import json
import os
import stat
import struct
import threading
import zipfile

import numpy as np
import pandas as pd
import pooch
import pytest
import SimpleITK as sitk
from PIL import Image

from covid_ct.cohort import adapters as public
from covid_ct.cohort import datasets as sets
from covid_ct.cohort.adapters import (
    ADAPTERS,
    _cc_ccii_tables,
    _lesion_slices,
    open_cohort,
    restore_hu,
)
from covid_ct.cohort.datasets import DATASETS, DatasetFacts, _fact_sheet, fetch
from covid_ct.cohort.splits import split_patients
from covid_ct.cohort.table import (
    LABELS,
    check_cohort,
    load_mask,
    load_row,
    override_axes,
    read_cohort,
    read_slice,
    write_cohort,
)
from covid_ct.io import archive
from covid_ct.io.archive import _bad_name, _check_members, open_archive, scans_in, unzip, unzip_part
from covid_ct.io.labels import (
    LESIONS,
    LOBE_CONVENTIONS,
    LOBES,
    MASK_CODES,
    convert_lobes,
    mask_values,
    recode,
)
from covid_ct.phantom import layouts
from covid_ct.phantom.chest import SWITCHES
from covid_ct.phantom.cohort import phantom_cohort, write_phantom_cohort
from covid_ct.phantom.layouts import _FAULTS, LAYOUTS, phantom_with_faults, to_grey, write_layout
from covid_ct.scan import (
    CohortError,
    DataError,
    GeometryError,
    ReadError,
    Scan,
    SplitError,
    UnitsError,
    VoxelError,
)

SHAPE = (16, 40, 44)


@pytest.fixture(scope='module')
def asked():
    return phantom_cohort(4, seed=9, labels=('covid', 'healthy', 'cap', 'covid'), second_scan=0)


def row_of(asked, name):
    return asked[asked.scan_id == name].iloc[0]


def packed(path, members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', kind) as z:
        for n, d in members.items():
            z.writestr(n, d)
    return path


# ---- archives
@pytest.mark.parametrize(
    'name',
    [
        '../x',
        'a/../../x',
        '/x',
        '//x',
        'C:/x',
        'C:x',
        'c:\\x',
        'a\\b',
        '..',
        '.',
        'a/./b',
        'a//b',
        'a\x00b',
        'a\nb',
        'a' * 300,
        '/'.join('ab' * 600),
    ],
)
def test_names_that_leave(name, tmp_path):
    assert _bad_name(name)
    info = zipfile.ZipInfo('x')
    info.filename = info.orig_filename = name
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('first', '1')
        z.writestr(info, 'x')
    with pytest.raises(ReadError):
        unzip(tmp_path / 'a.zip', tmp_path / 'in' / 'out')
    assert (
        not (tmp_path / 'in' / 'out').exists()
        and not list((tmp_path / 'in').iterdir())
        and {p.name for p in tmp_path.iterdir()} == {'a.zip', 'in'}
    )


@pytest.mark.parametrize(
    'name', ['a', 'a/b.jpg', 'NCP/16/1164/0001.jpg', '..a', 'a..', 'a.b/c d(1).png', 'ä/é.png']
)
def test_good_names(name, tmp_path):
    assert not _bad_name(name)
    assert (
        unzip(packed(tmp_path / 'a.zip', {name: b'x'}), tmp_path / 'out') / name
    ).read_bytes() == b'x'


@pytest.mark.parametrize('mode', [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o600, stat.S_IFCHR | 0o600])
def test_links_and_devices(mode, tmp_path):
    info = zipfile.ZipInfo('l')
    info.external_attr = mode << 16
    packed(tmp_path / 'a.zip', {'first': b'1'})
    with zipfile.ZipFile(tmp_path / 'a.zip', 'a') as z:
        z.writestr(info, '/etc')
    with pytest.raises(ReadError, match="'l' is a"):
        unzip(tmp_path / 'a.zip', tmp_path / 'out')
    assert {p.name for p in tmp_path.iterdir()} == {'a.zip'}


def test_bombs_and_limits(tmp_path):
    bomb = packed(tmp_path / 'bomb.zip', {'z': bytes(120 << 20)})
    with pytest.raises(ReadError, match='grow more than 400'):
        unzip(bomb, tmp_path / 'out')
    many = packed(tmp_path / 'many.zip', {f'f{i}': b'ab' for i in range(5)})
    for limit, words in ((dict(files=4), '5 members'), (dict(limit=9), '10 bytes')):
        with pytest.raises(ReadError, match=words):
            unzip(many, tmp_path / 'out', **limit)
    assert len(list(unzip(many, tmp_path / 'out', files=5, limit=10).iterdir())) == 5
    small = packed(tmp_path / 'small.zip', {'z': bytes(9 << 20)})
    assert unzip(small, tmp_path / 'small').is_dir()  # a mask of zeros is no bomb


def test_a_member_that_lies_about_its_size(tmp_path):
    data = bytearray(packed(tmp_path / 'a.zip', {'z': bytes(1 << 20)}).read_bytes())
    at = data.index(b'PK\1\2')
    data[at + 24 : at + 28] = struct.pack('<I', 10)
    (tmp_path / 'b.zip').write_bytes(data)
    with pytest.raises(ReadError):
        unzip(tmp_path / 'b.zip', tmp_path / 'out')
    assert {p.name for p in tmp_path.iterdir()} == {'a.zip', 'b.zip'}


def test_overlapping_members(tmp_path):
    data = bytearray(
        packed(tmp_path / 'a.zip', {'a': bytes(1000), 'b': b'x'}, zipfile.ZIP_STORED).read_bytes()
    )
    at = data.rindex(b'PK\1\2')
    data[at + 42 : at + 46] = struct.pack('<I', 0)
    (tmp_path / 'b.zip').write_bytes(data)
    with pytest.raises(ReadError, match='overlap'):
        unzip(tmp_path / 'b.zip', tmp_path / 'out')


@pytest.mark.parametrize(
    'members',
    [
        {'a': b'', 'a/b': b''},
        {'a': b'', 'A': b''},
        {'x/a': b'', 'X/a': b''},
        {'in.zip': b'PK'},
        {'d/in.tar.gz': b''},
        {'a.7z': b''},
    ],
)
def test_twins_and_nested(members, tmp_path):
    with pytest.raises(ReadError, match='twice|archive itself'):
        unzip(packed(tmp_path / 'a.zip', members), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_same_name_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        z.writestr('a', '1')
        z.writestr('a', '2')
    with pytest.raises(ReadError, match='twice'):
        unzip(tmp_path / 'a.zip', tmp_path / 'out')


def test_encrypted_and_unknown_method(tmp_path):
    good = packed(tmp_path / 'a.zip', {'a': b'abc'}, zipfile.ZIP_STORED).read_bytes()
    at = good.index(b'PK\1\2')
    for name, place, value in (('locked', 8, 1), ('method', 10, 97)):
        data = bytearray(good)
        data[at + place : at + place + 2] = struct.pack('<H', value)
        data[place - 2 : place] = struct.pack('<H', value)
        (tmp_path / f'{name}.zip').write_bytes(data)
        with pytest.raises(ReadError):
            unzip(tmp_path / f'{name}.zip', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_every_cut_and_many_flips_are_refused_or_whole(tmp_path):
    want = {f'd/{i}.png': bytes([i]) * 50 for i in range(3)}
    data = packed(tmp_path / 'a.zip', want).read_bytes()
    rng = np.random.default_rng(0)
    fine = 0
    bad = [data[:n] for n in range(0, len(data), 7)]
    for _ in range(150):
        b = bytearray(data)
        b[rng.integers(len(b))] ^= int(1 + rng.integers(255))
        bad.append(bytes(b))
    for i, b in enumerate(bad):
        (tmp_path / 'b.zip').write_bytes(b)
        out = tmp_path / f'o{i}'
        try:
            unzip(tmp_path / 'b.zip', out)
            fine += 1
        except DataError:
            assert not out.exists()
            continue
        assert all(p.read_bytes() in want.values() for p in out.rglob('*') if p.is_file())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')] and fine < len(bad) / 2


def test_killed_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    path = packed(tmp_path / 'a.zip', {'a': b'1', 'b': b'2'})
    real, calls = archive.shutil.copyfileobj, []

    def dies(*a):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*a)

    monkeypatch.setattr(archive.shutil, 'copyfileobj', dies)
    with pytest.raises(KeyboardInterrupt):
        unzip(path, tmp_path / 'out')
    assert {p.name for p in tmp_path.iterdir()} == {'a.zip'}


def test_existing_folder_full_disk_missing_file(tmp_path, monkeypatch):
    path = packed(tmp_path / 'a.zip', {'a': b'1'})
    (tmp_path / 'out').mkdir()
    with pytest.raises(ReadError, match='exists already'):
        unzip(path, tmp_path / 'out')
    with pytest.raises(ReadError, match='does not exist'):
        unzip(tmp_path / 'none.zip', tmp_path / 'new')
    monkeypatch.setattr(
        archive.shutil,
        'disk_usage',
        lambda p: os.terminal_size((0, 0)) and type('U', (), dict(free=0)),
    )
    with pytest.raises(ReadError, match='are free'):
        unzip(path, tmp_path / 'new')


def test_parts_of_an_archive(tmp_path):
    path = packed(
        tmp_path / 'a.zip',
        {
            'CP/1/2/0.jpg': b'0',
            'CP/1/2/1.jpg': b'1',
            'CP/1/3/0.jpg': b'x',
            '__MACOSX/CP/1/2/._0.jpg': b'',
        },
    )
    (tmp_path / 'p').mkdir()
    assert scans_in(path) == {'CP/1/2': ['0.jpg', '1.jpg'], 'CP/1/3': ['0.jpg']}
    assert sorted(f.name for f in unzip_part(path, 'CP/1/2', tmp_path / 'p').iterdir()) == [
        '0.jpg',
        '1.jpg',
    ]
    with pytest.raises(ReadError, match='no files in'):
        unzip_part(path, 'CP/1', tmp_path / 'p')
    with open_archive(path) as z:
        assert len(_check_members(z, path)) == 3


# ---- fact sheets and fetching
def test_sheets_are_full():
    for k, f in DATASETS.items():
        assert all((f.title, f.licence, f.citation, f.address, f.layout, f.traps)) and all(
            len(x) == 3 and x[1].startswith('https://') for x in f.files
        )
        assert set(_fact_sheet(k).fact) >= {'title', 'licence', 'traps'}
    assert set(ADAPTERS) - set(DATASETS) == {'phantom', 'csv', 'generic'} and all(
        a.traps and a.licence and callable(a.reader) and callable(a.seen) for a in ADAPTERS.values()
    )


@pytest.fixture
def served(tmp_path, monkeypatch):
    "A set on this machine, and its sheet"
    far = tmp_path / 'far'
    far.mkdir()
    pooch.get_logger().setLevel('ERROR')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    srv = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(far))
    )
    threading.Thread(target=srv.serve_forever, daemon=True).start()

    def offer(data, right=True, kind='sha256'):
        (far / 's.zip').write_bytes(data)
        h = hashlib.new(kind, data if right else b'').hexdigest()
        monkeypatch.setitem(
            DATASETS,
            'toy',
            DatasetFacts(
                't',
                'l',
                'c',
                'http://far.example',
                'scans/…',
                ('x',),
                files=(('s.zip', f'http://127.0.0.1:{srv.server_port}/s.zip', f'{kind}:{h}'),),
            ),
        )

    yield offer, srv
    srv.shutdown()
    srv.server_close()


def test_fetching(served, tmp_path):
    offer, srv = served
    data = packed(tmp_path / 'x.zip', {'a/1.txt': b'1'}).read_bytes()
    for kind in ('md5', 'sha256'):
        offer(data, kind=kind)
        out = fetch('toy', tmp_path / kind)
        assert (out / 's' / 'a' / '1.txt').read_bytes() == b'1'
    (out / 's' / 'a' / '1.txt').write_bytes(b'2')
    fetch('toy', out)
    assert (out / 's' / 'a' / '1.txt').read_bytes() == b'2'  # nothing is done twice
    offer(data, right=False)
    with pytest.raises(ReadError, match='another checksum') as e:
        fetch('toy', tmp_path / 'wrong')
    assert (
        not list((tmp_path / 'wrong').iterdir())
        and 'far.example' in e.value.remedy
        and 'scans/…' in e.value.remedy
    )
    offer(packed(tmp_path / 'y.zip', {'../evil': b'1'}).read_bytes())
    with pytest.raises(ReadError):
        fetch('toy', tmp_path / 'evil')
    assert not (tmp_path / 'evil' / 's').exists() and not (tmp_path / 'evil.txt').exists()
    offer(data)
    srv.shutdown()
    srv.server_close()
    with pytest.raises(ReadError, match='cannot be fetched') as e:
        fetch('toy', tmp_path / 'off')
    assert 'network' in e.value.remedy and 'far.example' in e.value.remedy


def test_sets_that_are_not_fetched(tmp_path):
    for n in ('cc_ccii', 'mosmed', 'luna16', 'medseg9', 'sars_cov_2'):
        with pytest.raises(ReadError, match='is not fetched') as e:
            fetch(n, tmp_path / n)
        assert (
            DATASETS[n].address in e.value.remedy
            and DATASETS[n].layout in e.value.remedy
            and not (tmp_path / n).exists()
        )
    with pytest.raises(ReadError, match='no public set'):
        fetch('luna', tmp_path)


# ---- labels
def test_values_and_codes_by_hand():
    assert (
        mask_values(np.array([[3, 0], [520, 3]])).tolist() == [0, 3, 520]
        and mask_values(np.array([True, False])).tolist() == [0, 1]
        and mask_values(np.array([2.0, 0])).tolist() == [0, 2]
    )
    for bad in (
        np.array([-1]),
        np.array([0.5]),
        np.array([np.nan]),
        np.array([70000]),
        np.zeros(0),
    ):
        with pytest.raises(VoxelError):
            mask_values(bad)
    assert recode(
        np.array([0, 85, 170, 255], 'u1'), MASK_CODES['medseg_png']['infection_mask']
    ).tolist() == [0, 1, 2, 4]
    assert recode(np.array([0, 1, 2, 3]), MASK_CODES['ct_seg_combined']['lung_mask']).tolist() == [
        0,
        1,
        1,
        1,
    ] and recode(
        np.array([0, 1, 2, 3]), MASK_CODES['ct_seg_combined']['infection_mask']
    ).tolist() == [0, 0, 0, 1]
    with pytest.raises(VoxelError, match=r'm\.png: holds the labels 86, 99'):
        recode(np.array([0, 86, 99]), MASK_CODES['medseg_png']['infection_mask'], 'm.png')
    assert (
        recode(np.array([0, 1]), {0: 0, 1: 1}).dtype == np.uint8
        and LESIONS[0] == 'ggo'
        and LESIONS[3] == 'effusion'
    )


def test_lobes_by_hand():
    house = {
        'left upper': 1,
        'left lower': 2,
        'right upper': 3,
        'right middle': 4,
        'right lower': 5,
    }
    assert [house[n] for n in LOBES] == [1, 2, 3, 4, 5]
    for convention, codes in {
        'luna16': [7, 8, 4, 5, 6],
        '1-5': [1, 2, 3, 4, 5],
        'totalsegmentator': [10, 11, 12, 13, 14],
        'totalsegmentator_v1': [13, 14, 15, 16, 17],
    }.items():
        assert convert_lobes(np.array([0, *codes]), convention).tolist() == [0, 1, 2, 3, 4, 5]
    assert convert_lobes(np.array([1, 512, 516, 520]), 'luna16').tolist() == [0] * 4
    for convention, alien in (
        ('luna16', 2),
        ('1-5', 6),
        ('totalsegmentator', 118),
        ('totalsegmentator_v1', 105),
    ):
        with pytest.raises(VoxelError, match=f'holds the labels {alien}'):
            convert_lobes(np.array([0, alien]), convention, 'x.nrrd')
    with pytest.raises(VoxelError, match='no convention'):
        convert_lobes(np.zeros(3), 'mine')


def test_named_lobes():
    names = [
        'lung_upper_lobe_left',
        'lung_lower_lobe_left',
        'lung_upper_lobe_right',
        'lung_middle_lobe_right',
        'lung_lower_lobe_right',
    ]
    m = {n: np.eye(5)[i] for i, n in enumerate(names)}
    assert convert_lobes(m, 'totalsegmentator').tolist() == [1, 2, 3, 4, 5]
    for bad in (
        {**m, 'spleen': m[names[0]]},
        {n: m[n] for n in names[1:]},
        {**m, names[0]: np.ones(5)},
        {**m, names[0]: np.ones(4)},
    ):
        with pytest.raises(VoxelError):
            convert_lobes(bad, 'totalsegmentator')
    assert set(LOBE_CONVENTIONS) == {'luna16', '1-5', 'totalsegmentator', 'totalsegmentator_v1'}


# ---- how a row is read
def test_turn_by_hand():
    v = np.arange(24).reshape(2, 3, 4)
    scan = Scan(v, (5, 2, 1), units='uint8')
    got = override_axes(scan, 'PLS')
    assert (
        got.shape == (2, 4, 3)
        and (got.voxels == v.swapaxes(1, 2)).all()
        and got.spacing == (5, 1, 2)
    )
    assert (override_axes(scan, 'RAI').voxels == v[::-1, ::-1, ::-1]).all() and (
        override_axes(override_axes(scan, 'PLS').replace(stored_as='LPS'), 'PLS').voxels == v
    ).all()
    for bad in ('LP', 'LLS', 'LRS', 'XYZ', 'LPSS'):
        with pytest.raises(GeometryError):
            override_axes(scan, bad)


def test_slices_of_pictures_and_stacks(tmp_path):
    v = np.arange(3 * 4 * 5, dtype='u1').reshape(3, 4, 5) * 4
    image = sitk.GetImageFromArray(v)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / 's.nii.gz'))
    for k in range(3):
        assert (
            read_slice(tmp_path / 's.nii.gz', k).voxels[0] == v[k]
        ).all()  # the header is not believed
    Image.fromarray(v[1].T).save(tmp_path / 'a.png')
    Image.fromarray(v[1]).convert('RGB').save(tmp_path / 'c.png')
    (tmp_path / 'bad.png').write_bytes(b'no')
    s = read_slice(tmp_path / 'a.png', axes='PLS', patient_id='p')
    assert (
        (s.voxels[0] == v[1]).all()
        and s.units == 'uint8'
        and not s.geometry_known
        and s.patient_id == 'p'
    )
    assert (read_slice(tmp_path / 'c.png').voxels[0] == v[1]).all()
    with pytest.raises(GeometryError, match='3 slices, number 3'):
        read_slice(tmp_path / 's.nii.gz', 3)
    for bad in ('bad.png', 'none.png'):
        with pytest.raises(ReadError):
            read_slice(tmp_path / bad)
    sitk.WriteImage(sitk.GetImageFromArray(v[:2] + 100), str(tmp_path / 's.nii.gz'))
    os.utime(tmp_path / 's.nii.gz', ns=(1, 1))
    assert (
        read_slice(tmp_path / 's.nii.gz', 0).voxels[0] == v[0] + 100
    ).all()  # a stack that changed is read again


def test_units_of_the_row_are_held_against_the_voxels(tmp_path, asked):
    write_layout(asked, tmp_path / 'a', 'ct_seg', SHAPE)
    df = open_cohort(tmp_path / 'a')
    root = df.attrs['root']
    a, b = df.to_dict('records')[:2]
    assert (a['units'], b['units']) == ('HU', 'uint8')
    with pytest.raises(UnitsError, match='grey'):
        load_row({**b, 'units': 'HU'}, root)
    with pytest.raises(UnitsError):
        load_row({**a, 'units': 'uint8'}, root)
    with pytest.raises(CohortError, match='unknown codes'):
        load_mask({**a, 'codes': 'mine'}, 'lung_mask', root)


def test_a_table_of_rows_survives_a_csv(tmp_path, asked):
    truth = write_layout(asked, tmp_path / 'a', 'medseg100', SHAPE)
    df = open_cohort(tmp_path / 'a')
    back = read_cohort(write_cohort(df, tmp_path / 'a' / 't.csv'))
    assert len(back) == len(truth)
    for r, q in zip(df.to_dict('records'), back.to_dict('records'), strict=False):
        s, z = load_row(r, df.attrs['root']), load_row(q, tmp_path / 'a')
        assert (s.voxels == z.voxels).all() and s.units == z.units == 'HU'
        assert (
            load_mask(r, 'infection_mask', df.attrs['root'], s)
            == load_mask(q, 'infection_mask', tmp_path / 'a', z)
        ).all()


# ---- the layouts, one by one
def volumes(asked, out, layout, faults=None):
    truth = write_layout(asked, out, layout, SHAPE, faults)
    df = open_cohort(out)
    assert df.attrs['adapter'] == layout.replace('_zip', '') and sorted(df.scan_id) == sorted(
        truth.scan_id
    )
    both = df.merge(
        truth[[c for c in ('scan_id', 'row', 'faults', 'k', 'patient_id', 'label') if c in truth]],
        on='scan_id',
        suffixes=('', '_true'),
    )
    assert (
        (both.patient_id == both.patient_id_true).all()
        and set(df.columns) >= {'patient_id', 'scan_id', 'label', 'path', 'licence'}
        and df.attrs['traps']
    )
    assert not [p for p in out.rglob('.*')] and df.attrs['left_out'] == []
    return df, both


@pytest.mark.parametrize('layout', ['cc_ccii', 'cc_ccii_zip'])
def test_cc_ccii(layout, asked, tmp_path):
    ids = list(asked.scan_id)
    faults = dict(
        reversed=[ids[0]],
        repeated=[ids[2]],
        masked=asked.scan_id[asked.label == 'healthy'].tolist(),
        shuffled=[ids[3]],
    )
    df, both = volumes(asked, tmp_path / 'a', layout, faults)
    assert list(both.label) == list(both.label_true) and set(both.label) == {
        'covid',
        'cap',
        'healthy',
    }
    for r in both.to_dict('records'):
        p = phantom_with_faults(row_of(asked, r['row']), SHAPE, tuple(r['faults'].split()))
        s = load_row(r, df.attrs['root'])
        assert (
            (s.voxels == to_grey(p.scan.voxels)).all()
            and s.units == 'uint8'
            and not s.geometry_known
            and (s.patient_id, s.scan_id) == (r['patient_id'], r['scan_id'])
        )
        assert (
            r['n_slice'] == r['slices_found'] == p.scan.shape[0]
            and r['lesion_slices'] == p.infection.any((1, 2)).sum()
        )
        assert (bool(r['already_masked']), bool(r['repeats']), r['order'] == 'reverse') == tuple(
            f in r['faults'] for f in ('masked', 'repeated', 'reversed')
        )
    assert df.inside.notna().all() == (layout == 'cc_ccii_zip')
    tables = _cc_ccii_tables(tmp_path / 'a')
    assert 'path' not in tables and sorted(tables.scan_id) == sorted(df.scan_id)


def test_cc_ccii_mixed_files_are_in_natural_order(asked, tmp_path):
    df, both = volumes(asked[:1], tmp_path / 'a', 'cc_ccii', dict(mixed='all'))
    want = to_grey(phantom_with_faults(asked.iloc[0], SHAPE).scan.voxels)
    got = load_row(df.iloc[0], df.attrs['root'])
    assert (got.voxels[:8] == want[:8]).all() and all(
        np.corrcoef(got.voxels[k].ravel(), want[k].ravel())[0, 1] > 0.98 for k in range(8, 16)
    )  # JPEG keeps the picture, not every grey value
    assert any('mixed endings' in r for r in got.remarks)


def test_cc_ccii_that_is_not_complete(asked, tmp_path):
    write_layout(asked, tmp_path / 'a', 'cc_ccii', SHAPE)
    (gone, *_) = (tmp_path / 'a' / 'NCP').glob('*/*')
    sid = gone.name
    for f in gone.iterdir():
        f.unlink()
    (other, *_) = (tmp_path / 'a' / 'CP').glob('*/*')
    (other / 'Thumbs.db').write_text('x')
    df = open_cohort(tmp_path / 'a')
    assert sid not in set(df.scan_id) and len(df) == 3
    said = ' | '.join(df.attrs['left_out'])
    assert (
        f'{sid}: no picture' in said
        and f'scan {sid}' in said
        and '1 files that are no pictures' in said
    )
    (tmp_path / 'a' / 'unzip_filenames.csv').unlink()
    df = open_cohort(tmp_path / 'a')
    assert len(df) == 3 and (df.n_slice == 16).all()  # without the list, what lies there


@pytest.mark.parametrize('layout', ['cc_ccii', 'cc_ccii_zip'])
def test_cc_ccii_with_a_cut_picture(layout, asked, tmp_path):
    write_layout(asked[:2], tmp_path / 'a', layout, SHAPE, dict(cut=[asked.scan_id[0]]))
    df = open_cohort(tmp_path / 'a')
    said = []
    for r in df.to_dict('records'):
        try:
            load_row(r, df.attrs['root'])
        except ReadError as e:
            said.append((r['label'], e.remedy))
    assert [s[0] for s in said] == [asked.label[0]] and said[0][1]


def test_cc_ccii_bad_tables(tmp_path):
    head = 'zip_file,label,patient_id,scan_id,n_slice\n'
    for text, words in (
        (head + 'CP-1.zip,flu,1,2,3\n', 'names the class'),
        (head + 'CP-1.zip,CP,1,2,many\n', 'is no number'),
        ('a,b\n1,2\n', 'no column'),
        (head + 'CP-1.zip,CP,1,2,3\nCP-1.zip,CP,2,2,3\n', 'occurs 2'),
        (head, 'no rows'),
        ('', 'is no CSV'),
    ):
        (tmp_path / 'unzip_filenames.csv').write_text(text)
        with pytest.raises(CohortError, match=words):
            _cc_ccii_tables(tmp_path)
    with pytest.raises(CohortError, match='unzip_filenames.csv'):
        _cc_ccii_tables(tmp_path / 'none')
    (tmp_path / 'l.csv').write_text('imgpath\nNCP/1/2/0001.jpg\n\nrubbish\n')
    with pytest.raises(CohortError, match='line 2'):
        _lesion_slices(tmp_path / 'l.csv')
    (tmp_path / 'l.csv').write_text('imgpath\nNCP/1/2/0001.jpg\n')
    assert _lesion_slices(tmp_path / 'l.csv').iloc[0].tolist() == ['covid', '1', '2', '0001.jpg']


def test_cc_ccii_bad_zips(asked, tmp_path):
    write_layout(asked[:1], tmp_path / 'a', 'cc_ccii_zip', SHAPE)
    (z,) = (tmp_path / 'a').glob('*.zip')
    data = z.read_bytes()
    z.write_bytes(data[:-100])
    with pytest.raises(ReadError, match='no whole zip'):
        open_cohort(tmp_path / 'a')
    packed(z, {'../NCP/1/2/0.png': b''})
    with pytest.raises(ReadError, match='outside'):
        open_cohort(tmp_path / 'a')
    packed(z, {'CP/1/2/0.png': b''})
    with pytest.raises(CohortError, match='CP/1/2'):
        open_cohort(tmp_path / 'a')


def test_mosmed(asked, tmp_path):
    df, both = volumes(asked, tmp_path / 'a', 'mosmed')
    assert set(both.label_true) == {'covid', 'healthy'}
    for r in both.to_dict('records'):
        p = phantom_with_faults(row_of(asked, r['row']), SHAPE)
        s = load_row(r, df.attrs['root'])
        assert (
            (s.voxels == p.scan.voxels).all()
            and np.allclose(s.spacing, p.scan.spacing)
            and s.units == 'HU'
        )
        assert r['label'] == p.label and (r['severity'] == 0) == (p.label == 'healthy')
        if p.label == 'covid':
            assert (load_mask(r, 'infection_mask', df.attrs['root'], s) == p.infection).all()
        else:
            assert pd.isna(r['infection_mask'])
    (tmp_path / 'a' / 'masks' / 'study_0999_mask.nii.gz').touch()
    assert open_cohort(tmp_path / 'a').attrs['left_out'] == ['masks/study_0999_mask.nii.gz']
    (tmp_path / 'a' / 'studies' / 'CT-7').mkdir()
    with pytest.raises(CohortError, match="'CT-7'"):
        open_cohort(tmp_path / 'a')


@pytest.mark.parametrize(
    'without', [(), ('Lung_Mask',), ('Infection_Mask',), ('Lung_and_Infection_Mask',)]
)
def test_ct_seg(asked, tmp_path, without):
    import shutil

    write_layout(asked, tmp_path / 'a', 'ct_seg', SHAPE)
    truth = asked[asked.label == 'covid'].reset_index()
    for w in without:
        shutil.rmtree(tmp_path / 'a' / w)
    df = open_cohort(tmp_path / 'a')
    assert (
        df.scan_id.tolist() == ['coronacases_001', 'radiopaedia_1_85501_0']
        and df.stored_as.tolist() == ['LAS', 'LPS']
        and df.units.tolist() == ['HU', 'uint8']
        and df.centre.tolist() == ['coronacases', 'radiopaedia']
    )
    for r, (_, t) in zip(df.to_dict('records'), truth.iterrows(), strict=False):
        p = phantom_with_faults(t, SHAPE)
        s = load_row(r, df.attrs['root'])
        assert (
            (s.voxels == (p.scan.voxels if r['units'] == 'HU' else to_grey(p.scan.voxels))).all()
            and np.allclose(s.spacing, p.scan.spacing)
            and s.geometry_known
        )
        assert (
            (load_mask(r, 'lung_mask', df.attrs['root'], s) > 0)
            == (p.lungs | p.infection if 'combined' in r['codes'] else p.lungs)
        ).all() and (load_mask(r, 'infection_mask', df.attrs['root'], s) == p.infection).all()
        if r['units'] == 'uint8':
            back = restore_hu(s)
            assert (
                np.abs(back.voxels - p.scan.voxels.clip(-1250, 250)).max() <= 1500 / 255 / 2 + 1e-3
                and back.units == 'HU'
                and 'restored' in back.remarks[-1]
            )
            assert (r['window_low'], r['window_high']) == (-1250, 250)
        else:
            with pytest.raises(UnitsError):
                restore_hu(s)


def test_ct_seg_patients_and_strangers(asked, tmp_path):
    write_layout(asked, tmp_path / 'a', 'ct_seg', SHAPE)
    f = tmp_path / 'a' / 'COVID-19-CT-Seg_20cases'
    one = f / 'radiopaedia_1_85501_0.nii.gz'
    (f / 'radiopaedia_1_85502_3.nii.gz').write_bytes(one.read_bytes())
    (f / 'mine.nii.gz').write_bytes(one.read_bytes())
    df = open_cohort(tmp_path / 'a')
    assert df.patient_id.tolist() == [
        'coronacases_001',
        'radiopaedia_1',
        'radiopaedia_1',
    ] and df.attrs['left_out'] == ['COVID-19-CT-Seg_20cases/mine.nii.gz']


def test_luna16(tmp_path):
    asked = phantom_cohort(2, seed=1, labels=('healthy',), second_scan=0)
    df, both = volumes(asked, tmp_path / 'a', 'luna16')
    assert set(df.label) == {'other'} and 'other' in LABELS
    for r in both.to_dict('records'):
        p = phantom_with_faults(row_of(asked, r['row']), SHAPE)
        s = load_row(r, df.attrs['root'])
        assert (s.voxels == p.scan.voxels).all() and np.allclose(s.spacing, p.scan.spacing)
        assert (
            load_mask(r, 'lobe_mask', df.attrs['root'], s) == p.lobes
        ).all() and s.stored_as == ('RAS' if r['row'].startswith('P0010001') else 'LPS')


def test_medseg9(asked, tmp_path):
    df, both = volumes(asked, tmp_path / 'a', 'medseg9')
    for r in both.to_dict('records'):
        p = phantom_with_faults(row_of(asked, r['row']), SHAPE)
        s = load_row(r, df.attrs['root'])
        assert (s.voxels == p.scan.voxels).all() and s.units == 'HU'
        assert (load_mask(r, 'lung_mask', df.attrs['root'], s) == p.lungs).all() and (
            load_mask(r, 'infection_mask', df.attrs['root'], s)
            == np.array([0, 1, 2, 1, 4, 1])[p.lesions]
        ).all()


@pytest.mark.parametrize('layout', ['medseg100', 'medseg100_png', 'cc_ccii_lesions', 'sars_cov_2'])
def test_slices(layout, asked, tmp_path):
    df, both = volumes(asked, tmp_path / 'a', layout)
    for r in both.to_dict('records'):
        p = phantom_with_faults(row_of(asked, r['row']), SHAPE)
        k = int(r['k'])
        s = load_row(r, df.attrs['root'])
        g, kind = to_grey(p.scan.voxels[k]).astype(int), np.array([0, 1, 2, 1, 4, 1])[p.lesions[k]]
        assert (
            s.shape == (1, *SHAPE[1:])
            and not s.geometry_known
            and s.units == ('HU' if layout == 'medseg100' else 'uint8')
        )
        if layout == 'medseg100':
            assert (s.voxels[0] == p.scan.voxels[k]).all() and (
                load_mask(r, 'lung_mask', df.attrs['root'], s)[0] == p.lungs[k]
            ).all()
        if layout == 'medseg100_png':
            assert (s.voxels[0] == g * (p.lungs[k] | p.infection[k])).all()
        if layout == 'sars_cov_2':
            assert (s.voxels[0] == g).all() and r['label'] == (
                'covid' if p.label == 'covid' else 'other'
            )
            continue
        m = load_mask(r, 'infection_mask', df.attrs['root'], s)[0]
        if layout == 'cc_ccii_lesions':
            assert (
                np.corrcoef(s.voxels[0].ravel(), g.ravel())[0, 1] > 0.98
                and (load_mask(r, 'lung_mask', df.attrs['root'], s)[0] == p.lungs[k]).all()
            )
            assert (m == np.where(p.infection[k] & p.lungs[k], np.where(kind == 2, 2, 1), 0)).all()
        else:
            assert (m == kind).all()
    if layout == 'cc_ccii_lesions':
        assert df.patient_id.nunique() == 2
        return
    assert set(df.patient_id) == {'unknown'} and any('impossible' in t for t in df.attrs['traps'])
    with pytest.raises(SplitError):
        split_patients(df, folds=2)  # nobody knows who is who


@pytest.mark.parametrize(
    'layout', [k for k in LAYOUTS if k not in ('cc_ccii', 'cc_ccii_zip', 'sars_cov_2')]
)
@pytest.mark.parametrize(
    'fault,error',
    [('codes', VoxelError), ('grid', GeometryError), ('lost', CohortError), ('cut', DataError)],
)
def test_faults_are_refused_by_name(layout, fault, error, asked, tmp_path):
    if layout == 'medseg100' and fault in ('lost', 'cut'):
        pytest.skip('one file for all')
    some = (
        phantom_cohort(1, seed=3, labels=('healthy',), second_scan=0)
        if layout == 'luna16'
        else asked[asked.label == 'covid'][:1]
    )
    column = 'lobe_mask' if layout == 'luna16' else 'infection_mask'
    write_layout(some, tmp_path / 'a', layout, SHAPE, {fault: 'all'})
    with pytest.raises(error) as e:
        df = open_cohort(tmp_path / 'a')
        for r in df.to_dict('records'):
            load_mask(r, column, df.attrs['root'], load_row(r, df.attrs['root']))
    assert e.value.remedy
    if fault == 'codes':
        assert '99' in e.value.fault and str(tmp_path) in e.value.source


def test_writing_layouts(asked, tmp_path):
    for bad in (dict(layout='mine'), dict(layout='mosmed', faults=dict(mine='all'))):
        with pytest.raises(CohortError, match='unknown name'):
            write_layout(asked, tmp_path / 'a', **bad)
    with pytest.raises(CohortError, match='no row fits'):
        write_layout(asked[asked.label == 'cap'], tmp_path / 'a', 'ct_seg', SHAPE)
    assert not list(tmp_path.iterdir()) and set(SWITCHES) < set(_FAULTS)
    write_layout(asked[:1], tmp_path / 'a', 'mosmed', SHAPE)
    with pytest.raises(CohortError, match='exists already'):
        write_layout(asked, tmp_path / 'a', 'mosmed', SHAPE)
    assert (
        to_grey([-1250, 250]).tolist() == [0, 255]
        and json.dumps(list(LAYOUTS))
        and layouts.LAYOUTS is LAYOUTS
    )


# ---- finding out which set it is
def test_recognising(asked, tmp_path):
    write_layout(asked, tmp_path / 'deep' / 'COVID19_1110', 'mosmed', SHAPE)
    assert open_cohort(tmp_path / 'deep').attrs['adapter'] == 'mosmed'  # one level down
    write_layout(asked, tmp_path / 'deep' / 'seg', 'ct_seg', SHAPE)
    with pytest.raises(CohortError, match='several sets: mosmed in COVID19_1110, ct_seg in seg'):
        open_cohort(tmp_path / 'deep')
    assert open_cohort(tmp_path / 'deep', 'ct_seg').attrs['adapter'] == 'ct_seg'
    with pytest.raises(CohortError, match='looks like no luna16') as e:
        open_cohort(tmp_path / 'deep', 'luna16')
    assert 'LobeSegmentation.nrrd' in e.value.remedy
    with pytest.raises(CohortError, match='no adapter'):
        open_cohort(tmp_path, 'nothing')
    with pytest.raises(CohortError, match='does not exist'):
        open_cohort(tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'a.zip').touch()
    for p in ('empty', 'a.zip'):
        with pytest.raises(CohortError, match='no set that is known') as e:
            open_cohort(tmp_path / p)
        assert all(a.layout in e.value.remedy for a in ADAPTERS.values())


def test_lesion_set_beside_the_scans(asked, tmp_path):
    write_layout(asked, tmp_path / 'a', 'cc_ccii', SHAPE)
    write_layout(asked, tmp_path / 'b', 'cc_ccii_lesions', SHAPE)
    (tmp_path / 'b' / 'ct_lesion_seg').rename(tmp_path / 'a' / 'ct_lesion_seg')
    assert open_cohort(tmp_path / 'a').attrs['adapter'] == 'cc_ccii' and open_cohort(
        tmp_path / 'a', 'cc_ccii_lesions'
    ).codes.unique().tolist() == ['cc_ccii_lesions']
    (m, *_) = (tmp_path / 'a').rglob('mask/*/*.png')
    m.unlink()
    left = open_cohort(tmp_path / 'a', 'cc_ccii_lesions').attrs['left_out']
    assert len(left) == 1 and left[0].endswith(f'{m.stem}.jpg')


def test_house_adapters(asked, tmp_path):
    write_phantom_cohort(tmp_path / 'p', asked[:2], shape=SHAPE, progress=False)
    assert (
        open_cohort(tmp_path / 'p').attrs['adapter'] == 'phantom'
        and open_cohort(tmp_path / 'p' / 'cohort.csv').attrs['adapter'] == 'csv'
    )
    (tmp_path / 'p' / 'phantoms.json').unlink()
    assert open_cohort(tmp_path / 'p').attrs['adapter'] == 'generic' and open_cohort(
        tmp_path / 'p'
    ).attrs['left_out'] == ['cohort.csv']


def test_tables_need_no_pixels():
    t = pd.DataFrame(dict(patient_id=['1'], scan_id=['2'], label=['covid']))
    assert len(check_cohort(t, pixels=False)) == 1
    with pytest.raises(CohortError, match='no column path'):
        check_cohort(t)
    with pytest.raises(CohortError, match='has no path'):
        load_row(t.iloc[0])


# ---- real data
@pytest.mark.data
def test_real_tables(data_dir):
    df = open_cohort(data_dir / 'cc_ccii_tables')
    assert df.attrs['adapter'] == 'cc_ccii' and (len(df), df.patient_id.nunique()) == (4178, 2742)
    by = df.groupby('label').agg(
        scans=('scan_id', 'size'),
        patients=('patient_id', 'nunique'),
        flagged=('already_masked', 'count'),
        masked=('already_masked', 'sum'),
        repeats=('repeats', 'sum'),
    )
    assert (
        by.loc['covid'].tolist() == [1544, 929, 1519, 155, 103]
        and by.loc['cap'].tolist() == [1556, 964, 1549, 5, 228]
        and by.loc['healthy'].tolist() == [1078, 849, 966, 606, 71]
    )
    assert [
        int(((df.label == k) & df.order.notna() & (df.order != 'as named')).sum())
        for k in ('cap', 'covid', 'healthy')
    ] == [96, 63, 0] and (df.order == 'reverse').sum() == 98
    assert df.n_slice.sum() == 411529 and df.groupby('patient_id').label.nunique().max() == 1
    test, rest = df[df.release_split == 'test'], df[df.release_split == 'train_val']
    assert (len(test), int(test.patient_id.isin(rest.patient_id).sum())) == (472, 255)
    assert public._cc_ccii_tables is _cc_ccii_tables and sets.DATASETS is DATASETS


@pytest.mark.data
def test_real_medseg_pairs(data_dir):
    df = open_cohort(data_dir / 'medseg100')
    assert (
        df.attrs['adapter'] == 'medseg100_png'
        and len(df) == 60
        and set(df.patient_id) == {'unknown'}
    )
    seen, wide, on = set(), [], []
    for r in df.to_dict('records'):
        s = load_row(r, df.attrs['root'])
        m = load_mask(r, 'infection_mask', df.attrs['root'], s)
        seen |= set(np.unique(m).tolist())
        assert s.shape == m.shape == (1, 256, 256)
        on.append((s.voxels[m > 0] > 0).mean() if m.any() else 1)
        lung = np.argwhere(s.voxels[0] > 0)
        wide.append(np.ptp(lung[:, 1]) > np.ptp(lung[:, 0]))
    assert (
        seen == {0, 1, 2, 4} and np.mean(wide) > 0.7 and np.mean(on) > 0.97
    )  # upright, most chests are wider than deep; the masks lie on the lungs
