"Program and ONNX answer like the network, for each of the zoo and any number of scans"

import numpy as np
import pytest
import torch
from torch import nn

from covid_ct.models.zoo import ROWS, build
from covid_ct.train.export import ExportError, export_run, trace, write_onnx
from covid_ct.train.run_folder import RunError

QUICK = ("darnet", "attention-rn34", "raunet", "pa-66-m")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ROWS if n not in QUICK)]
)
def test_every_network_answers_alike_elsewhere(name, tmp_path):
    import onnxruntime

    row = ROWS[name]
    torch.manual_seed(0)
    model = build(name, **row.small).train()
    with torch.no_grad():
        model(torch.rand(3, *row.small_size))  # running means that are not 0 and 1
    x = torch.rand(2, *row.small_size)
    program = trace(model.eval(), x).module()
    assert write_onnx(model, x, tmp_path / "m.onnx", dict(classes="a")) <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 5):
        y = torch.rand(n, *row.small_size)
        with torch.no_grad():
            assert np.allclose(
                session.run(None, {"image": y.numpy()})[0], model(y).numpy(), atol=1e-4
            ) and torch.allclose(program(y), model(y), atol=1e-6)
    assert session.get_modelmeta().custom_metadata_map["classes"] == "a"


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    class Decides(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else x.flatten(1) * 2

    with pytest.raises(ExportError, match="cannot be followed"):
        trace(Decides().eval(), torch.rand(2, 3))
    with pytest.raises(ExportError, match="training mode"):
        trace(nn.Linear(3, 2), torch.rand(2, 3))
    with pytest.raises(RunError):
        export_run(tmp_path / "none", tmp_path / "m.onnx")

    class Lies(nn.Linear):
        def forward(self, x):
            return super().forward(x) + (0 if torch.compiler.is_exporting() else 1)

    if hasattr(torch.compiler, "is_exporting"):
        with pytest.raises(ExportError, match="answers differ"):
            write_onnx(Lies(3, 2).eval(), torch.rand(2, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
