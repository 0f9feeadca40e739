"""What the compiler's tests share: one check for a whole rewrite, small networks, and an oracle for its borders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.graph.raw_nodes import op_name
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.pruning import is_dropped
from lmfx.passes.trace.tracing import fingerprint, trace

Picker = Callable[[SpanSet], Iterable[Candidate]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: several that wait for each other on a busy machine take several times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def double(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.uniform_(-0.5, 0.5)
    return model.double().eval()


def ops_of(gm: fx.GraphModule) -> list[str]:
    """The graph as words: `Conv2d`, `ReLU`, `add`, in order, without inputs, outputs and parameters."""
    words = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            words.append(type(gm.get_submodule(str(node.target))).__name__)
        elif node.op in ("call_function", "call_method"):
            words.append(op_name(node))
    return words


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a compiler might change by accident."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(m), m.training, getattr(m, "inplace", None)) for name, m in model.named_modules()]
    return {"state": state, "modules": modules, "text": repr(model)}


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before["modules"] == after["modules"] and before["text"] == after["text"]
    assert before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), f"{name} was changed"


def run(model: nn.Module, example: Any) -> Any:
    """Output on copies of the example, without gradients."""
    with torch.no_grad():
        if isinstance(example, dict):
            return model(**{k: v.clone() for k, v in example.items()})
        args = example if isinstance(example, tuple) else (example,)
        return model(*(v.clone() if isinstance(v, Tensor) else v for v in args))


def spans_of(model: nn.Module, example: Any, **options: Any) -> SpanSet:
    return enumerate_spans(Network(trace(model, example)), SpanOptions(**options))


def check_trace(
    model: nn.Module, example: Any, ops: list[str] | None = None, tolerance: float = 1e-14
) -> fx.GraphModule:
    """Trace, and check the graph, its output and that the model is as it was. The model is in eval mode and float64."""
    before = snapshot(model)
    gm = trace(model, example)
    assert_unchanged(before, model)
    gm.graph.lint()
    assert relative_error(run(model, example), run(gm, example)) <= tolerance
    if ops is not None:
        assert ops_of(gm) == ops
    return gm


def check_rewrite(
    model: nn.Module,
    example: Any,
    plan: MergePlan | Picker,
    *,
    before: list[str] | None = None,
    after: list[str] | None = None,
    edits: int | None = None,
    tolerance: float = 1e-12,
    others: Iterable[Any] = (),
    options: SpanOptions | None = None,
    spans: SpanSet | None = None,
) -> fx.GraphModule:
    """Trace, plan, rewrite and merge, and check it all; returns the merged graph.

    `plan` is a plan, or picks candidates from a `SpanSet`. `before` and `after` are the expected graphs in words,
    `edits` the expected number of merged convs; `others` are further inputs to compare trainable and merged form on.
    `spans`, where there is one already, saves tracing and enumerating again.
    """
    kept = snapshot(model)
    spans = spans or enumerate_spans(Network(trace(model, example)), options)
    gm = spans.network.gm
    if before is not None:
        assert ops_of(gm) == before
    if not isinstance(plan, MergePlan):
        plan = MergePlan(tuple(plan(spans)), fingerprint(gm))
    text = gm.code
    trainable = rewrite(gm, plan)
    merged = merge(trainable)
    assert gm.code == text, "rewrite changed the graph that it was given"
    assert_unchanged(kept, model)
    placed = trainable.meta["lmfx_spans"]
    found = {str(n.target) for n in trainable.graph.nodes if n.op == "call_module"}
    assert set(placed) <= found, f"spans {set(placed) - found} are not in the rewritten graph"
    assert list(placed.values()) == [c.key for c in plan.candidates if c.realization not in ("keep", "drop")]
    for name, key in placed.items():
        module, candidate = trainable.get_submodule(name), spans.by_key[key]
        if isinstance(module, LinearSpan):
            assert module.config == candidate.conv, f"{key}: {module.config} is not what was promised"
            filled = module.config.padding_mode, module.config.padding_value
            op = replace(module.linear_op().config, padding_mode=filled[0], padding_value=filled[1])
            assert op == candidate.conv
    assert not any(isinstance(m, LinearSpan) for m in merged.modules())
    if edits is not None:
        assert len(placed) == edits
    if after is not None:
        assert ops_of(merged) == after
    reference = run(model, example)
    if not plan.candidates:
        assert relative_error(reference, run(trainable, example)) <= 1e-14
    shapes = [v.shape for v in torch.utils._pytree.tree_leaves(reference) if isinstance(v, Tensor)]
    for x in (example, *others):
        result = run(merged, x)
        assert relative_error(run(trainable, x), result) <= tolerance
        if x is example:
            assert [v.shape for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, Tensor)] == shapes
    return merged


def pick(**wanted: Any) -> Picker:
    """Pick the first candidate whose fields match: realization, convs, kernel, stride, groups, kept, start, stop."""

    def matches(c: Candidate) -> bool:
        conv = c.conv
        seen = {
            "realization": c.realization,
            "convs": c.convs,
            "kept": c.kept,
            "all_convs": c.all_convs,
            "series": c.span.series,
            "start": c.span.start,
            "stop": c.span.stop,
            "kernel": conv.kernel_size if conv else None,
            "stride": conv.stride if conv else None,
            "groups": conv.groups if conv else None,
        }
        return all(seen[key] == value for key, value in wanted.items())

    def choose(spans: SpanSet) -> list[Candidate]:
        found = [c for c in spans if matches(c)]
        assert found, f"no candidate has {wanted}; there are {[c.key for c in spans]}"
        return found[:1]

    return choose


def linearized(gm: fx.GraphModule, plan: MergePlan) -> fx.GraphModule:
    """The original graph with each composed span's activations and pruned convs taken out, and nothing merged.

    Away from the borders (where zero padding between layers and before all of them differ) it computes what the
    rewritten network computes, by another way: an oracle for `rewrite`. Dropped spans are the identity.
    """
    network = Network(gm)
    copied = copy.deepcopy(gm)
    nodes = {n.name: n for n in copied.graph.nodes}
    for candidate in plan.candidates:
        span = candidate.span
        if candidate.realization == "drop":
            nodes[span.output].replace_all_uses_with(nodes[span.entry])
            nodes[span.output] = nodes[span.entry]
        elif candidate.realization == "compose":
            layers = network.series[span.series].layers[span.start : span.stop]
            kept = frozenset(n for n in network.convs(layers)[1] if network.path(n) in candidate.kept)
            _linearize(network, nodes, layers, kept, span.activation)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied


def _linearize(
    network: Network, nodes: dict[str, fx.Node], layers: Any, kept: frozenset[str], stays: str | None
) -> None:
    for layer in layers:
        if layer.conv is not None and layer.conv not in kept:
            last = layer.exit if layer.activation != stays or stays is None else _before(layer)
            if last != layer.entry:
                nodes[last].replace_all_uses_with(nodes[layer.entry])
                nodes[last] = nodes[layer.entry]
            continue
        if layer.parallel is not None:
            for branch in layer.parallel.branches:
                _linearize(network, nodes, branch.layers, kept, None)
            join = nodes[layer.parallel.node]
            gone = [is_dropped(network, layer.parallel, kept, i) for i in range(len(layer.parallel.branches))]
            if any(gone):
                left = [arg for arg, dropped in zip(join.args, gone, strict=True) if not dropped]
                assert len(left) == 1 and isinstance(left[0], fx.Node)
                join.replace_all_uses_with(left[0])
                nodes[join.name] = left[0]
        if layer.activation is not None and layer.activation != stays:
            act = nodes[layer.activation]
            source = act.all_input_nodes[0]
            act.replace_all_uses_with(source)
            nodes[layer.activation] = source


def _before(layer: Any) -> str:
    own = [n for n in layer.nodes if n != layer.activation]
    return own[-1] if own else layer.entry
