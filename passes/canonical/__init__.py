"""One spelling for everything: functions, methods, permutes and slices become plain modules.

In: the raw graph of a tracer. Out: the same network in which every op that lmfx understands is one `call_module` of a
plain `torch.nn` type (or of `graph.modules`) and every join is `torch.add`, `sub`, `mul` or `cat`. Each file is one
rule; `canonical_form` applies them all. The values do not change: `trace` compares them with the model's.
"""

from .canonical_form import canonicalize

__all__ = ["canonicalize"]
