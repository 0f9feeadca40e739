"""Whole random networks: inputs, a body, outputs. `programs` is the Hypothesis strategy, `program` what it does."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.blocks import meet, series
from tests.fuzz.convs import conv
from tests.fuzz.program import Program, laid_out
from tests.fuzz.writer import Draw, Names, Scope

__all__ = ["program", "programs", "random_program"]


@cache
def _below(n: int) -> st.SearchStrategy[int]:
    return st.integers(0, n - 1)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random networks that run on their inputs."""
    return program(Draw(lambda n: draw(_below(n)) if n > 1 else 0))


def random_program(seed: int) -> Program:
    """The same without Hypothesis: one number is the whole network."""
    return program(Draw(random.Random(seed).randrange))


def program(draw: Draw) -> Program:
    ndim = draw.pick((2, 2, 2, 2, 2, 2, 1, 1, 3))
    channels = draw.pick((3, 4, 1, 6, 8, 2))
    sizes = {1: (12, 17, 31, 5, 1), 2: (9, 8, 13, 5, 2, 1, 16), 3: (5, 6, 4, 1)}[ndim]
    first = draw.pick(sizes)
    size = (first,) * ndim if draw.chance(3) else tuple(draw.pick(sizes) for _ in range(ndim))
    grow = draw.between(1, 4)
    batches = draw.pick((2, 1)), draw.pick((1, 2, 3))
    inputs = {"x": (batches[0], channels, *size)}
    other = {"x": (batches[1], channels, *(n + grow for n in size))}
    extra = draw.below(10)
    if extra == 1:
        inputs["y"], other["y"] = inputs["x"], other["x"]
    elif extra == 2:
        inputs["y"], other["y"] = (batches[0], 5), (batches[1], 5)
    elif extra == 3:
        width = draw.between(1, 6)
        inputs["y"] = (batches[0], width, *(max(1, n // 2) for n in size))
        other["y"] = (batches[1], width, *(max(1, n // 2) for n in other["x"][2:]))
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {k: torch.randn(v, generator=generator) for k, v in inputs.items()}
    form = draw.pick(("plain",) * 20 + ("channels last", "list", "dict"))
    if form == "channels last":
        values = {k: laid_out(v) for k, v in values.items()}
    constants: dict[str, Any] = {}
    if form == "plain" and draw.chance(8):
        constants = draw.pick(({"scale": 1.5, "flag": True}, {"scale": 2}))
    values |= constants
    if form in ("list", "dict"):
        held = values
        values = {"given": list(held.values()) if form == "list" else held}
    scope = Scope(draw, Names(), "Net", values)
    scope.maps = ["x"]
    v = "x"
    for i, name in enumerate(inputs if form in ("list", "dict") else ()):
        scope.run(f"{name} = given[{i if form == 'list' else repr(name)}]")
    if draw.chance(4):
        v = scope.let(f"{v} * 1") or v  # else the network may write into its input
    if not draw.chance(12):
        v = conv(scope, v)
    v = series(scope, v, 1, draw.pick((1, 0)))
    if "y" in inputs:
        v = side(scope, v, extra)
    v = series(scope, v, draw.pick((2, 3, 4, 1)), draw.pick((2, 3, 1, 2, 4)))
    if "scale" in constants:
        v = scope.let(f"{v} * scale") or v
    if "flag" in constants:
        v = scope.let(f"{v}.relu() if flag else {v}") or v
    if draw.chance(3):
        v = head(scope, v)
    result = outputs(scope, v)
    seed = draw.below(1000)
    scope.close(result)
    args = scope.args
    if (
        "y" in inputs and form == "plain" and not constants and draw.chance(5)
    ):  # an argument that the example does not give
        args = (*args, "flag=None", "scale=1.0")
    body = scope.names.bodies[-1]
    scope.names.bodies[-1] = type(body)(body.name, args, body.steps, body.result)
    keywords = form in ("plain", "channels last") and draw.chance(10)
    return Program(tuple(scope.names.bodies), inputs, other, seed, keywords, constants, form)


def side(s: Scope, v: str, kind: int) -> str:
    """A second input joins the first: a map, a vector for each image (a time embedding), a smaller map."""
    draw, shape = s.draw, s.shape(v)
    ndim = len(shape) - 2
    if kind == 2:
        name, ones = s.attribute("emb"), ", ".join(["None"] * ndim)
        make = f"{name} = nn.Linear(5, {shape[1]})"
        vector = s.let(draw.pick((f"{name}(y)", f"{name}(F.silu(y))")), make)
        if vector is None:
            return v
        spread = draw.pick((f"{vector}[:, :, {ones}]", f"{vector}.view({vector}.shape[0], -1{', 1' * ndim})"))
        made = s.let(draw.pick((f"{v} + {spread}", f"{v} * (1 + {spread})", f"{spread} + {v}")))
        return made or v
    w = series(s, "y", 1, draw.pick((1, 2)))
    if s.shape(w)[2:] != shape[2:]:
        w = s.let(f"F.interpolate({w}, size={v}.shape[2:])") or w
    return meet(s, [v, w], draw.pick(("add", "cat", "mul", "sub"))) or v


def head(s: Scope, v: str) -> str:
    """A classifier."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    dims = tuple(range(2, ndim + 2))
    pooled = s.let(
        draw.pick(
            (
                f"{v}.mean({dims})",
                f"F.adaptive_avg_pool{ndim}d({v}, 1).flatten(1)",
                f"torch.flatten(F.adaptive_max_pool{ndim}d({v}, 1), 1)",
                f"F.adaptive_avg_pool{ndim}d({v}, 1).view({v}.shape[0], -1)",
                f"{v}.amax({dims})",
                f"{v}.mean({dims}, keepdim=True).squeeze()",
                f"{v}.flatten(1)",
            )
        )
    )
    if pooled is None or s.env[pooled].dim() != 2:
        return v
    channels = s.shape(pooled)[1]
    for _ in range(draw.pick((1, 2, 3))):
        name, width = s.attribute("fc"), draw.between(1, 8)
        make = f"{name} = nn.Linear({channels}, {width}, bias={not draw.chance(3)})"
        made = s.let(f"{name}({pooled})", make)
        if made is None:
            break
        pooled, channels = made, width
        if draw.chance(3):
            name = s.attribute("bn")
            pooled = s.let(f"{name}({pooled})", f"{name} = nn.BatchNorm1d({channels})") or pooled
        if draw.chance(3):
            after = draw.pick(("F.relu({v})", "F.dropout({v}, 0.5, self.training)", "{v}.tanh()", "{v} * 2"))
            pooled = s.let(after.format(v=pooled)) or pooled
    if draw.chance(4):
        pooled = s.let(f"F.log_softmax({pooled}, 1)") or pooled
    return pooled


def outputs(s: Scope, v: str) -> str:
    """The expression that is returned: one value most often, or several in some container."""
    draw = s.draw
    form = draw.below(18)
    older = [m for m in s.maps if isinstance(s.env.get(m), Tensor)]
    w = draw.pick(older) if older and form else v
    options = {
        1: f"({v}, {w})",
        2: f"[{v}, {w}]",
        3: f"{{'out': {v}, 'aux': {w}}}",
        4: f"Pair({v}, {w})",
        5: f"Pair({v}, ({w}, {v}))",
        6: f"{{'out': [{v}], 'aux': ({w}, None)}}",
        7: f"OrderedDict(out={v}, aux={w})",
        8: f"Output({v}, {w})",
        9: f"({v}, {v}.argmax(1))",
        10: f"({v}, x)",
    }
    return options.get(form, v)
