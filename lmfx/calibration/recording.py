"""Records values and gradients inside a traced graph: what the estimator and the fit read on calibration images."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lmfx.calibration.images import Calibration, Frame
from lmfx.passes.errors import ModelError
from lmfx.passes.graph.node_facts import attribute_of, shape_of
from lmfx.passes.model.interface import plain_output
from lmfx.passes.model.trace_facts import noted

__all__ = [
    "Replaced",
    "Rows",
    "arguments_of",
    "batches_for",
    "flat_output",
    "floating_outputs",
    "images_at_once",
    "mean_square_distance",
    "output_rows",
    "record",
    "record_batches",
    "resume",
]

BATCH = 32
VALUE_BYTES = 24 << 20  # of the largest value of a batch on a CPU; glibc has no cache for blocks of 32 MiB and more
Function = Callable[[Tensor], Tensor]
Replaced = Mapping[fx.Node, tuple[fx.Node, Function]]  # the node whose value stands for another's, by a function
Rows = tuple[int | None, ...]


def images_at_once(gm: fx.GraphModule, most: int = BATCH) -> int:
    """How many images a traced graph runs on at a time, at most `most`, so that no image takes longer than it need.

    On a CPU a value that is too large for the allocator to keep is mapped and zeroed by the kernel at each op, and is
    out of the caches before it is read: inverted residuals at 224 pixels take 20 ms an image in batches of 4, and
    47 ms in batches of 32. Of a graph whose shapes are not known it is `most`.
    """
    example = next((s for n in gm.graph.nodes if n.op == "placeholder" and (s := shape_of(n))), None)
    if example is None:
        return most
    largest = 0
    for node in gm.graph.nodes:
        shape, device, dtype = shape_of(node), attribute_of(node, "device"), attribute_of(node, "dtype")
        if shape is not None and dtype is not None and node.op != "get_attr":
            if device is not None and device.type != "cpu":
                return most
            largest = max(largest, torch.Size(shape).numel() * dtype.itemsize)
    return max(1, min(most, VALUE_BYTES * example[0] // max(largest, 1)))


def batches_for(
    gm: fx.GraphModule, calibration: Calibration, size: int | None = None, limit: int | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """The calibration inputs in batches that the graph can take: of the example's size where no other is right, else
    of `size` (default: `images_at_once`)."""
    size = images_at_once(gm) if size is None else size
    facts = noted(gm)
    free = facts.any_batch
    if isinstance(calibration.names, Frame):
        if free:
            yield from calibration.batches(size, limit)
            return
        fixed = calibration.names.batch
        whole = None if limit is None else max(limit // fixed, 1) * fixed
        yield from calibration.whole_batches(fixed).batches(fixed, whole)
        return
    specs = [s for s in facts.specs if isinstance(s, dict)]
    if free or not specs or not specs[0]["shape"]:
        yield from calibration.batches(size, limit)
        return
    fixed = int(specs[0]["shape"][0])
    whole = None if limit is None else max(limit // fixed, 1) * fixed
    yield from calibration.whole_batches(fixed).batches(fixed, whole)


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: frozenset[str], differentiable: bool = False) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.differentiable = differentiable
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            # Where nothing before it needs a gradient (integer inputs, frozen weights), the gradient starts here.
            if self.differentiable and value.is_floating_point() and not value.requires_grad:
                value = value.detach().requires_grad_()
            self.values[n.name] = value
        return value


def arguments_of(gm: fx.GraphModule, inputs: tuple[Tensor, ...], names: tuple[str, ...] | Frame = ()) -> list[Any]:
    """The placeholders' values for calibration tensors: positional ones in order, the last ones by name.

    With a frame in place of names, the constants of the example stand beside them.
    """
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if isinstance(names, Frame):
        args, kwargs = names.arguments(inputs)
        known = {**dict(zip([str(n.target).lstrip("*") for n in nodes], args, strict=False)), **kwargs}
        return [known.get(str(n.target).lstrip("*"), n.args[0] if n.args else None) for n in nodes]
    positional = len(inputs) - len(names)
    given: dict[str, Any] = dict(zip(names, inputs[positional:], strict=True))
    values = []
    for i, node in enumerate(nodes):
        name = str(node.target).lstrip("*")
        default = node.args[0] if node.args else None
        values.append(inputs[i] if i < positional else given.get(name, default))
    return values


def record(
    gm: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    wanted: Iterable[str],
    names: tuple[str, ...] | Frame = (),
    differentiable: bool = False,
) -> tuple[dict[str, Tensor], Any]:
    """The values of the nodes `wanted` and the output, for one batch; if `differentiable`, with their graph."""
    recorder = _Recorder(gm, frozenset(wanted), differentiable)
    output = recorder.run(*arguments_of(gm, inputs, names), enable_io_processing=False)
    return recorder.values, output


@torch.no_grad()
def record_batches(
    gm: fx.GraphModule, calibration: Calibration, wanted: Iterable[str], limit: int | None = None
) -> dict[str, Tensor]:
    """The values of the nodes `wanted` on all calibration images, (images, channels, size...)."""
    names = frozenset(wanted)
    parts: dict[str, list[Tensor]] = {n: [] for n in names}
    for batch in batches_for(gm, calibration, limit=limit):
        values, _ = record(gm, batch, names, calibration.names)
        for name, value in values.items():
            parts[name].append(value)
    return {name: torch.cat(found) for name, found in parts.items()}


@torch.no_grad()
def resume(
    gm: fx.GraphModule,
    known: Mapping[fx.Node, Any],
    replaced: Replaced | None = None,
    then: Mapping[fx.Node, Function] | None = None,
) -> Any:
    """The output when some nodes' values are given; only what it needs besides them is computed.

    Those that are `replaced` are what a function makes of another node's value; `then` is a function of what they are.
    """
    replaced, then = replaced or {}, then or {}
    output = next(n for n in gm.graph.nodes if n.op == "output")
    reads: dict[fx.Node, list[fx.Node]] = {}
    queue = [output]
    while queue:
        node = queue.pop()
        if node not in reads and node not in known:
            reads[node] = [replaced[node][0]] if node in replaced else node.all_input_nodes
            queue += reads[node]
    left = Counter(i for inputs in reads.values() for i in inputs)  # readers that have not run
    runner = fx.Interpreter(gm, garbage_collect_values=False)
    runner.env = dict(known)
    for node in gm.graph.nodes:
        if node not in reads:
            continue
        if node in replaced:
            entry, made = replaced[node]
            value = made(runner.env[entry])
        else:
            value = runner.run_node(node)
        runner.env[node] = then[node](value) if node in then else value
        for i in reads[node]:
            left[i] -= 1
            if not left[i] and i not in known:
                del runner.env[i]
    return runner.env[output]


def flat_output(output: Any, images: int | None = None, rows: Rows = ()) -> Tensor:
    """All floating tensors of an output as one row; with `images` as (images, features), of those that have `rows`."""
    leaves = floating_outputs(output)
    if images is None:
        return torch.cat([v.reshape(1, -1) for v in leaves], 1)
    kept = [(v, dim) for v, dim in zip(leaves, rows, strict=True) if dim is not None]
    return torch.cat([v.movedim(dim, 0).reshape(images, -1) for v, dim in kept], 1)


def floating_outputs(output: Any) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    return [v for v in pytree.tree_leaves(plain_output(output)) if isinstance(v, Tensor) and v.is_floating_point()]


def mean_square_distance(z: Tensor) -> float:
    """The mean over the images of the squared distance of their values (images, ...) from their mean.

    Of a single image, and of images that are all alike, the mean square; 1 where that is 0, too.
    """
    z = z.flatten(1).double()
    square = float(z.square().sum(1).mean())
    distance = float((z - z.mean(0)).square().sum(1).mean()) if len(z) > 1 else square
    return (distance if distance > 1e-12 * square else square) or 1.0


@torch.no_grad()
def output_rows(gm: fx.GraphModule, calibration: Calibration) -> Rows:
    """The dimension along which the images lie in each floating tensor of the output, None for one without.

    It is the first that grows with the batch, by as much for each image: 0 of (images, classes) and of boxes that are
    flattened over the batch, 1 of (time, images, classes). What grows with nothing (a scale, anchors) is constant. A
    graph that runs at one size only is judged by that: the first dimension if it fits, else the first that does.

    Raises `ModelError` if no tensor has such a dimension.
    """
    shapes = {}
    for size in (2, 3) if noted(gm).tracer == "symbolic" else ():
        with contextlib.suppress(Exception):  # a batch size that is written in the graph
            batch = next(calibration.whole_batches(size).batches(size))
            shapes[size] = [tuple(v.shape) for v in floating_outputs(record(gm, batch, (), calibration.names)[1])]
    if len(shapes) == 2 and [len(s) for s in shapes[2]] == [len(s) for s in shapes[3]]:
        pairs = zip(shapes[2], shapes[3], strict=True)
        rows = [next((i for i, (a, b) in enumerate(zip(*p, strict=True)) if a * 3 == b * 2 > 0), None) for p in pairs]
        seen = shapes[3]
    else:
        batch = next(batches_for(gm, calibration, 1))
        seen = [tuple(v.shape) for v in floating_outputs(record(gm, batch, (), calibration.names)[1])]
        rows = [next((i for i, n in enumerate(s) if n == len(batch[0])), None) for s in seen]
    if all(dim is None for dim in rows):
        raise ModelError(
            f"the model's output of shape {', '.join(map(str, seen))} has no batch dimension (none that grows with the "
            "batch), so its error cannot be told by image: return one row an image, or use importance='magnitude'"
        )
    return tuple(rows)
