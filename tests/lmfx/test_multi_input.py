"""Models with several inputs, constants and containers among them, through the whole public face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lmfx
from lmfx.calibration.images import Frame, as_calibration
from lmfx.passes.errors import InputError
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.trace.tracing import example_arguments, trace
from tests.toys import compress


class Denoiser(nn.Module):
    """A sample and a time step in any form, and a table of conditions; like the denoising networks of libraries."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Linear(4, width)
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.body = nn.Sequential(nn.ReLU(), convs[0], nn.ReLU(), convs[1], nn.ReLU())
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Any, cond: dict[str, Any] | None = None, return_dict: bool = True
    ) -> Any:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif len(timestep.shape) == 0:
            timestep = timestep[None]
        timestep = timestep * torch.ones(sample.shape[0], dtype=timestep.dtype, device=timestep.device)
        angles = timestep[:, None].float() * torch.tensor([1.0, 0.1])[None, :]
        h = self.stem(sample) + self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, :, None, None]
        if cond is not None:
            h = h * cond["scale"] + cond["shift"][0][:, :, None, None]
        y = self.last(self.body(h)) + sample
        return {"sample": y} if return_dict else (y,)


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
COND = {"scale": torch.tensor(0.5), "shift": [torch.randn(2, 8)]}
EXAMPLES: dict[str, Any] = {
    "a number": (X, 10),
    "a tensor without dimensions": (X, torch.tensor(10)),
    "one step an image": (X, torch.tensor([3, 9])),
    "one step for all": (X, torch.tensor([3])),
    "by name": {"sample": X, "timestep": 10},
    "by name in another order": {"timestep": torch.tensor([3, 9]), "sample": X, "return_dict": False},
    "with a table": (X, 7, COND),
    "with a table by name": {"sample": X, "timestep": torch.tensor([1, 2]), "cond": COND, "return_dict": False},
    "with None and a flag": (X, 7, None, False),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval()


def call(net: Any, example: Any) -> Tensor:
    args, kwargs = example_arguments(example)
    with torch.no_grad():
        output = net(*args, **kwargs)
    found: Tensor = output["sample"] if isinstance(output, dict) else output[0]
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_whole_face_takes_an_example_of_any_form(name: str, tmp_path: Path) -> None:
    original, example = model(), EXAMPLES[name]
    net = compress(original, example, 0.8, realize=("compose",))
    assert lmfx.result_of(net).plan.candidates
    assert call(net, example).shape == X.shape
    if name == "denoiser":  # traced for one image, it is trained on more
        more = torch.randn(3, 3, 16, 16)
        with torch.no_grad():
            rows = torch.cat([net(row[None], 10)[0] for row in more])
            torch.testing.assert_close(net(more, 10)[0], rows, rtol=1e-4, atol=1e-4)
    lmfx.save(net, tmp_path / "out")
    assert torch.equal(call(lmfx.load(tmp_path / "out", original), example), call(net, example))
    assert "convolutions became" in lmfx.report(net)
    student = compress(original, example, 0.8, merge=False, realize=("compose",))
    assert torch.allclose(call(lmfx.merge(student), example), call(net, example), atol=1e-5)


@pytest.mark.parametrize("name", ["a number", "by name in another order", "with a table"])
def test_what_comes_out_is_exported_and_compared_with_onnx_runtime(name: str, tmp_path: Path) -> None:
    import onnx

    net = compress(model(), EXAMPLES[name], 0.8, realize=("compose",))
    file = lmfx.export_onnx(net, EXAMPLES[name], tmp_path / "net.onnx")
    tensors = [v for v in torch.utils._pytree.tree_leaves(EXAMPLES[name]) if isinstance(v, Tensor)]
    inputs = [i.name for i in onnx.load(file).graph.input]
    # Constants are no inputs of the file; a vector that goes with a pruned conv is none either.
    assert "sample" in inputs and len(inputs) <= len(tensors)
    assert ("timestep" in inputs) == (name == "by name in another order")


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_network_with_an_integer_input_is_measured(backend: str) -> None:
    from lmfx.latency import get_backend
    from lmfx.latency.sampling import Sampling

    gm = trace(model(), EXAMPLES["one step an image"])
    made: Any = get_backend(backend, sampling=Sampling(min_ms=0.5))
    (times,) = made.measure_interleaved([bare(gm, example_arguments(EXAMPLES["one step an image"]))], 1)
    assert len(times) == 1 and times[0] > 0


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("tracer", ["shapes", "export"])  # the network asks for lengths
def test_a_bare_graph_takes_tensors_only_and_computes_the_same(name: str, tracer: str) -> None:
    original, example = model(), EXAMPLES[name]
    gm = trace(original, example, tracers=(tracer,))
    net, tensors = bare(gm, example_arguments(example))
    with torch.no_grad():
        output = net(*tensors)
    found = output["sample"] if isinstance(output, dict) else output[0]
    assert torch.equal(found, call(gm, example))
    assert bare(net, (tuple(tensors), {}))[0] is net


def test_a_bare_graph_reads_items_of_containers_in_the_order_of_its_tensors() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, pair: list[Tensor], scale: float, table: dict[str, Any]) -> Tensor:
            return self.conv(pair[1]) * scale - table["b"] + pair[0] * table["a"][0]

    example = ([X, X * 2], 3.0, {"a": (torch.tensor(2.0),), "b": X * 5})
    original = Sum().eval()
    for tracer in ("symbolic", "shapes", "export"):
        gm = trace(original, example, tracers=(tracer,))
        net, tensors = bare(gm, (example, {}))
        with torch.no_grad():
            assert torch.allclose(net(*tensors), original(*example), atol=1e-6)
        assert all(isinstance(t, Tensor) for t in tensors)


# --- calibration ------------------------------------------------------------------------------------------------------

Y = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
STEPS = torch.arange(6)


def test_constants_come_from_the_example_and_batches_from_the_data() -> None:
    found = as_calibration(Y, (X, 10))
    assert len(found) == 6 and torch.equal(found.tensors[0], Y) and isinstance(found.names, Frame)
    assert found.names.arguments((Y[:2],))[0][1] == 10
    for source in ((Y, 10), [(Y[:2], 10), (Y[2:], 10)], [Y[:4], Y[4:]], [(Y, 10, "label")]):
        assert torch.equal(as_calibration(source, (X, 10)).tensors[0], Y)


def test_steps_keep_their_type() -> None:
    found = as_calibration([(Y, STEPS)], (X, torch.tensor([3, 9])))
    assert found.tensors[1].dtype == torch.int64 and torch.equal(found.tensors[1], STEPS)
    assert found.names == ()


def test_a_dict_gives_its_tensors_by_name_and_may_leave_out_constants() -> None:
    example = {"sample": X, "timestep": torch.tensor([1, 2]), "cond": COND, "return_dict": False}
    shift = torch.randn(6, 8)
    whole = {"timestep": STEPS, "sample": Y, "cond": {"scale": torch.tensor(0.5), "shift": [shift]}}
    for source in (whole, [{**whole, "return_dict": False}]):
        found = as_calibration(source, example)
        assert [t.shape[0] for t in found.tensors] == [6, 6, 6]
        assert isinstance(found.names, Frame)
        _, kwargs = found.names.arguments(found.tensors)
        assert torch.equal(kwargs["sample"], Y) and torch.equal(kwargs["cond"]["shift"][0], shift)
        assert kwargs["return_dict"] is False and torch.equal(kwargs["cond"]["scale"], COND["scale"])


def test_the_example_itself_stands_in_with_its_constants() -> None:
    found = as_calibration(None, EXAMPLES["with a table"])
    assert len(found) == 2 and len(found.tensors) == 2


@pytest.mark.parametrize(
    ("source", "example", "text"),
    [
        ((Y, 11), (X, 10), "has 11 where the example has 10"),
        ([(Y, torch.tensor(3))], (X, torch.tensor(10)), "the tensor 3 where the example has the tensor 10"),
        ({"sample": Y, "timestep": 4}, {"sample": X, "timestep": 10}, "has 4 where the example has 10"),
        ({"timestep": 10}, {"sample": X, "timestep": 10}, r"has no \['sample'\]"),
        ({"sample": Y, "cond": {"a": Y}}, {"sample": X, "cond": {"a": X, "b": 1}}, "not built like the example"),
        ([(Y, STEPS)], (X, 10), None),
        ([(Y, STEPS.float())], (X, torch.tensor([3, 9])), "float32, the example torch.int64"),
        ([(Y, STEPS[:4])], (X, torch.tensor([3, 9])), r"have \[6, 4\] images"),
        (None, (10, torch.tensor(3)), "at least one must be a tensor of images"),
    ],
)
def test_data_that_does_not_fit_the_example_is_refused(source: Any, example: Any, text: str | None) -> None:
    if text is None:  # a second tensor is a label where the example has a constant
        assert len(as_calibration(source, example).tensors) == 1
        return
    with pytest.raises(InputError, match=text):
        as_calibration(source, example)


def test_calibration_with_constants_reaches_fits_and_scores() -> None:
    original = model()
    net = compress(original, (X, 10), 0.8, calibration=[(Y[:3], 10), (Y[3:], 10)], realize=("fit",))
    assert lmfx.result_of(net).images == 6
    error = (call(net, (X, 10)) - call(original, (X, 10))).norm()
    assert float(error / call(original, (X, 10)).norm()) < 0.6


# --- the networks of a library ----------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"norm_num_groups": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
LATENT, CONTEXT = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 8)
LIBRARY: dict[str, tuple[str, dict[str, Any], Any]] = {
    "denoiser": (
        "UNet2DModel",
        {
            **TINY,
            "sample_size": 16,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "DownBlock2D"),  # there is attention between them
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
        },
        (torch.randn(1, 3, 16, 16), 10),
    ),
    "conditioned denoiser": (
        "UNet2DConditionModel",
        {
            **TINY,
            "sample_size": 16,
            "attention_head_dim": 4,
            "cross_attention_dim": 8,
            "mid_block_type": None,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        {"sample": LATENT, "timestep": torch.tensor(5), "encoder_hidden_states": CONTEXT, "return_dict": False},
    ),
    "autoencoder": (
        "AutoencoderKL",
        {
            **TINY,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        {"sample": torch.randn(2, 3, 16, 16), "sample_posterior": False},
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_diffusion_networks_of_a_library_go_through_the_whole_face(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, options, example = LIBRARY[name]
    torch.manual_seed(0)
    original = getattr(diffusers, kind)(**options).eval()
    net = compress(original, example, 0.85, realize=("compose",))
    args, kwargs = example_arguments(example)
    with torch.no_grad():
        before, after = original(*args, **kwargs), net(*args, **kwargs)
    assert type(before) is type(after) and before[0].shape == after[0].shape
    assert lmfx.result_of(net).ratio <= 0.85
    lmfx.save(net, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(lmfx.load(tmp_path / "out", original)(*args, **kwargs)[0], after[0])
    if name == "conditioned denoiser":  # seconds each
        assert lmfx.export_onnx(net, example, tmp_path / "net.onnx").exists()
