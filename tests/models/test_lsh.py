"""LSH attention: exact where it must be, else a union of sets; no pair counts twice."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from covid_ct.models.lsh_attention import (
    LSHAttention,
    attention_reach,
    bucket_factors,
    draw_rotations,
    exact_attention,
    hash_tokens,
    lsh_attention,
    sort_tokens,
    unit_vectors,
)
from covid_ct.scan import DataError, GeometryError


def union(buckets, chunk):
    "Pairs compared, by definition: same bucket, own chunk of the sorted row or the one before"
    R, T = buckets.shape
    out = torch.zeros(T, T, dtype=torch.bool)
    for r in range(R):
        row = sorted(range(T), key=lambda i: (int(buckets[r, i]), i))
        at = {i: s // chunk for s, i in enumerate(row)}
        for i in range(T):
            for j in range(T):
                out[i, j] |= bool(buckets[r, i] == buckets[r, j]) and at[i] - at[j] in (0, 1)
    return out


def loop(qk, v, seen, causal=False, mask=None):
    "Attention as a loop over queries and keys, in float64"
    out = torch.zeros_like(v)
    for i in range(len(qk)):
        if mask is not None and not mask[i]:
            continue
        js = [
            j
            for j in range(len(qk))
            if j != i and seen[i, j] and (not causal or j < i) and (mask is None or mask[j])
        ] or [i]
        w = [torch.exp(qk[i] @ qk[j] / qk[j].norm() / math.sqrt(qk.shape[1])) for j in js]
        out[i] = sum(a * v[j] for a, j in zip(w, js, strict=False)) / sum(w)
    return out


def tensors(T=23, d=5, e=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, d, generator=g, dtype=torch.float64).requires_grad_(), torch.randn(
        T, e, generator=g, dtype=torch.float64
    ).requires_grad_()


def compare(a, b, *wrt, tol=1e-10):
    assert (a - b).abs().max() < tol
    r = torch.randn_like(a)
    for x, y in zip(*(torch.autograd.grad((z * r).sum(), wrt) for z in (a, b)), strict=False):
        assert (x - y).abs().max() < tol


def test_exact_is_the_loop():
    qk, v = tensors()
    seen = torch.rand(23, 23) < 0.3
    compare(exact_attention(qk, v, seen | torch.eye(23).bool()), loop(qk, v, seen), qk, v)


@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_one_bucket_one_chunk_is_exact(dtype, tol):
    torch.manual_seed(0)
    qk, v = (torch.randn(2, 3, 50, 8, dtype=dtype).requires_grad_() for _ in range(2))
    compare(
        lsh_attention(qk, v, torch.zeros(1, 2, 3, 50).long(), 64),
        exact_attention(qk, v),
        qk,
        v,
        tol=tol,
    )


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 23])
@pytest.mark.parametrize("causal", [False, True])
def test_many_rounds_are_the_loop_over_the_union(chunk, causal):
    qk, v = tensors()
    b = torch.randint(0, 4, (3, 23), generator=torch.Generator().manual_seed(chunk))
    compare(
        lsh_attention(qk[None], v[None], b[:, None], chunk, causal)[0],
        loop(qk, v, union(b, chunk), causal),
        qk,
        v,
    )


def test_masked_tokens_are_absent():
    qk, v = tensors()
    mask = torch.rand(23, generator=torch.Generator().manual_seed(1)) < 0.6
    b = torch.randint(0, 3, (2, 23))
    masked = b.masked_fill(~mask, 99)
    got = lsh_attention(qk[None], v[None], b[:, None], 6, mask=mask[None])[0]
    compare(got, loop(qk, v, union(masked, 6), mask=mask), qk, v)
    assert (got[~mask] == 0).all()
    nothing = lsh_attention(qk[None], v[None], b[:, None], 6, mask=torch.zeros(1, 23).bool())
    assert (nothing == 0).all()


def test_duplicates_by_hand():
    "Equal directions: token 2 meets 0 in both rounds, 1 in one; each counts once: the mean"
    qk = torch.ones(1, 3, 2, dtype=torch.float64)
    v = torch.tensor([[[0.0], [1.0], [5.0]]], dtype=torch.float64)
    b = torch.tensor([[0, 0, 0], [0, 1, 0]])[:, None]
    assert abs(float(lsh_attention(qk, v, b, 4)[0, 2]) - 0.5) < 1e-12


def test_the_kernel_and_its_gradient_are_plain_attention():
    "float32, several heads and rounds, slabs, one width and two: values and gradients to 1e-5"
    torch.manual_seed(0)
    for e, budget in ((16, 2**25), (16, 4096), (5, 4096)):
        qk, v = torch.randn(3, 300, 16).requires_grad_(), torch.randn(3, 300, e).requires_grad_()
        b = hash_tokens(qk, draw_rotations(16, (8,), 3))
        _, codes = sort_tokens(F.pad(b, (0, 20), value=9), 32)
        codes = codes[..., :300]
        seen = attention_reach(codes[..., :, None], codes[..., None, :]).any(0)
        assert 0.1 < seen.float().mean() < 0.6
        got = lsh_attention(qk, v, b, 32, budget=budget)
        compare(got, exact_attention(qk, v, seen), qk, v, tol=1e-5)


def test_alone_a_token_hears_itself():
    qk, v = tensors(7)
    torch.testing.assert_close(
        lsh_attention(qk[None], v[None], torch.arange(7)[None, None].expand(4, 1, 7), 2)[0], v
    )


def test_permutation():
    torch.manual_seed(0)
    qk, v = torch.randn(1, 40, 6).double(), torch.randn(1, 40, 2).double()
    b, p = hash_tokens(qk, draw_rotations(6, (4,), 3)), torch.randperm(40)
    torch.testing.assert_close(
        lsh_attention(qk[:, p], v[:, p], b[..., p], 40), lsh_attention(qk, v, b, 40)[:, p]
    )


def test_slabs_change_nothing():
    torch.manual_seed(0)
    qk, v = torch.randn(5, 33, 4).double(), torch.randn(5, 33, 4).double()
    b = hash_tokens(qk, draw_rotations(4, (6,), 2))
    assert torch.allclose(
        lsh_attention(qk, v, b, 8, budget=1), lsh_attention(qk, v, b, 8), rtol=0, atol=1e-13
    )  # another order of adding, nothing else


def test_recall_rises():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=g)[
        torch.randint(40, (800,), generator=g)
    ] + 0.4 * torch.randn(800, 16, generator=g)
    near = (unit_vectors(x) @ unit_vectors(x).T).fill_diagonal_(-2).topk(8).indices
    b = hash_tokens(x, draw_rotations(16, bucket_factors(800, 32), 8, g))
    codes = sort_tokens(b, 32)[1]
    found = [
        attention_reach(codes[:r, :, None], codes[:r, None]).any(0).gather(1, near).float().mean()
        for r in (1, 2, 4, 8)
    ]
    assert found == sorted(found) and found[0] < 0.6 and found[3] > found[0] + 0.25


def test_hash():
    x = torch.randn(3, 50, 7)
    r = draw_rotations(7, (6, 4), 5, torch.Generator().manual_seed(0))
    b = hash_tokens(x, r)
    assert b.shape == (5, 3, 50) and b.min() >= 0 and b.max() < 24 and len(b.unique()) > 15
    assert torch.equal(hash_tokens(3 * x, r), b)  # length plays no part
    s = x[0, 0] @ r[0][2], x[0, 0] @ r[1][2]
    assert int(b[2, 0, 0]) == 4 * int(torch.cat([s[0], -s[0]]).argmax()) + int(
        torch.cat([s[1], -s[1]]).argmax()
    )
    assert torch.equal(hash_tokens(x, draw_rotations(7, (1,), 2)), torch.zeros(2, 3, 50).long())


def test_sorting():
    b = torch.randint(0, 5, (2, 3, 31))
    order, codes = sort_tokens(b, 4)
    moved = b.gather(-1, order)
    assert (moved.diff(dim=-1) >= 0).all() and (
        order.diff(dim=-1)[moved.diff(dim=-1) == 0] > 0
    ).all()
    assert torch.equal(codes.long() // 9, b) and (codes.long() % 9).max() == 7


@pytest.mark.parametrize("T", [1, 3, 64, 65])
def test_layer(T):
    torch.manual_seed(0)
    layer = LSHAttention(6, heads=3, chunk=16, rounds=2)
    x = torch.randn(2, 6, T, 1).requires_grad_()
    seen = []
    layer(x, seen).square().sum().backward()
    assert seen[0].shape == (2, 2, 3, T, 1) and x.grad.isfinite().all()
    if T > 1:
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.nn.init.zeros_(layer.out.weight)
    assert torch.equal(layer(x), x)


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    qk, v = torch.randn(1, 60, 8), torch.randn(1, 60, 8)
    b = hash_tokens(qk, draw_rotations(8, (4,), 2))
    half = lsh_attention(qk.bfloat16(), v.bfloat16(), b, 16)
    assert (
        half.dtype == torch.bfloat16
        and (half.float() - lsh_attention(qk.bfloat16().float(), v.bfloat16().float(), b, 16))
        .abs()
        .max()
        < 0.02
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lsh_attention(qk, v, b, 16), lsh_attention(qk, v, b, 16).float())


def test_meta():
    with torch.device("meta"):
        layer, x = LSHAttention(8, chunk=16), torch.zeros(1, 8, 20, 20)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize(
    "kw,error",
    [
        (dict(v=torch.zeros(1, 4, 2)), GeometryError),
        (dict(buckets=torch.zeros(1, 1, 4).long()), GeometryError),
        (dict(buckets=torch.zeros(0, 1, 5).long()), GeometryError),
        (dict(mask=torch.ones(1, 5)), GeometryError),
        (dict(mask=torch.ones(1, 4).bool()), GeometryError),
        (dict(chunk=0), DataError),
    ],
)
def test_refusals(kw, error):
    with pytest.raises(error) as e:
        lsh_attention(
            **dict(
                dict(
                    qk=torch.zeros(1, 5, 2),
                    v=torch.zeros(1, 5, 2),
                    buckets=torch.zeros(1, 1, 5).long(),
                ),
                **kw,
            )
        )
    assert e.value.remedy


def test_layer_refusals():
    for kw in (dict(heads=4), dict(heads=0), dict(rounds=0), dict(chunk=0)):
        with pytest.raises(DataError):
            LSHAttention(6, **kw)
    with pytest.raises(GeometryError, match="6"):
        LSHAttention(6)(torch.zeros(1, 5, 3, 3))


def test_buckets_need_not_be_looked_up():
    "Their number is known from the shape, and knowing it changes nothing"
    torch.manual_seed(0)
    qk, v, factors = (
        torch.randn(2, 3, 100, 8).double(),
        torch.randn(2, 3, 100, 5).double(),
        bucket_factors(100, 16),
    )
    b, mask = hash_tokens(qk, draw_rotations(8, factors, 3)), torch.rand(2, 3, 100) < 0.7
    for kw in ({}, dict(mask=mask), dict(causal=True)):
        assert torch.equal(
            lsh_attention(qk, v, b, 16, count=math.prod(factors), **kw),
            lsh_attention(qk, v, b, 16, **kw),
        )
    order, codes = sort_tokens(b, 16, math.prod(factors))
    assert (
        torch.equal(order, b.argsort(stable=True, dim=-1))
        and torch.equal(codes, sort_tokens(b, 16)[1])
        and codes.dtype == torch.int32
    )
    assert (
        sort_tokens(b, 16, 2**30)[1].dtype == torch.int64
        and sort_tokens(b + 2**30, 16)[1].dtype == torch.int64
    )  # where they do not fit


@pytest.mark.parametrize("warm", [True, False])
def test_the_layer_is_a_program(warm):
    "For any number of pictures; a stand-in that was drawn while it was followed is not kept"
    torch.manual_seed(0)
    layer, x = LSHAttention(8, heads=2, chunk=16).eval(), torch.randn(5, 8, 9, 7)
    if warm:
        layer(x)
    with torch.no_grad():
        program = torch.export.export(
            layer,
            (torch.randn(2, 8, 9, 7),),
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},),
        ).module()
    assert all(type(t) is torch.Tensor for drawn in layer.fixed.values() for t in drawn)
    y = layer(x)
    if warm:
        torch.testing.assert_close(program(x), y)
        torch.testing.assert_close(program(x[:1]), layer(x[:1]))
    assert (
        len(layer.fixed) == 1
        and "fixed" not in str(layer.state_dict().keys())
        and torch.equal(layer.train().eval()(x), y)
    )


def test_crossover():
    cross = importlib.import_module("bench.lsh").crossover
    assert (
        abs(cross((1, 100), (10, 100), (1, 1000)) - 10) < 1e-9
    )  # ours ∝ T^½, theirs T^1.5: equal at 10
    assert cross((1, 10), (5, 5), (1, 2)) is None and cross((4, 10), (1, 1), (2, 2)) == 4


@pytest.mark.slow
def test_full_size_forward_and_backward():
    "369 × 369 tokens, as many as a slice of the paper has pixels"
    x = torch.randn(1, 16, 369, 369).requires_grad_()
    LSHAttention(16, heads=1)(x).square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
