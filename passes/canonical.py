"""Functions and methods become plain torch.nn modules; what is the identity in eval mode is gone.

    before                                                    after
    %w = get_attr[conv.weight]                                %c = call_module[conv](%x)       plain nn.Conv2d
    %c = conv2d(%x, %w, None, 1, 1)                           %r = call_module[relu](%c)       plain nn.ReLU
    %r = call_method[relu](%c)                                %s = call_module[mul](%r)        ChannelAffine
    %d = dropout(%r, 0.1, False)
    %s = mul(%d, 0.5)

Joins are normalised to torch.add, torch.sub, torch.mul and torch.cat over values; constants are folded into a
`ChannelAffine`. A node that fits no rule stays as it is (opaque for the later passes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import ops

__all__ = ["canonicalize", "op_name", "set_submodule"]

_CONV_ARGS = ("weight", "bias", "stride", "padding", "dilation", "groups")
_BN_ARGS = {
    "function": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "aten": ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}
_OWNED = (".weight", ".bias", ".running_mean", ".running_var")
_EXPORTED_NORM = "_native_batch_norm_legit_no_training"
_SCALAR = {
    "add": lambda c: (1.0, c),
    "sub": lambda c: (1.0, -c),
    "mul": lambda c: (c, 0.0),
    "div": lambda c: (1 / c, 0.0),
    "rsub": lambda c: (-1.0, c),
}
_ALIASES = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}


def op_name(node: fx.Node) -> str:
    """The plain name of a function or method node: `relu` for F.relu, torch.relu, x.relu() and aten.relu.default."""
    name = ops.function_name(node)
    return _ALIASES.get(name, name)


def canonicalize(gm: fx.GraphModule) -> int:
    """Rewrite the graph of `gm` (the caller's own copy) in place; returns the number of nodes changed.

    Every node must carry `meta["shape"]` (a tuple, or None where the value is no tensor).
    """
    changed = 0
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            changed += _module(gm, node)
        elif node.op in ("call_function", "call_method"):
            changed += _function(gm, node)
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return changed


def _module(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target))
    if isinstance(module, ops.IDENTITIES) or type(module).__name__ in ops.IDENTITY_NAMES:
        if ops.has_hooks(module) or len(node.all_input_nodes) != 1:
            return False
        return _bypass(node)
    if node.kwargs and not node.args and len(node.kwargs) == 1:  # self.conv(input=x)
        node.args, node.kwargs = tuple(node.kwargs.values()), {}
        return True
    return False


def _bypass(node: fx.Node) -> bool:
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)
    return True


def _function(gm: fx.GraphModule, node: fx.Node) -> bool:
    name = op_name(node)
    if name in ops.IDENTITY_FUNCTIONS:
        return _drop_identity(node)
    if name == _EXPORTED_NORM:
        return _exported_norm(gm, node)
    if name == "clone" and len(node.args) == 1:
        return _bypass(node)
    if node.meta.get("shape") is None:
        return False
    if name in ("cat", "concat", "concatenate"):
        return _cat(node)
    if name in _SCALAR:
        return _arithmetic(gm, node, name)
    module: nn.Module | None = None
    values = node.all_input_nodes
    if "input" in node.kwargs and not node.args:  # F.conv2d(input=x, weight=w)
        node.args = (node.kwargs["input"],)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
    if name in ("conv1d", "conv2d", "conv3d"):
        module = _conv(gm, node, int(name[4]))
    elif name == "batch_norm":
        module = _batch_norm(gm, node)
    elif name == "linear":
        module = _linear(gm, node)
    elif name == "prelu":
        module = _prelu(gm, node)
    elif name in ops.FUNCTIONS and len(values) == 1:
        module = _simple(node, name)
    if module is None:
        return False
    _replace(gm, node, module, name)
    return True


def _drop_identity(node: fx.Node) -> bool:
    training = node.kwargs.get("training")
    if training is None:
        flags = [a for a in node.args[1:] if isinstance(a, bool)]
        last = op_name(node).startswith("drop_block")  # (..., inplace, eps, training)
        training = flags[-1 if last else 0] if flags else op_name(node) != "drop_path"
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)
    if (training and p != 0) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)
    return True


def _bind(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments after the first by name, or None if there are some that we do not know."""
    rest = list(node.args[1:])
    # x.flatten(1), F.pad(x, (1, 1)), x.clamp(0, 6) all bind in order.
    if len(rest) > len(names):
        return None
    bound = dict(zip(names, rest, strict=False))
    for key, value in node.kwargs.items():
        if key in ("input", "inplace", "self"):
            continue
        if key not in names or key in bound:
            return None
        bound[key] = value
    return bound


def _simple(node: fx.Node, name: str) -> nn.Module | None:
    make, names = ops.FUNCTIONS[name]
    bound = _bind(node, names)
    if bound is None or bound.get("return_indices"):
        return None
    bound.pop("return_indices", None)
    if name in ("pad", "constant_pad_nd") and isinstance(bound.get("pad"), (list, tuple)):
        # F.pad(x, (1, 1)) pads the last dimension of a map only: the others get zeros.
        bound["pad"] = (*bound["pad"], *(0,) * (2 * (len(node.meta["shape"]) - 2) - len(bound["pad"])))
    if any(isinstance(v, fx.Node) for v in bound.values()):
        return None
    if name == "flatten" and (node.meta["shape"] is None or bound.get("start_dim", 0) != 1):
        return None  # nn.Flatten is the canonical form of flatten(x, 1) only
    try:
        return make(**bound)
    except (TypeError, ValueError):
        return None


def _tensor(gm: fx.GraphModule, value: Any) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    item: Any = gm
    for atom in str(value.target).split("."):
        item = getattr(item, atom, None)
    return item if isinstance(item, Tensor) else None


def _conv(gm: fx.GraphModule, node: fx.Node, ndim: int) -> nn.Module | None:
    bound = _bind(node, _CONV_ARGS)
    weight = _tensor(gm, bound.get("weight")) if bound else None
    if bound is None or weight is None:
        return None
    bias = _tensor(gm, bound.get("bias"))
    if bound.get("bias") is not None and bias is None:
        return None
    groups = bound.get("groups", 1)

    def tup(key: str, default: int) -> Any:
        value = bound.get(key, default)
        if isinstance(value, (str, int)):
            return value
        return tuple(value) if len(value) == ndim else tuple(value) * ndim

    conv = nn.utils.skip_init(
        ops.conv_class(ndim),
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tup("stride", 1),
        padding=tup("padding", 0),
        dilation=tup("dilation", 1),
        groups=groups,
        bias=bias is not None,
    )
    conv.weight = _parameter(weight)
    if bias is not None:
        conv.bias = _parameter(bias)
    return conv


def _exported_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """torch.export's eval-mode norm gives three values, of which a network reads the first."""
    if not all(op_name(user) == "getitem" and user.args[1] == 0 for user in node.users):
        return False
    first, *others = node.users
    weight, bias, mean, var, momentum, eps = node.args[1:]
    for user in (first, *others):
        user.target, user.args = torch.nn.functional.batch_norm, (node.args[0], mean, var, weight, bias, False)
        user.kwargs = {"momentum": momentum, "eps": eps}
        _function(gm, user)
    return True


def _batch_norm(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    kind = "aten" if isinstance(node.target, torch._ops.OpOverload) or node.target is torch.batch_norm else "function"
    names = _BN_ARGS[kind] + (("cudnn_enabled",) if kind == "aten" else ())
    bound = _bind(node, names)
    shape = node.meta["shape"]
    if bound is None or bound.get("training") not in (False, None) or not 2 <= len(shape) <= 5:
        return None
    tensors = {k: _tensor(gm, bound.get(k)) for k in ("running_mean", "running_var", "weight", "bias")}
    if any(bound.get(k) is not None and t is None for k, t in tensors.items()) or tensors["running_mean"] is None:
        return None
    cls = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    channels = tensors["running_mean"].numel()
    if (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    norm = cls(channels, eps=bound.get("eps", 1e-5), affine=tensors["weight"] is not None)
    norm.running_mean, norm.running_var = tensors["running_mean"], tensors["running_var"]
    if tensors["weight"] is not None and tensors["bias"] is not None:
        norm.weight, norm.bias = _parameter(tensors["weight"]), _parameter(tensors["bias"])
    return norm


def _linear(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    bound = _bind(node, ("weight", "bias"))
    weight = _tensor(gm, bound.get("weight")) if bound else None
    if bound is None or weight is None or weight.dim() != 2:
        return None
    bias = _tensor(gm, bound.get("bias"))
    if bound.get("bias") is not None and bias is None:
        return None
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear


def _prelu(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    weight = _tensor(gm, node.args[1] if len(node.args) > 1 else node.kwargs.get("weight"))
    if weight is None:
        return None
    module = nn.PReLU(weight.numel())
    module.weight = _parameter(weight)
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _cat(node: fx.Node) -> bool:
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    shape = node.meta["shape"]
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return False
    if len(tensors) == 1 and isinstance(tensors[0], fx.Node):
        return _bypass(node)
    node.target, node.op = torch.cat, "call_function"
    node.args, node.kwargs = (list(tensors), dim % len(shape)), {}
    return True


def _arithmetic(gm: fx.GraphModule, node: fx.Node, name: str) -> bool:
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return False
    left, right = node.args
    constant = [_constant(gm, v) for v in (left, right)]
    shape = node.meta["shape"]
    if isinstance(left, fx.Node) and isinstance(right, fx.Node) and constant == [None, None]:
        if name in ("div", "rsub"):
            return False
        node.op, node.target, node.kwargs = "call_function", getattr(torch, name), {}
        return True
    if not node.meta["floating"] or len(shape) < 3 or all(n.op == "get_attr" for n in node.all_input_nodes):
        return False
    if constant[1] is not None and isinstance(left, fx.Node) and left.meta.get("shape") == shape:
        value = _per_channel(constant[1], shape)
        pair = None if value is None else _SCALAR[name](value)
    elif constant[0] is not None and isinstance(right, fx.Node) and right.meta.get("shape") == shape:
        value = _per_channel(constant[0], shape)
        pair = {"add": (1.0, value), "mul": (value, 0.0), "sub": (-1.0, value)}.get(name)
        if value is None or pair is None:
            return False
        node.args = (right, left)
    else:
        return False
    if pair is None:
        return False
    like = next(c for c in reversed(constant) if c is not None)
    dtype = node.meta["dtype"]
    scale, bias = (torch.as_tensor(v, dtype=dtype, device=like.device).reshape(-1) for v in pair)
    size = max(scale.numel(), bias.numel())
    _replace(gm, node, ops.ChannelAffine(scale.expand(size), bias.expand(size)), name)
    return True


def _constant(gm: fx.GraphModule, value: Any) -> Tensor | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    tensor = _tensor(gm, value)
    return tensor.detach() if tensor is not None and tensor.is_floating_point() else None


def _per_channel(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`value` as one number a channel if it broadcasts that way over a map of this shape, else None."""
    if value.numel() == 1:
        return value.reshape(1)
    tail = len(shape) - 2
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if len(aligned) == len(shape) and aligned == (1, shape[1]) + (1,) * tail:
        return value.reshape(-1)
    return None


def _replace(gm: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> None:
    """Put a call of `module` on the node's value operand where `node` was, under the path that the node came from."""
    value = next(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node))
    target = _free_name(gm, node, module, name)
    set_submodule(gm, target, module.train(False))
    with gm.graph.inserting_before(node):
        new = gm.graph.create_node("call_module", target, (value,), {}, name=target.replace(".", "_"))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _free_name(gm: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> str:
    """`layer1.conv` if the weight came from `layer1.conv.weight`, else the owner's path and the op's name."""
    for value in (*node.args[1:], *node.kwargs.values()):
        if isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target).endswith(_OWNED):
            owner = str(value.target).rpartition(".")[0]
            if owner and not list(gm.get_submodule(owner).children()):
                uses = [n for n in gm.graph.nodes if n.op == "call_module" and n.target == owner]
                if not uses and all(isinstance(getattr(module, a, None), Tensor) for a in _attributes_read(gm, owner)):
                    return owner
    path = node.meta.get("path", "")
    base = f"{path}.{name}" if path else name
    taken, i = {n for n, _ in gm.named_modules(remove_duplicate=False)}, 0
    top = {n for n in gm._modules} | set(dir(type(gm)))
    candidate = base
    while candidate in taken or candidate in top or _is_attribute(gm, candidate):
        i += 1
        candidate = f"{base}_{i}"
    return candidate


def _attributes_read(gm: fx.GraphModule, owner: str) -> set[str]:
    """The attributes of the module `owner` that the graph still reads."""
    targets = [str(n.target).rpartition(".") for n in gm.graph.nodes if n.op == "get_attr"]
    return {name for parent, _, name in targets if parent == owner}


def _is_attribute(gm: fx.GraphModule, path: str) -> bool:
    item: Any = gm
    for atom in path.split("."):
        if not hasattr(item, atom):
            return False
        item = getattr(item, atom)
    return True


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted path below `root`, making empty modules on the way."""
    *parents, last = path.split(".")
    for atom in parents:
        child = root._modules.get(atom)
        if child is None:
            child = nn.Module()
            root.add_module(atom, child)
        root = child
    root._modules[last] = module
