"""The version, in one place: setup.py reads this file as text, `lmfx/__init__.py` imports it."""

__version__ = "0.1.0"
