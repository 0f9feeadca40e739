"""The benchmarks' plain networks are torchvision's: same state dict, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.shared.plain_networks import NETWORKS
from tests.helpers import double
from tests.helpers import one_thread as one_thread

PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "mobilenet_v2": 3_504_872}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_plain_network_is_torchvisions(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = double(getattr(models, name)(weights=None))
    plain = NETWORKS[name]()
    assert sum(p.numel() for p in plain.parameters()) == PARAMETERS[name]
    assert list(plain.state_dict()) == list(theirs.state_dict())
    plain.double().eval().load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_the_plain_u_net_gives_a_map_of_the_inputs_size_and_has_skips() -> None:
    import lmfx

    net = NETWORKS["unet"]().eval()
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert net(x).shape == (1, 2, 32, 48)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 18
    graph = lmfx.trace(net, x)
    assert sum(node.target is torch.cat for node in graph.graph.nodes) == 3
