"""The dual-sampling network at its full size, 138×256×256, beside MONAI's ResNet-34 of the same
geometry; sliding windows beside MONAI's; bytes predicted beside bytes taken."""

import os
import time
from functools import partial

from bench import BenchError, Case, measured, row

SIZE, REPEATS = (138, 256, 256), 2


def _ours():
    from covid_ct.models.dual_sampling import AttentionResNet

    return AttentionResNet()


def _peer():
    """MONAI strides its last stage; here it is set to 1, as the paper does. Its shortcuts have
    biases in front of their norms: taken off"""
    from monai.networks.nets import ResNet

    net = ResNet(
        "basic",
        [3, 4, 6, 3],
        [64, 128, 256, 512],
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_size=7,
        conv1_t_stride=2,
        num_classes=2,
        shortcut_type="B",
    )
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1, 1)
    for stage in (net.layer2, net.layer3, net.layer4):
        stage[0].downsample[0].bias = None
    return net


def threads():
    "As many as the environment says, else one for each core"
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))


def forward(name):
    "A network and its input; then the best of a few passes at full size"
    import torch

    threads()
    torch.manual_seed(0)
    net, x = {"ours": _ours, "peer": _peer}[name]().eval(), torch.rand(1, 1, *SIZE)
    seconds = []
    with torch.inference_mode():
        net(x[..., :32, :32, :32])
        yield
        for _ in range(REPEATS):
            start = time.perf_counter()
            net(x)
            seconds.append(time.perf_counter() - start)
    yield dict(seconds=min(seconds), parameters=sum(p.numel() for p in net.parameters()))


def windows(name):
    "A small U-Net and a volume; then all windows of 64³, half overlapping"
    import torch
    from monai.inferers import sliding_window_inference

    from covid_ct.inference.sliding_window import likeliest_class, sliding_window
    from covid_ct.models.unet import UNet

    threads()
    torch.manual_seed(0)
    net, x = UNet(3, 1, 3, widths=(4, 8)).eval(), torch.rand(1, 128, 128, 128)
    with torch.inference_mode():
        net(x[None, :, :64, :64, :64])
        yield
        if name == "ours":
            sliding_window(net, x, (64, 64, 64), finish=likeliest_class)
        else:
            out = sliding_window_inference(
                x[None], (64, 64, 64), 1, net, overlap=0.5, mode="gaussian"
            )
            out[0].argmax(0).to(torch.uint8)
    yield {}


def check_stages():
    "The last stage of ours strides as the paper's does"
    import torch

    from covid_ct.models.dual_sampling import AttentionResNet

    with torch.device("meta"):
        net, x = AttentionResNet().eval(), torch.rand(1, 1, *SIZE)
    shape = tuple(net.features(x).shape[2:])
    assert shape == tuple(-(-n // 16) for n in SIZE), shape


def both(title, what):
    "Time and memory of one job, ours and the peer's"
    ours, peer = measured(f"bench.dual:{what}", "ours"), measured(f"bench.dual:{what}", "peer")
    if ours.get("parameters") != peer.get("parameters"):
        raise BenchError(f"{title}: networks of different size")
    yield row(f"{title}: time", ours["seconds"], peer["seconds"], "s")
    yield row(f"{title}: memory", ours["mb"], peer["mb"], "MB")


def resnet():
    "The network at full size, and what is predicted of its memory"
    from covid_ct.inference.sliding_window import dry_run

    check_stages()
    done = list(both(f"ResNet-34 3-D, forward at {'×'.join(map(str, SIZE))}", "forward"))
    yield from done
    predicted = dry_run(_ours(), (1, 1, *SIZE))[1] / 1e6
    yield row(
        "ResNet-34 3-D: memory taken beside memory predicted (peer)",
        done[1]["ours"],
        predicted,
        "MB",
    )


CASES = [
    Case("ResNet-34 3-D at full size", resnet, 300),
    Case("sliding window", partial(both, "sliding window, 128³ by 64³", "windows"), 200),
]
