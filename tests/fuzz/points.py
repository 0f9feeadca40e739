"""Random ops of one value: activations, constants, pools, pads, resizes, selections, gates, drops."""

from __future__ import annotations

from tests.fuzz.convs import MODULE_ACTS, act_module
from tests.fuzz.writer import Scope

__all__ = [
    *("activation", "constant", "drop", "gate", "other", "pad", "pixels", "pool"),
    *("reshaped", "resize", "selection", "sized"),
]

FUNCTION_ACTS = (
    "F.relu({v})",
    "torch.relu({v})",
    "{v}.relu()",
    "{v}.relu_()",
    "F.relu({v}, inplace=True)",
    "F.relu_({v})",
    "F.silu({v})",
    "F.leaky_relu({v}, 0.3)",
    "F.leaky_relu({v}, 0.3, True)",
    "F.gelu({v}, approximate='tanh')",
    "F.relu6({v})",
    "F.hardswish({v}, True)",
    "torch.sigmoid({v})",
    "{v}.sigmoid_()",
    "{v}.tanh()",
    "{v}.clamp(0, 6)",
    "{v}.clamp_(min=0)",
    "{v}.clamp(max=1.0)",
    "torch.clamp({v}, -0.5, 0.5)",
    "F.hardtanh({v}, 0.0, 6.0)",
    "F.elu({v}, alpha=0.5)",
    "F.elu_({v})",
    "F.softplus({v}, beta=2)",
    "{v} * torch.sigmoid({v})",
    "F.threshold({v}, 0.2, 0.0)",
    "F.mish({v}, inplace=True)",
    "F.hardsigmoid({v})",
    "F.logsigmoid({v})",
    "F.rrelu({v}, 0.1, 0.3, self.training)",
    "F.celu({v}, 2.0)",
    "F.selu({v})",
    "torch.where({v} > 0, {v}, 0.1 * {v})",
    "torch.maximum({v}, torch.zeros_like({v}))",
)


def activation(s: Scope, v: str) -> str:
    """An activation: a new module, a shared one, a function, a method, in place or not."""
    draw = s.draw
    form = draw.below(8)
    if form < 3:
        name = s.attribute("act")
        return s.let(f"{name}({v})", f"{name} = {act_module(draw)}") or v
    if form == 3:  # one module for the whole class
        text = draw.pick(MODULE_ACTS[:4])
        name = f"self.shared{MODULE_ACTS.index(text)}"
        return s.let(f"{name}({v})", f"{name} = {text}") or v
    if form == 4:
        name = s.attribute("prelu")
        return s.let(f"{name}({v})", f"{name} = nn.PReLU({s.shape(v)[1]})") or v
    text = draw.pick(FUNCTION_ACTS[:8] if draw.chance(2) else FUNCTION_ACTS)
    return s.let(text.format(v=v)) or v


def constant(s: Scope, v: str) -> str:
    """Arithmetic with a constant: numbers, buffers, parameters, layer-scale."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    form = draw.below(8)
    if form < 4:
        numbers = (
            "{v} * 0.5",
            "{v} + 1.5",
            "{v} * 0.5 + 1",
            "({v} - 0.3) / 2",
            "1 - {v}",
            "-{v}",
            "torch.add({v}, 2)",
            "torch.mul({v}, 0.1)",
            "{v}.div(4.0)",
            "{v}.mul(2).add_(1)",
            "2 * {v}",
            "torch.rsub({v}, 1.0)",
            "{v}.sub(1, alpha=2)",
            "linear_op({v})",
            "torch.neg({v})",
            "{v} * {v}.shape[1] ** -0.5",
            "{v}.mul_(0.5)",
            "torch.add({v}, 1, alpha=0.5)",
        )
        return s.let(draw.pick(numbers).format(v=v)) or v
    name = s.attribute("k")
    size = draw.pick(
        (
            (1, channels, *(1,) * ndim),
            (channels, *(1,) * ndim),
            (1,),
            (),
            (1, channels, *shape[2:]),
            (1, 1, *shape[2:]),
            shape[2:],
        )
    )
    make = f"{name} = nn.Parameter(torch.randn{size if size != () else '(())'})"
    if draw.chance(2):
        make = f"self.register_buffer('{name[5:]}', torch.randn{size if size != () else '(())'}, {draw.chance(2)})"
    products = (
        "{v} * {k}",
        "{k} * {v}",
        "{v} + {k}",
        "{k} - {v}",
        "torch.mul({v}, {k})",
        "{v}.add({k})",
        "{v}.mul_({k})",
    )
    if draw.chance(4):
        return s.let(f"{name}({v})", f"{name} = Scale({channels}, {ndim})") or v
    return s.let(draw.pick(products).format(v=v, k=name), make) or v


def pool(s: Scope, v: str, same: bool = False, stride: int = 0) -> str:
    """Average, max and adaptive pools, as modules and functions."""
    draw, shape = s.draw, s.shape(v)
    ndim = len(shape) - 2
    if draw.chance(4) and not same:
        size = draw.pick((1, 2, shape[2], 1))
        kind = draw.pick(("Avg", "Max"))
        if draw.chance(2):
            return s.let(f"F.adaptive_{kind.lower()}_pool{ndim}d({v}, {size})") or v
        name = s.attribute("pool")
        return s.let(f"{name}({v})", f"{name} = nn.Adaptive{kind}Pool{ndim}d({size})") or v
    kind = draw.pick(("Avg", "Max"))
    kernel, step = (3, stride or 1) if same else (draw.pick((2, 3, 1)), draw.pick((None, 1, 2, 3)))
    pads = 1 if same else draw.between(0, kernel // 2)
    options = f"{kernel}, {step}, {pads}"
    if not same and draw.chance(4):
        options += ", ceil_mode=True"
    if kind == "Avg" and draw.chance(4):
        options += draw.pick((", count_include_pad=False", ", divisor_override=3"))
        if ndim == 1 and "divisor" in options:
            return v
    if kind == "Max" and not same and draw.chance(5):
        options += ", dilation=2"
    if draw.chance(3):
        return s.let(f"F.{kind.lower()}_pool{ndim}d({v}, {options})") or v
    if draw.chance(12):
        return s.let(f"F.lp_pool{ndim}d({v}.abs() + 0.1, 2, {kernel}, {step or kernel})") or v
    name = s.attribute("pool")
    return s.let(f"{name}({v})", f"{name} = nn.{kind}Pool{ndim}d({options})") or v


def pad(s: Scope, v: str) -> str:
    """Pads: zeros, constants, negative, uneven, reflecting, and blur pools."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    form = draw.below(9)
    amounts = tuple(draw.between(0, 2) for _ in range(2 * ndim))
    name = s.attribute("pad")
    if form == 1:
        amounts = tuple(draw.between(-1, 2) for _ in range(2 * ndim))
        return s.let(f"F.pad({v}, {amounts})") or v
    if form == 2:
        return s.let(f"F.pad({v}, {amounts}, value={draw.pick((1.0, -0.5))})") or v
    if form == 3:
        return s.let(f"F.pad({v}, {amounts}, mode={draw.pick(('reflect', 'replicate', 'circular'))!r})") or v
    if form == 4:
        cls = draw.pick(("ReflectionPad", "ReplicationPad", "ZeroPad", "CircularPad"))
        return s.let(f"{name}({v})", f"{name} = nn.{cls}{ndim}d({amounts if ndim > 1 or cls != 'x' else 1})") or v
    if form == 5:
        return s.let(f"{name}({v})", f"{name} = nn.ConstantPad{ndim}d({amounts}, {draw.pick((0.0, 0.7))})") or v
    if form == 6:
        return s.let(f"F.pad({v}, {(*amounts, 0, draw.between(0, 2))})") or v  # the channels, too
    if form == 7:  # blur
        size = ", ".join(["3"] * ndim)
        blur = f"torch.rand(1, 1, {size}).repeat({channels}, 1, {', '.join('1' * ndim)})"
        make = f"self.register_buffer('{name[5:]}_w', {blur})"
        mode = draw.pick(("reflect", "constant"))
        step = draw.pick((2, 1))
        padded = f"F.pad({v}, {(1,) * (2 * ndim)}, {mode!r})"
        return s.let(f"F.conv{ndim}d({padded}, {name}_w, stride={step}, groups={v}.shape[1])", make) or v
    return s.let(f"F.pad({v}, {amounts})") or v


def pixels(s: Scope, v: str) -> str:
    """Crops, strided slices, and space-to-depth in several spellings."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    form = draw.below(5)
    if form == 0:
        cuts = ", ".join(draw.pick((":", "1:", ":-1", "1:-1", "::2", "1::2")) for _ in range(ndim))
        return s.let(f"{v}[:, :, {cuts}]") or v
    if form == 1:
        return s.let(f"{v}.narrow(2, 1, {v}.shape[2] - 2)") or v
    if ndim != 2 or channels > 6:
        return s.let(f"{v}[:, :, : {v}.shape[2] - 1]") or v
    if form == 2:
        return s.let(f"F.pixel_unshuffle({v}, 2)") or v
    if form == 3:
        parts = ", ".join(f"{v}[..., {a}::2, {b}::2]" for a, b in ((0, 0), (1, 0), (0, 1), (1, 1)))
        return s.let(f"torch.cat([{parts}], 1)") or v
    split = f"{v}.reshape({v}.shape[0], {channels}, {v}.shape[2] // 2, 2, {v}.shape[3] // 2, 2)"
    order = draw.pick(("0, 1, 3, 5, 2, 4", "0, 3, 5, 1, 2, 4"))
    size = f"{v}.shape[0], {4 * channels}, {v}.shape[2] // 2, {v}.shape[3] // 2"
    return s.let(f"{split}.permute({order}).reshape({size})") or v


def resize(s: Scope, v: str) -> str:
    """Interpolation and pixel shuffles."""
    draw, shape = s.draw, s.shape(v)
    ndim = len(shape) - 2
    smooth = ("linear", "bilinear", "trilinear")[ndim - 1]
    mode = draw.pick(("nearest", smooth, "area"))
    form, name = draw.below(7), s.attribute("up")
    if form == 1:
        size = tuple(draw.between(1, 6) for _ in range(ndim))
        return s.let(f"F.interpolate({v}, size={size}, mode={mode!r})") or v
    if form == 2 and mode != "area":
        return s.let(f"{name}({v})", f"{name} = nn.Upsample(scale_factor=2, mode={mode!r})") or v
    if form == 3 and mode == smooth:
        return s.let(f"F.interpolate({v}, scale_factor=2.0, mode={mode!r}, align_corners=True)") or v
    if form == 4 and ndim == 2:
        return s.let(f"F.pixel_shuffle({v}, 2)") or s.let(f"F.pixel_unshuffle({v}, 2)") or v
    if form == 5 and ndim == 2:
        return s.let(f"{name}({v})", f"{name} = nn.{draw.pick(('PixelShuffle', 'PixelUnshuffle'))}(2)") or v
    if form == 6:
        return s.let(f"F.interpolate({v}, scale_factor=0.5)") or v
    return s.let(f"F.interpolate({v}, scale_factor=2, mode={mode!r})") or v


def selection(s: Scope, v: str) -> str:
    """Channel selections that give one value: shuffle, slice, reorder, repeat."""
    draw, shape = s.draw, s.shape(v)
    channels, form = shape[1], draw.below(12)
    groups = draw.pick([g for g in range(1, channels + 1) if channels % g == 0])
    name = s.attribute("sel")
    half = max(1, channels // 2)
    spatial = ", ".join([":"] * (len(shape) - 2))
    texts = (
        f"{v}.chunk(2, dim=1)[0]",
        f"{v}[:, :{half}]",
        f"{v}[:, {half - 1}:]",
        f"torch.split({v}, {half}, 1)[-1]",
        f"{v}[:, ::2]",
        f"{v}.narrow(1, 0, {half})",
        f"torch.cat([{v}[:, {half}:], {v}[:, :{half}]], 1)",
        f"{v}[..., 1:]",
        f"{v}[:, {list(range(channels))[::-1]}]",
        f"{v}.flip(1)",
        f"{v}.repeat_interleave(2, 1)",
        f"{v}[:, :, {spatial.replace(':', '::2')}]".replace(":, :, ", ":, :, ", 1),
    )
    if form == 0:
        return s.let(f"{name}({v})", f"{name} = Shuffle({groups})") or v
    if form == 1:
        size = ", ".join(map(str, shape[2:]))
        text = f"{v}.view({shape[0]}, {groups}, {channels // groups}, {size}).transpose(1, 2).flatten(1, 2)"
        return s.let(draw.pick((text, f"{v}.unflatten(1, ({groups}, -1)).transpose(1, 2).flatten(1, 2)"))) or v
    if form == 2:
        return s.let(f"F.channel_shuffle({v}, {groups})") or v
    return s.let(draw.pick(texts)) or v


def gate(s: Scope, v: str) -> str:
    """A product with something that was made of the value: squeeze-excite, spatial gates, GLUs, small attention."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    form, name = draw.below(9), s.attribute("gate")
    dims = tuple(range(2, ndim + 2))
    conv = f"{name} = nn.Conv{ndim}d({channels}, {channels}, 1)"
    if form == 0:
        return s.let(f"{name}({v})", f"{name} = SE({channels}, {ndim}, {draw.chance(3)})") or v
    if form == 1:
        return s.let(f"{v} * torch.sigmoid({name}({v}.mean({dims}, keepdim=True)))", conv) or v
    if form == 2:  # one gate a pixel
        make = f"{name} = nn.Conv{ndim}d({channels}, 1, 3, padding=1)"
        return s.let(f"{v} * {name}({v}).sigmoid()", make) or v
    if form == 3:
        make = f"{name} = nn.Linear({channels}, {channels})"
        none, one = ", ".join(["None"] * ndim), ", ".join(["1"] * ndim)
        pooled = draw.pick(
            (f"{v}.mean({dims})", f"{v}.flatten(2).mean(2)", f"{v}.view({v}.size(0), {channels}, -1).mean(-1)")
        )
        factor = f"{name}({pooled}).sigmoid()"
        fitted = (
            f"[:, :, {none}]",
            f"[..., {none}]",
            f".unflatten(1, (-1, {one}))",
            f".view({v}.shape[:2] + ({one},))",
        )
        wide = ("", f".expand_as({v})", f".expand({v}.shape)", f".expand(-1, -1, *{v}.shape[2:])")
        return s.let(f"{v} * {factor}{draw.pick(fitted)}{draw.pick(wide)}", make) or v
    if form == 4:
        make = f"{name} = nn.Conv{ndim}d(2, 1, 3, padding=1, bias=False)"
        stats = f"torch.cat([{v}.mean(1, keepdim=True), {v}.amax(1, keepdim=True)], 1)"
        return s.let(f"{v} * {name}({stats}).sigmoid()", make) or v
    if form == 5:
        return s.let(f"{v}.mul_(F.adaptive_avg_pool{ndim}d({v}, 1).sigmoid())") or v
    if form == 6:
        flat = f"{v}.flatten(2)"
        scores = f"({flat}.transpose(1, 2) @ {flat} / {channels}).softmax(-1)"
        return s.let(f"{v} + ({flat} @ {scores}).view({v}.shape)") or v
    if form == 7:
        return s.let(f"{v} * ({v}.mean({dims}, keepdim=True) + 1)") or v
    return s.let(f"{v} * {name}({v})", conv) or v


def drop(s: Scope, v: str) -> str:
    """Dropout and stochastic depth, which are the identity in eval mode."""
    ndim = len(s.shape(v)) - 2
    name = s.attribute("drop")
    texts = ["nn.Dropout(0.2)", "DropPath(0.1)", f"nn.Dropout{ndim}d(0.3)", "nn.Dropout(0.5, True)", "DropPath(0.0)"]
    form = s.draw.below(3)
    if form == 1:
        return s.let(f"F.dropout({v}, 0.2, self.training)") or v
    if form == 2:
        return s.let(f"F.dropout({v}, p=0.1, training=self.training, inplace=True)") or v
    return s.let(f"{name}({v})", f"{name} = {s.draw.pick(texts)}") or v


def reshaped(s: Scope, v: str) -> str:
    """A layer on another view of the map: fewer or more dimensions, parts of the channels as images, tokens, einsum."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels, form, name = len(shape) - 2, shape[1], draw.below(7), s.attribute("view")
    letters = "hwd"[:ndim]
    if form == 0 and ndim > 1:
        make = f"{name} = nn.Conv1d({channels}, {channels}, {draw.pick((3, 1))}, padding='same')"
        return s.let(f"{name}({v}.flatten(2)).view({v}.shape)", make) or v
    if form == 1 and ndim < 3:
        make = f"{name} = nn.Conv{ndim + 1}d({channels}, {channels}, 3, padding=1)"
        return s.let(f"{name}({v}.unsqueeze(2)).squeeze(2)", make) or v
    if form == 2 and channels % 2 == 0:
        size = ", ".join(f"{v}.shape[{i + 2}]" for i in range(ndim))
        make = f"{name} = nn.Conv{ndim}d({channels // 2}, {channels // 2}, 3, padding=1)"
        inner = f"{name}({v}.reshape({v}.shape[0] * 2, {channels // 2}, {size}))"
        return s.let(f"{inner}.reshape({v}.shape[0], {channels}, {size})", make) or v
    if form == 3:
        make = f"{name} = nn.MultiheadAttention({channels}, 1, batch_first=True)"
        tokens = s.let(f"{v}.flatten(2).transpose(1, 2)")
        seen = tokens and s.let(f"{name}({tokens}, {tokens}, {tokens}, need_weights=False)[0]", make)
        return (seen and s.let(f"{seen}.transpose(1, 2).reshape({v}.shape)")) or v
    if form == 4:
        width = draw.between(1, 6)
        make = f"{name} = nn.Parameter(torch.randn({width}, {channels}))"
        return s.let(f"torch.einsum('nc{letters},oc->no{letters}', {v}, {name})", make) or v
    if form == 5:
        make = f"{name} = nn.Linear({shape[-1]}, {shape[-1]})"
        return s.let(f"{name}({v})", make) or v
    make = f"{name} = nn.Linear({channels}, {channels}, bias=False)"
    return s.let(f"{name}({v}.transpose(1, -1)).transpose(1, -1)", make) or v


def other(s: Scope, v: str) -> str:
    """Ops that lmfx knows little of."""
    shape = s.shape(v)
    dims = tuple(range(2, len(shape)))
    texts = (
        "{v}.abs()",
        "{v} ** 2",
        "{v}.square()",
        "torch.sin({v})",
        "{v}.softmax(1)",
        "{v}.contiguous()",
        "{v}.clone()",
        "{v}.detach()",
        "{v}.float().to({v}.dtype)",
        "{v}.transpose(-1, -2).contiguous()",
        "{v}.flip(-1)",
        "torch.roll({v}, 1, -1)",
        "{v} - {v}.mean(1, keepdim=True)",
        "{v} / ({v}.abs() + 1)",
        "{v}.amax({dims}, keepdim=True)",
        "{v}.cumsum(1)",
        "torch.stack([{v}, {v} * 2]).sum(0)",
        "sum([{v}, {v}])",
        "{v}.reshape({v}.shape[0], -1).view({v}.shape)",
        "{v} if {v}.shape[1] % 2 == 0 else {v}.relu()",
        "{v} if {v}.size(-1) > 2 else {v} + 1",
        "{v}.squeeze().reshape({v}.size())",
        "torch.lerp({v}, {v}.relu(), 0.3)",
        "{v}.unsqueeze(1).squeeze(1)",
        "torch.zeros_like({v}) + {v}",
        "{v}.expand_as({v})",
        "{v} * {v}",
        "torch.exp(-{v}.abs())",
        "{v}.mean(0, keepdim=True).expand({v}.shape)",
        "{v} + torch.arange({v}.shape[-1], dtype={v}.dtype)",
        "{v}.masked_fill({v} < 0, 0.0)",
        "nn.functional.relu(input={v})",
    )
    return s.let(s.draw.pick(texts).format(v=v, dims=dims)) or v


def sized(s: Scope, v: str) -> str:
    """Something that depends on the batch or on the map's size, most often as a number."""
    shape = s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    dims = tuple(range(2, ndim + 2))
    texts = (
        "torch.cat([{v}, torch.zeros({v}.shape[0], 1, *{v}.shape[2:], dtype={v}.dtype)], 1)",
        "torch.stack([{v}[i] * 2 for i in range({v}.shape[0])])",
        "{v} if {v}.shape[2] > {n} else {v} * 0.5",
        "F.pad({v}, (0, -{v}.shape[-1] % 4))",
        "F.pad({v}, (0, -int({v}.shape[-1]) % 4))",
        "{v}[..., : int({v}.shape[-1] / 2) * 2]",
        "F.avg_pool{d}d({v}, {v}.shape[2:])",
        "F.avg_pool{d}d({v}, tuple(int(n) for n in {v}.shape[2:]))",
        "{v}.sum({dims}, keepdim=True) / float({v}[0, 0].numel())",
        "{v} + {v}.new_zeros({v}.shape[0], {c}, *{v}.shape[2:])",
        "{v} + {v}.new_full((len({v}), 1, *{v}.shape[2:]), 0.3)",
        "{v} + torch.arange({v}.shape[-1], dtype={v}.dtype) / {v}.shape[-1]",
        "{v} + torch.linspace(0, 1, int({v}.shape[-1]), dtype={v}.dtype)",
        "{v}.view(len({v}), {c}, -1).softmax(-1).view({v}.shape)",
        "{v}.reshape(len({v}) * {c}, -1).cumsum(0).view({v}.shape)",
        "{v} / len({v})",
        "{v} * sum(1.0 for _ in {v})",
        "{v} * {v}.shape[1] ** -0.5",
        "{v}.reshape({top}.shape[0], {c}, -1).softmax(-1).view({v}.shape)",
        "{v}.flatten(2).softmax(-1).reshape({top}.size(0), {v}.size(1), *{v}.shape[2:])",
        "{v} * {v}.mean({dims}).view({top}.shape[0], {v}.shape[1], *{ones}).sigmoid()",
    )
    known = {"v": v, "d": ndim, "c": channels, "n": max(0, shape[2] - 1), "dims": dims}
    text = s.draw.pick(texts).format(top=s.args[0], ones=(1,) * ndim, **known)
    return s.let(text) or v
