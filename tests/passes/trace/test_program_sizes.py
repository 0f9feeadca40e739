"""A module of an exported program takes the sizes that the program takes, and no code from its guards."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251  (that a network can be)
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.errors import SizeError
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.trace.programs import module_of_program
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, run
from tests.passes.trace.test_programs import AUTO, Classifier, X, exported, forms


def test_sizes_that_are_numbers_of_the_program_are_refused_by_name() -> None:
    model = double(Classifier())
    module = module_of_program(exported(model))
    for net in (module, trace(module, X)):
        with pytest.raises(SizeError, match="a batch of 2, and x has a batch of 3"):
            net(torch.cat([X, X[:1]]))
        with pytest.raises(SizeError, match="15 x 13"):
            net(X[..., :12])
    assert noted(trace(module, X)).sizes == {"batch": "fixed", "size": "fixed"}


@pytest.mark.parametrize("form", range(3), ids=["program", "file", "core"])
def test_free_sizes_stay_free(form: int) -> None:
    model = double(Classifier())
    graph = trace(module_of_program(forms(exported(model, free=(0, 2, 3)))[form]), X)
    assert noted(graph).sizes == {"batch": "any", "size": "any"}
    for shape in ((1, 3, 9, 33), (5, 3, 31, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(run(graph, x), run(model, x), rtol=1e-12, atol=1e-12)


class Aligned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8:
            x = F.pad(x, (0, 0, 0, 8 - x.shape[2] % 8))
        return self.conv(x)


def test_what_the_program_assumes_of_a_size_its_module_and_graph_check() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = double(Aligned())
    module = module_of_program(exported(model, x, (0, 2, 3)))
    graph = trace(module, x)
    for net in (module, graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        wide = torch.randn(3, 3, 24, 11, dtype=torch.float64)
        torch.testing.assert_close(run(net, wide), run(model, wide))
        with pytest.raises(SizeError, match=r"x.size\(\)\[2\] % 8 == 0"):
            net(torch.randn(2, 3, 15, 16, dtype=torch.float64))


def test_ranges_and_equal_sizes_are_checked() -> None:
    batch, side = torch.export.Dim("batch", min=3, max=6), torch.export.Dim("side", min=4)
    model, x = double(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 2: 2 * side, 3: 2 * side},), strict=False)
    module = module_of_program(program)
    assert module(x[:3]).shape == (3, 3, 8, 8)
    for wrong in (x[:2], torch.cat([x, x]), x[..., :7, :7], x[..., :6]):
        with pytest.raises(SizeError):
            module(wrong)


def test_a_strict_export_of_a_graph_assumes_as_much() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    net = module_of_program(exported(double(Aligned()), x, (0, 2, 3)))
    again = torch.export.export(net, (x,), dynamic_shapes=(dict.fromkeys((0, 2, 3), AUTO),), strict=True)
    module = module_of_program(again)
    assert module(torch.randn(3, 3, 24, 11, dtype=torch.float64)).shape == (3, 3, 24, 11)
    with pytest.raises(SizeError, match=r"% 8 == 0"):
        module(torch.randn(2, 3, 15, 16, dtype=torch.float64))


def test_what_a_network_that_rounds_sizes_up_assumes_is_checked_as_the_program_checks_it() -> None:
    pools = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
    model, x = double(nn.Sequential(nn.Conv2d(3, 2, 3), *pools)), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    program = exported(model, x, (0, 2, 3))
    assert any("max(" in text for text in program._guards_code) and any(" and " in t for t in program._guards_code)
    module, checked = module_of_program(program), program.module()
    graph = trace(module, x)
    seen = set()
    for shape in ((2, 16, 16), (3, 17, 15), (2, 21, 16), (2, 16, 21), (2, 8, 16), (2, 40, 40)):
        other = torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)
        try:
            expected = run(checked, other)
        except AssertionError:
            expected = None
        seen.add(expected is None)
        for net in (module, graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            if expected is None:
                with pytest.raises(SizeError, match="exported for inputs with"):
                    net(other)
            else:
                torch.testing.assert_close(run(net, other), expected, rtol=1e-12, atol=1e-12)
    assert seen == {True, False}


# --- guards from a file -----------------------------------------------------------------------------------------------

LARGE = torch.randn(4, 3, 24, 16, dtype=torch.float64)


def guarded(*guards: str) -> Any:
    program = exported(double(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))), LARGE, (0, 2, 3))
    names = {n.name for n in program.graph.nodes if n.op == "placeholder"}
    assert "input" in names
    program._guards_code = [text.replace("$", "L['input'].size()") for text in guards]
    return module_of_program(program)


@pytest.mark.parametrize(
    ("guard", "wrong"),
    [
        ("torch.sym_max($[2], $[3]) <= 24", LARGE.repeat(1, 1, 2, 1)),
        ("torch.sym_max($[2], $[3]) <= 24", LARGE.repeat(1, 1, 1, 2)),
        ("max($[2], $[3]) <= 24", LARGE.repeat(1, 1, 2, 1)),
        ("torch.sym_min($[2], 2 * $[3]) >= 20", LARGE[:, :, :18]),
        ("torch.sym_min($[2], 2 * $[3]) >= 20", LARGE[..., :9]),
        ("torch.sym_max(1, torch.sym_min($[2], $[3])) == 16", LARGE[..., :15]),
        ("$[2] > 20 and $[3] > 10", LARGE[..., :10]),
        ("$[2] > 40 or $[3] > 10", LARGE[..., :10]),
        ("12 <= $[3] <= 20", LARGE[..., :11]),
        ("not $[2] ** 2 < 400", LARGE[:, :, :19]),
    ],
)
def test_arithmetic_with_sizes_is_checked_also_by_a_network_that_was_pickled(guard: str, wrong: Tensor) -> None:
    module = guarded(guard)
    for net in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), trace(module, LARGE)):
        assert net(LARGE).shape == LARGE.shape
        assert net(LARGE[:3]).shape == (3, *LARGE.shape[1:])
        with pytest.raises(SizeError, match="exported for inputs with"):
            net(wrong)


def test_what_a_program_assumes_is_compiled_in_one_piece() -> None:
    module = guarded("torch.sym_max($[2], $[3]) <= 24", "$[2] > 20 and $[3] > 10")
    assert torch.equal(run(torch.compile(module, backend="eager", fullgraph=True), LARGE), run(module, LARGE))


@pytest.mark.parametrize(
    "guard",
    [
        "__import__('os').system('false') == 0",
        "L['input'].size(exit())[0] > 0",
        "L['input'].resize()[0] > 0",
        "$[exit()] > 0",
        "exit($[0]) == 0",
        "max($[0], exit()) > 0",
        "max($[0], 1, 2) > 0",
        "torch.sym_max($[0]) > 0",
        "torch.sym_max($[0], 1, 2) > 0",
        "torch.sym_max($[0], b=1) > 0",
        "torch.sym_max($[0], exit()) > 0",
        "torch.sym_max(*$[0]) > 0",
        "torch.sym_max.exit($[0], 1) > 0",
        "torch.exit($[0], 1) > 0",
        "exit.sym_max($[0], 1) > 0",
        "(lambda: exit)()($[0], 1) > 0",
        "[exit for v in $]",
        "(exit := $[0]) > 0",
        "exit",
        "L['exit'].size()[0] > 0",
        "L['flat_args'][7].size()[0] > 0",
        "f'{exit}' > 0",
        "'exit' > 0",
        "$[0] ** $[1] ** $[2] ** $[3] > 0",
        "(($[2] ** 4) ** 4) ** 4 > 0",
        "$[0] << $[2] > 0",
        "(",
        "\0",
        pytest.param("-" * 100_000 + "1", id="deep"),
    ],
)
def test_a_guard_that_is_more_than_arithmetic_with_sizes_is_no_code_and_leaves_only_the_examples_sizes(
    guard: str,
) -> None:
    module = guarded("$[3] % 8 == 0", guard)
    assert "% 8 == 0" in module.code and not any(word in module.code for word in ("exit", "import", "resize", "**"))
    assert "0" * 20 not in module.code and module(LARGE).shape == LARGE.shape
    with pytest.raises(SizeError, match="a batch of 4, and input has a batch of 3"):  # what it excludes, nobody knows
        module(LARGE[:3])
    with pytest.raises(SizeError, match="24 x 16"):
        module(LARGE[:, :, :16])
