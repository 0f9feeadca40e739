"""Checks the postconditions of every pass on its result, and compares two networks numerically."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import VerifyError
from ..model.interface import plain_output

__all__ = ["check_graph", "drop_unread", "relative_error", "unread_tensors"]


def check_graph(gm: fx.GraphModule) -> None:
    """Lint, and: every module that is called exists, nothing is dead. Raises `VerifyError`."""
    try:
        gm.graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise VerifyError(f"the rewritten graph does not lint ({error}): please report this") from error
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for name in called:
        try:
            gm.get_submodule(name)
        except AttributeError as error:
            raise VerifyError(f"the rewritten graph calls {name}, which is not there: please report this") from error
    dead = [n.name for n in gm.graph.nodes if not n.users and n.op not in ("output", "placeholder")]
    if dead:
        raise VerifyError(f"the rewritten graph computes values that nobody reads: {', '.join(dead)}; report this")
    for name, tensor in unread_tensors(gm):
        if isinstance(tensor, nn.Parameter):
            raise VerifyError(f"the rewritten graph has the parameter {name}, which nothing reads: please report this")


def unread_tensors(gm: fx.GraphModule) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that neither a called module nor a get_attr node of the graph reads."""
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    got = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    found: list[tuple[str, Tensor]] = []
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        owners = name.split(".")[:-1]
        inside = any(".".join(owners[: i + 1]) in called for i in range(len(owners)))
        held = any(name == g or name.startswith(g + ".") for g in got)  # get_attr may take a module or a list whole
        if not inside and not held:
            found.append((name, tensor))
    return found


def drop_unread(gm: fx.GraphModule) -> None:
    """Delete modules, parameters and buffers that nothing reads, also those of containers whose children live on."""
    gm.delete_all_unused_submodules()
    for name, _ in unread_tensors(gm):
        owner, _, last = name.rpartition(".")
        delattr(gm.get_submodule(owner), last)


def relative_error(expected: Any, actual: Any) -> float:
    """||expected - actual|| / ||expected|| in float64 over all tensors of two outputs of one structure.

    Raises `VerifyError` if their number or shapes differ.
    """
    left = [v.detach() for v in pytree.tree_leaves(plain_output(expected)) if isinstance(v, Tensor)]
    right = [v.detach() for v in pytree.tree_leaves(plain_output(actual)) if isinstance(v, Tensor)]
    if [tuple(v.shape) for v in left] != [tuple(v.shape) for v in right]:
        raise VerifyError(f"output shapes {[tuple(v.shape) for v in left]} became {[tuple(v.shape) for v in right]}")
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(left, right, strict=True))
    scale = sum(float(a.double().square().sum()) for a in left)
    return (error / scale) ** 0.5 if scale else error**0.5
