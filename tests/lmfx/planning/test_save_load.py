"""A saved network comes back bit for bit, and whatever is wrong with a folder or a model is said."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from lmfx.budget import Budget
from lmfx.calibration.images import as_calibration
from lmfx.calibration.surrogates import affine_surrogates
from lmfx.latency import CalibrationLine
from lmfx.made_of import MadeOf, made_of, set_made_of
from lmfx.passes.errors import InputError, PlanError
from lmfx.passes.graph.ops import ChannelAffine
from lmfx.passes.ir import Candidate, MergePlan
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.trainable import merge, rewrite, span_names
from lmfx.passes.spans.enumeration import SpanOptions, enumerate_spans
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import fingerprint, trace
from lmfx.planning import saved_networks as store
from lmfx.planning.plan_file import load_plan, make_document, plan_from_dict, save_plan
from lmfx.planning.saved_networks import load, save
from lmfx.result import Result, result_of

X = torch.randn(2, 3, 17, 15, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))) + x)


class Small(nn.Module):
    """A stem, two residual blocks, a strided conv; at the end two linear maps that share one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.down(self.blocks(torch.relu(self.stem(x)))))
        return self.second(torch.relu(self.first(y.mean((2, 3)))))


def chosen(network: Network) -> tuple[Candidate, ...]:
    """Both blocks composed, of all their convs, and a fit of the strided conv."""
    spans = enumerate_spans(network, SpanOptions(max_kernel_size=None))
    blocks = [c for c in spans if c.realization == "compose" and all("blocks" in n for n in c.all_convs)]
    fits = [c for c in spans if c.realization == "fit" and c.convs == ("down",)]
    return max(blocks, key=lambda c: len(c.kept)), fits[-1]


def compressed(
    model: nn.Module, x: Any = X, surrogate: str = "affine", merged: bool = True, pick: Callable[..., Any] = chosen
) -> fx.GraphModule:
    """What `compress` gives, without measuring anything."""
    graph = trace(model, x)
    network = Network(graph)
    plan = MergePlan(pick(network), fingerprint(graph), 1.5, -0.25, surrogate)  # type: ignore[arg-type]
    images = as_calibration(None, x)
    net = rewrite(graph, plan, affine_surrogates(network, images) if surrogate == "affine" else None)
    net = merge(net) if merged else net
    result = Result(
        plan,
        Budget.parse("2x"),
        merged,
        {"backend": "roofline", "threads": 1},
        names=tuple(span_names(graph, plan)),
        line=CalibrationLine(0.1, 1.2, 0.01, 1.0, float("nan")),
        predicted=1.5,
        measured=1.4,
        original=3.0,
        ratio=1.4 / 3,
        inputs=noted(graph).inputs,
    )
    note(net, noted(graph).of_result())
    set_made_of(net, MadeOf(plan, None, result))
    return net.eval()


@pytest.fixture
def model() -> nn.Module:
    return Small().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(compressed(Small().eval()), tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A merged network, saved, in a folder of this test's own."""
    return Path(shutil.copytree(saved, tmp_path / "out"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "trainable"])
@pytest.mark.parametrize("surrogate", ["identity", "affine"])
def test_a_loaded_network_gives_bit_equal_outputs(tmp_path: Path, surrogate: str, merged: bool) -> None:
    net = compressed(Small().eval(), surrogate=surrogate, merged=merged)
    loaded = load(save(net, tmp_path / "out"), Small())  # other weights, and in training mode
    assert torch.equal(loaded(X), net(X))
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert not any(m.training for m in loaded.modules())
    if surrogate == "affine" and not merged:
        assert any(isinstance(m, ChannelAffine) for m in loaded.modules())


def test_the_result_comes_back_with_the_network(model: nn.Module, tmp_path: Path) -> None:
    net = compressed(model)
    result = result_of(load(save(net, tmp_path / "out"), model))
    saved = result_of(net)
    assert replace(result, line=None) == replace(saved, line=None)
    assert str(result.line) == str(saved.line)  # NaN is not equal to itself


def test_a_network_that_was_trained_and_merged_later_is_saved_as_it_is(model: nn.Module, tmp_path: Path) -> None:
    student = compressed(model, merged=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    net = merge(student)
    loaded = load(save(net, tmp_path / "out"), model)
    assert torch.equal(loaded(X), net(X))
    assert result_of(loaded).merged


def test_a_plan_without_changes_is_saved_too(model: nn.Module, tmp_path: Path) -> None:
    net = compressed(model, pick=lambda network: ())
    assert torch.equal(load(save(net, tmp_path / "out"), Small())(X), model(X))


def test_a_network_of_the_stages_is_saved_with_its_plan_alone(model: nn.Module, tmp_path: Path) -> None:
    graph = trace(model, X)
    plan = MergePlan(chosen(Network(graph)), fingerprint(graph), surrogate="affine")
    net = rewrite(graph, plan)  # an affine plan, rewritten without surrogates
    set_made_of(net, MadeOf(plan, None))
    loaded = load(save(net, tmp_path / "out"), Small())
    assert torch.equal(loaded(X), net(X))
    assert made_of(loaded) == MadeOf(plan, None)
    assert torch.equal(load(save(loaded, tmp_path / "again"), Small())(X), net(X))


def test_shared_weights_are_stored_once_and_stay_shared(model: nn.Module, tmp_path: Path) -> None:
    folder = save(compressed(model), tmp_path / "out")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert "first.weight" in stored
    assert "second.weight" not in stored
    loaded = load(folder, Small())
    assert loaded.get_parameter("first.weight") is loaded.get_parameter("second.weight")


def test_loaded_weights_lie_in_aligned_memory_of_their_own(folder: Path, model: nn.Module) -> None:
    # On unaligned weights, as they lie in the file, convolutions add up in another order, and the last bits differ.
    loaded = load(folder, model)
    assert [name for name, t in loaded.state_dict().items() if t.data_ptr() % 64] == []
    save(compressed(model, merged=False), folder)  # the file may be replaced while the network is in use
    assert loaded(X).isfinite().all()


def test_views_of_one_memory_are_each_stored_whole(model: nn.Module, tmp_path: Path) -> None:
    net = compressed(model)
    memory = torch.randn(12)
    net.get_submodule("first").bias = nn.Parameter(memory[:8])
    net.get_submodule("second").bias = nn.Parameter(memory[4:])
    loaded = load(save(net, tmp_path / "out"), model)
    assert torch.equal(loaded(X), net(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_weight_keeps_the_dtype_it_was_saved_in(model: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    net = compressed(model).to(dtype)
    loaded = load(save(net, tmp_path / "out"), model)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in net.state_dict().items()}
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in loaded.state_dict().items())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.body = Small()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.body(x + self.embed(label)[:, :, None, None])


def test_inputs_by_name_and_of_integers_are_made_again(tmp_path: Path) -> None:
    x = {"x": X, "label": torch.tensor([1, 3])}
    assert noted(trace(TwoInputs().eval(), x)).keyword["label"]["dtype"] == "int64"
    net = compressed(TwoInputs().eval(), x, surrogate="identity", pick=lambda network: ())
    loaded = load(save(net, tmp_path / "out"), TwoInputs())
    assert torch.equal(loaded(**x), net(**x))


def test_loading_changes_neither_the_model_nor_the_random_numbers(folder: Path) -> None:
    model = Small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    load(folder, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_is_two_files_and_neither_is_a_pickle(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "plan.json"]
    assert json.loads((folder / "plan.json").read_text())["format"] == "lmfx-plan"
    assert os.listdir(folder.parent) == ["out"]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "one can be read by others, the other cannot"


# --- saving is all or nothing -----------------------------------------------------------------------------------------


def test_saving_again_replaces_the_save_and_leaves_other_files(folder: Path, model: nn.Module) -> None:
    (folder / "net.onnx").write_text("mine")
    net = compressed(model, merged=False)
    save(net, folder)
    assert torch.equal(load(folder, model)(X), net(X))
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "net.onnx", "plan.json"]


def test_a_failed_save_leaves_the_older_one_and_nothing_else(
    folder: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(PlanError, match="cannot save to .*No space left"):
        save(compressed(model, merged=False), folder)
    assert contents(folder) == before
    with pytest.raises(PlanError, match="No space left"):
        save(compressed(model), folder.parent / "new")
    assert os.listdir(folder.parent) == ["out"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_save_that_is_killed_between_its_steps_leaves_the_older_or_the_new_one(
    folder: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    older, newer = load(folder, model), compressed(model, merged=False)
    replaced: list[str] = []
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        replaced.append(str(target))
        if len(replaced) == step:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(newer, folder)
    expected = older if step == 1 else newer
    assert torch.equal(load(folder, model)(X), expected(X))


def test_a_file_in_the_way_is_not_overwritten(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PlanError, match="it is a file; give a folder"):
        save(compressed(model), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("what", [nn.Conv2d(1, 1, 1), "net", None], ids=["module", "text", "none"])
def test_only_networks_of_lmfx_are_saved(what: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="carries no plan of lmfx"):
        save(what, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_input_that_json_can_not_hold_is_named(model: nn.Module, tmp_path: Path) -> None:
    net = compressed(model)
    result = result_of(net)
    broken = replace(result, inputs={"positional": [object()], "keyword": {}})
    set_made_of(net, MadeOf(result.plan, None, broken))
    with pytest.raises(PlanError, match="a object cannot be written"):
        save(net, tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- another model, a damaged folder ----------------------------------------------------------------------------------


class Wider(Small):
    def __init__(self) -> None:
        super().__init__(16)


class Gray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_save_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="was saved for another model: its graph is .* Pass the model that"):
        load(folder, Wider())


def test_a_model_that_can_not_take_the_saved_inputs_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"Gray does not run on the inputs of .* \(\[2, 3, 17, 15\]\)"):
        load(folder, Gray())


def test_what_is_no_model_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="needs the model that was compressed"):
        load(folder, Small)  # type: ignore[arg-type]


def _truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def _strip(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no plan": (lambda f: (f / "plan.json").unlink(), "plan.json does not exist"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
    "no folder": (shutil.rmtree, "it does not exist"),
    "empty plan": (lambda f: (f / "plan.json").write_text(""), "plan.json is damaged"),
    "truncated plan": (lambda f: _truncate(f / "plan.json", 0.6), "plan.json is damaged"),
    "binary plan": (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe\x00"), "plan.json is damaged"),
    "another json": (lambda f: (f / "plan.json").write_text("[1, 2]"), "not a plan of lmfx"),
    "a plan alone": (lambda f: edit(f / "plan.json", lambda d: d.pop("save")), "is a plan alone"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "truncated weights": (lambda f: _truncate(f / "model.safetensors", 0.5), "model.safetensors is damaged"),
    "a flipped bit": (lambda f: _flip(f / "model.safetensors"), "weights have the digest"),
    "foreign weights": (lambda f: _strip(f / "model.safetensors"), "its header has no plan"),
    "no digest": (lambda f: edit(f / "plan.json", lambda d: d["save"].pop("digest")), "save lacks digest"),
    "odd inputs": (lambda f: edit(f / "plan.json", lambda d: d["save"].update(inputs={})), "save.inputs needs"),
    "odd dtype": (
        lambda f: edit(f / "plan.json", lambda d: d["save"]["inputs"]["positional"][0].update(dtype="load")),
        "is no tensor",
    ),
    "odd budget": (
        lambda f: edit(f / "plan.json", lambda d: d["save"]["result"]["budget"].update(value=-1)),
        "save.result.budget: The budget",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_and_said(name: str, folder: Path, model: nn.Module) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(PlanError, match=re.escape(message)):
        load(folder, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stem.bias"), "missing stem.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda t: t.update({"stem.bias": torch.ones(3)}), r"stem.bias has shape \(3,\) for \(8,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_are_not_those_of_the_plan_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, model: nn.Module, tmp_path: Path, monkeypatch: Any
) -> None:
    real = store.tensors_of

    def changed(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, shared = real(net)
        change(tensors)
        return tensors, shared

    monkeypatch.setattr(store, "tensors_of", changed)
    folder = save(compressed(model), tmp_path / "out")
    with pytest.raises(PlanError, match=message):
        load(folder, model)


# --- plans alone ------------------------------------------------------------------------------------------------------


def plans(model: nn.Module) -> Iterator[MergePlan]:
    graph = trace(model, X)
    spans = enumerate_spans(Network(graph), SpanOptions(max_kernel_size=None))
    yield MergePlan()
    assert {c.realization for c in spans} == {"keep", "compose", "fit", "drop"}
    yield MergePlan(spans.candidates, fingerprint(graph), 1.25, -3.5e-7, "affine", "relu6")


def test_a_plan_survives_json_with_every_field(model: nn.Module, tmp_path: Path) -> None:
    for plan in plans(model):
        loaded = load_plan(save_plan(plan, tmp_path / "plan.json"))
        assert loaded == plan
        assert plan_from_dict(json.loads(json.dumps(make_document(plan)))) == plan


def test_the_plan_of_a_folder_is_a_plan(folder: Path, model: nn.Module) -> None:
    assert load_plan(folder / "plan.json") == result_of(load(folder, model)).plan


def _first(document: dict[str, Any]) -> dict[str, Any]:
    return document["plan"]["candidates"][0]


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda d: d.update(format="onnx"), "format 'onnx'"),
    "newer version": (lambda d: d.update(version=2), "has version 2"),
    "no version": (lambda d: d.pop("version"), "has version None"),
    "no plan": (lambda d: d.pop("plan"), "plan is not an object"),
    "no candidates": (lambda d: d["plan"].pop("candidates"), "plan lacks candidates"),
    "unknown field": (lambda d: d["plan"].update(color="red"), "plan has the unknown color"),
    "no list": (lambda d: d["plan"].update(candidates="all"), "plan.candidates is not a list"),
    "latency": (lambda d: d["plan"].update(latency="fast"), "plan.latency is not a number"),
    "bool latency": (lambda d: d["plan"].update(latency=True), "plan.latency is not a number"),
    "fingerprint": (lambda d: d["plan"].update(fingerprint=7), "plan.fingerprint is not of type str"),
    "surrogate": (lambda d: d["plan"].update(surrogate="cubic"), "not one of 'identity', 'affine'"),
    "realization": (lambda d: _first(d).update(realization="fuse"), "plan.candidates[0].realization is 'fuse'"),
    "span order": (lambda d: _first(d)["span"].update(start=9, stop=3), "span runs from 9 to 3"),
    "span type": (lambda d: _first(d)["span"].update(start=1.5), "span.start is not of type int"),
    "no conv": (lambda d: _first(d).update(conv=None, realization="fit"), "is 'fit' without a conv"),
    "no kernel": (lambda d: _first(d)["conv"].update(kernel_size=[]), "0 dimensions"),
    "ranks": (lambda d: _first(d)["conv"].update(stride=[1]), "other numbers of strides"),
    "zero stride": (lambda d: _first(d)["conv"].update(stride=[0, 1]), "a size below 1"),
    "padding": (
        lambda d: _first(d)["conv"].update(padding=[[0, -1], [0, 1]], padding_mode="reflect"),
        "negative padding",
    ),
    "blocks": (lambda d: _first(d)["conv"].update(upscale=[2], cut=[0]), "in other dimensions than it has"),
    "blocks without a cut": (lambda d: _first(d)["conv"].update(upscale=[2, 2]), "in other dimensions than it has"),
    "window alone": (lambda d: _first(d)["conv"].update(window=[[2, 1, 0]] * 2), "does not enlarge its map"),
    "window of two": (lambda d: _first(d)["conv"].update(window=[[2, 1]] * 2), "is not a list of 3"),
    "no blocks": (lambda d: _first(d)["conv"].update(upscale=[0, 2], cut=[0, 0]), "by a size below 1"),
    "no taps": (
        lambda d: _first(d)["conv"].update(upscale=[2, 2], cut=[0, 0], window=[[0, 1, 0]] * 2),
        "by a size below 1",
    ),
    "pairs": (lambda d: _first(d)["conv"].update(padding=[[0], [0]]), "is not a list of 2"),
    "groups": (lambda d: _first(d)["conv"].update(groups=5), "5 groups for 3 and 8 channels"),
    "exact": (lambda d: _first(d).update(exact="yes"), "plan.candidates[0].exact is not of type bool"),
    "exact number": (lambda d: _first(d).update(exact=1), "plan.candidates[0].exact is not of type bool"),
    "no exact at all": (lambda d: _first(d).update(exact=None), "plan.candidates[0].exact is not of type bool"),
    "fine": (lambda d: d["plan"].update(fine="no"), "plan.fine is not of type bool"),
    "fine number": (lambda d: d["plan"].update(fine=1), "plan.fine is not of type bool"),
    "sums": (lambda d: d["plan"].update(sums={}), "plan.sums is not a list"),
    "sums of numbers": (lambda d: d["plan"].update(sums=[["add", 1]]), "plan.sums[0][1] is not of type str"),
    "names": (lambda d: _first(d).update(kept=[1]), "plan.candidates[0].kept[0] is not of type str"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_plan_is_refused_with_the_place(name: str, model: nn.Module, tmp_path: Path) -> None:
    change, message = FORGERIES[name]
    path = save_plan(list(plans(model))[1], tmp_path / "plan.json")
    edit(path, change)
    with pytest.raises(PlanError, match=re.escape(message)) as error:
        load_plan(path)
    assert str(path) in str(error.value)


def test_a_plan_that_can_not_be_read_or_written_is_an_error_of_lmfx(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        load_plan(tmp_path / "no.json")
    with pytest.raises(PlanError, match="cannot read"):
        load_plan(tmp_path)
    with pytest.raises(PlanError, match="cannot write the plan"):
        save_plan(MergePlan(), tmp_path / "no" / "plan.json")


def test_a_deeply_nested_file_is_damaged_and_does_not_end_the_program(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("[" * 100_000)
    with pytest.raises(PlanError, match="is damaged"):
        load_plan(path)
