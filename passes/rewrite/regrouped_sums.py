"""Adds up sums in another order: operands that can become one convolution are added first.

    x ─ conv a ─────────┐                               x ─ conv a ─┐
    ├── conv r ─ relu ─ add ┐                           ├── conv b ─ add ┐
    └── conv b ───────────── add        ->              └── conv r ─ relu ─ add

In ``(a + r) + b`` no two operands of one addition are affine, so nothing merges; in ``(a + b) + r`` two are. An operand
belongs to a group with the others whose values are computed from one map, exactly, by affine ops (`exact`); the groups
are added up one by one, and then to each other, in the order of their first members. A sum in which every group has an
addition of its own stays as it is. Only the order of the additions changes, so values change by rounding alone.

A plan names the groups (`MergePlan.sums`): what is exact depends on the weights, and a saved plan must give the same
graph for any.
"""

from __future__ import annotations

import torch
from torch import fx

from ..errors import PlanError
from ..graph.graph_edit import drop_dead
from ..graph.node_facts import note_like, shape_of
from ..graph.reduction import join_of
from ..ir import Refusal, Series
from ..model.model_copy import deep_copy
from ..spans.exact import inexact
from ..spans.layers import Network
from ..spans.pruning import States

__all__ = ["Sums", "groups", "regrouped"]

Sums = tuple[tuple[str, ...], ...]


def groups(network: Network) -> Sums:
    """For each sum that is better added up in another order: its node, then the operands of one group; once a group."""
    series = {s.exit: s for s in network.series.values()}  # the innermost last: it is walked after those around it
    states = States(network, None, prune=False)
    found: list[tuple[str, ...]] = []
    for root in network.gm.graph.nodes:
        leaves = _leaves(root) if _is_root(root) else []
        if len(leaves) < 3 or len(set(leaves)) < len(leaves):
            continue
        members: dict[str, list[fx.Node]] = {}
        for leaf in leaves:
            members.setdefault(_group(network, states, leaf, series), []).append(leaf)
        several = [group for group in members.values() if len(group) > 1]
        if len(members) > 1 and any(set(group) not in _parts(root) for group in several):
            found += [(root.name, *(leaf.name for leaf in group)) for group in several]
    return tuple(found)


def regrouped(gm: fx.GraphModule, sums: Sums) -> fx.GraphModule:
    """A copy of the graph, sharing its tensors, in which these groups of operands are added first; `gm` if none is.

    Raises `PlanError` for sums that the graph does not have.
    """
    if not sums:
        return gm
    made: fx.GraphModule = deep_copy(gm, {id(t): t for t in (*gm.parameters(), *gm.buffers())})
    for old, new in zip(gm.graph.nodes, made.graph.nodes, strict=True):
        note_like(new, old)
    nodes = {node.name: node for node in made.graph.nodes}
    for name in dict.fromkeys(group[0] for group in sums if group):
        own = [group[1:] for group in sums if group[0] == name]
        root = nodes.get(name)
        leaves = _leaves(root) if root is not None and _is_root(root) else []
        given = [member for group in own for member in group]
        if len(set(given)) < len(given) or not {leaf.name for leaf in leaves} >= set(given):
            raise PlanError(
                f"the plan's sum {name} of {given} is not in this graph: trace the same model, or solve again"
            )
        assert root is not None
        _rebuild(root, leaves, own)
    drop_dead(made)
    made.graph.lint()
    made.recompile()
    return made


def _rebuild(root: fx.Node, leaves: list[fx.Node], own: list[tuple[str, ...]]) -> None:
    """Add up the groups one by one, and then to each other, at the place of `root`, which stays the last addition."""
    group_of = {name: group for group in own for name in group}
    parts: dict[tuple[str, ...], list[fx.Node]] = {}
    for leaf in leaves:
        parts.setdefault(group_of.get(leaf.name, (leaf.name,)), []).append(leaf)
    totals, count = [], 0

    def added(first: fx.Node, second: fx.Node) -> fx.Node:
        nonlocal count
        with root.graph.inserting_before(root):
            node = root.graph.create_node("call_function", torch.add, (first, second), {}, name=f"{root.name}_{count}g")
        note_like(node, root)
        count += 1
        return node

    for part in parts.values():
        total = part[0]
        for leaf in part[1:]:
            total = added(total, leaf)
        totals.append(total)
    whole = totals[0]
    for total in totals[1:-1]:
        whole = added(whole, total)
    root.args = (whole, totals[-1])


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two maps of its own shape."""
    return join_of(node) == "add" and len(node.args) == 2 and all(_alike(v, node) for v in node.all_input_nodes)


def _alike(value: fx.Node, node: fx.Node) -> bool:
    return shape_of(value) == shape_of(node)


def _is_root(node: fx.Node) -> bool:
    """Whether a node is the last of several additions."""
    return _is_sum(node) and not (len(node.users) == 1 and _is_sum(next(iter(node.users))))


def _inner(node: fx.Node) -> bool:
    return _is_sum(node) and len(node.users) == 1


def _leaves(root: fx.Node) -> list[fx.Node]:
    """The operands of nested additions, in order."""
    found: list[fx.Node] = []
    for value in root.args:
        assert isinstance(value, fx.Node)
        found += _leaves(value) if _inner(value) else [value]
    return found


def _parts(root: fx.Node) -> list[set[fx.Node]]:
    """The operands of each addition within nested ones."""
    found = [set(_leaves(root))]
    for value in root.args:
        assert isinstance(value, fx.Node)
        found += _parts(value) if _inner(value) else []
    return found


def _group(network: Network, states: States, leaf: fx.Node, series: dict[str, Series]) -> str:
    """The map that an operand is computed from exactly, by affine ops; itself if there is none."""
    branch = series.get(leaf.name)
    if branch is None or len(leaf.users) > 1 or not branch.layers:
        return leaf.name
    if any(layer.activation is not None for layer in branch.layers):
        return leaf.name
    found = states.branch_states(branch)
    if isinstance(found, Refusal) or len(found) != 1 or inexact(network, branch.layers, found[0].config) is not None:
        return leaf.name
    return branch.entry
