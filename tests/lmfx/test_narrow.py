"""Narrowed spans through the whole pipeline: fits, scores, latencies, files, reports, refits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration import layer_sums
from lmfx.calibration.images import as_calibration
from lmfx.calibration.narrow_fits import NarrowFits
from lmfx.calibration.places import find_sites
from lmfx.calibration.refitting import refit
from lmfx.calibration.students import Students
from lmfx.importance import Magnitude, Reconstruction
from lmfx.importance.change import Scorer
from lmfx.latency.candidate_workloads import Workloads
from lmfx.passes.errors import PlanError
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.rewrite.analysis import Analysis
from lmfx.passes.spans.enumeration import SpanSet
from lmfx.passes.trace.tracing import fingerprint
from tests.helpers import double
from tests.passes.spans.test_narrowing import Gated, SideBySide, conv
from tests.toys import compress, images


class Inverted(nn.Module):
    """A stem, two inverted residuals (one with a gate), a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 3, 3)
        self.first = Gated()
        self.second = nn.Sequential(
            *(conv(3, 48, bias=False), nn.BatchNorm2d(48), nn.ReLU6()),
            *(conv(48, 48, 3, groups=48, bias=False), nn.BatchNorm2d(48), nn.ReLU6()),
            *(conv(48, 3, bias=False), nn.BatchNorm2d(3)),
        )
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head((x + self.second(x)).mean((2, 3)))


def model(seed: int = 0, **kind: Any) -> nn.Module:
    torch.manual_seed(seed)
    return double(Inverted()).to(**{"dtype": torch.float32, **kind})


def spans_of(net: nn.Module, x: Tensor) -> SpanSet:
    return lmfx.spans(lmfx.trace(net, x[:1]), realize=("narrow",))


def cut_of(spans: SpanSet, reader: str, width: int) -> Candidate:
    return next(c for c in spans if [(k.reader, k.width) for k in c.cuts] == [(reader, width)])


def test_channels_that_depend_on_others_go_without_a_loss() -> None:
    """In float64: the last 24 hidden channels of a block are copies and scaled copies of others."""
    net, x = model(dtype=torch.float64), images(24).double()
    a, norm, deep, after = net.second[0], net.second[1], net.second[3], net.second[4]  # type: ignore[index]
    with torch.no_grad():
        for m in (a, deep):
            m.weight[24:] = m.weight[:24]
        for m in (norm, after):
            for value in (m.weight, m.bias, m.running_mean, m.running_var):
                value[24:] = value[:24]
    spans = spans_of(net, x)
    graph = spans.network.gm
    plan = MergePlan((cut_of(spans, "second.6", 24),), fingerprint(graph))
    student = lmfx.rewrite(graph, plan, calibration=x)
    torch.testing.assert_close(student(x), graph(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("most", [2500, 30])
def test_a_kernel_of_many_unknowns_makes_up_tap_by_tap(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Copies of channels go without a loss either way, with padding and a stride."""
    monkeypatch.setattr(layer_sums, "AUTO_UNKNOWNS", most)
    torch.manual_seed(0)
    net = double(nn.Sequential(conv(3, 16, bias=False), nn.ReLU(), nn.Conv2d(16, 4, 3, 2, 1), nn.Tanh(), conv(4, 3)))
    with torch.no_grad():
        net[0].weight[8:] = 2 * net[0].weight[:8]
    x = images(24).double()
    spans = spans_of(net, x)
    plan = MergePlan((cut_of(spans, "2", 8),), fingerprint(spans.network.gm))
    student = lmfx.rewrite(spans.network.gm, plan, calibration=x)
    with torch.no_grad():
        torch.testing.assert_close(student(x), net(x), rtol=1e-10, atol=1e-10)


def test_a_conv_of_which_nothing_is_read_keeps_a_channel_beside_the_others() -> None:
    net = double(SideBySide(2))
    with torch.no_grad():
        net.head.weight[:, 16:] = 0
    x = images(24).double()
    spans = spans_of(net, x)
    for width in {cut.width for c in spans for cut in c.cuts}:
        plan = MergePlan((cut_of(spans, "head", width),), fingerprint(spans.network.gm))
        student = lmfx.rewrite(spans.network.gm, plan, calibration=x)
        assert student.get_submodule("few").weight.shape[0] == 1
        assert student.get_submodule("wide").weight.shape[0] == width - 1


def test_fitted_readers_are_better_than_what_is_left_of_their_weights() -> None:
    net, x = model(), images(32)
    spans = spans_of(net, x)
    fits = NarrowFits.of(spans.network, as_calibration(x, x[:1]))
    assert fits is NarrowFits.of(spans.network, as_calibration(x, x[:1])), "they are made once"
    for reader, width in (("first.project", 16), ("second.6", 24)):
        plan = fits.completed(MergePlan((cut_of(spans, reader, width),), fingerprint(spans.network.gm)))
        plain = lmfx.passes.rewrite.trainable.rewrite(spans.network.gm, plan)
        fitted = Students(Analysis.of(spans.network), as_calibration(x, x[:1])).student(plan)
        with torch.no_grad():
            wanted = spans.network.gm(x)
            error = [float((n(x) - wanted).square().mean()) for n in (plain, fitted)]
        assert error[1] < 0.7 * error[0]


def test_scores_are_what_the_rewritten_network_loses() -> None:
    net, x = model(dtype=torch.float64), images(32).double()
    spans = spans_of(net, x)
    narrow = [c for c in spans if c.cuts]
    scorer = Scorer(Reconstruction(exact=True), spans, as_calibration(x, x[:1]), None, narrow)
    table = dict(scorer.run(narrow, list))
    parts, scale = scorer.judged_parts
    for c in narrow[::3]:
        plan = MergePlan((c,), fingerprint(spans.network.gm))
        student = Students(Analysis.of(spans.network), scorer.calibration).sketch(plan, lambda c: scorer.made(c)[0])
        (seen,) = scorer.judged.tensors
        with torch.no_grad():
            change = (student(seen) - parts[0].output).square().sum() / len(seen)
        assert table[c.key] == pytest.approx(-0.5 * float(change) / scale, rel=1e-9)


def test_wider_scores_no_worse_and_bounds_narrower() -> None:
    net, x = model(), images(48)
    spans = spans_of(net, x)
    for estimator in (Reconstruction(exact=True), Magnitude()):
        graph = spans.network.gm
        table = lmfx.score(graph, estimator, calibration=x, spans=spans, progress=False)
        for reader in ("first.project", "second.6"):
            rows = [table[c.key] for c in spans if len(c.cuts) == 1 and c.cuts[0].reader == reader]
            assert rows == sorted(rows) and rows[-1] <= 0 and rows[0] < rows[-1]


def test_a_row_is_the_sum_of_the_layers_at_their_widths() -> None:
    net, x = model(), images(2)
    spans = spans_of(net, x)
    make = Workloads(spans.network)
    c = cut_of(spans, "second.6", 24)
    works = make.each(c)
    shapes = [w.inputs for w in works]
    assert len(works) == 3 and any(s[0][0][1] == 24 for s in shapes)
    for w in works:
        w.build()(*(torch.randn(shape, dtype=dtype) for shape, dtype in w.inputs))
    kept = [make(k) for k in spans if k.realization == "keep" and k.span.series == c.span.series]
    assert {w.signature for w in works}.isdisjoint(k.signature for k in kept if k is not None)
    table = lmfx.profile(spans.network.gm, "roofline", spans=spans, progress=False)
    rows = [table.ms(cut_of(spans, "second.6", w).key) for w in (16, 24, 32, 40)]
    assert rows == sorted(rows) and rows[-1] < table.kept(c)


@pytest.mark.parametrize("merge", [True, False])
def test_compress_save_load_report_and_compress_again(tmp_path: Path, merge: bool) -> None:
    net, x = model(), images(48)
    small = compress(net, x[:1], 0.85, calibration=x, realize=("narrow",), merge=merge)
    result = lmfx.result_of(small)
    cuts = [cut for c in result.plan.candidates for cut in c.cuts]
    assert cuts and all(len(cut.channels) == cut.width for cut in cuts)
    assert f"{cuts[0].conv}: {cuts[0].of} -> {cuts[0].width} channels" in lmfx.report(small)
    assert small.get_submodule(cuts[0].reader).weight.shape[1] == cuts[0].width
    again = lmfx.load(lmfx.save(small, tmp_path / "net"), model(1))
    assert torch.equal(again(x), small(x)) and lmfx.result_of(again).plan == result.plan
    twice = compress(small, x[:1], 0.9, calibration=x, realize=("narrow", "fit", "compose"))
    assert twice(x).shape == (48, 5)


def test_a_plan_file_with_channels_that_cannot_be_is_refused(tmp_path: Path) -> None:
    net, x = model(), images(4)
    spans = spans_of(net, x)
    fits = NarrowFits.of(spans.network, as_calibration(x, x[:1]))
    plan = fits.completed(MergePlan((cut_of(spans, "second.6", 8),), fingerprint(spans.network.gm)))
    path = lmfx.save_plan(plan, tmp_path / "plan.json")
    assert lmfx.load_plan(path) == plan
    text = json.loads(path.read_text())
    cut = text["plan"]["candidates"][0]["cuts"][0]
    for change in (
        *({"width": 0}, {"width": 49}, {"channels": cut["channels"][:-1]}, {"channels": cut["channels"][::-1]}),
        *({"channels": [*cut["channels"][:-1], 48]}, {"channels": [-1, *cut["channels"][1:]]}, {"of": 2**40}),
    ):
        broken = json.loads(path.read_text())
        broken["plan"]["candidates"][0]["cuts"][0].update(change)
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(PlanError, match="damaged"):
            lmfx.load_plan(tmp_path / "broken.json")
    text["plan"]["candidates"][0]["cuts"] = []
    (tmp_path / "broken.json").write_text(json.dumps(text))
    with pytest.raises(PlanError, match="damaged"):
        lmfx.load_plan(tmp_path / "broken.json")


def test_refits_compare_narrowed_layers_on_the_channels_that_stay() -> None:
    net, x = model(), images(32)
    spans = spans_of(net, x)
    graph = spans.network.gm
    students = Students(Analysis.of(spans.network), as_calibration(x, x[:1]))
    plan = students.completed(MergePlan((cut_of(spans, "second.6", 24),), fingerprint(graph)))
    student = students.student(plan)
    sites = {s.path: s for s in find_sites(student, graph, plan)}
    (cut,) = plan.candidates[0].cuts
    stays = sites["second.0"].channels
    assert stays is not None and tuple(stays.tolist()) == cut.channels and sites["second.6"].channels is None
    refit(student, graph, as_calibration(x, x[:1]), plan=plan)


def test_frontiers_have_both_and_a_plan_without_channels_gets_them() -> None:
    net, x = model(), images(32)
    graph = lmfx.trace(net, x[:1])
    spans = lmfx.spans(graph, realize=("compose", "fit", "narrow"))
    latency = lmfx.profile(graph, "roofline", spans=spans, progress=False)
    score = lmfx.score(graph, calibration=x, spans=spans, latency=latency, progress=False)
    frontier = lmfx.solve(graph, latency, score, spans=spans)
    plans = [p.plan for p in frontier]
    assert any(c.cuts for p in plans for c in p.candidates)
    plan = next(p for p in plans if any(c.cuts for c in p.candidates))
    student = lmfx.rewrite(graph, plan, calibration=x, spans=spans)
    assert not any(cut.channels for c in plan.candidates for cut in c.cuts)
    assert student(x).shape == (32, 5)


def test_a_narrowed_network_is_recovered(tmp_path: Path) -> None:
    net, x = model(), images(48)
    student = compress(net, x[:1], 0.85, calibration=x, realize=("narrow",), merge=False)
    graph, chosen_by = lmfx.trace(net, x[:1]), x[3::8]
    before = lmfx.compare(student, graph, chosen_by).loss()
    lmfx.recover(student, net, x, minutes=0.03, progress=False)
    assert lmfx.compare(student, graph, chosen_by).loss() <= before * (1 + 1e-6)
    lmfx.export_onnx(lmfx.merge(student), x[:1], tmp_path / "net.onnx")


def test_layers_are_summed_together_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 2, 9, 1, 1, 1]
    monkeypatch.setattr(layer_sums, "rows_of", lambda size: size)
    monkeypatch.setattr(layer_sums, "GRAM_BYTES", 16 * 6)
    parts = list(layer_sums.in_parts(sizes, lambda size: [size]))
    assert parts == [[1, 2], [9], [1, 1, 1]] and list(layer_sums.in_parts([], lambda size: [size])) == []
