"""Is every candidate of the published LayerMerge code among ours? For ResNet-34, ResNet-50 and MobileNetV2.

The code of Kim, El Halabi, Ji and Song (ICML 2024, https://github.com/snu-mllab/LayerMerge) enumerates spans by a table
of positions for each architecture. `published_entries` states its rule again, in our words and without a model:

    position   p is the boundary after conv p of the main path; downsample convs are not counted, conv 0 is the stem
    span       (start, stop] holds the convs start + 1 .. stop and never crosses a *break*, a position next to a stride
    block      a span that starts inside a residual block ends inside it or at its end; one that starts at its beginning
               ends inside it or at its end; beyond a block's beginning it goes on only to that block's end
    merged     of each class of convs (kernel size, depthwise) any number is kept, from the irreducible ones (channels
               change, or stride) to all; kernel size 1 + sum(k - 1), the stride of the strided conv, depthwise if every
               kept conv is; at least one is kept

    python benchmarks/paper/paper_table.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace

__all__ = ["COUNTS", "Entry", "missing_entries", "published_entries", "trace_spans"]

COUNTS = {"resnet34": (150, 62), "resnet50": (192, 107), "mobilenet_v2": (391, 171)}  # (entries, spans) as published


@dataclass(frozen=True)
class Entry:
    """One row of the published table."""

    start: int
    stop: int
    convs: tuple[str, ...]  # qualified names, in order
    kernel_size: int
    stride: int
    depthwise: bool
    blocks: int  # whole residual blocks inside, whose skips are merged too


@dataclass(frozen=True)
class _Layout:
    last: int  # the last position
    breaks: frozenset[int]
    block_end: dict[int, int]  # where a residual block begins -> where it ends


def _layout(name: str) -> _Layout:
    if name == "resnet34":
        return _Layout(32, frozenset({0, 7, 15, 27}), {i: i + 2 for i in range(0, 32, 2)})
    if name == "resnet50":
        return _Layout(48, frozenset({0, 11, 23, 41}), {i: i + 3 for i in range(0, 48, 3)})
    if name == "mobilenet_v2":
        blocks = {i: i + 3 for i in range(2, 50, 3) if i not in {2, 8, 17, 29, 38, 47}}
        return _Layout(50, frozenset({0, 5, 11, 20, 41}), blocks)
    raise ValueError(f"{name} is not one of {', '.join(COUNTS)}")


def published_spans(name: str) -> list[tuple[int, int]]:
    """The (start, stop) of the published table."""
    layout = _layout(name)
    found = []
    for start in range(layout.last):
        limits = [b for b in (*layout.breaks, layout.last) if b > start]
        # Inside a block nothing goes past its end.
        limits += [end for begin, end in layout.block_end.items() if begin < start < end]
        stop = start + 1
        while stop <= min(limits):
            found.append((start, stop))
            stop = layout.block_end.get(stop, stop + 1)
    return found


def main_path(name: str, model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """The convs of the main path in module order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]


def published_entries(name: str, model: nn.Module) -> list[Entry]:
    """Every row of the published table for the torchvision `model` called `name`."""
    convs = main_path(name, model)
    entries = []
    for start, stop in published_spans(name):
        inside = convs[start + 1 : stop + 1]
        least: dict[tuple[int, bool], int] = {}
        most: dict[tuple[int, bool], int] = {}
        for _, conv in inside:
            kind = (int(conv.kernel_size[0]), conv.groups == conv.out_channels)
            fixed = conv.in_channels != conv.out_channels or conv.stride[0] > 1
            least[kind] = least.get(kind, 0) + fixed
            most[kind] = most.get(kind, 0) + 1
        merged = set()
        for counts in product(*(range(least[kind], most[kind] + 1) for kind in most)):
            if any(counts):
                kernel = 1 + sum(n * (kind[0] - 1) for kind, n in zip(most, counts, strict=True))
                merged.add((kernel, all(kind[1] or not n for kind, n in zip(most, counts, strict=True))))
        stride = max(int(conv.stride[0]) for _, conv in inside)
        names = tuple(n for n, _ in inside)
        blocks = sum(start <= begin and end <= stop for begin, end in _layout(name).block_end.items())
        entries += [
            Entry(start, stop, names, kernel, stride, depthwise, blocks) for kernel, depthwise in sorted(merged)
        ]
    return entries


def trace_spans(model: nn.Module, size: int = 224) -> SpanSet:
    """All our composed candidates, with kernels of any size."""
    graph = trace(model.eval(), torch.randn(1, 3, size, size))
    return enumerate_spans(Network(graph), SpanOptions(realize=("compose",), max_kernel_size=None))


def missing_entries(entries: Iterable[Entry], spans: SpanSet) -> list[Entry]:
    """The published rows that are no candidate of ours. One conv as it is counts as our `keep`."""
    ours = set()
    for candidate in spans:
        conv = candidate.conv
        if candidate.realization not in ("keep", "compose") or conv is None or len(set(conv.kernel_size)) != 1:
            continue
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        span = candidate.span
        layers = spans.network.series[span.series].layers[span.start : span.stop]
        blocks = sum(layer.parallel is not None for layer in layers)
        ours.add((candidate.convs, conv.kernel_size[0], conv.stride[0], depthwise, blocks))
    return [e for e in entries if (e.convs, e.kernel_size, e.stride, e.depthwise, e.blocks) not in ours]


def main() -> None:
    import torchvision

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(COUNTS))
    failed = False
    print(f"{'model':14} {'published':>10} {'spans':>6} {'found':>6} {'ours':>6} {'ours, with fits':>16}")
    options = parser.parse_args()
    for name in options.models:
        model = torchvision.models.get_model(name)
        entries = published_entries(name, model)
        spans = trace_spans(model)
        everything = enumerate_spans(spans.network)
        missing = missing_entries(entries, spans)
        places = len({(e.start, e.stop) for e in entries})
        found = len(entries) - len(missing)
        composed = sum(c.realization != "keep" for c in spans)
        total = sum(c.realization != "keep" for c in everything)
        print(f"{name:14} {len(entries):10} {places:6} {found:6} {composed:6} {total:16}")
        for entry in missing:
            print(f"  missing: {entry}")
        failed |= bool(missing) or (len(entries), places) != COUNTS[name]
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
