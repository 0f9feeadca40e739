"""Ops that only move numbers, and sizes that a graph asks for, are written without torch's exporter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.export.builder import UnsupportedOp
from lmfx.export.emit import emit


class Net(nn.Module):
    """A conv, and what a test does to its output."""

    def __init__(self, end: Callable[[Tensor], Tensor], features: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.end = end
        self.head = nn.Linear(features, 4) if features else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.end(self.conv(x)))


X = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
ENDS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "view by the batch": (lambda x: x.view(x.size(0), -1), 210),
    "view by the shape": (lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]), 7),
    "reshape": (lambda x: torch.reshape(x, (x.shape[0], -1)), 210),
    "halves": (lambda x: x.reshape(x.size(0), 2, x.size(1) // 2, *x.shape[2:]).transpose(1, 2), 7),
    "pooled and squeezed": (lambda x: nn.functional.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 6),
    "averages": (lambda x: x.mean((2, 3)), 6),
    "less their averages": (lambda x: x - x.mean(2, keepdim=True), 7),
    "averages of rows": (lambda x: x.mean(3, keepdim=True).unsqueeze(2), 1),
    "channels last": (lambda x: x.permute(0, 2, 3, 1).contiguous(), 6),
    "negative dimensions": (lambda x: x.transpose(-1, -3).flatten(-2), 30),
    "nothing": (lambda x: x.view(x.shape).clone(), 0),
}


@pytest.mark.parametrize("name", ENDS)
def test_it_gives_what_torch_gives(name: str) -> None:
    torch.manual_seed(0)
    end, features = ENDS[name]
    graph = lmfx.trace(Net(end, features).eval(), X)
    model = emit(graph, (X,))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_0": X.numpy()})
    with torch.no_grad():
        wanted = graph(X).numpy()
    assert found.shape == wanted.shape and np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "end",
    [lambda x: x * x.size(2), lambda x: x.mean(), lambda x: x.view(torch.int32).float()],
    ids=["a size as a factor", "one number", "other bytes"],
)
def test_what_it_does_not_know_is_left_to_the_exporter(end: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOp):
        emit(lmfx.trace(Net(end).eval(), X), (X,))
