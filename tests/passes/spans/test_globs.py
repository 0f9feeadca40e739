"""Globs of module names: a container covers what is in it, and a glob without effect is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.spans.globs import covers
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(1, 3, 11, 9)


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


class Attention(nn.Module):
    """An op that is taken as a whole, with a convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(6, 6, 1)
        self.rounds = 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.sum() * 0) + self.rounds):  # which torch.fx cannot trace
            x = x + self.proj(x).softmax(1)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer10 = stage(3, 6), stage(6, 6)
        self.unused = nn.Conv2d(3, 3, 1)
        self.dropout = nn.Dropout()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.layer10(self.layer1(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> Any:
    return lmfx.trace(Net().eval(), X)


def touched(graph: Any, **options: Any) -> set[str]:
    return {name for c in lmfx.spans(graph, **options) if c.realization != "keep" for name in c.all_convs}


FIRST, SECOND = {"layer1.0", "layer1.2"}, {"layer10.0", "layer10.2"}


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("layer1", "layer1", True),
        ("layer1", "layer1.0.conv2", True),
        ("layer1", "layer10", False),
        ("layer1", "layer10.0", False),
        ("layer1", "net.layer1", False),
        ("*.layer1", "net.layer1.0", True),
        ("layer1.*", "layer1", False),
        ("layer1.*", "layer1.0", True),
        ("layer?", "layer1.0", True),
        ("layer?", "layer10.0", False),
        ("layer[12]", "layer2.conv", True),
        ("layer1.0", "layer1.00", False),
        ("LAYER1", "layer1", False),
    ],
)
def test_a_glob_covers_a_path_or_a_container_of_it(glob: str, path: str, expected: bool) -> None:
    assert covers((glob,), path) is expected


@pytest.mark.parametrize("glob", ["layer1", "layer1.*", "layer1.[02]", "*yer1"])
def test_the_name_of_a_container_and_its_children_say_the_same(graph: Any, glob: str) -> None:
    assert touched(graph, exclude=(glob,)) == SECOND
    assert touched(graph, include=(glob,)) == FIRST


def test_names_of_other_modules_with_the_same_beginning_are_not_covered(graph: Any) -> None:
    assert touched(graph) == FIRST | SECOND
    assert touched(graph, exclude=("layer10",)) == FIRST
    assert touched(graph, include=("layer10", "layer1")) == FIRST | SECOND


def test_exclude_is_stronger_than_include(graph: Any) -> None:
    assert touched(graph, include=("layer1",), exclude=("layer1.0",)) == {"layer1.2"}


def test_what_an_excluded_container_computes_by_itself_stays_too() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Block(), nn.ReLU(), nn.Conv2d(6, 6, 1)).eval()
    assert touched(lmfx.trace(net, X), exclude=("2",)) == {"0", "4"}
    assert touched(lmfx.trace(net, X), exclude=("2.b",)) == {"0", "2.a", "4"}


@pytest.mark.parametrize("glob", ["1", "1.proj"])
def test_a_name_inside_an_opaque_part_protects_the_part(glob: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), Attention(), nn.Conv2d(6, 6, 3)).eval()
    graph = lmfx.trace(net, X)
    across = [c for c in lmfx.spans(graph) if {"0", "2"} <= set(c.all_convs)]
    assert across  # a fit replaces all three
    assert not [c for c in lmfx.spans(graph, exclude=(glob,)) if {"0", "2"} <= set(c.all_convs)]


def test_an_opaque_part_between_included_convs_is_not_touched() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), Attention(), nn.Conv2d(6, 6, 3)).eval()
    graph = lmfx.trace(net, X)
    assert not [c for c in lmfx.spans(graph, include=("0", "2")) if {"0", "2"} <= set(c.all_convs)]
    assert [c for c in lmfx.spans(graph, include=("0", "1", "2")) if {"0", "2"} <= set(c.all_convs)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("layer",)}, r"exclude='layer' matches no module; did you mean .*layer1"),
        ({"include": ("layer2",)}, r"include='layer2' matches no module; did you mean .*layer1"),
        ({"exclude": ("layer1", "steem")}, r"exclude='steem' matches no module; the modules are layer1"),
        ({"exclude": ("layer1.0.weight",)}, r"exclude='layer1.0.weight' matches no module; did you mean .*layer1.0"),
        ({"include": ("layer1.1",)}, r"include='layer1.1' selects nothing .* it names layer1.1"),
        ({"include": ("layer1", "layer10.3")}, r"include='layer10.3' selects nothing"),
        ({"exclude": ("",)}, r"exclude='' matches no module"),
    ],
    ids=str,
)
def test_a_glob_without_effect_is_an_error_that_names_near_ones(
    graph: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(lmfx.OptionError, match=message):
        lmfx.spans(graph, **options)


@pytest.mark.parametrize("name", ["unused", "dropout"])
def test_a_module_that_the_graph_does_not_have_protects_nothing(graph: Any, name: str) -> None:
    with pytest.raises(lmfx.OptionError, match=f"exclude='{name}'"):
        lmfx.spans(graph, exclude=(name,))


def test_what_nothing_would_touch_may_be_excluded_all_the_same(graph: Any) -> None:
    assert touched(graph, exclude=("head",)) == FIRST | SECOND


def test_compress_takes_containers_too(tmp_path: Any) -> None:
    options: dict[str, Any] = {"latency": "roofline", "importance": "magnitude", "progress": False}
    model = Net().eval()
    net = lmfx.compress(model, X, 0.95, exclude=("layer1",), cache_dir=tmp_path, **options)
    changed = {name for c in lmfx.result_of(net).plan.candidates for name in c.all_convs}
    assert changed and changed <= SECOND
    with pytest.raises(lmfx.OptionError, match="did you mean"):
        lmfx.compress(model, X, 0.95, exclude=("layer",), cache_dir=tmp_path, **options)
