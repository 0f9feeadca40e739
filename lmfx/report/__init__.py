"""Reports what was done, as text and tables for people."""

from lmfx.report.text import Report, report

__all__ = ["Report", "report"]
