"""Is every candidate of the published LayerMerge code among ours? For the denoising network of its CIFAR-10 runs.

`published_entries` states the rule of the published enumeration (see `paper_table`) again, for this kind of network:

    position   p is the boundary after conv p of the main path, in the order in which they run, counted from 1; the
               1 x 1 convs of attention and shortcuts are not counted. The last conv is in no entry
    breaks     the ends of every residual block, attention, and the ends of the long skips: all boundaries but those in
               the middle of a block. So a span is one conv, or both convs of a block
    merged     any number of the convs is kept, from the irreducible ones (channels change, or stride) to all, at least
               one; kernel size 1 + sum(k - 1)
    upsample   the conv after an upsampling may also become the identity (kernel size 0)

    python benchmarks/paper/ddpm_table.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.denoising import DenoisingNet
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace

__all__ = ["COUNTS", "Entry", "library_net", "missing_entries", "published_entries", "trace_spans"]

COUNTS = (98, 73, 22)  # entries, spans and residual blocks, as the published code makes them


@dataclass(frozen=True)
class Entry:
    """One row of the published table; `kernel_size` 0 is the identity."""

    start: int
    stop: int
    convs: tuple[str, ...]  # qualified names, in order
    kernel_size: int
    stride: int


@dataclass(frozen=True)
class Path:
    """The counted convs in the order in which they run, and the names of the residual blocks by their first conv."""

    convs: tuple[tuple[str, nn.Conv2d], ...]
    pairs: dict[str, str]  # conv1 -> conv2 of one block
    upsample: frozenset[str]


def main_path(model: nn.Module, example: tuple[Any, ...]) -> Path:
    """What is counted, seen by running the example: 3 x 3 convs, in blocks that have a conv1 and a conv2."""
    order: list[tuple[str, nn.Conv2d]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            hooks.append(module.register_forward_hook(lambda m, _, __, name=name: order.append((name, m))))
    with torch.no_grad():
        model(*example)
    for hook in hooks:
        hook.remove()
    names = [n for n, _ in order]
    pairs = {n: n[:-1] + "2" for n in names if n.endswith("conv1") and n[:-1] + "2" in names}
    sizes = dict(model.named_modules())
    up = [n for n in names if "upsampler" in n or type(sizes[n.rpartition(".")[0]]).__name__.endswith("Up")]
    return Path(tuple(order), pairs, frozenset(up))


def published_entries(model: nn.Module, example: tuple[Any, ...]) -> list[Entry]:
    """Every row of the published table for a denoising network."""
    path = main_path(model, example)
    index = {name: i for i, (name, _) in enumerate(path.convs)}
    found = []
    for name, conv in path.convs[:-1]:
        at = index[name]
        fixed = conv.in_channels != conv.out_channels or conv.stride[0] > 1
        sizes = [3] + ([0] if name in path.upsample and not fixed else [])
        found += [Entry(at, at + 1, (name,), k, conv.stride[0]) for k in sizes]
        if name in path.pairs:
            second = path.convs[at + 1]
            assert second[0] == path.pairs[name]
            both = [conv, second[1]]
            least = sum(c.in_channels != c.out_channels for c in both)
            found += [
                Entry(at, at + 2, (name, second[0]), 1 + 2 * kept, 1) for kept in range(max(least, 1), len(both) + 1)
            ]
    return found


def trace_spans(model: nn.Module, example: tuple[Any, ...], norm: Any = "post") -> SpanSet:
    """All our composed candidates, with kernels of any size."""
    graph = trace(model.eval(), example)
    return enumerate_spans(Network(graph), SpanOptions(realize=("compose",), max_kernel_size=None, norm=norm))


def missing_entries(entries: Iterable[Entry], spans: SpanSet) -> list[Entry]:
    """The published rows that are no candidate of ours. One conv as it is counts as our `keep`."""
    ours = set()
    for c in spans:
        if c.realization == "drop":
            ours.add((c.convs, 0, 1))
        elif c.conv is not None and c.realization in ("keep", "compose") and len(set(c.conv.kernel_size)) == 1:
            ours.add((c.convs, c.conv.kernel_size[0], c.conv.stride[0]))
    return [e for e in entries if (e.convs, e.kernel_size, e.stride) not in ours]


def library_net(channels: int = 128) -> nn.Module:
    """diffusers' UNet2DModel in the configuration of google/ddpm-cifar10-32, with random weights."""
    import diffusers

    make: Any = diffusers.UNet2DModel
    net: nn.Module = make(
        sample_size=32,
        block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128, help="of the first stage, a multiple of 32")
    channels = parser.parse_args().channels
    example = (torch.randn(1, 3, 32, 32), torch.tensor([10]))
    failed = False
    print(f"{'network':10} {'norm':7} {'blocks':>6} {'spans':>6} {'published':>10} {'found':>6} {'ours':>6}")
    for name, model in (("published", DenoisingNet(channels)), ("diffusers", library_net(channels))):
        entries = published_entries(model.eval(), example)
        blocks, places = len(main_path(model, example).pairs), len({(e.start, e.stop) for e in entries})
        for norm in ("affine", "post"):
            spans = trace_spans(model, example, norm)
            missing = missing_entries(entries, spans)
            ours = sum(c.realization != "keep" for c in spans)
            found = len(entries) - len(missing)
            print(f"{name:10} {norm:7} {blocks:6} {places:6} {len(entries):10} {found:6} {ours:6}", flush=True)
            for entry in missing:
                print(f"  missing: {entry}")
            failed |= bool(missing) or (len(entries), places, blocks) != COUNTS
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
