"Sampling: frequencies, slow twins, refusals, and the data loader as reader"
import numpy as np, pandas as pd, pytest, torch
from torch.utils.data import DataLoader
from covid_ct.scan import CohortError
from covid_ct.data.augment import seeded
from covid_ct.data.sample import ClassBalancedSampler, UniformSampler, WeightedSampler, draw_rows, drawn

TABLE = pd.DataFrame(dict(label=['healthy']*50+['cap']*20+['covid']*5), index=np.arange(75)[::-1]*3)
N = 100_000


def within(count, n, p, k=4.5): return (np.abs(count-n*p) <= k*np.sqrt(n*p*(1-p))).all()


@pytest.mark.parametrize('seed', range(3))
def test_frequencies(seed):
    rows = np.bincount(list(ClassBalancedSampler(TABLE, num_samples=N, seed=seed)), minlength=75)
    p = 1/3/TABLE.label.map(TABLE.label.value_counts()).to_numpy()
    assert rows.sum() == N and within(rows, N, p)
    assert within(pd.Series(rows).groupby(TABLE.label.to_numpy()).sum(), N, 1/3)
    u = np.bincount(list(UniformSampler(TABLE, num_samples=N, seed=seed)), minlength=75)
    assert u.max()-u.min() <= 1  # shuffles one behind the other are more even than chance


def test_order_of_a_shuffle_is_uniform():
    first = []
    s = UniformSampler(range(5))
    for e in range(5000):
        s.set_epoch(e); first.append(next(iter(s)))
    assert within(np.bincount(first, minlength=5), 5000, .2)


def test_epochs_are_independent():
    "Row drawn at the same place of neighbouring epochs: chance agreement only"
    s = WeightedSampler(np.ones(10), num_samples=20_000)
    a, b = [], []
    for out, e in ((a, 0), (b, 1)): s.set_epoch(e); out.extend(s)
    assert within(np.sum(np.equal(a, b)), 20_000, .1)


def test_draw_rows_against_torch_multinomial():
    w = np.array([.5, 0, 2, 1, 0])
    ours = np.bincount(draw_rows(w, N, seeded(1)), minlength=5)/N
    theirs = torch.bincount(torch.multinomial(torch.tensor(w), N, True, generator=seeded(2)), minlength=5).numpy()/N
    assert ours[[1, 4]].sum() == 0 and np.abs(ours-theirs).max() < .01
    assert draw_rows(w, 0, seeded(1)) == []


def test_deterministic_and_silent():
    torch.manual_seed(0); before = torch.get_rng_state()
    s = ClassBalancedSampler(TABLE, seed=4)
    a = list(s); assert a == list(s) == list(ClassBalancedSampler(TABLE, seed=4))
    s.set_epoch(1); assert list(s) != a
    assert torch.get_rng_state().equal(before) and all(type(i) is int for i in a)
    assert list(ClassBalancedSampler(TABLE, seed=0))[:6] == [70, 31, 59, 74, 73, 71] and list(UniformSampler(range(10)))[:6] == [1, 4, 7, 2, 3, 5]


def test_rows_are_positions_not_index():
    label = TABLE.label.to_numpy()[list(ClassBalancedSampler(TABLE, num_samples=3000))]
    assert within((label == 'covid').sum(), 3000, 1/3)
    d = drawn(ClassBalancedSampler(TABLE), TABLE, epochs=4)
    assert d.index.equals(TABLE.index) and d.drawn.sum() == 300


def test_drawn_leaves_the_sampler_as_it_was():
    s = UniformSampler(TABLE); s.set_epoch(9); drawn(s, TABLE, 3)
    assert s.epoch == 9


def test_order_of_classes_does_not_matter():
    a, b = (ClassBalancedSampler(TABLE, classes=c, seed=1) for c in (('covid', 'cap', 'healthy'), None))
    assert list(a) == list(b)
    holder = type('Data', (), dict(cohort=TABLE))()
    assert list(ClassBalancedSampler(holder, seed=1)) == list(a)
    two = ClassBalancedSampler(TABLE, classes=('covid', 'cap'), num_samples=1000)
    assert 'healthy' not in set(TABLE.label.to_numpy()[list(two)])


def test_refusals():
    with pytest.raises(CohortError, match="no scan of class 'ild'"): ClassBalancedSampler(TABLE, classes=('healthy', 'ild'))
    for s in (UniformSampler, ClassBalancedSampler):
        with pytest.raises(CohortError, match='no scans to draw from'): s(TABLE[:0])
    for w in ([0, 0], [1, -1], [1, np.nan], [], [np.inf, 1]):
        with pytest.raises(CohortError, match='weights'): WeightedSampler(w)
    for s in (lambda n: UniformSampler(TABLE, n), lambda n: WeightedSampler([1, 2], n)):
        for n in (0, -3):
            with pytest.raises(CohortError, match='num_samples'): s(n)


def test_a_data_loader_reads_it():
    s = ClassBalancedSampler(TABLE, num_samples=22)
    got = torch.cat(list(DataLoader(range(75), 4, sampler=s)))
    assert got.tolist() == list(s) and len(s) == 22
