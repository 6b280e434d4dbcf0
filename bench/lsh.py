"""LSH attention against all-with-all attention and torch's scaled_dot_product_attention: time and
peak memory of a forward and backward pass.

One head of 16 numbers per token, two rounds, chunks of 64, the tokens of an n × n map. Every
case runs in a process of its own, so that its peak is its own. All-with-all is left out at 192²:
it stores every weight. SDPA never stores that matrix; it saves memory, not comparisons. Last,
the whole network of the paper, M at full width, on one slice of 369 × 369 pixels beside the
U-Net of the same widths: one forward and one backward pass. Memory is the peak of a process
above that of one that only made the network and passed a few tokens through it; below some ten
MB it says little. Where two curves cross is stated in tokens; where they do not, there is no
such row."""

import math
import time
from functools import cache

from bench import Case, measured, row, trouble

SIDES = (32, 64, 128, 192)
CHUNK, ROUNDS, DIM = 64, 2, 16


def _network(row):
    """A function of the side of a slice that sends one forward and backward through a full-size
    row of the paper; gives seconds"""
    import torch

    from covid_ct.models.raunet import RAUNET_ROWS

    net = RAUNET_ROWS[row]()

    def step(n):
        x, t = torch.rand(1, 1, n, n), time.perf_counter()
        net(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        return time.perf_counter() - t

    return step


def passes(kind, side):
    """A pass of a few tokens; then the best of a few forward and backward passes of `side`²
    tokens, or of a slice"""
    import torch
    import torch.nn.functional as F

    from covid_ct.models.lsh_attention import (
        bucket_factors,
        draw_rotations,
        exact_attention,
        hash_tokens,
        lsh_attention,
        unit_vectors,
    )

    torch.manual_seed(0)
    net = _network(kind) if kind in ("raunet", "raunet-unet") else None

    def ours(qk, v):
        return lsh_attention(
            qk,
            v,
            hash_tokens(qk, draw_rotations(DIM, bucket_factors(qk.shape[-2], CHUNK), ROUNDS)),
            CHUNK,
        )

    def sdpa(qk, v):
        return F.scaled_dot_product_attention(qk, unit_vectors(qk), v)

    run = {"lsh": ours, "exact": exact_attention, "sdpa": sdpa}.get(kind)

    def step(n):
        if net:
            return net(n)
        qk, v = (torch.randn(1, 1, n, DIM).requires_grad_() for _ in range(2))
        t = time.perf_counter()
        run(qk, v).sum().backward()
        return time.perf_counter() - t

    step(65)
    yield
    yield dict(
        seconds=min(step(side if net else side * side) for _ in range(3 if side < 128 else 1))
    )


def crossover(tokens, ours, peer):
    """Tokens at which two curves cross, straight lines between points of a log-log plot; None
    where they do not"""
    gap = [math.log(a / b) for a, b in zip(ours, peer, strict=False)]
    for (t0, g0), (t1, g1) in zip(
        zip(tokens, gap, strict=False), zip(tokens[1:], gap[1:], strict=False), strict=False
    ):
        if g0 > 0 >= g1:
            return math.exp(math.log(t0) + g0 / (g0 - g1) * math.log(t1 / t0))
    return tokens[0] if gap[0] <= 0 else None


@cache
def pass_of(kind, side):
    "Time and memory, measured once for all rows that need them"
    return measured("bench.lsh:passes", kind, side)


SAID = {"exact": "all with all", "sdpa": "torch SDPA"}


def against(peer, sides):
    "Time and memory of each side, and where the curves cross; a side that fails leaves the others"
    got, said = {}, SAID[peer]
    for side in sides:
        name = f"lsh: {side}² tokens"
        try:
            ours, theirs = (pass_of(k, side) for k in ("lsh", peer))
        except Exception as e:
            yield trouble(f"{name} against {said}", e)
            continue
        got[side] = ours, theirs
        yield row(f"{name}, time against {said}", ours["seconds"], theirs["seconds"], "s")
        yield row(f"{name}, memory against {said}", ours["mb"], theirs["mb"], "MB")
    tokens = [side * side for side in got]
    for what, better in dict(seconds="faster", mb="smaller").items():
        at = crossover(tokens, *zip(*((a[what], b[what]) for a, b in got.values()), strict=False))
        if at:
            yield row(f"lsh: {better} than {said} from here on (peer: 369²)", at, 369**2, "tokens")


def growth():
    "How memory grows with the tokens"
    small, large = (pass_of("lsh", side)["mb"] for side in (128, 369))
    yield row(
        "lsh: memory from 128² to 369² tokens (peer: tokens)",
        large / small,
        (369 / 128) ** 2,
        "times",
    )


def network():
    "M at full size beside the U-Net"
    m, unet = (pass_of(k, 369) for k in ("raunet", "raunet-unet"))
    yield row(
        "raunet: M, full size, 369 × 369, time (peer: U-Net)", m["seconds"], unet["seconds"], "s"
    )
    yield row("raunet: M, full size, 369 × 369, memory (peer: U-Net)", m["mb"], unet["mb"], "MB")


def tokens():
    "One layer beside both peers, and how its memory grows"
    yield from against("exact", SIDES[:3])
    yield from against("sdpa", SIDES)
    yield from growth()


CASES = [Case("lsh: one layer", tokens, 240), Case("raunet at full size", network, 240)]
