"""Compresses for several input sizes, and takes the one of best quality: a smaller input is a way to be faster too.

    own size     plan within the budget b
    smaller      the original alone takes r of its latency:  plan within b / r,  nothing but loss-free merges if r <= b;
                 its last layers fitted to what they read at the own size (`quality.last_layer_fit`);
                 measured beside the original at its own size, and made anew within less where it is over the budget

Quality is that of the original at its own size, on the same images scaled. So a network whose output does not depend on
the input size can be had at any of them; others are refused. A plan for a size loses no less than that size alone, so
sizes that lose more than what was found are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from torch import Tensor, fx, nn

from lmfx.budget import Budget
from lmfx.calibration.images import as_calibration
from lmfx.calibration.model_checks import span_options
from lmfx.latency import LatencyTable
from lmfx.latency.chosen_backend import chosen_backend, precision_of
from lmfx.latency.whole_times import time_wholes
from lmfx.made_of import made_of, set_made_of
from lmfx.passes.errors import InfeasibleBudget, InputError, LmfxError, OptionError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.model.model_copy import deep_copy
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.globs import Globs
from lmfx.passes.trace.tracing import example_arguments
from lmfx.planning.compression import Compression
from lmfx.planning.scaled_images import Scaling, Size, scaled, scaled_example, size_of, usual_sizes
from lmfx.planning.search import ACCEPT, measure_pair
from lmfx.quality import Judge, QualityName
from lmfx.quality.last_layer_fit import fit_last_layers
from lmfx.result import Alternative, result_of
from lmfx.stages import default_backend, merge, trace
from lmfx.training.recovery import recover

__all__ = ["SizeSearch", "parse_sizes"]

TRIES = 3  # networks at one size, where they measure over the budget


def parse_sizes(sizes: Sequence[int | Sequence[int]] | Literal["auto"]) -> tuple[Size, ...] | Literal["auto"]:
    """(height, width) of each size, of a number both; "auto" as it is. Raises `OptionError` for anything else."""
    if isinstance(sizes, str):
        if sizes == "auto":
            return sizes
        raise OptionError(f"input_sizes={sizes!r}: write heights, like (224, 192), or 'auto'")
    found = []
    for size in sizes:
        pair = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (tuple, list)) else []
        if len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
            raise OptionError(f"input_sizes={sizes!r}: write heights, or pairs of height and width, like (224, 192)")
        found.append((pair[0], pair[1]))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class _Made:
    net: fx.GraphModule
    ratio: float  # of the original's latency at its own size
    size: Size
    loss: float


class SizeSearch:
    """Compresses one model for images of several sizes; `best` gives the network of best quality.

    Raises `InputError` for a network that does not take images of a size that was asked for, or gives another output
    there.
    """

    def __init__(
        self,
        asked: Compression,
        model: nn.Module,
        example_input: Any,
        budget: Budget,
        sizes: Sequence[Size] | Literal["auto"],
        calibration: Any,
        name: QualityName,
    ) -> None:
        self.asked, self.model, self.budget, self.name = replace(asked, beside=False), model, budget, name
        self.images = as_calibration(calibration, example_input)
        self.whole = trace(model, example_input)
        self.own = size_of(self.images)
        roles = self.images.roles()
        self.fit = roles.fit
        self.choose, self.judge = (Judge(self.whole, i, held_out=not roles.seen) for i in (roles.choose, roles.judge))
        assert not isinstance(asked.latency, LatencyTable)
        backend = chosen_backend(asked.latency, default_backend(self.whole), asked.precision)
        assert not isinstance(backend, LatencyTable)
        self.backend = backend
        options = span_options(**asked.options)
        globs = Globs(self.whole, options.include, options.exclude)
        self.free = lambda node: not globs.leaves(node)
        self.examples, self.graphs = {self.own: example_input}, {self.own: self.whole}
        for size in usual_sizes(self.whole, self.own) if sizes == "auto" else sizes:
            if size not in self.graphs:
                example = scaled_example(example_input, self.own, size)
                try:
                    self.graphs[size] = _graph(model, example, self.choose, size)
                except InputError:
                    if sizes != "auto":
                        raise
                    continue
                self.examples[size] = example
        self.networks = [bare(g, example_arguments(self.examples[s])) for s, g in self.graphs.items()]
        times = [median(t) for t in time_wholes(self.backend, self.networks)]
        self.original = times[0]
        self.parts = {size: t / times[0] for size, t in zip(self.graphs, times, strict=True)}
        self.share = budget.resolve(self.original) / self.original
        self.alternatives: list[Alternative] = []

    def best(self) -> fx.GraphModule:
        """The network of best quality, its result that of a network beside the original at its own size."""
        alone = {size: self.alone(size) for size in self.graphs if size != self.own} | {self.own: 0.0}
        fast = [size for size in alone if size != self.own and self.parts[size] <= self.share]
        order = sorted((size for size in alone if size not in fast), key=lambda size: self.parts[size])
        best: _Made | None = None
        refused: InfeasibleBudget | None = None
        # From the smallest on: less is asked of plans there. It ends where another size only makes it worse.
        for size in (*sorted(fast, key=lambda size: alone[size])[:1], *order):
            if best is not None and alone[size] >= best.loss:
                continue
            try:
                made = self.made(size)
            except InfeasibleBudget as error:
                refused = refused or error  # of the smallest size, which comes nearest
                continue
            if best is not None and made.loss >= best.loss:
                break
            best = made
        if best is None:
            assert refused is not None
            raise refused
        return self.finished(best)

    def alone(self, size: Size) -> float:
        """What the original loses on images of another size, its last layers fitted to them."""
        net = deep_copy(self.graphs[size])
        if self.parts[size] <= self.share:
            quality = self.judge.of(_outputs(net, self.judge, size))
            self.alternatives.append(Alternative(f"input {size[0]} x {size[1]} alone", self.parts[size], quality))
        self.fitted(net, size)
        return self.choose.of(_outputs(net, self.choose, size)).loss(self.name)

    def fitted(self, net: fx.GraphModule, size: Size) -> None:
        """Fit the last layers of a network for images of another size."""
        small = scaled(self.fit, size)
        fit_last_layers(
            net, self.whole, small, self.fit, self.choose, lambda n: _outputs(n, self.choose, size), self.free
        )

    def made(self, size: Size) -> _Made:
        """What is asked for, for images of one size. Raises `InfeasibleBudget`."""
        example = self.examples[size]
        # Only the best one is trained, and what is trained is the form that is not merged.
        ahead = replace(self.asked, merge=False, recover=None) if self.recovers else self.asked
        if size == self.own:
            net = ahead.run(self.model, example, Budget("fraction", min(self.share, 1.0)), None, self.images)
            inner = result_of(net).ratio
            return self.judged(net, 1.0 if inner is None else inner, size)
        # Two measured ratios are off by more than one: the network itself beside the original at its own size.
        target, small = min(self.share / self.parts[size], 1.0), scaled(self.images, size)
        for _ in range(TRIES):
            net = ahead.run(self.model, example, Budget("fraction", target), None, small)
            smaller = bare(net if ahead.merge else merge(net), example_arguments(example))
            ratio = measure_pair(self.backend, self.networks[0], smaller, self.original)
            if ratio <= self.share:
                break
            target *= ACCEPT * self.share / ratio
        else:
            raise InfeasibleBudget(
                f"for images of {size[0]} x {size[1]} no network within {self.share:.1%} of the original's latency was "
                f"found: the last one measured {ratio:.1%}. Leave that size out, or ask for less",
                ratio * self.original,
                self.original,
            )
        if result_of(net).int8 is None:  # its 8-bit form is made of these weights
            self.fitted(net, size)
        return self.judged(net, ratio, size)

    def judged(self, net: fx.GraphModule, ratio: float, size: Size) -> _Made:
        """What was made, judged by the original at its own size."""
        quality = self.judge.of(_outputs(net, self.judge, size))
        self.alternatives.append(Alternative(f"compressed for {size[0]} x {size[1]}", ratio, quality))
        return _Made(net, ratio, size, self.choose.of(_outputs(net, self.choose, size)).loss(self.name))

    @property
    def recovers(self) -> bool:
        """Whether the best network is trained to give what the original gives at its own size."""
        named = bool(noted(self.whole).inputs["keyword"])
        return self.asked.recover is not None and precision_of(self.backend) != "int8" and not named

    def recovered(self, best: _Made) -> fx.GraphModule:
        """The network after a training whose teacher sees the images at their own size; in the form that was asked."""
        told, student, example = made_of(best.net), best.net, self.examples[self.own]
        assert self.asked.recover is not None and told is not None and told.result is not None
        if best.size != self.own:
            scaling = Scaling(best.net, example_arguments(example)[0], self.own, best.size)
            student = trace(scaling.eval(), example)
        recover(student, self.whole, self.images, minutes=self.asked.recover, progress=self.asked.progress)
        if student is not best.net:
            best.net.load_state_dict({k.removeprefix("net."): v for k, v in student.state_dict().items()})
        net = merge(best.net.eval()) if self.asked.merge else best.net.eval()
        net.meta["lmfx_recovery"] = student.meta["lmfx_recovery"]
        set_made_of(net, replace(told, result=replace(told.result, merged=self.asked.merge)))
        return net

    def finished(self, best: _Made) -> fx.GraphModule:
        """Attach the result."""
        if self.recovers:
            best = replace(best, net=self.recovered(best))
        told = made_of(best.net)
        assert told is not None
        result = replace(
            result_of(best.net),
            budget=self.budget,
            ratio=best.ratio,
            original=self.original,
            measured=best.ratio * self.original,
            quality=self.judge.of(_outputs(best.net, self.judge, best.size)),
            input_size=best.size,
            alternatives=tuple(self.alternatives),
        )
        set_made_of(best.net, replace(told, result=result))
        return best.net


def _graph(model: nn.Module, example: Any, judge: Judge, size: Size) -> fx.GraphModule:
    try:
        graph = trace(model, example)
        outputs = _outputs(graph, judge, size)
        judge.of(outputs)
    except LmfxError as error:
        raise InputError(
            f"input_sizes={size}: the network does not give the same outputs for images of that size ({error}); leave "
            "that size out"
        ) from error
    return graph


def _outputs(net: fx.GraphModule, judge: Judge, size: Size) -> list[Tensor]:
    """What a network for images of `size` gives for the judge's images."""
    own = judge.images
    return judge.outputs(net) if size_of(own) == size else judge.outputs_of(net, scaled(own, size))
