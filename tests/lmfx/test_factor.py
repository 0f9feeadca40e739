"""Factored convs through the whole pipeline: candidates, fits, scores, latencies, files, reports, refits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.factor_fits import FactorFits
from lmfx.calibration.images import Calibration, as_calibration
from lmfx.calibration.layer_sums import sums_of
from lmfx.calibration.places import find_sites
from lmfx.calibration.students import Students
from lmfx.importance import Magnitude, Reconstruction
from lmfx.importance.change import Scorer
from lmfx.importance.dominance import bounded_by
from lmfx.latency.candidate_workloads import Workloads
from lmfx.passes.errors import PlanError
from lmfx.passes.graph.node_facts import call_of
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint
from lmfx.report.spans import spans_table
from tests.helpers import double
from tests.toys import compress


def chain(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A stem, three dense convs (stride 2; an explicit uneven pad), a classifier."""
    torch.manual_seed(seed)
    layers = [
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU6()),
        *(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(24, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ]
    return double(nn.Sequential(*layers)).to(dtype)


def drawn(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(count, *(shape or (3, 17, 14)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x + x.roll(1, -1)).to(dtype)  # neighbours are alike, as in pictures


def factors_of(net: nn.Module, x: Tensor, **options: Any) -> tuple[SpanSet, list[Candidate]]:
    spans = lmfx.spans(lmfx.trace(net, x[:1]), **{"realize": ("factor",), **options})
    return spans, [c for c in spans if c.realization == "factor"]


def separable(net: nn.Module, multiplier: int) -> None:
    """Make every conv a product."""
    for m in net.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            w = m.weight.data
            depthwise = torch.randn(w.shape[1], multiplier, w[0, 0].numel(), dtype=w.dtype)
            pointwise = torch.randn(w.shape[0], w.shape[1], multiplier, dtype=w.dtype)
            w.copy_(torch.einsum("ocq,cqt->oct", pointwise, depthwise).view_as(w) * w.std())


def test_dense_convs_of_several_channels_are_factored() -> None:
    spans, found = factors_of(chain(), drawn(2))
    assert spans_table(spans).count("keep; factor 3x3 m1, 3x3 m2") == 3
    names = [(c.convs[0], c.conv.multiplier) for c in found if c.conv]
    assert names == [(n, m) for n in ("3", "6", "10") for m in (1, 2)]
    assert found[0].change == "3x3 as depthwise and pointwise"
    assert found[1].change == "3x3 as 2 x depthwise and pointwise"


class Side(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(4, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.conv(x) + self.embed(t)[:, :, None, None]).relu()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 8, 3, stride=2),
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(8, 1, 3),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 3)),
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ZeroPad2d(1)),
        nn.Conv2d(300, 8, 3),
    ],
    ids=[
        "1x1",
        "grouped",
        "depthwise",
        "transposed",
        "few in",
        "few out",
        "pool",
        "norm before",
        "pad after",
        "too many unknowns",
    ],
)
def test_other_layers_are_not(layer: nn.Module) -> None:
    channels = next(m.in_channels for m in layer.modules() if hasattr(m, "in_channels"))
    _, found = factors_of(double(nn.Sequential(layer, nn.ReLU())), drawn(2, channels, 12, 12))
    assert not found


def test_a_vector_from_the_side_an_option_and_a_method_leave_nothing_to_factor() -> None:
    x = drawn(2)
    example = (drawn(1, 8, 9, 9), drawn(1, 4))
    spans = lmfx.spans(lmfx.trace(Side().double().eval(), example), realize=("factor",))
    assert all(c.realization == "keep" for c in spans)
    assert {c.convs for c in factors_of(chain(), x, exclude=("6",))[1]} == {("3",), ("10",)}
    assert not factors_of(chain(), x, realize=("compose", "fit"))[1]
    assert not factors_of(chain(), x, realize=("compose", "factor"), method="depth")[1]
    assert {c.convs for c in factors_of(chain(), x, max_fit_unknowns=16 * 9)[1]} == {("3",)}


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_conv_that_is_a_product_loses_nothing(multiplier: int, calibrated: bool) -> None:
    net, x = chain(), drawn(12)
    separable(net, multiplier)
    spans, found = factors_of(net, x)
    plan = MergePlan(tuple(c for c in found if c.conv and c.conv.multiplier == multiplier))
    assert len(plan.candidates) == 3
    data = {"calibration": x} if calibrated else {}
    student = lmfx.rewrite(spans.network.gm, plan, **data)
    for net_form in (student, lmfx.merge(student)):
        for other in (x, drawn(3, 3, 11, 20)):
            assert torch.allclose(net_form(other), net(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_one_and_three_dimensions_strides_dilations_and_padding_modes(ndim: int, mode: str) -> None:
    torch.manual_seed(0)
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    conv = make(6, 10, 3, stride=2, padding=2, dilation=2, padding_mode=mode)
    net = nn.Sequential(conv, nn.ReLU()).double().eval()
    separable(net, 1)
    x = drawn(4, 6, *(9, 8, 7)[:ndim])
    spans, found = factors_of(net, x)
    student = lmfx.rewrite(spans.network.gm, MergePlan((found[0],)), calibration=x)
    assert torch.allclose(student(x), net(x), rtol=1e-9, atol=1e-9)
    names = [str(n.target) for n in student.graph.nodes if n.op == "call_module"]
    assert names[-3:] == ["0_depthwise", "0_pointwise", "1"]


KINDS = ("depthwise", "pointwise")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


def test_a_conv_of_two_calls_is_factored_for_both() -> None:
    torch.manual_seed(0)
    net, x = Twice().double().eval(), drawn(16, 8, 9, 9)
    spans, found = factors_of(net, x)
    assert [len(c.spans) for c in found] == [2, 2]
    plan = MergePlan((found[1],))
    student, blank = (lmfx.rewrite(spans.network.gm, plan, **data) for data in ({"calibration": x}, {}))
    calls = {kind: [call_of(n) for n in student.graph.nodes if n.target == f"body.0_{kind}"] for kind in KINDS}
    assert calls == {"depthwise": [0, 1], "pointwise": [0, 1]}
    with torch.no_grad():
        fitted, first = (float((s(x) - net(x)).square().mean()) for s in (student, blank))
    separable(net, 2)
    exact = lmfx.rewrite(lmfx.trace(net, x[:1]), MergePlan((found[1],)), calibration=x)
    assert fitted < 0.9 * first and torch.allclose(exact(x), net(x), rtol=1e-9, atol=1e-9)


def test_factors_of_a_conv_of_two_calls_are_made_from_what_both_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = Twice().double().eval(), drawn(16, 8, 9, 9)
    spans, found = factors_of(net, x)
    fits, seen = FactorFits(spans.network, Calibration((x,))), []
    monkeypatch.setattr(FactorFits, "_factor", lambda self, name, candidates, sums: seen.append(sums))
    fits.prepare(found)
    each = sums_of(spans.network, fits.images, fits._nodes(found[0]))
    assert len(each) == 2 and seen[0].n == sum(part.total.n for part in each.values())
    assert torch.allclose(seen[0].xx, sum(part.total.xx for part in each.values()))


def test_the_mean_of_the_output_stays() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU()).double().eval(), drawn(64, 8, 9, 9) + 3.0
    spans, found = factors_of(net, x)
    plan = MergePlan((found[0],))
    student, blank = (lmfx.rewrite(spans.network.gm, plan, **data) for data in ({"calibration": x}, {}))

    def shift(form: nn.Module) -> float:
        """By how much the means of the channels are off, before the activation."""
        with torch.no_grad():
            parts = [form.get_submodule(f"0_{kind}") for kind in KINDS]
            return float((parts[1](parts[0](x)) - net[0](x)).mean((0, 2, 3)).abs().amax())

    assert shift(student) < 0.05 * shift(blank)


def test_factors_of_frozen_weights_are_frozen() -> None:
    net, x = chain(), drawn(2)
    net[3].requires_grad_(False)
    spans, found = factors_of(net, x)
    student = lmfx.rewrite(spans.network.gm, MergePlan((found[0], found[2])))
    for name, trains in (("3", False), ("6", True)):
        parameters = [p for kind in KINDS for p in student.get_submodule(f"{name}_{kind}").parameters()]
        assert len(parameters) == 3 and all(p.requires_grad is trains for p in parameters)


def test_data_make_factors_better_and_a_refit_makes_a_plan_of_them_better_still() -> None:
    net, x = chain(), drawn(96)
    spans, found = factors_of(net, x)
    plan = MergePlan(tuple(c for c in found if c.conv and c.conv.multiplier == 1))
    graph, others = spans.network.gm, drawn(200)[100:]
    forms = [lmfx.rewrite(graph, plan), lmfx.rewrite(graph, plan, calibration=x)]
    forms.append(lmfx.rewrite(graph, plan, calibration=x, refit=True))
    with torch.no_grad():
        errors = [float((f(others) - net(others)).square().mean()) for f in forms]
    if torch.equal(forms[0](others), forms[1](others)):
        raise AssertionError("calibration changed nothing")
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.9 * errors[1]
    sites = {s.path for s in find_sites(forms[1], graph, plan)}
    assert {"3_pointwise", "6_pointwise", "10_pointwise"} <= sites and not any("depthwise" in s for s in sites)


def test_scores_are_what_the_rewritten_network_loses() -> None:
    net, x = chain(), drawn(32)
    spans, found = factors_of(net, x)
    scorer = Scorer(Reconstruction(exact=True), spans, as_calibration(x, x[:1]), None, found)
    table = dict(scorer.run(found, list))
    parts, scale = scorer.judged_parts
    students = Students(Analysis.of(spans.network), scorer.calibration)
    for c in found:
        plan = MergePlan((c,), fingerprint(spans.network.gm))
        (seen,) = scorer.judged.tensors
        for student in (students.sketch(plan, lambda c: scorer.made(c)[0]), students.student(plan)):
            with torch.no_grad():
                change = (student(seen) - parts[0].output).square().sum() / len(seen)
            assert table[c.key] == pytest.approx(-0.5 * float(change) / scale, rel=1e-6)


@pytest.mark.parametrize("estimator", [Reconstruction(exact=True), Reconstruction(exact=False), Magnitude()])
def test_more_filters_score_no_worse_and_bound_fewer(estimator: Any) -> None:
    net, x = chain(), drawn(48)
    spans, found = factors_of(net, x)
    table = lmfx.score(spans.network.gm, estimator, calibration=x, spans=spans, progress=False)
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert table[one.key] < table[two.key] < 0
    bounded = bounded_by(spans.network, found)
    assert [b.tolist() for b in bounded[:2]] == [[1], []]


def test_a_row_is_that_of_two_convs() -> None:
    spans, found = factors_of(chain(dtype=torch.float32), drawn(2, dtype=torch.float32))
    make = Workloads(spans.network)
    work = make(found[-1])
    assert work is not None
    module = work.build()
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.groups, m.kernel_size) for m in convs] == [
        (24, 48, 24, (3, 3)),
        (48, 16, 1, (1, 1)),
    ]
    assert module(*(torch.randn(shape, dtype=dtype) for shape, dtype in work.inputs)).shape == (1, 16, 9, 6)
    table = lmfx.profile(spans.network.gm, "roofline", spans=spans, progress=False)
    one, two = (table.ms(c.key) for c in found[:2])
    assert make(found[0]) is not make(found[1]) and one < two


@pytest.mark.parametrize("merge", [True, False])
def test_compress_save_load_report_export_and_compress_again(tmp_path: Path, merge: bool) -> None:
    net, x = chain(dtype=torch.float32), drawn(48, 3, 48, 48, dtype=torch.float32)
    small = compress(net, x[:1], 0.8, calibration=x, realize=("factor",), merge=merge)
    plan = lmfx.result_of(small).plan
    assert plan.candidates and {c.realization for c in plan.candidates} == {"factor"}
    name = plan.candidates[0].all_convs[0]
    said = lmfx.report(small)
    assert f"{name}: {plan.candidates[0].change}" in said and "factored" in said
    assert plan.conv_counts == (len(plan.candidates), 2 * len(plan.candidates))
    again = lmfx.load(lmfx.save(small, tmp_path / "net"), chain(1, torch.float32))
    assert torch.equal(again(x), small(x)) and lmfx.result_of(again).plan == plan
    lmfx.export_onnx(lmfx.merge(small) if not merge else small, x[:1], tmp_path / "net.onnx")
    twice = compress(small, x[:1], 0.9, calibration=x)
    assert twice(x).shape == (48, 5)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"multiplier": 0}, "0 depthwise filters for each channel and a rank of 0"),
        ({"rank": 4}, "2 depthwise filters for each channel and a rank of 4"),
        ({"multiplier": 0, "rank": -1}, "-1 channels"),
        ({"multiplier": 0, "rank": 1000}, "1000 channels"),
        ({"multiplier": 0, "rank": 8, "groups": 8}, "8 channels"),
        ({"multiplier": -1}, "-1 depthwise filters"),
        ({"multiplier": 10**6}, "1000000 depthwise filters"),
        ({"groups": 8}, "2 depthwise filters"),
    ],
)
def test_a_plan_file_with_filters_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, int], word: str) -> None:
    _, found = factors_of(chain(), drawn(2))
    file = lmfx.save_plan(MergePlan((found[1],)), tmp_path / "plan.json")
    document = json.loads(file.read_text())
    document["plan"]["candidates"][0]["conv"].update(change)
    file.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=word):
        lmfx.load_plan(file)


OTHERS: list[dict[str, Any]] = [
    {"dilation": [2, 2]},
    {"stride": [3, 3]},
    {"kernel_size": [5, 5]},
    {"multiplier": 64},  # more than are ever offered: their system would take all memory
    {"multiplier": 0, "rank": 8},  # of a conv that has too few channels for it
]


@pytest.mark.parametrize("change", OTHERS)
def test_a_plan_that_factors_another_conv_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    spans, found = factors_of(chain(), drawn(2))
    file = lmfx.save_plan(MergePlan((found[1],)), tmp_path / "plan.json")
    document = json.loads(file.read_text())
    document["plan"]["candidates"][0]["conv"].update(change)
    file.write_text(json.dumps(document))
    with pytest.raises(PlanError, match="solve again"):
        lmfx.rewrite(spans.network.gm, lmfx.load_plan(file))


class Gone(nn.Module):
    """A path that only the branch of a sum reads, which a plan may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        side = self.side(z).relu().mean((2, 3), keepdim=True)
        x = self.stem(x).relu()
        return x + self.body(x * side)


def test_factors_of_what_nobody_reads_any_more_are_left_out() -> None:
    torch.manual_seed(0)
    net, x, z = Gone().double().eval(), drawn(24, 8, 9, 9), drawn(24, 8, 7, 7)
    graph = lmfx.trace(net, (x[:1], z[:1]))
    spans = lmfx.spans(graph, realize=("factor", "fit"))
    side = next(c for c in spans if c.realization == "factor" and c.convs == ("side",))
    whole = next(c for c in spans if c.realization == "drop" and c.all_convs == ("body.0", "body.2"))
    student = lmfx.rewrite(graph, MergePlan((side, whole)), calibration=(x, z))
    assert student(x, z).shape == net(x, z).shape


# --- through fewer channels -------------------------------------------------------------------------------------------


def wide(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Convs of 64 channels and more: 3 x 3 with a stride, with an uneven pad, and 1 x 1."""
    torch.manual_seed(seed)
    layers = [
        *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU()),
        *(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(96, 256, 3), nn.ReLU6()),
        *(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 5)),
    ]
    return double(nn.Sequential(*layers)).to(dtype)


def ranked(net: nn.Module, x: Tensor, **options: Any) -> tuple[SpanSet, list[Candidate]]:
    spans, found = factors_of(net, x, **options)
    return spans, [c for c in found if c.conv is not None and c.conv.rank]


def through(net: nn.Module, rank: int) -> None:
    """Give every conv of 64 outputs and more a rank."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.out_channels >= 64:
            u, s, v = torch.linalg.svd(m.weight.data.flatten(1), full_matrices=False)
            m.weight.data.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(m.weight))


def test_wide_convs_go_through_fewer_channels() -> None:
    spans, found = ranked(wide(), drawn(2))
    names = [(c.convs[0], c.conv.rank) for c in found if c.conv]
    assert names == [
        ("0", 8),
        *(("3", r) for r in (8, 24, 32, 48)),
        *(("7", r) for r in (32, 64, 96, 128)),
        *(("9", r) for r in (32, 64, 96)),
    ]
    assert found[-1].change == "1x1 to 96 channels and pointwise"
    assert "1x1 r32, 1x1 r64, 1x1 r96" in spans_table(spans)
    assert {c.convs[0] for c in ranked(wide(), drawn(2), max_fit_unknowns=64)[1]} == {"0"}


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_conv_of_that_rank_loses_nothing(calibrated: bool) -> None:
    net, x = wide(), drawn(12)
    through(net, 8)
    spans, found = ranked(net, x)
    least = {c.convs: c for c in reversed(found)}  # of each conv the lowest rank
    plan = MergePlan(tuple(c for c in found if c in least.values()))
    assert len(plan.candidates) == 4
    data = {"calibration": x} if calibrated else {}
    student = lmfx.rewrite(spans.network.gm, plan, **data)
    names = [str(n.target) for n in student.graph.nodes if n.op == "call_module"]
    assert {"0_low_rank", "0_pointwise", "7_low_rank", "9_pointwise"} <= {*names}
    for net_form in (student, lmfx.merge(student)):
        for other in (x, drawn(3, 3, 11, 20)):
            assert torch.allclose(net_form(other), net(other), rtol=1e-8, atol=1e-8)


def test_scores_of_ranks_are_what_the_rewritten_network_loses_and_the_mean_stays() -> None:
    net, x = wide(), drawn(24)
    spans, found = ranked(net, x)
    scorer = Scorer(Reconstruction(exact=True), spans, as_calibration(x, x[:1]), None, found)
    table = dict(scorer.run(found, list))
    parts, scale = scorer.judged_parts
    students = Students(Analysis.of(spans.network), scorer.calibration)
    (seen,) = scorer.judged.tensors
    for c in found[::3]:
        student = students.student(MergePlan((c,), fingerprint(spans.network.gm)))
        with torch.no_grad():
            change = (student(seen) - parts[0].output).square().sum() / len(seen)
        assert table[c.key] == pytest.approx(-0.5 * float(change) / scale, rel=1e-6)
    student = lmfx.rewrite(spans.network.gm, MergePlan((found[4],)), calibration=x)
    first, last = (student.get_submodule(f"3_{kind}") for kind in ("low_rank", "pointwise"))
    with torch.no_grad():
        left = last(first(net[:3](x))) - net[:5](x)
    assert float(left.mean((0, 2, 3)).abs().amax()) < 0.1 * float(left.abs().mean())


@pytest.mark.parametrize("estimator", [Reconstruction(exact=True), Reconstruction(exact=False), Magnitude()])
def test_higher_ranks_score_no_worse_and_bound_lower_ones(estimator: Any) -> None:
    net, x = wide(), drawn(32)
    spans, every = factors_of(net, x)
    _, found = ranked(net, x)
    table = lmfx.score(spans.network.gm, estimator, calibration=x, spans=spans, progress=False)
    of = {name: [table[c.key] for c in found if c.convs == (name,)] for name in ("3", "7", "9")}
    assert all(rows == sorted(rows) and rows[-1] < 0 for rows in of.values())
    bounded = bounded_by(spans.network, every)
    for c, rows in zip(every, bounded, strict=True):
        of_one = [every[i] for i in rows]
        assert c.conv is not None and all(d.convs == c.convs and d.conv is not None for d in of_one)
        assert all((d.conv.rank > c.conv.rank) if c.conv.rank else d.conv.multiplier > 1 for d in of_one if d.conv)


def test_a_network_of_ranks_is_planned_saved_loaded_refitted_and_exported(tmp_path: Path) -> None:
    net, x = wide(dtype=torch.float32), drawn(48, 3, 24, 24, dtype=torch.float32)
    through(net, 32)
    small = compress(net, x[:1], 0.5, calibration=x, realize=("factor",), merge=False)
    plan = lmfx.result_of(small).plan
    assert any(c.conv is not None and c.conv.rank for c in plan.candidates)
    again = lmfx.load(lmfx.save(small, tmp_path / "net"), wide(1, torch.float32))
    assert torch.equal(again(x), small(x)) and lmfx.result_of(again).plan == plan
    lmfx.export_onnx(lmfx.merge(small), x[:1], tmp_path / "net.onnx")
    sites = {s.path for s in find_sites(small, lmfx.trace(net, x[:1]), plan)}
    assert any(path.endswith("_pointwise") for path in sites)
