"""An exported program is taken wherever a model is, and what comes out can be exported again at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.cli import main
from tests.helpers import one_thread as one_thread
from tests.helpers import run
from tests.toys import Net, TwoInputs, images

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO: Any = torch.export.Dim.AUTO
X = images(2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def exported(model: nn.Module, *x: Tensor, free: bool = True) -> torch.export.ExportedProgram:
    shapes: Any = tuple({0: AUTO, 2: AUTO, 3: AUTO} for _ in x) if free else None
    return torch.export.export(model, x, dynamic_shapes=shapes, strict=False)


@pytest.fixture(scope="module")
def compressed() -> Any:
    model = network()
    program = exported(model, X)
    options: Any = {"calibration": images(24), "latency": "roofline", "progress": False}
    return model, program, lmfx.compress(program, X, 0.7, **options), lmfx.compress(model, X, 0.7, **options)


def test_a_program_compresses_to_what_its_model_compresses_to(compressed: Any) -> None:
    _, _, net, expected = compressed
    plans = [[c.key for c in lmfx.result_of(n).plan.candidates] for n in (net, expected)]
    assert plans[0] == plans[1] and plans[0]
    torch.testing.assert_close(run(net, X), run(expected, X), rtol=1e-4, atol=1e-5)


def test_the_result_is_exported_again_with_free_sizes(compressed: Any) -> None:
    net = compressed[2]
    again = exported(net, X)
    for shape in ((1, 3, 12, 12), (5, 3, 20, 17), (3, 3, 9, 31)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(again.module(), x), run(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("free", [True, False])
def test_the_result_is_compiled_in_one_piece_and_exported_strictly(free: bool) -> None:
    net = lmfx.simplify(exported(network(), X, free=free), X)
    assert torch.equal(run(torch.compile(net, backend="eager", fullgraph=True), X), run(net, X))
    strict = torch.export.export(net, (X,), strict=True)
    torch.testing.assert_close(run(strict.module(), X), run(net, X))


def test_the_result_of_a_program_of_one_size_says_so_when_it_is_used_at_another() -> None:
    net = lmfx.simplify(exported(network(), X, free=False), X)
    with pytest.raises(lmfx.SizeError, match="a batch of 2"):
        net(images(3))


def test_a_saved_network_is_loaded_for_the_program_again(compressed: Any, tmp_path: Path) -> None:
    _, program, net, _ = compressed
    lmfx.save(net, tmp_path / "net")
    assert torch.equal(run(lmfx.load(tmp_path / "net", program), X), run(net, X))


def test_every_stage_takes_a_program(tmp_path: Path) -> None:
    model = network()
    program = exported(model, X)
    graph = lmfx.trace(program, X)
    assert [c.key for c in lmfx.spans(graph)] == [c.key for c in lmfx.spans(lmfx.trace(model, X))]
    torch.testing.assert_close(run(lmfx.simplify(program, X), X), run(model, X), rtol=1e-4, atol=1e-5)
    path = lmfx.export_onnx(program, X, tmp_path / "net.onnx")
    assert path.is_file()


def test_a_program_teaches_what_its_model_teaches(compressed: Any) -> None:
    model, program, _, _ = compressed
    graph = lmfx.trace(program, X)
    block = next(
        c
        for c in lmfx.spans(graph)
        if c.realization == "fit" and set(c.all_convs) == {"blocks.0.conv1", "blocks.0.conv2"}
    )
    taught = []
    for teacher in (program, model):
        student = lmfx.rewrite(graph, lmfx.MergePlan((block,)), calibration=images(8))
        options: Any = {"distillation": "features", "features": ["stem", "head"], "progress": False}
        taught.append(lmfx.distill(student, teacher, [images(4), images(4, seed=1)], **options))
    for (name, one), other in zip(taught[0].named_parameters(), taught[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_several_inputs_keep_their_names() -> None:
    model, x = TwoInputs().eval(), (X, images(2, seed=3))
    program = exported(model, *x)
    net = lmfx.simplify(program, {"image": x[0], "depth": x[1]})
    torch.testing.assert_close(net(image=x[0], depth=x[1])["map"], model(*x)["map"], rtol=1e-4, atol=1e-5)


def test_the_command_line_takes_a_file_and_its_own_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    torch.export.save(exported(model, X, free=False), tmp_path / "net.pt2")
    assert main(["simplify", str(tmp_path / "net.pt2"), "-o", str(tmp_path / "out")]) == 0
    net = lmfx.load(tmp_path / "out", torch.export.load(tmp_path / "net.pt2"))
    torch.testing.assert_close(run(net, X), run(model, X), rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(["spans", str(tmp_path / "none.pt2")]) == 2
    assert "torch.export.save" in capsys.readouterr().err


def test_what_a_program_runs_as_is_refused_with_what_to_pass_instead() -> None:
    with pytest.raises(lmfx.ModelError, match="pass the ExportedProgram itself"):
        lmfx.trace(exported(network(), X).module(), X)


class OtherDtype(nn.Module):
    """Computes a gate in float32 whatever its own dtype is, as embeddings of time steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = (x.float().mean((2, 3), keepdim=True) * 1.7).sin().to(x.dtype)
        return self.b(self.a(x * gate).relu())


@pytest.mark.parametrize("core", [False, True])
def test_numbers_of_another_dtype_than_the_layers_are_taken_and_taken_again(core: bool) -> None:
    model, x = OtherDtype().double().eval(), X.double()
    program = exported(model, x)
    net = lmfx.simplify(program.run_decompositions() if core else program, x)
    assert {p.dtype for p in net.parameters()} == {torch.float32, torch.float64}
    for again in (net, lmfx.simplify(net, x)):
        torch.testing.assert_close(run(again, x), run(model, x), rtol=1e-6, atol=1e-7)


def test_layers_of_two_dtypes_are_still_refused() -> None:
    model = OtherDtype().double().eval()
    model.b.float()
    with pytest.raises(lmfx.LmfxError, match="mixes float32, float64"):
        lmfx.simplify(model, X.double())
