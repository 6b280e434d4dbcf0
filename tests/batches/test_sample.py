"Sampling: frequencies, slow references, refusals, and the data loader as reader"

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from covid_ct.batches.augment import seeded_generator
from covid_ct.batches.samplers import (
    SIZE_GROUPS,
    ClassBalancedSampler,
    CompositionSampler,
    SizeBalancedSampler,
    UniformSampler,
    WeightedSampler,
    _deal_blocks,
    count_draws,
    draw_rows,
    draws_figure,
    dual_samplers,
    size_chances,
    size_groups,
    size_weights,
)
from covid_ct.scan import CohortError

TABLE = pd.DataFrame(
    dict(label=['healthy'] * 50 + ['cap'] * 20 + ['covid'] * 5), index=np.arange(75)[::-1] * 3
)
N = 100_000


def within(count, n, p, k=4.5):
    return (np.abs(count - n * p) <= k * np.sqrt(n * p * (1 - p))).all()


@pytest.mark.parametrize('seed', range(3))
def test_frequencies(seed):
    rows = np.bincount(list(ClassBalancedSampler(TABLE, num_samples=N, seed=seed)), minlength=75)
    p = 1 / 3 / TABLE.label.map(TABLE.label.value_counts()).to_numpy()
    assert rows.sum() == N and within(rows, N, p)
    assert within(pd.Series(rows).groupby(TABLE.label.to_numpy()).sum(), N, 1 / 3)
    u = np.bincount(list(UniformSampler(TABLE, num_samples=N, seed=seed)), minlength=75)
    assert u.max() - u.min() <= 1  # shuffles one behind the other are more even than chance


def test_order_of_a_shuffle_is_uniform():
    first = []
    s = UniformSampler(range(5))
    for e in range(5000):
        s.set_epoch(e)
        first.append(next(iter(s)))
    assert within(np.bincount(first, minlength=5), 5000, 0.2)


def test_epochs_are_independent():
    "Row drawn at the same place of neighbouring epochs: chance agreement only"
    s = WeightedSampler(np.ones(10), num_samples=20_000)
    a, b = [], []
    for out, e in ((a, 0), (b, 1)):
        s.set_epoch(e)
        out.extend(s)
    assert within(np.sum(np.equal(a, b)), 20_000, 0.1)


def test_draw_rows_against_torch_multinomial():
    w = np.array([0.5, 0, 2, 1, 0])
    ours = np.bincount(draw_rows(w, N, seeded_generator(1)), minlength=5) / N
    theirs = (
        torch.bincount(
            torch.multinomial(torch.tensor(w), N, True, generator=seeded_generator(2)), minlength=5
        ).numpy()
        / N
    )
    assert ours[[1, 4]].sum() == 0 and np.abs(ours - theirs).max() < 0.01
    assert draw_rows(w, 0, seeded_generator(1)) == []


def test_deterministic_and_silent():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    s = ClassBalancedSampler(TABLE, seed=4)
    a = list(s)
    assert a == list(s) == list(ClassBalancedSampler(TABLE, seed=4))
    s.set_epoch(1)
    assert list(s) != a
    assert torch.get_rng_state().equal(before) and all(type(i) is int for i in a)
    assert list(ClassBalancedSampler(TABLE, seed=0))[:6] == [70, 31, 59, 74, 73, 71] and list(
        UniformSampler(range(10))
    )[:6] == [1, 4, 7, 2, 3, 5]


def test_rows_are_positions_not_index():
    label = TABLE.label.to_numpy()[list(ClassBalancedSampler(TABLE, num_samples=3000))]
    assert within((label == 'covid').sum(), 3000, 1 / 3)
    d = count_draws(ClassBalancedSampler(TABLE), TABLE, epochs=4)
    assert d.index.equals(TABLE.index) and d.drawn.sum() == 300


def test_drawn_leaves_the_sampler_as_it_was():
    s = UniformSampler(TABLE)
    s.set_epoch(9)
    count_draws(s, TABLE, 3)
    assert s.epoch == 9


def test_order_of_classes_does_not_matter():
    a, b = (
        ClassBalancedSampler(TABLE, classes=c, seed=1) for c in (('covid', 'cap', 'healthy'), None)
    )
    assert list(a) == list(b)
    holder = type('Data', (), dict(cohort=TABLE, __len__=lambda self: 75))()
    assert list(ClassBalancedSampler(holder, seed=1)) == list(a)
    two = ClassBalancedSampler(TABLE, classes=('covid', 'cap'), num_samples=1000)
    assert 'healthy' not in set(TABLE.label.to_numpy()[list(two)])


def test_refusals():
    with pytest.raises(CohortError, match="no scan of class 'ild'"):
        ClassBalancedSampler(TABLE, classes=('healthy', 'ild'))
    for s in (UniformSampler, ClassBalancedSampler):
        with pytest.raises(CohortError, match='no scans to draw from'):
            s(TABLE[:0])
    for w in ([0, 0], [1, -1], [1, np.nan], [], [np.inf, 1]):
        with pytest.raises(CohortError, match='weights'):
            WeightedSampler(w)
    for s in (lambda n: UniformSampler(TABLE, n), lambda n: WeightedSampler([1, 2], n)):
        for n in (0, -3):
            with pytest.raises(CohortError, match='num_samples'):
                s(n)


def test_a_data_loader_reads_it():
    s = ClassBalancedSampler(TABLE, num_samples=22)
    got = torch.cat(list(DataLoader(range(75), 4, sampler=s)))
    assert got.tolist() == list(s) and len(s) == 22


# ---- several readers
MAKERS = dict(
    uniform=lambda **k: UniformSampler(TABLE, **k),
    weights=lambda **k: WeightedSampler(np.arange(75.0), **k),
    classes=lambda **k: ClassBalancedSampler(TABLE, **k),
    sizes=lambda **k: SizeBalancedSampler(SIZES, **k),
    composition=lambda **k: CompositionSampler(TABLE, dict(healthy=4, cap=3, covid=3), **k),
)


# ---- sizes (Ouyang et al. 2020, III-C)
def sizes(counts, seed=0):
    "A cohort with so many scans in each group, shuffled, with an index that is no position"
    value = dict(covid_small=0.01, covid_large=0.2, cap_small=0.0005, cap_large=0.01)
    d = pd.DataFrame(
        [
            (g.split('_')[0], value[g], g)
            for g, n in zip(SIZE_GROUPS, counts, strict=False)
            for _ in range(n)
        ],
        columns=['label', 'infection_ratio', 'group'],
    )
    d = d.sample(frac=1, random_state=seed)
    return d.assign(scan_id=[f's{i}' for i in range(len(d))]).set_index(np.arange(len(d)) * 7 + 3)


SIZES = sizes((4, 6, 12, 8))


def test_thresholds_are_the_papers():
    """Less than 0.030 is small COVID, more than 0.001 is large CAP, and the borders belong to
    the rest"""
    r = [0, 0.001, np.nextafter(0.001, 1), 0.0299, np.nextafter(0.03, 0), 0.03, 1]
    assert (
        size_groups(pd.DataFrame(dict(label='covid', infection_ratio=r))).tolist()
        == ['covid_small'] * 5 + ['covid_large'] * 2
    )
    assert (
        size_groups(pd.DataFrame(dict(label='cap', infection_ratio=r))).tolist()
        == ['cap_small'] * 2 + ['cap_large'] * 5
    )
    assert (size_groups(SIZES) == SIZES.group).all() and size_groups(SIZES).index.equals(
        SIZES.index
    )
    other = SIZES.replace(dict(label=dict(covid='flu', cap='ild')))
    assert (size_groups(other, ('flu', 'ild')) == SIZES.group).all()
    assert set(size_groups(SIZES, small=0.3, large=0.5)) == {'covid_small', 'cap_small'}


@pytest.mark.parametrize(
    'counts,weights,chances',
    [
        ((40, 60, 60, 40), (1.5, 1, 1, 1.5), (0.3, 0.2, 0.2, 0.3)),
        ((1, 3, 2, 1), (3, 1, 1, 2), (3 / 7, 1 / 7, 1 / 7, 2 / 7)),
        ((10, 10, 7, 7), (1, 1, 1, 1), (0.25,) * 4),
        ((20, 5, 1, 4), (0.25, 1, 1, 0.25), (0.1, 0.4, 0.4, 0.1)),
    ],
)  # where small COVID is common, its weight is below 1
def test_weights_by_hand(counts, weights, chances):
    assert size_weights(counts).tolist() == pytest.approx(list(weights)) and size_chances(
        counts
    ).tolist() == pytest.approx(list(chances))
    assert size_weights(
        dict(zip(SIZE_GROUPS[::-1], counts[::-1], strict=False))
    ).tolist() == pytest.approx(list(weights))  # names, in any order
    s = SizeBalancedSampler(sizes(counts))
    assert (
        s.chances.tolist() == pytest.approx(list(chances))
        and s.counts.tolist() == list(counts)
        and s.weights.sum() == pytest.approx(1)
    )
    for g, p, n in zip(SIZE_GROUPS, chances, counts, strict=False):
        assert np.allclose(s.weights[(s.groups == g).to_numpy()], p / n)


@pytest.mark.parametrize('counts', [(40, 60, 66, 44), (3, 200, 150, 2)])
def test_size_frequencies(counts):
    """10⁵ draws: groups by chance, scans alike inside; and the slow way, group first, has the
    same law"""
    d = sizes(counts)
    s = SizeBalancedSampler(d, num_samples=N, seed=1)
    rows = np.bincount(list(s), minlength=len(d))
    w = np.array([counts[1] / counts[0], 1, 1, counts[2] / counts[3]])
    p = pd.Series(w / w.sum(), SIZE_GROUPS)
    assert within(
        pd.Series(rows).groupby(d.group.to_numpy()).sum().reindex(list(SIZE_GROUPS)), N, p
    )
    assert within(rows, N, (d.group.map(p) / d.group.map(d.group.value_counts())).to_numpy(float))
    rng, members = np.random.default_rng(0), {g: np.flatnonzero(d.group == g) for g in SIZE_GROUPS}
    first = rng.choice(4, p=p, size=20_000)
    slow = np.bincount([rng.choice(members[SIZE_GROUPS[g]]) for g in first], minlength=len(d))
    for a, b in zip(rows / N, slow / 20_000, strict=False):
        assert abs(a - b) < 5 * (max(b, 1e-3) / 20_000) ** 0.5


def test_draws_are_independent():
    "After a large CAP, the next group has the same chances as ever"
    d = sizes((40, 60, 66, 44))
    g = d.group.to_numpy()[list(SizeBalancedSampler(d, num_samples=N))]
    after = g[1:][g[:-1] == 'cap_large']
    assert within((after == 'cap_large').sum(), len(after), 0.3)


def test_sizes_refused():
    one = SIZES[SIZES.label == 'covid']
    for bad, match in (
        (
            SIZES.drop(columns='infection_ratio'),
            "no column 'infection_ratio'.*infected voxels over",
        ),
        (SIZES.drop(columns='label'), "no column 'label'"),
        (
            SIZES.assign(infection_ratio=SIZES.infection_ratio.where(SIZES.scan_id != 's4')),
            r'scan s4: has no infection_ratio \(1 of 30 scans\). Segment it',
        ),
        (SIZES.assign(infection_ratio='much'), 'has no infection_ratio'),
        (
            SIZES.assign(infection_ratio=100 * SIZES.infection_ratio),
            r'outside \[0,1\].*not percent',
        ),
        (SIZES.assign(infection_ratio=-0.1), r'outside \[0,1\]'),
        (SIZES.assign(infection_ratio=np.inf), r'outside \[0,1\]'),
        (SIZES.replace('cap', 'healthy'), "label other than 'covid' and 'cap'.*classes="),
        (one, 'no cap scan, one class only.*UniformSampler'),
        (SIZES[SIZES.label == 'cap'], 'no covid scan, one class only'),
        (SIZES[SIZES.group != 'covid_small'], "no scan in group 'covid_small'.*small="),
        (SIZES[SIZES.group != 'covid_large'], "no scan in group 'covid_large'.*small="),
        (SIZES[SIZES.group != 'cap_large'], "no scan in group 'cap_large'.*large="),
        (SIZES[SIZES.group != 'cap_small'], "no scan in group 'cap_small'.*large="),
        (SIZES[:0], 'no scans to draw from'),
    ):
        with pytest.raises(CohortError, match=match):
            SizeBalancedSampler(bad)
    for counts in (
        (0, 1, 1, 1),
        (1, 0, 1, 1),
        (1, 1, 0, 1),
        (1, 1, 1, 0),
        (0, 0, 1, 1),
        (1, 1, np.nan, 1),
        (),
    ):
        with pytest.raises(CohortError):
            size_weights(counts)


def test_dual_samplers():
    two = dual_samplers(SIZES, seed=5)
    assert (
        list(two) == ['us', 'ss']
        and sorted(two['us']) == list(range(30))
        and list(two['ss']) == list(SizeBalancedSampler(SIZES, seed=5))
    )
    few = dual_samplers(SIZES, num_samples=11)
    assert [len(s) for s in few.values()] == [11, 11]
    with pytest.raises(CohortError, match='no scan in group'):
        dual_samplers(SIZES, small=0.001)


def test_plot_of_what_was_drawn():
    d = count_draws(SizeBalancedSampler(SIZES), SIZES, epochs=3)
    fig = draws_figure(d, bins=6)
    bars = [p.get_height() for ax in fig.axes for p in ax.patches if hasattr(p, 'get_height')]
    assert sum(bars) == pytest.approx(1) and len(fig.axes) == 2


# ---- batches of a fixed composition (Wang et al. 2020, IV-B)
WARD = (
    pd.DataFrame(dict(label=['covid'] * 11 + ['healthy'] * 30 + ['ild'] * 7 + ['cap'] * 4))
    .sample(frac=1, random_state=0)
    .set_index(np.arange(52) * 5)
)
TEN = dict(healthy=4, ild=3, covid=3)


@pytest.mark.parametrize(
    'composition',
    [TEN, dict(covid=1), dict(cap=4, covid=11), dict(ild=7, healthy=2, cap=1, covid=5)],
)
def test_composition_holds(composition):
    label = WARD.label.to_numpy()
    s = CompositionSampler(WARD, composition, batches=40, seed=2)
    assert s.batch_size == sum(composition.values()) and len(s) == 40
    wanted = [c for c, k in composition.items() for _ in range(k)]
    for e in (0, 1):
        s.set_epoch(e)
        got = list(s)
        assert len(got) == len(s)
        for rows in got:
            assert label[rows].tolist() == wanted and len(set(rows)) == len(rows)


def test_composition_shows_everybody_alike():
    s = CompositionSampler(WARD, TEN)
    assert len(s) == 8  # ⌈30/4⌉ = 8, ⌈7/3⌉ = 3, ⌈11/3⌉ = 4
    for batches in (8, 100):
        s = CompositionSampler(WARD, TEN, batches=batches)
        count = (
            pd.Series(np.bincount(sum(s, []), minlength=52))
            .groupby(WARD.label.to_numpy())
            .agg(['min', 'max', 'sum'])
        )
        assert count['sum'].to_dict() == dict(
            healthy=4 * batches, ild=3 * batches, covid=3 * batches, cap=0
        )
        assert (count['max'] - count['min'] <= 1).all() and count.loc['healthy', 'min'] >= 1


def test_composition_is_a_function_of_seed_and_epoch():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = CompositionSampler(WARD, TEN, seed=1), CompositionSampler(WARD, TEN, seed=1)
    b.set_epoch(4)
    list(b)
    b.set_epoch(0)
    assert list(a) == list(b) == list(a) and torch.get_rng_state().equal(before)
    b.set_epoch(1)
    assert list(b) != list(a) and list(CompositionSampler(WARD, TEN, seed=2)) != list(a)
    assert all(type(i) is int for rows in a for i in rows)


def test_shuffles_of_a_deck_are_fair():
    "First cards, and pairs within a block: uniform; also after the deck ran out"
    decks = [_deal_blocks(5, 3, 3, seeded_generator('fair', s)) for s in range(4000)]
    for k in range(3):
        assert within(np.bincount([d[k][0] for d in decks], minlength=5), 4000, 0.2), k
        pairs = pd.Series([tuple(sorted(d[k][:2])) for d in decks]).value_counts()
        assert len(pairs) == 10 and (
            k == 1 or within(pairs, 4000, 0.1)
        )  # the second block begins with the two that were left


@pytest.mark.parametrize('n,size', [(1, 1), (3, 3), (4, 3), (5, 3), (7, 2), (10, 9)])
def test_decks_never_repeat_a_card(n, size):
    blocks = _deal_blocks(n, size, 50, seeded_generator(n, size))
    assert all(len(set(b)) == size for b in blocks)
    for k in range(1, 50):
        assert np.ptp(np.bincount(sum(blocks[:k], []), minlength=n)) <= 1


def test_a_data_loader_reads_batches_in_workers():
    data = [dict(i=i, label=name) for i, name in enumerate(WARD.label)]
    s = CompositionSampler(WARD, TEN, seed=3)
    for workers in (0, 2):
        got = [b['i'].tolist() for b in DataLoader(data, batch_sampler=s, num_workers=workers)]
        assert got == list(s)
    holder = type('Data', (), dict(cohort=WARD, __len__=lambda self: 52))()
    assert list(CompositionSampler(holder, TEN, seed=3)) == got


def test_compositions_refused():
    for bad, match in (
        (dict(healthy=4, flu=1), r"0 scan\(s\) of class 'flu', a batch needs 1"),
        (dict(ild=8), r"7 scan\(s\) of class 'ild', a batch needs 8"),
        ({}, 'composition'),
        (dict(ild=0), 'at least one'),
    ):
        with pytest.raises(CohortError, match=match):
            CompositionSampler(WARD, bad)
    with pytest.raises(CohortError, match='no scans to draw from'):
        CompositionSampler(WARD[:0], TEN)
    with pytest.raises(CohortError, match='num_samples=0'):
        CompositionSampler(WARD, TEN, batches=0)
