"""Random views of a batch: ours on four scans at once, MONAI's and TorchIO's transforms scan by
scan with the very same parameters

DARNet's ranges: flip left-right with probability ½, rotation U(−5,5)° and shift U(−5,5) px in
the plane, zoom U(0.9,1.1) of each axis; float32, linear for images, nearest for masks, 0
outside. Results are compared before anything is timed. Times are milliseconds a scan, the best
of some rounds in which all take turns."""

import math
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F

from bench import Case, row

SHAPE, BATCH = (64, 224, 224), 4


def batch(seed=0):
    "A smooth image in [0,1] with detail of a few voxels, and two masks"
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(BATCH, 1, *(n // 4 for n in SHAPE), generator=g)
    x = F.interpolate(coarse, SHAPE, mode="trilinear")
    return dict(image=x, lung=x > 0.5, infection=x > 0.8)


def pixels(view):
    "Of each scan the 4×4 matrix from new to old voxels, counted from the middle, axes (z,y,x)"
    from covid_ct.batches.augment import theta

    H, W = SHAPE[1:]
    half, out = (
        torch.tensor([W / 2, H / 2], dtype=torch.float64),
        torch.eye(4, dtype=torch.float64).repeat(len(view), 1, 1),
    )
    t = theta(view, (H, W)) * half[None, :, None]
    t[:, :, :2] /= half
    out[:, 1:3, 1:3], out[:, 1:3, 3] = t[:, :, :2].flip(1, 2), t[:, :, 2].flip(1)
    return out


def monai_chain(view):
    "Affine with the matrix of each scan, flip included"
    from monai.transforms import Affine

    made = [Affine(affine=m.float(), padding_mode="zeros", image_only=True) for m in pixels(view)]

    def run(b):
        return {
            k: torch.stack(
                [
                    t(
                        v if k == "image" else v.float(),
                        mode="bilinear" if k == "image" else "nearest",
                    )
                    .as_tensor()
                    .to(x.dtype)
                    for t, v in zip(made, x, strict=False)
                ]
            )
            for k, x in b.items()
        }

    return run


def monai_random():
    "What one writes first: RandFlip and RandAffine, which draw for themselves"
    from monai.transforms import Compose, RandAffine, RandFlip

    a, z = math.radians(5), (0.0, 0.0)
    chain = Compose(
        [
            RandFlip(0.5, 2),
            RandAffine(
                1.0,
                rotate_range=((-a, a), z, z),
                translate_range=(z, (-5, 5), (-5, 5)),
                scale_range=(z, (-0.1, 0.1), (-0.1, 0.1)),
                padding_mode="zeros",
            ),
        ]
    )
    return lambda b: dict(image=torch.stack([chain(x).as_tensor() for x in b["image"]]))


def torchio_chain(view):
    """Flip where it was drawn, then Affine; its rotation comes before its shift, and both before
    its zoom"""
    import torchio as tio

    made = []
    for i in range(len(view)):
        (zx, zy), (tx, ty) = view.zoom[i].tolist(), view.shift[i].tolist()
        move = tio.Affine(
            scales=(1, zy, zx),
            degrees=(-math.degrees(view.angle[i]), 0, 0),
            translation=(0, ty / zy, tx / zx),
            default_pad_value=0,
        )
        made.append(tio.Compose([tio.Flip(axes=2), move]) if view.flip[i, 2] else move)

    def run(b):
        out = []
        for i, t in enumerate(made):
            s = t(
                tio.Subject(
                    {
                        k: (tio.ScalarImage if k == "image" else tio.LabelMap)(tensor=x[i])
                        for k, x in b.items()
                    }
                )
            )
            out.append({k: s[k].data.to(b[k].dtype) for k in b})
        return {k: torch.stack([o[k] for o in out]) for k in b}

    return run


def grid_3d(view):
    "The same warp by a three-dimensional grid, all scans at once"
    from covid_ct.batches.augment import theta

    t = torch.zeros(len(view), 3, 4, dtype=torch.float64)
    m = theta(view, SHAPE[1:])
    t[:, :2, :2], t[:, :2, 3], t[:, 2, 2] = m[:, :, :2], m[:, :, 2], 1

    def run(b):
        out = {}
        for k, x in b.items():
            grid = F.affine_grid(t.float(), x.shape, align_corners=False)
            out[k] = F.grid_sample(
                x.float(), grid, "bilinear" if k == "image" else "nearest", align_corners=False
            ).to(x.dtype)
        return out

    return run


def agree(ours, theirs, inside, name):
    """The same values wherever all neighbours lie inside the old picture, but for mask voxels
    that lie half-way; raises `AssertionError`"""
    for k, x in ours.items():
        off = ((x.float() - theirs[k].float()).abs() > 1e-3)[inside]
        assert off.float().mean() < 1e-4, (
            f"{name}: {k} differs in {off.float().mean():.2%} of the voxels"
        )


def timed(runs, b, rounds):
    "Best milliseconds a scan of each, taken in turn, so that a busy machine slows all of them"
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(b)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start) / BATCH)
    return best


def rows(what, rounds=4):
    "Of the image alone, or of the image with two masks"
    from covid_ct.batches.augment import AUGMENTS, apply_view, draw_view, seeded_generator

    warnings.filterwarnings("ignore", module="monai|torchio")
    view, b = draw_view(AUGMENTS["darnet"], BATCH, seeded_generator(1)), batch()
    assert 0 < view.flip[:, 2].sum() < BATCH  # some flip, some do not
    inside = apply_view(torch.ones_like(b["image"]), view) > 1 - 1e-5
    assert inside.float().mean() > 0.9
    if what == "image":
        b = {"image": b["image"]}
    peers = {
        "MONAI Affine": monai_chain(view),
        "TorchIO Affine": torchio_chain(view),
        "one 3D grid": grid_3d(view),
    }
    mine = apply_view(b, view)
    for name, run in peers.items():
        agree(mine, run(b), inside, name)
    if what == "image":
        peers["MONAI RandFlip and RandAffine"] = monai_random()
    best = timed({"ours": partial(apply_view, view=view), **peers}, b, rounds)
    for name in peers:
        yield row(
            f"augment 64×224×224, batch of {BATCH}, {what}: {name}", best["ours"], best[name], "ms"
        )


CASES = [Case(f"augment: {what}", partial(rows, what)) for what in ("image", "image and two masks")]
