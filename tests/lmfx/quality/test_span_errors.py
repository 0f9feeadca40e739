"""The error at the end of a span is that of the value which stands for it in the compressed network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite, span_names
from lmfx.quality.span_errors import span_errors, stands_for


class Net(nn.Module):
    """A block with a skip between two convs; an uneven pad before the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.pad, self.d = nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(6, 6, 2)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.c(torch.relu(self.b(x))))
        return self.up(torch.relu(self.d(self.pad(x))))


IMAGES = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return lmfx.trace(Net().eval().double(), IMAGES[:1].double())


def errors(graph: fx.GraphModule, *chosen: Candidate, merged: bool = True) -> tuple[float | None, ...]:
    plan = MergePlan(chosen)
    net = rewrite(graph, plan)
    names = span_names(graph, plan)
    return span_errors(
        graph, merge(net) if merged else net, plan, names, as_calibration(IMAGES.double(), IMAGES[:1].double())
    )


def test_what_loses_nothing_has_no_error(graph: fx.GraphModule) -> None:
    exact = [c for c in lmfx.spans(graph, method="exact", realize=("compose",)) if c.exact and c.puts_conv]
    assert exact
    for c in exact:
        for merged in (True, False):
            (error,) = errors(graph, c, merged=merged)
            assert error is not None and error < 1e-20, c.key


def test_every_kind_of_span_is_found_in_both_forms(graph: fx.GraphModule) -> None:
    spans = lmfx.spans(graph)
    kinds = set()
    for c in spans:
        if c.realization in ("compose", "fit", "drop"):
            kinds.add(c.realization)
            for merged in (True, False):
                (error,) = errors(graph, c, merged=merged)
                assert error is not None and (error > 0 or c.exact), (c.key, merged)
    assert kinds == {"compose", "fit", "drop"}


def test_the_error_is_the_squared_distance_over_the_variance(graph: fx.GraphModule) -> None:
    c = next(c for c in lmfx.spans(graph) if c.realization == "drop")
    net = merge(rewrite(graph, MergePlan((c,))))
    node = stands_for(net, c, "")
    assert node is not None and node.name == c.span.entry

    def value(gm: fx.GraphModule, name: str) -> Tensor:
        found: dict[str, Tensor] = {}

        class Reader(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                out = super().run_node(n)
                if n.name == name:
                    found["value"] = out
                return out

        Reader(gm).run(IMAGES.double())
        return found["value"].detach()

    y, z = value(graph, c.span.exit), value(net, node.name)
    expected = float((z - y).square().sum() / (y - y.mean(0)).square().sum())
    (error,) = errors(graph, c)
    assert error == pytest.approx(expected, rel=1e-9)


def test_a_span_that_nothing_stands_for_has_no_error(graph: fx.GraphModule) -> None:
    c = next(c for c in lmfx.spans(graph) if c.puts_conv and c.span.activation != c.span.exit)
    plan = MergePlan((c,))
    found = span_errors(graph, graph, plan, ["no.such.module"], as_calibration(IMAGES.double(), IMAGES[:1].double()))
    assert found == (None,)
