"""Lists what could be merged, as rows of plain values and as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmfx.environment.bounded_reading import in_one_line
from lmfx.passes.graph.conv_configs import module_config
from lmfx.passes.ir import Candidate, Layer, Refusal
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.layers import Network
from lmfx.report.text import group_refusals
from lmfx.report.words import short, size, table

__all__ = ["candidate_rows", "candidate_to_dict", "refusals_list", "spans_table"]


def candidate_rows(spans: SpanSet) -> list[dict[str, Any]]:
    """One object a candidate, in the order of the graph; kept layers without a convolution are left out."""
    return [d for d in (candidate_to_dict(c, spans.network) for c in spans) if d is not None]


def candidate_to_dict(candidate: Candidate, network: Network) -> dict[str, Any] | None:
    """A candidate as plain values; None for a kept layer without a convolution."""
    span, config = candidate.span, candidate.conv
    ndim = len(network.shape(span.entry)) - 2
    upscale = () if config is None else config.upscale
    if config is not None:
        kernel, stride, groups = config.written, config.stride, config.groups
        channels = config.in_channels, config.out_channels
    elif candidate.realization == "drop":
        width = network.shape(span.entry)[1]
        kernel, stride, groups, channels = (1,) * ndim, (1,) * ndim, width, (width, width)
    elif candidate.cuts:
        geometry = network.series_geometry(network.series[span.series], _layers(candidate, network))
        kernel, stride, groups = (), () if geometry is None else geometry.stride, 1
        channels = network.shape(span.entry)[1], network.shape(span.output)[1]
    elif len(candidate.convs) == 1:  # kept, and not to be merged: shared with another call, say
        conv: Any = network.gm.get_submodule(candidate.convs[0])
        found = module_config(conv, 0, 0)
        kernel, stride, groups, upscale = found.written, found.stride, found.groups, found.upscale
        channels = found.in_channels, found.out_channels
    else:
        return None
    return {
        "key": candidate.key,
        "series": span.series,
        "start": span.start,
        "stop": span.stop,
        "realization": candidate.realization,
        "convs": list(candidate.convs),
        "all_convs": list(candidate.all_convs),
        "kept": list(candidate.kept),
        "calls": len(candidate.spans),
        "kernel_size": list(kernel),
        "stride": list(stride),
        "upscale": list(upscale),
        "groups": groups,
        "multiplier": 0 if config is None else config.multiplier,
        "rank": 0 if config is None else config.rank,
        "depthwise": groups > 1 and groups == channels[0] == channels[1],
        "in_channels": channels[0],
        "out_channels": channels[1],
        "cuts": [{"conv": cut.conv, "reader": cut.reader, "of": cut.of, "width": cut.width} for cut in candidate.cuts],
    }


def _layers(candidate: Candidate, network: Network) -> tuple[Layer, ...]:
    span = candidate.span
    return network.series[span.series].layers[span.start : span.stop]


def spans_table(spans: SpanSet) -> str:
    """One line a span with all its candidates."""
    found = candidate_rows(spans)
    grouped: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for d in found:
        grouping = " depthwise" if d["depthwise"] else f" g{d['groups']}" if d["groups"] > 1 else ""
        filters = f" m{d['multiplier']}" if d["multiplier"] else f" r{d['rank']}" if d["rank"] else ""
        shape = size(d["kernel_size"]) + grouping + filters
        if d["cuts"]:
            shape = " and ".join(f"{cut['of']} to {cut['width']}" for cut in d["cuts"])
        stride = f"1/{size(d['upscale'])}" if d["upscale"] else size(d["stride"])
        key = (f"{d['series']}:{d['start']}-{d['stop']}", short(d["convs"]), stride)
        ways = grouped.setdefault(key, {})
        ways.setdefault(d["realization"], []).append("" if d["realization"] in ("keep", "drop") else shape)
    rows = [(*key, "; ".join(f"{w} {short(s)}".strip() for w, s in ways.items())) for key, ways in grouped.items()]
    text = table(("span", "convolutions", "stride", "candidates"), rows)
    return f"{text}\n\n{len(found)} candidates in {len(grouped)} spans; {len(spans.refusals)} refusals (--refused)"


def refusals_list(refusals: Iterable[Refusal]) -> str:
    """Reasons, the most frequent first, and the nodes of each refusal."""
    lines = []
    count = 0
    for reason, members in group_refusals(refusals):
        lines.append(f"{len(members)} x {in_one_line(reason)}")
        lines += [f"    {short(member.nodes, full=True)}" for member in members]
        count += len(members)
    return "\n".join([*lines, "", f"{count} refusals"])
