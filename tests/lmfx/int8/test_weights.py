"""The layers whose weights are rounded: what they read, and which of them share a Gram."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmfx.export import to_onnx_bytes
from lmfx.int8.graph_view import GraphView, view_of
from lmfx.int8.units import SCHEMES, find_units
from lmfx.int8.weights import layer_of
from lmfx.passes.trace.tracing import trace


def conv_model(**attributes: Any) -> Any:
    """One 4 x 3 conv from two channels to three, on 9 x 10 pixels."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.default_rng(0).normal(size=(3, 2, 4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **attributes)],
        "conv",
        [helper.make_tensor_value_info("x", kind, [1, 2, 9, 10])],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"auto_pad": "VALID", "strides": [2, 1]},
        {"pads": [1, 0, 2, 3], "strides": [2, 2]},
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3], "kernel_shape": [4, 3]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"pads": [0, 2, 1, 0], "dilations": [2, 1]},
    ],
)
def test_padding_of_every_kind_is_that_of_onnx_runtime(attributes: dict[str, Any]) -> None:
    model = conv_model(**attributes)
    x = torch.randn(1, 2, 9, 10, generator=torch.Generator().manual_seed(0))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    view = GraphView(model)
    (unit,) = find_units(view, SCHEMES["onnxruntime"])
    layer = layer_of(view, unit)
    given = F.conv2d(F.pad(x, layer.pads), layer.weight, None, layer.module.stride, 0, layer.module.dilation)
    assert given.shape == wanted.shape and torch.allclose(given, wanted, atol=1e-4)


def test_only_layers_that_read_the_same_patches_share_a_gram() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: tuple[dict[str, Any], ...] = (
                {"padding": 1},
                {"padding": 1},
                {"padding": 2},
                {"padding": 1, "stride": 2},
                {"padding": 2, "dilation": 2},
                {"padding": 1, "groups": 4},
            )
            self.convs = nn.ModuleList(nn.Conv2d(8, 16, 3, **o) for o in options)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [conv(x) for conv in self.convs]

    x = torch.randn(1, 8, 9, 9)
    view = view_of(to_onnx_bytes(trace(Branches().eval(), x), (x,)))
    keys = [layer_of(view, u).key for u in find_units(view, SCHEMES["onnxruntime"])]
    assert len(keys) == 6 and keys[0] == keys[1] and len(set(keys)) == 5
