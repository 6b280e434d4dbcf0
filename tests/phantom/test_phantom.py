"The phantom against itself (determinism, truth, knobs) and against a real chest (marked data)"

import numpy as np
import pytest
from scipy import ndimage as ndi
from scipy.stats import wasserstein_distance

from covid_ct.phantom.anatomy import new_chest, noise_field, random_stream
from covid_ct.phantom.chest import PHANTOM_LABELS, PHANTOM_MASKS, SWITCHES, make_phantom
from covid_ct.phantom.cohort import _SHORTCUTS, phantom_cohort, phantom_of
from covid_ct.scan import DataError

SMALL = (32, 64, 64)


def fingerprint(p):
    """Coarse on purpose: shares of the lungs and of the volume, so that the last bit of an
    exponential does not matter"""
    h = np.histogram(p.scan.voxels, np.arange(-1050, 1100, 150))[0] / p.scan.voxels.size
    kinds = [
        (m).sum() / p.lungs.sum()
        for m in (
            *(p.lesions == k for k in range(1, 6)),
            *(p.lobes == k for k in range(1, 6)),
            p.airways,
            p.vessels,
        )
    ]
    return np.round(np.concatenate([h, kinds]), 3)


KNOWN = {  # shares of the volume by 150 HU, then of the lungs: lesions, lobes, airways, vessels
    'healthy': [
        0.522,
        0.093,
        0.045,
        0.018,
        0.013,
        0.027,
        0.088,
        0.164,
        0.02,
        0.008,
        0.001,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.21,
        0.279,
        0.17,
        0.093,
        0.247,
        0.011,
        0.011,
    ],
    'cap': [
        0.522,
        0.08,
        0.041,
        0.019,
        0.014,
        0.029,
        0.095,
        0.171,
        0.02,
        0.008,
        0.001,
        0.0,
        0.0,
        0.0,
        0.033,
        0.167,
        0.0,
        0.0,
        0.0,
        0.21,
        0.279,
        0.17,
        0.093,
        0.247,
        0.011,
        0.011,
    ],
    'covid': [
        0.522,
        0.078,
        0.047,
        0.03,
        0.013,
        0.027,
        0.089,
        0.164,
        0.02,
        0.008,
        0.001,
        0.0,
        0.0,
        0.0,
        0.19,
        0.01,
        0.0,
        0.0,
        0.0,
        0.21,
        0.279,
        0.17,
        0.093,
        0.247,
        0.011,
        0.011,
    ],
    'ild': [
        0.523,
        0.094,
        0.044,
        0.019,
        0.013,
        0.027,
        0.088,
        0.164,
        0.02,
        0.008,
        0.001,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.2,
        0.21,
        0.279,
        0.17,
        0.093,
        0.247,
        0.011,
        0.011,
    ],
}
STREAM = [1381391841, 962964187, 2015218773]


@pytest.mark.parametrize('label', PHANTOM_LABELS)
def test_same_seed_same_phantom(label):
    a, b = make_phantom(label, 3, SMALL), make_phantom(label, 3, SMALL)
    assert (a.scan.voxels == b.scan.voxels).all() and all(
        (getattr(a, n) == getattr(b, n)).all() for n in PHANTOM_MASKS
    )
    assert (make_phantom(label, 4, SMALL).scan.voxels != a.scan.voxels).any()


@pytest.mark.parametrize('label', PHANTOM_LABELS)
def test_fingerprint_of_every_platform(label):
    assert (
        np.abs(fingerprint(make_phantom(label, 3, SMALL, severity=0.2)) - KNOWN[label]).max()
        <= 0.003
    )


def test_random_streams_are_those_of_every_platform():
    assert random_stream(1, 2).integers(2**31, size=3).tolist() == STREAM
    assert random_stream(-1).random() == random_stream(2**32 - 1).random()


@pytest.mark.parametrize('label', PHANTOM_LABELS)
@pytest.mark.parametrize('shape', [(32, 64, 64), (64, 48, 56)])
def test_truth_is_consistent(label, shape):
    p = make_phantom(label, 9, shape)
    assert (
        p.scan.units == 'HU'
        and p.scan.voxels.dtype == np.int16
        and p.scan.shape == shape == p.lungs.shape
        and p.scan.geometry_known
    )
    assert -1024 <= p.scan.voxels.min() < -950 and 400 < p.scan.voxels.max() <= 3071
    assert (
        ((p.lobes > 0) == p.lungs).all()
        and not (p.lungs & p.airways).any()
        and not (p.vessels & ~p.lungs).any()
    )
    inside = np.isin(p.lesions, (1, 2, 3, 5))
    assert not (inside & ~p.lungs).any() and not ((p.lesions == 4) & p.lungs).any()
    assert (p.label == 'healthy') == (not p.infection.any()) and 0 <= p.infection_ratio < 1
    x = np.arange(shape[2]) - (shape[2] - 1) / 2
    assert not p.lobes[:, :, x > 0][
        np.isin(p.lobes[:, :, x > 0], (3, 4, 5))
    ].any()  # left lobes on the left: x grows to the left


def test_every_kind_of_lesion_occurs_at_its_density():
    seen = {k: [] for k in range(1, 6)}
    for label in PHANTOM_LABELS[1:]:
        for s in range(7):
            p = make_phantom(label, s, SMALL, noise=5, severity=0.15)
            for k in seen:
                m = (
                    p.lesions == k
                    if k == 4
                    else ndi.binary_erosion(p.lesions == k) & ~ndi.binary_dilation(p.vessels)
                )  # fluid is a thin layer
                if m.sum() > 15:
                    seen[k].append(float(np.median(p.scan.voxels[m])))
    bounds = {1: (-700, -300), 2: (-100, 60), 3: (-700, -200), 4: (-130, 40), 5: (-850, -250)}
    for k, (lo, hi) in bounds.items():
        assert seen[k] and lo < np.median(seen[k]) < hi, (k, seen[k])


@pytest.mark.parametrize('severity', [0.01, 0.05, 0.2, 0.4])
def test_severity_is_met(severity):
    p = make_phantom('covid', 2, (48, 80, 80), severity=severity)
    assert (np.isin(p.lesions, (1, 2, 3)) & p.lungs).sum() / p.lungs.sum() == pytest.approx(
        severity, rel=0.05
    )


def test_classes_differ_in_place_not_only_in_amount():
    share, sides = {}, {}
    for label in ('cap', 'covid'):
        ps = [make_phantom(label, s, SMALL, severity=0.08) for s in range(10)]
        per = [
            np.array([(np.isin(p.lesions, (1, 2, 3)) & (p.lobes == k)).sum() for k in range(1, 6)])
            for p in ps
        ]
        share[label] = np.mean([v.max() / v.sum() for v in per])
        sides[label] = np.mean([min(v[:2].sum(), v[2:].sum()) / v.sum() for v in per])
    assert (
        share['cap'] > 0.95
        and share['covid'] < 0.75
        and sides['covid'] > 0.1
        and sides['cap'] < 0.05
    )


def test_the_patient_is_the_same_at_another_resolution():
    a, b = (make_phantom('covid', 5, s, severity=0.1) for s in ((32, 48, 48), (64, 96, 96)))

    def up(m):
        return m.repeat(2, 0).repeat(2, 1).repeat(2, 2)

    for n, least in (('lungs', 0.93), ('infection', 0.7)):
        x, y = up(getattr(a, n)), getattr(b, n)
        assert 2 * (x & y).sum() / (x.sum() + y.sum()) > least
    assert np.allclose(a.scan.grid.size_mm, b.scan.grid.size_mm)


def test_second_scan_keeps_the_anatomy():
    a, b = make_phantom('cap', 1, SMALL, patient=77), make_phantom('cap', 2, SMALL, patient=77)
    assert (
        (a.airways == b.airways).all()
        and a.patient_id == b.patient_id
        and a.scan.scan_id != b.scan.scan_id
        and (a.lesions != b.lesions).any()
    )
    other = make_phantom('cap', 1, SMALL, patient=78)
    assert (other.airways != a.airways).any() and other.scan.spacing != a.scan.spacing


def test_a_flip_is_visible():
    v = make_phantom('healthy', 1, SMALL, noise=0.0).scan.voxels.astype(float)
    for axis in range(3):
        assert np.abs(v - np.flip(v, axis)).mean() > 25


def test_knobs():
    def grain(**k):
        return make_phantom('healthy', 1, SMALL, **k).scan.voxels.astype(float)

    quiet = grain(noise=0.0)
    assert abs((grain(noise=20.0) - quiet).std() - 20) < 1.5
    assert (
        np.abs(np.diff(grain(kernel='sharp'), axis=2)).mean()
        > 1.3 * np.abs(np.diff(grain(), axis=2)).mean()
    )
    assert (grain(table=False) != grain()).any() and (
        grain(table=False)[:, :30] == grain()[:, :30]
    ).all()
    thick = make_phantom('healthy', 1, SMALL, slice_mm=20.0)
    assert (
        thick.scan.spacing[0] == pytest.approx(20, rel=0.1)
        and thick.scan.shape[0] < 20
        and thick.lungs.shape == thick.scan.shape
    )


def test_faults_do_what_their_names_say():
    p = make_phantom('covid', 1, SMALL)
    v = p.scan.voxels
    q = {n: make_phantom('covid', 1, SMALL, switches=(n,)) for n in SWITCHES}
    assert (q['reversed'].scan.voxels == v[::-1]).all() and (
        q['reversed'].lobes == p.lobes[::-1]
    ).all()
    assert (
        q['repeated'].scan.shape[0] == 36
        and len(np.unique(q['repeated'].scan.voxels.reshape(36, -1), axis=0)) == 32
    )
    assert q['missing'].scan.shape[0] == 28 and all(
        (s == v).all((1, 2)).any() for s in q['missing'].scan.voxels
    )
    assert (
        sorted(map(bytes, q['shuffled'].scan.voxels)) == sorted(map(bytes, v))
        and (q['shuffled'].scan.voxels != v).any()
    )
    assert (q['masked'].scan.voxels[~p.lungs] == -1024).all() and (
        q['masked'].scan.voxels[p.lungs] == v[p.lungs]
    ).all()
    for name, x in q.items():
        assert x.scan.spacing == p.scan.spacing and all(
            getattr(x, n).shape == x.scan.shape for n in PHANTOM_MASKS
        ), name


@pytest.mark.parametrize(
    'kw',
    [
        dict(label='flu'),
        dict(kernel='medium'),
        dict(switches=('upside down',)),
        dict(law='mine'),
        dict(shape=(4, 64, 64)),
    ],
)
def test_unknown_names_are_refused(kw):
    with pytest.raises(DataError, match='Use '):
        make_phantom(**{'shape': SMALL, **kw})


@pytest.mark.parametrize(
    'kw',
    [
        dict(labels=('flu',)),
        dict(shortcuts=('colour',)),
        dict(faults={'torn': 0.5}),
        dict(law='mine'),
    ],
)
def test_cohort_refuses_unknown_names(kw):
    with pytest.raises(DataError, match='unknown name'):
        phantom_cohort(3, **kw)


def test_cohort():
    df = phantom_cohort(60, seed=3)
    assert (
        df.equals(phantom_cohort(60, seed=3))
        and df.scan_id.is_unique
        and (df.groupby('patient_id').label.nunique() == 1).all()
    )
    assert (
        5 <= (df.patient_id.value_counts() == 2).sum() <= 25
        and df.groupby('label').patient_id.nunique().tolist() == [20] * 3
    )
    assert (
        phantom_cohort(6, seed=4).seed != df.seed.head(len(phantom_cohort(6, seed=4))).to_numpy()
    ).all()
    leaky = phantom_cohort(60, seed=3, leaked=4)
    assert (
        leaky.iloc[: len(df)].equals(df)
        and leaky.patient_id.nunique() == 64
        and leaky.patient.nunique() == 60
    )
    p = phantom_of(df.iloc[0], SMALL)
    assert (p.scan.patient_id, p.scan.scan_id) == tuple(df.loc[0, ['patient_id', 'scan_id']])
    assert (phantom_of(df.iloc[0].to_dict(), SMALL).scan.voxels == p.scan.voxels).all()


@pytest.mark.parametrize('name', list(_SHORTCUTS))
def test_shortcut_gives_the_class_away(name):
    column = dict(kernel='kernel', masked='switches', slices='slice_mm', table='table')[name]
    honest, cheat = (phantom_cohort(30, seed=1, shortcuts=s) for s in ((), (name,)))
    assert (cheat.groupby('label')[column].nunique() == 1).all() and cheat[column].nunique() > 1
    assert (
        honest.groupby('label')[column].nunique(dropna=False)
        >= honest[column].nunique(dropna=False) - 1
    ).all()


def test_field_does_not_depend_on_the_voxels():
    a, b = (
        noise_field(new_chest((20, 20, 20)), random_stream(1), 25),
        noise_field(new_chest((60, 60, 60)), random_stream(1), 25),
    )
    assert np.abs(a - b[1::3, 1::3, 1::3]).max() < 1e-3


def test_fast_enough():
    import time

    make_phantom('covid', 0, SMALL)
    t = time.process_time()
    make_phantom('covid', 1, (96, 96, 96))
    assert time.process_time() - t < 1.5  # 0.3 to 0.4 s on a quiet core


# ---- beside a real chest


def tissues(hu):
    "Body and lungs of any chest, found in the same way in both"
    solid = ndi.binary_opening(hu > -350)
    lab, n = ndi.label(solid)
    size = ndi.sum(solid, lab, range(1, n + 1))
    body = np.stack([ndi.binary_fill_holes(s) for s in lab == 1 + np.argmax(size)])
    air = body & (hu < -400) & ~ndi.binary_dilation(~body)
    lab, n = ndi.label(air)
    size = ndi.sum(air, lab, range(1, n + 1))
    lungs = ndi.binary_closing(
        np.isin(lab, 1 + np.flatnonzero(size > 0.1 * size.max())), iterations=2
    )
    return {'body': hu[body & lungs.any((1, 2))[:, None, None]], 'lungs': hu[lungs]}


def apart(a, b):
    "Earth mover's distance in HU and overlap of the histograms, of body and lungs"
    bins = np.arange(-1050, 1100, 50)

    def share(v):
        return np.histogram(v, bins)[0] / len(v)

    return {
        k: (wasserstein_distance(a[k][::5], b[k][::5]), np.minimum(share(a[k]), share(b[k])).sum())
        for k in a
    }


def close(far):
    return (
        far['lungs'][0] < 40
        and far['lungs'][1] > 0.75
        and far['body'][0] < 65
        and far['body'][1] > 0.75
    )


@pytest.fixture(scope='module')
def real(data_dir):
    sitk = pytest.importorskip('SimpleITK')
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(
        str(data_dir / 'tcia_lung_pet_ct_dx' / 'A0001_softkernel_B')
    )
    v = sitk.GetArrayFromImage(sitk.ReadImage(names)).astype('f4')
    return tissues(v.reshape(64, 128, 4, 128, 4).mean((2, 4)))  # 5 × 3.4 × 3.4 mm


@pytest.fixture(scope='module')
def drawn():
    ps = [
        make_phantom(label, s, (64, 112, 112)).scan.voxels
        for s, label in enumerate(('healthy', 'cap', 'covid', 'healthy', 'covid'))
    ]
    return ps


@pytest.mark.data
def test_histogram_is_that_of_a_real_chest(real, drawn):
    parts = [tissues(v.astype('f4')) for v in drawn]
    assert close(apart(real, {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}))


@pytest.mark.data
@pytest.mark.parametrize(
    'name', ['moved by 100 HU', 'water for zero', 'two levels', 'empty lungs', 'white noise']
)
def test_a_wrong_phantom_is_noticed(real, drawn, name):
    v = drawn[0].astype('f4')
    wrong = {
        'moved by 100 HU': v + 100,
        'water for zero': v * 0.85,
        'two levels': np.where(v < -500, -990, 40.0),
        'empty lungs': np.where(v < -650, -1000, v),
        'white noise': v + np.random.default_rng(0).normal(0, 150, v.shape),
    }[name]
    assert not close(apart(real, tissues(wrong)))
