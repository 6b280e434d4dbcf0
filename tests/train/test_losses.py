"""Losses against PyTorch, a slow reference, and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from covid_ct.train.losses import (
    LOSSES,
    AttentionLoss,
    CrossEntropy,
    Focal,
    LossError,
    MultiTask,
    SegmentationLoss,
    _split_label,
    attention_error,
    build_loss,
    soft_dice,
    weighted_mean,
)

W = (1.0, 2.0, 5.0)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    return torch.randn(32, 3, generator=g, dtype=torch.float32).mul(
        3
    ).requires_grad_(), torch.randint(3, (32,), generator=g)


def value(loss, z, y):
    return loss(dict(logits=z), dict(label=y))[0]


@pytest.mark.parametrize("weights", [None, W])
@pytest.mark.parametrize("loss", [CrossEntropy, lambda w: Focal(0.0, w)])
def test_cross_entropy_is_torchs(batch, weights, loss):
    z, y = batch
    ours, theirs = (
        value(loss(weights), z, y),
        F.cross_entropy(z, y, weight=None if weights is None else torch.tensor(weights)),
    )
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(v, z)[0] for v in (ours, theirs)), atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_gradient_is_right(gamma):
    "Numerical gradients of the loss and of the slow reference in float64, and both agree"
    z, y = (
        torch.randn(
            4,
            3,
            generator=torch.Generator().manual_seed(1),
            dtype=torch.float64,
            requires_grad=True,
        ),
        torch.tensor([0, 1, 2, 1]),
    )

    def twin(z):
        p = z.softmax(1)[range(4), y]
        w = torch.tensor(W, dtype=z.dtype)[y]
        return (w * (1 - p) ** gamma * -p.log()).sum() / w.sum()

    assert torch.autograd.gradcheck(twin, (z,)) and torch.autograd.gradcheck(
        lambda z: value(Focal(gamma, W), z, y), (z,)
    )
    ours = value(Focal(gamma, W), z, y)
    assert torch.allclose(
        *(torch.autograd.grad(v.double(), z)[0] for v in (ours, twin(z))), atol=1e-6
    )


def test_weights_scale_out_and_batches_add_up(batch):
    z, y = batch
    for make in (CrossEntropy, lambda w: Focal(2.0, w)):
        assert torch.allclose(value(make(W), z, y), value(make(tuple(100 * w for w in W)), z, y))
        assert torch.allclose(
            value(make(W), z, y), value(make(W), torch.cat([z, z]), torch.cat([y, y]))
        )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_sure_answers_stay_finite(gamma):
    z = torch.tensor([[200.0, 0, 0], [-200.0, 0, 0], [30.0, 0, 0]], requires_grad=True)
    loss = value(Focal(gamma), z, torch.zeros(3, dtype=torch.long))
    (g,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and g.isfinite().all() and g[1].abs().sum() > 0


def test_half_precision_logits_are_lifted():
    z = torch.tensor([[9.0, 0, -9]], dtype=torch.bfloat16)
    assert value(Focal(2.0), z, torch.tensor([2])).dtype == torch.float32


def test_zero_weights_give_zero_not_nan():
    z = torch.zeros(2, 3, requires_grad=True)
    loss = value(CrossEntropy((0.0, 1.0, 1.0)), z, torch.tensor([0, 0]))
    assert loss == 0 and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_parts_carry_no_graph(batch):
    z, y = batch
    for name in ("cross_entropy", "focal"):
        total, parts = build_loss(name)(dict(logits=z), dict(label=y))
        assert total.requires_grad and parts and not any(p.requires_grad for p in parts.values())


@pytest.mark.parametrize(
    "outputs,label,says",
    [
        ({}, torch.tensor([0]), "needs outputs"),
        (dict(logits=torch.zeros(2, 3)), torch.tensor([0]), "do not fit"),
        (dict(logits=torch.zeros(1, 3)), torch.tensor([3]), "label 3"),
        (dict(logits=torch.zeros(1, 3)), torch.tensor([-1]), "label -1"),
        (dict(logits=torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long), "do not fit"),
    ],
)
def test_bad_batches(outputs, label, says):
    with pytest.raises(LossError, match=says):
        CrossEntropy()(outputs, dict(label=label))


def test_bad_choices():
    for make in (
        lambda: Focal(-1.0),
        lambda: Focal(float("nan")),
        lambda: CrossEntropy((1.0, -1.0)),
        lambda: CrossEntropy(()),
        lambda: CrossEntropy((0.0, 0.0)),
        lambda: build_loss("mse"),
        lambda: build_loss("focal", beta=1),
    ):
        with pytest.raises(LossError):
            make()
    with pytest.raises(LossError, match="one weight per class|2 weights"):
        weighted_mean(torch.ones(1), torch.tensor([2]), (1.0, 1.0))


def test_known_values():
    assert math.isclose(
        value(CrossEntropy(), torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 1])).item(),
        math.log(3),
        rel_tol=1e-6,
    )


# ---- segmentation, attention, multi-task
def gen(seed=5):
    return torch.Generator().manual_seed(seed)


def voxels(*shape, classes=3):
    return torch.randn(
        shape[0], classes, *shape[1:], generator=gen(), dtype=torch.float64, requires_grad=True
    ), torch.randint(classes, shape, generator=gen(6))


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3, 4, 5)])
def test_voxel_cross_entropy_is_torchs(shape):
    z, y = voxels(*shape)
    for w in (None, W):
        ours, theirs = (
            SegmentationLoss(w)(dict(logits=z), dict(mask=y))[0],
            F.cross_entropy(z, y, weight=None if w is None else torch.tensor(w, dtype=z.dtype)),
        )
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (ours, theirs)))


@pytest.mark.parametrize("power", [1, 2])
def test_dice_is_monais(power):
    from monai.losses import DiceLoss

    z, y = voxels(2, 3, 4, 5)
    theirs = DiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=False,
        batch=True,
        squared_pred=power == 2,
        smooth_nr=0,
        smooth_dr=1e-12,
    )(z, y[:, None])
    torch.testing.assert_close(
        SegmentationLoss(dice=1.0, entropy=0.0, power=power)(dict(logits=z), dict(mask=y))[0],
        theirs,
    )


@pytest.mark.parametrize(
    "kw",
    [
        dict(dice=1.0),
        dict(dice=0.5, entropy=0.0, power=2),
        dict(dice=1.0, background=True, weights=W),
    ],
)
def test_segmentation_gradient(kw):
    z, y = voxels(2, 2, 3)
    assert torch.autograd.gradcheck(
        lambda z: SegmentationLoss(**kw)(dict(logits=z), dict(mask=y))[0], (z,)
    )
    assert torch.autograd.gradcheck(
        lambda z: SegmentationLoss(**kw)(dict(logits=z), dict(mask=0 * y))[0], (z,)
    )


def test_absent_class_neither_costs_nor_pulls_in_dice():
    z, y = voxels(1, 4, 4)
    y = y.clamp_max(1)
    only = SegmentationLoss(dice=1.0, entropy=0.0)
    total, parts = only(dict(logits=z), dict(mask=y))
    d, there = soft_dice(z.softmax(1), y)
    assert (
        there.tolist() == [True, True, False]
        and d[2] == 0
        and torch.isclose(parts["dice"], 1 - d[1])
    )
    assert only(dict(logits=z), dict(mask=0 * y))[0] == 0


def test_dice_of_a_batch_does_not_depend_on_how_it_lies():
    z, y = voxels(2, 3, 4, 5)
    loss = SegmentationLoss(dice=1.0)
    once = loss(dict(logits=z), dict(mask=y))[0]
    torch.testing.assert_close(loss(dict(logits=z.flip(-1)), dict(mask=y.flip(-1)))[0], once)
    torch.testing.assert_close(
        loss(dict(logits=torch.cat([z, z])), dict(mask=torch.cat([y, y])))[0], once
    )
    torch.testing.assert_close(
        loss(dict(logits=z.transpose(2, 4)), dict(mask=y.transpose(1, 3)))[0], once
    )


def test_half_precision_voxels_are_lifted():
    z = torch.full((1, 2, 80, 80, 80), 0.1, dtype=torch.float16)
    total, _ = SegmentationLoss(dice=1.0)(
        dict(logits=z), dict(mask=torch.zeros(1, 80, 80, 80, dtype=torch.uint8))
    )
    assert total.dtype == torch.float32 and math.isclose(total.item(), math.log(2), rel_tol=1e-5)


@pytest.mark.parametrize(
    "logits,mask,says",
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 4).long(), "do not fit"),
        (torch.zeros(1, 2), torch.zeros(1).long(), "do not fit"),
        (torch.zeros(1, 2, 0), torch.zeros(1, 0).long(), "do not fit"),
        (torch.zeros(1, 2, 3), torch.full((1, 3), 2), "for 2 classes"),
        (torch.zeros(1, 2, 3), torch.full((1, 3), -1), "-1"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3), "whole numbers"),
    ],
)
def test_bad_masks(logits, mask, says):
    with pytest.raises(LossError, match=says):
        SegmentationLoss()(dict(logits=logits), dict(mask=mask))


def pair(seed=0, n=3):
    g = gen(seed)
    return torch.rand(
        n, 1, 2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True
    ), torch.rand(n, 1, 2, 3, 4, generator=g) > 0.6


def test_attention_error_gradient_and_range():
    a, m = pair()
    assert torch.autograd.gradcheck(lambda a: attention_error(a, m), (a,))
    e = attention_error(a, m)
    assert ((e > 0) & (e < 1)).all() and torch.equal(attention_error(m.double(), m), torch.zeros(3))
    torch.testing.assert_close(attention_error(m.double(), ~m), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(attention_error(a.flip(2), m.flip(2)), e)


def test_attention_of_a_batch():
    a, m = pair()
    z = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    total, parts = AttentionLoss()(
        dict(logits=z, attention=a), dict(label=torch.tensor([1, 0, 1]), infection=m)
    )
    torch.testing.assert_close(parts["attention"], attention_error(a, m)[[0, 2]].mean().detach())
    torch.testing.assert_close(total.detach(), math.log(2) + 0.5 * parts["attention"])
    (pull,) = torch.autograd.grad(total, a)
    assert pull[[0, 2]].abs().sum() > 0 and not pull[1].any()
    free, parts = AttentionLoss()(
        dict(logits=z, attention=a), dict(label=torch.zeros(3).long(), infection=m)
    )
    assert parts["attention"] == 0 and not torch.autograd.grad(free, a)[0].any()  # connected, and 0


def test_empty_maps_are_no_nan():
    a = torch.zeros(1, 1, 2, 2, 2, requires_grad=True)
    z = torch.zeros(1, 2)
    total, _ = AttentionLoss()(
        dict(logits=z, attention=a), dict(label=torch.ones(1).long(), infection=a > 1)
    )
    assert math.isclose(total.item(), math.log(2), rel_tol=1e-6) and torch.equal(
        torch.autograd.grad(total, a)[0], torch.zeros_like(a)
    )


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(attention=None), "needs"),
        (dict(attention=torch.rand(3, 1, 2, 3, 3)), "do not fit"),
        (dict(attention=torch.full((3, 1, 2, 3, 4), 1.5)), "1.5"),
    ],
)
def test_bad_attention(change, says):
    _, m = pair()
    out = {
        k: v
        for k, v in (
            dict(logits=torch.zeros(3, 2), attention=torch.rand(3, 1, 2, 3, 4)) | change
        ).items()
        if v is not None
    }
    with pytest.raises(LossError, match=says):
        AttentionLoss()(out, dict(label=torch.ones(3).long(), infection=m))


def heads(n=10, k=3):
    g = gen(9)
    return {
        name: torch.randn(n, c, generator=g, dtype=torch.float64, requires_grad=True)
        for name, c in (("logits", k), ("detection", 2), ("type", k - 1))
    }


@pytest.mark.parametrize("labels", [[0] * 4 + [1] * 3 + [2] * 3, [2] * 10, [0] * 10, [0] * 9 + [1]])
def test_multi_task_gradient_and_twin(labels):
    out, y = heads(), torch.tensor(labels)
    assert torch.autograd.gradcheck(
        lambda *h: MultiTask()(dict(zip(out, h, strict=False)), dict(label=y))[0],
        tuple(out.values()),
    )
    total, parts = MultiTask()(out, dict(label=y))
    sick = y > 0
    want = (
        F.cross_entropy(out["logits"], y)
        + F.cross_entropy(out["detection"], sick.long())
        + (F.cross_entropy(out["type"][sick], y[sick] - 1) if sick.any() else 0)
    )
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(sum(parts.values()), total.detach())


def test_multi_task_without_positives_stays_connected():
    out, y = heads(), torch.zeros(10).long()
    total, parts = MultiTask()(out, dict(label=y))
    assert parts["type"] == 0 and torch.equal(
        torch.autograd.grad(total, out["type"])[0], torch.zeros(10, 2, dtype=torch.float64)
    )


def test_type_mean_is_over_positives():
    "The same two positives weigh the same beside two healthy scans and beside eight"
    out = {k: v[:4] for k, v in heads().items()}
    y = torch.tensor([1, 2, 0, 0])
    more = {k: torch.cat([v, v[2:], v[2:], v[2:]]) for k, v in out.items()}
    a, b = (
        MultiTask()(o, dict(label=t))[1]["type"]
        for o, t in ((out, y), (more, torch.tensor([1, 2] + [0] * 8)))
    )
    torch.testing.assert_close(a, b)


def test_multi_task_choices():
    out, y = heads(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1])
    single, _ = MultiTask(scales=(0.0, 0.0, 1.0))(out, dict(label=y))
    torch.testing.assert_close(single, F.cross_entropy(out["logits"], y))
    found, kind = _split_label(y, negative=1)
    assert (
        found.tolist() == [int(k != 1) for k in y]
        and kind[y == 0].tolist() == [0] * 3
        and kind[y == 2].tolist() == [1] * 3
    )
    assert MultiTask()(heads(k=4), dict(label=torch.tensor([3] * 10)))[1]["type"] > 0
    with pytest.raises(LossError, match="detection"):
        MultiTask()(dict(logits=out["logits"]), dict(label=y))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SegmentationLoss(dice=-1.0),
        lambda: SegmentationLoss(entropy=0.0),
        lambda: SegmentationLoss(power=3),
        lambda: SegmentationLoss((0.0, 0.0)),
        lambda: AttentionLoss(scale=-1.0),
        lambda: AttentionLoss(positive=-1),
        lambda: MultiTask(scales=(1.0, 1.0)),
        lambda: MultiTask(scales=(1.0, -1.0, 1.0)),
        lambda: build_loss("attention", alpha=1),
    ],
)
def test_bad_settings(make):
    with pytest.raises(LossError):
        make()


def test_parts_of_every_loss_carry_no_graph():
    a, m = pair(n=10)
    z, y = voxels(2, 3, 3)
    calls = {
        "segmentation": (dict(logits=z), dict(mask=y)),
        "attention": (
            heads() | dict(attention=a),
            dict(label=torch.tensor([0, 1] * 5), infection=m),
        ),
        "multi_task": (heads(), dict(label=torch.tensor([0, 1] * 5))),
    }
    assert set(calls) | {"cross_entropy", "focal"} == set(LOSSES)
    for name, args in calls.items():
        total, parts = build_loss(name)(*args)
        assert (
            total.requires_grad
            and total.ndim == 0
            and len(parts) > 1
            and not any(p.requires_grad for p in parts.values())
        )
