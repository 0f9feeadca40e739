"""What was done, for people."""

from lmfx.report.text import Report, report

__all__ = ["Report", "report"]
