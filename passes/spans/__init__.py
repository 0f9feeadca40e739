"""Finds which parts of a traced network could become one convolution, and why the others cannot.

In: a canonical GraphModule. Out: regions (series-parallel parts), their layers, and for every run of layers (a *span*)
its candidates or a `Refusal`. Words: a *candidate* is one way to realize a span (`keep`, `compose`, `fit`, `drop`) with
the configuration of its convolution; a *state* is what a run of layers is as one convolution for one way to prune it.
"""

from .enumeration import SpanOptions, SpanSet, enumerate_spans
from .layers import Network

__all__ = ["Network", "SpanOptions", "SpanSet", "enumerate_spans"]
