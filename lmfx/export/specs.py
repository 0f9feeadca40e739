"""Finds what a module takes and gives before it runs: inputs, shapes in eval mode, weights that are not there yet."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lmfx.passes.graph.map_shapes import fake_shapes

__all__ = ["InputSpec", "eval_mode", "eval_shapes", "input_specs", "off_meta"]

InputSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one graph input."""


def input_specs(inputs: Sequence[Any]) -> tuple[InputSpec, ...]:
    """Tensors or `(shape, dtype)` pairs as `(shape, dtype)` pairs."""
    return tuple(
        (tuple(i.shape), i.dtype) if isinstance(i, torch.Tensor) else (tuple(int(n) for n in i[0]), i[1])
        for i in inputs
    )


def eval_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor in a graph in eval mode, without computing anything."""
    with eval_mode(gm):
        return fake_shapes(gm, input_specs(inputs))


@contextlib.contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode, and every module back in its own mode at the end."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def off_meta(module: nn.Module, fill: float = 0.01) -> nn.Module:
    """A copy of the module whose meta parameters have the constant value `fill`; the module itself if it has none."""
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return module
    module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(fill if tensor.is_floating_point() else 0)
    return module
