"""What usual code does with shapes, types and constants is decided while tracing; what data decides is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lmfx.passes.errors import TraceError
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.tracing import trace
from tests.helpers import assert_unchanged, check_trace, double, ops_of, run, snapshot

X = torch.randn(2, 4, 7, 10, dtype=torch.float64)


class Net(nn.Module):
    """Two convs, other modules by name, and a body that gets them and the input."""

    def __init__(self, body: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def net(body: Callable[..., Any], **modules: Any) -> nn.Module:
    return double(Net(body, **modules))


def half(m: Any, x: Tensor) -> Tensor:
    return m.a(x)[:, :, : x.shape[2] // 2]


def branch_on_channels(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if x.size(1) == 4 else m.a(x)


def positions(m: Any, x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[2], device=x.device, dtype=x.dtype) / x.shape[2]
    return m.a(x) + rows.view(1, 1, -1, 1)


def zeros(m: Any, x: Tensor) -> Tensor:
    border = torch.zeros(x.shape[0], x.shape[1], 1, x.shape[3], device=x.device, dtype=x.dtype)
    return torch.cat([m.a(x), border, x.new_zeros(x.shape[0], 4, 2, x.shape[-1])], 2)


def features(m: Any, x: Tensor) -> Tensor:
    found = [x]
    for conv in (m.a, m.b):
        found.append(conv(found[-1]))
    assert len(found) == 3
    return torch.cat(found[-2:], 1)


def iterated(m: Any, x: Tensor) -> Tensor:
    total = m.a(x).new_zeros(())
    for image in m.a(x):
        total = total + image.sum()
    parts = m.b(x).chunk(3, 1)
    assert len(parts) == 2 and isinstance(parts, tuple)
    return total + sum(p.sum() for p in parts)


def starred(m: Any, x: Tensor) -> Tensor:
    return m.a(x).reshape(x.shape[0], -1).view(x.shape[0], 4, *x.shape[2:])


def ceiled(m: Any, x: Tensor) -> Tensor:
    wide, high = math.ceil(x.shape[-1] / 4) * 4 - x.shape[-1], max(0, -x.shape[-2] % 4)
    if wide > 0 or high > 0:
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
    return m.a(x)


def asserted(m: Any, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == 4, "four channels")
    torch._assert(x.ndim == 4, f"a map, not {x.ndim} dimensions")
    assert x.shape[-1] % 2 == 0
    return m.a(x)


def typed(m: Any, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or not torch.is_tensor(x):
        raise TypeError(f"{type(x)}")
    return m.a(x.to(m.a.weight.dtype)) if x.is_floating_point() and x.dim() == 4 else x


def scripted(m: Any, x: Tensor) -> Tensor:
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # noqa: TID251
        return x
    return m.a(x)


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        return m.a(x)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(m.b, checkpoint(m.a, x, use_reentrant=False), use_reentrant=False)


def tables(m: Any, x: Tensor) -> Tensor:
    for (name, layer), key in zip(m.layers.items(), ("one", "two"), strict=True):
        assert name == key
        x = layer(x)
    for i, (_, layer) in enumerate(m.layers.items()):
        x = x + layer(x) * i
    return x


def meshed(m: Any, x: Tensor) -> Tensor:
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, x.size(-2)), torch.linspace(-1, 1, x.size(-1)), indexing="ij")
    grid = torch.stack([xs, ys], -1).to(x).expand(x.size(0), -1, -1, -1)
    return m.a(F.grid_sample(x, grid, align_corners=True))


def masked(m: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[-2:], dtype=torch.bool)
    mask[: x.shape[2] // 2] = True
    return m.a(x).masked_fill(mask.to(x.device), 0.0)


def windows(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = F.pad(x, (0, (5 - w % 5) % 5, 0, (5 - h % 5) % 5))
    _, _, hp, wp = x.shape
    x = x.view(b, c, hp // 5, 5, wp // 5, 5).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 5, 5)
    x = m.a(x)
    x = x.view(b, hp // 5, wp // 5, c, 5, 5).permute(0, 3, 1, 4, 2, 5).reshape(b, c, hp, wp)
    return x[:, :, :h, :w].contiguous() if hp > h or wp > w else x


def queried(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    numbers = (y.numel(), y.nelement(), y.stride(0), y.is_contiguous(), y.element_size(), y.requires_grad, y.is_cuda)
    return y * float(numbers[0]) if numbers[3] and not numbers[5] and not numbers[6] else y


def cast(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.to(x.dtype).type_as(x).double())


BODIES: dict[Callable[..., Any], list[str] | None] = {
    half: None,
    branch_on_channels: ["Conv2d", "Conv2d"],
    positions: ["Conv2d", "add"],
    zeros: None,
    features: ["Conv2d", "Conv2d", "cat"],
    iterated: None,
    starred: None,
    ceiled: ["ConstantPad2d", "Conv2d"],
    asserted: ["Conv2d"],
    typed: ["Conv2d"],
    scripted: ["Conv2d"],
    autocast: ["Conv2d"],
    checkpointed: ["Conv2d", "Conv2d"],
    tables: ["Conv2d", "SiLU", "Conv2d", "ChannelAffine", "add", "Pointwise"],
    meshed: ["grid_sample", "Conv2d"],
    masked: ["Conv2d", "masked_fill"],
    windows: None,
    queried: ["Conv2d", "ChannelAffine"],
    cast: ["Conv2d", "Conv2d"],
}


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_code_that_asks_for_shapes_is_traced(body: Callable[..., Any]) -> None:
    layers = nn.ModuleDict({"one": nn.Conv2d(4, 4, 1), "two": nn.SiLU()})
    model = net(body, layers=layers)
    before = snapshot(model)
    gm = trace(model, X, tracers=("shapes",))
    assert_unchanged(before, model)
    assert noted(gm).opaque == {}
    torch.testing.assert_close(run(gm, X), run(model, X), rtol=1e-14, atol=1e-14)
    if BODIES[body] is not None:
        assert ops_of(gm) == BODIES[body]
    check_trace(model, X)


def test_what_data_decides_is_not_traced() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.a(x) if x.sum() > 0 else m.b(x)

    with pytest.raises(TraceError, match="export: not tried, because the control flow depends on data"):
        trace(net(body), X)


def test_an_item_of_data_is_not_a_constant() -> None:
    with pytest.raises(TraceError, match="DataDependentOutput"):
        trace(net(lambda m, x: m.a(x) * float(x.mean())), X, tracers=("shapes",))


# --- which tracer is taken --------------------------------------------------------------------------------------------


class Same(nn.Conv2d):
    """A conv that pads for itself, by the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        pads = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, s, k in sizes]
        if any(pads):
            x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


def test_a_conv_that_pads_for_itself_is_a_pad_and_a_plain_conv_at_its_path() -> None:
    model = net(lambda m, x: m.b(m.c(m.a(x))), c=Same(4, 4, 3, stride=2))
    gm = check_trace(model, X, ["Conv2d", "ConstantPad2d", "Conv2d", "Conv2d"])
    assert noted(gm).tracer == "shapes" and type(gm.get_submodule("c")) is nn.Conv2d
    assert noted(gm).sizes == {"batch": "any", "size": "fixed"}


class Gate(nn.Module):
    """No conv inside, and a branch on a shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True)) if x.shape[2] > 6 else x


def test_a_part_that_hides_no_conv_stays_opaque_so_that_the_graph_runs_at_other_sizes() -> None:
    model = net(lambda m, x: m.b(m.gate(m.a(x))), gate=Gate())
    gm = check_trace(model, X, ["Conv2d", "Gate", "Conv2d"])
    assert noted(gm).tracer == "symbolic" and "Gate" in noted(gm).opaque["gate"]
    other = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    assert torch.equal(run(gm, other), run(model, other))


class Functional(nn.Module):
    """A conv without a conv module, after a branch on a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1) if x.shape[2] > 6 else x


def test_a_functional_conv_counts_as_hidden_too() -> None:
    gm = check_trace(net(lambda m, x: m.b(m.f(m.a(x))), f=Functional()), X, ["Conv2d"] * 3)
    assert noted(gm).tracer == "shapes"


def test_of_tracers_that_hide_convs_the_one_that_hides_fewest_is_taken() -> None:
    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) if x.sum() < 1e9 else x

    model = net(lambda m, x: m.s(m.u(m.a(x))), u=Undecided(), s=Same(4, 4, 3))
    gm = check_trace(model, X)
    assert set(noted(gm).opaque) == {"u", "s"}  # only `symbolic` lives with a branch on data
    with pytest.raises(TraceError, match="shapes: DataDependentOutputException"):
        trace(model, X, tracers=("shapes", "export"))


class Caching(nn.Module):
    """Keeps what it computed for a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = x.mean((2, 3), keepdim=True) * 0 + 1
        y = self.conv(x) * self.cache
        return y if x.shape[0] > 0 else x


def test_a_model_that_keeps_proxies_is_traced_from_a_fresh_copy() -> None:
    model = net(lambda m, x: m.b(m.k(m.a(x))), k=Caching())
    for tracers in (("symbolic",), ("shapes",), ("symbolic", "shapes")):
        gm = trace(model, X, tracers=tracers)
        assert not any(isinstance(v, fx.Proxy) for m in gm.modules() for v in vars(m).values())
        assert torch.equal(run(gm, X), run(model, X))
    assert model.k.cache is not None  # by run()


def _shift(x: Tensor, by: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    if whole:
        x.add_(by)
    return x, by


torch.fx.wrap("_shift")


def test_a_wrapped_function_that_writes_is_followed() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        _shift(y, x, True)
        return m.b(y)

    gm = check_trace(net(body), X, ["Conv2d", "add", "Conv2d"])
    assert noted(gm).tracer == "shapes"


# --- norms that are more than torch's ---------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    """Statistics and weights are buffers, and the norm is written out."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class NormAct(nn.BatchNorm2d):
    """A norm, a dropout and an activation in one module."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "a map")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


class GroupAct(nn.GroupNorm):
    """A group norm and an activation in one module."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class OwnGroupNorm(nn.GroupNorm):
    """A group norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class RmsNorm(nn.Module):
    """A norm by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "norm, words",
    [
        (FrozenNorm(), ["ChannelAffine", "ChannelAffine"]),
        (NormAct(4), ["BatchNorm2d", "ReLU"]),
        (GroupAct(), ["GroupNorm", "SiLU"]),
        (OwnGroupNorm(2, 4), ["GroupNorm"]),
        (ChannelNorm(4), ["ChannelNorm"]),
        (RmsNorm(), ["RmsNorm"]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_norm_is_seen_as_what_it_is_made_of_unless_it_permutes_or_computes_by_hand(
    norm: nn.Module, words: list[str]
) -> None:
    model = net(lambda m, x: m.b(m.n(m.a(x))), n=norm)
    gm = check_trace(model, X, ["Conv2d", *words, "Conv2d"])
    assert noted(gm).tracer == "symbolic" and noted(gm).opaque == {}


@pytest.mark.parametrize("number", [1.0, 2.0])
def test_ones_of_the_examples_batch_are_gone_and_other_constants_are_not(number: float) -> None:
    """Code that spreads a time step over the batch in this way must not tie the network to the example's batch."""

    def spread(m: Any, x: Tensor) -> Tensor:
        steps = x.mean((1, 2, 3))
        steps = (steps if len(steps.shape) else steps[None]) * torch.full((x.shape[0],), number, dtype=x.dtype)
        return m.a(x) + steps[:, None, None, None]

    model = net(spread)
    gm = trace(model, X, tracers=("shapes",))
    assert torch.allclose(run(gm, X), run(model, X))
    more = torch.cat([X, X, X])
    assert torch.allclose(run(trace(model, X), more), run(model, more))  # the first tracer bakes nothing
    if number == 1.0:
        assert torch.allclose(run(gm, more), run(model, more))


def test_ones_that_are_a_parameter_stay() -> None:
    model = net(lambda m, x: m.a(x) * m.scale, scale=nn.Parameter(torch.ones(2, 4, 7, 10, dtype=torch.float64)))
    assert any(p.shape == X.shape for p in trace(model, X).parameters())
