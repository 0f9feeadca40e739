"""The bugs that the fuzzer found, each as the smallest network that shows it (docs/fuzz.md lists them)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.passes.graph.map_shapes import spatial_maps
from lmfx.passes.graph.verify import relative_error
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.rewrite.trainable import rewrite
from lmfx.passes.spans.enumeration import SpanOptions
from lmfx.passes.trace.tracing import trace
from tests.fuzz.oracle import check_span
from tests.fuzz.prelude import ConvSame, Output
from tests.fuzz.properties import count
from tests.helpers import check_rewrite, check_trace, double, ops_of, pick, spans_of
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def compressed(model: nn.Module, x: Any, budget: float = 0.9, **options: Any) -> Any:
    return lmfx.compress(
        model, x, budget, latency="roofline", importance="magnitude", progress=False, max_span_convs=2, **options
    )


def test_an_out_argument_that_is_none_writes_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.conv(x), dim=1)  # torch.fx records out=None

    gm = check_trace(double(Net()), example(2, 3, 6, 6))
    assert noted(gm).tracer == "symbolic"


def rows(*last: nn.Module) -> dict[str, float]:
    """The roofline's rows of two convs and what comes after them."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), *last)
    compressed(double(net), example(1, 3, 12, 12))
    table = lmfx.profile(lmfx.trace(net, example(1, 3, 12, 12)), "roofline", progress=False, calibrate=False)
    return {key: row.ms for key, row in table.items()}


def test_a_roofline_row_of_a_pool_may_have_a_list_as_its_kernel() -> None:
    # torch keeps the list, and torch.fx makes one of each tuple that is an argument of a function
    as_lists = rows(nn.AvgPool2d([1, 2], [2, 1], ceil_mode=True))
    assert as_lists == rows(nn.AvgPool2d((1, 2), (2, 1), ceil_mode=True))
    other = rows(nn.AvgPool2d([1, 4], [2, 1], ceil_mode=True))
    assert as_lists["0:2-3:keep"] > other["0:2-3:keep"] > 0, "a wider window leaves fewer pixels to write"


def test_a_roofline_row_holds_an_activation_with_parameters_in_the_kernel_of_its_conv() -> None:
    fused, alone = rows(nn.PReLU(4), nn.Conv2d(4, 4, 3)), rows(nn.GroupNorm(4, 4), nn.Conv2d(4, 4, 3))
    assert fused == pytest.approx(rows(nn.ReLU(), nn.Conv2d(4, 4, 3)), rel=0.02)
    assert fused["0:1-2:keep"] < 0.75 * alone["0:1-2:keep"], "which is not a kernel of its own"


def test_what_a_selection_reads_is_a_map_as_far_as_its_result_is_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 2, 5, padding=3), nn.Conv1d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = torch.split(x, 1, 1)
            return first + self.b(self.a(second)[:, :, :1])  # at one pixel this looks like a conv of stride 3

    model, x = double(Net()), example(2, 2, 1)
    assert "x" in spatial_maps(trace(model, x))
    strides = {c.conv.stride for c in spans_of(model, x, realize=("fit",)) if c.conv is not None}
    assert strides == {(1,)}
    assert SpanOptions().realize  # fits are on by default


def test_a_dataclass_of_tensors_is_an_output() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Output:
            return Output(self.b(self.a(x).relu()))

    net = compressed(double(Net()), example(1, 3, 12, 12), 0.8)
    assert type(net(example(1, 3, 12, 12))) is Output


@pytest.mark.parametrize("name", ["graph", "code", "meta", "print_readable"])
def test_a_model_may_call_its_layers_as_a_graph_module_calls_its_own(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            setattr(self, name, nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(self.first(x))  # type: ignore[no-any-return]

    gm = check_trace(double(Net()), example(1, 3, 8, 8), ["Conv2d", "Conv2d", "ReLU"])
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_module"] == ["first", f"{name}_.0", f"{name}_.1"]


def test_the_pad_of_a_merged_conv_takes_no_name_of_the_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.merged_pad = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.merged_pad(self.conv(F.pad(x, (0, 1, 1, 0))).relu())  # type: ignore[no-any-return]

    model, x = double(Net()), example(2, 3, 6, 6)
    merged = check_rewrite(model, x, pick(realization="compose", convs=("conv",)), edits=1)
    assert ops_of(merged) == ["ConstantPad2d", "Conv2d", "ReLU", "Conv2d"]


def test_a_merged_conv_takes_no_name_of_a_parameter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
            self.merged = nn.Parameter(torch.randn(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nchw,oc->nohw", self.b(self.a(x).relu()), self.merged)

    merged = check_rewrite(double(Net()), example(2, 3, 9, 9), pick(realization="compose", convs=("a", "b")), edits=1)
    assert isinstance(merged.merged, nn.Parameter) and isinstance(merged.merged_1, nn.Conv2d)


def test_the_size_rule_of_a_network_of_a_dict_is_that_of_its_layers_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 2, padding=1), nn.Conv2d(3, 3, 3, stride=3)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            x = self.a(given["x"])
            return self.b(torch.sin(x.transpose(2, 3)).transpose(2, 3))  # type: ignore[no-any-return]

    model = double(Net())
    both = [c for c in spans_of(WithTensor(model), example(1, 3, 9, 9), realize=("fit",)) if len(c.all_convs) == 2]
    assert not both  # floor((n + 1) / 3) is ceil(n / 3) for 9 pixels, not for 10
    assert not [c for c in spans_of(model, ({"x": example(1, 3, 9, 9)},), realize=("fit",)) if len(c.all_convs) == 2]


class WithTensor(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model({"x": x})


def test_a_slice_of_a_sequential_is_traced_into() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())

        def forward(self, x: Tensor) -> Tensor:
            return self.body[:-1](x)  # type: ignore[no-any-return]

    gm = check_trace(double(Net()), example(1, 3, 8, 8), ["Conv2d", "ReLU"])
    assert noted(gm).tracer == "symbolic" and ops_of(gm)


def test_the_size_rule_of_a_join_is_that_of_a_branch_that_has_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, stride=3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return torch.cat([self.b(y), F.interpolate(y, size=(2, 2))], 1)  # the two agree from 4 to 6 pixels

    model, fit = double(Net()), SpanOptions(realize=("fit",))
    strides = {c.conv.stride for c in spans_of(model, example(1, 3, 4, 4), realize=("fit",)) if len(c.all_convs) == 2}
    assert strides == {(3, 3)}  # 4 pixels to 2 looked like a stride of 2, which 6 pixels are not
    net = check_rewrite(model, example(1, 3, 4, 4), pick(realization="fit", convs=("a", "b")), edits=1, options=fit)
    assert net(example(1, 3, 6, 6)).shape == model(example(1, 3, 6, 6)).shape


def test_one_tensor_in_a_dict_is_calibrated_as_it_is_given() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            x: Tensor = self.c(self.b(self.a(given["x"]).relu()).relu())
            return x

    x, images = torch.randn(2, 3, 16, 16), torch.randn(6, 3, 16, 16)
    model, outputs = Net().eval(), []
    for calibration in (None, images, [({"x": images},)], [({"x": i[None]},) for i in images]):
        net = lmfx.compress(
            model,
            ({"x": x},),
            0.6,
            calibration=calibration,
            latency="roofline",
            realize=("fit",),
            progress=False,
        )
        outputs.append(net({"x": x}).detach())
        assert outputs[-1].shape == (2, 4, 10, 10)
    assert relative_error(outputs[1], outputs[2]) < 1e-3, "the same images in another form"
    assert relative_error(outputs[1], outputs[3]) < 1e-3
    assert relative_error(outputs[1], outputs[0]) > 1e-2, "other images give another fit"


def test_a_pool_before_a_shared_conv_has_its_stride_on_one_pixel_as_well() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
            self.pool = nn.AvgPool2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.shared(self.pool(y)) + self.shared(self.pool(y).relu())

    model, one, more = double(Net()), example(2, 3, 1, 1), example(2, 3, 6, 6)
    spans = spans_of(model, one, realize=("fit", "drop"))
    graph = spans.network.gm
    changed = [c for c in spans if c.realization != "keep"]
    assert changed
    for candidate in changed:
        net = lmfx.merge(rewrite(graph, lmfx.MergePlan((candidate,))))
        assert net(more).shape == model(more).shape, candidate.key


def test_branches_of_different_strides_are_no_rule_where_they_meet_in_one_pixel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)  # 3 pixels become 2 and 1, and broadcast

    whole = [c for c in spans_of(double(Net()), example(2, 3, 1, 1), realize=("fit",)) if len(c.all_convs) == 2]
    assert not whole


def test_a_norm_does_not_move_to_where_it_has_one_value_a_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(6, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))  # type: ignore[no-any-return]

    for size, moved in ((7, 0), (8, 1)):  # to one pixel, and to four
        both = [
            c
            for c in spans_of(double(Net()), example(1, 6, size, size), realize=("compose",), norm="post")
            if len(c.kept) == 2 and c.post_norm is not None
        ]
        assert bool(both) == bool(moved)


@pytest.mark.parametrize("tracers", [("shapes",), ("export",)])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, (3, 2), (5, 5)), (2, (2, 3), (7, 5)), (2, (4, 4), (7, 7)), (2, (4, 4), (4, 4))]
)
def test_pads_that_are_computed_from_the_size_are_never_taken_for_those_of_another_one(
    kernel: int, stride: tuple[int, int], size: tuple[int, int], tracers: tuple[str, ...]
) -> None:
    model = double(nn.Sequential(ConvSame(4, 4, kernel, stride=stride), nn.ReLU()))
    gm = trace(model, example(2, 4, *size), tracers)
    for n in range(4, 12):
        x = example(1, 4, n, n + 1)
        try:
            result = gm(x)
        except lmfx.SizeError:
            continue
        assert result.shape == model(x).shape and relative_error(result, model(x)) < 1e-12


class RowMore(nn.Module):
    """A map that gets a row more where it has so many of them."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        more = int(x.shape[2] >= self.rows)  # a branch that no near size takes
        return self.conv(F.pad(x, [0, 0, more, 0]))  # type: ignore[no-any-return]


def test_a_number_that_only_large_images_change_is_seen() -> None:
    small, large = example(1, 3, 9, 9), example(1, 3, 210, 9)
    model = double(RowMore(200))
    gm = trace(model, small)
    with pytest.raises(lmfx.SizeError):
        gm(large)
    model = double(RowMore(10**9))
    assert relative_error(trace(model, small)(large), model(large)) < 1e-12, "one that stays is no limit"


class Reordered(nn.Module):
    """A reshape before all convs, so that the input is not known as a map; then a block that keeps one pixel at one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        n, c, *size = x.shape
        return self.block(x.view(n, 1, c, *size).transpose(1, 2).reshape(n, c, *size))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """A conv, and a resampling to a size that is written in numbers beside it."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.conv = size, nn.Conv1d(4, 4, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.size,)) - self.conv(x)


class Between(nn.Module):
    """A pool to a size that is written in numbers, between two convs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.pool, self.b = nn.Conv1d(4, 4, 3, 1, 1), nn.AdaptiveAvgPool1d(size), nn.Conv1d(4, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pool(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("block", "pixels"), [(Joined(1, 2), 1), (Joined(1, 3), 1), (Joined(1, 1), 1), (Between(1), 1), (Between(6), 6)]
)
def test_a_size_in_numbers_that_is_the_examples_is_no_rule_after_a_reshape_of_the_input(
    block: nn.Module, pixels: int
) -> None:
    model, x = double(Reordered(block)), example(2, 4, pixels)
    spans = spans_of(model, x, realize=("fit", "drop"))
    more = example(2, 4, pixels + 5)
    for candidate in (c for c in spans if c.realization != "keep"):
        net = lmfx.merge(rewrite(spans.network.gm, lmfx.MergePlan((candidate,))))
        assert net(more).shape == model(more).shape, candidate.key
    strides = {c.conv.stride for c in spans if c.realization == "fit" and c.conv is not None}
    assert strides, "what follows a rule can still be fitted"


@pytest.mark.parametrize("kernel, stride, dilation, padding", [(4, 3, 2, 0), (4, 2, 1, 0), (5, 3, 2, 1), (3, 2, 1, 1)])
def test_the_oracle_of_an_op_that_enlarges_looks_at_whole_blocks_inside(
    kernel: int, stride: int, dilation: int, padding: int
) -> None:
    up = nn.ConvTranspose1d(4, 3, kernel, stride, padding, dilation=dilation)
    model = double(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), up))  # the bias of the first is not at the border
    spans = spans_of(model, example(1, 4, 9), realize=("compose",))
    (both,) = (c for c in spans if c.realization == "compose" and len(c.kept) == 2)
    assert check_span(spans.network, both)
    # What is not the same at the border is no loss-free merge.
    linear = double(nn.Sequential(nn.Conv1d(4, 4, 1), up))
    x = example(2, 4, 9)
    assert relative_error(lmfx.simplify(linear, x, growth=100)(x), linear(x)) < 1e-12


@pytest.mark.parametrize("pads", [(0, 3), (2, 1), (1, 0)])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_a_pad_after_a_transposed_conv_is_compared_inside_and_is_no_loss_free_merge(
    kernel: int, pads: tuple[int, int]
) -> None:
    model = double(nn.Sequential(nn.ConvTranspose1d(4, 3, kernel, 3), nn.ConstantPad1d(pads, 0.0)))
    spans = spans_of(model, example(1, 4, 9), realize=("compose",))
    for candidate in (c for c in spans if c.realization == "compose"):
        assert check_span(spans.network, candidate) and not candidate.exact
    x = example(2, 4, 9)
    assert relative_error(lmfx.simplify(model, x, growth=100)(x), model(x)) < 1e-12


class Shifted(nn.Module):
    """A scaled map, a conv and a vector from the side, and as many norms after it."""

    def __init__(self, conv: nn.Module, norms: int) -> None:
        super().__init__()
        self.conv, self.vector = conv, nn.Linear(5, 4)
        self.norms = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(norms)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norms(self.conv(x * 1) + self.vector(y)[:, :, None, None])  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("norms", [0, 1, 2])
def test_simplify_makes_no_more_convs_than_there_are(mode: Any, padding: int, norms: int) -> None:
    model = double(Shifted(nn.Conv2d(4, 4, 3, padding=padding, padding_mode=mode), norms))
    inputs = example(2, 4, 6, 5), example(2, 5)
    net = lmfx.simplify(model, inputs, growth=float("inf"))
    assert count(net) == 1
    assert relative_error(net(*inputs), model(*inputs)) < 1e-12


class LastOfSplit(nn.Module):
    """A channels-last part that reads a part of the channels, or gives what a part is taken of."""

    def __init__(self, part_first: bool) -> None:
        super().__init__()
        self.part_first = part_first
        self.conv, self.last = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.fc1, self.fc2 = nn.Linear(5 if part_first else 10, 2), nn.Linear(2, 3 if part_first else 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.split(y, 5, 1)[-1] if self.part_first else y
        y = self.fc2(F.gelu(self.fc1(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.last(y if self.part_first else y.chunk(2, 1)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_of_the_channels_is_a_map_to_channels_last_layers_as_well(part_first: bool) -> None:
    model, x = double(LastOfSplit(part_first)), example(2, 3, 6, 5)
    gm = check_trace(model, x)
    assert not any("permute" in n.name for n in gm.graph.nodes)
    net = lmfx.simplify(model, x)
    assert relative_error(net(x), model(x)) < 1e-12
    assert not lmfx.result_of(lmfx.simplify(net, x)).plan.candidates, "nothing is left for a second run"
