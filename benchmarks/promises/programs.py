"""One network of each family as an exported program, in and out: are they the same, with what is free, at which sizes?

    model ── torch.export ── program ── lmfx.trace        the candidates of the model?  (also of its core ops)
                                  └──── lmfx.simplify ── lmfx.export_program ── run beside the model at three sizes

    PYTHONPATH=. python benchmarks/promises/programs.py [--models 'timm/*'] [--table benchmarks/results/programs.csv]

Everything is in float64, so that what differs is not rounding. Rows that are there are not made again.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lmfx
from benchmarks.shared.filled_table import fill_table
from benchmarks.zoo.models import build, examples
from lmfx.export.free_sizes import free_sizes
from lmfx.passes.errors import ExportError, LmfxError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.interface import plain_output
from lmfx.passes.trace.tracing import example_arguments

TABLE = Path(__file__).parents[1] / "results" / "programs.csv"
SIZES = (64, 96, 128, 224, 256)
SECONDS = 900  # for one network
EXPORT_SECONDS = 60  # for one export of a model: five nested pads of a free size took torch minutes
# model -> the family that it stands for
NETWORKS = {
    "timm/test_resnet": "resnet",
    "timm/test_efficientnet": "efficientnet",
    "timm/test_convnext": "convnext",
    "timm/regnetx_002": "regnet x",
    "timm/regnety_002": "regnet y",
    "timm/mobilenetv2_050": "mobilenet v2",
    "timm/mobilenetv3_small_050": "mobilenet v3",
    "timm/mobilenetv4_conv_small": "mobilenet v4",
    "timm/lcnet_050": "lcnet",
    "timm/tinynet_e": "tinynet",
    "timm/ghostnet_050": "ghostnet",
    "timm/repvgg_a0": "repvgg",
    "timm/ese_vovnet19b_slim": "vovnet",
    "timm/dla46x_c": "dla",
    "timm/cs3darknet_focus_s": "darknet",
    "timm/nf_regnet_b0": "nfnet",
    "timm/tf_efficientnet_lite0": "efficientnet-lite",
    "timm/mobilevit_xxs": "mobilevit",
    "timm/starnet_s1": "starnet",
    "tv/mnasnet0_5": "mnasnet",
    "tv/shufflenet_v2_x0_5": "shufflenet",
    "tv/squeezenet1_1": "squeezenet",
    "tv/ssdlite320_mobilenet_v3_large.backbone": "detector's backbone",
    "diffusers/unet2d-tiny-noattn": "denoiser",
    "diffusers/autoencoderkl-tiny": "autoencoder",
    "timm/densenet121": "densenet",
    "tv/googlenet": "inception",
}
FIELDS = (
    *("model", "family", "input", "free", "candidates", "of_program", "of_core_ops", "convs", "convs_after"),
    *("error_in", "sizes", "errors", "seconds", "note"),
)


class OutOfTime(BaseException):
    """One network, or one export, took too long. No `Exception`, which torch and lmfx would take for the network's."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the body after so much CPU time; what is left of a limit around it goes on after it."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:g} s of CPU time")

    before, begun = signal.signal(signal.SIGPROF, stop), time.process_time()
    left = signal.setitimer(signal.ITIMER_PROF, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        if left:
            signal.setitimer(signal.ITIMER_PROF, max(0.01, left - (time.process_time() - begun)))


def outputs(net: Any, example: Any) -> list[Tensor]:
    """The tensors that a network gives for an example."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    with torch.no_grad():
        return [v for v in pytree.tree_leaves(plain_output(net(*args, **kwargs))) if isinstance(v, Tensor)]


def error(net: Any, model: Any, example: Any) -> float:
    """The largest relative error of a network's outputs."""
    pairs = zip(outputs(model, example), outputs(net, example), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def seen(net: Any, model: Any, example: Any) -> str:
    """The error, or that a guard of the program refuses the size."""
    try:
        return f"{error(net, model, example):.0e}"
    except AssertionError:
        return "refused"


def convs(net: nn.Module) -> int:
    """How many convolutions a network has."""
    return sum(isinstance(m, nn.modules.conv._ConvNd) for m in net.modules())


def row_of(name: str) -> dict[str, Any]:
    """What became of one network."""
    begun = time.process_time()
    model = build(name).double()
    row: dict[str, Any] = {}
    x, program, options, notes = exported(name, model)
    example = example_arguments(x)
    row["input"] = "; ".join("x".join(map(str, v.shape)) for v in pytree.tree_leaves(x) if isinstance(v, Tensor))
    graph = lmfx.trace(model, x)
    row["candidates"] = len(lmfx.spans(graph))
    row["free"] = "batch, size" if len(options) == 2 else "batch" if options else "nothing"
    read = lmfx.trace(program, x)
    row["of_program"] = len(lmfx.spans(read))
    row["of_core_ops"] = len(lmfx.spans(lmfx.trace(program.run_decompositions(), x)))
    row["error_in"] = f"{error(read, model, example):.0e}"
    net = lmfx.simplify(program, x)
    row["convs"], row["convs_after"] = convs(graph), convs(net)
    out = lmfx.export_program(net, x, **options).module()
    free = free_sizes(model, example, bool(options), "dynamic_shapes" in options)
    tried = [("example", example), *(free.trials if free else ())]
    row["sizes"] = " ".join("x".join(map(str, first(e).shape)) for _, e in tried)
    row["errors"] = " ".join(seen(out, model, e) for _, e in tried)
    row["note"] = notes
    row["seconds"] = f"{time.process_time() - begun:.1f}"
    return row


def exported(name: str, model: nn.Module) -> tuple[Any, torch.export.ExportedProgram, dict[str, bool], str]:
    """The smallest example that a network and its program take, the program, what is free of it, and why not more."""
    for x in map(in_double, examples(name, model, sizes=SIZES)):
        if runs(model, x):
            program, options, notes = program_of(model, x)
            if runs(program.module(), x):  # guards exclude maps of one pixel
                return x, program, options, notes
    raise ExportError(f"the programs of {name} take none of the examples")


def program_of(model: nn.Module, x: Any) -> tuple[torch.export.ExportedProgram, dict[str, bool], str]:
    """The model's program with as much free as torch.export allows, what that is, and why not more."""
    notes = ""
    for options in ({"dynamic_batch": True, "dynamic_shapes": True}, {"dynamic_batch": True}, {}):
        try:
            with within(EXPORT_SECONDS):
                return lmfx.export_program(model, x, **options), options, notes
        except (ExportError, OutOfTime) as problem:
            notes = notes or str(problem)[:200]
    raise ExportError(notes)


def first(example: Any) -> Tensor:
    """The first tensor of an example."""
    return next(v for v in pytree.tree_leaves(example) if isinstance(v, Tensor))


def in_double(example: Any) -> Any:
    """The example in float64."""
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)


def runs(model: nn.Module, example: Any) -> bool:
    """Whether a network takes an example."""
    try:
        outputs(model, example_arguments(example))
    except Exception:  # another size is tried
        return False
    return True


def main() -> None:
    """All networks that have no row yet."""
    fill_table(__doc__, TABLE, FIELDS, NETWORKS, within(SECONDS)(row_of), (LmfxError, OutOfTime))


if __name__ == "__main__":
    main()
