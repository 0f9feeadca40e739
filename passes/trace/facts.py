"""Answers what a symbolic trace knows of a value for certain: what is the same at every batch and image size.

    x.dim() != 4                  decided: the number of dimensions
    x.dtype in (half, bfloat16)   decided: the type, the device, whether a gradient is wanted (never)
    len(x.shape), x.shape[2:]     a shape of known length, whose entries are values of the graph
    x.shape[1] != self.channels   decided: that dimension is the same for an example of another batch and size
    x.shape[2] % 2                not decided: the example's size says nothing of others

So the checks that modules make of their input (torch's own norms do) need no graph that is made for one size. Values
are found by running fake tensors through the graph so far, and only when something is asked; entries of shapes by
running others as well, whose batch and maps are larger. A graph that does not run there says nothing of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..graph import ops

__all__ = ["UNKNOWN", "Facts", "unpatched"]

UNKNOWN = object()
_ATTRIBUTES = frozenset({"ndim", "dtype", "device", "is_cuda", "layout", "is_quantized", "is_sparse", "is_mps"})
_METHODS = frozenset({"dim", "ndimension", "is_floating_point", "is_complex"})
_PURE = frozenset(
    {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_}
    | {operator.not_, operator.is_, operator.is_not, operator.add, operator.sub, operator.mul, operator.floordiv}
    | {operator.mod, operator.neg}
)
_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


class Facts:
    """Answers questions about the values of a graph that is being recorded; `given` are the example's by name."""

    def __init__(self, root: nn.Module, given: Mapping[str, Any]) -> None:
        self.root = root
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.given = given
        self.values: dict[fx.Node, Any] = {}  # at the example's sizes
        self.others: dict[fx.Node, Any] = {}  # at larger ones
        tensors = [v for v in pytree.tree_leaves(dict(given)) if isinstance(v, Tensor) and v.dim()]
        images = next((v for v in tensors if v.dim() > 2), tensors[0] if tensors else None)
        self.batch = len(images) if images is not None else 0

    def value(self, node: Any) -> Any:
        """The value of a node where it is the same at every size, else `UNKNOWN`."""
        if isinstance(node, (tuple, list)):
            parts = [self.value(v) for v in node]
            return UNKNOWN if any(p is UNKNOWN for p in parts) else type(node)(parts)
        if not isinstance(node, fx.Node):
            return node
        name, source = ops.function_name(node), node.args[0] if node.args else None
        if node.target is getattr and isinstance(source, fx.Node):
            if node.args[1] == "requires_grad":
                return False  # a trace is of inference
            return self._of_tensor(source, node.args[1], call=False) if node.args[1] in _ATTRIBUTES else UNKNOWN
        entry = self._entry(node, name)
        if entry is not None:
            return self._size(*entry)
        if name in _METHODS and len(node.all_input_nodes) == 1 and isinstance(source, fx.Node):
            return self._of_tensor(source, name, call=True)
        if node.op == "call_function" and node.target in _PURE and not node.kwargs:
            values = self.value(tuple(node.args))
            function: Any = node.target
            return UNKNOWN if values is UNKNOWN else function(*values)
        return UNKNOWN

    def length(self, node: fx.Node) -> int | None:
        """The length of a shape, or of a part of one, or None for any other value."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        whole = node.target is getattr and node.args[1] == "shape"
        if whole or (node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs):
            rank = self._of_tensor(source, "ndim", call=False)
            return rank if isinstance(rank, int) else None
        if node.target is operator.getitem and isinstance(node.args[1], slice):
            bounds = (node.args[1].start, node.args[1].stop, node.args[1].step)
            outer = self.length(source) if all(isinstance(b, (int, type(None))) for b in bounds) else None
            return None if outer is None else len(range(outer)[node.args[1]])
        return None

    def _entry(self, node: fx.Node, name: str) -> tuple[fx.Node, int] | None:
        """(the tensor, which of its dimensions) for `x.size(1)` and for an item of `x.shape`, or of a part of that."""
        source: Any = node.args[0] if node.args else None
        index = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        if not isinstance(source, fx.Node) or not isinstance(index, int):
            return None
        if node.op == "call_method" and name == "size":
            return source, index
        if node.target is not operator.getitem or (length := self.length(source)) is None or index >= length:
            return None
        dims = range(length)[index]
        if source.target is operator.getitem:
            outer: Any = source.args[0]
            whole = self.length(outer)
            part: Any = source.args[1]
            if whole is None or outer.target is operator.getitem:
                return None
            source, dims = outer, range(whole)[part][index]
        tensor: Any = source.args[0]
        return tensor, dims

    def _size(self, tensor: fx.Node, dim: int) -> Any:
        """A dimension that is the same at other sizes, else `UNKNOWN`."""
        try:
            seen = [self._fake(tensor, values) for values in (self.values, self.others)]
            sizes = {int(v.shape[dim]) for v in seen}
        except Exception:  # an op that fake tensors cannot run, here or at larger sizes: nothing is known
            return UNKNOWN
        return sizes.pop() if len(sizes) == 1 else UNKNOWN

    def _of_tensor(self, node: fx.Node, name: Any, call: bool) -> Any:
        try:
            value = self._fake(node, self.values)
        except Exception:  # an op that fake tensors cannot run: nothing is known
            return UNKNOWN
        if not isinstance(value, Tensor):
            return UNKNOWN
        found: Any = getattr(value, name)
        return found() if call else found

    def _fake(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        for earlier in node.graph.nodes:
            if earlier not in values:
                with self.mode, torch.no_grad():
                    values[earlier] = unpatched(lambda n=earlier: self._run(n, values))  # type: ignore[misc]
            if earlier is node:
                break
        value = values[node]
        if isinstance(value, Exception):
            raise value
        return value

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The node's fake value, or why there is none."""
        sources = [values[n] for n in node.all_input_nodes]
        failed = next((v for v in sources if isinstance(v, Exception)), None)
        if failed is not None:
            return failed
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        try:
            if node.op == "placeholder":
                given = self.given[str(node.target)]
                return pytree.tree_map(self._larger if values is self.others else self._faked, given)
            if node.op == "get_attr":
                return operator.attrgetter(str(node.target))(self.root)
            if node.op == "call_module":
                module = self.root.get_submodule(str(node.target))
                return args[0] if len(args) == 1 and ops.keeps_shape(module) else module(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            function: Any = node.target
            return function(*args, **kwargs)
        except Exception as error:  # whatever an op does with a fake tensor may raise anything
            return error

    def _faked(self, value: Any) -> Any:
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value

    def _larger(self, value: Any) -> Any:
        """A tensor with another batch and, of a map, other sizes; multiples of powers of two stay some."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        rows = value.shape[0] + 2 if value.shape[0] == self.batch else value.shape[0]
        grown = [n + 32 * (axis + 1) for axis, n in enumerate(value.shape[2:])]
        return torch.empty((rows, *value.shape[1:2], *grown), dtype=value.dtype, device=value.device)


def unpatched(action: Callable[[], Any]) -> Any:
    """Do something with real modules while torch.fx has `__call__` and `__getattr__` of nn.Module patched."""
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _CALL, _GETATTR  # type: ignore[method-assign]
    try:
        return action()
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]
