"""Merged against trainable form on torchvision's classifiers, in float64, under random plans.

For each model with randomised BatchNorm statistics: the empty plan must give the original's output to 1e-14, and
`--plans` random plans must give merged networks within 1e-12 of their trainable forms with the original's output shape,
traced at each of `--sizes`; what was traced at the first size is run at the others too. The model must stay as it was.

    python benchmarks/promises/exactness.py --plans 20
    python benchmarks/promises/exactness.py --models resnet18 mobilenet_v2 --sizes 75 --plans 3
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.shared.random_plans import random_plan, randomise_norms
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace

__all__ = ["MODELS", "Outcome", "check_model"]

MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v2",
    "vgg16_bn",
    "regnet_x_400mf",
    "densenet121",
    "mnasnet1_0",
    "resnext50_32x4d",
    "squeezenet1_1",
    "googlenet",
)
KEEP_TOLERANCE, TOLERANCE = 1e-14, 1e-12


@dataclass
class Outcome:
    """What came of one model traced at one size."""

    model: str
    size: int
    plans: int = 0
    spans: int = 0  # merged convs in all plans
    candidates: int = 0
    keep_error: float = 0.0
    worst: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems and self.keep_error <= KEEP_TOLERANCE and self.worst <= TOLERANCE


def build(name: str) -> nn.Module:
    """A torchvision classifier with random weights and norms of a trained network's size, in float64."""
    import torchvision

    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    return randomise_norms(torchvision.models.get_model(name, **options)).double().eval()


@torch.no_grad()
def check_model(
    name: str, size: int, others: Sequence[int] = (), plans: int = 20, options: SpanOptions | None = None
) -> Outcome:
    """Trace one model at `size` and try `plans` random plans, which are also run at the `others`."""
    outcome = Outcome(name, size)
    begin = time.perf_counter()
    model = build(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = {s: torch.randn(1, 3, s, s, dtype=torch.float64) for s in (size, *others)}
    expected = {s: model(x) for s, x in inputs.items()}
    graph = trace(model, inputs[size])
    spans = enumerate_spans(Network(graph), options)
    outcome.candidates = len(spans)
    kept = merge(rewrite(graph, MergePlan()))
    outcome.keep_error = max(relative_error(expected[s], kept(x)) for s, x in inputs.items())
    for seed in range(plans):
        gc.collect()  # graphs hold themselves in cycles; a large network's copies would pile up
        try:
            _check_plan(spans_plan := random_plan(spans, random.Random(seed)), graph, inputs, expected, outcome)
            outcome.spans += sum(c.realization != "drop" for c in spans_plan.candidates)
            outcome.plans += 1
        except Exception as error:  # the table shows every failure
            outcome.problems.append(f"plan {seed}: {type(error).__name__}: {str(error).splitlines()[0]}")
    after = model.state_dict()
    if any(not torch.equal(value, after[key]) for key, value in state.items()):
        outcome.problems.append("the model was changed")
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _check_plan(
    plan: MergePlan, graph: torch.fx.GraphModule, inputs: dict[int, Tensor], expected: dict[int, Tensor], out: Outcome
) -> None:
    trainable = rewrite(graph, plan, share_tensors=True)
    merged = merge(trainable, share_tensors=True)
    for size, x in inputs.items():
        result = merged(x)
        if result.shape != expected[size].shape:
            raise ValueError(f"the output has shape {tuple(result.shape)} at {size}")
        out.worst = max(out.worst, relative_error(trainable(x), result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision names")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 201], help="input sizes to trace at")
    parser.add_argument("--plans", type=int, default=20, help="random plans a model and size")
    options = parser.parse_args()
    print(f"{'model':18} {'size':>5} {'plans':>5} {'spans':>6} {'candidates':>10} {'keep':>9} {'worst':>9} {'s':>6}")
    failed = False
    for name in options.models:
        for i, size in enumerate(options.sizes):
            outcome = check_model(name, size, options.sizes[1:] if i == 0 else (), options.plans)
            print(
                f"{name:18} {size:5} {outcome.plans:5} {outcome.spans:6} {outcome.candidates:10} "
                f"{outcome.keep_error:9.1e} {outcome.worst:9.1e} {outcome.seconds:6.0f}"
                f"{'' if outcome.passed else '  FAILED'}",
                flush=True,
            )
            for problem in outcome.problems:
                print(f"  {problem}", flush=True)
            failed |= not outcome.passed
    sys.exit(failed)


if __name__ == "__main__":
    main()
