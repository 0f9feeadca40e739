"""Channel pruning and depth compression one after the other, in either order, with Torch-Pruning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from benchmarks.shared.random_plans import randomise_norms
from tests.helpers import run
from tests.toys import Net, compress

X = torch.randn(2, 3, 16, 16)


@pytest.fixture
def pruner() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_pruning")


def pruned(tp: Any, net: nn.Module, ratio: float, ignored: list[nn.Module], example: Tensor = X) -> nn.Module:
    """`net` with a part of its channels gone, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = tp.pruner.MetaPruner(
            net,
            example,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=ignored,
        )
        made.step()
    return net.eval()


def widths(net: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_channels, m.out_channels) for m in net.modules() if isinstance(m, nn.Conv2d)]


def test_a_pruned_network_is_compressed_further(pruner: Any, tmp_path: Path) -> None:
    model: Any = randomise_norms(Net(16)).eval()
    before = widths(model)
    pruned(pruner, model, 0.5, [model.head])
    assert all(b[1] == 2 * a[1] for a, b in zip(widths(model), before, strict=True))
    net = compress(model, X, 0.7)
    assert lmfx.result_of(net).plan.candidates and lmfx.result_of(net).ratio <= 0.7
    student = compress(model, X, 0.7, merge=False)
    assert torch.allclose(run(lmfx.merge(student), X), run(student, X), atol=1e-5)
    lmfx.save(net, tmp_path / "out")
    assert torch.equal(run(lmfx.load(tmp_path / "out", model), X), run(net, X))


def test_a_pruned_network_has_reducible_convs_again(pruner: Any) -> None:
    # Pruning keeps a skip's channels equal, so that blocks can still vanish.
    model: Any = randomise_norms(Net(16)).eval()
    pruned(pruner, model, 0.25, [model.head])
    graph = lmfx.trace(model, X)
    drops = [c for c in lmfx.spans(graph) if c.realization == "drop" and "blocks.0.conv2" in c.convs]
    assert drops


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "trainable"])
def test_a_compressed_network_is_pruned(pruner: Any, merge: bool) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Net(16)).eval()
    net: fx.GraphModule = compress(model, X, 0.7, realize=("compose",), merge=merge)
    small = lmfx.merge(net)  # a trainable form is merged first: its convs stand in one another's algebra
    before = sum(p.numel() for p in small.parameters())
    pruned(pruner, small, 0.5, [small.get_submodule("head")])
    assert sum(p.numel() for p in small.parameters()) < 0.5 * before
    assert run(small, X).shape == run(model, X).shape
    small.train()
    small(X).square().mean().backward()  # what comes out is an ordinary network
    assert all(p.grad is not None for p in small.parameters())


def test_and_compressed_once_more(pruner: Any) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Net(16)).eval()
    net = compress(model, X, 0.8, realize=("compose",))
    pruned(pruner, net, 0.5, [net.get_submodule("head")])
    again = compress(net, X, 0.8)
    assert lmfx.result_of(again).ratio <= 0.8
    assert run(again, X).shape == run(model, X).shape
