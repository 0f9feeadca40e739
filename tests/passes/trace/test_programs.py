"""An exported program is a module of the same names, layers and tensors, and refuses what the program refuses."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251  (that a network can be)
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfx.passes.errors import ModelError, SizeError
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.programs import is_program, module_of_program
from lmfx.passes.trace.tracing import trace
from tests.helpers import double, ops_of, run

AUTO: Any = torch.export.Dim.AUTO
X = torch.randn(2, 3, 15, 13, dtype=torch.float64)


class Block(nn.Module):
    """A residual block as people write them: functions, in-place sums, a dropout."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2), nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.drop(self.bn2(self.conv2(y)))
        y += x
        return F.silu(y)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), Block()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(F.relu6(self.norm(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def exported(model: nn.Module, x: Any = X, free: tuple[int, ...] = ()) -> torch.export.ExportedProgram:
    shapes: Any = (dict.fromkeys(free, AUTO),) if free else None
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)


def forms(program: torch.export.ExportedProgram) -> list[torch.export.ExportedProgram]:
    """A program, the same from a file, and of torch's core ops."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return [program, torch.export.load(file), program.run_decompositions()]


def names(gm: nn.Module) -> set[str]:
    return {name for name, _ in gm.named_parameters()}


def candidates(gm: Any) -> list[str]:
    return [c.key for c in enumerate_spans(Network(gm), SpanOptions())]


@pytest.mark.parametrize("form", range(3), ids=["program", "file", "core"])
def test_a_program_is_the_network_that_it_was_exported_from(form: int) -> None:
    model = double(Classifier())
    expected = trace(model, X)
    program = forms(exported(model))[form]
    module = module_of_program(program)
    assert type(module).__name__.startswith("Classifier") and not module.training
    graph = trace(module, X)
    assert ops_of(graph) == ops_of(expected)
    assert names(graph) == names(model)
    assert candidates(graph) == candidates(expected)
    torch.testing.assert_close(run(module, X), run(model, X), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(run(graph, X), run(model, X), rtol=1e-13, atol=1e-13)


def test_the_tensors_are_those_of_the_program_and_stay_as_they_are() -> None:
    model = double(Classifier())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    module = module_of_program(exported(model))
    assert module.get_parameter("block.conv1.weight") is model.block.conv1.weight
    assert module.get_buffer("block.bn1.running_var") is model.block.bn1.running_var
    trace(module, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_module_can_be_copied_pickled_and_put_into_eval_mode() -> None:
    module = module_of_program(exported(double(Classifier())))
    expected = run(module, X)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.eval()):
        assert torch.equal(run(other, X), expected)
        with pytest.raises(SizeError):
            other(X[:1])


class Kinds(nn.Module):
    """Layers that torch.export writes as functions of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.same = nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3), nn.ConvTranspose2d(6, 4, 3, padding=1)
        self.norm, self.plain = nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4)
        self.act, self.group, self.layer = nn.LogSigmoid(), nn.GroupNorm(2, 4), nn.LayerNorm(26)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(self.act(self.norm(self.same(self.up(x)))))
        return self.layer(self.group(y))


def test_transposed_convs_and_norms_by_their_own_statistics_are_layers_again() -> None:
    model = double(Kinds())
    module = module_of_program(exported(model))
    expected = trace(model, X)
    assert ops_of(module) == ops_of(expected) == [
        "ConvTranspose2d", "Conv2d", "InstanceNorm2d", "LogSigmoid", "InstanceNorm2d", "GroupNorm", "LayerNorm",
    ]  # fmt: skip
    assert isinstance(module.get_submodule("up"), nn.ConvTranspose2d)
    torch.testing.assert_close(run(trace(module, X), X), run(model, X), rtol=1e-12, atol=1e-12)


def test_a_norm_by_running_statistics_of_an_instance_norm_is_left_alone() -> None:
    model = double(nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True)))
    model[1].running_mean.uniform_(-1, 1)
    module = module_of_program(exported(model))
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in module.modules())
    torch.testing.assert_close(run(module, X), run(model, X), rtol=1e-12, atol=1e-12)


def test_linear_layers_of_many_dimensions_are_put_together_again() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    model = double(Mixer())
    for program in forms(exported(model)):
        assert ops_of(trace(module_of_program(program), X)) == ops_of(trace(model, X))


def test_a_linear_layer_of_parts_of_the_last_dimension_is_not_one_of_the_whole() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).permute(0, 2, 3, 1)
            return self.fc(y.reshape(-1, 2)).view(*y.shape[:3], 10)

    model = double(Heads())
    for program in forms(exported(model)):
        torch.testing.assert_close(run(trace(module_of_program(program), X), X), run(model, X), rtol=1e-12, atol=1e-12)


# --- inputs and outputs -----------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    map: Tensor
    sum: Tensor


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, others: dict[str, Tensor], *, scale: Tensor, flag: bool = True) -> dict[str, Any]:
        y = self.conv(x) * scale + others["a"]
        return {"pair": Pair(y, y.sum()), "same": [x, None], "flag": y if flag else x}


def test_several_inputs_keep_their_names_and_outputs_their_containers() -> None:
    model, scale = double(Several()), torch.randn(1, dtype=torch.float64)
    args: Any = (X, {"a": 2 * X})
    program = torch.export.export(model, args, {"scale": scale}, strict=False)
    for form in (program, program.run_decompositions()):
        module = module_of_program(form)
        expected, seen = model(*args, scale=scale), module(*args, scale=scale)
        assert isinstance(seen["pair"], Pair) and seen["same"][1] is None
        torch.testing.assert_close(seen["pair"].map, expected["pair"].map)
        graph = trace(module, {"x": X, "others": args[1], "scale": scale})
        torch.testing.assert_close(graph(*args, scale=scale)["flag"], expected["flag"])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_in_training_mode_is_refused(decomposed: bool) -> None:
    program = torch.export.export(Classifier().double().train(), (X,), strict=False)
    with pytest.raises(ModelError, match=r"training mode \(.* of norm\).* export it in eval mode"):
        module_of_program(program.run_decompositions() if decomposed else program)


def test_a_norm_that_keeps_no_statistics_is_not_taken_for_training() -> None:
    model = double(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)))
    torch.testing.assert_close(run(module_of_program(exported(model)), X), run(model, X))


def test_control_flow_of_its_own_is_refused() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: -v, (y,))

    # Of fixed sizes: torch 2.13 itself refuses branches with maps of any size.
    program = torch.export.export(Either().double().eval().requires_grad_(False), (X,))
    with pytest.raises(ModelError, match="control flow"):
        module_of_program(program)


def test_a_part_without_gradients_is_taken_as_it_is() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.conv(x)
            return self.head(y)

    model = double(Frozen())
    module = module_of_program(exported(model))
    assert ops_of(module) == ["Conv2d", "Conv2d"]
    torch.testing.assert_close(run(module, X), run(model, X))


def test_only_programs_are_programs() -> None:
    model = double(Classifier())
    program = exported(model)
    assert is_program(program)
    assert not any(is_program(v) for v in (model, program.module(), program.graph_module, X, None))
