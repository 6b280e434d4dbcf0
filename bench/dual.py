"""The dual-sampling network at its full size, 138×256×256, beside MONAI's ResNet-34 of the same geometry; sliding windows beside MONAI's; bytes predicted beside bytes taken."""
import json
import os
import subprocess
import sys

SIZE, REPEATS = (138, 256, 256), 2


def _ours():
    from covid_ct.models.dual_sampling import AttentionResNet
    return AttentionResNet()


def _peer():
    "MONAI strides its last stage; here it is set to 1, as the paper does. Its shortcuts have biases in front of their norms: taken off"
    from monai.networks.nets import ResNet
    net = ResNet("basic", [3, 4, 6, 3], [64, 128, 256, 512], spatial_dims=3, n_input_channels=1, conv1_t_size=7, conv1_t_stride=2, num_classes=2, shortcut_type="B")
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1, 1)
    for stage in (net.layer2, net.layer3, net.layer4): stage[0].downsample[0].bias = None
    return net


def _forward(name):
    "Seconds of the best of a few passes, and bytes that the first one added to the process at its peak"
    import resource
    import time

    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    torch.manual_seed(0); net = {"ours": _ours, "peer": _peer}[name]().eval(); x = torch.rand(1, 1, *SIZE)
    peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, out = [], {}
    with torch.inference_mode():
        net(x[..., :32, :32, :32]); before = peak()
        for _ in range(REPEATS):
            start = time.perf_counter(); net(x); seconds.append(time.perf_counter() - start)
            out.setdefault("bytes", peak() - before)
        if name == "ours":
            features = net.features(x)
            assert tuple(features.shape[2:]) == tuple(-(-n // 16) for n in SIZE), features.shape
    return dict(out, seconds=min(seconds), parameters=sum(p.numel() for p in net.parameters()))


def _sliding(name):
    "One volume through windows of 64³, half overlapping, by a small U-Net; seconds and bytes at the peak"
    import resource
    import time

    import torch
    from covid_ct.models.sliding import labels, sliding
    from covid_ct.models.unet import UNet
    from monai.inferers import sliding_window_inference
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    torch.manual_seed(0); net, x = UNet(3, 1, 3, widths=(4, 8)).eval(), torch.rand(1, 128, 128, 128)
    peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode(): net(x[None, :, :64, :64, :64])
    before, start = peak(), time.perf_counter()
    if name == "ours": sliding(net, x, (64, 64, 64), finish=labels)
    else:
        with torch.inference_mode(): sliding_window_inference(x[None], (64, 64, 64), 1, net, overlap=.5, mode="gaussian")[0].argmax(0).to(torch.uint8)
    return dict(bytes=peak() - before, seconds=time.perf_counter() - start)


def _alone(what, name):
    "In a process of its own, so that peaks do not mix"
    code = f"import json; from bench import dual; print('\\n'+json.dumps(dual.{what}({name!r})))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _rows(title, what):
    a, b = (_alone(what, name) for name in ("ours", "peer"))
    if "parameters" in a: assert a["parameters"] == b["parameters"], (a, b)
    for key, unit, scale in (("seconds", "s", 1), ("bytes", "GiB", 2**30)):
        ours, peer = a[key] / scale, b[key] / scale
        yield dict(name=f"{title}: {'time' if key == 'seconds' else 'memory at the peak'}", ours=round(ours, 3), peer=round(peer, 3), unit=unit, ratio=round(ours / peer, 3))
    return a


def bench():
    from covid_ct.models.sliding import dry_run
    predicted = dry_run(_ours(), (1, 1, *SIZE))[1] / 2**30
    rows = [*_rows(f"ResNet-34 3-D, forward at {'×'.join(map(str, SIZE))}", "_forward"), *_rows("sliding window, 128³ by 64³", "_sliding")]
    took = rows[1]["ours"]
    return [*rows, dict(name="ResNet-34 3-D: GiB predicted (peer) against taken", ours=took, peer=round(predicted, 3), unit="GiB", ratio=round(took / predicted, 3))]


if __name__ == "__main__":
    for row in bench(): print(row)
