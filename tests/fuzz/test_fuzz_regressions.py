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
from tests.fuzz.prelude import Output
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
