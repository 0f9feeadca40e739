"""Inputs that make a map of what is a vector at the example's size are limited to that size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.rewrite.one_pixel_vectors import vector_limits
from lmfx.passes.trace.tracing import trace

SMALL = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.pool = nn.AvgPool2d(4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = {"first": x, "second": y, "sum": x + y}.get(self.kind, x)
        value = value.mean((2, 3), keepdim=True) if self.kind == "never" else self.pool(value)
        return value, x * y


def limits(kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    graph = trace(Net(kind).eval(), SMALL)
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    return [(v.name, v.dims, v.kind) for v in vector_limits(graph, [output.args[0][0].name])]


@pytest.mark.parametrize(("kind", "names"), [("first", "x"), ("second", "y"), ("sum", "xy"), ("never", "")])
def test_those_inputs_are_limited_that_the_vector_grows_with(kind: str, names: str) -> None:
    """A sum can be made larger only where both are."""
    found = limits(kind)
    assert {name for name, _, _ in found} == set(names)
    assert all(dims == (2, 3) and kind == "size" for _, dims, kind in found)
