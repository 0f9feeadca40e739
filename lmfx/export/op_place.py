"""Finds in which module of a network an op runs, for errors of exporters, which name the op alone.

A network is run once while every op of ATen that it calls is watched. In a plain module the innermost module that is
being called is the place; in a graph a function's node says which module it came from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmfx.passes.graph.node_facts import path_of
from lmfx.passes.model.quiet import quiet

__all__ = ["place_of"]


def place_of(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], op: str) -> str:
    """The path of the first module that computes the op `aten.name` or `aten::name`; empty if it cannot be told."""
    watch = _Watch(op.replace("::", "."))
    hooks = [m.register_forward_pre_hook(watch.enters(name)) for name, m in net.named_modules() if name]
    hooks += [m.register_forward_hook(watch.leaves(), always_call=True) for name, m in net.named_modules() if name]
    try:
        with torch.no_grad(), quiet(), watch:
            if isinstance(net, fx.GraphModule) and not kwargs:
                _Noting(net, watch).run(*args)
            else:
                net(*args, **kwargs)
    except Exception:  # the export has failed already, and its error is the one to tell
        return watch.found
    finally:
        for hook in hooks:
            hook.remove()
    return watch.found


class _Watch(TorchDispatchMode):
    """Notes where the op is met first."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.inside: list[str] = []
        self.node = ""
        self.found = ""

    def enters(self, name: str) -> Any:
        return lambda *_: self.inside.append(name)

    def leaves(self) -> Any:
        return lambda *_: self.inside.pop() and None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found and f"{func}.".startswith(f"{self.op}."):
            self.found = self.inside[-1] if self.inside else self.node
        return func(*args, **(kwargs or {}))


class _Noting(fx.Interpreter):
    """Says which node runs."""

    def __init__(self, gm: fx.GraphModule, watch: _Watch) -> None:
        super().__init__(gm)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        path = str(n.target) if n.op == "call_module" else path_of(n)
        self.watch.node = f"{path} ({n.name})" if path and path != n.name else n.name
        return super().run_node(n)
