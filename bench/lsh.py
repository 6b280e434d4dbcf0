"""LSH attention against all-with-all attention and torch's scaled_dot_product_attention: time and peak memory of a forward and backward pass.

One head of 16 numbers per token, two rounds, chunks of 64, the tokens of an n × n map. Every case runs in a process of its own, so that its peak is its own.
All-with-all is left out at 369²: one matrix of weights would take 74 GB. SDPA never stores that matrix; it saves memory, not comparisons.
Last, the whole network of the paper, M at full width, on one slice of 369 × 369 pixels beside the U-Net of the same widths: one forward and one backward pass.
Memory is the growth of the largest resident set over what the process held before; below some ten MB it says little.
Where two curves cross is stated in tokens; where they do not, there is no such row.
"""
import json
import math
import resource
import subprocess
import sys
import time

SIDES = (32, 64, 128, 369)
CHUNK, ROUNDS, DIM = 64, 2, 16


def _network(row):
    "A function of the side of a slice that sends one forward and backward through a full-size row of the paper; gives seconds"
    import torch
    from covid_ct.models.raunet import RAUNET_ROWS
    net = RAUNET_ROWS[row]()

    def step(n):
        x, t = torch.rand(1, 1, n, n), time.perf_counter()
        net(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        return time.perf_counter() - t
    return step


def _case(kind, side):
    "Seconds of a forward and backward pass, and megabytes on top of what the process had before"
    import torch
    import torch.nn.functional as F
    from covid_ct.models.lsh import bucket_factors, draw_rotations, exact_attention, hash_tokens, lsh_attention, unit
    torch.manual_seed(0)
    net = _network(kind) if kind in ("raunet", "raunet-unet") else None

    def ours(qk, v): return lsh_attention(qk, v, hash_tokens(qk, draw_rotations(DIM, bucket_factors(qk.shape[-2], CHUNK), ROUNDS)), CHUNK)
    run = {"lsh": ours, "exact": exact_attention, "sdpa": lambda qk, v: F.scaled_dot_product_attention(qk, unit(qk), v)}.get(kind)

    def step(n):
        if net: return net(n)
        qk, v = (torch.randn(1, 1, n, DIM).requires_grad_() for _ in range(2))
        t = time.perf_counter()
        run(qk, v).sum().backward()
        return time.perf_counter() - t
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    step(65)
    before, n = peak(), side if net else side * side
    seconds = min(step(n) for _ in range(3 if side < 128 else 1))
    return dict(seconds=seconds, mb=max(.1, peak() - before))


def measure(kind, side):
    out = subprocess.run([sys.executable, "-m", "bench.lsh", kind, str(side)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def crossover(tokens, ours, peer):
    "Tokens at which two curves cross, straight lines between points of a log-log plot; None where they do not"
    gap = [math.log(a / b) for a, b in zip(ours, peer)]
    for (t0, g0), (t1, g1) in zip(zip(tokens, gap), zip(tokens[1:], gap[1:])):
        if g0 > 0 >= g1: return math.exp(math.log(t0) + g0 / (g0 - g1) * math.log(t1 / t0))
    return tokens[0] if gap[0] <= 0 else None


def bench():
    got = {(k, s): measure(k, s) for k, sides in dict(lsh=SIDES, exact=SIDES[:3], sdpa=SIDES).items() for s in sides}
    rows = []
    for peer, said in dict(exact="all with all", sdpa="torch SDPA").items():
        sides = [s for s in SIDES if (peer, s) in got]
        for s in sides:
            a, b = got["lsh", s], got[peer, s]
            rows.append(dict(name=f"lsh: {s}² tokens, time against {said}", ours=a["seconds"], peer=b["seconds"], unit="s"))
            rows.append(dict(name=f"lsh: {s}² tokens, peak memory against {said}", ours=a["mb"], peer=b["mb"], unit="MB"))
        for what, better in dict(seconds="faster", mb="smaller").items():
            at = crossover([s * s for s in sides], *([got[k, s][what] for s in sides] for k in ("lsh", peer)))
            if at: rows.append(dict(name=f"lsh: {better} than {said} from here on (peer: 369²)", ours=at, peer=369**2, unit="tokens"))
    grown = got["lsh", 369]["mb"] / got["lsh", 128]["mb"]
    rows.append(dict(name="lsh: memory from 128² to 369² tokens (peer: tokens)", ours=grown, peer=(369 / 128)**2, unit="times"))
    m, unet = (measure(k, 369) for k in ("raunet", "raunet-unet"))
    for what, (said, unit) in dict(seconds=("time", "s"), mb=("peak memory", "MB")).items():
        rows.append(dict(name=f"raunet: M, full size, 369 × 369, {said} (peer: U-Net)", ours=m[what], peer=unet[what], unit=unit))
    return rows


if __name__ == "__main__": print(json.dumps(_case(sys.argv[1], int(sys.argv[2]))))
