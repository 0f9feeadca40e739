"""An nn.Module becomes a GraphModule in canonical form.

In: a model and an example input. Out: a `torch.fx.GraphModule` that computes the same, whose nodes carry shape, dtype
and the path of the module they came from. Three tracers are tried (`tracers`, `shape_tracer`, `exported`); words: an
*opaque* submodule is one that no tracer could follow, kept as it is with the reason.
"""

from .tracing import trace

__all__ = ["trace"]
