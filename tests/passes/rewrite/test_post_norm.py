"""A norm that cannot stay between two convs moves to after the merged one; and an activation may be added after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import OptionError, PlanError
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.ir import MergePlan
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.spans.moved_norms import moved_norm
from lmfx.passes.trace.tracing import fingerprint, trace
from lmfx.planning.plan_file import make_document, plan_from_dict
from tests.helpers import double, run
from tests.toys import Net, compress


class Block(nn.Module):
    """conv, time embedding, norm, swish, conv, beside a skip."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.embed = nn.Linear(4, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x))) + self.embed(t)[:, :, None, None]
        h = self.norm2(h)
        return x + self.conv2(h * torch.sigmoid(h))


class Denoiser(nn.Module):
    def __init__(self, norm: Any = lambda: nn.GroupNorm(2, 8), width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, norm) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, t)
        return self.head(torch.relu(h))


G = torch.Generator().manual_seed(0)
X = (torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=G), torch.randn(2, 4, dtype=torch.float64, generator=G))


def model(norm: Any = lambda: nn.GroupNorm(2, 8)) -> nn.Module:
    torch.manual_seed(0)
    made = double(Denoiser(norm))
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return made


def spans_of(made: nn.Module, **options: Any) -> SpanSet:
    graph = trace(made, X)
    return enumerate_spans(Network(graph), SpanOptions(**{"realize": ("compose",), "norm": "post", **options}))


def pair(spans: SpanSet, block: int = 0, kept: int = 2) -> Any:
    names = (f"blocks.{block}.conv1", f"blocks.{block}.conv2")
    found = [c for c in spans if c.convs == names and c.realization == "compose" and len(c.kept) == kept]
    return max(found, key=lambda c: (c.span.series, c.span.start))  # after norm1 and its swish, inside the skip


NORMS: dict[str, Any] = {
    "group": lambda: nn.GroupNorm(2, 8),
    "group without weights": lambda: nn.GroupNorm(4, 8, affine=False),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kept", [1, 2])
def test_merged_equals_trainable_with_a_norm_behind(name: str, kept: int) -> None:
    made = model(NORMS[name])
    spans = spans_of(made)
    c = pair(spans, 0, kept)
    student = rewrite(spans.network.gm, MergePlan((c,)))
    merged = merge(student)
    other = (torch.randn(1, 3, 12, 11, dtype=torch.float64), X[1][:1])
    for x in (X, other):
        assert relative_error(run(student, x), run(merged, x)) <= 1e-12
    kinds = [type(merged.get_submodule(str(n.target))) for n in merged.graph.nodes if n.op == "call_module"]
    assert kinds.count(type(NORMS[name]())) == 4  # norm2 has moved


def test_the_moved_norm_is_what_the_paper_has() -> None:
    # norm1 and swish stay; conv2 after conv1, the vector and then the norm, with the weights of norm2.
    made: Any = model()
    spans = spans_of(made)
    c = pair(spans)
    merged = run(merge(rewrite(spans.network.gm, MergePlan((c,)))), X)
    with torch.no_grad():
        block, x = made.blocks[0], made.stem(X[0])
        a = nn.functional.silu(block.norm1(x))
        inner = nn.functional.pad(a, (2, 2, 2, 2))
        first = nn.functional.conv2d(inner, block.conv1.weight, block.conv1.bias) + block.embed(X[1])[:, :, None, None]
        second = block.norm2(nn.functional.conv2d(first, block.conv2.weight, block.conv2.bias))
        expected = made.head(torch.relu(made.blocks[1](x + second, X[1])))
    assert relative_error(expected, merged) <= 1e-12


def test_a_span_that_ends_in_a_norm_needs_no_other() -> None:
    modules = [m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))]
    graph = trace(double(nn.Sequential(nn.Conv2d(3, 8, 1), *modules)), X[0])
    spans = enumerate_spans(Network(graph), SpanOptions(realize=("compose",), norm="post"))
    composed = [c for c in spans if c.realization == "compose"]
    assert composed and all((c.post_norm is None) == (c.span.activation is not None) for c in composed)
    for c in composed:
        merged = merge(rewrite(graph, MergePlan((c,))))
        inside = spans.network.series[c.span.series].layers[c.span.start : c.span.stop]
        removed = sum(lay.activation is not None for lay in inside) - (c.span.activation is not None)
        norms = sum(isinstance(m, nn.GroupNorm) for m in merged.modules())
        assert norms == 3 - removed + (c.post_norm is not None)


def test_of_several_norms_the_last_is_kept_and_whole_blocks_move_theirs() -> None:
    spans = spans_of(model())
    moved = [c for c in spans if c.realization == "compose" and c.post_norm is not None]
    assert {len([p for p in c.convs if p.startswith("blocks")]) for c in moved} >= {1, 2, 4}
    for c in moved:
        names = [spans.network.path(n) for n in (c.post_norm,)]
        blocks = sorted({p.split(".")[1] for p in c.convs if p.startswith("blocks")})
        assert not blocks or names[0].startswith(f"blocks.{blocks[-1]}.")


def test_other_channels_get_a_norm_of_the_same_kind() -> None:
    group = moved_norm(nn.GroupNorm(4, 8, eps=1e-3), 12)
    assert isinstance(group, nn.GroupNorm) and (group.num_groups, group.num_channels, group.eps) == (4, 12, 1e-3)
    odd = moved_norm(nn.GroupNorm(4, 8), 6)
    assert isinstance(odd, nn.GroupNorm) and odd.num_groups == 6
    instance = moved_norm(nn.InstanceNorm2d(8, affine=True), 3)
    assert isinstance(instance, nn.InstanceNorm2d) and instance.num_features == 3 and instance.affine
    same = nn.GroupNorm(2, 8)
    assert torch.equal(moved_norm(same, 8).weight, same.weight)  # type: ignore[union-attr]
    assert moved_norm(same, 8) is not same
    assert moved_norm(type("Own", (nn.GroupNorm,), {"forward": lambda self, x: x})(2, 8), 4) is None


def test_post_and_affine_are_other_candidates_with_other_rows() -> None:
    made = model()
    post, affine = pair(spans_of(made)), pair(spans_of(made, norm="affine"))
    assert affine.post_norm is None and post.key == f"{affine.key}:post"


@pytest.mark.parametrize("norm", ["post", "affine"])
def test_the_whole_pipeline_with_norms(norm: str, tmp_path: Path) -> None:
    made = model().float()
    x = tuple(v.float() for v in X)
    net = compress(made, x, 0.8, realize=("compose",), norm=norm, include=("*conv*",))
    assert lmfx.result_of(net).frontier.spans.options.norm == norm
    graph = lmfx.trace(made, x)
    chosen = pair(lmfx.spans(graph, realize=("compose",), norm=norm))
    plan = MergePlan((chosen,), fingerprint(graph), surrogate="affine")
    assert (plan.candidates[0].post_norm is not None) == (norm == "post")
    assert plan_from_dict(make_document(plan)) == plan
    student = lmfx.rewrite(graph, plan, calibration=x)
    for form, name in ((student, "student"), (lmfx.merge(student), "merged")):
        lmfx.save(form, tmp_path / name)
        assert torch.equal(run(lmfx.load(tmp_path / name, made), x), run(form, x))
    assert relative_error(run(student, x), run(lmfx.merge(student), x)) < 1e-5


def test_a_composed_candidate_is_scored_and_timed_with_its_norm() -> None:
    from lmfx.latency.candidate_workloads import Workloads

    made = model().float()
    graph = lmfx.trace(made, tuple(v.float() for v in X))
    spans = lmfx.spans(graph, realize=("compose",), norm="post")
    c = pair(spans)
    table = lmfx.score(graph, spans=spans, calibration=tuple(v.float() for v in X), exact=True, progress=False)
    merged = merge(rewrite(graph, MergePlan((c,))))
    with torch.no_grad():
        z, y = graph(*(v.float() for v in X)).flatten(1), merged(*(v.float() for v in X)).flatten(1)
    scale = (z - z.mean(0)).square().sum(1).mean()
    assert table[c.key] == pytest.approx(-0.5 * float((y - z).square().sum(1).mean() / scale), rel=1e-3)
    workload = Workloads(spans.network)(c)
    plain = Workloads(spans.network)(replace(c, post_norm=None))
    assert workload is not None and "GroupNorm" in workload.signature
    assert plain is not None and "GroupNorm" not in plain.signature


def test_a_plan_with_a_norm_that_is_not_there_is_refused() -> None:
    spans = spans_of(model())
    for wrong in ("no_such", spans.network.nodes["x"].name, "stem"):
        with pytest.raises(PlanError, match="has no such norm"):
            rewrite(spans.network.gm, MergePlan((replace(pair(spans), post_norm=wrong),)))


def test_older_plans_without_the_new_fields_are_read() -> None:
    document = make_document(MergePlan((pair(spans_of(model(), norm="affine")),)))
    for held in (document["plan"], *document["plan"]["candidates"]):
        held.pop("activation_after", None), held.pop("post_norm", None)
    assert plan_from_dict(document).candidates[0].post_norm is None


# --- an activation after it -------------------------------------------------------------------------------------------


def composed(graph: Any, convs: tuple[str, ...]) -> Any:
    spans = enumerate_spans(Network(graph), SpanOptions(realize=("compose",)))
    return next(c for c in spans if c.convs == convs and c.kept == convs and c.realization == "compose")


class Bottleneck(nn.Module):
    """A block that ends linearly, beside its skip or not, and a conv after it."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return self.c(y + x if self.skip else y)


@pytest.mark.parametrize("skip", [False, True])
def test_a_span_that_ended_linearly_gets_an_activation(skip: bool) -> None:
    torch.manual_seed(0)
    made: Any = double(Bottleneck(skip))
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    graph = trace(made, x)
    spans = enumerate_spans(Network(graph), SpanOptions(realize=("compose",)))
    c = next(c for c in spans if c.convs == ("a", "b") and c.kept == ("a", "b") and ("/" in c.span.series) == skip)
    student = rewrite(graph, MergePlan((c,), activation_after="relu6"))
    merged = merge(student)
    with torch.no_grad():
        y = made.b(made.a(x))
        expected = made.c(nn.functional.relu6(y + x if skip else y))
    # The border differs: padding stands before both convs in the merged form, as in the trainable one.
    assert relative_error(run(student, x), run(merged, x)) <= 1e-12
    assert relative_error(expected[..., 1:-1, 1:-1], run(merged, x)[..., 1:-1, 1:-1]) <= 1e-12
    assert sum(isinstance(m, nn.ReLU6) for m in merged.modules()) == 1


def test_what_ends_in_an_activation_or_leaves_the_network_gets_none() -> None:
    made = double(nn.Sequential(*(m for _ in range(4) for m in (nn.Conv2d(3, 3, 3), nn.ReLU()))))
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    graph = trace(made, x)
    for convs in (("0", "2"), ("2", "4")):
        plan = MergePlan((composed(graph, convs),), activation_after="relu6")
        assert not any(isinstance(m, nn.ReLU6) for m in rewrite(graph, plan).modules())
    last = double(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)))
    plan = MergePlan((composed(trace(last, x), ("0", "2")),), activation_after="relu6")
    assert not any(isinstance(m, nn.ReLU6) for m in rewrite(trace(last, x), plan).modules())


def test_an_activation_behind_travels_with_the_plan(tmp_path: Path) -> None:
    made = double(Net(8)).float()
    x = torch.randn(2, 3, 12, 12)
    net = compress(made, x, 0.6, realize=("compose",), activation_after="gelu")
    plan = lmfx.result_of(net).plan
    assert plan.activation_after == "gelu" and plan_from_dict(make_document(plan)) == plan
    lmfx.save(net, tmp_path / "out")
    assert torch.equal(run(lmfx.load(tmp_path / "out", made), x), run(net, x))
    student = compress(made, x, 0.6, realize=("compose",), activation_after="gelu", merge=False)
    assert any(isinstance(m, LinearSpan) for m in student.modules())
    assert relative_error(run(student, x), run(lmfx.merge(student), x)) < 1e-5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm": "behind"}, "norm='behind': use one of 'affine', 'post'"),
        ({"activation_after": "ReLU"}, "activation_after='ReLU': use None, or one of 'relu', 'relu6'"),
        ({"activation_after": 6}, "activation_after=6"),
        ({"method": "layeronly", "norm": "post"}, "merges nothing, so norm="),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        compress(Net().eval(), torch.randn(1, 3, 12, 12), 0.8, **options)
