"""Which values are maps, and the size rule that is seen between two of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.graph.map_shapes import holds_tensors, observed_geometry, spatial_maps
from lmfx.passes.trace.tracing import trace


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("rounded", ["down", "up"])
def test_the_rule_that_is_seen_gives_every_size_that_was_seen_and_those_between(stride: int, rounded: str) -> None:
    def after(n: int) -> int:
        return n // stride if rounded == "down" else -(-n // stride)

    pairs = [((1, 3, n, n + 2), (1, 5, after(n), after(n + 2))) for n in (24, 26, 30, 49)]
    rule = observed_geometry(pairs)
    assert rule is not None and rule.dilation == (1, 1) and set(rule.kernel_size) <= {1, stride}
    for n in range(10, 60):
        assert rule.output_size((n, n + 1)) == (after(n), after(n + 1))


def test_sizes_that_follow_no_rule_have_none() -> None:
    assert observed_geometry([((1, 3, 12), (1, 3, 6)), ((1, 3, 14), (1, 3, 6)), ((1, 3, 16), (1, 3, 9))]) is None


class Hidden(nn.Module):
    """Looks at its values, so that nothing can be traced into it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) if float(x.sum()) < 1e9 else x
        return out


@pytest.mark.parametrize(("inner", "maps"), [(nn.Conv1d(5, 5, 3, padding=1), True), (nn.Linear(7, 7), False)])
def test_what_a_foreign_module_with_convs_reads_and_gives_are_maps(inner: nn.Module, maps: bool) -> None:
    graph = trace(nn.Sequential(Hidden(inner), nn.ReLU()).eval(), torch.randn(2, 5, 7))
    assert bool(spatial_maps(graph)) is maps


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Any, scale: Any = 1) -> Tensor:
        x = x["a"] if isinstance(x, dict) else sum(x) if isinstance(x, list) else x
        return self.conv(x) * (scale[0] if isinstance(scale, list) else scale)


MAP = torch.randn(1, 3, 6, 5)


@pytest.mark.parametrize(
    "example, held",
    [
        ((MAP, 2), False),
        ((MAP, 2.5), False),
        ((MAP, [3]), False),
        (([MAP, MAP], 2), True),
        (({"a": MAP},), True),
    ],
    ids=["a number", "a float", "a list of numbers", "a list of maps", "a dict"],
)
def test_an_input_holds_tensors_if_they_are_in_a_container(example: Any, held: bool) -> None:
    assert holds_tensors(trace(Holding().eval(), example)) == held
