"""Each candidate is timed as the runtime will run it, each configuration once, and what cannot pay has no row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.latency import Measurement, Workload
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.latency.candidate_workloads import Workloads
from lmfx.latency.profiling import digest, profile_spans
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanSet
from tests.helpers import double
from tests.toys import Block, images, toy

X = images(1)


class Spy(RooflineBackend):
    """A roofline that notes what it is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[str] = []

    def measure(self, workloads: Iterable[Workload], *args: Any, **options: Any) -> dict[str, Measurement]:
        listed = list(workloads)
        self.seen += [w.signature for w in listed]
        return super().measure(listed, *args, **options)


def spans_of(model: nn.Module, example: Tensor = X, **options: Any) -> SpanSet:
    return lmfx.spans(lmfx.trace(model, example), **options)


def ops(workload: Workload | None) -> list[str]:
    assert workload is not None
    gm: Any = workload.build()
    names = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            names.append(type(gm.get_submodule(node.target)).__name__)
        elif node.op == "call_function":
            names.append(node.target.__name__)
    return names


def by(spans: SpanSet, **wanted: Any) -> list[Candidate]:
    return [c for c in spans if all(getattr(c, k, getattr(c.span, k, None)) == v for k, v in wanted.items())]


class Residual(nn.Module):
    """Convs around one block: the block's join is a layer of the outer series."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.stem(x))))


@pytest.fixture
def residual() -> SpanSet:
    return spans_of(double(Residual()).float())


# --- joins ------------------------------------------------------------------------------------------------------------


def test_the_sum_and_its_activation_go_with_the_last_span_of_the_main_branch(residual: SpanSet) -> None:
    make = Workloads(residual.network)
    branch = next(name for name in residual.network.series if "/" in name and residual.network.series[name].layers)
    last = len(residual.network.series[branch].layers)
    carried = by(residual, series=branch, stop=last)
    assert carried
    for candidate in carried:
        assert ops(make(candidate))[-2:] == ["add", "ReLU"], candidate.key
    for candidate in by(residual, series=branch, stop=last - 1):
        workload = make(candidate)
        assert workload is None or "add" not in ops(workload), candidate.key


def test_the_joins_own_row_is_zero(residual: SpanSet) -> None:
    make = Workloads(residual.network)
    (layer,) = [lay for lay in residual.network.series["0"].layers if lay.parallel]
    index = residual.network.series["0"].layers.index(layer)
    (join,) = by(residual, series="0", start=index, stop=index + 1, realization="keep")
    assert make(join) is None
    table = profile_spans(residual, RooflineBackend())
    assert table.ms(join.key) == 0


def test_a_merged_block_has_neither_sum_nor_skip(residual: SpanSet) -> None:
    make = Workloads(residual.network)
    whole = [c for c in residual if c.convs == ("block.conv1", "block.conv2") and "/" not in c.span.series]
    merged = [c for c in whole if c.realization in ("compose", "fit")]
    assert merged
    for candidate in merged:
        assert ops(make(candidate)) in (["Conv2d", "ReLU"], ["ConstantPad2d", "Conv2d", "ReLU"])


def test_a_sum_of_two_convs_is_carried_by_one_of_them() -> None:
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.main = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2, 1)
            self.side, self.last = nn.Conv2d(4, 8, 1, 2), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x))
            return self.last(torch.relu(self.main(y) + self.side(y)))

    spans = spans_of(Down().eval())
    make = Workloads(spans.network)
    keeps = [make(c) for c in by(spans, realization="keep")]
    assert sum("add" in ops(w) for w in keeps if w is not None) == 1


def test_a_join_that_no_branch_can_carry_has_a_row_of_its_own() -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.last(torch.relu(self.conv(y)) + y)

    spans = spans_of(Activated().eval())
    make = Workloads(spans.network)
    joins = [c for c in by(spans, realization="keep") if make(c) is not None and "add" in ops(make(c))]
    (join,) = joins
    assert ops(make(join)) == ["add"]
    assert profile_spans(spans, RooflineBackend()).ms(join.key) > 0


# --- one measurement a configuration ----------------------------------------------------------------------------------


def test_equal_configurations_are_measured_once() -> None:
    spans = spans_of(toy())
    spy = Spy()
    table = profile_spans(spans, spy)
    assert len(set(spy.seen)) < len(table)
    make = Workloads(spans.network)
    first, second = (by(spans, convs=(f"blocks.{i}.conv1",), realization="keep")[0] for i in (0, 1))
    a, b = make(first), make(second)
    assert a is not None and b is not None and a.signature == b.signature
    assert table.ms(first.key) == table.ms(second.key) > 0


def test_equal_merged_configurations_are_the_same_object() -> None:
    spans = spans_of(toy())
    make = Workloads(spans.network)
    key = {c: (c.conv, spans.network.shape(c.span.entry)) for c in spans if c.realization in ("fit", "compose")}
    twins = [
        (a, b) for a in key for b in key if key[a] == key[b] and a.realization != b.realization and a.span == b.span
    ]
    assert twins
    assert all(make(a) is make(b) for a, b in twins)


def test_another_size_is_another_signature() -> None:
    signatures = []
    for size in (12, 16):
        spans = spans_of(toy(), images(1, size=size))
        workload = Workloads(spans.network)(by(spans, convs=("stem",), realization="keep")[0])
        assert workload is not None
        signatures.append(workload.signature)
    assert len(set(signatures)) == 2


# --- what the table holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [toy, lambda: double(Residual()).float()], ids=["net", "residual"])
def test_the_kept_rows_add_up_to_the_whole_network(model: Any) -> None:
    spans = spans_of(model(), images(1, size=32))
    backend = RooflineBackend()
    table = profile_spans(spans, backend)
    total = sum(table.ms(c.key) for c in spans if c.realization == "keep")
    ((whole,),) = backend.measure_interleaved([(spans.network.gm, [images(1, size=32)])], 1)
    assert total == pytest.approx(whole, rel=0.01)


def test_what_is_not_faster_than_keeping_its_span_has_no_row() -> None:
    spans = spans_of(toy(), max_kernel_size=None)
    table = profile_spans(spans, RooflineBackend(overhead_us=0.0))
    merged = [c for c in spans if c.realization != "keep"]
    present = [c for c in merged if c.key in table]
    assert 0 < len(present) < len(merged)
    for candidate in present:
        assert table.ms(candidate.key) < table.kept(candidate)
    backend, make = RooflineBackend(overhead_us=0.0), Workloads(spans.network)
    for candidate in merged:
        workload = make(candidate)
        if candidate.key not in table and workload is not None:
            ms = backend.ms(workload.build(), workload.inputs)
            assert ms >= table.kept(candidate), candidate.key


def test_every_kept_layer_is_timed_also_where_no_plan_can_change_it() -> None:
    spans = spans_of(toy(), include=("blocks.1.*",))
    spy = Spy()
    table = profile_spans(spans, spy)
    assert all(c.key in table for c in spans if c.realization == "keep")
    stem = by(spans, convs=("stem",), realization="keep")[0]
    assert table.ms(stem.key) > 0
    assert any("Conv2d<3,8" in s for s in spy.seen)


def test_kept_latency_counts_everything_inside_a_span(residual: SpanSet) -> None:
    table = profile_spans(residual, RooflineBackend())
    whole = [c for c in residual if c.span.series == "0" and c.span.start == 0]
    longest = max(whole, key=lambda c: c.span.stop)
    assert longest.span.stop == len(residual.network.series["0"].layers)
    every = sum(m.ms for k, m in table.rows.items() if k.endswith(":keep"))
    assert table.kept(longest) == pytest.approx(every) == table.total()


def test_the_table_knows_what_it_is_good_for() -> None:
    small, large = (profile_spans(spans_of(toy(), images(2, size=s)), RooflineBackend()) for s in (12, 16))
    assert small.identity["batch"] == 2 and small.identity["dtype"] == "float32"
    assert small.identity["backend"] == "roofline"
    with pytest.raises(lmfx.TableError, match="graph"):
        small.merge(large)


def test_the_digest_tells_graphs_and_sizes_apart_and_not_weights() -> None:
    seen = [digest(lmfx.trace(m, x)) for m, x in ((toy(), X), (toy(), X), (toy(width=4), X), (toy(), images(2)))]
    assert seen[0] == seen[1] and len(set(seen)) == 3


def test_a_workload_of_every_candidate_runs_and_gives_the_shape_of_its_span() -> None:
    spans = spans_of(toy())
    make = Workloads(spans.network)
    made = [(c, make(c)) for c in spans]
    assert {c.realization for c, workload in made if workload is not None} >= {"keep", "compose", "fit"}
    for candidate, workload in made:
        if workload is None:
            continue
        from lmfx.export.specs import off_meta

        with torch.no_grad():
            out = off_meta(workload.build())(*(torch.zeros(shape, dtype=dtype) for shape, dtype in workload.inputs))
        assert tuple(out.shape) == spans.network.shape(candidate.span.exit), candidate.key
