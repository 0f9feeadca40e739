"""Cut a failing program down: leave out steps, return less, simplify modules, as long as it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.compare import Wrong
from tests.fuzz.program import Body, Program, Step
from tests.fuzz.properties import Shares, check

__all__ = ["reduce", "same_failure"]

_VALUE = re.compile(r"\bv\d+\b|\bx\b|\by\b")
_OPTION = re.compile(r", (?!groups)\w+=(\([^()]*\)|'[^']*'|[^,()]+)(?=[,)])")


def same_failure(error: Wrong, seed: int) -> Callable[[Program], bool]:
    """Whether another program fails in the way in which one did."""
    everything = any(w in error.kind for w in ("compress", "save", "export", "without a fix"))
    again = 100 if "trace of the trace" in error.kind or "twice" in error.kind else 0
    keys = 100 if error.kind.startswith("keys") else 0
    simplify = 100 if "simplif" in error.kind else 0
    slow = Shares(0, again, 0, 0, keys, simplify)
    if everything:
        slow = Shares(100, 100, 100, 100 if "export" in error.kind else 0, simplify=simplify)
    cause = type(error.__cause__)

    def fails(program: Program) -> bool:
        for offset in range(2):
            try:
                check(program, seed + offset, slow)
            except Wrong as found:
                if found.kind == error.kind and type(found.__cause__) is cause:
                    return True
            except Exception:  # the cut program is no program any more
                return False
        return False

    return fails


def reduce(program: Program, fails: Callable[[Program], bool], most: int = 250) -> Program:
    """The smallest program that was found within `most` tries; the program itself if it does not fail again."""
    if not fails(program):
        return program
    tries = 0
    progress = True
    while progress:
        progress = False
        for smaller in _cuts(program):
            tries += 1
            if tries > most:
                return program
            if fails(smaller):
                program, progress = smaller, True
                break
    return program


def _cuts(program: Program) -> Iterator[Program]:
    for index in reversed(range(len(program.bodies))):
        body = program.bodies[index]
        for i, step in enumerate(body.steps):  # stop early
            if step.out is not None and (i < len(body.steps) - 1 or body.result != step.out):
                yield _with(program, index, replace(body, steps=body.steps[: i + 1], result=step.out))
        for i in reversed(range(len(body.steps))):
            for smaller in _without(body, i):
                yield _with(program, index, smaller)
    for index, body in enumerate(program.bodies):
        for i, step in enumerate(body.steps):
            for simpler in _simpler(step):
                yield _with(program, index, replace(body, steps=(*body.steps[:i], simpler, *body.steps[i + 1 :])))


def _with(program: Program, index: int, body: Body) -> Program:
    bodies = list(program.bodies)
    bodies[index] = body
    last = bodies[-1]
    alive = [b for i, b in enumerate(bodies) if b is last or any(f"{b.name}()" in c.source() for c in bodies[i + 1 :])]
    return replace(program, bodies=tuple(alive))


def _without(body: Body, i: int) -> Iterator[Body]:
    """The class without a step; what the step gave is one of the values that it read."""
    out = body.steps[i].out
    before, after = body.steps[:i], body.steps[i + 1 :]
    if out is None:
        yield replace(body, steps=(*before, *after))
        return
    own = re.compile(rf"\b{out}\b")
    for value in dict.fromkeys(_VALUE.findall(body.steps[i].line.partition(" = ")[2])):
        renamed = tuple(Step(own.sub(value, s.line), s.makes) for s in after)
        yield replace(body, steps=(*before, *renamed), result=own.sub(value, body.result))


def _simpler(step: Step) -> Iterator[Step]:
    for i, make in enumerate(step.makes):
        for match in _OPTION.finditer(make):
            shorter = make[: match.start()] + make[match.end() :]
            yield replace(step, makes=(*step.makes[:i], shorter, *step.makes[i + 1 :]))
