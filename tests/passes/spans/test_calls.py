"""Layers that are called several times: one merged conv for all calls where all calls agree, a refusal where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.fitting import FitGroup
from lmfx.calibration.images import as_calibration
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.latency.whole_networks import random_plans
from lmfx.passes.errors import PlanError
from lmfx.passes.ir import Candidate, ConvConfig, MergePlan, Span
from lmfx.passes.spans.layers import Network
from lmfx.planning.plan_file import make_document, plan_from_dict
from tests.helpers import check_rewrite
from tests.helpers import spans_of as spans_in


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    for value, low, high in ((made.running_mean, -1, 1), (made.running_var, 0.5, 2), (made.weight, 0.5, 2)):
        assert value is not None
        nn.init.uniform_(value, low, high)
    nn.init.uniform_(made.bias, -1, 1)
    return made


def conv(before: int, after: int, k: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, k, bias=False, **options), norm(after))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b, self.act = conv(channels, channels, 3, padding=1), conv(channels, channels, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.a(x) + self.b(x) + x)
        return out


class Pyramid(nn.Module):
    """Three levels of different, odd sizes, and one head for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, 2, 1)
        depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.head = nn.Sequential(depthwise, nn.Conv2d(6, 6, 1), norm(6), nn.ReLU(), Block(6), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        coarse = self.coarse(x)
        return [self.head(v) for v in (self.fine(x), coarse, nn.functional.max_pool2d(coarse, 2))]


class Siamese(nn.Module):
    """One encoder of two images."""

    def __init__(self) -> None:
        super().__init__()
        depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.enc = nn.Sequential(
            conv(3, 6, 3, stride=2), nn.ReLU(), Block(6), nn.MaxPool2d(2), depthwise, conv(6, 5, 1), nn.ReLU()
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.enc(a) - self.enc(b)
        return out


class Recurrent(nn.Module):
    """One block that refines its own output three times."""

    def __init__(self) -> None:
        super().__init__()
        depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.stem, self.end = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        self.block = nn.Sequential(depthwise, conv(6, 6, 1), nn.ReLU(), Block(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        out: Tensor = self.end(x)
        return out


Inputs = tuple[Tensor, ...]
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, its inputs, its calls
    "pyramid": (Pyramid, 1, 3),
    "siamese": (Siamese, 2, 2),
    "recurrent": (Recurrent, 1, 3),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def made(case: str, images: int = 2) -> tuple[nn.Module, Inputs, int]:
    torch.manual_seed(0)
    build, inputs, calls = CASES[case]
    model = build().double().eval()
    return model, tuple(torch.randn(images, 3, 23, 21, dtype=torch.float64) for _ in range(inputs)), calls


def flat(output: Any) -> Tensor:
    return torch.cat([v.flatten() for v in (output if isinstance(output, (list, tuple)) else [output])])


def joint(spans: lmfx.SpanSet) -> list[Candidate]:
    return [c for c in spans if c.calls]


def called(net: nn.Module, name: str) -> int:
    return sum(str(n.target) == name for n in net.graph.nodes)  # type: ignore[union-attr, operator]


# --- exact ------------------------------------------------------------------------------------------------------------


@every_case
def test_what_loses_nothing_is_merged_once_for_all_calls(case: str) -> None:
    model, x, calls = made(case)
    net = lmfx.simplify(model, x, growth=float("inf"))
    with torch.no_grad():
        torch.testing.assert_close(flat(net(*x)), flat(model(*x)), rtol=1e-11, atol=1e-11)
        bigger = tuple(torch.randn(1, 3, 31, 28, dtype=torch.float64) for _ in x)
        torch.testing.assert_close(flat(net(*bigger)), flat(model(*bigger)), rtol=1e-11, atol=1e-11)
    names = [n for n, c in zip(lmfx.result_of(net).names, lmfx.result_of(net).plan.candidates, strict=True) if c.calls]
    assert len(names) >= 2
    assert all(called(net, name) == calls for name in names)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) < sum(isinstance(m, nn.Conv2d) for m in model.modules())


@every_case
def test_each_composed_candidate_merges_to_what_its_trainable_form_computes_at_all_calls(case: str) -> None:
    model, x, calls = made(case)
    graph = lmfx.trace(model, x)
    found = [c for c in joint(lmfx.spans(graph)) if c.realization in ("compose", "drop")]
    assert {c.realization for c in found} == {"compose", "drop"}
    with torch.no_grad():
        for candidate in found:
            assert len(candidate.spans) == calls
            student = lmfx.rewrite(graph, MergePlan((candidate,)))
            net = lmfx.merge(student)
            torch.testing.assert_close(flat(net(*x)), flat(student(*x)), rtol=1e-11, atol=1e-11)
            if candidate.exact:
                torch.testing.assert_close(flat(net(*x)), flat(model(*x)), rtol=1e-11, atol=1e-11)
            elif candidate.realization == "compose" and set(candidate.kept) != set(candidate.all_convs):
                assert not torch.allclose(flat(net(*x)), flat(model(*x)))


def test_a_pad_of_its_own_is_made_before_every_call() -> None:
    torch.manual_seed(0)
    enc = nn.Sequential(nn.ZeroPad2d((2, 0, 1, 0)), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.ReLU())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = enc

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.enc(a).mean((2, 3)) - self.enc(b).mean((2, 3))
            return out

    model = Two().double().eval()
    x = torch.randn(2, 3, 9, 11).double(), torch.randn(2, 3, 14, 8).double()
    net = lmfx.simplify(model, x, growth=float("inf"))
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 1
    with torch.no_grad():
        torch.testing.assert_close(net(*x), model(*x), rtol=1e-11, atol=1e-11)


def test_a_norm_after_the_merged_conv_is_one_module_for_all_calls() -> None:
    torch.manual_seed(0)
    enc = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.ReLU())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = enc

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.enc(a) - self.enc(b)
            return out

    x = torch.randn(2, 3, 9, 11), torch.randn(2, 3, 9, 11)
    graph = lmfx.trace(Two().eval(), x)
    moved = [c for c in joint(lmfx.spans(graph, norm="post")) if c.post_norm is not None]
    assert moved
    net = lmfx.merge(lmfx.rewrite(graph, MergePlan((moved[0],))))
    assert sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == 1
    assert sum(isinstance(net.get_submodule(str(n.target)), nn.GroupNorm) for n in calls_of(net)) == 2
    with torch.no_grad():
        assert float(net(x[0], x[0]).abs().max()) == 0  # both calls are the same


def calls_of(net: Any) -> list[Any]:
    return [n for n in net.graph.nodes if n.op == "call_module"]


# --- tables and plans -------------------------------------------------------------------------------------------------


@every_case
def test_a_candidate_costs_what_all_of_its_calls_cost(case: str) -> None:
    model, x, _ = made(case)
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    rows = [c for c in joint(spans) if c.key in latency]
    assert rows
    every = tuple(one for c in rows for one in c.each())
    apart = lmfx.profile(graph, "roofline", spans=replace(spans, candidates=_keeps(spans) + every), progress=False)
    for c in rows:
        alone = [apart.ms(one.key) for one in c.each() if one.key in apart]
        if len(alone) == len(c.spans):
            assert latency.ms(c.key) == pytest.approx(sum(alone), rel=1e-9)
        assert latency.ms(c.key) < latency.kept(c) == pytest.approx(sum(latency.kept(one) for one in c.each()))


def _keeps(spans: lmfx.SpanSet) -> tuple[Candidate, ...]:
    return tuple(c for c in spans if c.realization == "keep")


@every_case
def test_every_plan_is_made_of_spans_that_do_not_meet_and_costs_what_it_is_said_to(case: str) -> None:
    model, x, calls = made(case)
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph)
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    scores = lmfx.score(graph, "magnitude", spans=spans, progress=False)
    frontier = lmfx.solve(graph, latency, scores, spans=spans)
    assert frontier.original == pytest.approx(latency.total())
    plans = [*random_plans(spans, latency, 12), *(point.plan for point in frontier)]
    assert any(c.calls for plan in plans for c in plan.candidates)
    for plan in plans:
        taken: list[Span] = []
        for c in plan.candidates:
            assert len(c.spans) in (1, calls, 2)
            for span in c.spans:
                assert not any(_meet(span, other) for other in taken)
                taken.append(span)
        assert plan.latency == pytest.approx(latency.total(plan))
        with torch.no_grad():
            assert flat(lmfx.rewrite(graph, plan)(*x)).isfinite().all()


def _meet(a: Span, b: Span) -> bool:
    def inside(inner: Span, outer: Span) -> bool:
        name = inner.series.removeprefix(outer.series + "/")
        return name != inner.series and outer.start <= int(name.split(".")[0]) < outer.stop

    return (a.series == b.series and a.start < b.stop and b.start < a.stop) or inside(a, b) or inside(b, a)


@every_case
def test_an_exact_score_is_how_far_the_output_moves_when_all_calls_change_at_once(case: str) -> None:
    model, x, _ = made(case, images=12)
    graph = lmfx.trace(model, x)
    spans = lmfx.spans(graph, realize=("compose",))
    found = [c for c in joint(spans) if not c.exact]
    assert len(found) > 3
    spans = replace(spans, candidates=tuple(found))
    scores = lmfx.score(graph, calibration=x, spans=spans, progress=False, exact=True, surrogate="identity", images=4)
    judged = next(iter(as_calibration(x, x).split(4)[1].batches(12)))  # which no fit sees
    with torch.no_grad():
        before = torch.cat([v.flatten(1) for v in _listed(graph(*judged))], 1)
        scale = (before - before.mean(0)).square().sum(1).mean()
        for c in found:
            after = torch.cat([v.flatten(1) for v in _listed(lmfx.rewrite(graph, MergePlan((c,)))(*judged))], 1)
            moved = 0.5 * (after - before).square().sum(1).mean() / scale
            assert -scores[c.key] == pytest.approx(float(moved), rel=1e-6)


def _listed(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (list, tuple)) else [output]


def test_to_second_order_the_changes_by_all_calls_add_up() -> None:
    model, x, _ = made("siamese", images=8)
    same = x[0], x[0].clone()  # what one call changes the other takes away
    graph = lmfx.trace(model, same)
    spans = lmfx.spans(graph, realize=("compose",))
    scores = lmfx.score(graph, calibration=same, spans=spans, progress=False, exact=False, surrogate="identity")
    values = [scores[c.key] for c in joint(spans) if not c.exact]
    assert len(values) > 3
    assert max(map(abs, values)) < 1e-12


# --- fits -------------------------------------------------------------------------------------------------------------


def test_a_fit_of_two_calls_is_the_fit_of_both_inputs_in_one_batch() -> None:
    model, x, _ = made("siamese", images=6)
    assert isinstance(model, Siamese)
    both = torch.cat(x)
    two, one = lmfx.trace(model, x), lmfx.trace(model.enc, both)
    chosen = [c for c in lmfx.spans(one) if c.realization == "fit" and c.conv is not None and c.conv.groups == 1]
    keys = {c.key: c for c in lmfx.spans(two)}
    checked = 0
    for c in [chosen[0], chosen[len(chosen) // 2], chosen[-1]]:
        alone = lmfx.rewrite(one, MergePlan((c,)), calibration=both)
        shared = lmfx.rewrite(two, MergePlan((keys[f"{c.key}:calls2"],)), calibration=x)
        with torch.no_grad():
            expected = alone(both)
            torch.testing.assert_close(shared(*x), expected[: len(x[0])] - expected[len(x[0]) :], rtol=1e-7, atol=1e-7)
        checked += 1
    assert checked == 3


def test_a_later_fit_sees_what_the_compressed_network_gives_it_at_all_calls() -> None:
    model, x, _ = made("siamese", images=6)
    assert isinstance(model, Siamese)
    both = torch.cat(x)
    two, one = lmfx.trace(model, x), lmfx.trace(model.enc, both)
    fits = [c for c in lmfx.spans(one) if c.realization == "fit" and c.conv is not None and c.conv.groups == 1]
    first = next(c for c in fits if (c.span.start, c.span.stop) == (0, 2))
    later = next(c for c in fits if c.span.start > 2 and c.span.stop == c.span.start + 2)
    keys = {c.key: c for c in lmfx.spans(two)}
    alone = lmfx.rewrite(one, MergePlan((first, later)), calibration=both)
    plan = MergePlan(tuple(keys[f"{c.key}:calls2"] for c in (first, later)))
    shared = lmfx.rewrite(two, plan, calibration=x)
    with torch.no_grad():
        expected = alone(both)
        torch.testing.assert_close(shared(*x), expected[: len(x[0])] - expected[len(x[0]) :], rtol=1e-6, atol=1e-6)


def test_a_fit_of_calls_of_different_sizes_finds_the_conv_that_all_of_them_have() -> None:
    torch.manual_seed(0)
    span = Span("0", 0, 1, "x", "y", "y", None)
    other = Span("1", 0, 1, "u", "v", "v", None)
    config = ConvConfig(3, 4, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    candidate = Candidate(span, "fit", config, calls=(other,))
    group = FitGroup("x", False, (candidate,), (), ("u",))
    true = nn.Conv2d(3, 4, 3, padding=1).double()
    x, u = torch.randn(8, 3, 9, 7).double(), torch.randn(8, 3, 14, 12).double()
    with torch.no_grad():
        found = group.fit(x, {"y": true(x), "v": true(u)}, others=[u])[candidate.key]
        torch.testing.assert_close(found.weight, true.weight, rtol=1e-5, atol=1e-5)
        pulled = group.fit(x, {"y": true(x), "v": -true(u)}, others=[u])[candidate.key]
    assert not torch.allclose(pulled.weight, true.weight, atol=0.1)  # the other call has its say


def test_a_fit_of_a_block_that_refines_its_own_output_keeps_the_network() -> None:
    model, x, _ = made("recurrent", images=8)
    graph = lmfx.trace(model, x)
    exact = next(c for c in joint(lmfx.spans(graph)) if c.exact and c.span.series == "0")
    fit = next(
        c for c in joint(lmfx.spans(graph)) if c.realization == "fit" and (c.span, c.conv) == (exact.span, exact.conv)
    )
    net = lmfx.rewrite(graph, MergePlan((fit,)), calibration=x)
    with torch.no_grad():
        torch.testing.assert_close(net(*x), model(*x), rtol=1e-3, atol=1e-3)


# --- the face ---------------------------------------------------------------------------------------------------------


@every_case
def test_a_compressed_network_has_shared_weights_and_is_saved_reported_and_loaded(case: str, tmp_path: Path) -> None:
    model, x, calls = made(case, images=3)
    images = x if len(x) > 1 else x[0]
    net = lmfx.compress(model, x, 0.5, calibration=images, latency="roofline", progress=False)
    result = lmfx.result_of(net)
    names = [n for n, c in zip(result.names, result.plan.candidates, strict=True) if c.calls and c.conv is not None]
    assert names
    assert all(called(net, n) in (calls, 2) for n in names)
    assert f"{calls} calls" in lmfx.report(net)
    assert plan_from_dict(make_document(result.plan)) == result.plan
    lmfx.save(net, tmp_path / "out")
    again = lmfx.load(tmp_path / "out", model)
    with torch.no_grad():
        torch.testing.assert_close(flat(again(*x)), flat(net(*x)), rtol=0, atol=0)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in net.parameters())


def test_a_plan_for_some_of_the_calls_is_refused() -> None:
    model, x, _ = made("pyramid")
    graph = lmfx.trace(model, x)
    candidate = next(c for c in joint(lmfx.spans(graph)) if len(c.spans) == 3 and c.realization == "compose")
    for calls in (candidate.calls[:1], candidate.calls[::-1], (*candidate.calls, candidate.span)):
        with pytest.raises(PlanError, match="calls of the plan's span"):
            lmfx.rewrite(graph, MergePlan((replace(candidate, calls=calls),)))


def test_a_plan_written_before_there_were_calls_is_read() -> None:
    model, x, _ = made("pyramid")
    alone = MergePlan((next(iter(joint(lmfx.spans(lmfx.trace(model, x))))).each()[0],))
    document = make_document(alone)
    del document["plan"]["candidates"][0]["calls"]
    assert plan_from_dict(document) == alone


# --- calls that do not agree ------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Two convs that are called at two places, with something of its own at the second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList([norm(4), norm(4)])
        self.own = nn.Conv2d(4, 4, 1)

    def call(self, x: Tensor, i: int) -> Tensor:
        x = self.one(x)
        if self.kind == "other activation":
            x = x.relu() if i else nn.functional.silu(x)
        if self.kind == "other statistics":
            x = self.norms[i](x)
        if self.kind == "other layers" and i:
            x = self.own(x)
        out: Tensor = self.two(x)
        return out.relu()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "another call":
            return self.call(a, 0), self.call(b, 1), self.two(nn.functional.max_pool2d(a, 2)).sigmoid()
        if self.kind == "other readers":
            inner = self.one(b)
            return self.call(a, 0), self.two(inner).relu(), inner
        if self.kind == "other options":
            return self.call(a, 0), nn.functional.conv2d(self.one(b), self.two.weight, self.two.bias, 2).relu()
        return self.call(a, 0), self.call(b, 1)


def spans_of(kind: str) -> lmfx.SpanSet:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 11, 9), torch.randn(2, 4, 8, 13)
    return lmfx.spans(lmfx.trace(Calls(kind).eval(), x))


def test_calls_that_agree_are_merged() -> None:
    assert any(c.exact and c.calls and len(c.convs) == 2 for c in spans_of("nothing"))


@pytest.mark.parametrize(
    ("kind", "calls"),
    [("other statistics", 2), ("other options", 2)],
)
def test_calls_that_do_not_agree_are_refused_and_all_named(kind: str, calls: int) -> None:
    spans = spans_of(kind)
    assert not any(c.realization == "compose" and len(c.convs) > 1 for c in spans)
    refused = [r for r in spans.refusals if "shared with another call that has other layers" in r.reason]
    assert refused
    assert max(len(r.nodes) for r in refused) == calls


@pytest.mark.parametrize(("kind", "calls"), [("other activation", 2), ("another call", 3)])
def test_a_conv_that_agrees_alone_is_replaced_for_all_calls_and_never_with_its_neighbour(kind: str, calls: int) -> None:
    spans = spans_of(kind)
    assert not any(c.realization == "compose" and len(c.convs) > 1 for c in spans)
    assert {len(c.calls) + 1 for c in spans if c.convs == ("two",) and c.realization != "keep"} == {calls}
    assert any("called elsewhere as well" in r.reason for r in spans.refusals)


@pytest.mark.parametrize("kind", ["pool before one call", "pad before one call", "pool after one call"])
def test_a_pool_or_pad_at_some_calls_only_is_no_part_of_the_layers_that_all_calls_have(kind: str) -> None:
    torch.manual_seed(0)

    class Some(Calls):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            other = nn.functional.pad(b, (1, 2, 0, 3)) if "pad" in kind else nn.functional.avg_pool2d(b, 2)
            if "after" in kind:
                return self.two(self.one(a)).relu(), nn.functional.avg_pool2d(self.two(self.one(b)), 3, 2).relu()
            return self.call(a, 0), self.call(other, 1)

    model = Some("nothing").double().eval()
    x = torch.randn(2, 4, 11, 9).double(), torch.randn(2, 4, 17, 13).double()
    graph = lmfx.trace(model, x)
    exact = [c for c in joint(lmfx.spans(graph)) if c.exact]
    assert [c.convs for c in exact] == [("one", "two")]
    with torch.no_grad():
        torch.testing.assert_close(
            flat(lmfx.merge(lmfx.rewrite(graph, MergePlan((exact[0],))))(*x)), flat(model(*x)), rtol=1e-11, atol=1e-11
        )


def test_surrogates_of_a_layer_are_those_of_all_of_its_calls() -> None:
    model, x, _ = made("siamese", images=4)
    assert isinstance(model, Siamese)
    x = x[0], 3 * x[1] + 1
    two, one = Network(lmfx.trace(model, x)), Network(lmfx.trace(model.enc, torch.cat(x)))
    both = affine_surrogates(two, as_calibration(x, x))
    single = affine_surrogates(one, as_calibration(torch.cat(x), torch.cat(x)))
    assert len(both) == 2 * len(single) == 6
    for calls in two.calls.activations():
        for name in calls[1:]:
            assert all(torch.equal(a, b) for a, b in zip(both[name], both[calls[0]], strict=True))
    for (scale, bias), name in zip(single.values(), [c[0] for c in two.calls.activations()], strict=False):
        torch.testing.assert_close(both[name][0], scale, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(both[name][1], bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["other layers", "other readers"])
def test_a_run_ends_where_the_calls_part(kind: str) -> None:
    spans = spans_of(kind)
    assert joint(spans)
    assert all(len(c.convs) == 1 for c in joint(spans))
    assert not any(c.realization == "compose" and len(c.convs) > 1 for c in spans)


def test_a_span_over_the_end_of_a_run_is_refused_with_all_calls() -> None:
    model, x, _ = made("pyramid")
    spans = lmfx.spans(lmfx.trace(model, x))
    refused = [r for r in spans.refusals if "called elsewhere as well" in r.reason]
    assert refused
    heads = [n for n in spans.network.nodes.values() if str(n.target) == "head.0"]
    assert len(heads) == 3
    assert any({n.name for n in heads} <= set(r.nodes) for r in refused)


def test_copies_of_equal_weights_are_no_calls_of_one_module() -> None:
    model, x, _ = made("siamese")
    assert isinstance(model, Siamese)

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = model.enc, Siamese().double().enc
            self.right.load_state_dict(self.left.state_dict())

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.left(a) - self.right(b)
            return out

    spans = lmfx.spans(lmfx.trace(Copies().eval(), x))
    assert not joint(spans)
    assert any(c.exact for c in spans)


def test_calls_on_other_batches_are_no_run() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU())

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = encoder

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.enc(x), self.enc(torch.cat([x, x.flip(3)])).reshape(2, -1, 4, 7, 7).sum(0)

    assert not joint(lmfx.spans(lmfx.trace(Doubled().eval(), torch.randn(2, 3, 9, 9))))


class Tails(nn.Module):
    """One body, called twice, and what comes after each call is another thing."""

    def __init__(self, *tails: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.tails = nn.ModuleList(tails)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = torch.relu(self.stem(x))
        values = (y, nn.functional.avg_pool2d(y, 2), nn.functional.avg_pool2d(y, 3))
        return [tail(self.body(v)) for tail, v in zip(self.tails, values, strict=False)]


@pytest.mark.parametrize(
    "tails", [(nn.ReLU(), nn.Identity()), (nn.GELU(), nn.ReLU()), (nn.Identity(), nn.ReLU(), nn.ReLU())]
)
def test_calls_that_end_in_other_activations_are_merged_up_to_them(tails: tuple[nn.Module, ...]) -> None:
    torch.manual_seed(0)
    model = Tails(*tails).double().eval()
    x = torch.randn(1, 3, 13, 11, dtype=torch.float64)
    spans = lmfx.spans(lmfx.trace(model, x))
    (chosen,) = [
        c for c in spans if c.convs == ("body.0", "body.2") and c.realization == "compose" and c.kept == c.convs
    ]
    assert len(chosen.calls) == len(tails) - 1
    net = lmfx.merge(lmfx.rewrite(spans.network.gm, MergePlan((chosen,), "")))
    assert len([m for m in net.modules() if isinstance(m, nn.Conv2d)]) == 2
    linear = Tails(*tails).double().eval()
    linear.load_state_dict(model.state_dict())
    linear.body[1] = nn.Identity()
    for found, wanted in zip(net(x), linear(x), strict=True):  # away from the borders
        torch.testing.assert_close(found[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2])


def test_a_layer_ends_before_the_activations_in_which_its_calls_differ() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.AvgPool2d(2)
            self.a, self.b = nn.ReLU(), nn.Tanh()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(self.pool(self.conv(x))), self.b(self.pool(self.conv(y)))

    torch.manual_seed(0)
    model = Two().double().eval()
    example = torch.randn(2, 3, 8, 10, dtype=torch.float64), torch.randn(2, 3, 8, 6, dtype=torch.float64)
    spans = spans_in(model, example, realize=("compose",))
    whole = next(c for c in spans if c.conv is not None and c.conv.kernel_size == (4, 4) and c.exact)
    assert len(whole.spans) == 2, "the conv and the pool, once for both calls"
    check_rewrite(model, example, lambda _: [whole], spans=spans, after=["Conv2d", "ReLU", "Conv2d", "Tanh"])


def test_what_is_inside_of_a_block_that_is_called_twice_is_merged_for_both_calls() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)
            self.c, self.out = nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.c(self.b(self.act(self.a(x)))) + x)
            return out

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Conv2d(3, 4, 1), Inner()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(self.block(self.first(x)))
            return out

    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    model = Outer().double().eval()
    spans = spans_in(model, x, realize=("compose",))
    pair = next(c for c in spans if c.kept == ("block.b", "block.c") and c.all_convs == c.kept)
    assert len(pair.spans) == 2 and "/" in pair.span.series
    check_rewrite(model, x, lambda _: [pair], spans=spans, edits=1)
