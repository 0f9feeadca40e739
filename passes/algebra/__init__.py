"""The algebra of convolutions with their values: composed, summed, concatenated, exactly.

In: modules and their parameters. Out: a `LinearOp`, which is y = conv(pad(x), W) + b, and `LinearSpan`, the trainable
module that is merged into one. Everything is computed in float64. Words: *kept* convs are composed, *pruned* ones are
replaced by the identity; a *side vector* is one number a channel that is added to a map from outside of the span.
"""

from .linear import LinearOp
from .linear_span import LinearSpan

__all__ = ["LinearOp", "LinearSpan"]
