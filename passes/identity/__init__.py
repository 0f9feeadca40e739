"""Describes values, functions, modules and graphs as text, and hashes it: the keys of all that is stored.

In: any value, or a traced graph. Out: the same text for the same content and another one for other content, or the
word that it cannot be told for sure; then nothing is stored for it. Words: a *fingerprint* names a graph without the
values of its weights, a *digest* with them.
"""

from .fingerprint import fingerprint

__all__ = ["fingerprint"]
