"""`reconstruction`: minus the divergence of the network's output when only one candidate is applied. No labels.

    D = 1/2 mean_i |z'_i - z_i|^2 / mean_i |z_i - z|^2          z: the outputs of image i, z': with the candidate

The candidate's local error e = y' - y at its span's output (before the kept activation) is exact: the candidate is run
on the original network's value. How it reaches the output is taken to first order, which makes D second order:

    z' - z = J e        |J e|^2 = E over v of (v'J e)^2,  v of random signs      g = J'v, a backward pass a probe

`exact=True` runs the rest of the network instead. Fits are made from sampled pixels of three quarters of the images,
one Gram matrix for each (span start, stride) that serves every stop and kernel. They are judged on other images, one
half of the rest (the other half judges the compressed network): on the images that it was made from, a fit with more
unknowns than pixels has no error at all.

A least-squares fit gives a map of too small a variance where it fits badly, and batch norms after it, which have the
original's statistics, pass that on. Any training in train mode begins by putting that right. `norms="batch"` takes the
statistics of the scoring images after the candidate, in place of the stored ones: what is left is the error that new
statistics do not repair (Jordan et al. 2022, REPAIR). It ranks nearer to an importance by training than "kept" does,
which says what the network does as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lmfx.calibration.images import Calibration
from lmfx.environment.caller_state import entry
from lmfx.environment.progress import progress as progress_bar
from lmfx.importance.base import ImportanceTable, stored_scores, weights_identity
from lmfx.importance.change import MOST_CHOOSING, Scorer
from lmfx.importance.macs import multiply_accumulates
from lmfx.importance.pool import ExecutorLike, opened
from lmfx.latency.profiling import digest
from lmfx.passes.errors import InputError, OptionError
from lmfx.passes.identity.fingerprint import Identity
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.spans.layers import Network
from lmfx.store.rows import Store
from lmfx.store.shared_rows import Share

__all__ = ["Reconstruction", "ReconstructionSession"]

VERSION = 7
EXACT_MACS = 1e12  # some ten seconds on two cores
LEAST_EXACT = 8  # images; where fewer could be afforded, the second-order estimate on more is better
CANDIDATES_A_CONV = 10  # that are usually worth scoring


@dataclass(frozen=True)
class Reconstruction:
    """Output divergence of each candidate, estimated on at most `images` held-out images with `probes` probes.

    `exact` runs the network after the candidate instead of the second-order estimate, which can be wrong by a factor of
    30 for dropped convs in plain chains; None does so where eight images or more can be afforded, on as many as can.
    `surrogate` is what a composed span puts in place of the activations that it removes: "identity" (the paper) or
    "affine" (least squares). `norms` says what batch norms after the candidate use: "kept", the statistics that they
    have (for a network that is not trained further), or "batch", those of the scoring images (for one that is), which
    needs the network to be run, so `exact` must not be False.
    """

    exact: bool | None = None
    images: int = 64
    probes: int = 2
    surrogate: str = "affine"
    norms: Literal["kept", "batch"] = "kept"
    name: str = "reconstruction"

    def __post_init__(self) -> None:
        for option in ("images", "probes"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{option}={value!r}: use a whole number from 1")
        if self.surrogate not in ("affine", "identity"):
            raise OptionError(f"surrogate={self.surrogate!r}: use 'affine' or 'identity'")
        if self.norms not in ("kept", "batch"):
            raise OptionError(f"norms={self.norms!r}: use 'kept' or 'batch'")
        if self.norms == "batch" and self.exact is False:
            raise OptionError("norms='batch' runs the network after each candidate: use it with exact=True")

    @entry
    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """See `Estimator.score`. Rows are stored as they are made, under all that the network and the calibration data
        are; of those that cannot be told from all others, none is."""
        return self.session(spans, candidates, calibration).score(
            spans, candidates, calibration, store, progress, executor
        )

    def session(
        self, spans: SpanSet, candidates: Sequence[Candidate], calibration: Calibration | None
    ) -> ReconstructionSession:
        """An estimator for parts of `candidates`, in any order: what they need of the network is recorded once.

        Raises `InputError` without calibration images.
        """
        if calibration is None:
            raise InputError("importance='reconstruction' needs calibration images: pass calibration=")
        changing = [c for c in candidates if c.realization != "keep" and not c.exact]
        return ReconstructionSession(
            self.resolved(spans.network, usual_candidates(spans.network), calibration), spans, changing, calibration
        )

    def resolved(self, network: Network, candidates: int, calibration: Calibration) -> Reconstruction:
        """The same with `exact` decided for this many candidates.

        Tables are made for `usual_candidates`, not for what one of them happens to hold, so that all tables of one
        network and calibration share their rows: those of `compress` and of `lmfx.score`, of a round and of the whole.
        """
        if self.exact is not None:
            return self
        judged = min(self.images, len(calibration.split(self.images)[1]))
        cost = multiply_accumulates(network) * candidates / 2  # of one image; half of the network on average
        images = int(EXACT_MACS / max(cost, 1.0))
        if images >= min(judged, LEAST_EXACT) or self.norms == "batch":
            return replace(self, exact=True, images=max(min(images, judged), min(judged, LEAST_EXACT)))
        return replace(self, exact=False)


class ReconstructionSession:
    """Scores candidates of one graph on one set of images, in as many calls as one likes."""

    def __init__(
        self,
        options: Reconstruction,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration,
    ) -> None:
        self.options, self.spans, self.candidates, self.calibration = options, spans, candidates, calibration
        self.name = options.name

    @property
    def heavy(self) -> bool:
        """Whether the network is so large that not all that is at hand goes into each score."""
        options = self.options
        return not options.exact or options.images < min(MOST_CHOOSING, len(self.calibration.roles().choose))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the rows hold for."""
        options, spans = self.options, self.spans
        return {
            "estimator": options.name,
            "version": VERSION,
            "exact": options.exact,
            "images": options.images,
            "probes": options.probes,
            "surrogate": options.surrogate,
            "norms": options.norms,
            "activation_after": spans.options.activation_after,
            "prunes": spans.options.method not in ("depth", "exact"),  # else all convs of a span are composed
            "weights": self.network.digest,
            "calibration": self.calibration.digest(),
        }

    @functools.cached_property
    def network(self) -> Identity:
        """What the network is, with its values."""
        return weights_identity(self.spans.network.gm)

    @functools.cached_property
    def certain(self) -> bool:
        """Whether the rows can be told from those of all other networks and images."""
        return self.network.certain and self.calibration.certain()

    @functools.cached_property
    def scorer(self) -> Scorer:
        """What has the network's values."""
        return Scorer(self.options, self.spans, self.calibration, None, self.candidates)

    def score(
        self,
        spans: SpanSet,
        candidates: Sequence[Candidate],
        calibration: Calibration | None,
        store: Store | None = None,
        progress: bool = False,
        executor: ExecutorLike = None,
    ) -> ImportanceTable:
        """See `Estimator.score`; the spans and images are those of the session."""
        wanted = {c.key: c for c in candidates if c.realization != "keep" and not c.exact}
        identity = self.identity
        if not self.certain:
            store = None  # rows of another network might be taken for these
        rows = {c.key: 0.0 for c in candidates if c.realization == "keep" or c.exact}
        if store is not None:
            rows.update(stored_scores(store, identity, list(wanted)))
        todo = {k: c for k, c in wanted.items() if k not in rows}
        if todo:
            with (
                progress_bar(len(todo), "scoring (reconstruction)", progress) as bar,
                Share(store, "importance", identity) as share,
                opened(executor) as pool,
            ):

                def collect(keys: Iterable[str]) -> None:
                    """Takes what other processes have finished."""
                    for key, value in stored_scores(store, identity, list(keys)).items():
                        rows[key] = value
                        del todo[key]
                        bar.update(1)

                def take(some: Sequence[Candidate]) -> list[Candidate]:
                    """Those of some candidates that nobody has scored, or does now."""
                    mine = share.take([c.key for c in some])
                    collect(mine)
                    share.give_back([k for k in mine if k not in todo])
                    return [c for c in some if c.key in mine and c.key in todo]

                while todo:
                    self.scorer.executor = pool
                    for key, value in self.scorer.run(list(todo.values()), take):
                        del todo[key]
                        bar.update(1)
                        if not math.isfinite(value):
                            share.give_back([key])
                            continue  # its arithmetic overflows: without a row it cannot be chosen
                        rows[key] = value
                        if store is not None:
                            store.put("importance", identity, key, value)
                    while todo and not (free := share.take(todo, 1)):  # the rest is claimed by others
                        share.wait()
                        collect(todo)
                    if todo:  # given up by its process, or finished in this moment
                        share.give_back(free)
                        collect(todo)
        return ImportanceTable(rows, {**identity, "graph": digest(spans.network.gm)})


def usual_candidates(network: Network) -> int:
    """Roughly how many candidates of a network are scored, whatever the options are."""
    return CANDIDATES_A_CONV * sum(len(network.convs(region.series.layers)[1]) for region in network.regions)
