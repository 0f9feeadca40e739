"""Random convolutions and norms, in every way in which PyTorch lets one write them."""

from __future__ import annotations

from typing import Any

from tests.fuzz.writer import Draw, Scope

__all__ = ["act_module", "conv", "conv_expression", "linear", "norm", "norm_module", "shape_kept", "transposed"]

MODULE_ACTS = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.ReLU6(inplace=True)",
    "nn.SiLU()",
    "nn.SiLU(inplace=True)",
    "nn.GELU()",
    "nn.LeakyReLU(0.2, inplace=True)",
    "nn.Hardswish(inplace=True)",
    "nn.ELU(inplace=True)",
    "nn.PReLU()",
    "nn.Sigmoid()",
    "nn.Tanh()",
    "nn.Softplus()",
    "nn.Mish()",
    "nn.Hardtanh(-1, 2)",
    "nn.CELU(1.5)",
    "nn.Hardsigmoid(inplace=True)",
    "Clamp()",
    "Swish()",
    "nn.Identity()",
    "nn.Softmax(1)",
    "nn.GLU(1)",
    "nn.Threshold(0.1, 0.0)",
    "nn.RReLU(inplace=True)",
)


def act_module(draw: Draw) -> str:
    """The expression of an activation module; ReLU most often."""
    return draw.pick(MODULE_ACTS[:6] if draw.chance(2) else MODULE_ACTS)


def shape_kept(draw: Draw, kernel: int, dilation: int) -> int | str:
    """A padding that keeps the size, where the kernel is odd."""
    return "same" if draw.chance(5) else dilation * (kernel - 1) // 2


def conv_expression(
    draw: Draw, ndim: int, channels: int, same: bool = False, stride: int = 0, width: int = 0, cls: str = ""
) -> tuple[str, int]:
    """(the expression of a conv module, its output channels); `same` keeps the size, up to the stride."""
    kernel = draw.pick((3, 1, 5, 3) if same else (3, 1, 2, 3, 4, 5))
    dilation = draw.pick((1, 1, 1, 1, 2, 3))
    step = stride or (1 if same else draw.pick((1, 1, 1, 2, 3)))
    width = width or draw.pick((channels, channels, channels, draw.between(1, 12), 2 * channels))
    groups = 1
    if draw.chance(3) and channels > 1:
        choices = [g for g in range(1, channels + 1) if channels % g == 0]
        groups = channels if draw.chance(2) else draw.pick(choices)
        width = width if width % groups == 0 else groups
    padding: object
    sizes: object = kernel
    if same:
        padding = shape_kept(draw, kernel, dilation) if step == 1 else dilation * (kernel - 1) // 2
        if draw.chance(6) and ndim > 1:  # asymmetric
            sizes = tuple(draw.pick((1, 3, 5)) for _ in range(ndim))
            padding = tuple(dilation * (k - 1) // 2 for k in sizes)
    else:
        padding = draw.pick((0, 1, dilation * (kernel - 1) // 2, draw.between(0, 3)))
        if dilation > 1:  # torch 2.14 crashes where a dilated window lies in the padding as a whole (channels last)
            padding = min(padding, dilation * (kernel - 1))
        if draw.chance(6) and ndim > 1:
            sizes = tuple(draw.between(1, 4) for _ in range(ndim))
            padding = tuple(draw.between(0, k) for k in sizes)
        elif draw.chance(12):
            padding = draw.pick(("same", "valid"))
            step = 1 if padding == "same" else step
    strides: object = step
    if not same and draw.chance(10) and padding != "same" and ndim > 1:
        strides = tuple(draw.between(1, 3) for _ in range(ndim))
    text = f"{cls or f'nn.Conv{ndim}d'}({channels}, {width}, {sizes}"
    if strides != 1:
        text += f", stride={strides}"
    if padding != 0:
        text += f", padding={padding!r}"
    if dilation != 1:
        text += f", dilation={dilation}"
    if groups != 1:
        text += f", groups={groups}"
    if draw.chance(3):
        text += ", bias=False"
    if draw.chance(12) and padding not in (0, "valid"):
        text += f", padding_mode={draw.pick(('reflect', 'replicate', 'circular'))!r}"
    return text + ")", width


def conv(s: Scope, v: str, same: bool = False, stride: int = 0, width: int = 0) -> str:
    """One convolution after `v`, as a module, a shared one, a function, or a layer with a weight of its own making."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    form = draw.below(16)
    if form == 1 and not stride:
        for name, wanted, rank in s.reusable:
            if (wanted, rank) == (channels, ndim) and draw.chance(2):
                out = s.let(f"{name}({v})")
                if out is not None:
                    return out
    name = s.attribute("conv")
    if form == 2:
        return function_conv(s, v, name, same, stride, width) or v
    if form == 3 and ndim == 2:
        cls = draw.pick(("StdConv", "ConvSame", "ConvSame"))
        text, _ = conv_expression(draw, ndim, channels, same, stride, width, cls)
        if "'" in text:
            return v  # these read their padding as numbers
        return s.let(f"{name}({v})", f"{name} = {text}") or v
    text, _ = conv_expression(draw, ndim, channels, same, stride, width)
    if form == 4:
        text = f"weight_norm({text}, {draw.below(3)})"
    if form == 5:
        padded = ", ".join(str(draw.between(0, 2)) for _ in range(2 * ndim))
        return s.let(f"{name}(F.pad({v}, ({padded})))", f"{name} = {text}") or v
    makes = [f"{name} = {text}"]
    if form == 6:
        return s.let(f"{name}(input={v})", *makes) or v
    if form == 7:
        makes.append(f"{name}.requires_grad_(False)")
    if form == 9:
        return contained(s, v, name, text) or v
    if form in (10, 11) and s.reusable:
        makes += tied(s, name, text, form == 11)
    if form == 8 and draw.chance(3):
        makes.append(f"{name}.register_forward_hook(lambda m, i, o: o * 1.5)")
    out = s.let(f"{name}({v})", *makes)
    if out is None:
        return v
    s.reusable.append((name, channels, ndim))
    return out


def contained(s: Scope, v: str, name: str, text: str) -> str | None:
    """A conv in a list, a dict or the front of a sequential."""
    act = act_module(s.draw)
    ways = (
        (f"{name} = nn.ModuleList([{text}, {act}])", f"{name}[1]({name}[0]({v}))"),
        (f"{name} = nn.ModuleDict({{'a': {text}, 'b': {act}}})", f"{name}['b']({name}['a']({v}))"),
        (f"{name} = nn.Sequential({text}, {act}, nn.Dropout(0.5), nn.Flatten(1))", f"{name}[:-1]({v})"),
        (f"{name} = nn.Sequential({text}, nn.Sequential(nn.Identity(), {act}))", f"{name}[1]({name}[0]({v}))"),
    )
    make, call = s.draw.pick(ways)
    return s.let(call, make)


def tied(s: Scope, name: str, text: str, whole: bool) -> list[str]:
    """A weight, or a module, that an older conv has, too."""
    older = s.draw.pick(s.reusable)[0]
    found: Any = s.live
    for atom in older.split(".")[1:]:
        found = getattr(found, atom)
    made = eval(text, s.names.namespace)
    if found.weight.shape != made.weight.shape or found.groups != made.groups:
        return []
    return [f"{name} = {older}"] if whole else [f"{name}.weight = {older}.weight"]


def function_conv(s: Scope, v: str, name: str, same: bool, stride: int, width: int) -> str | None:
    """F.conv2d with parameters of the model's own."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    width, kernel = width or draw.between(1, 12), draw.pick((3, 1))
    weight, bias = name + "_w", name + "_b"
    size = ", ".join([str(kernel)] * ndim)
    makes = [f"{weight} = nn.Parameter(torch.randn({width}, {channels}, {size}) * 0.3)"]
    if draw.chance(2):
        makes.append(f"{bias} = nn.Parameter(torch.randn({width}))")
    else:
        bias = "None"
    read = draw.pick((weight, weight, f"{weight} * 2.0", f"{weight} - {weight}.mean(1, keepdim=True)"))
    pad = (kernel - 1) // 2 if same else draw.pick((0, 1))
    call = draw.pick(
        (
            f"F.conv{ndim}d({v}, {read}, {bias}, {stride or 1}, {pad})",
            f"torch.conv{ndim}d({v}, {read}, {bias}, stride={stride or 1}, padding={pad})",
            f"F.conv{ndim}d(input={v}, weight={read}, bias={bias}, stride={stride or 1}, padding={pad})",
        )
    )
    return s.let(call, *makes)


def transposed(s: Scope, v: str) -> str:
    """A transposed convolution."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    stride = draw.pick((2, 1, 2, 3))
    kernel = draw.pick((stride, 3, 4, 1))
    groups = channels if draw.chance(5) else 1
    text = f"nn.ConvTranspose{ndim}d({channels}, {groups * draw.between(1, 4)}, {kernel}, stride={stride}"
    text += f", padding={draw.pick((0, 1))}, groups={groups}, dilation={draw.pick((1, 1, 1, 2))}"
    if draw.chance(4):
        text += f", output_padding={draw.pick((0, 1))}"
    name = s.attribute("up")
    if draw.chance(8):
        size = tuple(n * stride for n in shape[2:])
        return s.let(f"{name}({v}, output_size={size})", f"{name} = {text})") or v
    return s.let(f"{name}({v})", f"{name} = {text})") or v


def norm_module(draw: Draw, ndim: int, channels: int) -> str:
    """The expression of a norm module; BatchNorm most often."""
    kind = draw.below(14)
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    if kind == 1:
        return f"nn.BatchNorm{ndim}d({channels}, affine=False)"
    if kind == 2:
        return f"nn.BatchNorm{ndim}d({channels}, track_running_stats=False)"
    if kind == 3:
        return f"nn.GroupNorm({draw.pick(divisors)}, {channels})"
    if kind == 4:
        return f"nn.GroupNorm(1, {channels}, affine={draw.chance(2)})"
    if kind == 5:
        return f"nn.InstanceNorm{ndim}d({channels}, affine={draw.chance(2)}, track_running_stats={draw.chance(2)})"
    if kind == 6 and ndim == 2:
        return f"LayerNorm2d({channels})"
    if kind == 7:
        return f"GRN({channels}, {ndim})"
    if kind == 8 and ndim == 2:
        return f"NormAct({channels})"
    if kind == 9:
        return f"nn.BatchNorm{ndim}d({channels}, eps=1e-3, momentum=None)"
    if kind == 10:
        return "nn.LocalResponseNorm(2)"
    return f"nn.BatchNorm{ndim}d({channels})"


def norm(s: Scope, v: str) -> str:
    """One norm after `v`."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    form, name = draw.below(12), s.attribute("norm")
    if form == 1:
        make = f"{name} = nn.BatchNorm{ndim}d({channels})"
        args = f"{name}.running_mean, {name}.running_var, {name}.weight, {name}.bias"
        return s.let(f"F.batch_norm({v}, {args}, {draw.pick(('False', 'self.training'))}, 0.1, 1e-4)", make) or v
    if form == 2:  # frozen
        ones = (1,) * ndim
        makes = [
            f"self.register_buffer('{name[5:]}_s', torch.rand(1, {channels}, *{ones}) + 0.5)",
            f"self.register_buffer('{name[5:]}_t', torch.randn(1, {channels}, *{ones}))",
        ]
        return s.let(f"{v} * {name}_s + {name}_t", *makes) or v
    if form == 3:
        order = (0, *range(2, ndim + 2), 1)
        back = (0, ndim + 1, *range(1, ndim + 1))
        make = f"{name} = nn.LayerNorm({channels}, elementwise_affine={not draw.chance(4)})"
        return s.let(f"{name}({v}.permute{order}).permute{back}", make) or v
    if form == 4:
        return s.let(f"F.group_norm({v}, 1)") or v
    if form == 5:
        return s.let(f"F.normalize({v}, dim=1)") or v
    if form == 6:
        return s.let(f"F.layer_norm({v}, {v}.shape[1:])") or v
    return s.let(f"{name}({v})", f"{name} = {norm_module(draw, ndim, channels)}") or v


def linear(s: Scope, v: str) -> str:
    """A linear layer over the channels of an NHWC view, alone or as an MLP."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels, name = len(shape) - 2, shape[1], s.attribute("fc")
    order, back = (0, *range(2, ndim + 2), 1), (0, ndim + 1, *range(1, ndim + 1))
    width = draw.between(1, 8)
    first = f"{name} = nn.Linear({channels}, {width}, bias={not draw.chance(3)})"
    if draw.chance(2):
        second = f"{name}_b = nn.Linear({width}, {channels})"
        inner = f"{name}_b(F.gelu({name}({v}.permute{order})))"
        return s.let(f"{inner}.permute{back}", first, second) or v
    return s.let(f"{name}({v}.permute{order}).permute{back}", first) or v
