"""Candidates and refusals: what is offered, what is not, and why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.errors import OptionError
from lmfx.passes.ir import Candidate
from lmfx.passes.spans.enumeration import SpanOptions, SpanSet, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from tests.helpers import check_rewrite, double, pick, spans_of

X = torch.randn(2, 4, 12, 9, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(i: int = 4, o: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **({"padding": k // 2} | options))


def net(body: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    return double(Net(body, **modules))


def chain(*modules: nn.Module) -> nn.Module:
    return double(nn.Sequential(*modules))


def composed(spans: SpanSet) -> list[Candidate]:
    return [c for c in spans if c.realization == "compose"]


def kernels(spans: SpanSet, *convs: str) -> list[tuple[tuple[int, ...], int]]:
    """(kernel, groups) of what is composed from exactly these convs of the main path, in the outermost series."""
    found = [c for c in composed(spans) if c.convs == convs and "/" not in c.span.series]
    return sorted({(c.conv.kernel_size, c.conv.groups) for c in found if c.conv is not None})


def reasons(spans: SpanSet) -> list[str]:
    return [r.reason for r in spans.refusals]


# --- compose ----------------------------------------------------------------------------------------------------------


def test_two_reducible_convs_give_both_kernels() -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), conv(k=5)), X)
    assert kernels(spans, "0", "2") == [((3, 3), 1), ((5, 5), 1), ((7, 7), 1)]


def test_a_conv_that_changes_channels_is_always_kept() -> None:
    spans = spans_of(chain(conv(4, 6), nn.ReLU(), conv(6, 6)), X)
    assert kernels(spans, "0", "2") == [((3, 3), 1), ((5, 5), 1)]
    assert all("0" in c.kept for c in composed(spans) if "0" in c.convs)


@pytest.mark.parametrize("first", [conv(stride=2), conv(padding=0), conv(k=2, padding=0), conv(4, 8)])
def test_a_conv_that_changes_the_shape_is_always_kept(first: nn.Conv2d) -> None:
    spans = spans_of(chain(first, nn.ReLU(), conv(first.out_channels, first.out_channels, 1)), X)
    assert composed(spans)
    assert all("0" in c.kept for c in composed(spans) if "0" in c.convs)


def test_a_merged_conv_is_depthwise_only_if_every_kept_one_is() -> None:
    spans = spans_of(chain(conv(groups=4), nn.ReLU(), conv(groups=4), nn.ReLU(), conv(k=1)), X)
    assert kernels(spans, "0", "2") == [((3, 3), 4), ((5, 5), 4)]
    assert kernels(spans, "0", "2", "4") == [((1, 1), 1), ((3, 3), 1), ((3, 3), 4), ((5, 5), 1), ((5, 5), 4)]


def test_groups_are_the_greatest_common_divisor() -> None:
    spans = spans_of(chain(conv(4, 8, groups=2), nn.ReLU(), conv(8, 8, groups=4, stride=2)), X)
    assert kernels(spans, "0", "2") == [((5, 5), 2)]


def test_of_the_convs_with_equal_kernels_the_larger_in_l1_norm_stay() -> None:
    model = chain(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    for name, scale in (("0", 1.0), ("2", 5.0), ("4", 3.0)):
        model.get_submodule(name).weight.data.fill_(scale)  # type: ignore[union-attr]
    spans = spans_of(model, X)
    best = {c.conv.kernel_size: c.kept for c in composed(spans) if c.convs == ("0", "2", "4") and c.conv is not None}
    assert best == {(3, 3): ("2",), (5, 5): ("2", "4"), (7, 7): ("0", "2", "4")}


def test_a_stride_multiplies_the_kernels_behind_it() -> None:
    spans = spans_of(chain(conv(4, 6, stride=2), nn.ReLU(), conv(6, 8)), X)
    (candidate,) = [c for c in composed(spans) if c.convs == ("0", "2")]
    assert candidate.conv is not None
    assert (candidate.conv.kernel_size, candidate.conv.stride, candidate.conv.padding[0]) == ((7, 7), (2, 2), (3, 3))


def test_a_residual_block_keeps_its_skip() -> None:
    model = net(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), a=conv(), b=conv())
    spans = spans_of(model, X)
    assert kernels(spans, "a", "b") == [((3, 3), 1), ((5, 5), 1)]
    for kernel in ((3, 3), (5, 5)):
        check_rewrite(
            model, X, pick(realization="compose", kernel=kernel, series="0"), after=["Conv2d", "ReLU"], edits=1
        )


def test_a_residual_block_without_its_convs_is_its_skip_and_not_twice_it() -> None:
    model = net(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), a=conv(), b=conv())
    merged = check_rewrite(model, X, pick(realization="drop", series="0"), after=["ReLU"], edits=0)
    assert torch.equal(merged(X), X.relu())
    inner = check_rewrite(model, X, pick(realization="drop", series="0/0.0", start=0, stop=1))
    assert not torch.equal(inner(X), X.relu())


def test_a_block_dropped_inside_a_longer_span_adds_nothing() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.d(F.relu(m.c(F.relu(m.b(y))) + y))

    model = net(body, a=conv(4, 6), b=conv(6, 6), c=conv(6, 6), d=conv(6, 8))
    choose = pick(realization="compose", convs=("a", "b", "c", "d"), kept=("a", "d"))
    merged = check_rewrite(model, X, choose, after=["Conv2d"], edits=1)
    whole = model.d(model.a(X))
    middle = (..., slice(3, -3), slice(3, -3))
    assert torch.allclose(merged(X)[middle], whole[middle], rtol=1e-10, atol=1e-10)


def test_the_sum_of_a_value_with_itself_stays_twice_it() -> None:
    model = net(lambda m, x: m.b((lambda y: y + y)(F.relu(m.a(x)))), a=conv(), b=conv())
    merged = check_rewrite(model, X, pick(realization="compose", convs=("a", "b"), kept=("a", "b")), edits=1)
    middle = (..., slice(3, -3), slice(3, -3))
    assert torch.allclose(merged(X)[middle], model.b(2 * model.a(X))[middle])


def test_two_pruned_branches_of_a_sum_are_one_identity() -> None:
    model = net(lambda m, x: m.c(F.relu(m.a(x)) + F.relu(m.b(x))), a=conv(), b=conv(), c=conv(4, 6))
    merged = check_rewrite(
        model, X, pick(realization="compose", convs=("a", "c"), kept=("c",)), after=["Conv2d"], edits=1
    )
    assert torch.allclose(merged(X), model.c(X))


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1)], ids=["x - f(x)", "f(x) - x"])
@pytest.mark.parametrize(("kernel", "convs"), [((5, 5), 2), ((3, 3), 1)])
def test_a_difference_keeps_its_signs(signs: tuple[int, int], kernel: tuple[int, int], convs: int) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        return x - y if signs[0] > 0 else y - x

    model = net(body, a=conv(), b=conv())
    spans = spans_of(model, X)
    (chosen,) = pick(realization="compose", kernel=kernel, series="0")(spans)
    merged = check_rewrite(model, X, lambda _: [chosen], after=["Conv2d"], edits=1, spans=spans)
    assert len(chosen.kept) == convs
    branch = X
    for name in chosen.kept:
        branch = model.get_submodule(name)(branch)
    middle = (..., slice(3, -3), slice(3, -3))
    expected = signs[0] * X + signs[1] * branch
    assert torch.allclose(merged(X)[middle], expected[middle], rtol=1e-10, atol=1e-10)


def test_a_strided_block_is_merged_with_its_downsample() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.b(F.relu(m.a(x))) + m.down(x))

    model = net(body, a=conv(4, 6, stride=2), b=conv(6, 6), down=conv(4, 6, 1, stride=2))
    spans = spans_of(model, X)
    assert kernels(spans, "a", "b") == [((3, 3), 1), ((7, 7), 1)]
    assert all("down" in c.kept for c in composed(spans) if c.span.series == "0")
    check_rewrite(model, X, pick(realization="compose", kernel=(7, 7), series="0"), after=["Conv2d", "ReLU"], edits=1)


def test_a_concatenation_is_composed() -> None:
    model = net(
        lambda m, x: m.c(F.relu(torch.cat([m.a(x), x, m.b(x)], 1))), a=conv(4, 2), b=conv(4, 3, 1), c=conv(9, 5)
    )
    check_rewrite(model, X, pick(realization="compose", convs=("a", "b", "c")), after=["Conv2d"], edits=1)


def test_pads_of_unequal_sides_go_into_the_merged_conv() -> None:
    model = net(lambda m, x: m.b(F.relu(m.a(F.pad(x, (2, 0, 1, 3))))), a=conv(4, 6, padding=0), b=conv(6, 4))
    merged = check_rewrite(model, X, pick(realization="compose", convs=("a", "b")), edits=1)
    assert [type(m).__name__ for m in merged.children()].count("ConstantPad2d") == 1


def test_an_average_pool_folds_into_its_conv() -> None:
    model = chain(conv(4, 6), nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.ReLU())
    check_rewrite(model, X, pick(realization="compose"), before=["Conv2d", "BatchNorm2d", "AvgPool2d", "ReLU"],
                  after=["Conv2d", "ReLU"], edits=1)  # fmt: skip


def test_a_layer_that_is_one_conv_already_is_not_offered_again() -> None:
    spans = spans_of(chain(conv(), nn.BatchNorm2d(4), nn.ReLU()), X)
    assert [c.key for c in spans if c.realization == "keep"] == ["0:0-1:keep"] and not composed(spans)


def test_layers_without_any_conv_are_not_composed() -> None:
    # A float64 conv would come out of two pools, which have no parameter to take a type from.
    model = chain(conv(), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU())
    spans = spans_of(model, X)
    assert len(spans.network.series["0"].layers) == 3 and composed(spans)
    assert all(c.convs for c in composed(spans))


# --- fit and drop -----------------------------------------------------------------------------------------------------


def test_a_fit_has_every_odd_kernel_dense_and_depthwise() -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), conv()), X, max_kernel_size=5)
    found = sorted(
        (c.conv.kernel_size[0], c.conv.groups)
        for c in spans
        if c.realization == "fit" and c.convs == ("0", "2") and c.conv
    )
    assert found == [(1, 1), (1, 4), (3, 1), (3, 4), (5, 1), (5, 4)]


def test_a_fit_crosses_what_is_not_affine() -> None:
    model = chain(conv(), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(4, 6))
    spans = spans_of(model, X)
    fits = [c for c in spans if c.realization == "fit" and c.convs == ("0", "4")]
    assert fits and all(c.conv is not None and c.conv.stride == (2, 2) for c in fits)
    check_rewrite(model, X, lambda s: fits[:1], after=["Conv2d"], edits=1)
    assert any("MaxPool2d is not affine" in r for r in reasons(spans))


def test_a_squeeze_excite_block_may_be_fitted_and_not_composed() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.b(h * torch.sigmoid(m.up(F.relu(m.down(h.mean((2, 3), keepdim=True))))))

    spans = spans_of(net(body, a=conv(), b=conv(), down=conv(4, 2, 1), up=conv(2, 4, 1)), X)
    whole = [c for c in spans if c.span.series == "0" and c.convs[:1] == ("a",) and c.convs[-1:] == ("b",)]
    assert {c.realization for c in whole} == {"fit"}  # dropping it is dropping its two parts
    assert any("product of two maps is not affine" in r for r in reasons(spans))


@pytest.mark.parametrize(
    ("pool", "sizes"),
    [
        (nn.MaxPool2d(3, 2, ceil_mode=True), range(9, 16)),
        (nn.MaxPool2d(2, 2, ceil_mode=True), range(8, 15)),
        (nn.MaxPool2d(3, 2, 1), range(8, 15)),
        (nn.MaxPool2d(2), range(8, 15)),
        (nn.MaxPool2d(3, 2, dilation=2), range(9, 15)),
    ],
)
def test_a_fit_has_the_size_rule_of_its_pool_at_every_size(pool: nn.Module, sizes: range) -> None:
    model = chain(conv(4, 6), nn.ReLU(), pool, conv(6, 4, 1))
    spans = spans_of(model, X)
    fits = [c for c in spans if c.realization == "fit" and c.convs in (("0", "2"), ("0", "3"))]
    assert fits
    for candidate in fits:
        for size in sizes:
            expected = tuple(model(torch.zeros(1, 4, size, size + 1, dtype=torch.float64)).shape[2:])
            assert candidate.conv is not None and candidate.conv.output_size((size, size + 1)) == expected


def test_a_pool_whose_rule_is_not_its_window_is_fitted_with_the_rule_that_was_seen() -> None:
    # torch leaves out a last window that begins after the input: 1 x 1 windows, stride 2, rounded up.
    pool = nn.MaxPool2d(1, 2, ceil_mode=True)
    spans = spans_of(chain(conv(), nn.ReLU(), pool, conv(4, 6)), X)
    wide = [c.conv for c in spans if c.realization == "fit" and c.convs == ("0", "3")]
    assert wide
    for size in range(5, 40):
        expected = tuple(pool(torch.zeros(1, 1, size, size + 3)).shape[2:])
        assert all(c is not None and c.output_size((size, size + 3)) == expected for c in wide)


def test_a_part_whose_size_follows_no_conv_is_not_fitted() -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), nn.Upsample(scale_factor=2), conv(4, 6)), X)
    assert not [c for c in spans if c.realization == "fit" and c.convs == ("0", "3")]
    assert any("the output size follows no conv's rule" in r for r in reasons(spans))


@pytest.mark.parametrize("resize", [nn.AdaptiveAvgPool2d((12, 9)), nn.Upsample((12, 9)), nn.AdaptiveMaxPool2d((12, 9))])
def test_an_op_with_a_size_of_its_own_is_never_fitted_or_dropped(resize: nn.Module) -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), resize, conv()), X)
    wide = [c for c in spans if c.convs == ("0", "3")]
    assert wide == []


def test_a_drop_needs_equal_shapes() -> None:
    spans = spans_of(chain(conv(4, 6), nn.ReLU(), conv(6, 4), nn.ReLU(), conv(4, 4, stride=2)), X)
    assert [c.convs for c in spans if c.realization == "drop"] == [("0", "2")]


def test_a_drop_that_two_drops_make_is_not_offered() -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), conv(), nn.ReLU()), X)
    assert [c.convs for c in spans if c.realization == "drop"] == [("0",), ("2",)]


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])
def test_a_drop_over_a_cut_that_two_drops_would_leave_is_offered(act: type[nn.Module]) -> None:
    # Two drops leave silu(silu(x)) or relu(x); one drop of the whole leaves silu(x) or x.
    modules = [conv(), act(), conv()] + ([act()] if act is nn.SiLU else [])
    spans = spans_of(chain(*modules), X)
    assert ("0", "2") in [c.convs for c in spans if c.realization == "drop"]


def test_a_fit_replaces_at_most_so_many_convs() -> None:
    spans = spans_of(chain(*[m for _ in range(4) for m in (conv(), nn.ReLU())]), X, max_fit_convs=2)
    assert max(len(c.convs) for c in spans if c.realization == "fit") == 2
    assert max(len(c.convs) for c in composed(spans)) == 4


# --- options ----------------------------------------------------------------------------------------------------------


def test_excluded_modules_are_in_no_candidate_but_keep() -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), conv(), nn.ReLU(), conv()), X, exclude=("2",))
    assert not [c for c in spans if "2" in c.convs and c.realization != "keep"]
    assert any(r == "excluded: 2 matches exclude=('2',)" for r in reasons(spans))


def test_only_included_convs_are_in_candidates() -> None:
    spans = spans_of(chain(conv(), nn.ReLU(), conv(), nn.ReLU(), conv()), X, include=("[02]",))
    assert {c.convs for c in composed(spans)} == {("0", "2")}
    assert any(r == "not included: 4 matches nothing of include=('[02]',)" for r in reasons(spans))


def test_the_kernel_limit_holds_and_says_so() -> None:
    spans = spans_of(chain(conv(4, 6), nn.ReLU(), conv(6, 8)), X, max_kernel_size=3)
    assert not composed(spans)
    assert "the merged kernel would be 5 or more, over max_kernel_size=3" in reasons(spans)
    assert all(max(c.conv.kernel_size) <= 3 for c in spans if c.realization == "fit" and c.conv)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"include": ("nothing.*",)}, "include='nothing.*' matches no module; the modules are 0, 1, 2"),
        ({"exclude": ("layer9",)}, "exclude='layer9' matches no module"),
        ({"include": "features"}, "pass a tuple of globs"),
        ({"realize": ("merge",)}, r"realize=\('merge',\) has \['merge'\]"),
        ({"max_kernel_size": 0}, "max_kernel_size=0: use a whole number from 1"),
        ({"max_kernel_size": 2.5}, "max_kernel_size=2.5"),
        ({"max_kernel_size": True}, "max_kernel_size=True"),
    ],
)
def test_wrong_options_say_what_was_seen(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        spans_of(chain(conv(), nn.ReLU(), conv()), X, **options)


def test_realize_picks_the_kinds() -> None:
    model = chain(conv(), nn.ReLU(), conv())
    for kinds in (("compose",), ("fit",), ("drop",)):
        found = {c.realization for c in spans_of(model, X, realize=kinds)}
        assert found <= {"keep", "drop", *kinds} and "keep" in found


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], str]] = {
    "product": (lambda m, x: m.a(x) * m.b(x), {"a": conv(), "b": conv()}, "product of two maps is not affine"),
    "cat of rows": (lambda m, x: torch.cat([m.a(x), m.b(x)], 2), {"a": conv(), "b": conv()}, "not along the channels"),
    "broadcast": (
        lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True),
        {"a": conv(), "b": conv()},
        "broadcasts over the map",
    ),
    "broadcast of channels": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": conv(4, 4), "b": conv(4, 1)},
        r"cannot add branches of \[4, 1\] output channels",
    ),
    "shared conv": (lambda m, x: m.a(F.relu(m.a(x))), {"a": conv()}, "is called elsewhere as well"),
    "activation": (lambda m, x: F.tanh(F.relu(m.a(x))), {"a": conv()}, "nothing to merge: only an activation"),
    "read twice": (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), {"a": conv(), "b": conv()}, "is read by 2 ops"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_has_a_reason_and_nodes(case: str) -> None:
    import re

    body, modules, text = REFUSED[case]
    model = net(body, **modules)
    gm = trace(model, X)
    spans = enumerate_spans(Network(gm), SpanOptions())
    found = [r for r in spans.refusals if re.search(text, r.reason)]
    assert found, reasons(spans)
    names = {n.name for n in gm.graph.nodes}
    assert all(r.nodes and set(r.nodes) <= names for r in found)
    assert str(found[0]).endswith(f"({', '.join(found[0].nodes)})")


def test_keys_are_unique_and_equal_in_every_run() -> None:
    model = net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + x)), a=conv(), b=conv(), c=conv(4, 8, dilation=2, padding=2)
    )
    keys = [[c.key for c in spans_of(model, X)] for _ in range(2)]
    assert keys[0] == keys[1] and len(set(keys[0])) == len(keys[0])
    spans = spans_of(model, X)
    assert all(spans.by_key[c.key] is c for c in spans) and len(spans) == len(keys[0])


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_fit_of_as_many_channels_may_be_depthwise_in_every_dimension(ndim: int) -> None:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    model = nn.Sequential(conv(4, 4, 3, padding=1), nn.ReLU(), conv(4, 4, 1)).eval()
    fits = [c.conv for c in spans_of(model, torch.randn(1, 4, *(6, 5, 7)[:ndim])) if c.realization == "fit"]
    assert {c.groups for c in fits if c is not None} == {1, 4}
