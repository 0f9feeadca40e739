"""The one place on disk for what was measured and scored: a folder of small files, a row each, shared by processes.

In: rows (kind, identity, key, value). Out: the same rows after a kill, in another process or on another machine. A
damaged row is put aside and never believed.
"""

from lmfx.store.rows import Store, default_cache_dir

__all__ = ["Store", "default_cache_dir"]
