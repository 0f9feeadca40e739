"""What half precision costs in a network's output: lmfx's converted ONNX beside torch's own `.half()`.

    python benchmarks/runtimes/half.py [--models timm/mobilevit_xxs ...]

Random weights of a trained network's size. The float32 file of `lmfx.export_onnx` is converted by
`lmfx.export.precision`, and both run in ONNX Runtime on the CPU, which computes some ops of the half one in float32.
Errors are the largest difference from float32 over the largest entry of the output; `casts` are the file's Cast nodes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lmfx
from benchmarks.runtimes.engines import network
from lmfx.export.precision import convert_bytes

__all__ = ["main"]

MODELS = (
    *("timm/test_resnet", "timm/mobilenetv3_small_050", "timm/test_convnext", "timm/mobilevit_xxs"),
    *("tv/shufflenet_v2_x0_5", "diffusers/unet2d-tiny-noattn", "diffusers/autoencoderkl-tiny"),
    *("diffusers/unet2dcond-tiny", "ddpm/ddpm-ermongroup-cifar"),
)


def run(model: bytes, inputs: Sequence[Tensor]) -> np.ndarray:
    """The first output of an ONNX model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return np.asarray(session.run(None, feed)[0], dtype=np.float32)


def torch_half(model: nn.Module, example: Any) -> np.ndarray | str:
    """The first output of torch's own half precision, or why there is none."""
    try:
        inputs = [v.half() if isinstance(v, Tensor) and v.is_floating_point() else v for v in example]
        with torch.no_grad():
            output = copy.deepcopy(model).half()(*inputs)
    except RuntimeError as error:  # dtypes that meet where the model did not foresee it
        return str(error).splitlines()[0][:40]
    first = next(v for v in pytree.tree_leaves(output) if isinstance(v, Tensor))
    return first.float().numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a network; 1 if half precision costs more than a hundredth anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tolerance", type=float, default=0.01)
    options = parser.parse_args(arguments)
    import onnx

    print(f"{'':32} {'lmfx':>8} {'torch':>8} {'casts':>6}", flush=True)
    worst = 0.0
    for name in options.models:
        model, example = network(name)
        values = example if isinstance(example, tuple) else (example,)
        with tempfile.TemporaryDirectory() as folder:
            file = lmfx.export_onnx(lmfx.trace(model, example), example, Path(folder) / "net.onnx", check=False)
            full = file.read_bytes()
        half = convert_bytes(full, "fp16", keep_io=True)
        casts = sum(node.op_type == "Cast" for node in onnx.load_model_from_string(half).graph.node)
        exact, reference = run(full, values), torch_half(model, values)
        scale = float(np.abs(exact).max())
        error = float(np.abs(run(half, values) - exact).max()) / scale
        if isinstance(reference, str):
            theirs = reference
        else:
            theirs = f"{float(np.abs(reference - exact).max()) / scale:.1e}"
        worst = max(worst, error)
        print(f"{name:32} {error:8.1e} {theirs:>8} {casts:6d}", flush=True)
    return int(not worst <= options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
