"""The four systems can be compiled: one graph, no break that stops the compiler."""

import pytest
import torch

from bench.gpu import shape_of
from covid_ct.models.online_cam import class_map
from covid_ct.models.zoo import build
from covid_ct.scan import DataError
from covid_ct.train.loop import _WithOutputs
from covid_ct.train.recipes import recipe


@pytest.mark.parametrize("system", ["darnet", "dual_sampling", "raunet", "prior_attention"])
def test_no_graph_breaks(system):
    "dual_sampling had five: its map looked at the numbers of the labels"
    torch._dynamo.reset()
    r = recipe(system, "tiny")
    net = _WithOutputs(build(r.model, **r.model_kwargs).train())
    found = torch._dynamo.explain(net)(torch.rand(1, *shape_of(r)))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_one_label_and_a_tensor_of_labels_give_one_map():
    f, w = torch.randn(3, 4, 2, 2, 2), torch.randn(2, 4)
    assert torch.equal(class_map(f, w, 1), class_map(f, w, torch.ones(3, dtype=torch.long)))
    for bad in (2, -1, torch.tensor([0, 2, 0])):
        with pytest.raises(DataError, match="no class"):
            class_map(f, w, bad)
