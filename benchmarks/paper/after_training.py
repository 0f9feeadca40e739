"""Merging after training is exact: the trainable form is trained, then compared with what it merges to, in float64.

A random plan makes the trainable form of a network, with affine surrogates from random images. It is trained for 50
steps of Adam on random data, in train mode (BatchNorm statistics move), until every parameter has changed. Then both
forms run in eval mode on other inputs. `--size` takes the place of the small inputs that make it quick.

    python benchmarks/paper/after_training.py [--steps 50] [--plans 3] [--size 97] [--networks resnet34 ...]
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import lmfx
from benchmarks.shared.random_plans import random_plan, randomise_norms
from benchmarks.zoo.denoising import DenoisingNet
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.interface import plain_output
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network

__all__ = ["NETWORKS", "Outcome", "check", "train"]

TOLERANCE = 1e-12
BATCH = 4


@dataclass(frozen=True)
class Outcome:
    """One plan. `unchanged` are parameters and statistics that training has not moved."""

    spans: int
    norms: int  # that have moved to after a merged conv
    unchanged: tuple[str, ...]
    error: float
    moved: float  # relative distance of the trained form's output from the untrained one's

    @property
    def passed(self) -> bool:
        return not self.unchanged and self.error <= TOLERANCE


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return randomise_norms(torchvision.models.get_model(name))

    return make


def _image(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def _noisy(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return _image(batch, size), torch.randint(0, 1000, (batch,))


# A network, its inputs, what becomes of its GroupNorms. The denoising network has fewer channels, to take seconds.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any], int, Any]] = {
    "resnet34": (_torchvision("resnet34"), _image, 33, "affine"),
    "resnet50": (_torchvision("resnet50"), _image, 33, "affine"),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), _image, 33, "affine"),
    "denoiser, post": (lambda: DenoisingNet(64, (1, 2)), _noisy, 16, "post"),
    "denoiser, affine": (lambda: DenoisingNet(64, (1, 2)), _noisy, 16, "affine"),
}


def train(net: nn.Module, draw: Callable[[int, int], Any], size: int, steps: int) -> None:
    """`steps` of Adam in train mode towards random targets, in place."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net.train()
    for _ in range(steps):
        output = _outputs(net, draw(BATCH, size))
        loss = sum((v - torch.randn_like(v)).square().mean() for v in output)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    net.eval()


def _outputs(net: nn.Module, inputs: Any) -> list[Tensor]:
    output = net(*inputs) if isinstance(inputs, tuple) else net(inputs)
    return [v for v in pytree.tree_leaves(plain_output(output)) if isinstance(v, Tensor)]


def check(
    model: nn.Module, draw: Callable[[int, int], Any], size: int, norm: Any, steps: int, seed: int = 0
) -> Outcome:
    """Trains the trainable form of a random plan of `model` and compares it with what it merges to."""
    torch.manual_seed(seed)
    graph = lmfx.trace(model.double().eval(), draw(BATCH, size))
    options = SpanOptions(realize=("compose",), norm=norm)
    spans = enumerate_spans(Network(graph), options)
    plan = random_plan(spans, random.Random(seed), ("compose",))
    student: fx.GraphModule = lmfx.rewrite(graph, plan, calibration=draw(BATCH, size))
    before = {name: value.detach().clone() for name, value in student.state_dict().items()}
    free = noted(graph).tracer == "symbolic"  # else it is specialised to the example's batch and size
    others = [draw(BATCH, size), draw(1, size + 7) if free else draw(BATCH, size)]
    with torch.no_grad():
        untrained = _outputs(student, others[0])
    train(student, draw, size, steps)
    merged = lmfx.merge(student)
    with torch.no_grad():
        error = max(relative_error(_outputs(student, x), _outputs(merged, x)) for x in others)
        moved = relative_error(untrained, _outputs(student, others[0]))
    # Constants of the graph need no gradient and stay.
    learned = {n for n, p in student.named_parameters() if p.requires_grad} | {n for n in before if "running_" in n}
    after = student.state_dict()
    unchanged = tuple(n for n in sorted(learned) if torch.equal(before[n], after[n]))
    count = sum(isinstance(m, LinearSpan) for m in student.modules())
    return Outcome(count, sum(c.post_norm is not None for c in plan.candidates), unchanged, error, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plans", type=int, default=3)
    parser.add_argument("--size", type=int, help="of the inputs (default: each network's own)")
    options = parser.parse_args()
    failed = False
    print(f"{'network':18} {'size':>4} {'plan':>4} {'spans':>6} {'norms':>6} {'moved':>9} {'error':>9} {'seconds':>8}")
    for name in options.networks:
        make, draw, size, norm = NETWORKS[name]
        size = options.size or size
        for seed in range(options.plans):
            begin = time.perf_counter()
            torch.manual_seed(0)
            o = check(make(), draw, size, norm, options.steps, seed)
            seconds = time.perf_counter() - begin
            print(
                f"{name:18} {size:4} {seed:4} {o.spans:6} {o.norms:6} {o.moved:9.2g} {o.error:9.2g} {seconds:8.1f}",
                flush=True,
            )
            for parameter in o.unchanged:
                print(f"  unchanged: {parameter}")
            failed |= not o.passed
            gc.collect()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
