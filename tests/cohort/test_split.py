"Splitting: the leak of the published table, folds beside scikit-learn's, hashes, refusals"

import hashlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from covid_ct.cohort.splits import (
    _block_labels,
    _connected_blocks,
    assert_disjoint,
    expected_leak,
    fold_parts,
    leak_share,
    read_split,
    shuffled_order,
    split_hash,
    split_patients,
    test_part,
    write_split,
)
from covid_ct.scan import CohortError, SplitError


def ward(n=150, seed=0, labels=('healthy', 'cap', 'covid')):
    rng = np.random.default_rng(seed)
    rows = [
        (
            f'P{i:03d}',
            labels[
                rng.choice(
                    len(labels),
                    p=np.array([5, 3, 2][: len(labels)]) / sum([5, 3, 2][: len(labels)]),
                )
            ],
        )
        for i in range(n)
    ]
    d = pd.DataFrame(
        [r for r in rows for _ in range(rng.integers(1, 5))], columns=['patient_id', 'label']
    )
    return d.assign(scan_id=[f'S{i:04d}' for i in range(len(d))])


def test_this_split_never_changes():
    "A known answer: another platform, Python or NumPy must give the same"
    d = pd.DataFrame(dict(patient_id=list('abcdefghij'), scan_id=range(10), label=['x', 'y'] * 5))
    s = split_patients(d, folds=2, test=0.2, seed=0)
    assert shuffled_order('abcde', seed=0) == sorted(
        'abcde', key=lambda i: hashlib.sha256(f'0|{i}'.encode()).hexdigest()
    )
    code = (
        "import pandas as pd; from covid_ct.cohort.splits import split_hash, split_patients; "
        "d = pd.DataFrame(dict(patient_id=list('abcdefghij'), "
        "scan_id=range(10), label=['x','y']*5));"
        "print(split_hash(split_patients(d.iloc[::-1], folds=2, test=.2, seed=0)))"
    )
    env = dict(__import__('os').environ, PYTHONHASHSEED='7')
    assert subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=env, check=True
    ).stdout.strip() == split_hash(s)
    assert split_hash(s) == 'a841703c7cb524b2ddef66beceed97339cc0a11402050a7e68b5646188d95855'


@pytest.mark.parametrize('seed', range(5))
def test_properties(seed):
    d = ward(seed=seed)
    s = split_patients(d, folds=5, test=0.2, seed=seed)
    assert (
        (s.groupby('patient_id').fold.nunique() == 1).all()
        and s.index.equals(d.index)
        and s.fold.dtype.kind == 'i'
    )
    mixed = split_patients(d.sample(frac=1, random_state=seed), folds=5, test=0.2, seed=seed)
    assert (mixed.fold.sort_index() == s.fold).all() and split_hash(mixed) == split_hash(s)
    p = s.drop_duplicates('patient_id')
    per = p[p.fold >= 0].groupby(['label', 'fold']).size().unstack()
    assert (per.max(axis=1) - per.min(axis=1) <= 1).all()
    sizes = p[p.fold >= 0].fold.value_counts()
    assert sizes.max() - sizes.min() <= 1
    share = (p.fold < 0).groupby(p.label).mean()
    assert (abs(share - 0.2) < 0.5 / p.label.value_counts().min() + 1e-9).all()
    assert split_patients(d, seed=seed + 100).fold.ne(s.fold).any()


def test_at_least_as_balanced_as_sklearn():
    "Label shares per fold, in patients: ours differ no more than StratifiedGroupKFold's"
    d = ward(300)
    ours = split_patients(d, folds=5, test=0).drop_duplicates('patient_id')
    theirs = ours.copy()
    for k, (_, v) in enumerate(
        StratifiedGroupKFold(5, shuffle=True, random_state=0).split(d, d.label, d.patient_id)
    ):
        theirs.loc[theirs.patient_id.isin(d.patient_id.iloc[v]), 'fold'] = k

    def uneven(t):
        return t.groupby(['label', 'fold']).size().unstack().std(axis=1).max()

    assert uneven(ours) <= uneven(theirs)


def test_patients_with_two_labels_stay_whole():
    d = ward(90)
    d.loc[d.groupby('patient_id').cumcount().eq(1) & d.label.eq('covid'), 'label'] = 'healthy'
    assert (d.groupby('patient_id').label.nunique() > 1).any()
    s = split_patients(d)
    assert (s.groupby('patient_id').fold.nunique() == 1).all()
    both = d.groupby('patient_id').label.nunique() > 1
    assert set(_block_labels(d)[both[both].index]) == {'covid'}


def test_integer_and_text_names_are_the_same():
    d = ward(60).assign(patient_id=lambda t: t.patient_id.str[1:].astype(int))
    assert split_hash(split_patients(d)) == split_hash(
        split_patients(d.astype({'patient_id': str}))
    )
    with pytest.raises(SplitError):
        assert_disjoint(d[:40], d[:40].astype({'patient_id': str}))


def test_refusals():
    d = ward(60)
    with pytest.raises(SplitError, match="too few for 40 folds.*Use folds ≤"):
        split_patients(d, folds=40)
    with pytest.raises(SplitError, match='folds=1'):
        split_patients(d, folds=1)
    with pytest.raises(SplitError, match='test=1'):
        split_patients(d, test=1)
    with pytest.raises(CohortError, match='no rows'):
        split_patients(d[:0])
    with pytest.raises(CohortError, match="no column 'label'"):
        split_patients(d.drop(columns='label'))
    with pytest.raises(SplitError, match=f'1 of {len(d)} scans have no patient_id'):
        split_patients(d.assign(patient_id=d.patient_id.where(d.index != 3)))
    with pytest.raises(CohortError, match='has no label'):
        split_patients(d.assign(label=d.label.where(d.index != 3)))
    with pytest.raises(CohortError, match="no column 'centre'"):
        split_patients(d, group=('patient_id', 'centre'))
    with pytest.raises(CohortError, match='stands twice'):
        split_patients(pd.concat([d, d[:1]]))
    with pytest.raises(CohortError, match='has no fold 7'):
        fold_parts(split_patients(d), 7)
    with pytest.raises(CohortError, match='has no fold -1'):
        fold_parts(split_patients(d), -1)
    with pytest.raises(CohortError, match='has no fold 0'):
        fold_parts(d, 0)


def test_disjoint_names_patients_and_sides():
    a, b, c = (pd.DataFrame(dict(patient_id=list(p))) for p in ('abc', 'def', 'gca'))
    assert assert_disjoint(a, b) is None
    with pytest.raises(SplitError, match=r'train and test: 2 patient\(s\) on both sides: a, c\. '):
        assert_disjoint(a, b, c)
    with pytest.raises(SplitError, match='left and right'):
        assert_disjoint(left=a, right=c)
    with pytest.raises(SplitError, match='part 3 and part 4'):
        assert_disjoint(a, b, a[:0], c[:1], c[:1])


def test_folds_use_everything_once():
    s = split_patients(ward(80), folds=4)
    held = [fold_parts(s, k)[1] for k in range(4)]
    assert sorted(pd.concat([*held, test_part(s)]).scan_id) == sorted(s.scan_id)
    for k in range(4):
        train, valid = fold_parts(s, k)
        assert (
            len(train) + len(valid) + len(test_part(s)) == len(s)
            and leak_share(train, valid) == leak_share(train, test_part(s)) == 0
        )


def test_a_leak_in_the_column_is_found():
    s = split_patients(ward(80), folds=4)
    p = s.patient_id[s.patient_id.duplicated()].iloc[0]
    i = s.index[s.patient_id == p][0]
    s.loc[i, 'fold'] = (s.loc[i, 'fold'] + 1) % 4 if s.loc[i, 'fold'] >= 0 else 0
    with pytest.raises(SplitError, match=p):
        [fold_parts(s, k) for k in range(4)]


def test_written_split(tmp_path):
    s = split_patients(ward(60), folds=3)
    f = tmp_path / 'split.csv'
    assert (
        write_split(s, f)
        == hashlib.sha256(f.read_bytes()).hexdigest()
        == split_hash(s.sample(frac=1, random_state=0))
    )
    assert split_hash(s.assign(fold=s.fold.astype(float))) == split_hash(s)
    assert (read_split(s.drop(columns='fold'), f).fold == s.fold).all() and list(
        tmp_path.iterdir()
    ) == [f]
    other = s.assign(fold=np.roll(s.fold, 1))
    assert split_hash(other) != split_hash(s)
    with pytest.raises(SplitError, match='does not know scan'):
        read_split(ward(61), f)
    write_split(other, f)
    with pytest.raises(SplitError, match='both sides'):
        read_split(s, f)
    f.write_text('a,b\n1,2\n')
    with pytest.raises(SplitError, match='has the columns'):
        read_split(s, f)


@pytest.mark.parametrize('m,test', [(1, 0.2), (2, 0.2), (3, 0.5), (26, 0.2), (1200, 0.1)])
def test_expected_leak_by_hand(m, test):
    d = pd.DataFrame(dict(patient_id=np.repeat(np.arange(40), m)))
    n, t = 40 * m, int(40 * m * test + 0.5)
    clean = 1.0
    for j in range(1, m):
        clean *= max(0, t - j) / (n - j)
    assert expected_leak(d, test) == pytest.approx(1 - clean)


# ---------------------------------------------------------------- what stays together
def reached(rows, ties):
    "Slow reference of blocks: from each row, walk along every tie"
    out = []
    for start in range(len(rows)):
        seen, todo = {start}, [start]
        while todo:
            i = todo.pop()
            for j in range(len(rows)):
                if j not in seen and any(i in t and j in t for t in ties):
                    seen.add(j)
                    todo.append(j)
        out.append(frozenset(seen))
    return out


@pytest.mark.parametrize('seed', range(6))
def test_blocks_are_connected_components(seed):
    rng = np.random.default_rng(seed)
    n = 40
    d = pd.DataFrame(
        dict(
            patient_id=rng.integers(0, 25, n),
            centre=rng.integers(0, 18, n),
            scan_id=np.arange(n) + 100,
        ),
        index=rng.permutation(n),
    )
    twins = [tuple(rng.choice(d.scan_id, 2, replace=False)) for _ in range(3)]
    ties = [
        set(np.flatnonzero(d[c] == v)) for c in ('patient_id', 'centre') for v in d[c].unique()
    ] + [set(np.flatnonzero(d.scan_id.isin(s))) for s in twins]
    want, got = reached(d, ties), _connected_blocks(d, ('patient_id', 'centre'), twins)
    assert got.index.equals(d.index)
    for i in range(n):
        for j in range(n):
            assert (got.iloc[i] == got.iloc[j]) == (j in want[i])
    mixed = d.sample(frac=1, random_state=seed)
    assert (
        _connected_blocks(mixed, ('patient_id', 'centre'), twins[::-1])[d.index] == got
    ).all()  # names too do not depend on the order


def test_a_chain_is_followed_to_its_end():
    "Patient k is seen in centres k and k+1: sixty of them are one block"
    d = pd.DataFrame(
        dict(
            patient_id=np.repeat(np.arange(60), 2),
            scan_id=np.arange(120),
            centre=np.repeat(np.arange(61), 2)[1:-1],
            label='covid',
        )
    )
    assert (
        _connected_blocks(d, ('patient_id', 'centre')).nunique() == 1
        and _connected_blocks(d).nunique() == 60
    )
    assert _connected_blocks(d.drop(index=61), ('patient_id', 'centre')).nunique() == 2
    with pytest.raises(SplitError, match=r"1 block\(s\) by patient_id\+centre: too few"):
        split_patients(d, folds=2, group=('patient_id', 'centre'))


def test_plain_patients_are_their_own_blocks():
    d = ward(60)
    assert (_connected_blocks(d) == d.patient_id).all()
    assert (
        split_hash(split_patients(d, group=('patient_id',)))
        == split_hash(split_patients(d))
        == split_hash(split_patients(d, together=[d.scan_id[:1]]))
    )


def test_patients_that_move_keep_their_centres_together():
    rng = np.random.default_rng(3)
    d = ward(200, seed=3)
    d = d.assign(
        centre=d.patient_id.map({p: f'C{rng.integers(40):02d}' for p in sorted(set(d.patient_id))}),
        label='covid',
    )
    i = d.index[d.patient_id.duplicated()][:5]
    d.loc[i, 'centre'] = 'C00'
    with pytest.raises(SplitError, match='both sides'):
        [split_patients(d, seed=s, group='centre') for s in range(9)]
    s = split_patients(d, group=('patient_id', 'centre'))
    for c in ('patient_id', 'centre'):
        assert (s.groupby(c).fold.nunique() == 1).all()
    assert set(s.fold) == {-1, 0, 1, 2, 3, 4} and 'split_by' not in s


def test_twins_stay_together():
    """Files of the same content under two patients never stand on two sides; without the sets they
    would"""
    d = ward(120, seed=1)
    rng = np.random.default_rng(1)
    twins = [list(rng.choice(d.scan_id, 2, replace=False)) for _ in range(12)]
    fold = split_patients(d).set_index('scan_id').fold
    assert any(fold[a] != fold[b] for a, b in twins)
    s = split_patients(d, together=twins)
    fold = s.set_index('scan_id').fold
    assert (
        all(fold[a] == fold[b] for a, b in twins)
        and (s.groupby('patient_id').fold.nunique() == 1).all()
    )
    with pytest.raises(SplitError, match='names the scan nobody'):
        split_patients(d, together=[['nobody', d.scan_id[0]]])


# ---------------------------------------------------------------- patients that nobody knows
SLICES = pd.DataFrame(
    dict(scan_id=[f'{k:03d}' for k in range(100)], label=['covid'] * 60 + ['healthy'] * 40)
)


@pytest.mark.parametrize(
    'unknown', [None, np.nan, '', ' ', 'unknown', 'Unknown', 'nan', 'None', pd.NA]
)
def test_unknown_patients_are_not_dealt(unknown):
    d = SLICES.assign(patient_id=unknown)
    for f in (
        split_patients,
        _connected_blocks,
        expected_leak,
        lambda d: leak_share(d, d),
        lambda d: assert_disjoint(d[:50], d[50:]),
    ):
        with pytest.raises(
            SplitError,
            match=r"scans have no patient_id, so that a split by patient is impossible"
            r".*group='scan_id'",
        ):
            f(d)
    with pytest.raises(SplitError, match='100 of 100'):
        split_patients(SLICES)  # no such column at all
    s = split_patients(d, group='scan_id')
    assert (
        (s.split_by == 'scan_id').all() and s.fold.nunique() == 6 and fold_parts(s, 0) is not None
    )
    assert split_hash(s) == split_hash(split_patients(SLICES, group='scan_id'))


def test_a_split_by_scan_says_so(tmp_path):
    s = split_patients(SLICES, group='scan_id')
    assert split_hash(s) != split_hash(s.drop(columns='split_by'))
    name = write_split(s, tmp_path / 's.csv')
    assert (tmp_path / 's.csv').read_text().startswith('scan_id,patient_id,fold,split_by\n000,,')
    back = read_split(SLICES, tmp_path / 's.csv')
    assert (
        (back.split_by == 'scan_id').all()
        and (back.fold == s.fold).all()
        and split_hash(back) == name
    )
    train, valid = fold_parts(back, 2)
    with pytest.raises(SplitError, match='both sides: scan 0'):
        assert_disjoint(train, pd.concat([valid, train[:1]]))
    with pytest.raises(SplitError, match='no patient_id'):
        assert_disjoint(train.drop(columns='split_by'), valid)


def test_patients_that_are_known_stay_whole_in_a_split_by_scan():
    d = SLICES.assign(
        patient_id=[f'P{k // 10}' if k < 50 else 'unknown' for k in range(100)], label='covid'
    )
    with pytest.raises(SplitError, match='50 of 100'):
        split_patients(d)
    for seed in range(5):
        s = split_patients(d, group='scan_id', seed=seed)
        assert (s[:50].groupby('patient_id').fold.nunique() == 1).all() and s[
            50:
        ].fold.nunique() == 6
    d.loc[99, 'patient_id'] = '099'
    s = split_patients(d.assign(scan_id=d.scan_id.replace('000', '0')), group='scan_id')
    assert len(s) == 100  # a patient called like a scan is no scan


@pytest.mark.data
def test_half_of_a_random_cc_ccii_test_set_leaks(data_dir):
    "The published table: 50 % of a random scan-level test set has its patient in the training set"
    d = pd.read_csv(data_dir / 'cc_ccii_tables' / 'unzip_filenames.csv')
    assert (len(d), d.patient_id.nunique()) == (4178, 2742)
    rng, measured = np.random.default_rng(0), []
    for _ in range(50):
        o = rng.permutation(len(d))
        measured.append(leak_share(d.iloc[o[836:]], d.iloc[o[:836]]))
    assert expected_leak(d) == pytest.approx(0.503, abs=0.001)
    assert abs(np.mean(measured) - expected_leak(d)) < 4 * np.std(measured) / 50**0.5
    s = split_patients(d)
    assert (
        max(leak_share(*fold_parts(s, k)) for k in range(5)) == 0
        and leak_share(s[s.fold >= 0], test_part(s)) == 0
    )
    p = s.drop_duplicates('patient_id').groupby(['label', 'fold']).size().unstack()
    assert (p[range(5)].max(axis=1) - p[range(5)].min(axis=1) <= 1).all()


@pytest.mark.data
def test_the_release_split_is_caught(data_dir):
    """The published train/validation list against the scans it was tested on: 255 of 472 leak, and
    assert_disjoint says so"""
    t = data_dir / 'cc_ccii_tables'
    train = pd.read_csv(t / 'release_split_train_val.csv')
    test = pd.read_csv(t / 'release_predictions.csv').drop_duplicates('scan_id')
    assert (len(test), round(leak_share(train, test) * len(test))) == (472, 255)
    with pytest.raises(SplitError, match='both sides'):
        assert_disjoint(train, test)


def test_whole_hospitals_and_a_patient_in_two():
    d = ward(120).assign(centre=lambda t: t.patient_id.str[-1], label='covid')
    s = split_patients(d, folds=3, test=0.2, group='centre')
    assert (s.groupby('centre').fold.nunique() == 1).all() and set(s.fold) == {-1, 0, 1, 2}
    p = d.patient_id[d.patient_id.duplicated()].iloc[0]
    i = d.index[d.patient_id == p][0]
    other = s.centre[s.fold != s.fold[i]].iloc[0]
    with pytest.raises(SplitError, match=p):
        split_patients(
            d.assign(centre=d.centre.where(d.index != i, other)), folds=3, test=0.2, group='centre'
        )
