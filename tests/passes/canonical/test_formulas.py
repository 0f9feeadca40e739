"""Formulas of one value, written as several ops, are one activation; what is no such formula is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.export.emit import emit
from lmfx.latency.workload import signature
from lmfx.passes.graph.pointwise import Pointwise
from lmfx.passes.trace.tracing import fingerprint
from tests.helpers import check_rewrite, check_trace, double, pick

X = torch.randn(2, 3, 7, 9, dtype=torch.float64)


class Net(nn.Module):
    """Two convs, and between them whatever is asked for."""

    def __init__(self, formula: Callable[..., Tensor], *held: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.held = nn.ModuleList(held)
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.formula(self.norm(self.conv1(x)), *self.held))


def net(formula: Callable[..., Tensor], *held: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return double(Net(formula, *held))


def once(name: str) -> list[str]:
    return ["Conv2d", "BatchNorm2d", name, "Conv2d"]


NAMED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), "SiLU"),
    "sigmoid(x) * x": (lambda x: x.sigmoid().mul(x), "SiLU"),
    "x / (1 + exp(-x))": (lambda x: x / (1 + torch.exp(-x)), "SiLU"),
    "x * tanh(softplus(x))": (lambda x: x * torch.tanh(F.softplus(x)), "Mish"),
    "x * tanh(log(1 + exp(x)))": (lambda x: x * (1 + x.exp()).log().tanh(), "Mish"),
    "x * (relu6(x + 3) / 6)": (lambda x: x * (F.relu6(x + 3) / 6), "Hardswish"),
    "x * hardsigmoid(x)": (lambda x: x * F.hardsigmoid(x), "Hardswish"),
    "0.5 x (1 + erf(x / sqrt 2))": (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "GELU"),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "GELU",
    ),
    "max(x, 0)": (lambda x: torch.maximum(x, torch.zeros_like(x)), "ReLU"),
    "where(x > 0, x, 0)": (lambda x: torch.where(x > 0, x, 0.0), "ReLU"),
    "relu by its mask": (lambda x: x * (x > 0), "ReLU"),
    "x - tanh(x)": (lambda x: x - torch.tanh(x), "Tanhshrink"),
    "(exp(x) - exp(-x)) / (exp(x) + exp(-x))": (
        lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "Tanh",
    ),
    "softshrink": (lambda x: F.softshrink(x, 0.3), "Softshrink"),
    "hardshrink": (lambda x: F.hardshrink(x, 0.3), "Hardshrink"),
    "elu by where": (lambda x: torch.where(x > 0, x, torch.expm1(x)), "ELU"),
}
NAMELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "a square": lambda x: x.square(),
    "a power": lambda x: x**2,
    "a product with itself": lambda x: x * x,
    "relu squared": lambda x: F.relu(x) ** 2,
    "x * relu6(x + 3), then / 6": lambda x: x * F.relu6(x + 3) * x.sigmoid(),
    "x * tanh(exp(x))": lambda x: x * torch.tanh(torch.exp(x.clamp(max=3))),
    "an absolute value": lambda x: x.abs(),
    "snake": lambda x: x + torch.sin(2 * x) ** 2 / 2,
    "x + relu(x)": lambda x: x + F.relu(x),
    "leaky by where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "tanh of a formula": lambda x: torch.tanh(x.abs().sqrt()),
    "1 / (1 + x * x)": lambda x: 1 / (1 + x * x),
    "softshrink by ops": lambda x: x.sign() * F.relu(x.abs() - 0.5),
    "masked": lambda x: x.masked_fill(x < -1, -1.0) * 0.5 + x.abs(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_formula_of_a_known_activation_is_that_activation(name: str) -> None:
    formula, found = NAMED[name]
    check_trace(net(formula), X, once(found), tolerance=1e-13)


@pytest.mark.parametrize("name", NAMELESS)
def test_a_formula_without_a_name_is_one_activation(name: str) -> None:
    graph = check_trace(net(NAMELESS[name]), X)
    found = [m for m in graph.modules() if isinstance(m, Pointwise)]
    assert len(found) == 1 and len([n for n in graph.graph.nodes if n.op == "call_function"]) == 0


def test_a_formula_is_taken_out_by_a_span_and_kept_at_its_end() -> None:
    model = net(lambda x: F.relu(x) ** 2)
    spans = lmfx.spans(lmfx.trace(model, X))
    check_rewrite(model, X, pick(convs=("conv1", "conv2"), realization="compose"), after=["Conv2d"], tolerance=1e-11)
    assert any(c.convs == ("conv1",) for c in spans) or len(spans.network.regions[0].series.layers) == 2


def test_numbers_inside_of_a_formula_stay_trainable() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.tensor([1.0, 0.5, 2.0, 1.5]).view(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    model = net(lambda x, swish: swish(x), Swish())
    graph = check_trace(model, X)
    (formula,) = (m for m in graph.modules() if isinstance(m, Pointwise))
    assert [p.requires_grad for p in formula.parameters()].count(True) >= 1
    graph(X).sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in formula.parameters())


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


NONE: dict[str, tuple[Callable[..., Tensor], tuple[nn.Module, ...]]] = {
    "a gate by a conv": (lambda x, gate: gate(x), (Gate(),)),
    "a gate by the mean": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), ()),
    "a softmax": (lambda x: x * torch.softmax(x, 1), ()),
    "one half gates the other": (lambda x: torch.cat([x[:, :2] * torch.sigmoid(x[:, 2:])] * 2, 1), ()),
    "the rows turned": (lambda x: x * torch.sigmoid(x.flip(2)), ()),
    "a sum of multiples": (lambda x: x + 0.5 * x - 3 * x, ()),
    "the largest of all": (lambda x: x * x.max(), ()),
    "a position": (lambda x: x + torch.relu(torch.arange(9, dtype=x.dtype)), ()),
}


@pytest.mark.parametrize("name", NONE)
def test_what_looks_at_other_numbers_or_is_affine_is_no_formula(name: str) -> None:
    formula, held = NONE[name]
    graph = check_trace(net(formula, *held), X)
    assert not any(isinstance(m, Pointwise | nn.SiLU) for m in graph.modules())


def test_a_value_inside_of_a_formula_that_is_read_elsewhere_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            gate = torch.sigmoid(y)
            return y * gate, gate

    check_trace(double(Two()), X, ["Conv2d", "Sigmoid", "mul"])


def test_a_formula_in_another_spelling_has_the_same_work_and_another_formula_has_not() -> None:
    def of(formula: Callable[[Tensor], Tensor]) -> str:
        return signature(lmfx.trace(net(formula), X), [X])

    assert of(lambda x: x * x.sigmoid()) == of(lambda x: F.silu(x))
    assert of(lambda x: x**2) == of(lambda x: torch.pow(x, 2))
    assert of(lambda x: x**2) != of(lambda x: x**3)
    assert of(lambda x: torch.sin(x) * x) != of(lambda x: torch.cos(x) * x)


@pytest.mark.parametrize("name", [*NAMED, *(n for n in NAMELESS if n not in ("masked", "x * tanh(exp(x))"))])
def test_a_formula_is_written_as_onnx_op_by_op(name: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    formula = NAMED[name][0] if name in NAMED else NAMELESS[name]
    graph = lmfx.trace(net(formula).float(), X.float())
    session = ort.InferenceSession(emit(graph, [X.float()]).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_0": X.float().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), graph(X.float()), rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_formula_computes_the_same_and_shares_nothing() -> None:
    graph = lmfx.trace(net(lambda x: x * torch.sin(2 * x + 1)), X)
    copied = copy.deepcopy(graph)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
        assert torch.equal(graph(X), lmfx.trace(net(lambda x: x * torch.sin(2 * x + 1)), X)(X))


class Ends(nn.Module):
    """A formula that ends with a module that it also has its place in."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.first, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(self.first(y) + y)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.PReLU(4)], ids=["relu", "prelu"])
def test_no_module_is_a_part_of_itself_where_a_formula_ends_with_it(act: nn.Module) -> None:
    model = double(Ends(act))
    graph = lmfx.trace(model, X)
    assert len(list(graph.named_modules(remove_duplicate=False))) < 12  # in a circle it would never end
    student = lmfx.rewrite(graph, lmfx.MergePlan((), fingerprint(graph)))
    torch.testing.assert_close(student(X), model(X), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in model.parameters())
