"""Plans become networks: names, types, kept activations, and everything that must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import PlanError, VerifyError
from lmfx.passes.graph.verify import check_graph, relative_error
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite, span_names
from lmfx.passes.spans.enumeration import SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import fingerprint, trace
from tests.helpers import check_rewrite, double, ops_of, pick, run, spans_of

X = torch.randn(2, 4, 11, 8, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


def blocks(count: int = 2) -> nn.Module:
    return double(nn.Sequential(*(Block() for _ in range(count)), nn.Conv2d(4, 5, 1)))


def linear_chain(*, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Convs of which some have no activation after them, as in an inverted residual."""
    conv = lambda: nn.Conv2d(4, 4, 3, padding=1)  # noqa: E731
    return double(nn.Sequential(conv(), act(), conv(), conv(), act(), conv()))


def both(*pickers: Any) -> Callable[[SpanSet], list[Candidate]]:
    return lambda spans: [c for picker in pickers for c in picker(spans)]


def test_no_plan_gives_the_network_itself() -> None:
    merged = check_rewrite(blocks(), X, MergePlan(), edits=0)
    assert torch.equal(run(merged, X), run(blocks_like(merged), X))


def blocks_like(graph: fx.GraphModule) -> nn.Module:
    model = blocks()
    model.load_state_dict(graph.state_dict())
    return model


def test_names_of_untouched_modules_stay() -> None:
    merged = check_rewrite(
        blocks(), X, pick(realization="compose", series="0", start=0, stop=1, kernel=(5, 5)), edits=1
    )
    names = {name for name, _ in merged.named_parameters()}
    assert {"0.merged.weight", "0.merged.bias", "1.conv1.weight", "1.bn2.bias", "2.weight"} <= names
    assert not any(name.startswith(("0.conv", "0.bn")) for name in names)


def test_two_spans_that_touch_without_an_activation_between_them_both_count() -> None:
    # Span 1 ends at conv 2, which has no activation: span 2 must read the merged conv and not the old one.
    model = linear_chain()
    first = pick(realization="compose", convs=("0", "2"), kept=("0", "2"))
    second = pick(realization="compose", convs=("3", "5"), kept=("3", "5"))
    merged = check_rewrite(model, X, both(first, second), after=["Conv2d", "Conv2d"], edits=2)
    x = torch.randn(1, 4, 31, 31, dtype=torch.float64)
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    expected = x
    for conv in convs:
        expected = conv(expected)
    middle = (..., slice(10, 21), slice(10, 21))
    assert torch.allclose(run(merged, x)[middle], expected[middle], rtol=1e-10, atol=1e-10)


def test_a_span_after_a_dropped_one_reads_what_that_one_read() -> None:
    model = linear_chain()
    plan = both(pick(realization="drop", convs=("0",)), pick(realization="drop", convs=("2",)),
                pick(realization="compose", convs=("3", "5"), kernel=(5, 5)))  # fmt: skip
    merged = check_rewrite(model, X, plan, edits=1)
    assert ops_of(merged) == ["ReLU", "Conv2d"]


def test_dropping_everything_leaves_the_input() -> None:
    model = linear_chain()
    spans = spans_of(model, X)
    last = [c for c in spans if c.realization == "drop" and (c.span.start, c.span.stop) == (2, 4)]
    drops = [pick(realization="drop", convs=(name,)) for name in ("0", "2")]
    merged = check_rewrite(model, X, both(*drops, lambda s: last), edits=0)
    assert ops_of(merged) == ["ReLU"] and torch.equal(run(merged, X), X.relu())


def test_repeated_idempotent_activations_become_one_and_others_stay() -> None:
    for act, words in ((nn.ReLU, ["ReLU"]), (nn.SiLU, ["SiLU", "SiLU"])):
        model = double(nn.Sequential(nn.Conv2d(4, 4, 1), act(), nn.Conv2d(4, 4, 1), act()))
        plan = both(pick(realization="drop", convs=("0",)), pick(realization="drop", convs=("2",)))
        check_rewrite(model, X, plan, after=words, edits=0)


def test_a_branch_is_rewritten_without_touching_its_sum() -> None:
    choose = pick(realization="compose", series="0/0.0", start=0, stop=2, kernel=(5, 5))
    merged = check_rewrite(blocks(1), X, choose, after=["Conv2d", "add", "ReLU", "Conv2d"], edits=1)
    assert "0.merged" in dict(merged.named_modules())


def test_merged_names_do_not_clash() -> None:
    model = blocks(1)
    model[0].merged = nn.Identity()
    model[0].merged.weight = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
    gm = trace(blocks(2), X)
    spans = enumerate_spans(Network(gm))
    a, b = (pick(realization="fit", series=f"0/{i}.0", start=0, stop=1)(spans)[0] for i in range(2))
    c = pick(realization="fit", series="0/0.0", start=1, stop=2)(spans)[0]
    names = span_names(gm, MergePlan((a, c, b)))
    assert names == ["0.merged", "0.merged_1", "1.merged"]


def test_uneven_padding_stands_in_a_pad_before_the_conv() -> None:
    model = double(
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    )
    merged = check_rewrite(model, X, pick(realization="compose", convs=("1", "3"), kept=("1", "3")),
                           after=["ConstantPad2d", "Conv2d"], edits=1)  # fmt: skip
    linear = nn.Sequential(*(model[i] for i in (0, 1, 3)))  # without the activation; borders differ by the padding
    middle = (..., slice(2, -2), slice(2, -2))
    assert run(merged, X).shape == X.shape
    assert torch.allclose(run(merged, X)[middle], run(linear, X)[middle], rtol=1e-10, atol=1e-10)


def test_a_fit_with_an_even_window_follows_its_size_rule() -> None:
    model = double(nn.Sequential(nn.Conv2d(4, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 1)))
    others = [torch.randn(1, 4, n, n + 1, dtype=torch.float64) for n in (4, 5, 6, 7)]
    fits = [c for c in spans_of(model, X) if c.realization == "fit" and c.convs == ("0", "2")]
    assert any(c.conv is not None and c.conv.padding[0] == (0, 1) for c in fits), [c.key for c in fits]
    for candidate in fits:
        merged = check_rewrite(model, X, lambda s, c=candidate: [c], edits=1, others=others)
        for x in others:
            assert run(merged, x).shape == run(model, x).shape


def test_surrogates_stand_where_activations_were() -> None:
    model = double(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    gm = trace(model, X)
    spans = enumerate_spans(Network(gm))
    (candidate,) = pick(realization="compose", convs=("0", "2"), kept=("0", "2"))(spans)
    relu = spans.network.series["0"].layers[0].activation
    assert relu is not None
    scale, bias = torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    trainable = rewrite(gm, MergePlan((candidate,)), {relu: (scale, bias)})
    expected = model[2](model[0](X) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)).relu()
    assert relative_error(expected, run(trainable, X)) <= 1e-14
    assert relative_error(expected, run(merge(trainable), X)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_merged_network_has_the_models_type(dtype: torch.dtype) -> None:
    model, x = blocks().to(dtype), X.to(dtype)
    for kind in ("compose", "fit"):
        choose = pick(realization=kind, series="0", start=0, stop=1, kernel=(5, 5))
        merged = check_rewrite(model, x, choose, edits=1, tolerance=1e-5 if dtype == torch.float32 else 1e-12)
        assert {p.dtype for p in merged.parameters()} == {dtype}
        assert run(merged, x).dtype == dtype


def test_the_trainable_form_trains_and_still_merges_exactly() -> None:
    model = blocks()
    gm = trace(model, X)
    spans = enumerate_spans(Network(gm))
    plan = MergePlan(tuple(pick(realization="compose", series="0", start=0, stop=2, kernel=(5, 5))(spans)))
    trainable = rewrite(gm, plan)
    optimizer = torch.optim.SGD(trainable.parameters(), lr=1e-3)
    before = copy.deepcopy(trainable.state_dict())
    trainable.train()
    for _ in range(3):
        optimizer.zero_grad()
        trainable(X).square().mean().backward()
        optimizer.step()
    trainable.eval()
    changed = [k for k, v in trainable.state_dict().items() if not torch.equal(v, before[k])]
    assert any("merged" in k and k.endswith("weight") for k in changed)
    assert relative_error(run(trainable, X), run(merge(trainable), X)) <= 1e-12


def test_the_merged_network_may_be_compressed_again() -> None:
    merged = check_rewrite(
        blocks(), X, pick(realization="compose", series="0", start=0, stop=1, kernel=(3, 3)), edits=1
    )
    again = check_rewrite(merged, X, pick(realization="compose", series="0", start=0, stop=2), edits=1)
    assert ops_of(again) == ["Conv2d", "ReLU", "Conv2d"]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_merged_network_runs_at_other_batches_and_sizes(batch: int) -> None:
    others = [torch.randn(batch, 4, h, w, dtype=torch.float64) for h, w in ((5, 9), (16, 3), (1, 1))]
    check_rewrite(blocks(), X, pick(realization="compose", series="0", start=0, stop=2, kernel=(5, 5)), others=others)


def test_a_network_of_one_pixel_is_merged() -> None:
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    check_rewrite(blocks(), x, pick(realization="compose", series="0", start=0, stop=2, kernel=(5, 5)), edits=1)


def test_several_outputs_stay_in_their_container() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = Block(), Block(), Block()

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.stem(x)
            return {"a": self.a(y), "rest": [self.b(y), y]}

    def whole_blocks(spans: SpanSet) -> list[Candidate]:
        found = [c for c in spans if c.realization == "compose" and "/" not in c.span.series]
        return [c for c in found if c.conv is not None and c.conv.kernel_size == (5, 5)]

    merged = check_rewrite(double(Two()), X, whole_blocks, edits=3)
    assert set(run(merged, X)) == {"a", "rest"}


# --- plans that do not fit --------------------------------------------------------------------------------------------


def test_a_plan_for_another_network_is_refused() -> None:
    gm = trace(blocks(), X)
    plan = MergePlan((), fingerprint(trace(linear_chain(), X)))
    with pytest.raises(PlanError, match="the plan was made for graph .*, this one is .*: trace the same model"):
        rewrite(gm, plan)


@pytest.mark.parametrize(
    "change", [{"series": "7"}, {"start": 5, "stop": 99}, {"entry": "nothing"}, {"exit": "nothing"}, {"start": -1}]
)
def test_a_span_that_is_not_in_the_graph_is_refused(change: dict[str, Any]) -> None:
    gm = trace(blocks(), X)
    (good,) = pick(realization="compose", series="0", start=0, stop=1, kernel=(5, 5))(enumerate_spans(Network(gm)))
    bad = replace(good, span=replace(good.span, **change))
    with pytest.raises(PlanError, match="is not in this graph"):
        rewrite(gm, MergePlan((bad,)))


# --- verify -----------------------------------------------------------------------------------------------------------


def test_a_graph_with_a_value_nobody_reads_is_found() -> None:
    gm = trace(linear_chain(), X)
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "output")):
        gm.graph.call_function(F.relu, (next(n for n in gm.graph.nodes if n.op == "placeholder"),))
    with pytest.raises(VerifyError, match="computes values that nobody reads: relu"):
        check_graph(gm)


def test_a_module_that_nothing_reads_is_found() -> None:
    gm = trace(linear_chain(), X)
    gm.add_module("left_over", nn.Conv2d(1, 1, 1))
    with pytest.raises(VerifyError, match="the parameter left_over.weight, which nothing reads"):
        check_graph(gm)


def test_a_graph_that_calls_a_missing_module_is_found() -> None:
    gm = trace(linear_chain(), X)
    del gm._modules["3"]
    with pytest.raises(VerifyError):
        check_graph(gm)


def test_outputs_that_differ_are_told_apart() -> None:
    a, b = linear_chain(), linear_chain()
    assert relative_error(a(X), copy.deepcopy(a)(X)) == 0.0
    assert relative_error(a(X), b(X)) > 1e-6
    with pytest.raises(VerifyError, match="output shapes"):
        relative_error(X, X[:1])


def test_relative_error_of_nothing_is_absolute() -> None:
    assert relative_error(torch.zeros(3), torch.tensor([0.0, 3.0, 4.0])) == 5.0
    assert relative_error({"a": torch.ones(4)}, {"a": torch.ones(4) * 2}) == 1.0


def test_a_linear_span_reads_as_what_it_is() -> None:
    gm = trace(blocks(), X)
    spans = enumerate_spans(Network(gm))
    plan = MergePlan(tuple(pick(realization="compose", series="0", start=0, stop=1, kernel=(5, 5))(spans)))
    trainable = rewrite(gm, plan)
    span = trainable.get_submodule("0.merged")
    assert isinstance(span, LinearSpan)
    assert "4, 4, kernel_size=(5, 5), stride=(1, 1), padding=((2, 2), (2, 2))" in repr(span)
    assert trainable.meta["lmfx_spans"] == {"0.merged": plan.candidates[0].key}


def test_a_parameter_of_a_container_that_was_folded_away_does_not_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.last = nn.Conv2d(3, 3, 1)
            self.gamma = nn.Parameter(torch.full((3, 1, 1), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.gamma * self.conv(x)))  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Scaled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)  # type: ignore[no-any-return]

    model, x = Net().eval(), torch.randn(1, 3, 9, 9)
    net = rewrite(trace(model, x), MergePlan())
    assert "block.gamma" not in dict(net.named_parameters())
    torch.testing.assert_close(net(x), model(x))


def test_a_form_that_shares_tensors_computes_the_same_and_leaves_the_graph_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 11, 9)
    graph = trace(model.eval(), x)
    composed = [c for c in enumerate_spans(Network(graph)) if c.realization == "compose"]
    plan = MergePlan((composed[0],), fingerprint(graph))
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    own, shared = (merge(rewrite(graph, plan, share_tensors=s), share_tensors=s) for s in (False, True))
    torch.testing.assert_close(own(x), shared(x), rtol=0, atol=0)
    pointers = {p.data_ptr() for p in graph.parameters()}
    assert any(p.data_ptr() in pointers for p in shared.parameters())
    assert not any(p.data_ptr() in pointers for p in own.parameters())
    assert all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())
