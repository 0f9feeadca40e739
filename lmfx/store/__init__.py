"""The one place on disk for what was measured and scored: an sqlite file of rows, shared by processes.

In: rows (kind, identity, key, value). Out: the same rows after a kill, in another process or on another machine. A
damaged file is put aside and never believed.
"""

from lmfx.store.rows import Store, default_cache_dir

__all__ = ["Store", "default_cache_dir"]
