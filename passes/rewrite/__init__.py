"""A plan becomes a network: the trainable form first, the merged form from it.

In: a traced graph and a `MergePlan`. Out: a GraphModule in which each composed span is a `LinearSpan` that can be
trained, and from it one with plain convolutions. Names and modules of untouched layers stay as they are.
"""

from .analysis import Analysis
from .trainable import merge, rewrite

__all__ = ["Analysis", "merge", "rewrite"]
