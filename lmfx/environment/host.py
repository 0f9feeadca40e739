"""Reads the facts of the machine on which a latency depends."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["cpu_name", "host_facts"]


@functools.cache
def cpu_name() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    # virtual machines hide the marketing name, and family and model still tell two generations apart
    detail = " ".join(f"{k} {fields[k]}" for k in ("cpu family", "model") if k in fields)
    return f"{name} ({detail})" if detail else name


@functools.cache
def host_facts() -> dict[str, Any]:
    """Operating system, architecture and number of cores."""
    return {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
