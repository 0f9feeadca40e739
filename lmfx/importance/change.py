"""Computes how far the output moves with one candidate: to second order, or by running the rest of the network.

The network runs once on the scoring images, with what candidates read and give kept. A fit is made from sampled pixels
of the other images (`lmfx.calibration.fitting`). Then the candidate alone is applied to the kept values, and its
change of the value at its span's end is weighted with the output's gradients there, or sent on to the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.bounded import Bounded
from lmfx.calibration.factor_fits import FactorFits
from lmfx.calibration.fit_values import FitValues
from lmfx.calibration.fitting import FitGroup, FittedOp, fit_groups
from lmfx.calibration.images import Calibration
from lmfx.calibration.narrow_fits import NarrowFits
from lmfx.calibration.narrowed_span import NarrowedSpan, span_reads
from lmfx.calibration.recording import (
    Replaced,
    batches_for,
    flat_output,
    images_at_once,
    mean_square_distance,
    output_rows,
    record,
    resume,
)
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.importance.added_activations import After
from lmfx.importance.parts import Part, batch_statistics, gradients_of
from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.algebra.linear_span import LinearSpan, fill_pad
from lmfx.passes.errors import InputError, ModelError
from lmfx.passes.graph.raw_nodes import dependents
from lmfx.passes.ir import Candidate
from lmfx.passes.rewrite.span_modules import build_span, span_sides
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.moved_norms import moved_norm

__all__ = ["Scorer", "ScorerOptions"]

MOST_CHOOSING = 64  # images that whole plans are judged by
OPS_BYTES = 1 << 28  # of fitted ops that are kept
AT_ONCE = 8  # candidates that are not fitted, of which one process claims some at a time


class ScorerOptions(Protocol):
    """How candidates are judged; see `lmfx.importance.Reconstruction`."""

    @property
    def exact(self) -> bool | None: ...
    @property
    def images(self) -> int: ...
    @property
    def probes(self) -> int: ...
    @property
    def surrogate(self) -> str: ...
    @property
    def norms(self) -> str: ...


class Scorer:
    """Judges the candidates of one graph on the held-out part of some calibration images."""

    def __init__(
        self,
        options: ScorerOptions,
        spans: SpanSet,
        calibration: Calibration,
        executor: Executor | None = None,
        candidates: Sequence[Candidate] = (),
    ) -> None:
        """`candidates` are all that may be scored, so that the network runs once for them (default: those of `run`)."""
        self.options = options
        self.spans = spans
        self.network = spans.network
        self.gm = spans.network.gm
        self.after = After(spans)
        self.calibration, self.judged = calibration.split(options.images)
        self.choosing = calibration.split(MOST_CHOOSING)[1]
        self.narrow = NarrowFits.of(spans.network, calibration.roles().fit)
        self.factors = FactorFits.of(spans.network, calibration.roles().fit)
        self.executor = executor
        self.rows = output_rows(self.gm, self.judged)
        self.names: set[str] = set()
        self._crossings: dict[frozenset[fx.Node], set[str]] = {}
        self.ops: Bounded[FittedOp] = Bounded(lambda op: op.bytes, OPS_BYTES)  # of the candidates that were fitted
        self.values: FitValues | None = None
        self.judged_parts: tuple[list[Part], float] = ([], 1.0)
        self.surrogates: dict[str, tuple[Tensor, Tensor]] | None = None
        if candidates:
            self.prepare(candidates)

    def prepare(self, candidates: Sequence[Candidate]) -> None:
        """Sees to it that what these candidates need of the network can be had."""
        names = self.reads(candidates)
        if self.options.exact:
            names = names.union(*(self.crossing(c) for c in candidates))
        if names <= self.names:
            return
        self.names = names | self.names
        self.judged_parts = self.parts(self.names)
        groups = fit_groups(self.network, [c for c in candidates if c.realization == "fit"])
        self.narrow.prepare([c for c in candidates if c.cuts])
        self.factors.prepare([c for c in candidates if c.realization == "factor"])
        self.values = FitValues(self.network, self.calibration, groups, quick=True)

    def reads(self, candidates: Sequence[Candidate]) -> set[str]:
        """The nodes at the ends of the candidates' spans, and what else their values are made of."""
        spans = [span for c in candidates for span in c.spans]
        names = {s.entry for s in spans} | {s.output for s in spans}
        names |= {side for c in candidates for side in span_sides(self.network, c)}
        names = names.union(*(span_reads(self.network, c) for c in candidates if c.cuts))
        return names | {name for c in candidates for one in c.each() for name in self.after.names(one)}

    def crossing(self, c: Candidate) -> set[str]:
        """The nodes whose values are read after a candidate's span, and are not changed by it."""
        outputs = frozenset(self.network.nodes[s.output] for s in c.spans)
        if outputs not in self._crossings:
            after = dependents(outputs)
            reads = {i for n in after for i in n.all_input_nodes}
            self._crossings[outputs] = {i.name for i in reads - after if i.op != "get_attr"}
        return self._crossings[outputs]

    def run(
        self, candidates: list[Candidate], take: Callable[[Sequence[Candidate]], list[Candidate]]
    ) -> Iterator[tuple[str, float]]:
        """Key and importance of those candidates that `take` gives when their turn comes."""
        self.prepare(candidates)
        parts, scale = self.judged_parts
        affine = self.options.surrogate == "affine" and any(c.realization == "compose" for c in candidates)
        if self.surrogates is None and affine:
            self.surrogates = affine_surrogates(self.network, self.calibration)
        surrogates = self.surrogates
        others = [c for c in candidates if c.realization != "fit"]
        for i in range(0, len(others), AT_ONCE):
            for c in take(others[i : i + AT_ONCE]):
                yield c.key, self.value(c, *self.composed(c, surrogates), parts, scale)
        groups = fit_groups(self.network, [c for c in candidates if c.realization == "fit"])
        jobs = self.jobs(groups, take)
        results: Iterable[tuple[FitGroup, dict[str, FittedOp]]]
        if self.executor is None:
            results = ((job[0], _fit_job(job)) for job in jobs)
        else:
            listed = list(jobs)
            results = zip((job[0] for job in listed), self.executor.map(_fit_job, listed), strict=True)
        for group, ops in results:
            for c in group.candidates:
                self.ops.put(c.key, ops[c.key])
                sides = ops[c.key].side_convs(group.sides, parts[0].output)
                yield c.key, self.value(c, ops[c.key], sides, parts, scale)

    def jobs(
        self, groups: Sequence[FitGroup], take: Callable[[Sequence[Candidate]], list[Candidate]]
    ) -> Iterator[tuple[FitGroup, Tensor, dict[str, Tensor], list[Tensor]]]:
        """The fits of groups of which `take` gives something."""
        for whole in groups:
            if mine := take(whole.candidates):
                group = replace(whole, candidates=tuple(mine))
                assert self.values is not None
                yield group, *self.values.of(group)

    def composed(
        self, c: Candidate, surrogates: dict[str, tuple[Tensor, Tensor]] | None
    ) -> tuple[LinearOp | NarrowedSpan | None, dict[str, nn.Module]]:
        """The merged conv of a candidate, None for the identity, the narrowed span, and the convs of its vectors from
        the side."""
        if c.realization == "drop":
            return None, {}
        if c.realization == "narrow":
            return self.narrow.span(c), {}
        if c.realization == "factor":
            return self.factors.op(c), {}
        module = build_span(self.network, c, surrogates)
        assert isinstance(module, LinearSpan)
        with torch.no_grad():
            return module.linear_op(), dict(zip(module.sides, module.side_convs(), strict=True))

    # --- from a local error to the divergence of the output -----------------------------------------------------------

    def parts(self, names: set[str]) -> tuple[list[Part], float]:
        """Values and gradients of the nodes on the scoring images, and the outputs' variance."""
        found, outputs = [], []
        generator = torch.Generator().manual_seed(0)
        whole = self.options.norms == "batch"  # statistics of all scoring images together
        size = self.options.images if whole else images_at_once(self.gm, self.options.images)
        for batch in batches_for(self.gm, self.judged, size, self.options.images):
            part = self.exact_part(batch, names) if self.options.exact else self.part(batch, names, generator)
            if self.options.norms == "batch" and len(part.output) < 2:
                raise InputError("norms='batch' needs statistics of two images and more: pass more calibration images")
            found.append(part)
            outputs.append(part.output)
        return found, mean_square_distance(torch.cat(outputs))

    def exact_part(self, batch: tuple[Tensor, ...], names: set[str]) -> Part:
        """A part without gradients, with the values `names`: what the candidates read, and what crosses their spans."""
        with torch.no_grad():
            values, output = record(self.gm, batch, names, self.calibration.names)
            return Part(values, {}, flat_output(output, len(batch[0]), self.rows))

    def part(self, batch: tuple[Tensor, ...], names: set[str], generator: torch.Generator) -> Part:
        inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in batch)
        with torch.enable_grad():
            values, output = record(self.gm, inputs, names, self.calibration.names, differentiable=True)
            z = flat_output(output, len(batch[0]), self.rows)
            ordered = list(values)
            gradients: dict[str, list[Tensor]] = {n: [] for n in ordered}
            for probe in range(self.options.probes):
                v = torch.randint(0, 2, z.shape, generator=generator).to(z.device, z.dtype) * 2 - 1
                found = gradients_of(z, [values[n] for n in ordered], v, probe + 1 < self.options.probes)
                for name, g in zip(ordered, found, strict=True):
                    gradients[name].append(torch.zeros_like(values[name]) if g is None else g)
        return Part({n: v.detach() for n, v in values.items()}, gradients, z.detach())

    def value(
        self,
        c: Candidate,
        op: LinearOp | NarrowedSpan | None,
        sides: dict[str, nn.Module],
        parts: list[Part],
        scale: float,
    ) -> float:
        total, images = 0.0, 0
        norm, way = self.norm(c), self.after.way(c)
        for part in parts:
            y = part.values[way.place if way else c.span.output]
            images += len(part.output)
            with torch.no_grad():
                if c.calls and not isinstance(op, NarrowedSpan):
                    total += self.moved(c, lambda x: _made(x, c, op, norm), part)
                    continue
                new = self.new(c, op, sides, norm, part)
                if self.options.exact:
                    total += self.squared_change(c, new, part)
                else:
                    if way is not None:
                        new = self.after.value(way, c.span.output, new, part.values)
                    gradients = part.gradients[way.place if way else c.span.output]
                    changes = [part.products(new - y, g) for g in gradients]
                    total += sum(float(d.square().sum()) for d in changes) / self.options.probes
        return -0.5 * total / images / scale

    def norm(self, c: Candidate) -> nn.Module | None:
        """The norm that a candidate moves to after its conv."""
        if c.post_norm is None or c.conv is None:
            return None
        return moved_norm(self.network.module(c.post_norm), c.conv.out_channels)

    def new(
        self,
        c: Candidate,
        op: LinearOp | NarrowedSpan | None,
        sides: dict[str, nn.Module],
        norm: nn.Module | None,
        part: Part,
    ) -> Tensor:
        """The value at the end of a candidate's span."""
        if isinstance(op, NarrowedSpan):
            return op(part.values)
        new = _made(part.values[c.span.entry], c, op, None)
        for name, conv in sides.items():
            new = new + conv(part.values[name])
        return new if norm is None else norm(new)

    # --- the change of the outputs itself -----------------------------------------------------------------------------

    def made(
        self, c: Candidate, like: Tensor | None = None
    ) -> tuple[LinearOp | NarrowedSpan | None, dict[str, nn.Module]]:
        """The op of a candidate and the convs of its vectors (in the dtype of `like`): composed, or fitted on the
        original's values."""
        if c.realization != "fit":
            affine = self.options.surrogate == "affine" and c.realization == "compose"
            if affine and self.surrogates is None:
                self.surrogates = affine_surrogates(self.network, self.calibration)
            return self.composed(c, self.surrogates if affine else None)
        (group,) = fit_groups(self.network, [c])
        op = self.ops.get(c.key)
        if op is None:
            assert self.values is not None
            op = _fit_job((group, *self.values.of(group)))[c.key]
            self.ops.put(c.key, op)
        return op, op.side_convs(group.sides, self.judged.tensors[0] if like is None else like)

    @torch.no_grad()
    def outputs(self, c: Candidate, part: Part) -> Any:
        """The network's output on an exact part when only the candidate is applied."""
        op, sides = self.made(c, part.values[c.span.entry])
        norm = self.norm(c)
        if c.calls and not isinstance(op, NarrowedSpan):
            known, replaced, acted = self.replaced(c, lambda x: _made(x, c, op, norm), part)
            return resume(self.gm, known, replaced, acted)
        return resume(self.gm, self.given(c, self.new(c, op, sides, norm, part), part))

    def given(self, c: Candidate, new: Tensor, part: Part) -> dict[fx.Node, Any]:
        """What `resume` takes for a candidate with one call, whose span's output is `new`."""
        nodes, way = self.network.nodes, self.after.way(c)
        output = nodes[c.span.output]
        known = part.beside(nodes, [output]) | {output: new}
        if way is not None:
            known[nodes[way.place]] = self.after.value(way, c.span.output, new, part.values)
        return known

    def moved(self, c: Candidate, made: Callable[[Tensor], Tensor], part: Part) -> float:
        """The squared change of the output, over all images, when `made` gives the span's output at all of its calls.

        To first order the changes by the calls add up. In the network itself, a call that depends on another one gets
        what that makes of its input.
        """
        nodes, calls = self.network.nodes, [(one.span, self.after.way(one)) for one in c.each()]
        if not self.options.exact:
            errors = []
            for span, way in calls:
                new, place = made(part.values[span.entry]), way.place if way else span.output
                if way is not None:
                    new = self.after.value(way, span.output, new, part.values)
                errors.append((new - part.values[place], part.gradients[place]))
            probes = [[part.products(e, g[i]) for e, g in errors] for i in range(self.options.probes)]
            return sum(float(torch.stack(p).sum(0).square().sum()) for p in probes) / self.options.probes
        outputs = {nodes[span.output] for span, _ in calls}
        known, replaced, acted = self.replaced(c, made, part)
        images, wanted = len(part.output), part.output
        with batch_statistics(self.gm) if self.options.norms == "batch" else contextlib.nullcontext():
            output = flat_output(resume(self.gm, known, replaced, acted), images, self.rows)
            if self.options.norms == "batch":
                key = " ".join(span.output for span, _ in calls)
                if key not in part.renewed:
                    # A call that depends on another one has its value anew, too.
                    later = dependents(user for out in outputs for user in out.users)
                    same = known | {out: part.values[out.name] for out in outputs - later}
                    part.renewed[key] = flat_output(resume(self.gm, same), images, self.rows)
                wanted = part.renewed[key]
        return float((output.double() - wanted).square().sum())

    def replaced(
        self, c: Candidate, made: Callable[[Tensor], Tensor], part: Part
    ) -> tuple[dict[fx.Node, Any], Replaced, dict[fx.Node, nn.Module]]:
        """What `resume` takes for a candidate with several calls: what is known, what they make, what acts on it."""
        nodes, calls = self.network.nodes, [(one.span, self.after.way(one)) for one in c.each()]
        known = part.beside(nodes, {nodes[span.output] for span, _ in calls})
        replaced: Replaced = {nodes[span.output]: (nodes[span.entry], made) for span, _ in calls}
        acted = {nodes[way.place]: self.after.activation() for _, way in calls if way is not None}
        return known, replaced, acted

    def squared_change(self, c: Candidate, new: Tensor, part: Part) -> float:
        """The squared change of the output, over all images, when the span's output is `new`."""
        wanted = part.output
        with batch_statistics(self.gm) if self.options.norms == "batch" else contextlib.nullcontext():
            output = flat_output(resume(self.gm, self.given(c, new, part)), len(wanted), self.rows)
            if self.options.norms == "batch":  # the original from here on, with its new statistics
                if c.span.output not in part.renewed:
                    place = self.network.nodes[c.span.output]
                    same = part.beside(self.network.nodes, [place]) | {place: part.values[c.span.output]}
                    part.renewed[c.span.output] = flat_output(resume(self.gm, same), len(wanted), self.rows)
                wanted = part.renewed[c.span.output]
        if output.shape != wanted.shape:  # the batches that were tried happened to fill as many rows an image
            raise ModelError(
                f"the size of the model's output depends on its values ({wanted.numel()} numbers became "
                f"{output.numel()} with {c.key}), so it has no batch dimension to compare along: return one row an "
                "image, or use importance='magnitude'"
            )
        return float((output.double() - wanted).square().sum())


def _fit_job(job: tuple[FitGroup, Tensor, dict[str, Tensor], list[Tensor]]) -> dict[str, FittedOp]:
    group, x, ys, others = job
    return group.fit(x, ys, quick=True, others=others)


def _made(x: Tensor, c: Candidate, op: LinearOp | None, norm: nn.Module | None) -> Tensor:
    """What a candidate makes of its input. Contiguous as a conv's output is: what follows may be a view."""
    new = x if op is None else _apply(op, x, c).contiguous()
    return new if norm is None else norm(new)


def _apply(op: LinearOp, x: Tensor, c: Candidate) -> Tensor:
    assert c.conv is not None
    none = ((0, 0),) * op.ndim
    return replace(op.like(x), padding=none)(fill_pad(x, c.conv))
