"""The 8-bit networks that ONNX Runtime is measured with: units of the faster form, and no network slower than in float.

    a row      the units of a workload in the form that is chosen for them between neighbours in 8 bits
    a whole    of the network of chosen forms, the one with all in 8 bits, and the float one, what runs fastest

Weights and ranges do not matter for the time, so they are made up here; `lmfx.int8.quantize` has the real ones.
For the same reason a network that was measured once is decided: the merged network with its real weights is the one
that the search had measured. Times are least ones, and one counts only when others came near to it; where they
contradict the rows (the chosen forms are never slower in their sum), all is measured for longer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lmfx.export.builder import require_onnx
from lmfx.int8.forms import Forms, FormTimes, UnitForm, byte_ends_of
from lmfx.int8.graph_view import GraphView, structure, view_of
from lmfx.int8.in_network import conversion_model, has_blocked_layout, in_int8_network
from lmfx.int8.qdq import with_qdq
from lmfx.int8.units import SCHEMES
from lmfx.latency.backend import WARM_MS
from lmfx.latency.blocked_layout import in_network
from lmfx.latency.sampling import Runner

__all__ = ["ChosenForms", "Int8Models"]

SAMPLES, LEAST_MS = 7, 1.0  # of a unit: the least of so many, each of so many ms
WHOLE_SAMPLES, MOST_WHOLE_SAMPLES = 5, 40
NEAR, NEAR_SAMPLES = 0.02, 3  # a least time counts when so many samples are within this share of it
KEPT = 4  # whole networks: the original is measured beside every plan
GAIN = 0.99  # an 8-bit network that takes more than this share of the float one's time is not worth what it loses


@dataclass(frozen=True)
class ChosenForms:
    """What was found for a whole network: the forms of its units, and the ms of each network that was tried."""

    forms: tuple[UnitForm, ...]
    ms: dict[str, float]  # "int8" (as chosen), "float32"
    pays: bool


class Int8Models:
    """Makes the models of one backend. `runner` takes model bytes, and whether they are optimised already."""

    def __init__(self, optimize: Callable[[bytes], Any], runner: Callable[[bytes, bool], Runner]) -> None:
        self.optimize, self.runner = optimize, runner
        self.scheme = SCHEMES["onnxruntime"]
        self.known: dict[str, tuple[ChosenForms, bytes]] = {}  # of whole networks, the newest few
        self.times: dict[Any, dict[str, float]] = {}  # ms of the networks that were tried, whatever their weights
        self.forms = Forms(self.scheme, FormTimes(self._float_ms, self._int8_ms, self._conversion_ms))

    def row(self, model: bytes) -> tuple[Any, list[str]]:
        """(the optimised model of a workload as inside a network, the ops that stay float in it)."""
        view = view_of(model)
        ends = byte_ends_of(view)
        forms = self.forms.choose(view, ends)
        names = {f.unit.name for f in forms if f.quantized}
        made = in_int8_network(view, self.scheme, lambda u: u.name in names, ends, self.optimize)
        return made, [f.unit.op for f in forms if not f.quantized]

    def whole(self, model: bytes) -> tuple[bytes, ChosenForms]:
        """The model of a whole network that runs fastest, and what was found."""
        key = hashlib.sha256(model).hexdigest()
        if key in self.known:
            found, made = self.known[key] = self.known.pop(key)  # the newest now
            return made, found
        view = view_of(model)
        forms = self.forms.choose(view)
        every = [replace(f, quantized=True) for f in forms]
        if not any(f.quantized and f.unit.kind == "weighted" for f in forms):
            forms = every  # what that takes is said, and no network without a layer in 8 bits is one in 8 bits
        tried = {"float32": model, "int8": self._with(view, forms)}
        if forms != every:
            tried["all int8"] = self._with(view, every)
        times = self._known_times(view, forms, tried)
        if times.get("all int8", times["int8"]) < times["int8"]:
            forms = every
            tried["int8"], times["int8"] = tried["all int8"], times["all int8"]
        layers = any(f.unit.kind == "weighted" for f in forms)
        pays = layers and times["int8"] < GAIN * times["float32"]
        found = ChosenForms(tuple(forms), {k: times[k] for k in ("int8", "float32")}, pays)
        while len(self.known) >= KEPT:
            del self.known[next(iter(self.known))]
        self.known[key] = found, tried["int8" if pays else "float32"]
        return self.known[key][1], found

    def _known_times(self, view: GraphView, forms: Sequence[UnitForm], tried: dict[str, bytes]) -> dict[str, float]:
        """What each takes, measured once for all networks of this structure."""
        key = (structure(view), tuple(f.quantized for f in forms))
        if key not in self.times:
            times = self._times(list(tried.values()))
            rows = sum((f.int8 if f.quantized else f.float32) - f.float32 for f in forms)
            if rows < 0 and min(times[1:]) >= GAIN * times[0]:  # not what the rows say
                again = self._times(list(tried.values()), MOST_WHOLE_SAMPLES)
                times = [min(pair) for pair in zip(times, again, strict=True)]
            self.times[key] = dict(zip(tried, times, strict=True))
        return dict(self.times[key])

    def _with(self, view: GraphView, forms: Sequence[UnitForm]) -> bytes:
        units = [f.unit for f in forms if f.quantized]
        return bytes(with_qdq(view, units, self.scheme).SerializeToString())

    def _times(self, models: Sequence[bytes], least: int = WHOLE_SAMPLES) -> list[float]:
        """The least time of each, of at least so many rounds in which all run.

        Short networks run once before each sample, as in `measure_interleaved`: those that run most often in a sample
        would pay least for finding the caches full of another's weights.
        """
        runners = [self.runner(m, False) for m in models]
        try:
            once = [min(r.time(1), r.time(1)) for r in runners]
            counts = [max(1, round(LEAST_MS / max(ms, 1e-4))) for ms in once]
            rounds: list[list[float]] = []
            while len(rounds) < least or (len(rounds) < MOST_WHOLE_SAMPLES and not _sure(rounds)):
                rounds.append([])
                for r, n, ms in zip(runners, counts, once, strict=True):
                    if ms <= WARM_MS:
                        r.time(1)
                    rounds[-1].append(r.time(n) / n)
            return [min(times) for times in zip(*rounds, strict=True)]
        finally:
            for r in runners:
                r.close()

    def _float_ms(self, model: bytes) -> float:
        return self._ms(in_network(model, self.optimize))

    def _int8_ms(self, model: bytes) -> float:
        view = view_of(model)
        ends = [n for n in (*view.inputs, *view.outputs) if n in view.floating]
        return self._ms(in_int8_network(view, self.scheme, lambda unit: True, ends, self.optimize))

    def _conversion_ms(self, shape: tuple[int, ...], to_int8: bool) -> float:
        return self._ms(conversion_model(require_onnx(), shape, to_int8, self._blocked))

    @cached_property
    def _blocked(self) -> bool:
        return has_blocked_layout(require_onnx(), self.optimize)

    def _ms(self, model: Any) -> float:
        runner = self.runner(model.SerializeToString(), True)
        try:
            once = min(runner.time(1) for _ in range(2))
            count = max(1, round(LEAST_MS / max(once, 1e-4)))
            return min(runner.time(count) / count for _ in range(SAMPLES))
        finally:
            runner.close()


def _sure(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether a few samples of each network came near to its least."""
    return all(
        sum(ms <= (1 + NEAR) * min(samples) for ms in samples) >= NEAR_SAMPLES for samples in zip(*rounds, strict=True)
    )
