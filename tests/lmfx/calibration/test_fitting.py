"""A plan's convs are set in the order of the graph, each on what the network so far gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lmfx.calibration.fitting import FitGroup, fit_groups
from lmfx.calibration.images import Calibration
from lmfx.calibration.plan_fits import fit_plan, set_fitted
from lmfx.calibration.recording import record_batches
from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import OptionError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite, span_names
from lmfx.passes.spans.enumeration import SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import fingerprint, trace
from tests.helpers import run, spans_of
from tests.toys import images, toy


class Shift(nn.Module):
    """An activation that is affine where the images are: the identity, far from its kink."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def linear_net(stride: int = 1, padding: int = 0) -> nn.Sequential:
    """Convs whose biases keep every ReLU open on our images, so that a span of them is one conv exactly."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride, padding), Shift(), nn.Conv2d(4, 4, 3), Shift(), nn.Conv2d(4, 5, 1), nn.Flatten()
    ).double()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.bias.data.fill_(50.0)  # type: ignore[union-attr]
    return net.eval()


def fits(spans: SpanSet, **wanted: Any) -> list[Candidate]:
    found = [c for c in spans if c.realization == "fit" and c.conv is not None]
    for name, value in wanted.items():
        found = [c for c in found if value == getattr(c, name, getattr(c.conv, name, getattr(c.span, name, None)))]
    return found


def planned(spans: SpanSet, *candidates: Candidate) -> MergePlan:
    return MergePlan(candidates, fingerprint(spans.network.gm))


def fitted(spans: SpanSet, plan: MergePlan, data: Tensor) -> fx.GraphModule:
    return fit_plan(spans.network, rewrite(spans.network.gm, plan), plan, Calibration((data,)))


# --- what can be recovered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_a_span_that_is_linear_on_the_images_is_recovered(stride: int) -> None:
    model, data = linear_net(stride), torch.randn(24, 3, 13, 13, dtype=torch.float64)
    spans = spans_of(model, data[:1])
    kernel = (3 + 2 * stride,) * 2
    (candidate,) = fits(spans, kernel_size=kernel, start=0, stop=3, groups=1)
    net = fitted(spans, planned(spans, candidate), data)
    fresh = torch.randn(4, 3, 13, 13, dtype=torch.float64)
    centred = run(model, fresh) - run(model, data).mean(0)
    assert float((run(net, fresh) - run(model, fresh)).norm() / centred.norm()) < 1e-6


def test_convs_without_an_activation_between_them_are_recovered_with_their_padding() -> None:
    torch.manual_seed(3)
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)).double().eval()
    )
    data = torch.randn(16, 3, 9, 9, dtype=torch.float64)
    spans = spans_of(model, data[:1])
    (candidate,) = fits(spans, start=0, stop=2, kernel_size=(3, 3), groups=1)
    net = fitted(spans, planned(spans, candidate), data)
    assert relative_error(run(model, data), run(net, data)) < 1e-6
    conv: Any = net.get_submodule(span_names(spans.network.gm, planned(spans, candidate))[0])
    product = torch.einsum("om,mikl->oikl", model[1].weight[:, :, 0, 0], model[0].weight)  # type: ignore[index]
    assert torch.allclose(conv.weight, product, atol=1e-5)


def test_a_kernel_that_is_too_small_is_not_exact_and_a_larger_one_is_closer() -> None:
    model, data = linear_net(padding=2), torch.randn(24, 3, 13, 13, dtype=torch.float64)
    spans = spans_of(model, data[:1])
    errors = {}
    for size in (1, 3, 5):
        for candidate in fits(spans, start=0, stop=3, kernel_size=(size, size), groups=1):
            net = fitted(spans, planned(spans, candidate), data)
            errors[size] = float((run(net, data) - run(model, data)).norm())
    assert list(errors) == [1, 3, 5]
    assert errors[1] > 1.05 * errors[3] > 1e3 * errors[5]


# --- in the order of the graph ----------------------------------------------------------------------------------------


def two_spans(spans: SpanSet) -> tuple[Candidate, Candidate]:
    """A crude first span (1 x 1) and a second that can make up for it."""
    block = [c for c in fits(spans, groups=1) if c.convs == ("blocks.0.conv1", "blocks.0.conv2")]
    first = next(c for c in block if c.conv and c.conv.kernel_size == (1, 1))
    second = next(
        c
        for c in fits(spans, groups=1)
        if c.convs == ("blocks.1.conv1", "blocks.1.conv2") and c.conv and c.conv.kernel_size == (5, 5)
    )
    assert first.span.series == second.span.series and first.span.stop <= second.span.start
    return first, second


def test_the_second_conv_is_fitted_on_what_the_first_one_gives() -> None:
    model, data = toy(), images(64)
    spans = spans_of(model, data[:1])
    first, second = two_spans(spans)
    plan = planned(spans, first, second)
    names = span_names(spans.network.gm, plan)
    sequential = fitted(spans, plan, data)

    apart = rewrite(spans.network.gm, plan)
    for name, candidate in zip(names, plan.candidates, strict=True):
        held = record_batches(spans.network.gm, Calibration((data,)), {candidate.span.entry, candidate.span.output})
        (group,) = fit_groups(spans.network, [candidate])
        op = group.fit(held[candidate.span.entry], {candidate.span.output: held[candidate.span.output]})[candidate.key]
        set_fitted(apart.get_submodule(name), op)

    def weight(net: nn.Module, name: str) -> Tensor:
        return net.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator, return-value]

    assert torch.allclose(weight(sequential, names[0]), weight(apart, names[0]), atol=1e-5)
    assert not torch.allclose(weight(sequential, names[1]), weight(apart, names[1]), rtol=1e-2)

    def error(net: nn.Module) -> float:
        last = second.span.output
        target = record_batches(spans.network.gm, Calibration((data,)), {last})[last]
        node = names[1].replace(".", "_")
        return float((record_batches(net, Calibration((data,)), {node})[node] - target).norm())  # type: ignore[arg-type]

    assert error(sequential) < error(apart)


def test_the_student_and_the_network_that_are_given_stay_as_they_were() -> None:
    data = images(16)
    spans = spans_of(toy(), data[:1])
    plan = planned(spans, *two_spans(spans))
    student = rewrite(spans.network.gm, plan)
    before = {k: v.clone() for m in (student, spans.network.gm) for k, v in m.state_dict(prefix=f"{id(m)}.").items()}
    fit_plan(spans.network, student, plan, Calibration((data,)))
    after = {k: v for m in (student, spans.network.gm) for k, v in m.state_dict(prefix=f"{id(m)}.").items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_images_in_many_batches_give_the_fit_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(20)
    spans = spans_of(toy(), data[:1])
    plan = planned(spans, *two_spans(spans))
    whole = fitted(spans, plan, data)
    monkeypatch.setattr("lmfx.calibration.recording.batches_for.__defaults__", (3, None))
    parts = fitted(spans, plan, data)
    assert relative_error(run(whole, data), run(parts, data)) < 1e-4


def test_a_plan_without_fits_needs_no_images_to_run() -> None:
    data = images(4)
    spans = spans_of(toy(), data[:1])
    composed = next(c for c in spans if c.realization == "compose")
    net = fitted(spans, planned(spans, composed), data)
    assert torch.equal(run(net, data), run(rewrite(spans.network.gm, planned(spans, composed)), data))


# --- uneven padding ---------------------------------------------------------------------------------------------------


def test_a_conv_with_uneven_padding_is_set_inside_its_span() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double().eval()  # fmt: skip
    data = torch.randn(24, 3, 12, 12, dtype=torch.float64)
    spans = spans_of(model, data[:1])
    uneven = [c for c in fits(spans, groups=1) if c.conv and any(lo != hi for lo, hi in c.conv.padding)]
    candidate = max((c for c in uneven if c.span.start == 0), key=lambda c: c.conv.kernel_size)  # type: ignore[union-attr]
    plan = planned(spans, candidate)
    random, student = rewrite(spans.network.gm, plan), fitted(spans, plan, data)
    name = span_names(spans.network.gm, plan)[0]
    assert isinstance(student.get_submodule(name), LinearSpan)
    scale = float((run(model, data) - run(model, data).mean(0)).norm())
    errors = [float((run(net, data) - run(model, data)).norm()) / scale for net in (random, student)]
    assert errors[1] < 0.5 * errors[0]
    assert relative_error(run(student, data), run(merge(student), data)) < 1e-12


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_gives_each_of_its_members_what_it_would_get_alone() -> None:
    data = images(32).double()
    spans = spans_of(toy().double(), data[:1])
    groups = [g for g in fit_groups(spans.network, fits(spans)) if len(g.candidates) > 2]
    assert groups
    for group in groups[:4]:
        names = {group.entry} | {c.span.output for c in group.candidates}
        held = record_batches(spans.network.gm, Calibration((data,)), names)
        together = group.fit(held[group.entry], held)
        assert set(together) == {c.key for c in group.candidates}
        for candidate in group.candidates[:3]:
            alone = FitGroup(group.entry, group.depthwise, (candidate,)).fit(held[group.entry], held)[candidate.key]
            assert together[candidate.key].config == alone.config == candidate.conv
            x, y = held[group.entry], held[candidate.span.output]
            errors = [float((op(x) - y).norm()) for op in (together[candidate.key], alone)]
            assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_every_fit_candidate_is_in_one_group_in_the_order_of_the_graph() -> None:
    spans = spans_of(toy(), images(1))
    groups = fit_groups(spans.network, fits(spans))
    assert sorted(c.key for g in groups for c in g.candidates) == sorted(c.key for c in fits(spans))
    order = [list(spans.network.nodes).index(g.entry) for g in groups]
    assert order == sorted(order)


def test_a_candidate_without_a_conv_cannot_be_fitted() -> None:
    spans = spans_of(toy(), images(1))
    drop = next(c for c in spans if c.realization == "drop")
    with pytest.raises(OptionError, match="no conv to fit"):
        fit_groups(spans.network, [drop])


def test_set_fitted_writes_in_the_dtype_of_the_module() -> None:
    conv = nn.Conv2d(2, 3, 1)
    weight, bias = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    set_fitted(conv, LinearOp(weight, bias, (1, 1), ((0, 0), (0, 0)), (1, 1), 1))
    assert conv.weight.dtype == torch.float32 and torch.equal(conv.weight, weight.float())
    assert conv.bias is not None and torch.equal(conv.bias, bias.float())


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_a_channel_that_hardly_varies_gets_no_weight_that_float32_can_not_carry(depthwise: bool, quick: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 3) * torch.tensor([1.0, 1e-4, 1e-5, 0.0]).view(1, 4, 1, 1) + 1.0
    y = torch.randn(1, 4, 3, 3)
    network = Network(trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval(), x))
    (c,) = [
        c
        for c in enumerate_spans(network)
        if c.realization == "fit"
        and len(c.convs) == 2
        and c.conv
        and c.conv.kernel_size == (1, 1)
        and (c.conv.groups > 1) == depthwise
    ]
    op = FitGroup(c.span.entry, depthwise, (c,)).fit(x, {c.span.output: y}, quick)[c.key]
    small = LinearOp(op.weight.float(), op.bias.float(), op.stride, op.padding, op.dilation, op.groups)
    assert float((small(x).double() - op(x)).abs().max()) <= 1e-4


def test_fits_that_would_need_too_large_a_matrix_together_are_made_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = toy().double(), images(8).double()
    spans = spans_of(net, data[:1])
    (base,) = fits(spans, kernel_size=(3, 3), groups=1, all_convs=("blocks.0.conv1", "blocks.0.conv2"))[:1]
    assert base.conv is not None and base.conv.stride == (1, 1)
    shapes = {(1, 5): ((0, 0), (2, 2)), (5, 1): ((2, 2), (0, 0)), (3, 3): ((1, 1), (1, 1))}
    made = [replace(base, conv=replace(base.conv, kernel_size=k, padding=p)) for k, p in shapes.items()]
    values = record_batches(spans.network.gm, Calibration((data,)), {base.span.entry, base.span.output})
    x, ys = values[base.span.entry], {base.span.output: values[base.span.output]}
    (group,) = fit_groups(spans.network, [base])
    alone = {c.key: replace(group, candidates=(c,)).fit(x, ys)[c.key] for c in made}
    monkeypatch.setattr("lmfx.calibration.fitting.MAX_UNKNOWNS", 9 * 8 + 1)  # of one; their union has 25 pixels
    found = replace(group, candidates=tuple(made)).fit(x, ys)
    assert found.keys() == alone.keys()
    for key, op in found.items():
        assert relative_error(alone[key](x), op(x)) < 1e-6
