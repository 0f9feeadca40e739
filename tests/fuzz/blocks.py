"""Structure: series, parallel branches to any depth, splits, meshes, classes, and aliasing traps."""

from __future__ import annotations

from torch import Tensor

from tests.fuzz import points
from tests.fuzz.convs import act_module, conv, conv_expression, linear, norm, norm_module, transposed
from tests.fuzz.writer import Scope

__all__ = ["series"]

KINDS = (
    *("cna",) * 10,
    *("conv",) * 4,
    *("act",) * 3,
    *("norm",) * 2,
    *("constant",) * 2,
    *("parallel",) * 7,
    *("skip",) * 3,
    *("split",) * 3,
    *("mesh",) * 2,
    *("block",) * 4,
    *("sequential",) * 3,
    *("gate",) * 2,
    "trap",
    *("selection",) * 2,
    *("other",) * 2,
    *("reshaped",) * 2,
    "sized",
    "drop",
    "linear",
    "pool",
    "pad",
    "pixels",
    "resize",
    "transposed",
)
ADDS = (
    *("{a} + {b}", "torch.add({a}, {b})", "{a}.add({b})", "{b} + {a}", "operator.add({a}, {b})", "{a} + 0.5 * {b}"),
    *("torch.add({a}, {b}, alpha=2)", "{a}.add_({b})", "in place", "torch.maximum({a}, {b})", "{a}.add(other={b})"),
)


def series(s: Scope, v: str, depth: int, count: int, same: bool = False) -> str:
    """`count` random steps after `v`; with `same` the spatial size stays as it is."""
    for _ in range(count):
        steps, before = len(s.steps), s.shape(v)
        made = step(s, v, depth, same)
        value = s.env.get(made)
        same_rank = isinstance(value, Tensor) and value.dim() == len(before)
        if value is None or not same_rank or not value.is_floating_point() or (same and value.shape[2:] != before[2:]):
            del s.steps[steps:]
            continue
        v = made
        s.maps.append(v)
    return v


def step(s: Scope, v: str, depth: int, same: bool) -> str:
    draw = s.draw
    kind = draw.pick(KINDS)
    if kind == "cna":
        v = conv(s, v, same)
        if draw.chance(2):
            v = norm(s, v)
        return points.activation(s, v) if not draw.chance(3) else v
    if kind == "conv":
        return conv(s, v, same)
    if kind == "norm":
        return norm(s, v)
    if kind == "pool":
        return points.pool(s, v, same)
    if kind == "transposed":
        return transposed(s, v)
    if kind == "linear":
        return linear(s, v)
    if kind == "sequential":
        return sequential(s, v, same)
    if kind == "skip":
        return skip(s, v)
    if kind == "split":
        return split(s, v)
    if kind == "mesh":
        return mesh(s, v)
    if kind == "trap":
        return trap(s, v)
    if kind == "parallel" and depth > 0:
        return parallel(s, v, depth - 1, same)
    if kind == "block" and depth > 0:
        return block(s, v, depth - 1, same)
    if kind in ("parallel", "block"):
        return conv(s, v, same)
    names = {"act": "activation"}
    made: str = getattr(points, names.get(kind, kind))(s, v)
    return made


def parallel(s: Scope, v: str, depth: int, same: bool) -> str:
    """Branches that leave one value and meet again."""
    draw = s.draw
    stride = 1 if same else draw.pick((1, 1, 1, 2))
    join = draw.pick(("add", "add", "add", "add", "cat", "cat", "sub", "mul"))
    count = draw.pick((2, 2, 2, 3, 4))
    plain = draw.below(2 * count) if stride == 1 else count  # an empty branch
    branches = []
    for i in range(count):
        b = v
        if i != plain:
            if stride > 1:
                b = points.pool(s, b, True, stride) if draw.chance(5) else conv(s, b, True, stride)
            b = series(s, b, depth, draw.pick((1, 1, 2)), same=True)
            if draw.chance(10):
                b = points.drop(s, b)
        branches.append(b)
    if join == "mul" and draw.chance(2):
        branches[-1] = s.let(f"{branches[-1]}.sigmoid()") or branches[-1]
    made = meet(s, branches, join)
    return points.activation(s, made) if made is not None and draw.chance(2) else made or v


def meet(s: Scope, values: list[str], join: str) -> str | None:
    """Join values of one size; channels are matched by 1x1 convs, sizes by cropping or resizing."""
    draw = s.draw
    first = s.shape(values[0])
    fixed = []
    for value in values:
        shape = s.shape(value)
        if shape[2:] != first[2:]:
            crop = ", ".join(f":{n}" for n in first[2:])
            ways = (f"{value}[:, :, {crop}]", f"F.interpolate({value}, size={first[2:]})")
            value = s.let(draw.pick(ways)) or value
            if s.shape(value)[2:] != first[2:]:
                value = s.let(f"F.interpolate({value}, size={first[2:]})") or value
        if join != "cat" and shape[1] != first[1] and not (shape[1] == 1 and draw.chance(2)):
            name = s.attribute("proj")
            make = f"{name} = nn.Conv{len(first) - 2}d({shape[1]}, {first[1]}, 1)"
            value = s.let(f"{name}({value})", make) or value
        fixed.append(value)
    made = join_all(s, fixed, join)
    return made


def join_all(s: Scope, values: list[str], join: str) -> str | None:
    draw = s.draw
    if join == "cat":
        listed = ", ".join(values)
        cats = (f"torch.cat([{listed}], 1)", f"torch.cat(({listed}), dim=1)", f"torch.concat([{listed}], dim=1)")
        rank = len(s.shape(values[0]))
        return s.let(draw.pick((*cats, f"torch.cat([{listed}], dim={1 - rank})", f"torch.hstack([{listed}])")))
    if join == "add" and draw.chance(8):
        listed = ", ".join(values)
        return s.let(draw.pick((f"sum([{listed}])", f"torch.stack([{listed}]).sum(0)")))
    total = values[0]
    ways: tuple[str, ...] = {
        "add": ADDS,
        "sub": ("{a} - {b}", "torch.sub({a}, {b})", "{a}.sub({b})", "{b} - {a}", "{a}.sub_({b})", "in place"),
        "mul": ("{a} * {b}", "torch.mul({a}, {b})", "{a}.mul({b})", "{a}.mul_({b})", "in place", "{a} / ({b}**2 + 1)"),
    }[join]
    for value in values[1:]:
        way = draw.pick(ways[:4] if draw.chance(2) else ways)
        if way == "in place":
            sign = {"add": "+", "sub": "-", "mul": "*"}[join]
            if not s.run(f"{total} {sign}= {value}"):
                return None
            continue
        made = s.let(way.format(a=total, b=value))
        if made is None:
            return None
        total = made
    return total


def skip(s: Scope, v: str) -> str:
    """A join with a value from earlier in the class: a long skip."""
    shape = s.shape(v)
    fitting = [m for m in s.maps if m != v and len(s.shape(m)) == len(shape) and s.shape(m)[2:] == shape[2:]]
    if not fitting:
        return conv(s, v, True)
    older = s.draw.pick(fitting)
    join = s.draw.pick(("add", "cat", "add", "sub", "mul"))
    return meet(s, [v, older], join) or v


def split(s: Scope, v: str) -> str:
    """Parts of the channels on ways of their own, joined again; res2net's chain of parts, ghost's cheap half."""
    draw, channels = s.draw, s.shape(v)[1]
    if channels < 2:
        return conv(s, v, True, 1, draw.pick((4, 6)))
    half = channels // 2
    count = draw.pick((2, 2, 3))
    way = draw.below(6)
    texts = {
        0: f"{v}.chunk({count}, 1)",
        1: f"torch.chunk({v}, {count}, dim=1)",
        2: f"torch.split({v}, {max(1, channels // count)}, 1)",
        3: f"{v}.split([{half}, {channels - half}], dim=1)",
        4: f"({v}[:, :{half}], {v}[:, {half}:])",
        5: f"torch.tensor_split({v}, {count}, dim=1)",
    }
    parts_of = s.let(texts[way])
    if parts_of is None:
        return v
    parts = []
    for i in range(len(s.env[parts_of])):
        part = s.let(f"{parts_of}[{i}]")
        if part is None:
            return v
        parts.append(part)
    chained = draw.chance(3)
    done: list[str] = []
    for part in parts:
        if chained and done and s.shape(done[-1]) == s.shape(part):
            part = s.let(f"{part} + {done[-1]}") or part
        if draw.chance(3) and not chained:
            done.append(part)
            continue
        part = conv(s, part, True, 1, s.shape(part)[1] if chained else 0)
        if draw.chance(2):
            part = points.activation(s, part)
        if draw.chance(3):
            part = norm(s, part)
        done.append(part)
    join = draw.pick(("cat", "cat", "cat", "mul", "add"))
    return meet(s, done, join) or v


def mesh(s: Scope, v: str) -> str:
    """A cell whose nodes each add two earlier nodes, which is not series-parallel, and whose end reads several."""
    draw = s.draw
    nodes = [v]
    for _ in range(draw.between(2, 4)):
        parts = []
        for _ in range(2):
            node = draw.pick(nodes)
            if not draw.chance(4):
                node = conv(s, node, True, 1, s.shape(v)[1])
                if draw.chance(2):
                    node = points.activation(s, node)
            parts.append(node)
        made = meet(s, parts, "add")
        if made is not None and s.shape(made) == s.shape(v):
            nodes.append(made)
    if draw.chance(2):
        return meet(s, nodes[1:], "cat") or v if len(nodes) > 2 else nodes[-1]
    return nodes[-1]


def block(s: Scope, v: str, depth: int, same: bool) -> str:
    """A class of its own, called once or twice, at one size or two."""
    draw = s.draw
    inner = s.child("Block", {"x": s.env[v].clone()})
    out = series(inner, "x", depth, draw.pick((1, 2, 3)), same)
    if draw.chance(3) and inner.shape(out) == tuple(s.shape(v)):
        out = inner.let(f"x + {out}") or out
    if not inner.steps or out == "x":
        return v
    inner.close(out)
    name = s.attribute("block")
    made = s.let(f"{name}({v})", f"{name} = {inner.name}()")
    if made is None:
        return v
    again = draw.below(8)
    if again == 1 and not same:
        half = s.let(f"F.avg_pool{len(s.shape(v)) - 2}d({v}, 2)")
        smaller = half and s.let(f"{name}({half})")
        if smaller:
            return meet(s, [made, smaller], draw.pick(("add", "cat"))) or made
    if again == 2:
        return s.let(f"{name}({made})") or made
    if again == 3:
        second = s.let(f"{name}({v})")
        return (second and s.let(f"{made} - 0.5 * {second}")) or made
    return made


def sequential(s: Scope, v: str, same: bool) -> str:
    """An nn.Sequential of convs, norms and activations."""
    draw, shape = s.draw, s.shape(v)
    ndim, channels = len(shape) - 2, shape[1]
    parts = []
    for _ in range(draw.pick((1, 2, 3))):
        text, channels = conv_expression(draw, ndim, channels, same)
        parts.append(text)
        if draw.chance(2):
            parts.append(norm_module(draw, ndim, channels))
        if draw.chance(2):
            act = act_module(draw)
            if act == "nn.GLU(1)":
                channels //= 2
            parts.append(act)
    name = s.attribute("seq")
    if draw.chance(4):
        named = ", ".join(f"('p{i}', {p})" for i, p in enumerate(parts))
        return s.let(f"{name}({v})", f"{name} = nn.Sequential(OrderedDict([{named}]))") or v
    return s.let(f"{name}({v})", f"{name} = nn.Sequential({', '.join(parts)})") or v


def trap(s: Scope, v: str) -> str:
    """Programs whose result depends on what else is the same memory."""
    draw, shape = s.draw, s.shape(v)
    name = s.attribute("act")
    half = max(1, shape[1] // 2)
    a, b = s.names.new("v"), s.names.new("v")
    options: tuple[tuple[tuple[str, ...], str], ...] = (
        ((f"{a} = {v}.relu_()", f"{b} = {v} + {a}"), b),
        ((f"{a} = {v}.view({v}.shape)", f"{v}.mul_(2)", f"{b} = {a} + 1"), b),
        ((f"{v} += 1.0",), v),
        ((f"{a}, {b} = {v}.chunk(2, 1)", f"{a}.relu_()"), v),
        ((f"{a}, {b} = {v}.chunk(2, 1)", f"{a} += {b}"), v),
        ((f"{v}[:, :{half}] += 1.0",), v),
        ((f"{v}[:, 0] = 0",), v),
        ((f"{a} = {v}.clone()", f"{a}.add_({v})", f"{b} = {a} * 0.5"), b),
        ((f"F.relu({v}, inplace=True)",), v),
        ((f"{a} = {v}.detach()", f"{a}.sigmoid_()", f"{b} = {v} - {a}"), b),
        ((f"{a} = {v}", f"{a} *= 0.5", f"{b} = {a} + {v}"), b),
        ((f"{a} = F.dropout({v}, 0.5, self.training)", f"{a}.relu_()", f"{b} = {v} * 2"), b),
        ((f"{a} = {v} * 1", f"{b} = {a}.flatten(1)", f"{b}.clamp_(min=0)"), a),
        ((f"{a} = torch.relu({v})", f"torch.add({a}, {v}, out={a})"), a),
        ((f"{a} = {v}[:, :{half}]", f"{v}.tanh_()", f"{b} = torch.cat([{a}, {v}], 1)"), b),
        ((f"{a} = {v}.permute(*range({v}.dim()))", f"{a}.mul_({a}.sigmoid())"), v),
        ((f"{a} = {v} + 0", f"{a}.copy_({v}.flip(1))"), a),
        ((f"{a} = {v}.expand_as({v})", f"{b} = {v}.add_(1)", f"{a} = {a} * {b}"), a),
    )
    lines, result = draw.pick(options)
    if draw.chance(8):
        made = s.let(f"{name}({v})", f"{name} = {draw.pick(('nn.ReLU(inplace=True)', 'nn.Hardswish(inplace=True)'))}")
        return (made and s.let(f"{v} + {made}")) or v
    if draw.chance(8):
        s.run(f"{name}({v})", [f"{name} = nn.ReLU(inplace=True)"])
        return v
    steps = len(s.steps)
    for line in lines:
        if not s.run(line):
            del s.steps[steps:]
            return v
    return result
