"""Some hundred random networks in the default run, and that the fuzzer itself finds what is wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lmfx.passes.algebra import linear_span
from lmfx.passes.trace import tracing as trace
from tests.fuzz.chunk import run_chunk
from tests.fuzz.compare import Wrong, check_same, structure
from tests.fuzz.networks import random_program
from tests.fuzz.program import Body, Program, Step
from tests.fuzz.properties import Shares, check
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNKS, NETWORKS = 10, 40
SHARES = Shares(compress=5, again=30, save=60, onnx=3, keys=6, simplify=8)
REACHED = ("tracer symbolic", "tracer shapes", "tracer export", "oracle", "another size", "compressed", "saved")
REACHED += ("keys: told apart", "simplified")


@pytest.fixture(scope="session")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the counts of each chunk; the workers of one run (pytest-xdist) have one for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "fuzz"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_property_holds_on_random_networks(chunk: int, chunks: Path) -> None:
    result = run_chunk(30 + chunk, NETWORKS, SHARES)
    assert result["networks"] == NETWORKS
    records = [json.loads(r) for r in result["failures"]]
    assert not records, "\n\n".join(f"{r['error']}\n{r['source']}" for r in records)
    counts = {**result["events"], "networks": result["networks"]}
    part = chunks / f"{chunk}.part"
    part.write_text(json.dumps(counts))
    part.replace(chunks / f"{chunk}.json")
    done = [json.loads(file.read_text()) for file in chunks.glob("*.json")]
    if len(done) == CHUNKS:  # the last one that ends, wherever it ran
        check_reached(sum(map(Counter, done), Counter()))


def check_reached(seen: Counter[str]) -> None:
    """The networks are of many kinds, and every slow check was made on some."""
    assert seen["networks with a merged span"] > 0.4 * seen["networks"]
    assert seen["does not run"] + seen["not finite"] < 0.02 * seen["networks"]
    for event in REACHED:
        assert seen[event], f"no network had {event!r}"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"networks with a merged span": 40}, "40"),
        ({"does not run": 1, "not finite": 1}, "assert"),
        *(({event: 0}, event) for event in REACHED),
    ],
)
def test_networks_that_reach_too_little_are_noticed(change: dict[str, int], text: str | None) -> None:
    seen = Counter({"networks": 100, "networks with a merged span": 60, **dict.fromkeys(REACHED, 1), **change})
    if text is None:
        return check_reached(seen)
    with pytest.raises(AssertionError, match=text):
        check_reached(seen)


# --- the fuzzer can fail ----------------------------------------------------------------------------------------------


def program(*lines: str, makes: tuple[str, ...] = (), result: str = "", size: int = 9) -> Program:
    steps = tuple(Step(line, makes if i == 0 else ()) for i, line in enumerate(lines))
    body = Body("Net", ("x",), steps, result or str(steps[-1].out))
    return Program((body,), {"x": (2, 4, size, size)}, {"x": (1, 4, size + 3, size + 2)})


TWO = program(
    "v1 = self.a(x)",
    "v2 = v1.relu()",
    "v3 = self.b(v2)",
    makes=("self.a = nn.Conv2d(4, 4, 3, padding=1)", "self.b = nn.Conv2d(4, 4, 3)"),
)


def failing(seeds: int = 12) -> str:
    for seed in range(seeds):
        try:
            check(TWO, seed, Shares(0, 0, 0, 0, 0, 0))
        except Wrong as error:
            return error.kind
    return ""


def test_the_properties_hold_on_two_convs() -> None:
    assert failing() == ""


def test_a_merged_conv_with_a_wrong_bias_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = linear_span.LinearSpan.reparameterize

    def wrong(self: Any) -> Any:
        module = whole(self)
        conv = module[1] if isinstance(module, torch.nn.Sequential) else module
        conv.bias.data += 1e-9
        return module

    monkeypatch.setattr(linear_span.LinearSpan, "reparameterize", wrong)
    assert failing() in ("merged is not trainable", "oracle")


def test_a_trace_that_writes_into_the_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    amount = 0.0

    def careless(model: Any, x: Any) -> Any:
        model.a.weight.data += amount
        return trace.trace(model, x)

    monkeypatch.setattr("tests.fuzz.properties.trace", careless)
    assert failing() == ""  # adding nothing changes nothing
    amount = 1e-9
    assert failing() == "the model was changed"


def test_a_traceback_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("conv")

    monkeypatch.setattr("tests.fuzz.properties.enumerate_spans", broken)
    assert failing() == "spans"


def test_outputs_of_another_type_or_shape_are_found() -> None:
    x = torch.ones(1, 2)
    check_same("same", {"a": x}, {"a": x + 0}, 0)
    for other in ({"b": x}, (x,), {"a": x[:, :1]}, {"a": x.double()}, {"a": x, "b": None}):
        with pytest.raises(Wrong, match="became"):
            check_same("same", {"a": x}, other, 1)
    with pytest.raises(Wrong, match="relative error"):
        check_same("same", x, x * (1 + 1e-6), 1e-9)


def test_a_program_is_the_same_after_a_round_trip() -> None:
    for seed in range(20):
        drawn = random_program(seed)
        again = Program.loads(drawn.dumps(plan=1))
        assert again.source == drawn.source == random_program(seed).source
        first, second = drawn.build().state_dict(), again.build().state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        assert structure(drawn.example()) == structure(again.example())
