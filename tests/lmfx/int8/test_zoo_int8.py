"""A small network of each family as a Q/DQ file: ONNX Runtime runs it, and tensorrt_rtx reads it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import lmfx
from benchmarks.zoo.models import build, examples, randomise
from lmfx.calibration.images import as_calibration
from lmfx.export.tensorrt import network_layers
from lmfx.int8.activations import run_model
from lmfx.int8.quantize import float_form
from tests.helpers import one_thread as one_thread
from tests.lmfx.test_zoo import NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"timm/test_resnet", "timm/test_efficientnet", "timm/lcnet_050", "tv/squeezenet1_1"}
FAR = 0.6  # of the size of the outputs of networks that nobody trained


def example_of(name: str, model: torch.nn.Module) -> Any:
    """The smallest input that the model takes."""
    for example in examples(name, model, sizes=(64, 96, 128, 224, 256)):
        with contextlib.suppress(Exception), torch.no_grad():  # the model says in its own way that it is too small
            model(*example) if isinstance(example, tuple) else model(example)
            return example
    raise AssertionError(f"{name} takes none of the examples")


def several(value: Any) -> Any:
    """Four of an input, different ones where it is an image."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    rows = value[torch.arange(4) % len(value)]
    return torch.randn(rows.shape) if value.is_floating_point() else rows


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NETWORKS])
def test_a_network_of_the_zoo_runs_in_8_bits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(build(name)).eval()
    example = example_of(name, model)
    images = pytree.tree_map(several, example)
    data = images if isinstance(images, torch.Tensor) else [images]
    for runtime in ("onnxruntime", "tensorrt_rtx"):
        options: dict[str, Any] = {"weights": "nearest", "runtime": runtime, "progress": False}
        made = lmfx.quantize(model, data, tmp_path / f"{runtime}.onnx", example_input=example, **options)
        assert made.layers and made.path is not None
    view, feeds = float_form(lmfx.trace(model, example), example, as_calibration(data, example))
    both = [
        run_model(m, feeds(feeds.images))
        for m in (bytes(view.model.SerializeToString()), (tmp_path / "onnxruntime.onnx").read_bytes())
    ]
    y, z = (torch.cat([batch[0].flatten() for batch in outputs]) for outputs in both)
    assert bool(z.isfinite().all()) and float((y - z).norm()) < FAR * float(y.norm())
    with contextlib.suppress(ImportError):  # it is no part of the dev extra
        import tensorrt_rtx as trt

        assert network_layers(trt, (tmp_path / "tensorrt_rtx.onnx").read_bytes())["QUANTIZE"] > 0
