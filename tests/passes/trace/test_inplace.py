"""In-place ops become pure, and whoever reads a mutated value afterwards sees what eager PyTorch shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmfx.passes.errors import TraceError
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.inplace import make_pure
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, check_trace, ops_of, pick, run

X = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 4


class Net(nn.Module):
    """A conv, and a body that gets it and the input."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def net(body: Callable[[Any, Tensor], Any], **modules: nn.Module) -> nn.Module:
    return Net(body, **modules).double().eval()


def statements(*lines: Callable[[Any, Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A body that runs each line on `a = conv(x)` for its effect, then gives `a` and what the last line gave."""

    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        result = a
        for line in lines:
            result = line(m, a, x)
        return a, result

    return body


PURE: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "relu_": (lambda m, a, x: a.relu_(), "ReLU"),
    "torch.relu_": (lambda m, a, x: torch.relu_(a), "ReLU"),
    "F.relu with the flag": (lambda m, a, x: F.relu(a, inplace=True), "ReLU"),
    "F.relu with a positional flag": (lambda m, a, x: F.relu(a, True), "ReLU"),
    "F.relu6": (lambda m, a, x: F.relu6(a, inplace=True), "ReLU6"),
    "F.leaky_relu with a positional flag": (lambda m, a, x: F.leaky_relu(a, 0.2, True), "LeakyReLU"),
    "F.hardtanh with a positional flag": (lambda m, a, x: F.hardtanh(a, -1.0, 1.0, True), "Hardtanh"),
    "F.elu with a positional flag": (lambda m, a, x: F.elu(a, 1.0, True), "ELU"),
    "F.elu_": (lambda m, a, x: F.elu_(a), "ELU"),
    "clamp_": (lambda m, a, x: a.clamp_(0, 6), "ReLU6"),
    "clamp_ from below": (lambda m, a, x: a.clamp_(min=0), "ReLU"),
    "sigmoid_": (lambda m, a, x: a.sigmoid_(), "Sigmoid"),
    "module": (lambda m, a, x: m.act(a), "Hardswish"),
    "mul_ by a number": (lambda m, a, x: a.mul_(0.5), "ChannelAffine"),
    "add_ of a number": (lambda m, a, x: a.add_(2), "ChannelAffine"),
    "sub_": (lambda m, a, x: a.sub_(x), "sub"),
    "add_ of a map": (lambda m, a, x: a.add_(x), "add"),
    "mul_ by a map": (lambda m, a, x: a.mul_(x), "mul"),
    "div_ by a number": (lambda m, a, x: a.div_(3), "ChannelAffine"),
}


@pytest.mark.parametrize("name", PURE)
def test_a_value_mutated_without_anyone_reading_the_result_is_seen_mutated(name: str) -> None:
    line, word = PURE[name]
    model = net(statements(line), act=nn.Hardswish(inplace=True))
    gm = check_trace(model, X, ["Conv2d", word])
    assert noted(gm).tracer == "symbolic"


@pytest.mark.parametrize("name", PURE)
def test_no_op_of_a_traced_graph_writes_into_its_operand(name: str) -> None:
    line, _ = PURE[name]
    gm = trace(net(statements(line), act=nn.Hardswish(inplace=True)), X)
    for _, module in gm.named_modules():
        assert getattr(module, "inplace", False) is False
    versions: list[tuple[Tensor, int]] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                versions.append((value, value._version))
            return value

    Watch(gm).run(X.clone())
    assert all(value._version == version for value, version in versions)


def test_augmented_assignments_mutate_every_name_of_a_value() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        skip = a
        a += x
        a *= 0.5
        a -= x
        return skip + a  # eager: twice the mutated value

    check_trace(net(body), X, ["Conv2d", "add", "ChannelAffine", "sub", "add"])


def test_a_skip_around_an_in_place_relu_sees_the_mutated_value() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        b = m.relu(a)
        return m.last(b) + a

    model = net(body, relu=nn.ReLU(inplace=True), last=nn.Conv2d(3, 3, 1))
    gm = check_trace(model, X)
    add = next(n for n in gm.graph.nodes if n.name == "add")
    assert [str(a) for a in add.args] == ["last", "relu"]


def test_a_pure_relu_leaves_the_skip_as_it_was() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        return m.last(m.relu(a)) + a

    gm = check_trace(net(body, relu=nn.ReLU(), last=nn.Conv2d(3, 3, 1)), X)
    add = next(n for n in gm.graph.nodes if n.name == "add")
    assert [str(a) for a in add.args] == ["last", "conv"]


def test_readers_before_the_mutation_keep_the_old_value() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        early = a * 2
        a.relu_()
        return early + a

    check_trace(net(body), X, ["Conv2d", "Pointwise"])


def test_mutations_in_a_row_are_followed() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        b = a.add_(x)
        c = b.relu_()
        a.mul_(x)
        return a + b + c + x

    check_trace(net(body), X, ["Conv2d", "add", "ReLU", "mul", "add", "add", "add"])


def test_an_identity_is_another_name_of_its_operand() -> None:
    # A small example never reaches 6, so comparing numbers would not notice a skip that misses the ReLU6.
    def body(m: Any, x: Tensor) -> Any:
        a = m.relu(m.conv(x))
        b = m.drop(a)
        m.relu6(b)
        return m.last(b) + a

    model = net(body, relu=nn.ReLU(), drop=nn.Dropout(0.5), relu6=nn.ReLU6(True), last=nn.Conv2d(3, 3, 1))
    gm = trace(model, X * 1e-3)
    assert torch.equal(run(model, X * 100), run(gm, X * 100))


def test_an_eval_mode_dropout_in_place_is_nothing() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        b = F.dropout(m.drop(a), 0.5, m.training, True)
        return b.relu_() + a

    check_trace(net(body, drop=nn.Dropout(0.5, inplace=True)), X, ["Conv2d", "ReLU", "add"])


def test_the_models_own_input_may_be_mutated() -> None:
    def body(m: Any, x: Tensor) -> Any:
        x.relu_()
        return m.conv(x) + x

    check_trace(net(body), X, ["ReLU", "Conv2d", "add"])


def test_an_in_place_relu_before_a_join_is_linearized_like_any_other() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.second(m.relu(m.conv(x)))
        a += x
        return a

    model = net(body, relu=nn.ReLU(True), second=nn.Conv2d(3, 3, 3, padding=1))
    check_rewrite(model, X, pick(realization="compose", kernel=(5, 5), stop=1), after=["Conv2d"], edits=1)


# --- what cannot be said in fx goes to torch.export, or is refused ---------------------------------------------------


def _view_of_a_mutated_value(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    v = a.view(2, -1)
    a.relu_()
    return a.sum() + v.sum()


def _mutated_view(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    a.view(2, -1).relu_()
    return a * 2


def _mutated_part(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    a[:, 0].mul_(3)
    return a + 1


def _assigned_part(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    a[:, 0] = 0
    return a + 1


def _chunk(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    one, two = a.chunk(2, 3)
    one.relu_()
    return a.sum() + two.sum()


def _flattened_by_a_module(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    v = m.flat(a)
    a.relu_()
    return v


def _two_mutations_around_a_view(m: Any, x: Tensor) -> Any:
    a = m.conv(x).relu_()
    v = a.transpose(2, 3)
    a.add_(1)
    return v


def _out(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    torch.add(x, x, out=a)
    return a


def _copied_into(m: Any, x: Tensor) -> Any:
    a = m.conv(x)
    a.copy_(x)
    return a * 2


UNSAFE = [
    _view_of_a_mutated_value,
    _mutated_view,
    _mutated_part,
    _assigned_part,
    _chunk,
    _flattened_by_a_module,
    _two_mutations_around_a_view,
    _out,
    _copied_into,
]


@pytest.mark.parametrize("body", UNSAFE, ids=lambda f: f.__name__.strip("_"))
def test_a_mutation_through_a_view_is_traced_by_torch_export(body: Callable[..., Any]) -> None:
    gm = check_trace(net(body, flat=nn.Flatten()), X, tolerance=1e-14)
    assert noted(gm).tracer == "export"


@pytest.mark.parametrize("body", UNSAFE, ids=lambda f: f.__name__.strip("_"))
def test_a_mutation_through_a_view_is_never_traced_wrongly(body: Callable[..., Any]) -> None:
    with pytest.raises(TraceError, match=r"mutates|part of a tensor|out=|copies into"):
        trace(net(body, flat=nn.Flatten()), X, tracers=("symbolic",))


class _Writer(nn.Module):
    """Writes into its input, where fx does not look."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e9).any()):
            return x
        return x.relu_()


def test_an_opaque_module_that_writes_into_a_value_read_later_is_refused() -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        b = m.writer(a)
        return m.last(b) + a

    model = net(body, writer=_Writer(), last=nn.Conv2d(3, 3, 1))
    with pytest.raises(TraceError, match="writer mutates conv in place, and conv is read afterwards"):
        trace(model, X)


def test_an_opaque_module_that_writes_into_a_value_nobody_else_reads_is_fine() -> None:
    model = net(lambda m, x: m.last(m.writer(m.conv(x))), writer=_Writer(), last=nn.Conv2d(3, 3, 1))
    gm = check_trace(model, X, ["Conv2d", "_Writer", "Conv2d"])
    assert "torch.fx cannot trace _Writer" in noted(gm).opaque["writer"]


def test_make_pure_counts_what_it_changes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("relu_", (x,))
    graph.call_method("mul_", (y, 2))
    graph.output(x)
    gm = fx.GraphModule(nn.Module(), graph)
    assert make_pure(gm) == 2
    assert make_pure(gm) == 0
    assert ops_of(gm) == ["relu", "mul"]
    assert str(next(n for n in gm.graph.nodes if n.op == "output").args[0]) == "mul_"


def test_an_unknown_in_place_function_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(_unknown_, (x,)))
    with pytest.raises(TraceError, match="no pure form of the in-place op _?unknown_"):
        make_pure(fx.GraphModule(nn.Module(), graph))


def _unknown(x: Tensor) -> Tensor:
    return x


_unknown.__name__ = "unknown_"
_unknown_ = _unknown


POSITIONAL: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda a: F.relu(a, True),
    "silu": lambda a: F.silu(a, True),
    "elu": lambda a: F.elu(a, 1.5, True),
    "celu": lambda a: F.celu(a, 1.5, True),
    "leaky_relu": lambda a: F.leaky_relu(a, 0.2, True),
    "hardtanh": lambda a: F.hardtanh(a, -0.5, 0.5, True),
    "threshold": lambda a: F.threshold(a, 0.3, 7.0, True),
}


class Versions(fx.Interpreter):
    """Runs a graph, and sees to it that no node changes a value that is there already."""

    def run_node(self, n: fx.Node) -> Any:
        before = {m: v._version for m, v in self.env.items() if isinstance(v, Tensor)}
        found = super().run_node(n)
        assert all(self.env[m]._version == v for m, v in before.items() if m in self.env), f"{n} is not pure"
        return found


@pytest.mark.parametrize("name", POSITIONAL)
def test_a_flag_by_position_changes_what_others_read_afterwards(name: str) -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        early = a + 1
        POSITIONAL[name](a)  # nobody reads the result
        return early, m.last(a)

    model = net(body, last=nn.Conv2d(3, 3, 1))
    graph = trace(model, X, ("symbolic",))  # another tracer would find the right graph without any knowledge of flags
    with torch.no_grad():
        outputs = Versions(graph).run(X)
    for found, wanted in zip(outputs, run(model, X), strict=True):
        torch.testing.assert_close(found, wanted)
    (last,) = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == "last"]
    (activation,) = last.all_input_nodes
    assert [n.target for n in activation.all_input_nodes] == ["conv"], "it reads what the activation gives"


@pytest.mark.parametrize(
    "function, args",
    [
        *((f, ()) for f in (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.mish, F.selu)),
        *((f, (0.7,)) for f in (F.elu, F.celu, F.leaky_relu)),
        *((f, (-0.5, 0.5)) for f in (F.hardtanh, F.threshold)),
        *((f, (0.5, False)) for f in (F.dropout, F.dropout2d, F.alpha_dropout)),
        (F.rrelu, (0.1, 0.3, False)),
    ],
)
@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_by_position_in_a_graph_made_by_hand_is_seen(function: Any, args: tuple[Any, ...], flag: bool) -> None:
    """Tracing gives it by name, whatever the model does."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2.0))
    called = graph.call_function(function, (y, *args, flag))
    graph.output((graph.call_function(torch.add, (y, 1.0)), called))
    gm = fx.GraphModule(nn.Module(), graph)
    wanted = gm(X)
    assert make_pure(gm) == int(flag)
    for found, value in zip(Versions(gm).run(X), wanted, strict=True):
        assert torch.equal(found, value)
    (last,) = [n for n in gm.graph.nodes if n.target is torch.add]
    assert last.args[0] is (called if flag else y)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "diagonal": lambda a: a.diagonal(0, 2, 3),
    "unfold": lambda a: a.unfold(2, 2, 1),
    "transpose": lambda a: a.transpose(2, 3),
    "select": lambda a: a.select(1, 0),
    "narrow": lambda a: a.narrow(1, 0, 2),
    "slice": lambda a: a[:, 1:],
    "detach": lambda a: a.detach(),
    "tensor_split": lambda a: a.tensor_split(3, 1)[0],
    "alias": lambda a: torch.ops.aten.alias.default(a),
    "split_with_sizes": lambda a: a.split_with_sizes((1, 2), 1)[1],
    "unsafe_chunk": lambda a: a.unsafe_chunk(3, 1)[0],
    "unsafe_split": lambda a: a.unsafe_split(2, 1)[0],
    "unbind": lambda a: a.unbind(1)[1],
    "hsplit": lambda a: a.transpose(1, 3).hsplit(7)[0],
    "movedim": lambda a: a.movedim(1, 3),
    "swapaxes": lambda a: a.swapaxes(2, 3),
    "swapdims": lambda a: a.swapdims(2, 3),
    "expand": lambda a: a[:, :1].expand(-1, 3, -1, -1),
    "expand_as": lambda a: a[:, :1].expand_as(a),
    "view_as": lambda a: a.view_as(a),
    "unflatten": lambda a: a.unflatten(1, (3, 1)),
    "squeeze": lambda a: a.squeeze(0),
    "unsqueeze": lambda a: a.unsqueeze(1),
    "contiguous": lambda a: a.contiguous(),
    "to": lambda a: a.to(torch.float64),
    "type_as": lambda a: a.type_as(a),
    "double": lambda a: a.double(),
    "real": lambda a: a.real,
    "T": lambda a: a.mT,
    "data": lambda a: a.data,
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_is_read_after_its_memory_changed_is_refused_or_right(name: str) -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        view = VIEWS[name](a)
        a.relu_()
        return view + 1, a

    model = net(body)
    try:
        graph = trace(model, X, ("symbolic",))
    except TraceError as error:
        assert "a view of it is in use" in str(error)
    else:
        torch.testing.assert_close(run(graph, X), run(model, X))
        other = X.flip(0)
        torch.testing.assert_close(run(graph, other), run(model, other))


@pytest.mark.parametrize("same", [nn.Identity(), nn.Dropout(), nn.Dropout2d()], ids=lambda m: type(m).__name__)
def test_the_very_same_tensor_under_another_name_is_no_view(same: nn.Module) -> None:
    def body(m: Any, x: Tensor) -> Any:
        a = m.conv(x)
        b = m.same(a)
        a.relu_()
        return m.same(b) + 1, m.last(b)

    model = net(body, same=same, last=nn.Conv2d(3, 3, 1))
    graph = trace(model, X, ("symbolic",))  # torch.export would take what this one refuses
    for found, wanted in zip(run(graph, X), run(model, X), strict=True):
        torch.testing.assert_close(found, wanted)
