"""A traced graph takes what its model takes and gives what its model gives, by any tracer."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lmfx.passes.errors import InputError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.interface import plain_face, plain_output, strip
from lmfx.passes.trace.tracing import trace
from tests.helpers import ops_of

TRACERS = ("symbolic", "shapes", "export")
X = torch.randn(2, 3, 6, 5, dtype=torch.float64)


class Pair(NamedTuple):
    map: Tensor
    mean: Tensor


@dataclass
class Result:
    """A plain dataclass, which no library registers."""

    map: Tensor
    mean: Tensor | None = None
    note: str = "none"


@dataclass(frozen=True)
class Frozen:
    map: Tensor
    extra: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.extra, int):
            raise ValueError("an __init__ that does more than to keep its arguments")


class Output(OrderedDict):  # type: ignore[type-arg]
    """A dict whose items are attributes too, as libraries of models define one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


OUTPUTS: dict[str, Any] = {
    "tensor": lambda y, z: y,
    "tuple": lambda y, z: (y, [z, None], 3),
    "dict": lambda y, z: {"map": y, "deep": {"mean": z}},
    "ordered": lambda y, z: OrderedDict([("0", y), ("pool", z)]),
    "output": lambda y, z: Output(map=y, mean=z),
    "pair": lambda y, z: Pair(y, z),
    "result": lambda y, z: Result(y, z),
    "part of a result": lambda y, z: Result(y),
    "frozen": lambda y, z: Frozen(y, {"mean": z}),
    "nested": lambda y, z: (Pair(y, z), [Result(z)], {"o": Output(a=z)}),
    "twice": lambda y, z: (y, y),
}


class Net(nn.Module):
    def __init__(self, output: Any = OUTPUTS["tensor"]) -> None:
        super().__init__()
        self.conv, self.output = nn.Conv2d(3, 3, 3, padding=1), output

    def forward(self, x: Tensor, scale: float = 2.0, *, flag: bool = True, return_dict: bool = True) -> Any:
        y = self.conv(x) * scale if flag else x
        made = self.output(y, y.mean((2, 3)))
        return made if return_dict else tuple(made)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(same(i, j) for i, j in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_is_what_the_models_output_is(kind: str, tracer: str) -> None:
    model = Net(OUTPUTS[kind]).double().eval()
    gm = trace(model, X, tracers=(tracer,))
    with torch.no_grad():
        expected, seen, copied = model(X), gm(X), copy.deepcopy(gm)(X)
    assert same(expected, seen) and same(expected, copied)
    assert relative_error(expected, seen) == 0
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    assert ops_of(gm)[:2] == ["Conv2d", "ChannelAffine"]
    assert not isinstance(output, (Pair, Result, Output))  # plain to the passes


def test_attributes_of_an_output_survive() -> None:
    gm = trace(Net(OUTPUTS["output"]).double().eval(), X)
    assert torch.equal(gm(X).map, gm(X)["map"])


def test_plain_outputs_need_no_restoring() -> None:
    assert strip((1, [X], {"a": None}))[1] is None
    plain = plain_output(Output(a=X, b=[Pair(X, X)]))
    assert type(plain) is dict and type(plain["b"][0]) is tuple


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracer", TRACERS)
def test_defaults_are_constants_that_the_graph_accepts_and_no_other_values(tracer: str) -> None:
    model = Net().double().eval()
    gm = trace(model, X, tracers=(tracer,))
    with torch.no_grad():
        assert torch.equal(gm(X), gm(x=X)) and torch.equal(gm(X), gm(X, 2.0, flag=True, return_dict=True))
        with pytest.raises(InputError, match="traced with scale=2.0 and computes nothing else, not scale=3.0"):
            gm(X, 3.0)
        with pytest.raises(InputError, match="flag=True"):
            gm(X, flag=False)
        with pytest.raises(TypeError, match="unexpected keyword"):
            gm(X, other=1)


def test_a_number_in_the_example_is_a_value_where_it_can_be_and_a_constant_elsewhere() -> None:
    model = Net().double().eval()
    gm = trace(model, (X, 3.0), tracers=("symbolic",))
    with torch.no_grad():
        assert torch.equal(gm(X, 0.5), model(X, 0.5))
    for tracer in ("shapes", "export"):
        gm = trace(model, (X, 3.0), tracers=(tracer,))
        with torch.no_grad():
            assert torch.equal(gm(X, 3.0), model(X, 3.0))
            with pytest.raises(InputError, match="scale=3.0"):
                gm(X, 0.5)


@pytest.mark.parametrize("tracer", TRACERS)
def test_flags_of_the_example_choose_the_branch(tracer: str) -> None:
    model = Net(OUTPUTS["output"]).double().eval()
    example = {"x": X, "return_dict": False}
    gm = trace(model, example, tracers=(tracer,))
    with torch.no_grad():
        assert gm(**example) == ("map", "mean")
        with pytest.raises(InputError, match="return_dict=False"):
            gm(X, return_dict=True)


def test_a_graph_with_defaults_can_be_copied_through_its_code() -> None:
    import importlib

    pickle = importlib.import_module("pickle")  # what callers do with a graph module is theirs
    model = Net(OUTPUTS["dict"]).double().eval()
    gm = pickle.loads(pickle.dumps(trace(model, X)))
    with torch.no_grad():
        assert relative_error(model(X), gm(X)) == 0


class Steps(nn.Module):
    """A sample, a time step in any form, and optional conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(4, 3)

    def forward(self, sample: Tensor, timestep: Any, context: Tensor | None = None, return_dict: bool = True) -> Any:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif torch.is_tensor(timestep) and len(timestep.shape) == 0:
            timestep = timestep[None].to(sample.device)
        timestep = timestep * torch.ones(sample.shape[0], dtype=timestep.dtype, device=timestep.device)
        timestep = timestep.expand(sample.shape[0])
        assert len(timestep.shape) == 1
        angles = timestep[:, None].float() * torch.exp(-torch.arange(2, dtype=torch.float32))[None, :]
        features = torch.cat([angles.sin(), angles.cos()], -1).to(dtype=sample.dtype)
        y = self.conv(sample) + self.time(features)[:, :, None, None]
        if context is not None:
            y = y + context.mean()
        return Output(sample=y) if return_dict else (y,)


@pytest.mark.parametrize("tracer", ("shapes", "export"))
@pytest.mark.parametrize(
    "rest",
    [(torch.tensor(10),), (torch.tensor([3, 7]),), (10,), (torch.tensor(4), torch.randn(2, 3).double())],
    ids=["scalar", "batch", "number", "context"],
)
def test_a_time_step_is_a_scalar_a_batch_or_a_number(rest: Any, tracer: str) -> None:
    model = Steps().double().eval()
    gm = trace(model, (X, *rest), tracers=(tracer,))
    with torch.no_grad():
        assert same(model(X, *rest), gm(X, *rest))
        if isinstance(rest[0], Tensor):
            other = (rest[0] + 5, *rest[1:])
            assert same(model(X, *other), gm(X, *other))
        else:
            with pytest.raises(InputError, match="timestep=10"):
                gm(X, 11)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images: list[Tensor], table: dict[str, Any], *more: Tensor, **named: Tensor) -> Tensor:
        total = sum(self.conv(i) for i in images) * table["scale"][0] + table["bias"]
        for value in (*more, *named.values()):
            total = total + value
        return total if len(images) == 2 else total * 2


@pytest.mark.parametrize("tracer", TRACERS)
def test_arguments_in_containers_and_variable_ones_are_inputs_too(tracer: str) -> None:
    from lmfx.passes.trace.tracing import annotate

    model = Nested().double().eval()
    table = {"scale": (torch.tensor(2.0).double(),), "bias": 3}
    example = ([X, X * 2], table, X * 3)
    gm = trace(model, example, tracers=(tracer,))
    other = ([X * 5, X], {"scale": (torch.tensor(0.5).double(),), "bias": 3}, -X)
    with torch.no_grad():
        for args in (example, other):
            assert relative_error(model(*args), gm(*args)) < 1e-14
            assert relative_error(model(*args), annotate(gm, (args, {}))) < 1e-14


@pytest.mark.parametrize("tracer", TRACERS)
def test_keywords_of_the_model_are_keywords_of_the_graph(tracer: str) -> None:
    model = Nested().double().eval()
    example = {"images": [X, X], "table": {"scale": [X.mean()], "bias": 0}, "first": X, "second": X * 2}
    gm = trace(model, example, tracers=(tracer,))
    with torch.no_grad():
        assert relative_error(model(**example), gm(**example)) < 1e-14


def test_an_example_that_the_forward_does_not_take_is_an_input_error() -> None:
    with pytest.raises(InputError, match="does not take this example: too many positional"):
        trace(Net(), (X, 1.0, 2.0))


def test_a_dataclass_that_nobody_registered_is_exported(tmp_path: Path) -> None:
    import lmfx

    model = Net(OUTPUTS["result"]).eval()
    gm = lmfx.trace(model, X.float())
    assert lmfx.export_onnx(gm, X.float(), tmp_path / "net.onnx").exists()
    assert type(gm(X.float())) is Result and plain_face(model) is model
    assert plain_face(gm)(X.float()).keys() == {"map", "mean"}
