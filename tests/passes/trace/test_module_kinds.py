"""Modules and functions of other kinds are seen as what they compute: subclasses, scripted code, masks, wrappers."""

# ruff: noqa: TID251  -- TorchScript is what networks bring along

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from lmfx.importance.magnitude import Magnitude
from lmfx.passes.errors import ModelError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.model_copy import eval_copy
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.tracers import SymbolicTracer, trace_symbolic
from lmfx.passes.trace.tracing import trace
from tests.helpers import assert_unchanged, check_trace, double, ops_of, run, snapshot, spans_of

X = torch.randn(2, 3, 9, 7, dtype=torch.float64)
OTHER = torch.randn(3, 3, 8, 11, dtype=torch.float64)


def net(*middle: nn.Module) -> nn.Module:
    return double(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.Conv2d(4, 2, 1)))


def seen(model: nn.Module, words: list[str]) -> fx.GraphModule:
    """The words between the first and the last conv, and the same outputs at another batch and size."""
    gm = check_trace(model, X, ["Conv2d", *words, "Conv2d"])
    assert noted(gm).opaque == {}
    assert relative_error(run(model, OTHER), run(gm, OTHER)) <= 1e-13
    return gm


# --- norms ------------------------------------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.01)


class CheckedNorm(nn.BatchNorm2d):
    """Looks at dimensions and types, which are the same at every size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or len(x.shape) != 4 or x.dtype in (torch.float16, torch.bfloat16) or x.requires_grad:
            raise ValueError("not a map")
        return super().forward(x)


class TwiceNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SiluOfHalf(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 * x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.SyncBatchNorm(4), ["BatchNorm2d"]),
        (lambda: NormAct(4), ["BatchNorm2d", "LeakyReLU"]),
        (lambda: CheckedNorm(4), ["BatchNorm2d"]),
        (lambda: TwiceNorm(4), ["BatchNorm2d", "ChannelAffine"]),
        (SiluOfHalf, ["ChannelAffine", "SiLU"]),
    ],
)
def test_a_forward_of_its_own_is_traced_into(make: Callable[[], nn.Module], words: list[str]) -> None:
    seen(net(make()), words)


def test_a_sync_norm_without_statistics_is_no_affine_norm() -> None:
    gm = check_trace(net(nn.SyncBatchNorm(4, track_running_stats=False)), X)
    assert ops_of(gm) == ["Conv2d", "SyncBatchNorm", "Conv2d"]


def test_a_sync_norm_that_is_called_twice_keeps_its_tensors_shared() -> None:
    norm = nn.SyncBatchNorm(4)
    gm = seen(net(norm, nn.ReLU(), norm), ["BatchNorm2d", "ReLU", "BatchNorm2d"])
    assert len({n.target for n in gm.graph.nodes if n.op == "call_module"}) == 4


def test_a_subclass_that_only_prints_itself_differently_counts_as_its_base() -> None:
    class Named(nn.SyncBatchNorm):
        def extra_repr(self) -> str:
            return "mine"

    seen(net(Named(4)), ["BatchNorm2d"])


# --- what must not be taken for its base ------------------------------------------------------------------------------


class CalledTwiceAsLarge(nn.Conv2d):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


class Masked(nn.Conv2d):
    """A weight that is a property."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._parameters["kernel"] * self._buffers["mask"]  # type: ignore[operator]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self.register_buffer("mask", torch.ones(4, 1, 1, 1).index_fill(0, torch.tensor([1]), 0.0))
            param = nn.Parameter(torch.randn(4, 4, 3, 3))  # torch would initialise the product, not the kernel
        super().register_parameter("kernel" if name == "weight" else name, param)


def test_an_overridden_call_is_part_of_the_function() -> None:
    seen(net(CalledTwiceAsLarge(4, 4, 3)), ["Conv2d", "ChannelAffine"])


def test_a_weight_that_is_a_property_is_a_plain_weight() -> None:
    gm = seen(net(Masked(4, 4, 3)), ["Conv2d"])
    conv: Any = gm.get_submodule("1")
    assert type(conv) is nn.Conv2d and not conv.weight[1].any() and conv.weight[0].any()


# --- TorchScript and autograd functions -------------------------------------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def swish(x, scale: float = 1.0):  # type: ignore[no-untyped-def]
        return x.mul(x.sigmoid())

    @torch.jit.script
    def branch(x, wide: bool = False):  # type: ignore[no-untyped-def]
        if wide:
            return torch.relu(x)
        return F.hardtanh(x, -2.0, 2.0)


class OwnSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return swish(x)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(x)
        return out


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (swish, ["SiLU"]),
        (lambda x: branch(x, wide=True), ["ReLU"]),
        (branch, ["Hardtanh"]),
        (OwnSwish.apply, ["SiLU"]),
    ],
)
def test_code_of_another_kind_is_traced_into(function: Callable[..., Any], words: list[str]) -> None:
    seen(net(Call(function)), words)


@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_scripted_part_is_what_it_is_made_of(way: str) -> None:
    inner = double(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6()))
    inner[0].requires_grad_(False)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part: Any = (
            torch.jit.script(inner) if way == "script" else torch.jit.trace(inner, torch.randn(1, 4, 9, 7).double())
        )
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), part, nn.Conv2d(4, 2, 1)).double().eval()
    gm = trace(model, X)
    assert ops_of(gm) == ["Conv2d", "Conv2d", "BatchNorm2d", "ReLU6", "Conv2d"]
    assert relative_error(run(model, OTHER), run(gm, OTHER)) <= 1e-13
    wanted = {n: p.requires_grad for n, p in gm.named_parameters() if n.startswith("1.")}
    assert wanted == {"1.0.weight": False, "1.1.weight": True, "1.1.bias": True}


def test_functions_of_torch_are_as_they_were_after_a_trace() -> None:
    before = torch.jit.ScriptFunction.__call__, torch.autograd.Function.__dict__["apply"]
    trace(net(Call(OwnSwish.apply)), X)
    assert before == (torch.jit.ScriptFunction.__call__, torch.autograd.Function.__dict__["apply"])


# --- weights that are computed ----------------------------------------------------------------------------------------


def weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(conv)


def equalised(conv: nn.Module) -> nn.Module:
    """A hook that sets the weight from another parameter, as equalised learning rates do."""
    weight = conv._parameters.pop("weight")
    conv.register_parameter("weight_orig", weight)
    conv.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_orig * 0.5))
    return conv


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "prune": lambda c: prune.l1_unstructured(c, "weight", 0.4),
    "prune twice, and the bias": lambda c: prune.ln_structured(
        prune.random_unstructured(prune.l1_unstructured(c, "weight", 0.2), "bias", 0.5), "weight", 0.3, 2, 0
    ),
    "weight_norm": weight_norm,
    "weight_norm (new)": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm (new)": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "equalised": equalised,
}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_a_plain_one_as_trainable_as_its_sources(kind: str, trainable: bool) -> None:
    model = net(COMPUTED[kind](nn.Conv2d(4, 4, 3)).double())
    model(X)
    model.requires_grad_(trainable)
    before = snapshot(model)
    gm = seen(model, ["Conv2d"])
    assert_unchanged(before, model)
    conv: Any = gm.get_submodule("1")
    assert {n for n, _ in conv.named_parameters()} == {"weight", "bias"} and not list(conv.buffers())
    assert {p.requires_grad for p in gm.parameters()} == {trainable}


class LowRank(nn.Module):
    def __init__(self, base: bool, low: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3).requires_grad_(base)
        self.a = nn.Parameter(torch.randn(2, 36), requires_grad=low)
        self.b = nn.Parameter(torch.randn(4, 2), requires_grad=low)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight + (self.b @ self.a).view_as(self.conv.weight), self.conv.bias)


@pytest.mark.parametrize("tracer", ["symbolic", "shapes", "export"])
@pytest.mark.parametrize(("base", "low"), [(False, False), (False, True), (True, False)])
def test_a_weight_that_a_forward_computes_is_as_trainable_as_its_sources(tracer: str, base: bool, low: bool) -> None:
    gm = trace(net(LowRank(base, low)), X, tracers=(tracer,))
    assert ops_of(gm) == ["Conv2d"] * 3
    (weight,) = [p for n, p in gm.named_parameters() if n.startswith("1.") and p.dim() == 4]
    (bias,) = [p for n, p in gm.named_parameters() if n.startswith("1.") and p.dim() == 1]
    assert weight.requires_grad == (base or low) and bias.requires_grad == base


def test_a_frozen_scale_stays_frozen_and_numbers_are_no_parameters() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * (x * self.gamma.view(1, -1, 1, 1))

    for trainable in (True, False):
        gm = seen(net(Scale().requires_grad_(trainable)), ["ChannelAffine", "ChannelAffine"])
        wanted = [m.scale.requires_grad for m in gm.modules() if type(m).__name__ == "ChannelAffine"]
        assert wanted == [trainable, False]


def test_a_parametrized_buffer_stays_a_buffer() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    norm = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(norm, "running_mean", Half())
    copied = eval_copy(norm)
    assert {n for n, _ in copied.named_parameters()} == {"weight", "bias"}
    assert "running_mean" in dict(copied.named_buffers())


def test_a_hook_that_looks_at_its_input_or_counts_is_kept() -> None:
    calls: list[Any] = []
    conv = prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)
    conv.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape))
    gm = check_trace(net(conv.double()), X)
    assert len(gm.get_submodule("1")._forward_pre_hooks) == 1  # the mask is gone, the other one is not
    assert calls and all(len(shape) == 4 for shape in calls)


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("whole", [True, False])
def test_what_only_runs_a_network_is_left_out(wrap: Callable[[nn.Module], nn.Module], whole: bool) -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    plain = net(inner)
    model = wrap(plain) if whole else nn.Sequential(plain[0], wrap(inner), plain[2])  # type: ignore[index]
    gm = trace(model.eval(), X)
    assert {n for n, _ in gm.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert relative_error(run(plain, OTHER), run(gm, OTHER)) <= 1e-13


# --- networks that change while they run ------------------------------------------------------------------------------


class Watch(nn.Module):
    """Writes the largest value that it saw into a buffer, or fills a table once."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.once = once
        self.register_buffer("largest", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.once:
            self.largest = torch.maximum(self.largest, x.max())
        elif not bool(self.largest):
            self.largest = torch.ones(1, dtype=x.dtype)
        return x * self.largest


class Stubborn(nn.BatchNorm2d):
    """A norm that eval() does not reach."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


def test_a_network_that_writes_buffers_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="changes while it is run.*1.largest of Watch"):
        trace(net(Watch(once=False)), X)


def test_a_buffer_that_is_filled_once_is_no_state() -> None:
    check_trace(net(Watch(once=True)), X)


def test_a_norm_that_stays_in_training_is_refused() -> None:
    with pytest.raises(ModelError, match="1.running_mean of Stubborn.*training mode"):
        trace(net(Stubborn(4)), X)


def test_observers_are_refused_and_what_to_do_is_said() -> None:
    from torch.ao.quantization import MinMaxObserver

    with pytest.raises(ModelError, match="observers.*compress the network before"):
        trace(net(MinMaxObserver()), X)


# --- what magnitude knows of them -------------------------------------------------------------------------------------


class Hidden(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        nn.init.constant_(self.mix.weight, size)
        self.register_forward_hook(lambda *a: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


def test_magnitude_takes_no_opaque_part_for_free() -> None:
    worst = []
    for size in (0.1, 1.0, 10.0):
        torch.manual_seed(0)
        convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)]
        spans = spans_of(net(convs[0], Hidden(size), convs[1]), X, realize=("fit", "drop"))
        scores = Magnitude().score(spans, spans.candidates)
        whole = [c for c in spans if c.realization == "fit" and c.span.start == 0 and len(c.all_convs) == 4]
        assert whole
        worst.append(max(scores[c.key] for c in whole))
    assert worst[0] > worst[1] > worst[2] and worst[0] < -0.1


@pytest.mark.parametrize("module", [nn.Bilinear(2, 2, 2), nn.CosineSimilarity(), nn.MultiheadAttention(4, 2)], ids=str)
def test_a_module_of_torch_is_one_op_unless_its_forward_was_exchanged(module: nn.Module) -> None:
    model = nn.Sequential(module)
    tracer = SymbolicTracer(model, ((torch.zeros(1),), {}))
    assert tracer.is_leaf_module(module, "0")
    module.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert not tracer.is_leaf_module(module, "0")


def test_a_norm_that_cannot_be_traced_is_known_as_one() -> None:
    class BranchingNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.std() if bool(x.sum() > 0) else x

    class Branching(BranchingNorm):
        pass

    for kind, norms in ((BranchingNorm, {"1"}), (Branching, set())):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), kind())
        found = trace_symbolic(model, ((X.float(),), {}))
        assert set(found.norms) == norms and set(found.opaque) == {"1"} - norms


FACTS: dict[str, Callable[[Tensor], bool]] = {
    "ndim": lambda y: y.ndim == 4,
    "dim": lambda y: y.dim() == 4,
    "dtype": lambda y: y.dtype == torch.float64,
    "device": lambda y: y.device == torch.device("cpu"),
    "is_cuda": lambda y: not y.is_cuda,
    "layout": lambda y: y.layout == torch.strided,
    "is_quantized": lambda y: not y.is_quantized,
    "is_floating_point": lambda y: y.is_floating_point(),
    "requires_grad": lambda y: not y.requires_grad,
    "channels": lambda y: y.shape[1] == 4,
}


@pytest.mark.parametrize("name", FACTS)
def test_a_branch_on_what_is_the_same_at_every_size_needs_no_other_tracer(name: str) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y) if FACTS[name](y) else y

    gm = trace(double(Asks()), X, ("symbolic",))
    assert ops_of(gm) == ["Conv2d", "ReLU"] and noted(gm).opaque == {}
    assert gm(OTHER).shape == (3, 4, 8, 11)
