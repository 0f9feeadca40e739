"""Finds the fastest plan whose network still does a given share of what the original did, by measuring it.

    kept(plan) = agreement of the arg-max (1 - divergence where nothing is a score), on all images that no fit saw,
                 and where these are fewer than 128 on as many more that fits have seen
    taken      where  a - its standard error >= keep,  a the agreement (`lmfx.quality.measures`)

The fastest of many plans that just agree often enough does so by chance on these images, and on others less often; so
an agreement has to be enough with its standard error to spare (127 of 128 images for 0.98, where each is one row).

Faster plans keep less, nearly always, so the interval between a latency that keeps enough and one that does not is
halved. Each step builds, fits and judges the best plan that is proposed there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from torch import fx

from lmfx.calibration.images import COMPARED, Calibration
from lmfx.passes.errors import OptionError
from lmfx.passes.ir import MergePlan
from lmfx.planning.frontier import Frontier
from lmfx.planning.joint_search import Proposal
from lmfx.planning.judged import Judged
from lmfx.quality import Judge, Quality

__all__ = ["Kept", "fastest_that_keeps", "keeping_judge", "parse_keep"]

STEPS = 6


@dataclass(frozen=True)
class Kept:
    """A plan and the share that its network keeps."""

    proposal: Proposal
    share: float


def parse_keep(value: float | str) -> float:
    """A share from 0.98 or "98%". Raises `OptionError` for anything that is no share above 0."""
    text = value.strip() if isinstance(value, str) else value
    try:
        if isinstance(text, str):
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        else:
            share = float(text) if isinstance(text, Real) and not isinstance(text, bool) else float("nan")
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise OptionError(f'keep={value!r}: write the share that must still agree, like 0.98 or "98%"')
    return share


def keeping_judge(judged: Judged) -> Judge:
    """What says how much a network keeps: on all images that no fit saw, and where these are few, as many others."""
    roles = judged.roles
    pooled = roles.choose if roles.seen else Calibration.joined(roles.choose, roles.judge)
    more = 0 if roles.seen else min(COMPARED - len(pooled), len(pooled), len(roles.fit))
    if more > 0:
        pooled = Calibration.joined(pooled, roles.fit.evenly(more))
    return Judge(judged.analysis.graph, pooled, held_out=not roles.seen and more <= 0)


def fastest_that_keeps(
    judged: Judged, frontier: Frontier, keep: float, judge: Callable[[fx.GraphModule], Quality] | None = None
) -> Kept:
    """The fastest plan that keeps the share `keep`, by a judge of students; an empty one where every change loses more
    than that."""
    judge = judge or keeping_judge(judged)
    none = MergePlan((), judged.analysis.fingerprint, surrogate=judged.surrogate)
    best = Kept(Proposal(none, frontier.original_sum, 0.0), 1.0)
    low, high = float(frontier.raw.latency[0]), frontier.original_sum
    for step in range(STEPS):
        limit = low if step == 0 else (low + high) / 2
        proposals = judged.proposals(limit)
        if not proposals:
            continue
        quality = judge(judged.students.student(proposals[0].plan))
        if quality.surely_kept >= keep:
            best, high = Kept(proposals[0], quality.kept), min(limit, proposals[0].sum)
            if step == 0:
                break
        else:
            low = limit
    return best
