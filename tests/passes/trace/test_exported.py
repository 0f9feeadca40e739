"""torch.export ends in the same canonical form as torch.fx, under the same names, and says little when it fails."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.errors import TraceError
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, ops_of, run

X = torch.randn(2, 4, 8, 12, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


# fmt: off
LAYERS: list[nn.Module] = [
    nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    nn.Conv2d(4, 4, (1, 3), padding="same"),
    nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False),
    nn.LayerNorm(12), nn.LayerNorm((8, 12), elementwise_affine=False), nn.LayerNorm(12, bias=False),
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-2, 1.5), nn.SiLU(inplace=True), nn.GELU(),
    nn.GELU("tanh"), nn.ELU(0.5), nn.SELU(), nn.CELU(0.7),
    nn.LeakyReLU(0.2), nn.PReLU(4), nn.Sigmoid(), nn.Tanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.Mish(), nn.Softplus(),
    nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True),
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 3)), nn.ZeroPad2d((1, 2, 0, 1)), nn.ConstantPad2d(1, 0.5),
    nn.Linear(12, 5), nn.Flatten(),
]
# fmt: on


@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: str(m).replace(" ", ""))
def test_a_layer_is_the_same_module_at_the_same_path(layer: nn.Module) -> None:
    model = double(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), layer)))
    symbolic, exported = (trace(model, X, tracers=(t,)) for t in ("symbolic", "export"))
    assert [w.replace("ZeroPad", "ConstantPad") for w in ops_of(symbolic)] == ops_of(exported)
    names = [[str(n.target) for n in gm.graph.nodes if n.op == "call_module"] for gm in (symbolic, exported)]
    assert names[0] == names[1] == ["0.0", "0.1"]
    kind, same = (type(gm.get_submodule("0.1")) for gm in (symbolic, exported))
    assert kind is same or {kind, same} <= {nn.ZeroPad2d, nn.ConstantPad2d}
    layer = exported.get_submodule("0.1")
    assert not any(isinstance(v, list) for k, v in vars(layer).items() if k[0] != "_"), "lists"
    assert set(dict(exported.named_parameters())) == set(dict(model.named_parameters()))
    torch.testing.assert_close(run(exported, X), run(model, X), rtol=1e-14, atol=1e-14)


def test_a_network_is_the_same_by_either_way() -> None:
    act = nn.ReLU(inplace=True)  # shared by the blocks
    model = double(nn.Sequential(nn.Conv2d(4, 4, 1), Block(act), Block(act), nn.AvgPool2d(2), nn.Flatten()))
    graphs = [trace(model, X, tracers=(t,)) for t in ("symbolic", "shapes", "export")]
    seen = [[(n.op, n.name, str(n.target)) for n in gm.graph.nodes] for gm in graphs]
    assert seen[0] == seen[1] == seen[2]
    assert [len(Network(gm).regions) for gm in graphs] == [1, 1, 1]


def test_a_conv_that_is_called_twice_is_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.act(self.conv(self.act(x))))

    gm = trace(Twice().double().eval(), X, tracers=("export",))
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_module"] == ["act", "conv", "act", "conv"]
    assert len(Network(gm).shared) == 2


def test_views_of_permuted_values_copy_where_they_must() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.shape
            q, k = self.conv(x).flatten(2).transpose(1, 2).reshape(b, h * w, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ k
            y[:, :, 1:] += q[:, :, 1:]  # a write through a view: torch.export's part
            return self.out(y.transpose(1, 2).reshape(b, h, w, 4).permute(0, 3, 1, 2))

    model = Heads().double().eval()
    gm = trace(model, X)
    assert noted(gm).tracer == "export"
    torch.testing.assert_close(run(gm, X), run(model, X), rtol=1e-12, atol=1e-12)


class Dynamic(nn.Module):
    """Its output's size depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        warnings.warn("a model may warn", stacklevel=1)
        logging.getLogger("torch.export").error("and log")
        print("and print")
        y[:, 0] = y[y > 0].sum() if len(y[y > 0]) > 2 else y.sum()
        return y


@pytest.mark.filterwarnings("ignore:a model may warn")
def test_a_failure_of_torch_export_is_silent_and_loggers_are_as_they_were(capfd: Any) -> None:
    model = Dynamic().double().eval()
    run(model, X)
    capfd.readouterr()
    level, disabled = logging.getLogger("torch.export").level, logging.root.manager.disable
    with pytest.raises(TraceError, match="export: ") as caught:
        trace(model, X, tracers=("export",))
    out, err = capfd.readouterr()
    assert (out + err).count("and log") <= 1 and len(out + err) < 300  # the reference run's
    assert (logging.getLogger("torch.export").level, logging.root.manager.disable) == (level, disabled)
    assert len(str(caught.value)) < 1000


def test_functional_norms_of_permuted_maps_are_modules() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.layer_norm(x.permute(0, 2, 3, 1), (4,), self.norm.weight, self.norm.bias, self.norm.eps)
            return F.group_norm(y.permute(0, 3, 1, 2), 2)

    for tracer in ("symbolic", "export"):
        gm = trace(Last().double().eval(), X, tracers=(tracer,))
        kinds = [type(gm.get_submodule(str(n.target))).__name__ for n in gm.graph.nodes if n.op == "call_module"]
        assert {"GroupNorm"} < set(kinds)


def test_what_is_written_into_a_slice_has_a_derivative_at_every_size() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:, 0] = 2.0  # a number for each pixel
            y[:, 1:3, :, 2:] = x[:, :2, :, 2:]
            y[:, 3] = x[:, 0].float()  # of another type
            y[:, 4:] = x.mean((1, 2, 3), keepdim=True)
            return self.b(torch.relu(y))

    model = double(Writes())
    graph = trace(model, X)
    assert "copy" not in [getattr(n.target, "__name__", "") for n in graph.graph.nodes]
    for size in ((2, 4, 8, 12), (3, 4, 5, 9)):
        x = torch.randn(*size, dtype=torch.float64)
        assert torch.equal(run(graph, x), run(model, x))
        found, wanted = (torch.autograd.grad(net(x).square().sum(), net.a.weight)[0] for net in (graph, model))
        torch.testing.assert_close(found, wanted)
