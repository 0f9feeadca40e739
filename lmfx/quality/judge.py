"""Judges networks by what a traced one gives on the same images. Its outputs are computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.calibration.images import Calibration, as_calibration
from lmfx.calibration.recording import batches_for, floating_outputs, output_rows, record
from lmfx.environment.caller_state import entry
from lmfx.passes.errors import InputError
from lmfx.passes.model.trace_facts import noted
from lmfx.quality.measures import OutputQuality, Quality, QualityName, measure_output
from lmfx.quality.outputs import outputs_of

__all__ = ["Choosing", "Judge", "compare"]


class Judge:
    """Gives the `Quality` of networks with the inputs and outputs of the traced graph `gm`, on some images."""

    def __init__(self, gm: fx.GraphModule, images: Calibration, held_out: bool = True) -> None:
        self.gm, self.images, self.held_out = gm, images, held_out
        self.batches = list(batches_for(gm, images))
        self.rows = output_rows(gm, images)
        self.reference = self.outputs(gm)
        self.kinds = outputs_of(gm, self.reference, self.rows)

    def __call__(self, net: nn.Module) -> Quality:
        """The quality of a graph of the same model (a student, or its merged form) in eval mode."""
        return self.of(self.outputs(net))

    def of(self, outputs: list[Tensor]) -> Quality:
        """The quality of outputs that a network gave on the judge's images, as `outputs` lists them."""
        found: list[OutputQuality] = []
        for kind, reference, other in zip(self.kinds, self.reference, outputs, strict=True):
            if kind.rows is not None:
                if reference.shape != other.shape:
                    raise InputError(
                        f"output {kind.name} has the shape {tuple(other.shape)} where the original's has "
                        f"{tuple(reference.shape)}: compare networks of the same outputs"
                    )
                found.append(measure_output(kind, reference, other))
        return Quality(tuple(found), sum(len(b[0]) for b in self.batches), self.held_out)

    @torch.no_grad()
    def outputs(self, net: nn.Module) -> list[Tensor]:
        """Every floating tensor of the output, of all images; one without an image dimension, of the first batch."""
        return self.joined([floating_outputs(self.run(net, batch)) for batch in self.batches])

    @torch.no_grad()
    def outputs_of(self, net: nn.Module, images: Calibration) -> list[Tensor]:
        """The same on other images of the same number, such as the judge's own at another size."""
        return self.joined([floating_outputs(self.run(net, batch)) for batch in batches_for(net, images)])  # type: ignore[arg-type]

    def joined(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """The tensors of all batches from those of each."""
        return [
            parts[0][i] if dim is None else torch.cat([p[i] for p in parts], dim) for i, dim in enumerate(self.rows)
        ]

    def run(self, net: nn.Module, batch: tuple[Tensor, ...]) -> Any:
        """The output of one batch."""
        assert isinstance(net, fx.GraphModule)
        return record(net, batch, (), self.images.names)[1]


class Choosing:
    """A judge as those who change a network see it: its images, and one loss of what a graph gives on them."""

    def __init__(self, judge: Judge, name: QualityName = "auto") -> None:
        self.judge, self.name, self.images = judge, name, judge.images

    def loss(self, outputs: list[Any]) -> float:
        """The loss of the outputs of all images, in batches of any size; lower is better."""
        return self.judge.of(self.judge.joined([floating_outputs(o) for o in outputs])).loss(self.name)


@entry
def compare(net: fx.GraphModule, graph: fx.GraphModule, images: Any) -> Quality:
    """What `net` (from `compress`, `rewrite`, `merge` or `load`) keeps of `graph`, its model as `lmfx.trace` gives it.

    `images` are unlabelled inputs, a tensor or a loader, as for `calibration=`; those that calibration never saw say
    the truth. Raises `InputError` for images that do not fit, or networks of other outputs.
    """
    for name, given in (("net", net), ("graph", graph)):
        if not isinstance(given, fx.GraphModule):
            raise InputError(f"compare takes graphs of lmfx; {name} is a {type(given).__name__}: use lmfx.trace first")
    example = noted(graph).example
    if example is None:
        raise InputError("compare takes the original as lmfx.trace(model, example_input) gives it")
    return Judge(graph, as_calibration(images, example))(net)
