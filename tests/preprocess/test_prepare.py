"""Preparing a cohort: kill and resume, two runs at once, clusters, failures, and keys that follow
the code"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from toys import LABELS, PREP, SIZE, Toy, fails, toy

from covid_ct.cohort.adapters import open_cohort
from covid_ct.io.dicom import write_series
from covid_ct.io.read import read, to_image, write_mask, write_scan
from covid_ct.phantom.chest import make_phantom
from covid_ct.phantom.cohort import phantom_cohort, phantom_of
from covid_ct.phantom.layouts import write_layout
from covid_ct.preprocess import cache as C
from covid_ct.preprocess.cache import (
    PREPARED_MASKS,
    Cache,
    _cache_folder,
    _make_arrays,
    _pack,
    _prepared_name,
    _sources,
    _staged,
    _sweep,
    cache_size,
    has_mask,
    prep_of_recipe,
    prepare,
    prepare_row,
    reading_row,
    unpack,
)
from covid_ct.preprocess.resample import PREPS, Prep, prepare_scan
from covid_ct.scan import CohortError, DataError, GeometryError, UnitsError, VoxelError


def dies(row):
    if row['scan_id'] == 'S05':
        os.kill(os.getpid(), signal.SIGKILL)
    return Toy(row)


def table(n=12):
    return pd.DataFrame(
        [
            dict(patient_id=f'P{i // 2:03d}', scan_id=f'S{i:02d}', label=LABELS[i // 2 % 3], seed=i)
            for i in range(n)
        ]
    )


def on_disk(folder, n):
    "Small scans as files, two of them cut short, and their table"
    folder.mkdir()
    for _, r in table(n).iterrows():
        write_scan(Toy(r).scan, folder / f'{r.scan_id}.nii.gz')
    for i in (3, n - 2):
        f = folder / f'S{i:02d}.nii.gz'
        f.write_bytes(f.read_bytes()[:900])
    table(n).assign(path=[f'S{i:02d}.nii.gz' for i in range(n)]).to_csv(
        folder / 'cohort.csv', index=False
    )
    return folder / 'cohort.csv'


def contents(folder):
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in Path(folder).rglob('*')
        if f.is_file()
    }


quiet = partial(prepare, progress=False)


@pytest.fixture
def cohort():
    return table()


# ── a run and what it leaves ──────────────────────────────────────────────────────────────────────
def test_size_is_predicted_to_the_byte_and_values_are_those_of_prepare(cohort, tmp_path):
    done = quiet(cohort, PREP, tmp_path, PREPARED_MASKS, jobs=1, load=toy)
    arrays = list(done.folder.glob('*.npy'))
    assert (done.made, done.found, done.exit_code) == (12, 0, 0) and len(arrays) == 36
    assert sum(f.stat().st_size for f in arrays) == cache_size(cohort, PREP, PREPARED_MASKS)
    notes = [f for f in done.folder.glob('*.json') if f.name != 'recipe.json']
    assert len(notes) == 12
    rest = sorted(f.name for f in done.folder.iterdir() if f not in [*arrays, *notes])
    assert rest == ['failures.csv', 'recipe.json', 'scans.csv']
    assert all(np.load(f, allow_pickle=False).dtype in ('u1', 'u2') for f in arrays)
    kept, t = Cache(tmp_path, PREP, toy).get(cohort.iloc[5], PREPARED_MASKS), Toy(cohort.iloc[5])
    p = prepare_scan(t.scan, PREP)
    assert (
        abs(unpack(kept['image']) - p.voxels).max() <= 1 / 131070 + 1e-7
        and (kept['lung'] == p.forward(t.lungs)).all()
        and kept['lung'].dtype == bool
    )
    assert not kept['image'].flags.writeable
    again = quiet(cohort, PREP, tmp_path, PREPARED_MASKS, jobs=1, load=toy)
    assert (again.made, again.found) == (0, 12) and 'were there' in str(again)


@pytest.mark.parametrize('jobs', [1, 2])
def test_failures_are_a_table_and_the_rest_goes_on(cohort, tmp_path, jobs):
    done = quiet(cohort, PREP, tmp_path, jobs=jobs, load=fails)
    assert done.failures.values.tolist() == [
        ['S04', 'OSError', 'scratched', ''],
        ['S07', 'CohortError', 'is odd', 'Look.'],
    ]
    assert (done.made, done.exit_code) == (10, 1) and '2 failed' in str(done)
    assert pd.read_csv(done.folder / 'failures.csv', keep_default_na=False).equals(done.failures)
    stamp = {f: f.stat().st_mtime_ns for f in done.folder.glob('*.npy')}
    again = quiet(cohort, PREP, tmp_path, jobs=1, load=fails)
    assert (again.made, again.found, len(again.failures)) == (0, 10, 2) and stamp == {
        f: f.stat().st_mtime_ns for f in done.folder.glob('*.npy')
    }


def test_failures_of_another_part_of_the_cohort_stay_and_repaired_ones_go(cohort, tmp_path):
    quiet(cohort[:6], PREP, tmp_path, jobs=1, load=fails)
    folder = quiet(cohort[6:], PREP, tmp_path, jobs=1, load=fails).folder

    def read():
        return pd.read_csv(folder / 'failures.csv').scan_id.tolist()

    assert read() == ['S04', 'S07']
    Cache(tmp_path, PREP, fails).put(
        cohort.iloc[4], _make_arrays(cohort.iloc[4], PREP, load=toy)
    )  # repaired by hand
    assert quiet(cohort[:6], PREP, tmp_path, jobs=1, load=fails).exit_code == 0 and read() == [
        'S07'
    ]


def test_a_process_that_is_killed_is_a_typed_error_and_what_is_finished_stays(cohort, tmp_path):
    with pytest.raises(DataError, match='a process was lost .*terminated'):
        quiet(cohort, PREP, tmp_path, jobs=2, load=dies)
    folder = _cache_folder(tmp_path, PREP, dies)
    assert all(
        Cache(tmp_path, PREP, dies).get(r) is not None
        for _, r in cohort.iterrows()
        if list(folder.glob(f'{r.scan_id}-*.npy'))
    )
    rest = quiet(cohort.drop(index=5), PREP, tmp_path, jobs=2, load=dies)
    assert rest.made + rest.found == 11 and not list(folder.glob('.*'))


def test_the_disk(cohort, tmp_path, monkeypatch, capsys):
    def never(row):
        raise AssertionError('work was begun')

    with monkeypatch.context() as m:
        m.setattr(C.shutil, 'disk_usage', lambda p: type('U', (), dict(free=10)))
        with pytest.raises(DataError, match='GB to write'):
            prepare(cohort, PREP, tmp_path, jobs=1, load=never)
    assert '12 of 12 scans to prepare' in capsys.readouterr().out and not list(
        tmp_path.rglob('*.npy')
    )

    def full(path, array):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(C, '_save', full)
    with pytest.raises(DataError, match='No space left'):
        quiet(cohort, PREP, tmp_path, jobs=1, load=toy)
    assert not list(tmp_path.rglob('*.npy')) and not list(tmp_path.rglob('.part*'))


def test_refusals(cohort, tmp_path):
    with pytest.raises(CohortError, match='no rows'):
        quiet(cohort[:0], PREP, tmp_path)
    with pytest.raises(CohortError, match='no size'):
        quiet(cohort, Prep(size=None, spacing=(5.0, 2.0, 2.0)), tmp_path)
    with pytest.raises(CohortError, match="'lobes' is unknown"):
        quiet(cohort, PREP, tmp_path, masks=('lobes',))
    with pytest.raises(CohortError, match="no column 'scan_id'"):
        quiet(cohort.drop(columns='scan_id'), PREP, tmp_path)
    with pytest.raises(CohortError, match='S03.*twice'):
        quiet(pd.concat([cohort, cohort[3:4]]), PREP, tmp_path)
    with pytest.raises(CohortError, match="'vgg' names no preprocessing"):
        quiet(cohort, 'vgg', tmp_path)
    with pytest.raises(CohortError):
        quiet(tmp_path / 'none.csv', PREP, tmp_path)
    recipe = type('Recipe', (), dict(prep='darnet_tiny'))
    assert (
        prep_of_recipe(recipe)
        is prep_of_recipe('darnet_tiny')
        is prep_of_recipe(PREPS['darnet_tiny'])
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_mask_is_a_failure_of_its_scan(tmp_path):
    csv = on_disk(tmp_path / 'data', 6)
    done = quiet(csv, PREP, tmp_path / 'out', masks=('infection',), jobs=1)
    assert (
        set(done.failures.scan_id) == {'S02', 'S03', 'S04', 'S05'} and done.made == 2
    )  # only the healthy ones are known to have none
    assert set(done.failures.error) == {'CohortError', 'ReadError'}


# ── killed, and two at once ───────────────────────────────────────────────────────────────────────
RUN = (
    "import sys; from covid_ct.preprocess.cache import prepare; "
    "from covid_ct.preprocess.resample import Prep\n"
    "prepare(sys.argv[1], Prep(size=(6,12,10)), sys.argv[2], jobs=int(sys.argv[3]), progress=False)"
)


def start(csv, out, jobs=2, code=RUN):
    return subprocess.Popen(
        [sys.executable, '-c', code, csv, out, str(jobs)],
        start_new_session=True,
        env={**os.environ, 'PYTHONPATH': str(Path(C.__file__).parents[2])},
    )


@pytest.mark.parametrize('whole_group', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_200_scans_killed_in_the_middle_and_restarted_equal_an_uninterrupted_run(
    tmp_path, whole_group
):
    csv = on_disk(tmp_path / 'data', 200)
    if not (whole := tmp_path / 'whole').exists():
        quiet(csv, PREP, whole, jobs=1)
    p = start(csv, tmp_path / 'killed')

    def count():
        return len(list((tmp_path / 'killed').glob('*/*.image.npy')))

    while count() < 30 and p.poll() is None:
        time.sleep(0.001)
    (os.killpg if whole_group else os.kill)(p.pid, signal.SIGKILL)
    p.wait()
    assert 30 <= count() < 198, 'the kill came too late to tell anything'
    done = quiet(csv, PREP, tmp_path / 'killed', jobs=2)
    assert (done.made + done.found, len(done.failures)) == (198, 2) and done.found >= 30
    time.sleep(
        0 if whole_group else 1
    )  # workers that outlived their parent finish the scan in hand
    a, b = contents(whole), contents(tmp_path / 'killed')
    assert a.keys() == b.keys() and all(a[k] == b[k] for k in a) and len(a) == 2 * 198 + 3


def test_a_kill_in_the_middle_of_a_write_leaves_nothing_that_counts(tmp_path):
    csv = on_disk(tmp_path / 'data', 8)
    half = (
        "import numpy as np, os\nwhole = np.save\ncalls = []\n"
        "def save(f, a, **k):\n    calls.append(1)\n"
        "    if len(calls) == 3: f.write(b'\\x93NUMPY half'); f.flush(); os.kill(os.getpid(), 9)\n"
        "    whole(f, a, **k)\nnp.save = save\n"
    )
    p = start(csv, tmp_path / 'killed', 1, half + RUN)
    assert p.wait() == -signal.SIGKILL
    folder = _cache_folder(tmp_path / 'killed', PREP)
    assert (
        len(list(folder.glob('*.npy'))) == 2 and len(list(folder.glob('.part-*'))) == 1
    )  # two whole scans, one stage of the dead
    quiet(csv, PREP, tmp_path / 'killed', jobs=1)
    quiet(csv, PREP, tmp_path / 'whole', jobs=1)
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole') and not list(
        folder.glob('.*')
    )


def test_masks_and_image_of_a_scan_appear_together(cohort, tmp_path, monkeypatch):
    cache, seen, save = Cache(tmp_path, PREP, toy), [], C._save

    def watched(path, array):
        seen.append(len(list(tmp_path.rglob(f'{_prepared_name(cohort.iloc[0])}*'))))
        save(path, array)

    monkeypatch.setattr(C, '_save', watched)
    cache.arrays(cohort.iloc[0], PREPARED_MASKS)
    assert seen == [0, 0, 0] and len(list(tmp_path.rglob('*.npy'))) == 3


def test_two_processes_at_once_do_not_disturb_each_other(tmp_path):
    csv = on_disk(tmp_path / 'data', 60)
    both = [start(csv, tmp_path / 'shared', 1) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    quiet(csv, PREP, tmp_path / 'alone', jobs=1)
    assert contents(tmp_path / 'shared') == contents(tmp_path / 'alone')


def test_only_stages_of_the_dead_are_swept(tmp_path):
    with _staged(tmp_path) as mine:
        dead = tmp_path / '.part-dead'
        dead.mkdir()
        (dead / 'lock').touch()
        (dead / 'half.npy').write_bytes(b'1')
        assert _sweep(tmp_path) == 1 and mine.is_dir() and not dead.exists()
        os.utime(mine, (0, 0))
        assert (
            _sweep(tmp_path) == 1 and not mine.exists()
        )  # a day old: dead, even where locks cannot be asked
    young = tmp_path / '.new-young'
    young.mkdir()
    assert _sweep(tmp_path) == 0 and _sweep(tmp_path / 'nowhere') == 0 and young.exists()
    (young / 'lock').touch()
    assert _sweep(tmp_path) == 1 and not young.exists()  # killed before it had its name


def test_a_stage_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, calls = C._lock, []

    def late(path):
        calls.append(path)
        if len(calls) > 1:
            return real(path)
        shutil.rmtree(Path(path).parent)

    monkeypatch.setattr(C, '_lock', late)
    with _staged(tmp_path) as stage:
        assert stage.is_dir() and len(calls) == 2
    monkeypatch.setattr(C, '_lock', lambda path: shutil.rmtree(Path(path).parent))
    with pytest.raises(CohortError, match='loses its new files'):
        with _staged(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


# ── clusters ──────────────────────────────────────────────────────────────────────────────────────
def test_dask_prepares_the_same_bytes(tmp_path):
    distributed = pytest.importorskip('distributed')
    csv = on_disk(tmp_path / 'data', 12)
    here = quiet(csv, PREP, tmp_path / 'here', jobs=1)
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=str(tmp_path / 'dask'),
        ) as cluster,
        distributed.Client(cluster),
    ):
        with joblib.parallel_config(backend='dask'):
            there = quiet(csv, PREP, tmp_path / 'there', jobs=-1)
    assert (there.made, len(there.failures)) == (here.made, 2) == (10, 2) and there.failures.equals(
        here.failures
    )
    assert contents(tmp_path / 'here') == contents(tmp_path / 'there')


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────
def test_keys_follow_recipe_function_and_arguments(tmp_path):
    other = [
        Prep(size=SIZE, window=(-1000.0, 400.0)),
        Prep(size=(6, 12, 12)),
        Prep(size=SIZE, crop=100.0),
    ]
    folders = {_cache_folder(tmp_path, p, toy) for p in (PREP, *other)} | {
        _cache_folder(tmp_path, PREP, f) for f in (fails, partial(toy), partial(toy, shape=3))
    }
    assert len(folders) == 7


MODULES = (
    'scan',
    'preprocess.resample',
    'io.read',
    'io.dicom',
    'preprocess.body',
    'preprocess.lungs',
    'preprocess.lung_warnings',
    'cohort.table',
)


@pytest.mark.parametrize('module', MODULES)
def test_keys_follow_the_code_that_voxels_depend_on(module, tmp_path, monkeypatch):
    """Every module that reading, finding lungs and preparing stand on: one changed line, and the
    old cache is not found"""
    real, file = C._code, sys.modules['covid_ct.' + module].__file__
    before = _cache_folder(tmp_path, PREP)
    monkeypatch.setattr(C, '_code', lambda f: real(f) + 'changed' if f == file else real(f))
    assert _cache_folder(tmp_path, PREP) != before


def test_code_is_what_runs_not_its_comments(tmp_path):
    a, b, c = (tmp_path / f'{k}.py' for k in 'abc')
    a.write_text('# one\nx = 1\n\ny = 2\n')
    b.write_text('x = 1\n# two\ny = 2\n')
    c.write_text('x = 1\ny = 3\n')
    assert C._code(a) == C._code(b) != C._code(c)
    assert not {'covid_ct.batches.augment', 'covid_ct.batches.loaders', 'covid_ct.plot'} & set(
        _sources('covid_ct.cohort.table')
    ) and 'numpy' not in _sources('covid_ct.scan')


def test_names_follow_the_files_and_how_they_are_read(tmp_path):
    r = table(2).iloc[0]
    f = tmp_path / 's.nii.gz'
    write_scan(Toy(r).scan, f)
    row = {**r, 'path': str(f)}
    name = _prepared_name(row)
    assert _prepared_name({**row, 'fold': 2, 'centre': 'B'}) == name  # what does not decide voxels
    assert name not in {
        _prepared_name({**row, 'units': 'HU'}),
        _prepared_name({**row, 'slice': 2}),
        _prepared_name({**row, 'lung_mask': str(f)}),
    }
    os.utime(f, (1, 1))
    assert _prepared_name(row) != name
    series = write_series(Toy(r).scan, tmp_path / 's')
    row = {**r, 'path': str(series)}
    name = _prepared_name(row)
    (series / 'IM3').unlink()
    assert _prepared_name(row) != name


def test_recipe_json_says_what_the_name_means(cohort, tmp_path):
    folder = quiet(cohort[:1], PREP, tmp_path, jobs=1, load=toy).folder
    said = json.loads((folder / 'recipe.json').read_text())
    assert (
        said['prep']['size'] == list(SIZE)
        and said['called'][1].endswith('toys.toy')
        and 'covid_ct.preprocess.resample' in said['modules']
    )
    assert str(tmp_path) not in json.dumps(said)


def test_file_and_phantom_are_one_scan(tmp_path):
    "NIfTI, DICOM and the phantom itself give the same prepared bytes"
    p = make_phantom('covid', seed=5, shape=(24, 48, 48))
    write_scan(p.scan, tmp_path / 's.nii.gz')
    write_series(p.scan, tmp_path / 's')
    rows = [
        pd.Series(dict(patient_id='P', scan_id='S', label='covid', path=str(tmp_path / f)))
        for f in ('s.nii.gz', 's')
    ]
    a, b = (_make_arrays(r, PREP)['image'].astype(int) for r in rows)
    c = _pack(prepare_scan(p.scan, PREP).voxels).astype(int)
    assert abs(a - c).max() <= 1 and abs(b - c).max() <= 1


def test_rows_and_masks(cohort, tmp_path):
    df = cohort.assign(path='a/b.nii.gz')
    df.attrs['root'] = '/data'
    assert (
        reading_row(df, 3).path == '/data/a/b.nii.gz'
        and reading_row(df, 3, tmp_path).path == str(tmp_path / 'a/b.nii.gz')
        and df.path[3] == 'a/b.nii.gz'
    )
    assert has_mask(
        dict(scan_id='S', label='cap', infection_mask='x.nii.gz'), 'infection'
    ) and not has_mask(dict(scan_id='S', label='healthy'), 'infection')
    bare = dict(scan_id='S', label='covid', lung_mask=float('nan'), infection_mask=float('nan'))
    assert not has_mask(bare, 'lung')  # the built-in method finds them
    with pytest.raises(CohortError, match='has no infection_mask.*--masks'):
        has_mask(bare, 'infection')


def test_a_phantom_cohort_needs_no_files(tmp_path):
    done = quiet(
        phantom_cohort(2, seed=1),
        PREP,
        tmp_path,
        ('lung',),
        jobs=1,
        load=partial(phantom_of, shape=(24, 32, 32)),
    )
    assert done.exit_code == 0 and done.made >= 2 and not done.failures.size


# ── the user's own masks ──────────────────────────────────────────────────────────────────────────
KEEP = Prep(size=SIZE, keep='lungs')
CROP = Prep(size=SIZE, crop='lungs', margin=0.0)


def half(scan):
    return np.broadcast_to(np.arange(scan.shape[2]) < scan.shape[2] // 2, scan.shape)


def whole(scan):
    return np.ones(scan.shape, bool)


@pytest.fixture
def masked(tmp_path):
    "Four scans as files with an infection mask; the first two name a lung mask of one half"
    (tmp_path / 'data').mkdir()
    rows = []
    for i, r in table(8)[1:8:2].reset_index(drop=True).iterrows():
        t = Toy(r)
        files = dict(path=f'{r.scan_id}.nii.gz', infection_mask=f'{r.scan_id}_inf.nii.gz')
        write_scan(t.scan, tmp_path / 'data' / files['path'])
        write_mask(t.infection, t.scan, tmp_path / 'data' / files['infection_mask'])
        if i < 2:
            files['lung_mask'] = f'{r.scan_id}_lung.nii.gz'
            write_mask(half(t.scan), t.scan, tmp_path / 'data' / files['lung_mask'])
        rows.append({**r, **files})
    df = pd.DataFrame(rows)
    df.attrs['root'] = str(tmp_path / 'data')
    return df


@pytest.mark.parametrize('prep', [KEEP, CROP])
def test_a_named_lung_mask_masks_and_crops(masked, tmp_path, prep):
    done = quiet(masked, prep, tmp_path / 'out', PREPARED_MASKS, jobs=1, lungs=whole)
    assert done.exit_code == 0
    assert done.scans.lungs.tolist() == ['own', 'own', 'built-in', 'built-in']
    assert 'lung masks: 2 built-in and 2 own' in str(done)
    assert pd.read_csv(done.folder / 'scans.csv', keep_default_na=False).equals(done.scans)
    cache = Cache(tmp_path / 'out', prep, lungs=whole)
    for i in range(4):
        scan = Toy(masked.iloc[i]).scan
        mask = half(scan) if i < 2 else whole(scan)
        ready = prepare_scan(scan, prep, mask)
        got = cache.get(reading_row(masked, i), PREPARED_MASKS)
        assert np.abs(unpack(got['image']) - ready.voxels).max() < 1e-4
        assert (got['lung'] == ready.forward(mask)).all()
        assert (got['infection'] == ready.forward(Toy(masked.iloc[i]).infection)).all()
        assert cache.about(reading_row(masked, i))['lungs'] == done.scans.lungs[i]


@pytest.mark.parametrize('column', ['lung_mask', 'infection_mask'])
def test_another_mask_of_the_same_name_is_another_scan(masked, tmp_path, column):
    quiet(masked, KEEP, tmp_path / 'out', PREPARED_MASKS, jobs=1, lungs=whole)
    scan = Toy(masked.iloc[1]).scan
    new = np.zeros(scan.shape, bool)
    new[2:5, 3:9, 2:12] = True
    write_mask(new, scan, tmp_path / 'data' / masked[column][1], overwrite=True)
    again = quiet(masked, KEEP, tmp_path / 'out', PREPARED_MASKS, jobs=1, lungs=whole)
    assert (again.made, again.found) == (1, 3)
    got = Cache(tmp_path / 'out', KEEP, lungs=whole).get(reading_row(masked, 1), PREPARED_MASKS)
    assert (got[column.split('_')[0]] == prepare_scan(scan, PREP).forward(new)).all()


def wrong_grid(scan, file):
    write_mask(whole(scan)[1:], scan.replace(voxels=scan.voxels[1:]), file, True)


def wrong_place(scan, file):
    write_mask(whole(scan), scan.replace(origin=(0.0, 9.0, 0.0)), file, True)


def no_voxel(scan, file):
    write_mask(np.zeros(scan.shape, bool), scan, file, overwrite=True)


def no_byte(scan, file):
    file.write_bytes(b'')


def no_mask(scan, file):
    file.write_bytes(b'these are no voxels')


BAD = dict(
    wrong_grid=(wrong_grid, GeometryError, 'shapes differ'),
    wrong_place=(wrong_place, GeometryError, 'voxels apart'),
    no_voxel=(no_voxel, VoxelError, 'is empty: no voxel'),
    no_byte=(no_byte, DataError, 'is empty .0 bytes'),
    no_mask=(no_mask, DataError, 'NIfTI|cannot be read'),
)


@pytest.mark.parametrize('fault', BAD)
@pytest.mark.parametrize('prep', [KEEP, CROP])
def test_a_lung_mask_that_cannot_be_used_is_an_error_with_its_name(masked, tmp_path, prep, fault):
    spoil, kind, words = BAD[fault]
    file = tmp_path / 'data' / masked.lung_mask[0]
    spoil(Toy(masked.iloc[0]).scan, file)
    with pytest.raises(kind, match=words) as e:
        prepare_row(reading_row(masked, 0), prep, lungs=whole)
    assert e.value.source == str(file) and e.value.remedy
    done = quiet(masked, prep, tmp_path / 'out', jobs=1, lungs=whole)
    ((scan_id, _, said, remedy),) = done.failures.values
    assert scan_id == masked.scan_id[0] and done.made == 3
    assert said.startswith(f'{file.name}: ') and remedy


def test_a_spoilt_infection_mask_is_an_error_with_its_name(masked, tmp_path):
    wrong_grid(Toy(masked.iloc[2]).scan, tmp_path / 'data' / masked.infection_mask[2])
    done = quiet(masked, PREP, tmp_path / 'out', PREPARED_MASKS, jobs=1, lungs=whole)
    ((_, kind, said, _),) = done.failures.values
    assert kind == 'GeometryError' and said.startswith(masked.infection_mask[2])


def test_without_a_need_for_lungs_none_are_read_or_found(masked, tmp_path):
    no_voxel(Toy(masked.iloc[0]).scan, tmp_path / 'data' / masked.lung_mask[0])

    def never(scan):
        raise AssertionError('asked for')

    done = quiet(masked, PREP, tmp_path / 'out', jobs=1, lungs=never)
    assert done.exit_code == 0 and set(done.scans.lungs) == {'none'}
    assert 'lung masks' not in str(done)


def test_lungs_are_found_once_for_crop_and_mask(masked):
    asked = []

    def counted(scan):
        asked.append(1)
        return whole(scan)

    arrays, about = prepare_row(reading_row(masked, 3), KEEP, ('lung',), lungs=counted)
    assert len(asked) == 1 and about['lungs'] == 'built-in' and arrays['lung'].all()


# ── files that have changed ───────────────────────────────────────────────────────────────────────
def brighter(scan):
    return scan.replace(voxels=(scan.voxels + 150 * (scan.voxels < -500)).astype('i2'))


def as_pair(end):
    def write(scan, folder):
        folder.mkdir(exist_ok=True)
        sitk.WriteImage(to_image(scan.voxels, scan), str(folder / f'a{end}'))
        return folder / f'a{end}'

    return write


def nested(scan, folder):
    write_series(scan, folder / 'STUDY' / 'DICOM' / 'S1')
    return folder


def by_dicomdir(scan, folder):
    write_series(scan, folder / 'IMAGES' / 'S1')
    (folder / 'DICOMDIR').write_bytes(b'a table of contents')
    return folder / 'DICOMDIR'


KINDS = dict(
    nested=nested,
    flat=write_series,
    dicomdir=by_dicomdir,
    mhd=as_pair('.mhd'),
    nhdr=as_pair('.nhdr'),
    mha=as_pair('.mha'),
)


def stamps(folder):
    return {f: f.stat() for f in folder.rglob('*') if f.is_file()}


@pytest.mark.parametrize('keep_times', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_a_changed_scan_is_prepared_again(tmp_path, kind, keep_times):
    """Voxels change in place: in nested folders, beside a header, with the old time and size put
    back"""
    scan = Toy(dict(seed=3, scan_id='S', patient_id='P', label='covid')).scan
    path = KINDS[kind](scan, tmp_path / 'scan')
    cohort = pd.DataFrame([dict(patient_id='P', scan_id='S', label='covid', path=str(path))])
    assert quiet(cohort, PREP, tmp_path / 'out', jobs=1).made == 1
    assert quiet(cohort, PREP, tmp_path / 'out', jobs=1).found == 1
    before = stamps(tmp_path / 'scan')
    contents = {f: f.read_bytes() for f in before}
    KINDS[kind](brighter(scan), tmp_path / 'scan')
    after = stamps(tmp_path / 'scan')
    assert {f: s.st_size for f, s in after.items()} == {f: s.st_size for f, s in before.items()}
    for f, s in before.items():  # the header of a pair has not changed
        if keep_times or f.read_bytes() == contents[f]:
            os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
    again = quiet(cohort, PREP, tmp_path / 'out', jobs=1)
    assert (again.made, again.found) == (1, 0)
    got = Cache(tmp_path / 'out', PREP).get(cohort.iloc[0])['image']
    assert np.abs(unpack(got) - prepare_scan(brighter(scan), PREP).voxels).max() < 1e-4


def test_a_copy_with_the_same_content_and_times_is_the_same_scan(tmp_path):
    "Copied with its times, as rsync does: hashed once, not prepared again"
    scan = Toy(dict(seed=3, scan_id='S', patient_id='P', label='covid')).scan
    file = write_scan(scan, tmp_path / 's.nii.gz')
    cohort = pd.DataFrame([dict(patient_id='P', scan_id='S', label='covid', path=str(file))])
    done = quiet(cohort, PREP, tmp_path / 'out', jobs=1)
    stamp = {f: f.stat().st_mtime_ns for f in done.folder.glob('*.npy')}
    times, whole = file.stat(), file.read_bytes()
    file.unlink()
    file.write_bytes(whole)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert quiet(cohort, PREP, tmp_path / 'out', jobs=1).found == 1
    assert stamp == {f: f.stat().st_mtime_ns for f in done.folder.glob('*.npy')}
    hashed = []
    real = C._content_of
    C._content_of = lambda row: hashed.append(1) or real(row)
    try:
        assert quiet(cohort, PREP, tmp_path / 'out', jobs=1).found == 1 and not hashed
    finally:
        C._content_of = real


def test_a_note_that_is_lost_or_damaged_counts_as_no_scan(cohort, tmp_path):
    done = quiet(cohort[:3], PREP, tmp_path, jobs=1, load=toy)
    notes = sorted(f for f in done.folder.glob('*.json') if f.name != 'recipe.json')
    notes[0].unlink()
    notes[1].write_text('{"lungs"')
    assert quiet(cohort[:3], PREP, tmp_path, jobs=1, load=toy).made == 2


def test_the_code_of_the_phantom_is_not_that_of_a_patient(tmp_path, monkeypatch):
    "It decides the voxels of a phantom made in memory, and nothing that was read from a file"
    real = C._code

    def folders():
        made = phantom_of, partial(phantom_of, shape=(8, 8, 8))
        return _cache_folder(tmp_path, PREP), *(_cache_folder(tmp_path, PREP, f) for f in made)

    before = folders()
    changed = {sys.modules[f'covid_ct.{m}'].__file__ for m in ('phantom.chest', 'phantom.anatomy')}
    monkeypatch.setattr(C, '_code', lambda f: real(f) + 'changed' if f in changed else real(f))
    assert [a == b for a, b in zip(before, folders(), strict=False)] == [True, False, False]


# ── 8-bit pictures ────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope='module')
def cc_ccii(tmp_path_factory):
    "Phantoms on disk as CC-CCII lies there: folders of 8-bit pictures without geometry"
    out = tmp_path_factory.mktemp('set') / 'cc'
    write_layout(phantom_cohort(8, seed=3, second_scan=0), out, 'cc_ccii', (24, 64, 64))
    return open_cohort(out)


def test_cc_ccii_goes_through_the_recipe_of_the_paper(cc_ccii, tmp_path):
    from covid_ct.train.recipes import recipe

    df = cc_ccii[cc_ccii.label.isin(('healthy', 'cap', 'covid'))]
    done = quiet(df, recipe('darnet', 'paper'), tmp_path, jobs=1)
    assert done.exit_code == 0 and done.made == len(df) >= 3
    assert set(done.scans.units) == {'uint8'} and set(done.scans.lungs) == {'none'}
    assert done.scans.remarks.str.contains('8-bit grey values, taken as they are').all()
    row = reading_row(df, 0)
    scan = read(row.path, allow_unknown_geometry=True)
    got = unpack(Cache(tmp_path, PREPS['darnet']).get(row)['image'])
    assert got.shape == (64, 224, 224)
    assert abs(got.mean() - scan.voxels.mean() / 255) < 0.01  # no window, nothing cut off


@pytest.mark.parametrize('name', ['fixed', 'tiny'])
def test_recipes_that_need_hu_name_the_one_that_takes_pictures(cc_ccii, tmp_path, name):
    from covid_ct.train.recipes import recipe

    done = quiet(cc_ccii, recipe('darnet', name), tmp_path, jobs=1)
    assert len(done.failures) == len(cc_ccii) and set(done.failures.error) == {'UnitsError'}
    assert done.failures.remedy.str.contains('darnet/paper').all()
    prep = PREPS[recipe('darnet', name).prep]
    with pytest.raises(UnitsError, match='darnet/paper'):
        prepare_row(reading_row(cc_ccii, 0), prep)
