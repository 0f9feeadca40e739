"""Every candidate that the published code enumerates for its denoising network is one of ours."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.paper.ddpm_table import COUNTS, library_net, main_path, missing_entries, published_entries, trace_spans
from benchmarks.zoo.denoising import DenoisingNet
from lmfx.passes.rewrite.span_modules import kept_nodes
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.pruning import side_inputs

X = (torch.randn(1, 3, 32, 32), torch.tensor([10]))


@cache
def model_of(name: str) -> nn.Module:
    if name == "diffusers":
        pytest.importorskip("diffusers")
    return (library_net(32) if name == "diffusers" else DenoisingNet(32)).eval()


@cache
def ours(name: str) -> SpanSet:
    return trace_spans(model_of(name), X)


@pytest.mark.parametrize("name", ["published", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_the_published_rule_gives_the_published_counts_and_all_are_ours(name: str) -> None:
    entries = published_entries(model_of(name), X)
    path = main_path(model_of(name), X)
    assert (len(entries), len({(e.start, e.stop) for e in entries}), len(path.pairs)) == COUNTS
    assert len(set(entries)) == len(entries) and len(path.upsample) == 3
    assert missing_entries(entries, ours(name)) == []


def test_the_check_notices_a_candidate_that_is_not_there() -> None:
    found = ours("published")
    for kernel in (0, 5):
        row = next(e for e in published_entries(model_of("published"), X) if e.kernel_size == kernel)

        def kept(c: Any, row: Any = row) -> bool:
            size = 0 if c.realization == "drop" else (*(c.conv.kernel_size if c.conv is not None else ()), None)[0]
            return (c.convs, size) != (row.convs, row.kernel_size)

        fewer = SpanSet(found.network, found.options, tuple(c for c in found if kept(c)))
        assert missing_entries(published_entries(model_of("published"), X), fewer) == [row]


def test_a_pair_carries_its_time_embedding_and_moves_its_norm() -> None:
    network = ours("published").network
    pairs = main_path(model_of("published"), X).pairs
    assert len(pairs) > 2
    for first, second in pairs.items():
        pair = [c for c in ours("published") if c.convs == (first, second) and c.realization == "compose"]
        inside = [c for c in pair if c.span.activation is None]  # no norm of the next block's after it
        assert any(c.kept == c.convs for c in inside)
        assert {network.path(str(c.post_norm)) for c in inside} == {first.replace("conv1", "norm2")}
        for c in inside:
            layers = network.series[c.span.series].layers[c.span.start : c.span.stop]
            assert len(side_inputs(network, layers, kept_nodes(network, c))) == (first in c.kept)


def test_attention_and_the_ends_of_long_skips_are_in_no_span() -> None:
    for c in ours("published"):
        if c.realization != "compose":
            continue
        blocks = {name.rpartition(".")[0] for name in c.all_convs if name.endswith(("conv1", "conv2"))}
        assert len(blocks) <= 1 or all("attn" not in name for name in c.all_convs)
        assert not (blocks and any(name.endswith((".q", ".k", ".v")) for name in c.all_convs))
