"""Tells what the outputs of a traced network are: scores of classes, maps, or other values.

    scores    (images, classes), or a sequence of them (images, steps, classes): what an arg-max is taken of
    map       (images, channels, size...): a picture
    values    all else: boxes, embeddings, one number an image

A softmax says that its output is scores, and then the outputs beside it are not, unless they are softmaxes as well.
Else the last layer that computes decides: a Linear or a convolution, perhaps pooled, gives scores where it has two
columns or more and its channels are the columns (of a map of one channel, squeezed, they are pixels); a sigmoid, a tanh
or a division by the norm does not. Rows whose arg-max is always the same say no class, unless they are a softmax: such
an output counts as values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lmfx.calibration.recording import Rows
from lmfx.passes.graph.node_facts import is_floating
from lmfx.passes.graph.ops import function_name

__all__ = ["LAYERS", "MOVES", "SOFTMAX", "Kind", "Output", "op_of", "outputs_of"]

Kind = Literal["scores", "map", "values"]

SOFTMAX = {"softmax", "log_softmax", "softmax2d"}
MOVES = {  # what gives the same numbers in another order or shape, or their averages
    "flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous", "dropout", "identity",
    "mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptiveavgpool1d", "adaptiveavgpool2d", "adaptiveavgpool3d", "avgpool1d", "avgpool2d", "avgpool3d",
    "channelaffine", "getitem", "clone", "detach", "float", "to",
}  # fmt: skip
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LazyLinear)
LAYER_OPS = {"linear", "addmm", "matmul", "conv1d", "conv2d", "conv3d"}


@dataclass(frozen=True)
class Output:
    """One floating tensor of the output: its name, the dimension of the images (None: constant), and what it is."""

    name: str
    rows: int | None
    kind: Kind
    probabilities: bool = False  # scores that are a softmax already


def outputs_of(gm: fx.GraphModule, values: list[torch.Tensor], rows: Rows) -> list[Output]:
    """The floating tensors of the output in order; `values` is what one batch gave, `rows` their image dimensions."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    leaves, _ = pytree.tree_flatten_with_path(output.args[0])
    nodes = [(_name(path), leaf) for path, leaf in leaves if isinstance(leaf, fx.Node)]
    floating: list[tuple[str, fx.Node | None]] = [(name, n) for name, n in nodes if is_floating(n, unknown=True)]
    if len(floating) != len(values):  # an output whose tensors the graph does not name one by one
        floating = [(str(i), None) for i in range(len(values))]
    sources = [(_Source(None, False) if node is None else _source(gm, node)) for _, node in floating]
    softmax = any(s.softmax for s in sources)
    found = []
    for (name, _), source, value, dim in zip(floating, sources, values, rows, strict=True):
        kind: Kind = "values"
        if dim is not None:
            shape = [n for i, n in enumerate(value.shape) if i != dim]
            scored = source.softmax if softmax else source.layer and source.channels % max(shape[-1:], default=1) == 0
            differs = source.softmax or _differs(value.movedim(dim, 0))
            if len(shape) in (1, 2) and shape[-1] >= 2 and scored and differs:
                kind = "scores"
            elif len(shape) >= 2 and max(shape[1:]) > 1:
                kind = "map"
        found.append(Output(name, dim, kind, kind == "scores" and source.softmax and not source.log))
    return found


@dataclass(frozen=True)
class _Source:
    """What computes a value, apart from moves: a layer whose rows may be scores, a softmax (its logarithm)."""

    layer: bool | None
    softmax: bool
    log: bool = False
    channels: int = 0  # of the layer; 0 where they are not known


def _source(gm: fx.GraphModule, node: fx.Node) -> _Source:
    while True:
        module, name = op_of(gm, node)
        if name in SOFTMAX:
            return _Source(True, True, name == "log_softmax")
        if isinstance(module, LAYERS) or name in LAYER_OPS:
            channels: int = getattr(module, "out_features", 0) or getattr(module, "out_channels", 0)
            return _Source(True, False, channels=channels)
        if name not in MOVES or not node.all_input_nodes:
            # A pooled activation (a classifier that ends in a conv) is a row of scores as well.
            return _Source(name in ("relu", "batchnorm1d", "batchnorm2d"), False)
        node = node.all_input_nodes[0]


def op_of(gm: fx.GraphModule, node: fx.Node) -> tuple[nn.Module | None, str]:
    """(the module that a node calls, if it is one; the plain name of what it does)."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return module, type(module).__name__.lower()
    return None, function_name(node).lower().removesuffix("_")


def _differs(rows: torch.Tensor) -> bool:
    """Whether rows have different arg-max; of a single row it cannot be told."""
    found = rows.argmax(-1).flatten()
    return len(found) < 2 or bool((found != found[0]).any())


def _name(path: Any) -> str:
    return "".join(str(p) for p in path).strip(".[]'") or "output"
