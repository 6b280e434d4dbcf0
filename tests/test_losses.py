"""Losses against PyTorch, a slow twin, and bad input."""
import math

import pytest
import torch
import torch.nn.functional as F
from covid_ct.train.losses import CrossEntropy, Focal, LOSSES, LossError, build_loss, inverse_frequency, weighted_mean

W = (1., 2., 5.)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    return torch.randn(32, 3, generator=g, dtype=torch.float32).mul(3).requires_grad_(), torch.randint(3, (32,), generator=g)


def value(loss, z, y): return loss(dict(logits=z), dict(label=y))[0]


@pytest.mark.parametrize("weights", [None, W])
@pytest.mark.parametrize("loss", [CrossEntropy, lambda w: Focal(0., w)])
def test_cross_entropy_is_torchs(batch, weights, loss):
    z, y = batch
    ours, theirs = value(loss(weights), z, y), F.cross_entropy(z, y, weight=None if weights is None else torch.tensor(weights))
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(v, z)[0] for v in (ours, theirs)), atol=1e-7)


@pytest.mark.parametrize("gamma", [.5, 1., 2., 5.])
def test_focal_gradient_is_right(gamma):
    "Numerical gradients in float64; the loss itself works in float32, so the slow twin is checked and then compared"
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 1])
    def twin(z):
        p = z.softmax(1)[range(4), y]; w = torch.tensor(W, dtype=z.dtype)[y]
        return (w * (1 - p) ** gamma * -p.log()).sum() / w.sum()
    assert torch.autograd.gradcheck(twin, (z,))
    ours = value(Focal(gamma, W), z, y)
    assert torch.allclose(*(torch.autograd.grad(v.double(), z)[0] for v in (ours, twin(z))), atol=1e-6)


def test_weights_scale_out_and_batches_add_up(batch):
    z, y = batch
    for make in (CrossEntropy, lambda w: Focal(2., w)):
        assert torch.allclose(value(make(W), z, y), value(make(tuple(100 * w for w in W)), z, y))
        assert torch.allclose(value(make(W), z, y), value(make(W), torch.cat([z, z]), torch.cat([y, y])))


@pytest.mark.parametrize("gamma", [0., .3, .5, 1., 2.])
def test_sure_answers_stay_finite(gamma):
    z = torch.tensor([[200., 0, 0], [-200., 0, 0], [30., 0, 0]], requires_grad=True)
    loss = value(Focal(gamma), z, torch.zeros(3, dtype=torch.long))
    g, = torch.autograd.grad(loss, z)
    assert loss.isfinite() and g.isfinite().all() and g[1].abs().sum() > 0


def test_half_precision_logits_are_lifted():
    z = torch.tensor([[9., 0, -9]], dtype=torch.bfloat16)
    assert value(Focal(2.), z, torch.tensor([2])).dtype == torch.float32


def test_zero_weights_give_zero_not_nan():
    z = torch.zeros(2, 3, requires_grad=True)
    loss = value(CrossEntropy((0., 1., 1.)), z, torch.tensor([0, 0]))
    assert loss == 0 and torch.autograd.grad(loss, z)[0].isfinite().all()


def test_parts_carry_no_graph(batch):
    z, y = batch
    for name in LOSSES:
        total, parts = build_loss(name)(dict(logits=z), dict(label=y))
        assert total.requires_grad and parts and not any(p.requires_grad for p in parts.values())


@pytest.mark.parametrize("outputs,label,says", [
    ({}, torch.tensor([0]), "needs outputs"), (dict(logits=torch.zeros(2, 3)), torch.tensor([0]), "do not fit"), (dict(logits=torch.zeros(1, 3)), torch.tensor([3]), "label 3"),
    (dict(logits=torch.zeros(1, 3)), torch.tensor([-1]), "label -1"), (dict(logits=torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long), "do not fit")])
def test_bad_batches(outputs, label, says):
    with pytest.raises(LossError, match=says): CrossEntropy()(outputs, dict(label=label))


def test_bad_choices():
    for make in (lambda: Focal(-1.), lambda: Focal(float("nan")), lambda: CrossEntropy((1., -1.)), lambda: CrossEntropy(()), lambda: CrossEntropy((0., 0.)), lambda: build_loss("mse"),
                 lambda: build_loss("focal", beta=1), lambda: inverse_frequency(["a"], ("a", "b"))):
        with pytest.raises(LossError): make()
    with pytest.raises(LossError, match="one weight per class|2 weights"): weighted_mean(torch.ones(1), torch.tensor([2]), (1., 1.))


def test_known_values():
    assert math.isclose(value(CrossEntropy(), torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 1])).item(), math.log(3), rel_tol=1e-6)
    assert inverse_frequency(list("aabbbbbb"), ("a", "b")) == (2., 8 / 12)
