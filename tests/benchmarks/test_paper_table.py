"""Every candidate that the published LayerMerge code enumerates is one of ours, and ours go further."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.paper.paper_table import COUNTS, missing_entries, published_entries, published_spans, trace_spans
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet


@cache
def model_of(name: str) -> Any:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name)


@cache
def ours(name: str) -> SpanSet:
    return trace_spans(model_of(name), size=64)


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_rule_gives_the_published_counts(name: str) -> None:
    entries = published_entries(name, model_of(name))
    assert (len(entries), len({(e.start, e.stop) for e in entries})) == COUNTS[name]
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize("name", COUNTS)
def test_every_published_candidate_is_ours(name: str) -> None:
    assert missing_entries(published_entries(name, model_of(name)), ours(name)) == []


@pytest.mark.parametrize("name", COUNTS)
def test_the_check_notices_a_candidate_that_is_not_there(name: str) -> None:
    entries = published_entries(name, model_of(name))
    found = ours(name)
    row = next(e for e in entries if e.blocks)

    def is_row(c: Candidate) -> bool:
        same = c.conv is not None and c.conv.kernel_size[:1] == (row.kernel_size,) and c.convs == row.convs
        return same and "/" not in c.span.series  # inside the block it is another candidate, without the skip

    fewer = SpanSet(found.network, found.options, tuple(c for c in found if not is_row(c)))
    assert missing_entries(entries, fewer) == [row]


def test_published_spans_of_resnet34_respect_blocks_and_breaks() -> None:
    spans = published_spans("resnet34")
    assert (0, 2) in spans and (0, 4) in spans and (0, 6) in spans and (2, 4) in spans
    assert (0, 3) not in spans  # ends inside a later block
    assert (1, 4) not in spans  # leaves the block it starts in
    assert (6, 8) not in spans  # crosses the break at 7
    assert (6, 7) in spans and (7, 8) in spans


@pytest.mark.parametrize(("name", "block"), [("resnet34", "layer2.0"), ("resnet50", "layer3.0")])
def test_a_whole_strided_block_with_its_downsample_is_ours_too(name: str, block: str) -> None:
    found = [
        c
        for c in ours(name)
        if c.realization == "compose" and c.all_convs and all(p.startswith(block) for p in c.all_convs)
        if f"{block}.downsample.0" in c.all_convs
    ]
    assert found
    for candidate in found:
        assert candidate.conv is not None and candidate.conv.stride == (2, 2)
        assert f"{block}.downsample.0" in candidate.kept


@pytest.mark.parametrize(("name", "stem"), [("mobilenet_v2", "features.0.0")])
def test_the_stem_is_ours_too(name: str, stem: str) -> None:
    found = [c for c in ours(name) if c.realization == "compose" and c.convs[0] == stem]
    assert any(len(c.convs) >= 3 and c.conv is not None and c.conv.in_channels == 3 for c in found)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_the_stem_of_a_resnet_stands_before_a_max_pool_and_is_kept(name: str) -> None:
    # A max pool is not affine, so nothing is composed across it; a fit may replace both.
    from lmfx.passes.spans.enumeration import enumerate_spans

    assert not [c for c in ours(name) if c.realization == "compose" and "conv1" in c.convs]
    assert any("MaxPool2d is not affine" in r.reason for r in ours(name).refusals)
    fits = [c for c in enumerate_spans(ours(name).network) if c.realization == "fit" and c.convs == ("conv1",)]
    assert any(c.conv is not None and c.conv.stride == (4, 4) for c in fits)


def test_the_last_conv_of_mobilenet_v2_is_ours_too() -> None:
    found = [c for c in ours("mobilenet_v2") if c.realization == "compose" and c.convs[-1] == "features.18.0"]
    assert any(len(c.convs) >= 4 for c in found)


def test_spans_across_the_published_breaks_are_ours_too() -> None:
    # Two strides in one span: the published code forbids it, the algebra does not.
    assert any(
        c.conv is not None and c.conv.stride == (4, 4) for c in ours("mobilenet_v2") if c.realization == "compose"
    )


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v2"])
def test_a_residual_block_whose_convs_are_all_pruned_is_its_skip(name: str) -> None:
    # What differs on purpose: the published code would make it 2x where all convs can go.
    blocks = {"resnet34": "layer1.1", "mobilenet_v2": "features.3"}
    mine = [c for c in ours(name) if c.all_convs and all(p.startswith(blocks[name] + ".") for p in c.all_convs)]
    drops = [c for c in mine if c.realization == "drop"]
    assert [c.kept for c in drops if "/" not in c.span.series] == [()]
    assert not [c for c in mine if c.realization == "compose" and not c.kept]
