"""`report`: what was merged, pruned, kept and refused, and what it costs, as text."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import fx

from lmfx.environment.bounded_reading import in_one_line, printable
from lmfx.environment.caller_state import entry
from lmfx.environment.effort import Effort
from lmfx.latency import CalibrationLine, LatencyTable
from lmfx.passes.errors import InputError
from lmfx.passes.ir import Candidate, Refusal
from lmfx.passes.model.size_limits import limits_of
from lmfx.passes.model.trace_facts import SizeKind, noted
from lmfx.planning.saved_networks import is_merged
from lmfx.quality.measures import Alternative
from lmfx.report.answer import COLLAPSED, runtime
from lmfx.report.words import count, more, percent, short, size, stride_of, table
from lmfx.result import Result, result_of

__all__ = ["Report", "calibration_text", "group_refusals", "report"]

ROWS = 12  # of a table, unless all is wanted
WARNINGS = 4  # of quantization

FEW_IMAGES = 16


class Report(str):
    """Text that a notebook or a prompt shows as it is, not as a quoted string; `html` writes the same as a page."""

    _net: fx.GraphModule | None = None

    def __repr__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)  # without the network

    @entry
    def html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        command: str | None = None,
        alternatives: Sequence[Alternative] = (),
        random_weights: bool = False,
    ) -> Path:
        """Writes the result as one page of HTML that needs nothing from elsewhere, and returns its path.

        `title` is the network's name on it (by default the model's class), `command` what made it (by default how this
        process was started), `alternatives` are other ways to be as fast, to be shown beside it (`lmfx.alternative`).
        With `random_weights` it says that the model has such, and nothing of what is kept of its outputs.
        What was not saved with a network is not on its page: one from `lmfx.load` has no frontier and no drawing.
        Raises `MissingExtra` without Jinja2, `OptionError` for a file that cannot be written.
        """
        from lmfx.report.page import write_page

        if self._net is None:
            raise InputError("this report was copied without its network: make it anew with lmfx.report(net)")
        return write_page(
            self._net, path, title=title, command=command, alternatives=alternatives, random_weights=random_weights
        )


@entry
def report(net: fx.GraphModule, *, full: bool = False) -> Report:
    """What lmfx did to `net`: budget and latencies, merged spans, dropped and kept convs, refusals with their reasons.

    `full` lists everything; otherwise long lists end in a count. Raises `InputError` for a network without a result.
    """
    result = dataclasses.replace(result_of(net), merged=is_merged(net))
    parts = [
        _head(result) + _sizes(net),
        _spans(result, full),
        _narrowed(result, full),
        _factored(result, full),
        _dropped(result, full),
        _kept(result, full),
        _refusals(result, full),
    ]
    text = Report(printable("\n\n".join(p for p in parts if p)))
    text._net = net
    return text


def group_refusals(refusals: Iterable[Refusal]) -> list[tuple[str, list[Refusal]]]:
    """Refusals by their reason, whatever the names in it, the most frequent first."""
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        words = refusal.reason.split(" ")
        names = {*refusal.nodes}
        general = " ".join("..." if w in names or re.fullmatch(r"\w+(\.\w+)+", w) else w for w in words)
        groups.setdefault(general, []).append(refusal)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


# --- the parts --------------------------------------------------------------------------------------------------------


def _int8(result: Result) -> list[str]:
    """What the 8-bit form is, or why there is none."""
    facts = result.int8
    if facts is None:
        return []
    if facts.quantized is None:
        times = f"{facts.ms['int8']:.4g} ms in 8 bits, {facts.ms['float32']:.4g} ms in float" if facts.ms else ""
        return [
            f"  int8       does not pay, so the network stays float: {times}",
            *(f"    {r}" for r in facts.rows[:ROWS]),
        ]
    made = facts.quantized
    lines = [
        f"  int8       {count(len(made.layers), 'layer')} in 8 bits, {len(made.float_layers)} stay float because that "
        "is faster; latency and quality are those of the Q/DQ file"
    ]
    if facts.ms:
        ms = facts.ms
        lines.append(
            f"             in float {ms['original float32']:.4g} ms before and {ms['float32']:.4g} ms after; "
            f"in 8 bits {ms['original int8']:.4g} ms and {ms['int8']:.4g} ms"
        )
    return [*lines, *(f"    {w}" for w in made.warnings[:WARNINGS])]


def _head(result: Result) -> str:
    plan = result.plan
    before, after = (count + len(result.kept) for count in plan.conv_counts)
    how = ", ".join(f"{count} {name}" for name, count in plan.ways.items() if count)
    title = f"{before} convolutions became {after}: {count(len(plan.candidates), 'span')} changed ({how})"
    if not plan.candidates:
        title = f"nothing was changed: all {before} convolutions are as they were"
    lines = [title, "  budget     none: only what loses nothing was merged"]
    if result.budget is not None or result.keep is not None:
        budget = f"{result.budget}{_budget_ms(result)}" if result.budget is not None else "none"
        asked = budget if result.keep is None else f"{budget}, and to keep {result.keep:.4g}"
        lines[1:] = [f"  budget     {asked}", f"  latency    {_latency(result)}"]
        lines += [f"             at {s.shape}: {percent(s.ratio)}, weight {s.weight:.4g}" for s in result.shapes]
        lines.append(f"  backend    {runtime(result)}")
    lines += _int8(result)
    lines += _quality(result)
    line = result.line
    if line is not None:
        lines.append(f"  table      {_line(line)}")
    if result.images is not None:
        few = (
            "; too few to judge a fit: give more, such as 64" if result.images < FEW_IMAGES and plan.candidates else ""
        )
        lines.append(f"  images     {count(result.images, 'calibration image')}{few}")
    if result.checked:
        lines.append(f"  checked    {result.checked}")
    if result.effort is not None:
        lines.append(f"  effort     {_effort(result.effort)}")
    form = "merged" if result.merged else "trainable; lmfx.merge(net) makes the form to deploy"
    lines.append(f"  form       {form}, {count(result.candidates, 'candidate')} were considered")
    return "\n".join(lines)


def _effort(effort: Effort) -> str:
    """CPU seconds in all and of the stages that took a tenth of them, and the peak of memory."""
    large = [f"{name} {seconds:.3g}" for name, seconds in effort.stages if seconds >= effort.seconds / 10]
    peak = "" if effort.peak is None else f"; the process at its largest {effort.peak / 1e9:.2g} GB"
    return f"{effort.seconds:.3g} s of CPU time ({', '.join(large)}){peak}"


def _quality(result: Result) -> list[str]:
    """What the network keeps of the original, and on which images that was measured."""
    quality = result.quality
    if quality is None:
        return []
    seen = count(quality.images, "image") + (" that no fit saw" if quality.held_out else " that the fits saw")
    lines = [f"  quality    {quality}, on {seen}"]
    if result.input_size:
        lines.append(f"  input      images of {' x '.join(map(str, result.input_size))}")
    for other in result.alternatives:
        more = not result.input_size and other.quality.kept > quality.kept
        hint = "; that keeps more, see input_sizes=" if more else ""
        lines.append(f"             {other.what}: {other.quality} at {other.ratio:.1%}{hint}")
    if quality.collapsed:
        lines.append(f"             COLLAPSED: {COLLAPSED}")
    return lines


def _sizes(net: fx.GraphModule) -> str:
    """At which batches and image sizes the network is right; nothing for one whose trace did not say."""
    states = noted(net).sizes
    limits = {v.kind: v for v in limits_of(net)}
    texts = []
    names: tuple[tuple[SizeKind, str], ...] = (("batch", "batches"), ("size", "image sizes"))
    for kind, many in names:
        limit = limits.get(kind)
        if limit is not None:
            seen = " x ".join(str(limit.shape[d]) for d in limit.dims)
            texts.append(
                f"right only at {'a batch of' if kind == 'batch' else 'images of'} {seen} (others raise SizeError)"
            )
        elif states.get(kind) == "any":
            texts.append(f"agrees with the model at other {many}")
        elif states.get(kind) == "refused":
            texts.append(f"the model runs at none of the other {many} that were tried")
    return f"\n  sizes      {'; '.join(texts)}" if texts else ""


def calibration_text(latency: LatencyTable) -> str:
    """What a latency table promises of whole networks, and how many of its rows the machine was too busy for."""
    line = latency.calibration
    busy = sum(m.quality == "busy" for m in latency.values())
    said = "not calibrated on whole networks" if line is None else f"{_line(line)} ({count(line.plans, 'network')})"
    return said + (f"\n{count(busy, 'row')} only seen while the machine was busy" if busy else "")


def _line(line: CalibrationLine) -> str:
    errors = [f"off by {percent(line.mape)}"] if math.isfinite(line.mape) else []
    errors += [f"{percent(line.held_out)} held out"] if math.isfinite(line.held_out) else []
    errors += [f"at worst {percent(line.worst)}"] if math.isfinite(line.worst) else []
    errors += [f"Kendall tau {line.kendall_tau:.2f}"] if math.isfinite(line.kendall_tau) else []
    return f"network = {line.a:.4g} ms + {line.b:.4g} x sum of its rows; {', '.join(errors) or 'exact'}"


def _budget_ms(result: Result) -> str:
    if result.original is None or result.budget is None or result.budget.kind == "ms":
        return ""
    return f" (at most {result.budget.resolve(result.original):.4g} ms)"


def _latency(result: Result) -> str:
    if result.measured is None and result.predicted is not None and result.original:
        ratio = result.predicted / result.original
        return (
            f"{result.original:.4g} ms before, {result.predicted:.4g} ms after ({percent(ratio)}, {1 / ratio:.2f}x as "
            "fast): predicted, not measured here"
        )
    if result.measured is None or result.original is None:
        return "not measured"
    text = f"{result.original:.4g} ms before, {result.measured:.4g} ms after"
    if result.ratio:
        text += f" ({percent(result.ratio)}, {1 / result.ratio:.2f}x as fast)"
    return text + (f"; predicted {result.predicted:.4g} ms" if result.predicted is not None else "")


def _spans(result: Result, full: bool) -> str:
    pairs = zip(result.names, result.plan.candidates, strict=False)
    named = [(name, c) for name, c in pairs if c.puts_conv and c.realization != "factor"]
    if not named:
        return ""
    shown = named if full else named[:ROWS]
    rows = [
        (name, short(c.convs, full), _kept_of(c), size(c.conv.written), stride_of(c.conv), c.realization)
        for name, c in shown
        if c.conv is not None
    ]
    text = "merged\n" + table(("into", "convolutions", "kept", "kernel", "stride", "how"), rows)
    return text + more(len(named) - len(shown))


def _narrowed(result: Result, full: bool) -> str:
    cuts = [cut for c in result.plan.candidates for cut in c.cuts]
    if not cuts:
        return ""
    shown = cuts if full else cuts[:ROWS]
    lines = [f"  {in_one_line(cut.conv)}: {cut.of} -> {cut.width} channels" for cut in shown]
    return "narrowed\n" + "\n".join(lines) + more(len(cuts) - len(shown))


def _factored(result: Result, full: bool) -> str:
    found = [c for c in result.plan.candidates if c.realization == "factor"]
    if not found:
        return ""
    shown = found if full else found[:ROWS]
    lines = [f"  {short(c.all_convs, full)}: {c.change}" for c in shown]
    return "factored\n" + "\n".join(lines) + more(len(found) - len(shown))


def _kept_of(candidate: Candidate) -> str:
    total = len(candidate.all_convs)
    calls = f", {len(candidate.spans)} calls" if candidate.calls else ""
    return (
        f"{len(candidate.kept)} of {total}" if candidate.realization == "compose" else f"fitted for {total}"
    ) + calls


def _dropped(result: Result, full: bool) -> str:
    plan = result.plan
    gone = [c for c in plan.candidates if c.realization == "drop"]
    pruned = [n for c in plan.candidates if c.realization == "compose" for n in c.all_convs if n not in c.kept]
    parts = []
    if gone:
        shown = gone if full else gone[:ROWS]
        parts.append(
            "dropped whole\n" + "\n".join(f"  {short(c.all_convs, full)}" for c in shown) + more(len(gone) - len(shown))
        )
    if pruned:
        parts.append(f"pruned before merging\n  {short(pruned, full)}")
    return "\n\n".join(parts)


def _kept(result: Result, full: bool) -> str:
    return f"kept as they are\n  {short(result.kept, full)}" if result.kept else ""


def _refusals(result: Result, full: bool) -> str:
    groups = group_refusals(result.refusals)
    if not groups:
        return ""
    shown = groups if full else groups[:ROWS]
    lines = []
    for reason, members in shown:
        nodes = list(dict.fromkeys(n for r in members for n in r.nodes))
        lines.append(f"  {len(members)} x {in_one_line(reason)}" + (f": {short(nodes, full)}" if nodes else ""))
    return "refused\n" + "\n".join(lines) + more(len(groups) - len(shown))
