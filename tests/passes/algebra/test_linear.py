"""The algebra of LinearOp: random chains and branches against running the ops one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmfx.passes.algebra import linear
from lmfx.passes.algebra.linear import LinearOp
from lmfx.passes.errors import LmfxError, ModelError, OptionError

F64 = torch.float64
CHANNELS = [1, 2, 4, 6, 12]


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0


def unpadded(op: LinearOp, x: Tensor) -> Tensor:
    return replace(op, padding=((0, 0),) * op.ndim)(x)


def pad(x: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    return F.pad(x, [p for pair in reversed(padding) for p in pair])


def random_op(
    rng: torch.Generator,
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    padding: tuple[tuple[int, int], ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
) -> LinearOp:
    n = len(kernel)
    weight = torch.randn(channels[1], channels[0] // groups, *kernel, dtype=F64, generator=rng)
    bias = torch.randn(channels[1], dtype=F64, generator=rng)
    return LinearOp(weight, bias, stride or (1,) * n, padding or ((0, 0),) * n, dilation or (1,) * n, groups)


@st.composite
def ops(draw: st.DrawFn, ndim: int, channels: int, out: int | None = None, stride: bool = True) -> LinearOp:
    out = draw(st.sampled_from(CHANNELS)) if out is None else out
    groups = draw(st.sampled_from([g for g in range(1, 13) if channels % g == 0 and out % g == 0]))
    dims = range(ndim)
    return random_op(
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        (channels, out),
        tuple(draw(st.integers(1, 3)) for _ in dims),
        tuple(draw(st.integers(1, 2)) if stride else 1 for _ in dims),
        tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in dims),
        tuple(draw(st.integers(1, 3)) for _ in dims),
        groups,
    )


@st.composite
def chains(draw: st.DrawFn) -> list[LinearOp]:
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    channels = draw(st.sampled_from(CHANNELS))
    chain = []
    for _ in range(draw(st.integers(1, 4 if ndim < 3 else 3))):
        chain.append(draw(ops(ndim, channels)))
        channels = chain[-1].out_channels
    return chain


@st.composite
def branch_sets(draw: st.DrawFn, equal_out: bool = True) -> list[LinearOp]:
    """Branches of one stride whose output sizes agree at least for some input size."""
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    channels, out = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
    branches = []
    for _ in range(draw(st.integers(1, 3))):
        op = draw(ops(ndim, channels, out if equal_out else None, stride=False))
        slack = [draw(st.integers(0, s - 1)) for s in stride]
        extents = [d * (k - 1) for d, k in zip(op.dilation, op.kernel_size, strict=True)]
        befores = [draw(st.integers(0, e)) for e in extents]
        # before + after - extent = 0, or -1 where the stride leaves room for it
        pads = tuple((b, max(e - b - s, 0)) for b, e, s in zip(befores, extents, slack, strict=True))
        branches.append(replace(op, stride=stride, padding=pads))
    return branches


def composed(chain: list[LinearOp]) -> LinearOp:
    whole = chain[0]
    for op in chain[1:]:
        whole = linear.compose(whole, op)
    return whole


def smallest_input(op: LinearOp) -> tuple[int, ...]:
    return tuple(d * (k - 1) + 1 for d, k in zip(op.dilation, op.kernel_size, strict=True))


@settings(max_examples=80, deadline=None)
@given(chains(), st.integers(0, 5), st.integers(0, 2**31))
def test_a_composed_chain_equals_its_ops_run_without_padding_on_an_input_padded_once(
    chain: list[LinearOp], extra: int, seed: int
) -> None:
    whole = composed(chain)
    size = [n + extra for n in smallest_input(whole)]
    x = torch.randn(2, whole.in_channels, *size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    y = pad(x, whole.padding)
    for op in chain:
        y = unpadded(op, y)
    assert relative(whole(x), y) < 1e-12
    assert whole.config.output_size(tuple(size)) == tuple(y.shape[2:])


@settings(max_examples=80, deadline=None)
@given(chains())
def test_composing_is_associative_in_shape_and_value(chain: list[LinearOp]) -> None:
    whole, other = composed(chain), chain[-1]
    for op in reversed(chain[:-1]):
        other = linear.compose(op, other)
    assert whole.config == other.config
    a, b = linear.densify(whole), linear.densify(other)
    assert relative(a.weight, b.weight) < 1e-12 and relative(a.bias, b.bias) < 1e-12


@settings(max_examples=60, deadline=None)
@given(chains())
def test_the_integer_rules_of_a_chain_are_those_of_the_tensors(chain: list[LinearOp]) -> None:
    config, op = chain[0].config, chain[0]
    for after in chain[1:]:
        config, op = linear.compose_config(config, after.config), linear.compose(op, after)
        assert op.config == config


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(0, 5))
def test_without_inner_padding_a_chain_equals_plain_sequential_execution(chain: list[LinearOp], extra: int) -> None:
    chain = [chain[0], *(replace(op, padding=((0, 0),) * op.ndim) for op in chain[1:])]
    whole = composed(chain)
    x = torch.randn(1, whole.in_channels, *(n + extra for n in smallest_input(whole)), dtype=F64)
    y = x
    for op in chain:
        y = op(y)
    assert relative(whole(x), y) < 1e-12


@settings(max_examples=80, deadline=None)
@given(branch_sets(), st.integers(0, 4), st.data())
def test_a_sum_equals_its_branches_wherever_their_sizes_agree(
    branches: list[LinearOp], extra: int, data: st.DataObject
) -> None:
    signs = [data.draw(st.sampled_from([1.0, -1.0])) for _ in branches]
    whole = linear.add(branches, signs)
    assert whole.config == linear.add_configs([op.config for op in branches])
    size = [n + extra for n in smallest_input(whole)]
    x = torch.randn(2, whole.in_channels, *size, dtype=F64)
    outputs = [op(x) for op in branches]
    agreed = outputs[0].shape[2:]
    if all(y.shape[2:] == agreed for y in outputs):
        expected = sum(s * y for s, y in zip(signs, outputs, strict=True))
        assert relative(whole(x), expected) < 1e-12
    padded = pad(x, whole.padding)
    cropped = []
    for op, crops in zip(branches, linear.branch_crops([op.config for op in branches]), strict=True):
        window = tuple(slice(a, n - b) for (a, b), n in zip(crops, padded.shape[2:], strict=True))
        cropped.append(unpadded(op, padded[(..., *window)]))
    expected = sum(s * y for s, y in zip(signs, cropped, strict=True))
    assert relative(whole(x), expected) < 1e-12


@settings(max_examples=60, deadline=None)
@given(branch_sets(equal_out=False), st.integers(0, 4))
def test_a_concatenation_equals_its_branches_wherever_their_sizes_agree(branches: list[LinearOp], extra: int) -> None:
    whole = linear.cat(branches)
    assert whole.config == linear.cat_configs([op.config for op in branches])
    x = torch.randn(2, whole.in_channels, *(n + extra for n in smallest_input(whole)), dtype=F64)
    outputs = [op(x) for op in branches]
    if len({y.shape[2:] for y in outputs}) == 1:
        assert relative(whole(x), torch.cat(outputs, 1)) < 1e-12


@pytest.mark.parametrize("size", [7, 8, 13, 14])
def test_a_strided_residual_block_with_its_downsample_is_one_conv_at_even_and_odd_sizes(size: int) -> None:
    rng = torch.Generator().manual_seed(0)
    p1 = ((1, 1), (1, 1))
    a = random_op(rng, (4, 8), (3, 3), (2, 2), p1)
    b = random_op(rng, (8, 8), (3, 3), padding=p1)
    skip = random_op(rng, (4, 8), (1, 1), (2, 2))
    whole = linear.add([linear.compose(a, b), skip])
    assert whole.kernel_size == (7, 7) and whole.padding == ((3, 3), (3, 3)) and whole.groups == 1
    x = torch.randn(2, 4, size, size, dtype=F64)
    inner = unpadded(b, unpadded(a, pad(x, whole.padding)))
    assert relative(whole(x), inner + skip(x)) < 1e-12


def test_dilation_survives_next_to_pointwise_ops_and_equal_dilations() -> None:
    rng = torch.Generator().manual_seed(0)
    point = random_op(rng, (4, 4), (1, 1))
    wide = random_op(rng, (4, 4), (3, 3), dilation=(2, 2), padding=((2, 2), (2, 2)))
    for chain in ([point, wide], [wide, point], [point, wide, point]):
        assert composed(chain).config.dilation == (2, 2) and composed(chain).kernel_size == (3, 3)
    assert composed([wide, wide]).config.dilation == (2, 2) and composed([wide, wide]).kernel_size == (5, 5)
    assert linear.add([wide, linear.identity(4, 2)]).config.dilation == (2, 2)


def test_mixed_dilations_become_dense() -> None:
    rng = torch.Generator().manual_seed(0)
    plain = random_op(rng, (4, 4), (3, 3))
    wide = random_op(rng, (4, 4), (3, 3), dilation=(2, 2))
    whole = linear.compose(plain, wide)
    assert whole.dilation == (1, 1) and whole.kernel_size == (7, 7)


def test_a_depthwise_chain_with_its_skip_stays_depthwise() -> None:
    rng = torch.Generator().manual_seed(0)
    dw = random_op(rng, (6, 6), (3, 3), padding=((1, 1), (1, 1)), groups=6)
    whole = linear.add([linear.compose(dw, dw), linear.identity(6, 2)])
    assert whole.config.depthwise and whole.kernel_size == (5, 5)


def test_groups_that_divide_neither_way_meet_in_their_gcd() -> None:
    rng = torch.Generator().manual_seed(0)
    whole = linear.compose(random_op(rng, (12, 12), (3,), groups=4), random_op(rng, (12, 12), (3,), groups=6))
    assert whole.groups == 2


def test_a_concatenation_of_grouped_branches_is_dense_and_of_one_branch_keeps_its_groups() -> None:
    op = random_op(torch.Generator().manual_seed(0), (6, 6), (3,), groups=3)
    assert linear.cat([op, op]).groups == 1
    assert linear.cat([op]).groups == 3


def test_asymmetric_branches_choose_the_symmetric_padding_that_the_stride_allows() -> None:
    rng = torch.Generator().manual_seed(0)
    pool = linear.from_avg_pool(nn.AvgPool2d(2), 4)  # 2 x 2, stride 2, no padding
    conv = random_op(rng, (4, 4), (3, 3), (2, 2), ((1, 1), (1, 1)))
    assert linear.add([conv, pool]).padding == ((1, 1), (1, 1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv1d(3, 4, 4, padding="same"), (11,)),
        (nn.Conv1d(3, 4, 4, padding="valid", bias=False), (11,)),
        (nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2), groups=2), (9, 17)),
        (nn.Conv2d(4, 4, (4, 2), padding="same", dilation=(1, 3), groups=4), (8, 9)),
        (nn.Conv3d(2, 3, (1, 2, 3), (1, 2, 1), (0, 1, 1)), (3, 4, 5)),
        (nn.Conv2d(4, 4, 1, padding_mode="reflect"), (4, 4)),
    ],
)
def test_a_torch_conv_becomes_an_op_and_back(conv: nn.Module, size: tuple[int, ...]) -> None:
    op = linear.from_conv(conv)
    x = torch.randn(2, op.in_channels, *size, dtype=F64)
    expected = conv.double()(x)
    assert relative(op(x), expected) < 1e-14
    back = linear.to_conv(op)
    assert relative(back(x), expected) < 1e-14
    assert isinstance(back, nn.Sequential) == any(lo != hi for lo, hi in op.padding)


def test_to_conv_takes_a_dtype_and_shares_no_memory() -> None:
    op = random_op(torch.Generator().manual_seed(0), (3, 4), (3, 3), padding=((0, 1), (1, 0)))
    module = linear.to_conv(op, torch.float32)
    conv = module[1]
    assert conv.weight.dtype == conv.bias.dtype == torch.float32
    before = op.weight.clone()
    same = linear.to_conv(op)[1]
    with torch.no_grad():
        same.weight.zero_()
    assert torch.equal(op.weight, before)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_its_eval_statistics_even_in_training_mode(affine: bool) -> None:
    bn = nn.BatchNorm2d(5, affine=affine).double()
    for t in (bn.running_mean, bn.running_var, *bn.parameters()):
        nn.init.uniform_(t, 0.5, 2.0)
    x = torch.randn(2, 5, 3, 3, dtype=F64)
    expected = bn.eval()(x)
    assert relative(linear.from_batch_norm(bn.train(), 2)(x), expected) < 1e-14


@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (nn.AvgPool1d(3, 2, 1), (9,)),
        (nn.AvgPool2d(2), (7, 8)),
        (nn.AvgPool2d((3, 2), (2, 1), (1, 0)), (7, 8)),
        (nn.AvgPool2d(3, 1, 1, divisor_override=5), (4, 4)),
        (nn.AvgPool2d(3, 1, 0, count_include_pad=False), (4, 4)),
        (nn.AvgPool3d(2, 1, 1), (3, 3, 3)),
    ],
)
def test_an_average_pool_is_a_constant_depthwise_conv(pool: nn.Module, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=F64)
    op = linear.from_avg_pool(pool, 3)
    assert relative(op(x), pool(x)) < 1e-14 and op.groups == 3


def test_a_pad_then_a_conv_is_one_conv_with_asymmetric_padding() -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2).double()
    op = linear.compose(linear.from_pad([(0, 1), (2, 1)], 3), linear.from_conv(conv))
    x = torch.randn(1, 3, 8, 8, dtype=F64)
    assert op.padding == ((0, 1), (2, 1))
    assert relative(op(x), conv(F.pad(x, [2, 1, 0, 1]))) < 1e-13


def test_the_response_is_what_a_constant_input_gives() -> None:
    op = random_op(torch.Generator().manual_seed(0), (4, 6), (3, 3), groups=2)
    v = torch.randn(4, dtype=F64)
    expected = op(v[None, :, None, None].expand(1, 4, 3, 3))[0, :, 0, 0] - op.bias
    assert relative(op.response() @ v, expected) < 1e-13


def test_gradients_flow_through_the_algebra() -> None:
    rng = torch.Generator().manual_seed(0)
    ops = [random_op(rng, (2, 4), (3,), groups=2), random_op(rng, (4, 4), (2,)), random_op(rng, (2, 4), (4,))]

    def merged(*values: Tensor) -> Tensor:
        a, b, skip = (replace(op, weight=values[i], bias=values[i + 3]) for i, op in enumerate(ops))
        whole = linear.cat([linear.add([linear.compose(a, b), skip]), skip])
        return torch.cat([whole.weight.flatten(), whole.bias])

    values = [t.requires_grad_() for t in [*(op.weight for op in ops), *(op.bias for op in ops)]]
    assert torch.autograd.gradcheck(merged, values)


def conv2d(**kwargs: object) -> linear.ConvConfig:
    return linear.from_conv(nn.Conv2d(4, 4, 3, **kwargs)).config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: linear.from_conv(nn.ConvTranspose2d(2, 2, 3)), "ConvTranspose2d"),
        (lambda: linear.from_conv(nn.Linear(2, 2)), "Linear"),
        (lambda: linear.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "reflect"),
        (lambda: linear.from_conv(nn.Conv2d(2, 2, 3, dtype=torch.complex64)), "complex"),
        (lambda: linear.from_batch_norm(nn.BatchNorm2d(2, track_running_stats=False), 2), "running statistics"),
        (lambda: linear.from_batch_norm(nn.GroupNorm(1, 2), 2), "GroupNorm"),
        (lambda: linear.from_avg_pool(nn.AvgPool2d(2, ceil_mode=True), 2), "ceil_mode"),
        (lambda: linear.from_avg_pool(nn.AvgPool2d(3, padding=1, count_include_pad=False), 2), "count_include_pad"),
        (lambda: linear.from_avg_pool(nn.MaxPool2d(2), 2), "MaxPool2d"),
    ],
)
def test_a_module_that_is_not_one_convolution_is_refused(make: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: linear.compose(linear.identity(2, 2), linear.identity(3, 2)), "cannot compose"),
        (lambda: linear.compose(linear.identity(2, 1), linear.identity(2, 2)), "cannot compose"),
        (lambda: linear.add([linear.identity(2, 2), linear.identity(3, 2)]), "add branches"),
        (lambda: linear.add([]), "no branches"),
        (lambda: linear.add([linear.identity(2, 2)], [1.0, -1.0]), "signs"),
        (lambda: linear.cat([linear.identity(2, 2), linear.identity(3, 2)]), "equal input channels"),
        (lambda: linear.add_configs([conv2d(stride=2), conv2d(stride=1)]), "strides"),
        (lambda: linear.add_configs([conv2d(padding=1), conv2d(padding=0)]), "never have the same output size"),
        (lambda: linear.densify(linear.identity(4, 2), 3), "divisor"),
        (lambda: linear.diagonal(torch.ones(2), torch.ones(3), 2), "one entry a channel"),
        (lambda: LinearOp(torch.ones(2), torch.ones(2), (), (), ()), "spatial dimensions"),
        (lambda: LinearOp(torch.ones(2, 2, 3), torch.ones(3), (1,), ((0, 0),), (1,)), "disagree"),
        (lambda: LinearOp(torch.ones(2, 2, 3), torch.ones(2), (1, 1), ((0, 0),), (1,)), "entries each"),
    ],
)
def test_ops_that_do_not_fit_together_are_refused_with_what_was_seen(make: object, words: str) -> None:
    with pytest.raises(OptionError, match=words) as error:
        make()  # type: ignore[operator]
    assert isinstance(error.value, LmfxError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_op_like_a_tensor_is_where_that_is_and_of_its_dtype(dtype: torch.dtype) -> None:
    op = LinearOp(torch.ones(3, 2, 1), torch.zeros(3), (1,), ((0, 0),), (1,)).like(
        torch.empty(1, device="meta", dtype=dtype)
    )
    assert {(t.device.type, t.dtype) for t in (op.weight, op.bias)} == {("meta", dtype)}
