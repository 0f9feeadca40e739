"""What values, functions and modules are: equal for equal content, different for different, and unsure where hidden."""

from __future__ import annotations

import dataclasses
import enum
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.identity.content import Describer, is_foreign

SCALE = 2.0


def text(value: Any, **options: Any) -> str:
    describer = Describer("values", code=True, **options)
    found = describer.value(value, "v")
    assert not describer.unsure, describer.unsure
    return found


def unsure(value: Any) -> list[str]:
    describer = Describer("values", code=True)
    describer.value(value, "v")
    return describer.unsure


class Power(nn.Module):
    def __init__(self, p: Any) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() ** self.p


class Way(enum.Enum):
    UP = 1
    DOWN = 2


@dataclasses.dataclass
class Options:
    size: int
    way: Way = Way.UP


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(SCALE * x)


def twice(x: Tensor) -> Tensor:
    return 2 * x


def thrice(x: Tensor) -> Tensor:
    return 3 * x


def filled(module: nn.Module) -> None:
    for tensor in module.parameters():
        tensor.data.fill_(0.5)


def closure(k: float) -> Callable[[Tensor], Tensor]:
    return lambda x: k * x


class Unknown:
    """Has no content that is known."""


DISTINCT: list[Any] = [
    *(None, True, 1, 1.0, "1", b"1", 1j, math.inf, -0.0, (1, 2), [1, 2], {1, 2}, {"a": 1}, {"a": 2}, slice(0, 2), ...),
    *(torch.float32, torch.float16, torch.device("cpu"), torch.channels_last, range(3), (1, (2,)), ((1, 2),)),
    *(torch.ones(2), torch.ones(2, 1), torch.ones(2).double(), torch.tensor([1.0, 2.0]), torch.ones(2).int()),
    *(np.ones(2), np.ones(2, np.float32), np.float64(1.0), Way.UP, Way.DOWN, Options(1), Options(1, Way.DOWN)),
    *(torch.relu, torch.sigmoid, math.sqrt, F.silu, F.max_pool2d, F.max_pool1d, twice, thrice, swish, lambda x: x),
    *(nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), nn.ELU(0.1), nn.ELU(0.2), nn.BatchNorm2d(2)),
    *(nn.BatchNorm2d(2, eps=1e-3), Power(1.0), Power(3.0), Power(2), nn.Upsample(scale_factor=2), nn.Upsample(size=2)),
    *(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU()), nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.Flatten()),
]  # fmt: skip


def test_different_values_have_different_texts() -> None:
    texts = [text(v) for v in DISTINCT]
    assert len(set(texts)) == len(texts), [t for t in texts if texts.count(t) > 1]


@pytest.mark.parametrize("make", [
    lambda: (1, [2.5, {"k": torch.ones(3)}], "x"), lambda: Options(3), lambda: Power(2.0), lambda: np.arange(4),
    lambda: nn.Conv2d(2, 2, 3).requires_grad_(False).apply(filled),
    lambda: torch.arange(6.0).reshape(2, 3).t().contiguous(), lambda: swish, lambda: nn.GELU(),
])  # fmt: skip
def test_equal_content_has_one_text(make: Callable[[], Any]) -> None:
    assert text(make()) == text(make())


def test_memory_layout_and_gradients_are_no_content() -> None:
    values = torch.randn(2, 3)
    assert text(values) == text(values.t().contiguous().t()) == text(values.clone().requires_grad_())


@pytest.mark.parametrize("one, other", [
    (nn.ReLU(), nn.ReLU(inplace=True)), (nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.5)),
    (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 3), (2, 2), (1, 1))), (Power(2).train(), Power(2).eval()),
])  # fmt: skip
def test_what_does_nothing_in_eval_mode_is_left_out(one: nn.Module, other: nn.Module) -> None:
    assert text(one) == text(other)


def test_a_subclass_that_overrides_nothing_is_what_it_is_derived_from() -> None:
    class Same(nn.LeakyReLU):
        note = object()

    class Other(nn.LeakyReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert text(Same(0.3)) == text(nn.LeakyReLU(0.3)) and not is_foreign(Same(0.3))
    assert text(Other(0.3)) != text(nn.LeakyReLU(0.3)) and is_foreign(Other(0.3))


def test_weights_are_told_as_far_as_is_asked() -> None:
    one, other, wider, double = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4), nn.Linear(2, 3).double()
    shapes, types, values = (
        [Describer(w).value(m) for m in (one, other, wider, double)] for w in ("shapes", "types", "values")
    )
    assert shapes[0] == shapes[1] == shapes[3] != shapes[2]
    assert types[0] == types[1] and len({*types[1:]}) == 3
    assert len({*values}) == 4


def test_a_shared_weight_is_not_two_equal_ones() -> None:
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    other.weight.data = one.weight.data.clone()
    assert text(nn.Sequential(one, one)) != text(nn.Sequential(one, other))


@pytest.mark.parametrize("persistent", [True, False])
def test_the_values_of_a_buffer_are_told(persistent: bool) -> None:
    def make(value: float) -> nn.Module:
        module = nn.ReLU()
        module.register_buffer("table", torch.full((3,), value), persistent)
        return module

    assert text(make(1.0)) != text(make(2.0)) and text(make(1.0)) == text(make(1.0))
    shapes = [Describer("shapes").value(make(v)) for v in (1.0, 2.0)]
    assert (shapes[0] == shapes[1]) == persistent, "what is saved with the weights is a weight"


def test_the_code_of_a_foreign_class_is_told() -> None:
    made = []
    for power in (1, 3):
        names: dict[str, Any] = {"nn": nn}
        exec(f"class M(nn.Module):\n    def forward(self, x):\n        return x.abs() ** {power}\n", names)
        made.append(names["M"]())
    assert text(made[0]) != text(made[1])
    assert Describer("values").value(made[0]) == Describer("values").value(made[1]), (
        "without code their names are equal"
    )


def test_code_in_other_places_of_the_class_and_its_helpers_is_told() -> None:
    source = "def helper(x):\n    return {a} * x\nclass M(nn.Module):\n    k = {b}\n    @property\n    def q(self):\n" \
        "        return {c}\n    def forward(self, x):\n        return helper(x) * self.k * self.q\n"  # fmt: skip
    texts = set()
    for values in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        names: dict[str, Any] = {"nn": nn}
        exec(source.format(**dict(zip("abc", values, strict=True))), names)
        texts.add(text(names["M"]()))
    assert len(texts) == 4


def test_a_global_that_a_function_reads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = text(swish)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert text(swish) != before


def test_hooks_and_a_new_forward_are_told() -> None:
    plain, hooked, twice_, own = Power(2), Power(2), Power(2), Power(2)
    hooked.register_forward_hook(lambda m, i, o: 2 * o)
    twice_.register_forward_hook(lambda m, i, o: 3 * o)
    own.forward = thrice  # type: ignore[method-assign]
    assert len({text(m) for m in (plain, hooked, twice_, own)}) == 4
    relu = nn.ReLU()
    relu.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    assert is_foreign(relu) and is_foreign(nn.Sequential(relu)) and text(relu) != text(nn.ReLU())


@pytest.mark.parametrize(
    "value",
    [
        Unknown(),
        closure(2.0),
        random.Random(0),
        torch.Generator(),
        iter([1]),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        Power(closure(2.0)),
        Power(Unknown()),
        Power([Unknown()]),
        lambda x: eval(x),
        lambda x: random.random() * x,
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_has_no_content_that_can_be_read_is_said(value: Any) -> None:
    assert unsure(value)


def test_a_cycle_ends() -> None:
    one, other = Power(2), Power(2)
    one.p, other.p = one.forward, other.forward  # type: ignore[assignment]
    assert text(one) == text(other)
    held: list[Any] = [1]
    held.append(held)
    assert text(held)


def test_no_address_is_in_a_text() -> None:
    for value in (*DISTINCT, Unknown(), closure(1.0), Power(Unknown())):
        assert " at 0x" not in Describer("values", code=True).value(value)


def test_a_norms_eps_is_no_matter_of_time() -> None:
    assert text(nn.GroupNorm(1, 2, eps=1e-3), timing=True) == text(nn.GroupNorm(1, 2), timing=True)
    assert text(nn.ELU(0.1), timing=True) != text(nn.ELU(), timing=True)
    assert text(Power(0.1), timing=True) != text(Power(0.2), timing=True)


@dataclasses.dataclass
class Held:
    """An object with a field, which a network gives an attribute more."""

    factor: float


def held(factor: float, more: float) -> Held:
    made = Held(factor)
    made.more = more  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("wrap", [lambda v: v, Power, lambda v: [v], lambda v: {"a": v}])
def test_an_attribute_that_is_no_field_is_told(wrap: Callable[[Any], Any]) -> None:
    assert text(wrap(held(1.0, 2.0))) == text(wrap(held(1.0, 2.0)))
    assert len({text(wrap(held(*pair))) for pair in ((1.0, 2.0), (1.0, 3.0), (2.0, 2.0))}) == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: __import__("math").sqrt(x),
        lambda x: x * id(x),
        lambda x: hash(x) * x,
        lambda x: x * len(globals()),
        lambda x: x * len(locals()),
        lambda x: exec("x") or x,
        lambda x: open("x") and x,  # noqa: SIM115
        lambda x: compile("x", "", "eval") and x,
        lambda x: x * float(input()),
    ],
)
def test_a_function_that_reads_what_nobody_can_see_is_never_sure(function: Any) -> None:
    assert unsure(function)
