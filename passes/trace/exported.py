"""Traces with torch.export what torch.fx cannot follow: writes through views, wrapped functions.

    model                 self.layer.conv(x)[:, 1:].mul_(2)
    exported, aten        %w = get_attr[layer.conv.weight] ; conv2d ; slice ; mul ; slice_scatter
    canonical (later)     call_module[layer.conv] ; ...

Sizes that are `free` are values of the graph, which is then right at others, too:

    model                 h = y.shape[2] ; F.pad(y, (0, 0, 0, -h % 8))
    exported              %h = call_method[size](%y, 2) ; neg ; mod ; pad

torch.export fixes a size that the model takes for a number (a loop over the batch). The example then has to have that
size, so it must be the caller's own: `FixedSizes` says which of those that should be free are fixed at another one.

The program is functionalized but not decomposed, parameters keep their names, and inputs and outputs are flat. Here it
gets the model's own face: one placeholder for each argument, and the output in plain containers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..graph.node_facts import note_leaf
from ..model.interface import Example, ModelCodeGen, Structure, bind, strip
from ..model.model_copy import eval_copy
from ..model.other_sizes import MANY
from ..model.quiet import quiet
from .tracers import Traced

__all__ = ["FixedSizes", "erase_checks", "name_inputs", "name_paths", "rooted", "trace_export", "trace_free"]

Free = Mapping[int, tuple[int, ...]]  # number of a tensor among those of the example -> dimensions of any size


class FixedSizes(TraceError):
    """torch.export took sizes for numbers that should be free; `batch` and `size` say which kinds."""

    def __init__(self, dims: set[int]) -> None:
        super().__init__("torch.export takes sizes of this model for numbers")
        self.batch, self.size = 0 in dims, bool(dims - {0})


def trace_export(model: nn.Module, example: Example) -> Traced:
    """Trace with torch.export; the graph is specialised to the example. `model` is not changed."""
    return trace_free(model, example, {})


def trace_free(model: nn.Module, example: Example, free: Free) -> Traced:
    """The same with sizes that are values of the graph, which has to be traced with sizes from 2 there.

    Raises `FixedSizes` if torch.export makes a number of one of them.
    """
    binding = bind(model, example)
    # Inputs are named in the order of the model's parameters, whatever the order of the example's names.
    example = example[0], {name: example[1][name] for name in binding.given if name in example[1]}
    source = _FlatModel(eval_copy(model), example)
    tensors = tuple(v for v in pytree.tree_leaves(example) if isinstance(v, Tensor))
    with quiet(), torch.no_grad():  # torch.export prints a whole graph when it fails
        # Without gradients, because autograd forbids some in-place ops that inference allows.
        program = torch.export.export(source, tensors, dynamic_shapes=_spec(tensors, free), strict=False)
        exported: Any = program.run_decompositions({}).module()
    graph: fx.Graph = exported.graph
    erase_checks(graph)
    flat = [n for n in graph.nodes if n.op == "placeholder"]
    if len(flat) != len(tensors):
        raise TraceError(f"torch.export gave a graph of {len(flat)} inputs for {len(tensors)} tensors")
    sizes = [(d, flat[i].meta["val"].shape[d]) for i, dims in free.items() for d in dims]
    fixed_dims = {d for d, n in sizes if not isinstance(n, torch.SymInt)}
    if fixed_dims := fixed_dims or _decided(getattr(exported, "_guards_fn", None), tensors, free):
        raise FixedSizes(fixed_dims)
    fixed = name_inputs(graph, flat, binding.given)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (_refill(source.captured.output, iter(output.args[0])),)
    graph.set_codegen(ModelCodeGen(binding, fixed, source.captured.structure))
    graph._tracer_cls = None  # unpickling would trace with it again, without a model
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(m), name) for name, m in source.model.named_modules(remove_duplicate=False)}
    root = rooted(exported, graph, aliases)
    name_paths(graph, aliases)
    return Traced(fx.GraphModule(root, graph, type(model).__name__), {})


def _spec(tensors: tuple[Tensor, ...], free: Free) -> Any:
    """`dynamic_shapes` for a forward of `*tensors`; torch.export may find that a free size is none."""
    if not free:
        return None
    auto: Any = torch.export.Dim.AUTO
    return (tuple(dict.fromkeys(free.get(i, ()), auto) or None for i in range(len(tensors))),)


def _decided(guards: Any, tensors: tuple[Tensor, ...], free: Free) -> set[int]:
    """Kinds of sizes that the graph is not right at when they are far larger, by what torch.export assumed of them."""
    found: set[int] = set()
    for batch in (True, False):
        grown = [
            torch.empty(
                [n + MANY * (d in free.get(i, ()) and (d == 0) is batch) for d, n in enumerate(t.shape)], **_META
            )
            for i, t in enumerate(tensors)
        ]
        try:
            if guards is not None and free:
                guards(*(g.to(t.dtype) for g, t in zip(grown, tensors, strict=True)))
        except AssertionError:
            found.add(0 if batch else 1)
    return found


_META: dict[str, Any] = {"device": "meta"}


def erase_checks(graph: fx.Graph) -> None:
    """Erase what torch.export checks of sizes while a program runs."""
    for node in reversed(list(graph.nodes)):
        guards = node.op == "call_module" and "guards" in str(node.target)
        if guards or (node.op == "call_function" and _is_assertion(node.target)):
            graph.erase_node(node)


def _is_assertion(target: Any) -> bool:
    """What torch.export writes down of sizes beside computing; the graph's own limits come from running it."""
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    return name.rpartition("::")[2].startswith(("_assert", "sym_constrain", "_check"))


class _FlatModel(nn.Module):
    """The model with the tensors of the example as its inputs and the tensors of its output as its outputs."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = pytree.tree_flatten(example)
        self.captured = _Captured()  # torch.export puts attributes of modules back, but not those of other objects

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(v, Tensor) else v for v in self.leaves], self.spec
        )
        plain, self.captured.structure = strip(self.model(*args, **kwargs))
        self.captured.output = pytree.tree_map(lambda v: _HOLE if isinstance(v, Tensor) else v, plain)
        return [v for v in pytree.tree_leaves(plain) if isinstance(v, Tensor)]


class _Captured:
    """The model's output, with holes for its tensors, and its structure."""

    output: Any = None
    structure: Structure | None = None


# Strides are not kept by later passes (a contiguous copy is the identity to them), so views may have to copy.
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


class _Hole:
    """Where a tensor stands in a plain output."""


_HOLE = _Hole()


def _refill(plain: Any, values: Iterator[Any]) -> Any:
    return pytree.tree_map(lambda v: next(values) if v is _HOLE else v, plain)


def name_inputs(graph: fx.Graph, flat: list[fx.Node], given: dict[str, Any]) -> dict[str, Any]:
    """One placeholder for each argument, with the flat ones read from it; returns the arguments that are constants."""
    fixed: dict[str, Any] = {}
    rest = iter(flat)
    with graph.inserting_before(flat[0] if flat else None):
        for name, value in given.items():
            holder = graph.placeholder(name)
            paths = pytree.tree_flatten_with_path(value)[0]
            if not any(isinstance(v, Tensor) for _, v in paths):
                fixed[name] = value
            for path, leaf in paths:
                if isinstance(leaf, Tensor):
                    next(rest).replace_all_uses_with(_item(graph, holder, path))
    for node in flat:
        graph.erase_node(node)
    return fixed


def _item(graph: fx.Graph, holder: fx.Node, path: tuple[Any, ...]) -> fx.Node:
    for key in path:
        if isinstance(key, pytree.GetAttrKey):
            holder = graph.call_function(getattr, (holder, key.name))
        else:
            holder = graph.call_function(operator.getitem, (holder, key.idx if hasattr(key, "idx") else key.key))
    return holder


def rooted(exported: nn.Module, graph: fx.Graph, names: dict[str, str], prefix: str = "model.") -> nn.Module:
    """A module with the tensors that the graph reads: `model.layer.conv.weight` is `layer.conv.weight` in it.

    Constants of a forward are not below the model; a module that two names lead to has one.
    """
    root = nn.Module()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(str(node.target))(exported)
        owner, _, last = str(node.target).removeprefix(prefix).rpartition(".")
        owner = names.get(owner, owner)
        module = root
        for atom in owner.split(".") if owner else ():
            if atom not in module._modules:
                module.add_module(atom, nn.Module())
            module = module.get_submodule(atom)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(last, tensor)
        else:
            module.register_buffer(last, tensor)
        node.target = f"{owner}.{last}" if owner else last
    return root


def name_paths(graph: fx.Graph, names: dict[str, str], path_of: Callable[[str], str] | None = None) -> None:
    """Every node has the path of the module that it came from, and knows whether that is a layer of torch's own."""
    path_of = path_of or _path
    for node in graph.nodes:
        if node.target in _VIEWS:
            _free_view(node)
        if node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths = {k: (path_of(v[0]), v[1]) for k, v in stack.items()}
            entries = {k: (names.get(path, path), kind) for k, (path, kind) in paths.items() if path}
            node.meta["nn_module_stack"] = entries
            kinds = [str(kind) for _, kind in entries.values()]
            note_leaf(node, bool(kinds) and "torch.nn." in kinds[-1])


def _free_view(node: Any) -> None:
    """A view as a reshape, or as what it says: `flatten` of all but the first dimension."""
    value: Any = node.meta.get("val")
    before: Any = node.args[0].meta.get("val")
    node.target = torch.ops.aten.reshape.default
    known = isinstance(value, Tensor) and isinstance(before, Tensor)
    if known and value.dim() == 2 < before.dim() and statically_known_true(value.shape[0] == before.shape[0]):
        node.target, node.args = torch.flatten, (node.args[0], 1)


def _path(path: str) -> str:
    """`layer.conv` for `L['self'].model.layer.conv` and `model.layer.conv`; empty for the model itself."""
    parts = path.partition("@")[0].split(".")  # layer@1 is the second call of layer
    return ".".join(parts[parts.index("model") + 1 :]) if "model" in parts else ""
