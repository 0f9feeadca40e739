"""Reads the state of an NVIDIA GPU while something is measured on it: its SM clock, and what holds that back.

Read through `pynvml` (nvidia-ml-py) where it can be imported, which takes microseconds; else by running `nvidia-smi`
once a row; else nothing is known, and nothing is recorded.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
from typing import Any

import torch

from lmfx.latency.sampling import Sampling

__all__ = ["Conditions", "Monitor", "monitor_of", "sampling_on"]

# The bits of nvmlClocksEventReasons that are worth telling: idling and user settings slow nothing down by themselves.
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
QUERIES = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second until driver 535
SMI_SECONDS = 5.0


class Monitor:
    """Reads one GPU. `fast` says whether a reading may be taken between two samples."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.nvml, self.handle = _open_nvml(index)
        self.fast = self.nvml is not None

    @functools.cached_property
    def driver(self) -> str:
        """The driver's version, or "" if nothing tells it."""
        if self.nvml is not None:
            try:
                found = self.nvml.nvmlSystemGetDriverVersion()
            except self.nvml.NVMLError:
                return ""
            return found.decode() if isinstance(found, bytes) else str(found)
        return (self._ask("driver_version") or [""])[0]

    def read(self) -> tuple[int, int] | None:
        """SM clock in MHz and the bits of the reasons, or None if nothing tells them."""
        if self.nvml is not None:
            try:
                clock = int(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))
                ask = getattr(self.nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
                ask = ask or self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons
                return clock, int(ask(self.handle))
            except self.nvml.NVMLError:  # not every GPU and not every container tells
                return None
        for query in QUERIES:
            found = self._ask(f"clocks.sm,{query}")
            if found is not None and len(found) == 2:
                try:
                    return int(float(found[0])), int(found[1], 16)
                except ValueError:  # "[N/A]"
                    return None
        return None

    def _ask(self, query: str) -> list[str] | None:
        command = ["nvidia-smi", f"--id={self.index}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = done.stdout.strip().splitlines()
        return [cell.strip() for cell in lines[0].split(",")] if done.returncode == 0 and lines else None


class Conditions:
    """What a monitor told over the samples of one row."""

    def __init__(self, monitor: Monitor | None, facts: dict[str, Any] | None = None) -> None:
        self.monitor = monitor
        self.facts = facts or {}
        self.clocks: list[int] = []
        self.bits = 0

    def sample(self) -> None:
        """Takes a reading, if that is quick enough to do after every sample."""
        if self.monitor is not None and self.monitor.fast:
            self._take()

    def as_dict(self) -> dict[str, Any]:
        """JSON values: `sm_mhz` (lowest and highest) and `throttle` (reasons), where known, and the facts."""
        if self.monitor is not None and not self.monitor.fast and not self.clocks:
            self._take()
        known: dict[str, Any] = {}
        if self.clocks:
            reasons = [text for bit, text in REASONS.items() if self.bits & bit]
            known = {"sm_mhz": [min(self.clocks), max(self.clocks)], "throttle": reasons}
        return {**known, **self.facts}

    def _take(self) -> None:
        assert self.monitor is not None
        found = self.monitor.read()
        if found is not None:
            self.clocks.append(found[0])
            self.bits |= found[1]


def sampling_on(index: int, sampling: Sampling | None) -> Sampling:
    """The sampling that was asked for, else one whose batches of rows fill a quarter of the GPU's memory."""
    if sampling is not None:
        return sampling
    try:
        total = int(torch.cuda.get_device_properties(index).total_memory)
    except (AssertionError, RuntimeError):  # no such device, which is told later
        return Sampling()
    return Sampling(batch_bytes=max(Sampling().batch_bytes, total // 4))


@functools.cache
def monitor_of(index: int) -> Monitor:
    """The monitor of a CUDA device, made once."""
    return Monitor(index)


def _open_nvml(index: int) -> tuple[Any, Any]:
    """(pynvml, handle), or (None, None). NVML counts all GPUs, CUDA the visible ones, so the UUID decides."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # absent, or its library is: NVMLError is defined in what could not be imported
        return None, None
    try:
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (AttributeError, RuntimeError, AssertionError, nvml.NVMLError):
        pass
    try:
        return nvml, nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return None, None
