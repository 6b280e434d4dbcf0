"Loading: cache, failures, determinism over workers, and files as well as phantoms"

import os

import numpy as np
import pandas as pd
import pytest
import torch
from toys import LABELS, PREP, SIZE, Toy, fails, toy

from covid_ct.batches.augment import AUGMENTS, apply_view, draw_view, seeded_generator
from covid_ct.batches.loaders import (
    PREPARED_MASKS,
    Loader,
    ScanDataset,
    _to_device,
    collate,
    make_loader,
    make_loaders,
    prefetch,
)
from covid_ct.batches.samplers import ClassBalancedSampler, UniformSampler
from covid_ct.cohort.adapters import open_cohort
from covid_ct.cohort.table import check_cohort
from covid_ct.io.read import write_mask, write_scan
from covid_ct.phantom.cohort import phantom_cohort
from covid_ct.phantom.layouts import write_layout
from covid_ct.preprocess.resample import Prep, prepare_scan
from covid_ct.scan import CohortError, GeometryError, Scan, SplitError, UnitsError, VoxelError


@pytest.fixture
def cohort():
    return pd.DataFrame(
        [
            dict(patient_id=f'P{i // 2:02d}', scan_id=f'S{i:02d}', label=LABELS[i // 2 % 3], seed=i)
            for i in range(12)
        ],
        index=range(100, 112),
    )


def same(a, b):
    "Equal to the bit, nan beside nan"
    assert a.keys() == b.keys()
    for k in a:
        if torch.is_tensor(a[k]):
            assert a[k].dtype == b[k].dtype and torch.equal(
                torch.nan_to_num(a[k]), torch.nan_to_num(b[k])
            ), k
        else:
            assert a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]), k


def test_items_are_what_prepare_says(cohort):
    d = ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS)
    for i in (0, 5, 11):
        t, it = Toy(cohort.iloc[i]), d[i]
        p = prepare_scan(t.scan, PREP)
        assert np.abs(it['image'][0].numpy() - p.voxels).max() <= 1 / 131070 + 1e-7
        assert (it['lung'][0].numpy() == p.forward(t.lungs)).all() and (
            it['infection'][0].numpy() == p.forward(t.infection)
        ).all()
        assert it['label'] == LABELS.index(cohort.label.iloc[i]) and (
            it['scan_id'],
            it['patient_id'],
        ) == tuple(cohort.iloc[i][['scan_id', 'patient_id']])
    assert len(d) == 12


def test_a_cache_changes_nothing(cohort, tmp_path):
    plain, kept = (
        ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS),
        ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS, cache=tmp_path),
    )
    for _ in range(2):
        for i in range(12):
            same(plain[i], kept[i])

    def never(row):
        raise AssertionError('read again')

    never.__module__, never.__qualname__ = toy.__module__, toy.__qualname__
    again = ScanDataset(
        cohort.sample(frac=1, random_state=1).assign(fold=3),
        PREP,
        load=never,
        masks=PREPARED_MASKS,
        cache=tmp_path,
    )
    assert sorted(again[i]['scan_id'] for i in range(12)) == sorted(cohort.scan_id)


def test_damaged_files_are_made_again(cohort, tmp_path):
    d = ScanDataset(cohort, PREP, load=toy, masks=('lung',), cache=tmp_path)
    good = d[3]
    for hurt in (
        lambda f: f.write_bytes(f.read_bytes()[:-3]),
        lambda f: f.write_bytes(b''),
        lambda f: np.save(open(f, 'wb'), np.zeros(3)),
        lambda f: f.unlink(),
        lambda f: np.save(open(f, 'wb'), np.array([{}], dtype=object), allow_pickle=True),
    ):
        for f in tmp_path.rglob('*.npy'):
            hurt(f)
        same(d[3], good)


def test_refusals(cohort):
    def make(**k):
        return ScanDataset(**{**dict(cohort=cohort, prep=PREP, load=toy), **k})

    with pytest.raises(CohortError, match='no rows'):
        make(cohort=cohort[:0])
    with pytest.raises(CohortError, match="scan S04: its label 'covid'"):
        make(classes=('healthy', 'cap'))
    with pytest.raises(CohortError, match='no size'):
        make(prep=Prep(size=None, spacing=(5.0, 2.0, 2.0)))
    with pytest.raises(CohortError, match="'lobes' is unknown"):
        make(masks=('lobes',))
    with pytest.raises(CohortError, match='scan S02: has no infection_mask'):
        make(load=None, masks=('infection',))
    assert len(make(load=None, masks=('lung',))) == 12  # lungs can be found
    with pytest.raises(CohortError, match="no column 'label'"):
        make(cohort=cohort.drop(columns='label'))
    with pytest.raises(CohortError, match='no cache'):
        make().fill()
    d = make()
    with pytest.raises(CohortError, match='batches of 0'):
        make_loader(d, 0)
    with pytest.raises(CohortError, match='batches of 13'):
        make_loader(d, 13, drop_last=True)
    assert len(list(make_loader(d, 13))) == 1
    with pytest.raises(SplitError, match='train and valid: 1 patient.*P02'):
        make_loaders(make(cohort=cohort[:5]), make(cohort=cohort[5:]), 2)
    with pytest.raises(CohortError, match='other classes'):
        make_loaders(
            make(cohort=cohort[:4]), make(cohort=cohort[4:], classes=('covid', 'cap', 'healthy')), 2
        )


def test_a_scan_without_masks_does_not_get_empty_ones(cohort):
    d = ScanDataset(cohort, PREP, load=lambda r: Toy(r).scan, masks=('infection',))
    assert not d[0]['infection'].any()  # healthy: nothing to find
    with pytest.raises(CohortError, match='has no infection_mask'):
        d[4]


def test_ratio(cohort):
    def d(**k):
        return ScanDataset(**{**dict(cohort=cohort, prep=PREP, load=toy), **k})

    assert (
        np.isnan(d()[4]['ratio'])
        and d(cohort=cohort.assign(infection_ratio=0.25))[4]['ratio'] == 0.25
    )
    b = d(masks=PREPARED_MASKS)[4]
    assert b['ratio'] == pytest.approx(float((b['infection'] & b['lung']).sum() / b['lung'].sum()))
    assert np.isnan(d(masks=('infection',))[4]['ratio'])


def test_collate_types(cohort):
    d = ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS)
    b = collate([d[0], d[4], d[2]])
    assert {k: (v.dtype, tuple(v.shape)) for k, v in b.items() if torch.is_tensor(v)} == dict(
        image=(torch.float32, (3, 1, *SIZE)),
        lung=(torch.bool, (3, 1, *SIZE)),
        infection=(torch.bool, (3, 1, *SIZE)),
        label=(torch.int64, (3,)),
        ratio=(torch.float32, (3,)),
    )
    assert b['scan_id'] == ['S00', 'S04', 'S02'] and b['label'].tolist() == [0, 2, 1]


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_depend_on_seed_and_epoch_only(cohort, tmp_path, workers):
    def run(workers, seed, epochs=(0, 1)):
        d = ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS, cache=tmp_path)
        loader = make_loader(
            d, 5, ClassBalancedSampler(cohort, seed=seed), workers, seed, AUGMENTS['darnet']
        )
        out = []
        for e in epochs:
            loader.set_epoch(e)
            out += list(loader)
        return out

    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = run(0, 0)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(77)
    for x, y in zip(a, run(workers, 0), strict=False):
        same(x, y)
    for x, y in zip(a[3:], run(workers, 0, epochs=(1,)), strict=False):
        same(x, y)  # epoch 1 alone, as after a resume
    assert not a[0]['image'].equal(a[3]['image']) and not a[0]['image'].equal(run(0, 1)[0]['image'])


def test_validation_is_neither_shuffled_nor_augmented(cohort):
    a, b = (ScanDataset(c, PREP, load=toy) for c in (cohort[:6], cohort[6:]))
    train, valid = make_loaders(a, b, 4, augment=AUGMENTS['darnet'], seed=3)
    assert (
        valid.augment is None
        and sum((x['scan_id'] for x in valid), []) == cohort.scan_id[6:].tolist()
    )
    assert (
        isinstance(train.part.batches.sampler, UniformSampler)
        and len(train) == 2
        and train.dataset is a
    )
    same(next(iter(valid)), collate([b[i] for i in range(4)]))


def test_files_on_disk(cohort, tmp_path):
    "The default door: NIfTI scans and masks below a root, read, prepared, cached by size and time"
    rows = []
    for _, r in cohort[:6].iterrows():
        t = Toy(r)
        write_scan(t.scan, tmp_path / f'{r.scan_id}.nii.gz')
        write_mask(t.lungs, t.scan, tmp_path / f'{r.scan_id}_lung.nii.gz')
        write_mask(t.infection, t.scan, tmp_path / f'{r.scan_id}_inf.nii.gz')
        rows.append(
            dict(
                r,
                path=f'{r.scan_id}.nii.gz',
                lung_mask=f'{r.scan_id}_lung.nii.gz',
                infection_mask=f'{r.scan_id}_inf.nii.gz' if r.label != 'healthy' else None,
            )
        )
    files = pd.DataFrame(rows)
    d = ScanDataset(
        check_cohort(files, tmp_path), PREP, masks=PREPARED_MASKS, cache=tmp_path / 'cache'
    )  # the table knows its folder
    direct = ScanDataset(cohort[:6], PREP, load=toy, masks=PREPARED_MASKS)
    for i in range(6):
        same(d[i], direct[i])
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + '-moved'))
    new = ScanDataset(files, PREP, root=moved, masks=PREPARED_MASKS, cache=moved / 'cache')
    n = len(list((moved / 'cache').rglob('*.npy')))
    done = new.fill(jobs=1, progress=False)
    assert (done.made, done.found) == (0, 6) and len(
        list((moved / 'cache').rglob('*.npy'))
    ) == n  # moving a folder does not empty its cache
    other = Toy(dict(cohort.iloc[1], seed=99)).scan
    (moved / 'S01.nii.gz').unlink()
    write_scan(other, moved / 'S01.nii.gz')
    fresh = ScanDataset(files, PREP, root=moved, masks=PREPARED_MASKS, cache=moved / 'cache')[1]
    assert (
        np.abs(fresh['image'][0].numpy() - prepare_scan(other, PREP).voxels).max() < 1e-4
    )  # a replaced file is not served from the cache
    write_mask(
        np.zeros((4, 4, 4), bool),
        Scan(np.zeros((4, 4, 4), 'i2'), (1.0, 1.0, 1.0)),
        moved / 'small.nii.gz',
    )
    with pytest.raises(GeometryError):
        ScanDataset(files.assign(lung_mask='small.nii.gz'), PREP, root=moved, masks=('lung',))[0]


def test_memory_map_is_not_held_open(cohort, tmp_path):
    "An epoch over many scans keeps no files open"
    if not os.path.isdir('/proc/self/fd'):
        pytest.skip('counts open files through /proc')
    d = ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS, cache=tmp_path)
    for i in range(12):
        d[i]
    n = len(os.listdir('/proc/self/fd'))
    keep = [d[i] for i in range(12)]
    assert len(os.listdir('/proc/self/fd')) == n and keep


def test_fill_prepares_what_the_data_set_reads(cohort, tmp_path):
    d = ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS, cache=tmp_path)
    a = d[3]
    done = d.fill(jobs=1, progress=False)
    assert (done.made, done.found) == (11, 1) and done.folder == d.cache.folder
    d.load = d.cache.load = None  # nothing is loaded any more
    same(d[3], a)
    assert len([d[i] for i in range(12)]) == 12
    bad = ScanDataset(cohort, PREP, load=fails, cache=tmp_path)
    assert bad.fill(jobs=1, progress=False).failures.scan_id.tolist() == ['S04', 'S07']
    with pytest.raises(OSError, match='scratched'):
        bad[4]


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_the_items_stacked_and_their_views_the_drawn_ones(cohort, tmp_path, workers):
    "Two bytes on the way and a thread ahead change nothing: a slow reference, item by item"
    d = ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS, cache=tmp_path)
    loader, order = (
        make_loader(d, 5, UniformSampler(cohort, seed=3), workers, 3, AUGMENTS['darnet']),
        UniformSampler(cohort, seed=3),
    )
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        order.set_epoch(epoch)
        rows, g = list(order), seeded_generator(3, 'augment', epoch)
        for k, batch in enumerate(loader):
            want = collate([d[i] for i in rows[5 * k : 5 * k + 5]])
            same(batch, apply_view(want, draw_view(AUGMENTS['darnet'], len(want['label']), g)))
        assert k == 2


def test_two_bytes_become_the_same_numbers_wherever_they_are_unpacked():
    q = np.arange(65536, dtype='u2').reshape(1, 1, 16, 64, 64)
    on_cpu = _to_device({'image': torch.from_numpy(q)}, 'cpu')['image']
    assert (
        torch.equal(on_cpu, torch.from_numpy(q).float().mul_(1 / 65535))
        and on_cpu.dtype == torch.float32
    )
    floats = {'image': torch.rand(1, 1, 2, 2, 2), 'scan_id': ['a']}
    assert _to_device(floats)['image'] is floats['image']


def test_ahead_keeps_order_passes_errors_and_stops_early():
    made = []

    def numbers(n):
        for i in range(n):
            made.append(i)
            yield i
        raise OSError('scratched')

    it = prefetch(numbers(3))
    assert [next(it), next(it), next(it)] == [0, 1, 2]
    with pytest.raises(OSError, match='scratched'):
        next(it)
    made.clear()
    it = prefetch(numbers(100))
    next(it)
    it.close()
    assert len(made) <= 2 and list(prefetch([])) == []


def test_a_loader_is_told_apart_from_what_it_wraps(cohort):
    d = ScanDataset(cohort, PREP, load=toy)
    assert make_loader(d, 4).dataset is d
    same(next(iter(make_loader(d, 4))), next(iter(Loader(d, [[0, 1, 2, 3]]))))
    loader = make_loader(d, 4)
    it = iter(loader)
    next(it)
    del it  # left in the middle, begun again
    same(next(iter(loader)), collate([d[i] for i in range(4)]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no accelerator here')
def test_batches_lie_on_the_device(cohort):
    loader = make_loader(
        ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS),
        4,
        augment=AUGMENTS['darnet'],
        device='cuda',
    )
    b = next(iter(loader))
    assert b['image'].is_cuda and b['lung'].is_cuda and isinstance(b['scan_id'], list)
    same(
        {
            k: v.cpu() if torch.is_tensor(v) else v
            for k, v in next(iter(make_loader(loader.dataset, 4, device='cuda'))).items()
        },
        next(iter(make_loader(loader.dataset, 4))),
    )


@pytest.mark.parametrize('workers', [0, 2])
def test_a_part_of_every_batch_and_what_comes_after_some(cohort, workers):
    """What one of three processes reads, and what is left of an epoch, are those of the whole
    epoch, views included"""

    def make():
        return make_loader(
            ScanDataset(cohort, PREP, load=toy, masks=PREPARED_MASKS),
            5,
            UniformSampler(cohort, seed=2),
            workers,
            2,
            AUGMENTS['darnet'],
        )

    whole = list(make())
    for rank in range(3):
        loader = make()
        loader.share(rank, 3)
        parts = list(loader)
        assert [b['of'] for b in parts] == [5, 5, 2] and [len(b['image']) for b in parts] == [
            len(w['scan_id'][rank::3]) or 1 for w in whole
        ]
        for w, b in zip(whole, parts, strict=False):
            if rank < len(w['image']):
                assert (
                    w['image'][rank::3].equal(b['image'])
                    and w['infection'][rank::3].equal(b['infection'])
                    and w['scan_id'][rank::3] == b['scan_id']
                )
    loader = make()
    loader.skip(2)
    for w, b in zip(whole[2:], loader, strict=True):
        same(w, b)


def test_items_say_whose_lungs_were_used(cohort, tmp_path):
    "A table that names some lung masks: `own` for these, `built-in` for the others"
    rows, keep = [], Prep(size=SIZE, keep='lungs')
    for i, r in cohort[:4].reset_index(drop=True).iterrows():
        t = Toy(r)
        write_scan(t.scan, tmp_path / f'{r.scan_id}.nii.gz')
        row = dict(r, path=f'{r.scan_id}.nii.gz')
        if i % 2:
            write_mask(t.lungs, t.scan, tmp_path / f'{r.scan_id}_lung.nii.gz')
            row['lung_mask'] = f'{r.scan_id}_lung.nii.gz'
        rows.append(row)
    files = check_cohort(pd.DataFrame(rows), tmp_path)

    def everything(scan):
        return np.ones(scan.shape, bool)

    for cache in (None, tmp_path / 'cache', tmp_path / 'cache'):
        d = ScanDataset(files, keep, cache=cache, masks=('lung',), lungs=everything)
        batch = next(iter(make_loader(d, 4)))
        assert batch['lungs'] == ['built-in', 'own', 'built-in', 'own']
        for i in range(4):
            t = Toy(cohort.iloc[i])
            mask = t.lungs if i % 2 else everything(t.scan)
            ready = prepare_scan(t.scan, keep, mask)
            assert np.abs(batch['image'][i, 0].numpy() - ready.voxels).max() < 1e-4
            assert (batch['lung'][i, 0].numpy() == ready.forward(mask)).all()
    plain = ScanDataset(files, PREP)
    assert [plain[i]['lungs'] for i in range(4)] == ['none'] * 4


def test_an_empty_lung_mask_stops_the_scan_that_names_it(cohort, tmp_path):
    t = Toy(cohort.iloc[0])
    write_scan(t.scan, tmp_path / 's.nii.gz')
    write_mask(t.lungs & False, t.scan, tmp_path / 'm.nii.gz')
    files = check_cohort(cohort[:1].assign(path='s.nii.gz', lung_mask='m.nii.gz'), tmp_path)
    for cache in (None, tmp_path / 'cache'):
        d = ScanDataset(files, Prep(size=SIZE, keep='lungs'), cache=cache)
        with pytest.raises(VoxelError, match='m.nii.gz: this lung mask is empty.*built-in'):
            d[0]
    assert not list((tmp_path / 'cache').rglob('*.npy'))


def test_pictures_of_cc_ccii_load_by_the_recipe_of_the_paper(tmp_path):
    from covid_ct.train.recipes import recipe

    write_layout(phantom_cohort(8, seed=3, second_scan=0), tmp_path / 'cc', 'cc_ccii', (24, 64, 64))
    df = open_cohort(tmp_path / 'cc')
    d = ScanDataset(df, recipe('darnet', 'paper'), cache=tmp_path / 'cache')
    batch = next(iter(make_loader(d, 2)))
    assert batch['image'].shape == (2, 1, 64, 224, 224) and batch['lungs'] == ['none', 'none']
    assert 0 <= batch['image'].min() < batch['image'].max() <= 1
    for name in ('fixed', 'tiny'):
        d = ScanDataset(df, recipe('darnet', name))
        with pytest.raises(UnitsError, match='darnet/paper'):
            d[0]
