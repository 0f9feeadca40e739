"""`simplify` beside a network's own re-parameterisation: convs, error, latency, and how long it takes.

    python benchmarks/promises/simplify.py [--models repvgg_a0 ...] [--size 224] [--rounds 9]

timm's RepVGG-A0 and MobileOne-S0 beside timm's `reparameterize_model`; chains of diverse branch blocks as they were
published (the norm before a padded conv writes its own value of zero into the border), of ACNet's, and of linear
bottleneck pairs; torchvision's ResNet-18 and MobileNetV2, in which only norms fold. Random weights and random
statistics of the norms, batch 1.

    convs      of the model, of its own re-parameterisation where it has one, and of what `simplify` gives
    error      of `simplify` in float64, the largest difference over the largest output, at the example's and at another
               size; float32: that of what is returned, and of the model's own re-parameterisation
    latency    over the model's: ONNX Runtime on one thread, CPU time, all in turn, the median of the rounds' ratios.
               The runtime folds norms by itself, also in the model
    seconds    CPU time of one call on the float32 model, and of its own re-parameterisation
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx

__all__ = ["NETWORKS", "convs", "main", "ratios", "with_statistics"]

N = nn.BatchNorm2d


class Sum(nn.Module):
    """Branches that read one value, summed, with a ReLU."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return F.relu(total)


class NormAndPad(nn.Module):
    """A norm, then a border of what the norm makes of zeros (Ding et al., Diverse Branch Block, CVPR 2021)."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.bn, self.pad = N(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        bn: Any = self.bn
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        border = (bn.bias - bn.running_mean * scale).view(1, -1, 1, 1)
        p = self.pad
        y = F.pad(bn(x), [p] * 4)
        y[:, :, 0:p, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, 0:p] = border
        y[:, :, :, -p:] = border
        return y


def conv(i: int, o: int, k: int | tuple[int, int], p: int | tuple[int, int] = 0) -> nn.Sequential:
    """A conv and its norm."""
    return nn.Sequential(nn.Conv2d(i, o, k, 1, p, bias=False), N(o))


def diverse(c: int) -> nn.Module:
    """A diverse branch block."""
    inner = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), NormAndPad(c, 1), *conv(c, c, 3))
    pooled = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), NormAndPad(c, 1), nn.AvgPool2d(3, 1), N(c))
    return Sum(conv(c, c, 3, 1), conv(c, c, 1), inner, pooled)


def asymmetric(c: int) -> nn.Module:
    """An ACNet block."""
    return Sum(conv(c, c, 3, 1), conv(c, c, (3, 1), (1, 0)), conv(c, c, (1, 3), (0, 1)))


def pair(c: int) -> nn.Module:
    """Two convs without an activation between: ExpandNet's, and the linear bottlenecks of super-resolution networks."""
    return nn.Sequential(nn.Conv2d(c, 2 * c, 3, padding=1, bias=False), nn.Conv2d(2 * c, c, 1), nn.ReLU())


def chain(block: Callable[[int], nn.Module], channels: int = 32, depth: int = 6) -> nn.Module:
    """Blocks between a strided stem and a classifier."""
    blocks = (block(channels) for _ in range(depth))
    stem = nn.Conv2d(3, channels, 3, 2, 1)
    return nn.Sequential(stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name)
    return model


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "repvgg_a0": lambda: _timm("repvgg_a0"),
    "mobileone_s0": lambda: _timm("mobileone_s0"),
    "dbb": lambda: chain(diverse),
    "acnet": lambda: chain(asymmetric),
    "pairs": lambda: chain(pair),
    "resnet18": lambda: _torchvision("resnet18"),
    "mobilenet_v2": lambda: _torchvision("mobilenet_v2"),
}


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in eval mode, with statistics of its norms that shift and scale."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, N):
            shape = module.num_features
            with torch.no_grad():
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)  # type: ignore[union-attr]
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)  # type: ignore[union-attr]
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.1)
    return model.eval()


def own_form(model: nn.Module) -> nn.Module | None:
    """What timm makes of a model that can be re-parameterised; None for any other."""
    if not any(hasattr(m, "reparameterize") for m in model.modules()):
        return None
    from timm.utils.model import reparameterize_model

    made: nn.Module = reparameterize_model(model)
    return made.eval()


def convs(model: nn.Module) -> int:
    """The convolutions of a network."""
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def error(expected: nn.Module, actual: nn.Module, sizes: Sequence[int], dtype: torch.dtype) -> float:
    """The largest difference over the largest output, at some image sizes."""
    worst = 0.0
    for size in sizes:
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            a, b = expected(x.double()), actual(x.to(dtype)).double()
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


def ratios(files: Sequence[Path], example: Tensor, rounds: int) -> list[float]:
    """The median over rounds of each file's CPU time over the first one's, all run in turn in alternating order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(f), options, providers=["CPUExecutionProvider"]) for f in files]
    feeds = [{s.get_inputs()[0].name: example.numpy()} for s in sessions]

    def once(i: int) -> float:
        sessions[i].run(None, feeds[i])  # the others have thrown its weights out of the caches
        start = time.process_time_ns()
        sessions[i].run(None, feeds[i])
        return (time.process_time_ns() - start) / 1e6

    found: list[list[float]] = [[] for _ in files]
    for turn in range(-1, rounds):
        order = range(len(files)) if turn % 2 == 0 else reversed(range(len(files)))
        times = {i: once(i) for i in order}
        for i, ms in times.items():
            if turn >= 0:
                found[i].append(ms / times[0])
    return [statistics.median(values) for values in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a network; 1 if an error is large, or `simplify` leaves more convs than the model's own form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    print(f"{'':13} {'convs':^17} {'float64':>8} {'float32':^17} {'latency':^11} {'seconds':^11}")
    columns = ("model", "own", "lmfx", "error", "own", "lmfx", "own", "lmfx", "own", "lmfx")
    widths = (5, 5, 5, 8, 8, 8, 5, 5, 5, 5)
    print(f"{'':13} " + " ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)), flush=True)
    bad = False
    for name in args.models:
        torch.manual_seed(0)
        model = with_statistics(NETWORKS[name]())
        example, sizes = torch.randn(1, 3, args.size, args.size), (args.size, args.size + 21)
        start = time.process_time()
        net: nn.Module = lmfx.simplify(model, example)
        middle = time.process_time()
        own = own_form(model)
        end = time.process_time()
        double = copy.deepcopy(model).double()
        exact = error(double, lmfx.simplify(double, example.double()), sizes, torch.float64)
        forms = [model, net, *([own] if own is not None else [])]
        with tempfile.TemporaryDirectory() as folder:
            files = [
                Path(lmfx.export_onnx(m, example, Path(folder) / f"{i}.onnx", check=False)) for i, m in enumerate(forms)
            ]
            times = ratios(files, example, args.rounds)
        counts = [convs(m) for m in forms]
        bad |= not exact < 1e-9 or (own is not None and counts[1] > counts[2])
        row = [
            counts[0], counts[2] if own else "", counts[1], f"{exact:.0e}",
            f"{error(double, own, sizes, torch.float32):.0e}" if own else "",
            f"{error(double, net, sizes, torch.float32):.0e}",
            f"{times[2]:.2f}" if own else "", f"{times[1]:.2f}",
            f"{end - middle:.1f}" if own else "", f"{middle - start:.1f}",
        ]  # fmt: skip
        print(f"{name:13} " + " ".join(f"{v:>{w}}" for v, w in zip(row, widths, strict=True)), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
