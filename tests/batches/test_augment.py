"""Augmentation: exactness, scipy as a second opinion, gradients, and the workers that repeat
each other"""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

from covid_ct.batches.augment import (
    AUGMENTS,
    SIX_VIEWS,
    Augment,
    apply_view,
    draw_view,
    identity_view,
    permute,
    seeded_generator,
    shade,
    theta,
    warp,
)
from covid_ct.scan import DataError

FULL = Augment(
    flip=0.5,
    flip_zy=(0.5, 0.5),
    quarter=True,
    rotate_deg=(-20, 20),
    shift_px=(-4, 4),
    zoom=(0.8, 1.2),
    stretch=True,
    gain=(0.8, 1.2),
    offset=(-0.1, 0.1),
    noise=(0, 0.05),
)


def smooth(n=2, shape=(4, 40, 40), seed=0):
    v = ndimage.gaussian_filter(
        np.random.default_rng(seed).random((n, *shape)), (0, 0, 2, 2), mode='constant'
    )
    v = v - v.min()
    return torch.tensor(v / v.max())[:, None]


def view(n=1, **changes):
    return identity_view(n, **changes)


def test_identity_even_beside_scans_that_move():
    x = torch.rand(3, 1, 4, 30, 22, generator=seeded_generator(0))
    assert apply_view(x, draw_view(AUGMENTS['none'], 3, seeded_generator(1))).equal(x)
    y = apply_view(x, view(3, angle=torch.tensor([0.0, 0.3, 0.0]).double()))
    assert y[0].equal(x[0]) and y[2].equal(x[2]) and not torch.allclose(y[1], x[1])
    assert torch.allclose(warp(x, view(3)), x, atol=1e-4)
    assert torch.allclose(warp(x.double(), view(3)), x.double(), atol=1e-6)


def test_input_is_not_changed_in_place():
    x = torch.rand(4, 1, 3, 16, 16, generator=seeded_generator(0))
    before = x.clone()
    apply_view(x, draw_view(FULL, 4, seeded_generator(2)))
    assert x.equal(before)


@pytest.mark.parametrize(
    'angle,zoom,shift',
    [
        (17, (1, 1), (0, 0)),
        (-90, (1, 1), (3, 0)),
        (0, (1.2, 0.9), (0, 0)),
        (8, (1.1, 0.95), (-2.5, 3.25)),
    ],
)
def test_against_scipy(angle, zoom, shift):
    """scipy.ndimage.affine_transform pulls values with the inverse matrix in (y,x) order:
    another library, another convention"""
    x = smooth(1)
    a = math.radians(angle)
    xy = np.diag(zoom) @ np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    inv = np.linalg.inv(xy)[::-1, ::-1]
    c = (np.array(x.shape[-2:]) - 1) / 2
    off = c - inv @ (c + np.array(shift)[::-1])
    want = np.stack(
        [
            ndimage.affine_transform(s, inv, off, order=1, mode='grid-constant', cval=0)
            for s in x[0, 0].numpy()
        ]
    )
    got = warp(x, view(angle=[a], zoom=[list(map(float, zoom))], shift=[list(map(float, shift))]))[
        0, 0
    ].numpy()
    assert np.abs(got - want).max() < 1e-10


def test_rectangles_turn_without_shear():
    "H and W differ: a rotation in half-slices instead of pixels would squash"
    x = torch.zeros(1, 1, 1, 21, 61, dtype=torch.float64)
    x[..., 10, 38] = 1
    y = warp(x, view(angle=[math.pi / 2]))
    assert y[0, 0, 0].argmax() == 18 * 61 + 30 and y.max() > 1 - 1e-9


def test_order_flip_then_turn_then_shift():
    x = torch.zeros(1, 1, 1, 9, 9, dtype=torch.float64)
    x[..., 4, 7] = 1  # 3 to the left
    v = view(flip=torch.tensor([[False, False, True]]), turns=[1], shift=[[1.0, 0.0]])
    y = apply_view(x, v)
    assert (
        y.argmax() == 1 * 9 + 5 and y.max() > 1 - 1e-9
    )  # mirrored to -3, turned to y=-3, shifted to x=+1


def test_quarter_needs_squares():
    with pytest.raises(DataError, match='quarter turn of'):
        permute(torch.zeros(1, 1, 2, 4, 6), view(turns=[1]))
    assert permute(torch.rand(1, 1, 2, 4, 6), view(turns=[2])).shape == (1, 1, 2, 4, 6)


def test_masks_and_labels_follow_the_image():
    x = smooth(4, (3, 32, 32), 1)
    labels = (x * 4).to(torch.uint8)
    v = draw_view(
        Augment(flip=0.5, quarter=True, rotate_deg=(-20, 20), shift_px=(-3, 3), zoom=(0.9, 1.1)),
        4,
        seeded_generator(3),
    )
    moved, m = apply_view(x, v, mask=labels)
    assert m.dtype == torch.uint8 and set(m.unique().tolist()) <= set(labels.unique().tolist())
    onehot = torch.stack(
        [(apply_view((labels == k).double(), v)) for k in range(int(labels.max()) + 1)]
    )
    assert (onehot.argmax(0) == m)[..., 5:-5, 5:-5].double().mean() > 0.9
    b = apply_view(
        dict(
            image=x, lung=labels > 1, label=torch.arange(4), ratio=torch.rand(4), scan_id=['a'] * 4
        ),
        v,
    )
    assert (
        b['image'].equal(moved)
        and b['lung'].dtype == torch.bool
        and b['lung'].equal(apply_view(labels > 1, v))
        and b['scan_id'] == ['a'] * 4
    )


def test_replay_and_seeds():
    x = smooth(6, (3, 24, 24)).float()
    a, b, c = (
        apply_view(x, draw_view(FULL, 6, seeded_generator(*w)))
        for w in ((0, 'augment', 1), (0, 'augment', 1), (0, 'augment', 2))
    )
    assert a.equal(b) and not a.equal(c) and a.min() >= 0 and a.max() <= 1
    torch.manual_seed(5)
    before = torch.get_rng_state()
    apply_view(x, draw_view(FULL, 6, seeded_generator(0)))
    assert torch.get_rng_state().equal(before)  # the global generator is left alone
    v = draw_view(FULL, 6, seeded_generator(0))
    assert torch.cat([apply_view(x[i : i + 1], v[[i]]) for i in range(6)]).allclose(
        apply_view(x, v), atol=1e-6
    )  # a batch is its scans


def test_drawing_is_independent_of_batch_size_and_of_what_is_off():
    whole = draw_view(FULL, 12, seeded_generator(9))
    g = seeded_generator(9)
    parts = [draw_view(FULL, n, g) for n in (1, 4, 7)]
    for f in vars(whole):
        assert getattr(whole, f).equal(torch.cat([getattr(p, f) for p in parts])), f
    assert draw_view(Augment(shift_px=(-4, 4)), 12, seeded_generator(9)).shift.equal(whole.shift)
    assert (
        draw_view(Augment(zoom=(0.8, 1.2)), 5, seeded_generator(0)).zoom.diff(dim=1).abs().max()
        == 0
    )


def test_this_draw_never_changes():
    "A known answer: another platform or version must give the same numbers"
    v = draw_view(AUGMENTS['darnet'], 2, seeded_generator(0, 'augment', 0))
    assert torch.allclose(
        torch.rad2deg(v.angle),
        torch.tensor([-2.5482445121486332, 0.01798415673090137], dtype=torch.float64),
        atol=1e-12,
    )


def test_every_row_of_the_table_runs():
    x = smooth(3, (4, 20, 20)).float()
    for name, a in AUGMENTS.items():
        y = apply_view(x, draw_view(a, 3, seeded_generator(name)))
        assert (
            y.shape == x.shape and y.isfinite().all() and (name in ('none', 'dual')) == y.equal(x)
        ), name
    assert draw_view(AUGMENTS['darnet-release'], 100, seeded_generator(0)).flip[:, 2].all()
    assert not AUGMENTS['none'].flip


def test_gradients_reach_the_image():
    x = smooth(2, (2, 12, 12)).requires_grad_()
    apply_view(
        x, draw_view(Augment(flip=1, rotate_deg=(-5, 5), zoom=(1.1, 1.2)), 2, seeded_generator(0))
    ).sum().backward()
    assert x.grad[..., 4:-4, 4:-4].gt(0).all()


def test_refusals():
    for bad in (
        dict(flip=-0.1),
        dict(flip_zy=(0, 2)),
        dict(rotate_deg=(5, -5)),
        dict(zoom=(0, 1)),
        dict(noise=(-1, 0)),
        dict(gain=(0, 1)),
        dict(shift_px=(1, 2, 3)),
    ):
        with pytest.raises(DataError, match=next(iter(bad))):
            Augment(**bad)
    with pytest.raises(DataError, match='do not fit'):
        apply_view(torch.zeros(2, 1, 3, 4, 4), view(3))
    with pytest.raises(DataError, match='do not fit'):
        apply_view(torch.zeros(3, 4, 4), view(3))
    with pytest.raises(DataError, match='among'):
        Augment(among=((1, 0.0),))
    for v in (view(1, turns=[1]), view(1, turns=[3], angle=[0.1])):
        with pytest.raises(DataError, match='quarter turn of'):
            apply_view(torch.zeros(1, 1, 2, 4, 6), v)


def test_noise_has_the_size_it_says():
    v = view(2, noise=torch.tensor([0.05, 0.0]).double(), seed=[1, 2])
    y = shade(torch.full((2, 1, 8, 64, 64), 0.5), v)
    assert abs(float(y[0].std()) - 0.05) < 0.001 and y[1].eq(0.5).all()


def test_theta_is_the_inverse_by_hand():
    t = theta(view(zoom=[[2.0, 4.0]], shift=[[5.0, 10.0]]), (20, 10))[0]
    assert t.tolist() == [
        [0.5, 0, -0.5],
        [0, 0.25, -0.25],
    ]  # 5 px of W=10 are one unit, halved by the zoom; 10 px of H=20 likewise, quartered


# ---- the sixteen permutations
def by_definition(flips, k):
    "Matrix that moves (z,y,x): flips first, then k turns that take +x to +y"
    turn = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    return np.linalg.matrix_power(turn, k) @ np.diag([1 - 2 * f for f in flips])


COMBOS = [((z, y, x), k) for z in (0, 1) for y in (0, 1) for x in (0, 1) for k in range(4)]


@pytest.mark.parametrize('flips,k', COMBOS)
def test_permutation_is_its_matrix(flips, k):
    "Each voxel, one by one, lands where the signed permutation matrix sends it"
    n = np.array([3, 5, 5])
    c = (n - 1) / 2
    M = by_definition(flips, k)
    x = torch.arange(75).reshape(1, 1, 3, 5, 5)
    y = permute(x, identity_view(1, flip=[flips], turns=[k]))[0, 0]
    for p in np.ndindex(*n):
        q = tuple(np.rint(M @ (np.array(p) - c) + c).astype(int))
        assert y[q] == x[0, 0][p]


def test_there_are_sixteen_and_they_form_a_group():
    matrices = [by_definition(*c) for c in COMBOS]
    keys = [m.tobytes() for m in map(np.int64, matrices)]
    assert len(set(keys)) == 16 and all(keys.count(k) == 2 for k in keys)
    assert {np.int64(a @ b).tobytes() for a in matrices for b in matrices} == set(keys)
    v = draw_view(AUGMENTS['prior'], 16_000, seeded_generator('prior'))
    drawn = [
        np.int64(by_definition(f, k)).tobytes()
        for f, k in zip(v.flip.int().tolist(), v.turns.tolist(), strict=False)
    ]
    count = np.array([drawn.count(k) for k in set(keys)])
    assert (
        abs(count - 1000) < 4.5 * (16_000 / 16 * 15 / 16) ** 0.5
    ).all()  # each of the sixteen alike
    assert (
        not v.angle.any() and (v.zoom == 1).all() and not v.shift.any()
    )  # so nothing is interpolated


def test_prior_row_keeps_every_voxel_to_the_bit():
    x = torch.rand(8, 1, 5, 6, 6, generator=seeded_generator('bits'))
    v = draw_view(AUGMENTS['prior'], 8, seeded_generator(4))
    y = apply_view(dict(image=x, lobes=(x * 6).to(torch.uint8)), v)
    assert all(
        a.ravel().sort()[0].equal(b.ravel().sort()[0]) for a, b in zip(x, y['image'], strict=False)
    )
    assert y['lobes'].equal((y['image'] * 6).to(torch.uint8))  # label and image moved alike


def test_composed_in_the_matrix_as_by_steps():
    "Flip and turn inside the warp = permutation, then the warp without them; with and without z"
    x = smooth(16, (3, 24, 24))
    g = seeded_generator('compose')
    v = draw_view(FULL, 16, g)
    steps = warp(permute(x, v), identity_view(16, angle=v.angle, zoom=v.zoom, shift=v.shift))
    assert torch.allclose(warp(x, v), steps, atol=1e-9)
    m = (x * 5).to(torch.uint8)
    assert (
        warp(m, v)
        == warp(permute(m, v), identity_view(16, angle=v.angle, zoom=v.zoom, shift=v.shift))
    ).double().mean() > 0.9999


@pytest.mark.parametrize('kind', [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_masks_are_looked_up_as_grid_sample_does(kind):
    x = (smooth(5, (3, 31, 22), 2) * 7).to(kind)
    v = draw_view(
        Augment(rotate_deg=(-30, 30), shift_px=(-6, 6), zoom=(0.5, 1.6), stretch=True),
        5,
        seeded_generator(8),
    )
    grid = torch.nn.functional.affine_grid(theta(v, (31, 22)), (5, 1, 31, 22), align_corners=False)
    want = torch.nn.functional.grid_sample(
        x[:, 0].double(), grid, mode='nearest', align_corners=False
    )[:, None].to(kind)
    assert (
        warp(x, v).equal(want) and warp(x, v).dtype == kind and want.any() and not (want == 0).all()
    )


def test_batches_where_some_move_and_some_only_turn():
    x = smooth(4, (3, 16, 16))
    v = identity_view(4, angle=[0, 0.2, 0, 0.1], turns=[1, 0, 3, 2], flip=[[1, 0, 0]] * 4)
    y = apply_view(x, v)
    for i in range(4):
        assert y[i].equal(apply_view(x[i : i + 1], v[[i]])[0])
    assert y[0].equal(permute(x, v)[0]) and y[2].equal(permute(x, v)[2])


# ---- six views of a slice (Chen et al. 2020); all six at once: test_raunet.py
def test_raunet_row_draws_one_of_the_six():
    v = draw_view(AUGMENTS['raunet'], 6000, seeded_generator('six'))
    pairs = [(int(k), float(z)) for k, z in zip(v.turns, v.zoom[:, 0], strict=False)]
    assert set(pairs) == set(SIX_VIEWS) and v.zoom[:, 0].equal(v.zoom[:, 1])
    assert all(abs(pairs.count(p) - 1000) < 4.5 * (6000 * 5 / 36) ** 0.5 for p in SIX_VIEWS)
    assert v.angle.equal(draw_view(AUGMENTS['none'], 6000, seeded_generator('six')).angle)


def test_slices_are_scans_of_one_slice():
    x = smooth(3, (1, 20, 20)).float()
    v = draw_view(FULL, 3, seeded_generator(1))
    assert apply_view(x[:, :, 0], v).equal(apply_view(x, v)[:, :, 0])
    b = apply_view(dict(image=x[:, :, 0], lesions=(x[:, :, 0] > 0.5), weight=torch.rand(3, 2)), v)
    assert b['lesions'].equal(apply_view(x > 0.5, v)[:, :, 0]) and b['weight'].shape == (3, 2)


def test_still():
    v = identity_view(
        2, zoom=[0.5, 2.0], flip=[[1, 0, 0], [0, 0, 1]], shift=[[1.0, 2.0], [3.0, 4.0]]
    )
    assert (
        v.zoom.tolist() == [[0.5, 0.5], [2, 2]]
        and v.flip.dtype == torch.bool
        and v.shift.tolist() == [[1, 2], [3, 4]]
    )
    assert apply_view(torch.ones(2, 1, 2, 4, 4), identity_view(2)).eq(1).all()
    with pytest.raises(KeyError):
        identity_view(1, turn=[1])
    with pytest.raises(RuntimeError):
        identity_view(2, angle=[0.1, 0.2, 0.3])


class _Numpy(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return float(self.rng.uniform(-5, 5))


class _Plain(Dataset):
    def __len__(self):
        return 8

    def stored(self, i):
        return dict(image=np.full((1, 2, 8, 8), float(i), 'f4'), label=i)


def test_numpy_in_workers_repeats_itself_and_ours_does_not():
    """Real processes: a generator inside the data set gives 4 angles in 24 draws; views drawn
    in the main process give 24"""
    angles = [
        x for _ in range(3) for b in DataLoader(_Numpy(), 1, num_workers=2) for x in b.tolist()
    ]
    assert len(angles) == 24 and len(set(angles)) == 4
    from covid_ct.batches.loaders import Loader

    seen = {}
    for workers in (0, 2):
        loader = Loader(
            _Plain(),
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            workers,
            Augment(offset=(0, 0.5), gain=(0.01, 0.05)),
            seed=3,
        )
        seen[workers] = [
            x
            for e in range(3)
            for _ in [loader.set_epoch(e)]
            for b in loader
            for x in b['image'][:, 0, 0, 0, 0].tolist()
        ]
    assert seen[0] == seen[2] and len(set(seen[0])) == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no accelerator here')
def test_the_same_geometry_on_the_accelerator():
    x = smooth(4, (6, 48, 48)).float()
    v = draw_view(AUGMENTS['darnet'], 4, seeded_generator(0))
    assert torch.allclose(apply_view(x.cuda(), v).cpu(), apply_view(x, v), atol=1e-4)
    assert (apply_view((x > 0.5).cuda(), v).cpu() == apply_view(x > 0.5, v)).double().mean() > 0.999


@pytest.mark.parametrize("shape", [(5, 1, 6, 12, 12), (5, 1, 12, 12)])
def test_a_mask_without_channels_moves_with_its_image(shape):
    g = torch.Generator().manual_seed(0)
    m = torch.randint(0, 3, shape, generator=g)
    batch = dict(
        image=m.float(),
        mask=m[:, 0],
        label=torch.arange(5),
        ratio=torch.rand(5),
        scan_id=list("abcde"),
    )
    v = draw_view(Augment(flip=0.5, quarter=True), 5, seeded_generator(1))
    out = apply_view(batch, v)
    assert (
        out["mask"].shape == m[:, 0].shape
        and (out["mask"] == out["image"][:, 0].long()).all()
        and not (out["mask"] == m[:, 0]).all()
    )
    assert out["label"].equal(batch["label"]) and out["ratio"].equal(batch["ratio"])
    v = draw_view(Augment(flip=0.5, rotate_deg=(-20, 20)), 5, seeded_generator(2))
    assert (
        apply_view(batch, v)["mask"] == apply_view(dict(image=m.float(), mask=m), v)["mask"][:, 0]
    ).all()
