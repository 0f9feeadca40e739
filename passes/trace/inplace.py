"""Rewrites every in-place op of a graph in its pure form; later readers of the mutated value read the result.

    before                                   after
    %a = conv(x)                             %a = conv(x)
    %b = call_method[mul_](%a, %g)           %b = call_method[mul](%a, %g)
    %c = relu(%a)      # sees the product    %c = relu(%b)

torch.fx does not track aliases: an in-place call whose result nobody reads has no users and would die in dead-code
elimination, and a recorded `x += y` is an out-of-place add that other names of `x` never see. Values that are known
to be the very same tensor (an in-place op's result and its operand) share one alias class here. Where a *view* of a
mutated tensor is read or written afterwards the graph is refused (`TraceError`), and tracing goes on with
torch.export, which functionalizes.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from ..errors import TraceError
from ..graph import ops

__all__ = ["make_pure"]

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# fmt: off
_VIEWS = frozenset({
    "view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "chunk", "split", "getitem", "narrow",
    "select", "expand", "t", "unflatten", "contiguous", "view_as", "expand_as", "movedim", "swapaxes", "unbind",
    "tensor_split", "detach", "diagonal", "unfold", "alias", "slice", "split_with_sizes", "_unsafe_view", "to",
    "swapdims", "moveaxis", "hsplit", "vsplit", "dsplit", "channel_shuffle", "native_channel_shuffle", "unsafe_chunk",
    "unsafe_split", "unsafe_split_with_sizes",
    "type_as", "real", "imag", "float", "double", "half", "pixel_shuffle", *ops.IDENTITY_FUNCTIONS,
})
# fmt: on
_VIEW_MODULES = (*ops.IDENTITIES, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_VIEW_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
# F.relu(x, True): where the flag stands among the positional arguments, by the function's own name. Tracing gives the
# flag by name; a graph that was made by hand need not.
_FLAG_POSITION = {
    **dict.fromkeys(("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish", "selu"), 1),
    **dict.fromkeys(("elu", "celu", "leaky_relu"), 2),
    **dict.fromkeys(("hardtanh", "_threshold", "dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout", "drop_block2d", "drop_block3d"), 3),
    "rrelu": 4,
}


def make_pure(graph_module: fx.GraphModule) -> int:
    """Rewrite in place of the *graph* (which is the caller's own copy) and return how many ops were made pure."""
    graph = graph_module.graph
    newest: dict[fx.Node, fx.Node] = {}  # a tensor that was mutated -> the node that now holds its value
    base: dict[fx.Node, fx.Node] = {}  # a view -> what it looks into
    order = {node: i for i, node in enumerate(graph.nodes)}
    inplace = {name for name, m in graph_module.named_modules(remove_duplicate=False) if _flag(m)}
    for name in inplace:
        graph_module.get_submodule(name).inplace = False  # type: ignore[assignment]
    count = 0

    def resolve(node: fx.Node) -> fx.Node:
        while node in newest:
            node = newest[node]
        return node

    for node in list(graph.nodes):
        node.args = fx.map_arg(node.args, resolve)
        node.kwargs = fx.map_arg(node.kwargs, resolve)
        name = _name(node)
        source = _viewed(graph_module, node, name)
        if source is not None and _is_identity(graph_module, node):
            newest[node] = source  # the very same tensor under another name
            continue
        if source is not None:
            base[node] = source
        if node.kwargs.get("out") is not None:
            raise TraceError(f"{node.name} writes into out=, which fx cannot express as a pure op")
        if name == "setitem":
            raise TraceError(f"{node.name} writes into a part of a tensor, which fx cannot express as a pure op")
        if not (str(node.target) in inplace if node.op == "call_module" else _purify(node)):
            continue
        count += 1
        target = node.args[0] if node.args else node.kwargs["input"]
        if not isinstance(target, fx.Node):
            continue
        base.pop(node, None)
        if _aliases_read_later(target, base, newest, order, order[node]):
            raise TraceError(f"{node.name} mutates {target.name} in place while a view of it is in use")
        newest[target] = node
        base[node] = target
    graph.lint()
    graph_module.recompile()
    return count


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return str(node.target._schema.name).split("::")[1]
        return str(getattr(node.target, "__name__", ""))
    return ""


def _is_identity(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives back its operand itself in eval mode."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is None or ops.has_hooks(module) or len(node.all_input_nodes) != 1:
        return False
    return ops.plain_in(module, ops.IDENTITIES) or type(module).__name__ in ops.IDENTITY_NAMES


def _flag(module: nn.Module) -> bool:
    return getattr(module, "inplace", False) is True


def _purify(node: fx.Node) -> bool:
    """Turn a function or method node into its pure form; False if it was pure."""
    if node.op == "call_method" and _inplace_method(str(node.target)):
        if str(node.target) == "copy_":
            raise TraceError(f"{node.name} copies into a tensor in place")
        node.target = str(node.target)[:-1]
        return True
    if node.op != "call_function":
        return False
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
        return True
    if node.kwargs.get("inplace") is True:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        return True
    name = _name(node)
    if _inplace_method(name):
        if isinstance(node.target, torch._ops.OpOverload):
            packet = getattr(torch.ops.aten, name[:-1], None)
            overload = getattr(packet, node.target._overloadname, None)
        else:
            overload = getattr(torch, name[:-1], None) or getattr(torch.nn.functional, name[:-1], None)
        if overload is None:
            raise TraceError(f"{node.name}: no pure form of the in-place op {name} is known")
        node.target = overload
        return True
    at = _FLAG_POSITION.get(name)
    if at is not None and len(node.args) > at:
        inplace = bool(node.args[at])
        node.args = (*node.args[:at], False, *node.args[at + 1 :])
        return inplace
    return False


def _viewed(graph_module: fx.GraphModule, node: fx.Node, name: str) -> fx.Node | None:
    """The value that a node's result may share its memory with: it is a view of it, or the very same tensor."""
    source = node.args[0] if node.args else next(iter(node.all_input_nodes), None)
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        known = type(module).__module__.startswith("torch.nn.") and not ops.has_hooks(module)
        # A module that nobody knows may well return what it was given.
        return source if isinstance(module, _VIEW_MODULES) or not known else None
    if name == "getattr":
        return source if node.args[1] in _VIEW_ATTRIBUTES else None
    return source if name in _VIEWS else None


def _inplace_method(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_") and name != "requires_grad_"


def _aliases_read_later(
    target: fx.Node, base: dict[fx.Node, fx.Node], newest: dict[fx.Node, fx.Node], order: dict[fx.Node, int], now: int
) -> bool:
    """Whether a view of `target`, or what `target` is a view of, is read after position `now`."""
    root = _root(target, base)
    aliases = {v for v in base if _root(v, base) is root} | {root}
    # Readers of a value that has a newer one read that instead.
    current = [alias for alias in aliases if alias is not target and alias not in newest]
    return any(order[user] > now for alias in current for user in alias.users)


def _root(node: fx.Node, base: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in base:
        node = base[node]
    return node
