"States of sick patients: what each changes, what counts as lung, and that nothing else moved"
import time

import numpy as np
import pytest
from covid_ct.phantom import ARRAYS, make_phantom
from covid_ct.scan import DataError
from covid_ct.states import STATES
from scipy import ndimage as ndi

SMALL, CHEST = (32, 64, 64), (96, 96, 96)
SEEDS = (1, 2, 4)
FLUID = (-25, 45)

# computed before there were states: HU at 24 places, then the volumes of lungs, lesions,
# airways and vessels in voxels
BEFORE = {
    ('healthy', 0): ([-1024, -1024, -1006, -999, -150, 92, 43, 390, -109, 27, -57, 245,
        -928, -903, -922, -583, -981, -985, -999, -992, -424, -864, 80, -29],
        [11258, 0, 155, 115]),
    ('healthy', 3): ([-999, -1012, -1000, -1001, -531, 63, 83, 475, -98, 35, -61, 112,
        -975, -939, -930, -821, -1008, -976, -1006, -970, -928, -786, 11, 36],
        [12736, 0, 146, 134]),
    ('healthy', 11): ([-999, -986, -1013, -993, -197, 37, 57, 246, -70, 66, -106, 104,
        -968, -928, -942, -738, -1024, -1016, -1007, -1002, -605, -856, 33, 35],
        [11847, 0, 140, 141]),
    ('cap', 0): ([-1024, -1024, -1006, -999, -150, 92, 43, 390, -109, 27, -57, 245,
        -928, -903, -922, -583, -981, -985, -999, -992, -424, -864, 80, -29],
        [11258, 704, 155, 115]),
    ('cap', 3): ([-999, -1012, -1000, -1001, -531, 63, 83, 475, -98, 35, -61, 112,
        -975, -939, -930, -821, -1008, -976, -1006, -970, -928, -786, 11, 36],
        [12736, 240, 146, 134]),
    ('cap', 11): ([-999, -986, -1013, -993, -197, 37, 57, 246, -70, 66, -106, 104,
        -968, -928, -942, -738, -1024, -1016, -1007, -1002, -605, -856, 33, 35],
        [11190, 937, 140, 141]),
    ('covid', 0): ([-1024, -1024, -1006, -999, -150, 92, 43, 390, -109, 27, -57, 245,
        -928, -903, -922, -583, -981, -985, -999, -992, -424, -864, 80, -29],
        [11124, 442, 155, 115]),
    ('covid', 3): ([-999, -1012, -1000, -1001, -531, 63, 83, 475, -98, 35, -61, 112,
        -975, -939, -930, -821, -1008, -976, -1006, -970, -928, -786, 11, 36],
        [12736, 627, 146, 134]),
    ('covid', 11): ([-999, -986, -1013, -993, -197, 37, 57, 246, -70, 66, -106, 104,
        -968, -928, -942, -738, -1024, -1016, -1007, -1002, -605, -856, 33, 35],
        [11847, 579, 140, 141]),
    ('ild', 0): ([-1024, -1024, -1006, -999, -150, 92, 43, 390, -109, 27, -57, 245,
        -928, -903, -922, -583, -981, -985, -999, -992, -424, -864, 80, -29],
        [11258, 931, 155, 115]),
    ('ild', 3): ([-999, -1012, -1000, -1001, -531, 63, 83, 475, -98, 35, -61, 112,
        -975, -939, -930, -821, -1008, -976, -1006, -970, -928, -786, 11, 36],
        [12736, 3673, 146, 134]),
    ('ild', 11): ([-999, -986, -1013, -993, -197, 37, 57, 246, -70, 66, -106, 104,
        -968, -928, -942, -738, -1024, -1016, -1007, -1002, -605, -856, 33, 35],
        [11847, 558, 140, 141]),
}


@pytest.mark.parametrize("label, seed", BEFORE)
def test_a_phantom_without_states_is_the_one_of_old(label, seed):
    "A rounding of one HU and two voxels is left to other processors"
    hu, volumes = BEFORE[label, seed]
    p = make_phantom(label, seed, SMALL)
    assert np.abs(p.scan.voxels[3::9, 5::17, 7::15].ravel()[:24] - hu).max() <= 1
    masks = (p.lungs, p.infection, p.airways, p.vessels)
    assert np.abs([int(m.sum()) - v for m, v in zip(masks, volumes, strict=True)]).max() <= 2
    assert not p.free_air.any() and not p.bronchi.any()
    assert (p.effusion == (p.lesions == 4)).all()


@pytest.fixture(scope="module")
def chest():
    "`chest(state, seed)`: a healthy patient with and without a state, made once"
    made = {}

    def make(state, seed):
        for names in ((), (state,)):
            if (names, seed) not in made:
                made[names, seed] = make_phantom("healthy", seed, CHEST, states=names, noise=10)
        return made[(), seed], made[(state,), seed]
    return make


def litres(p, mask):
    "Volume on the right and on the left"
    middle = mask.shape[2]//2
    return np.array([mask[:, :, :middle].sum(), mask[:, :, middle:].sum()])*p.scan.grid.voxel_ml/1000


def inner(mask, n=1):
    "Without the voxels that a border cuts"
    return ndi.binary_erosion(mask, iterations=n)


def median(p, mask):
    return float(np.median(p.scan.voxels[mask]))


@pytest.mark.parametrize("state", STATES)
def test_every_state_keeps_the_masks_consistent(state, chest):
    plain, p = chest(state, 1)
    assert (p.scan.voxels != plain.scan.voxels).any()
    assert all(getattr(p, n).shape == p.scan.shape for n in ARRAYS)
    assert ((p.lobes > 0) == p.lungs).all()
    outside = p.free_air | p.effusion | p.airways
    assert not (p.lungs & outside).any()
    assert not (p.free_air & p.effusion).any()
    assert not (p.vessels & ~p.lungs).any() and not (p.bronchi & ~p.lungs).any()
    assert not (np.isin(p.lesions, (1, 2, 3, 5)) & ~p.lungs).any()


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_drawn_again_from_the_same_seed(state):
    a, b = (make_phantom("covid", 3, SMALL, states=(state,)) for _ in range(2))
    assert (a.scan.voxels == b.scan.voxels).all()
    assert all((getattr(a, n) == getattr(b, n)).all() for n in ARRAYS)
    assert (make_phantom("covid", 4, SMALL, states=(state,)).scan.voxels != a.scan.voxels).any()


def test_the_order_of_names_does_not_matter():
    names = ("arms", "effusion", "cavities")
    a, b = (make_phantom("cap", 3, SMALL, states=n) for n in (names, names[::-1]))
    assert (a.scan.voxels == b.scan.voxels).all()


def test_an_unknown_state_is_refused_with_the_list():
    with pytest.raises(DataError) as e: make_phantom("cap", 1, SMALL, states=("flu", "arms"))
    assert "'flu'" in str(e.value) and all(n in str(e.value) for n in STATES)


def test_fast_enough():
    make_phantom("covid", 0, SMALL)
    for state in STATES:
        start = time.process_time()
        make_phantom("covid", 1, CHEST, states=(state,))
        assert time.process_time() - start < 1, state
