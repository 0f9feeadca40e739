"""Matches globs with module names: the name of a module also covers what is in it.

    "layer1"      layer1, layer1.0, layer1.0.conv2, ...       not layer10
    "layer1.*"    layer1.0, layer1.0.conv2, ...
    "*.conv2"     layer1.0.conv2, and what is inside it

The parts of a name between dots are containers, so a glob covers a path if it matches the path itself or a container
of it. A module that the tracer took as a whole (opaque) is also covered by a name of something inside it: who protects
`attn.proj` does not want `attn` to be replaced.

A glob that has no effect is a mistake of its writer, and is refused with names that are close to it.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from functools import cached_property

from torch import fx

from ..errors import OptionError
from ..graph.node_facts import path_of

__all__ = ["Globs", "covers"]

SHOWN = 200  # characters of a list of names


def covers(globs: Iterable[str], path: str) -> bool:
    """Whether one of `globs` matches a module path, or a container of it."""
    names = _containers(path)
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)


class Globs:
    """The module names of a traced graph, as `include` and `exclude` mean them."""

    def __init__(self, gm: fx.GraphModule, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> None:
        self.gm, self.include, self.exclude = gm, include, exclude
        self._paths: dict[str, tuple[str, ...]] = {}
        self._excluded: dict[str, str | None] = {}
        self._omitted: dict[str, str | None] = {}

    # --- single nodes ------------------------------------------------------------------------------------------------

    def excluded(self, node: str) -> str | None:
        """The path of a node that `exclude` covers, or of what is inside it; None if it may be touched."""
        if node not in self._excluded:
            self._excluded[node] = next((p for p in self.paths(node) if covers(self.exclude, p)), None)
        return self._excluded[node]

    def omitted(self, node: str) -> str | None:
        """The path of a node with weights that `include` is given for and does not cover; None otherwise.

        Norms and activations between included convs belong to them.
        """
        if not self.include or not self.weighted(node):
            return None
        if node not in self._omitted:
            path = self.paths(node)[0]
            self._omitted[node] = None if covers(self.include, path) else path
        return self._omitted[node]

    def leaves(self, node: str) -> bool:
        """Whether a node was to stay as it is; False for one that the graph does not have, such as a merged conv."""
        return node in self._nodes and (self.excluded(node) is not None or self.omitted(node) is not None)

    def paths(self, node: str) -> tuple[str, ...]:
        """The module path of a node, and those of everything inside its module."""
        if node not in self._paths:
            found = self._nodes[node]
            if found.op == "call_module":
                inside = self.gm.get_submodule(str(found.target)).named_modules(prefix=str(found.target))
                self._paths[node] = tuple(name for name, _ in inside)
            else:
                self._paths[node] = (path_of(found) or found.name,)
        return self._paths[node]

    def weighted(self, node: str) -> bool:
        """Whether a node's module holds a matrix: a convolution, a Linear, an opaque part; no norm, no activation."""
        found = self._nodes[node]
        if found.op != "call_module":
            return False
        return any(p.ndim > 1 for p in self.gm.get_submodule(str(found.target)).parameters())

    # --- globs without effect ----------------------------------------------------------------------------------------

    def check(self, convs: Iterable[str] | None = None) -> None:
        """Raises `OptionError` for a glob of `exclude` that covers no node of the graph, and for one of `include` that
        covers none of the nodes `convs` (None: none with weights)."""
        nodes = [n.name for n in self._nodes.values() if n.op not in ("placeholder", "output", "get_attr")]
        chosen = list(convs) if convs is not None else [n for n in nodes if self.weighted(n)]
        for glob in self.exclude:
            if not any(covers((glob,), p) for n in nodes for p in self.paths(n)):
                raise self._without_effect("exclude", glob, "protects nothing", nodes)
        for glob in self.include:
            if not any(covers((glob,), self.paths(n)[0]) for n in chosen):
                raise self._without_effect("include", glob, "selects nothing that could be merged", chosen)

    def _without_effect(self, option: str, glob: str, what: str, nodes: list[str]) -> OptionError:
        names = [n for n in self._names if n]
        matched = [n for n in names if covers((glob,), n)]
        useful = list(dict.fromkeys(p for n in nodes for p in self.paths(n)[:1]))
        if matched:
            seen = f"{option}={glob!r} {what}: it names {_listed(matched)}, of which nothing "
            seen += "is left in the traced graph" if option == "exclude" else "could be"
            return OptionError(f"{seen}; there {'are' if useful else 'is'} {_listed(useful) or 'nothing'}")
        close = _near(glob, names)
        meant = f"; did you mean {', '.join(close)}?" if close else ""
        return OptionError(f"{option}={glob!r} matches no module{meant}; the modules are {_listed(names)}")

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.gm.graph.nodes}

    @cached_property
    def _names(self) -> list[str]:
        """All names that a glob could match: modules, where functions came from, and what contains them."""
        names = [n for n, _ in self.gm.named_modules()]
        for node in self._nodes:
            names.extend(p for p in self.paths(node) if self._nodes[node].op not in ("placeholder", "output"))
        return list(dict.fromkeys(c for n in names for c in reversed(_containers(n))))


def _containers(path: str) -> list[str]:
    """The path, and every container of it, from the inside out."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _near(glob: str, names: list[str]) -> list[str]:
    """Names that may have been meant: spelt alike, or with the glob as a part."""
    plain = glob.strip("*.?")
    parts = [n for n in names if plain and plain in n]
    alike = difflib.get_close_matches(plain, names, n=3, cutoff=0.6)
    return list(dict.fromkeys([*alike, *parts]))[:3]


def _listed(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= SHOWN else text[:SHOWN].rpartition(", ")[0] + ", ..."
