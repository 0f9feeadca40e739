"""`reconstruction`: minus the divergence of the network's output when only one candidate is applied. No labels.

    D = 1/2 mean_i |z'_i - z_i|^2 / mean_i |z_i - z|^2          z: the outputs of image i, z': with the candidate

The candidate's local error e = y' - y at its span's output (before the kept activation) is exact: the candidate is run
on the original network's value. How it reaches the output is taken to first order, which makes D second order:

    z' - z = J e        |J e|^2 = E over v of (v'J e)^2,  v of random signs      g = J'v, a backward pass a probe

`exact=True` runs the rest of the network instead. Fits are made from sampled pixels of three quarters of the images,
one Gram matrix for each (span start, stride) that serves every stop and kernel, and judged on images of the last
quarter: on the images that it was made from, a fit with more unknowns than pixels has no error at all.

A least-squares fit gives a map of too small a variance where it fits badly, and batch norms behind it, which have the
original's statistics, pass that on. Any training in train mode begins by putting that right. `norms="batch"` takes the
statistics of the scoring images behind the candidate, in place of the stored ones: what is left is the error that new
statistics do not repair (Jordan et al. 2022, REPAIR). It ranks nearer to an importance by training than "kept" does,
which says what the network does as it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmfx.calibration import Calibration
from lmfx.fitting import FitGroup, FittedOp, fit_groups
from lmfx.importance.base import ImportanceTable
from lmfx.importance.pool import ExecutorLike, opened
from lmfx.latency.share import Share
from lmfx.latency.store import Store
from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.ir import Candidate
from lmfx.passes.layers import Network
from lmfx.passes.linear import LinearOp
from lmfx.passes.linear_span import LinearSpan, fill_pad
from lmfx.passes.norms import moved_norm
from lmfx.passes.rewrite import build_span, span_sides
from lmfx.passes.spans import SpanSet
from lmfx.profiling import digest
from lmfx.progress import progress as progress_bar
from lmfx.surrogates import affine_surrogates
from lmfx.values import batches_for, flat_output, record, record_batches, resume

__all__ = ["Reconstruction"]

VERSION = 4
AT_ONCE = 8  # candidates that are not fitted, of which one process claims some at a time
EXACT_MACS = 1e12  # some ten seconds on two cores
HELD_BYTES = 3 << 30  # values of all calibration images that may be held at once


@dataclass(frozen=True)
class Reconstruction:
    """Output divergence of each candidate, estimated on at most `images` held-out images with `probes` probes.

    `exact` runs the network behind the candidate instead of the second-order estimate; None does so where it is cheap
    (a small network). `surrogate` is what a composed span puts in place of the activations that it removes: "identity"
    (the paper) or "affine" (least squares). `norms` says what batch norms behind the candidate use: "kept", the
    statistics that they have (for a network that is not trained further), or "batch", those of the scoring images (for
    one that is), which needs the network to be run, so `exact` must not be False.
    """

    exact: bool | None = None
    images: int = 64
    probes: int = 2
    surrogate: str = "affine"
    norms: Literal["kept", "batch"] = "kept"
    name: str = "reconstruction"

    def __post_init__(self) -> None:
        for option in ("images", "probes"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{option}={value!r}: use a whole number from 1")
        if self.surrogate not in ("affine", "identity"):
            raise OptionError(f"surrogate={self.surrogate!r}: use 'affine' or 'identity'")
        if self.norms not in ("kept", "batch"):
            raise OptionError(f"norms={self.norms!r}: use 'kept' or 'batch'")
        if self.norms == "batch" and self.exact is False:
            raise OptionError("norms='batch' runs the network behind each candidate: use it with exact=True")

    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """See `Estimator.score`. Rows are stored as they are made, under the weights and the calibration data."""
        if calibration is None:
            raise InputError("importance='reconstruction' needs calibration images: pass calibration=")
        wanted = {c.key: c for c in candidates if c.realization != "keep"}
        if self.exact is None:
            resolved = self.resolved(spans.network, len(wanted), calibration)
            return resolved.score(spans, candidates, calibration, store, progress, executor)
        identity = {
            "estimator": self.name,
            "version": VERSION,
            "exact": self.exact,
            "images": self.images,
            "probes": self.probes,
            "surrogate": self.surrogate,
            "norms": self.norms,
            "weights": weights_digest(spans.network.gm),
            "calibration": calibration.digest(),
        }
        rows = {c.key: 0.0 for c in candidates if c.realization == "keep"}
        if store is not None:
            rows.update({k: float(v) for k, v in store.get_many("importance", identity, list(wanted)).items()})
        todo = {k: c for k, c in wanted.items() if k not in rows}
        if todo:
            with (
                progress_bar(len(todo), "scoring (reconstruction)", progress) as bar,
                Share(store, "importance", identity) as share,
                opened(executor) as pool,
            ):

                def collect(keys: Iterable[str]) -> None:
                    """Takes what other processes have finished."""
                    found = {} if store is None else store.get_many("importance", identity, list(keys))
                    for key, value in found.items():
                        rows[key] = float(value)
                        del todo[key]
                        bar.update(1)

                def take(some: Sequence[Candidate]) -> list[Candidate]:
                    """Those of some candidates that nobody has scored, or does now."""
                    mine = share.take([c.key for c in some])
                    collect(mine)
                    share.give_back([k for k in mine if k not in todo])
                    return [c for c in some if c.key in mine and c.key in todo]

                while todo:
                    for key, value in _Scorer(self, spans, calibration, pool).run(list(todo.values()), take):
                        del todo[key]
                        bar.update(1)
                        if not math.isfinite(value):
                            share.give_back([key])
                            continue  # its arithmetic overflows: without a row it can not be chosen
                        rows[key] = value
                        if store is not None:
                            store.put("importance", identity, key, value)
                    while todo and not (free := share.take(todo, 1)):  # the rest is claimed by others
                        share.wait()
                        collect(todo)
                    if todo:  # given up by its process, or finished in this moment
                        share.give_back(free)
                        collect(todo)
        return ImportanceTable(rows, {**identity, "graph": digest(spans.network.gm)})

    def resolved(self, network: Network, candidates: int, calibration: Calibration) -> Reconstruction:
        """The same with `exact` decided for this many candidates."""
        if self.exact is not None:
            return self
        judged = min(self.images, len(calibration.split(self.images)[1]))
        cost = multiply_accumulates(network) * judged * candidates / 2  # half of the network on average
        return replace(self, exact=cost <= EXACT_MACS or self.norms == "batch")


def multiply_accumulates(network: Network) -> float:
    """Multiply-accumulates of the convs in a network's regions, for one image."""
    total = 0.0
    for name in (c for region in network.regions for c in network.convs(region.series.layers)[1]):
        conv: Any = network.module(name)
        total += conv.weight.numel() * prod(network.shape(name)[2:])
    return total


def weights_digest(gm: fx.GraphModule) -> str:
    """A short digest of a graph's structure and of all its values."""
    import hashlib

    from lmfx.passes.trace import fingerprint

    state = hashlib.sha256(fingerprint(gm).encode())
    for name, tensor in gm.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


@dataclass(frozen=True)
class _Part:
    """One batch of the scoring images: values and gradients (one a probe) of nodes, and the output, (images, ...);
    `renewed` are outputs with the batch's statistics behind a node."""

    values: dict[str, Tensor]
    gradients: dict[str, list[Tensor]]
    output: Tensor
    renewed: dict[str, Tensor] = field(default_factory=dict)


class _Scorer:
    def __init__(
        self, options: Reconstruction, spans: SpanSet, calibration: Calibration, executor: Executor | None
    ) -> None:
        self.options = options
        self.spans = spans
        self.network = spans.network
        self.gm = spans.network.gm
        self.calibration, self.judged = calibration.split(options.images)
        self.executor = executor

    def run(
        self, candidates: list[Candidate], take: Callable[[Sequence[Candidate]], list[Candidate]]
    ) -> Iterator[tuple[str, float]]:
        """Key and importance of those candidates that `take` gives when their turn comes."""
        names = {c.span.entry for c in candidates} | {c.span.output for c in candidates}
        names |= {side for c in candidates for side in span_sides(self.network, c)}
        parts, scale = self.parts(names)
        surrogates = None
        if self.options.surrogate == "affine" and any(c.realization == "compose" for c in candidates):
            surrogates = affine_surrogates(self.network, self.calibration)
        others = [c for c in candidates if c.realization != "fit"]
        for i in range(0, len(others), AT_ONCE):
            for c in take(others[i : i + AT_ONCE]):
                yield c.key, self.value(c, *self.composed(c, surrogates), parts, scale)
        groups = fit_groups(self.network, [c for c in candidates if c.realization == "fit"])
        for chunk in self.chunks(groups):
            jobs = self.jobs(chunk, take)
            results: Iterable[tuple[FitGroup, dict[str, FittedOp]]]
            if self.executor is None:
                results = ((job[0], _fit_job(job)) for job in jobs)
            else:
                listed = list(jobs)
                results = zip((job[0] for job in listed), self.executor.map(_fit_job, listed), strict=True)
            for group, ops in results:
                for c in group.candidates:
                    sides = ops[c.key].side_convs(group.sides, parts[0].output)
                    yield c.key, self.value(c, ops[c.key], sides, parts, scale)

    def jobs(
        self, chunk: list[FitGroup], take: Callable[[Sequence[Candidate]], list[Candidate]]
    ) -> Iterator[tuple[FitGroup, Tensor, dict[str, Tensor]]]:
        """The fits of groups of which `take` gives something; the network runs once for all of them."""
        wanted = {n for g in chunk for n in g.names}
        held: dict[str, Tensor] = {}
        for whole in chunk:
            if mine := take(whole.candidates):
                group = replace(whole, candidates=tuple(mine))
                held = held or record_batches(self.gm, self.calibration, wanted)
                yield group, held[group.entry], {n: held[n] for n in group.names}

    def chunks(self, groups: list[FitGroup]) -> Iterator[list[FitGroup]]:
        """Groups whose values together fit in memory, so that the network runs as seldom as possible."""
        chunk: list[FitGroup] = []
        held: set[str] = set()
        for group in groups:
            more = group.names
            if chunk and self.bytes(held | more) > HELD_BYTES:
                yield chunk
                chunk, held = [], set()
            chunk.append(group)
            held |= more
        if chunk:
            yield chunk

    def bytes(self, names: set[str]) -> int:
        batch = {n: self.network.shape(n) for n in names}
        return sum(len(self.calibration) * 4 * int(torch.Size(s[1:]).numel()) for s in batch.values())

    def composed(
        self, c: Candidate, surrogates: dict[str, tuple[Tensor, Tensor]] | None
    ) -> tuple[LinearOp | None, dict[str, nn.Module]]:
        """The merged conv of a candidate, None for the identity, and the convs of its vectors from the side."""
        if c.realization == "drop":
            return None, {}
        module = build_span(self.network, c, surrogates)
        assert isinstance(module, LinearSpan)
        with torch.no_grad():
            return module.linear_op(), dict(zip(module.sides, module.side_convs(), strict=True))

    # --- from a local error to the divergence of the output -----------------------------------------------------------

    def parts(self, names: set[str]) -> tuple[list[_Part], float]:
        """Values and gradients of the nodes on the scoring images, and the outputs' variance."""
        found, outputs = [], []
        generator = torch.Generator().manual_seed(0)
        for batch in batches_for(self.gm, self.judged, self.options.images, self.options.images):
            part = self.exact_part(batch) if self.options.exact else self.part(batch, names, generator)
            if self.options.norms == "batch" and len(part.output) < 2:
                raise InputError("norms='batch' needs statistics of two images and more: pass more calibration images")
            found.append(part)
            outputs.append(part.output)
        return found, _scale(torch.cat(outputs))

    def exact_part(self, batch: tuple[Tensor, ...]) -> _Part:
        with torch.no_grad():
            every = {n.name for n in self.gm.graph.nodes}
            values, output = record(self.gm, batch, every, self.calibration.names)
            return _Part(values, {}, flat_output(output, len(batch[0])))

    def part(self, batch: tuple[Tensor, ...], names: set[str], generator: torch.Generator) -> _Part:
        inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in batch)
        with torch.enable_grad():
            values, output = record(self.gm, inputs, names, self.calibration.names, differentiable=True)
            z = flat_output(output, len(batch[0]))
            ordered = list(values)
            gradients: dict[str, list[Tensor]] = {n: [] for n in ordered}
            for probe in range(self.options.probes):
                v = torch.randint(0, 2, z.shape, generator=generator).to(z.device, z.dtype) * 2 - 1
                found = torch.autograd.grad(
                    z, [values[n] for n in ordered], v, retain_graph=probe + 1 < self.options.probes, allow_unused=True
                )
                for name, g in zip(ordered, found, strict=True):
                    gradients[name].append(torch.zeros_like(values[name]) if g is None else g)
        return _Part({n: v.detach() for n, v in values.items()}, gradients, z.detach())

    def value(
        self, c: Candidate, op: LinearOp | None, sides: dict[str, nn.Module], parts: list[_Part], scale: float
    ) -> float:
        total, images = 0.0, 0
        norm = None
        if c.post_norm is not None and c.conv is not None:
            norm = moved_norm(self.network.module(c.post_norm), c.conv.out_channels)
        for part in parts:
            x, y = part.values[c.span.entry], part.values[c.span.output]
            with torch.no_grad():
                # Contiguous as a conv's output is: what follows may be a view.
                new = x if op is None else _apply(op, x, c).contiguous()
                for name, conv in sides.items():
                    new = new + conv(part.values[name])
                new = new if norm is None else norm(new)
                if self.options.exact:
                    total += self.squared_change(c, new, part)
                else:
                    changes = [((new - y) * g).flatten(1).double().sum(1) for g in part.gradients[c.span.output]]
                    total += sum(float(d.square().sum()) for d in changes) / self.options.probes
            images += len(x)
        return -0.5 * total / images / scale

    def squared_change(self, c: Candidate, new: Tensor, part: _Part) -> float:
        """The squared change of the output, over all images, when the span's output is `new`."""
        nodes = self.network.nodes
        behind = _descendants(nodes[c.span.output])
        known: dict[fx.Node, Any] = {
            nodes[n]: v for n, v in part.values.items() if nodes[n] not in behind and nodes[n].op != "output"
        }
        known[nodes[c.span.output]] = new
        wanted = part.output
        with batch_statistics(self.gm) if self.options.norms == "batch" else contextlib.nullcontext():
            output = flat_output(resume(self.gm, known), len(new))
            if self.options.norms == "batch":  # the original from here on, with its new statistics
                if c.span.output not in part.renewed:
                    same = known | {nodes[c.span.output]: part.values[c.span.output]}
                    part.renewed[c.span.output] = flat_output(resume(self.gm, same), len(new))
                wanted = part.renewed[c.span.output]
        return float((output - wanted).double().square().sum())


@contextlib.contextmanager
def batch_statistics(gm: nn.Module) -> Iterator[None]:
    """Batch norms in eval mode use the statistics of their batch within, and have their own again afterwards."""
    held = [(m, m.running_mean, m.running_var) for m in gm.modules() if isinstance(m, _BatchNorm)]
    try:
        for module, _, _ in held:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, mean, variance in held:
            module.running_mean, module.running_var = mean, variance


def _fit_job(job: tuple[FitGroup, Tensor, dict[str, Tensor]]) -> dict[str, FittedOp]:
    group, x, ys = job
    return group.fit(x, ys, quick=True)


def _apply(op: LinearOp, x: Tensor, c: Candidate) -> Tensor:
    assert c.conv is not None
    none = ((0, 0),) * op.ndim
    weight, bias = op.weight.to(x.device, x.dtype), op.bias.to(x.device, x.dtype)
    return LinearOp(weight, bias, op.stride, none, op.dilation, op.groups)(fill_pad(x, c.conv))


def _scale(z: Tensor) -> float:
    """The mean squared distance of the outputs from their mean; of a single image, its mean square."""
    centred = z - z.mean(0, keepdim=True) if len(z) > 1 else z
    value = float(centred.double().square().sum(1).mean())
    if value <= 1e-12 * float(z.double().square().sum(1).mean()):
        value = float(z.double().square().sum(1).mean())
    return value or 1.0


def _descendants(node: fx.Node) -> set[fx.Node]:
    found, queue = set(), [node]
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found
