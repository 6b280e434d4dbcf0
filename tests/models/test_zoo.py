"The zoo, and what its networks cost: fields against gradients, counts, faulty networks"

import functools
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from covid_ct.inference.sliding_window import dry_run
from covid_ct.models import zoo
from covid_ct.models.cost import (
    ReceptiveField,
    _effective_field,
    _effective_width,
    _receptive_field,
    predicted_costs,
    time_calls,
)
from covid_ct.models.resnet3d import ResNet3d, resnet_stages
from covid_ct.models.zoo import ROWS, ZooRow, build, check_row, describe, register
from covid_ct.scan import DataError
from covid_ct.train.recipes import RecipeError, change, recipe

SMALL = dict(stages=resnet_stages(8, (1, 1), (1, 2)), depth=8)
MINE = ZooRow("mine", "nobody", "lesson", (1, 64, 224, 224), ResNet3d, SMALL, (1, 8, 32, 32))
LESSONS = Path(zoo.__file__).parents[2] / "nbs" / "lessons"


@pytest.fixture(autouse=True)
def as_it_was():
    torch.manual_seed(0)
    threads, rows = torch.get_num_threads(), dict(ROWS)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ROWS.clear()
    ROWS.update(rows)


# ---- rows, ours and others
@pytest.mark.parametrize("name", ROWS)
def test_every_row_passes_its_own_trial(name):
    assert check_row(ROWS[name]) == []


def test_register_and_use():
    row = register(MINE)
    assert (
        row is MINE
        and ROWS["mine"] is MINE
        and list(ROWS)[-1] == "mine"
        and isinstance(build("mine", **SMALL), ResNet3d)
    )
    assert describe("mine")["trainable_parameters"] == 33_148_995
    assert (
        change(
            recipe("darnet", "tiny"), "a test", prep="", model="mine", model_kwargs=dict(classes=3)
        ).model
        == "mine"
    )
    with pytest.raises(DataError, match="taken"):
        register(MINE)
    assert (
        register(replace(MINE, paper="somebody"), again=True).paper == "somebody"
        and ROWS["mine"].paper == "somebody"
    )
    ROWS.pop("mine")
    with pytest.raises(RecipeError, match="unknown model"):
        change(recipe("darnet", "tiny"), "a test", model="mine")


def test_a_row_of_the_house_cannot_be_replaced():
    keep = ROWS["darnet"]
    for again in (False, True):
        with pytest.raises(DataError, match="taken"):
            register(replace(MINE, name="darnet"), again=again)
    assert ROWS["darnet"] is keep


class Half(ResNet3d):
    def outputs(self, x):
        return dict(logits=self(x))


class Unused(ResNet3d):
    def __init__(self, **kw):
        super().__init__(**kw)
        self.extra = nn.Linear(2, 2)


class Frozen(Unused):
    def __init__(self, **kw):
        super().__init__(**kw)
        self.extra.requires_grad_(False)


class Endless(ResNet3d):
    def features(self, x, seen=None):
        return super().features(x, seen) * torch.tensor(float("inf"))


class Drifted(ResNet3d):
    def forward(self, x):
        return super().forward(x) + 0.01


class Crowd(ResNet3d):
    def features(self, x, seen=None):
        f = super().features(x, seen)
        return f - 1e-6 * f.mean(0)


class Peeking(ResNet3d):
    def features(self, x, seen=None):
        return super().features(x, seen) * (1 if float(x.max()) <= 1 else 0)


class Greedy(ResNet3d):
    def __init__(self, **kw):
        super().__init__(**kw) if kw else 1 / 0


@pytest.mark.parametrize(
    "net,said",
    [
        (Half, "features"),
        (Unused, "extra.weight"),
        (Endless, "no finite gradient"),
        (Drifted, "different"),
        (Crowd, "others of its batch"),
        (Peeking, "item"),
        (Greedy, "ZeroDivisionError"),
        (lambda **kw: nn.Conv3d(1, 3, 3), "outputs"),
        (lambda: None, "TypeError"),
    ],
)
def test_faults_are_found(net, said):
    "Each would pass a look at the shape of its logits for two scans, or fails with a name"
    (fault, remedy), *_ = check_row(replace(MINE, build=net))
    assert said in fault and remedy.endswith(".")
    with pytest.raises(DataError):
        register(replace(MINE, build=net))
    assert "mine" not in ROWS


def test_what_is_frozen_needs_no_gradient():
    assert check_row(replace(MINE, build=Frozen)) == []


def test_a_trial_leaves_the_random_stream():
    torch.manual_seed(5)
    a = torch.rand(3)
    torch.manual_seed(5)
    check_row(MINE)
    assert torch.equal(torch.rand(3), a)


# ---- receptive fields
def test_fields_by_hand():
    def seq(*layers):
        net = nn.Sequential(*layers).eval()
        net.outputs = lambda x: dict(features=net(x))
        return _receptive_field(net, torch.rand(1, 1, 32, 32))

    def c(k, s=1):
        return nn.Conv2d(1, 1, k, s, k // 2)

    assert (
        seq(c(3)) == ReceptiveField((3, 3), (1, 1))
        and seq(c(3, 2), c(3)) == ReceptiveField((7, 7), (2, 2))
        and seq(c(1, 2), c(5)) == ReceptiveField((9, 9), (2, 2))
    )
    assert seq(nn.Conv2d(1, 1, (3, 7), (1, 2)), nn.ReLU(), nn.MaxPool2d(2)) == ReceptiveField(
        (4, 9), (2, 4)
    )
    assert seq(c(3, 2), nn.ConvTranspose2d(1, 1, 2, 2)) == ReceptiveField((3, 3), (1, 1)) and seq(
        c(3, 2), nn.ConvTranspose2d(1, 1, 2, 2), c(3)
    ) == ReceptiveField((5, 5), (1, 1))
    assert seq(c(3), nn.BatchNorm2d(1), nn.Sigmoid()) == ReceptiveField((3, 3), (1, 1))
    assert seq(nn.Flatten(), nn.Linear(1024, 4)).everywhere
    assert seq(nn.Conv2d(1, 1, 3, dilation=2), nn.AvgPool2d(3, 1)) == ReceptiveField(
        (7, 7), (1, 1)
    ) and seq(c(3), nn.GroupNorm(1, 1), c(3)) == ReceptiveField((5, 5), (1, 1), True)


@pytest.mark.parametrize(
    "name,kw,size",
    [
        ("darnet-none", dict(depth=24, width=4, blocks=(1, 1), strides=(1, 2)), (24, 40, 40)),
        ("wa-66-m", dict(depth=64, width=4, blocks=(1,), hidden=8), (64,) * 3),
        ("rn34", dict(width=4, blocks=(1, 1), strides=(1, 2)), (60, 60, 60)),
        ("raunet-unet", dict(widths=(4, 8, 16)), (64, 64)),
        ("raunet-a", dict(widths=(4, 8), cardinality=2), (40, 40)),
    ],
)
def test_field_is_the_support_of_the_gradient(name, kw, size):
    net, x = build(name, **kw), torch.rand(1, 1, *size)
    said = _receptive_field(net, x)
    for p in net.double().eval().parameters():
        p.data.abs_()
    v = x.double().detach().clone().requires_grad_()
    f = net.outputs(v)["features"]
    widest = torch.zeros(len(size), dtype=torch.long)
    for shift in range(4):
        (g,) = torch.autograd.grad(
            f[(0, slice(None), *(min(n // 2 + shift, n - 1) for n in f.shape[2:]))].sum(),
            v,
            retain_graph=True,
        )
        at = g[0, 0].nonzero()
        widest = torch.maximum(widest, at.amax(0) - at.amin(0) + 1)
    assert (
        not said.everywhere
        and said.width == tuple(widest.tolist())
        and all(-(-n // s) == m for n, s, m in zip(size, said.step, f.shape[2:], strict=False))
    )


def test_attention_is_noticed():
    for name, seen in (
        ("darnet", True),
        ("darnet-ca", True),
        ("darnet-none", False),
        ("raunet", True),
        ("raunet-a", False),
        ("pa-66-m", True),
        ("sa-66", True),
        ("wa-66", False),
        ("attention-rn34", False),
    ):
        net = build(name, **ROWS[name].small).eval()
        assert _receptive_field(net, torch.rand(1, *ROWS[name].small_size)).everywhere is seen, name


def test_effective_field():
    class One(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.c = nn.Conv2d(1, 1, k, padding=k // 2, bias=False).requires_grad_(False)
            nn.init.ones_(self.c.weight)

        def outputs(self, x):
            return dict(features=self.c(x))

    net, x = One(5).train(), torch.rand(2, 1, 21, 21)
    e = _effective_field(net, x)
    assert (
        net.training
        and not x.requires_grad
        and e.shape == (21, 21)
        and int((e > 0).sum()) == 25
        and e[10, 10] > 0
    )
    assert _effective_width(e) == pytest.approx(
        [4 * 2**0.5] * 2
    )  # five places alike: variance (25-1)/12 = 2
    point = torch.zeros(9, 9)
    point[4, 4] = 3
    assert _effective_width(point) == (0, 0)
    two = torch.zeros(9, 1)
    two[1] = two[7] = 1
    assert _effective_width(two) == pytest.approx((12, 0))  # two points six apart: deviation 3


# ---- operations, bytes, seconds
def test_operations_equal_their_sum():
    kw = dict(depth=8, width=4)
    found = predicted_costs("darnet-none", 1, (1, 8, 32, 32), **kw)["forward"]
    total = 0
    net = build("darnet-none", **kw).eval()

    def add(m, i, o):
        nonlocal total
        total += (
            2 * o.numel() * (m.weight[0].numel() if isinstance(m, nn.Conv3d) else m.in_features)
        )

    for m in net.modules():
        if isinstance(m, (nn.Conv3d, nn.Linear)):
            m.register_forward_hook(add)
    net(torch.rand(1, 1, 8, 32, 32))
    assert found == total


def test_costs_grow_as_they_should():
    kw = dict(depth=8, width=4)
    one, two = (predicted_costs("darnet-none", b, (1, 8, 32, 32), **kw) for b in (2, 4))
    assert (
        two["forward"] == 2 * one["forward"]
        and two["forward_bytes"] == pytest.approx(2 * one["forward_bytes"], rel=0.01)
        and two["weight_bytes"] == one["weight_bytes"]
    )
    assert 2.5 < one["step"] / one["forward"] <= 3 and one["step_bytes"] > 2 * one["forward_bytes"]
    net = build("darnet-none", **kw)
    assert one["forward_bytes"] == dry_run(net, (2, 1, 8, 32, 32))[1] and one[
        "weight_bytes"
    ] == 16 * sum(p.numel() for p in net.parameters())
    cut = predicted_costs("raunet", 2, (1, 33, 33), **ROWS["raunet"].small)
    assert cut["step"] / cut["forward"] > 3  # scores of the attention are computed again backwards


def test_seconds():
    calls = []
    told = time_calls({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert (
        "".join(calls) == "ab" * 4
        and set(told) == {"a", "b"}
        and all(0 <= v < 1 for v in told.values())
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["darnet", "attention-rn34", "raunet", "pa-66-m"])
def test_prediction_holds_on_a_gpu(name):
    "At the paper's size: the GPU's count, less the weights, is the prediction plus scratch"
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    said, net, x = (
        predicted_costs(name),
        build(name).cuda(),
        torch.rand(1, *ROWS[name].input_size, device="cuda"),
    )
    for train, key in ((False, "forward_bytes"), (True, "step_bytes")):
        net.train(train).zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(train):
            out = net.outputs(x) if train else net(x)
            if train:
                sum(out[k].sum() for k in ("logits", "detection", "type") if k in out).backward()
        ratio = (torch.cuda.max_memory_allocated() - before + x.nbytes) / said[key]
        del out
        print(f"{name} {key} predicted {said[key] / 1e6:.0f} MB, GPU over prediction {ratio:.3f}")
        assert ratio > 0.95


# ---- the judges of two lessons
def judges(lesson):
    "The names of a lesson up to its end, without training, drawing or `check`"
    from covid_ct.course.checks import find_exercise

    space = {}
    for c in json.loads((LESSONS / lesson).read_text("utf-8"))["cells"]:
        s = "".join(c["source"])
        if c["cell_type"] == "code" and (
            s.startswith(("import", "class SliceVote", "CLASSES", "SYSTEMS"))
        ):
            exec(s, space)

    def judge(name):
        asked = find_exercise(name).judge
        given = list(inspect.signature(asked).parameters)[1:]
        return functools.partial(asked, **{k: space[k] for k in given})

    return space, judge


def test_judges_of_four_networks():
    _, judge = judges("5_four_networks.ipynb")
    assert (
        judge("5.1")({"dual sampling", "residual attention U-Net"}) is True
        and "refuses" in judge("5.1")({"DARNet"})
        and "One more" in judge("5.1")({"dual sampling"})
    )
    assert (
        judge("5.2")("darnet-ca") is True
        and "no attention" in judge("5.2")("darnet-none")
        and "depth" in judge("5.2")("darnet-da")
    )
    assert (
        judge("5.3")(16912) is True and "biases" in judge("5.3")(16384) and judge("5.3")(1) is False
    )
    assert "give 0, 1 and 0.5" in judge("5.4")(
        lambda a, m: 0 * a.sum((1, 2, 3))
    ) and "(3,)" in judge("5.4")(lambda a, m: a.sum())

    def pool(m):
        return torch.nn.functional.adaptive_avg_pool3d(m.float(), 2)[:, 0]

    assert "single lesion" in judge("5.4")(
        lambda a, m: 1 - (a * pool(m)).sum((1, 2, 3)) / a.sum((1, 2, 3))
    )
    assert "gradient" in judge("5.4")(
        lambda a, m: torch.tensor([0.0, 1.0, 0.5]) if len(a) == 3 else torch.zeros(1)
    )


def test_judges_of_build_your_own():
    space, judge = judges("8_build_your_own.ipynb")
    vote = space["SliceVote"]
    assert (
        judge("8.1")(1 / 24) is True
        and "16 slices" in judge("8.1")(1 / 16)
        and judge("8.1")(1) is False
    )
    assert (
        judge("8.2")(lambda w: 234 * w * w + 47 * w + 4) is True
        and "missing" in judge("8.2")(lambda w: 0)
        and "too many" in judge("8.2")(lambda w: 10**6)
    )
    assert (
        judge("8.3")(lambda c: nn.GroupNorm(2, c)) is True
        and "neighbours" in judge("8.3")(nn.BatchNorm3d)
        and "nothing to learn" in judge("8.3")(lambda c: nn.InstanceNorm3d(c))
    )
    assert "not an instance" in judge("8.4")(vote(width=4)) and "has not" in judge("8.4")(vote)

    class Sharp(vote):
        def outputs(self, x):
            o = super().outputs(x)
            return o | dict(slice_weights=o["slice_weights"] * 2)

    class Deaf(vote):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.more = nn.Linear(2, 2)

    assert "sum to 1" in judge("8.4")(Sharp) and "more.weight" in judge("8.4")(Deaf)
