"""Whatever is wrong with an input, a user is told what was seen and what to do, and nothing else has happened.

One table. For every case: the error is the right subclass of `LmfxError`, its text has the fragment that says what was
seen and the one that says what to do, the caller's model is as it was, and no file was written or changed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lmfx
from lmfx.cli.models import load_model
from lmfx.importance import Reconstruction
from lmfx.latency import Store, get_backend
from lmfx.latency.backends.roofline import RooflineBackend
from lmfx.passes.errors import (
    BudgetError,
    DeviceError,
    ExportError,
    InfeasibleBudget,
    InputError,
    LmfxError,
    MissingExtra,
    ModelError,
    OptionError,
    PlanError,
    StoreError,
    TableError,
)
from lmfx.planning.plan_file import load_plan
from tests.toys import Block, TwoInputs, images, toy
from tests.toys import compress as roofline_compress

X = images(1)
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


# --- what every case works with ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """What is made once: a graph, its tables, a compressed network."""

    graph: fx.GraphModule
    latency: lmfx.LatencyTable
    scores: lmfx.ImportanceTable
    net: fx.GraphModule


class Env:
    """Where one case happens. `given` writes the files it starts from, `watch` names a model that must not change."""

    def __init__(self, folder: Path, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ready = folder, ready
        self.files: dict[Path, bytes] = {}
        self.models: list[tuple[nn.Module, dict[str, Any]]] = []
        self.monkeypatch = monkeypatch

    def given(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.files[path] = path.read_bytes()
        return path

    def saved(self) -> Path:
        lmfx.save(self.ready.net, self.folder / "saved")
        for path in (self.folder / "saved").iterdir():
            self.files[path] = path.read_bytes()
        return self.folder / "saved"

    def watch(self, model: Any) -> Any:
        if isinstance(model, nn.Module):
            self.models.append((model, whole_state(model)))
        return model

    def without(self, *packages: str) -> None:
        for name in packages:
            self.monkeypatch.setitem(sys.modules, name, None)  # an import of it now fails

    def compress(self, model: Any = None, example: Any = X, budget: Any = 0.7, **options: Any) -> Any:
        chosen = self.watch(toy() if model is None else model)
        return roofline_compress(chosen, example, budget, **options)

    def trace(self, model: nn.Module, example: Any) -> Any:
        return lmfx.trace(self.watch(model), example)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Every value, flag, attribute and hook of a model, to be compared later."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = vars(module) if type(module).__name__ != "RecursiveScriptModule" else {}
        state[f"{name}:attributes"] = sorted(attributes)
        state[f"{name}:training"] = module.training
        state[f"{name}:plain"] = {k: v for k, v in attributes.items() if isinstance(v, (int, float, str, bool, tuple))}
        state[f"{name}:hooks"] = [(k, len(v)) for k, v in attributes.items() if k.endswith("hooks")]
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = (id(value), value.requires_grad, value.grad is None, value.dtype, str(value.device), bits(value))
    return state


def bits(value: Tensor) -> Any:
    if value.is_meta:
        return None
    if value.is_quantized:
        return value.int_repr().numpy().tobytes()
    return value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def ready() -> Ready:
    torch.manual_seed(0)
    graph = lmfx.trace(toy(), X)
    latency = lmfx.profile(graph, "roofline", progress=False)
    scores = lmfx.score(graph, latency=latency, calibration=images(8), progress=False)
    return Ready(graph, latency, scores, roofline_compress(toy(), X, 0.7, calibration=images(8)))


# --- models that are wrong --------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Some convs, and then whatever a case wants."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.convs(x))


class Uncopyable(Forward):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle '_thread.lock' object")


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def fails(x: Tensor) -> Tensor:
    raise RuntimeError("the cat is on the keyboard")


def weird(value: float, where: str = "stem.weight") -> nn.Module:
    """A toy with one value in place."""
    model = toy()
    dict([*model.named_parameters(), *model.named_buffers()])[where].data.view(-1)[0] = value
    return model


def mixed() -> nn.Module:
    model = toy()
    model.down.double()
    return model


def half_awake() -> nn.Module:
    model = toy()
    model.blocks[1].norm.train()
    return model


def scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(toy())  # noqa: TID251  (that is the point)


def strings() -> Iterator[str]:
    yield "a.jpg"


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 2)).eval()


class Broken(RooflineBackend):
    """A backend whose clock is wrong."""

    def __init__(self, reading: float) -> None:
        super().__init__(peak_gflops=7.0)  # its rows are nobody else's
        self.reading = reading

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "reading": str(self.reading)}

    def measure(self, workloads: Any, *others: Any, **options: Any) -> Any:
        return super().measure(workloads)

    def ms(self, module: nn.Module, inputs: Any) -> float:
        return self.reading


@dataclass(frozen=True)
class Tastes:
    """An estimator with one answer to everything."""

    answer: Any
    name: str = "taste"

    def score(self, spans: Any, candidates: Any, *others: Any) -> lmfx.ImportanceTable:
        return lmfx.ImportanceTable({c.key: self.answer for c in candidates}, {})


def other_table() -> lmfx.LatencyTable:
    """Of a longer network, so that it has a row for every key of the toy."""
    chain = [m for _ in range(8) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    return lmfx.profile(lmfx.trace(nn.Sequential(*chain).eval(), X), "roofline", progress=False)


def rewrite_with(e: Env, plan: Any, graph: Any = None) -> Any:
    return lmfx.rewrite(e.ready.graph if graph is None else graph, plan)


def plan_of(e: Env) -> lmfx.MergePlan:
    return lmfx.result_of(e.ready.net).plan


def damaged_save(e: Env, name: str, edit: Callable[[bytes], bytes]) -> Any:
    folder = e.saved()
    e.given(f"saved/{name}", edit((folder / name).read_bytes()))
    return lmfx.load(folder, e.watch(toy()))


def distilling(e: Env, batches: Any, **options: Any) -> Any:
    student = e.watch(roofline_compress(toy(), X, 0.7, calibration=images(8), merge=False))
    return lmfx.distill(student, e.watch(toy()), batches, progress=False, **options)


# --- the table --------------------------------------------------------------------------------------------------------

Case = tuple[str, Callable[[Env], Any], type[LmfxError], str, str]
"""(id, what is done, the error, what was seen, what to do)"""

FORMS = 'Write 0.6 or "60%"'

BUDGETS: list[Case] = [
    (f"budget {name}", lambda e, b=value: e.compress(budget=b), BudgetError, seen, do)
    for name, value, seen, do in [
        ("a word", "fast", "'fast'", FORMS),
        ("empty", "", "''", FORMS),
        ("unknown unit", "4.5 furlongs", "'furlongs'", FORMS),
        ("zero", 0, "budget 0", FORMS),
        ("zero percent", "0%", "budget 0", FORMS),
        ("zero ms", "0ms", "0ms", FORMS),
        ("negative", -0.5, "-0.5", FORMS),
        ("NaN", math.nan, "nan", FORMS),
        ("infinite", math.inf, "inf", FORMS),
        ("a bool", True, "True", FORMS),
        ("None", None, "None", FORMS),
        ("a list", [0.5], "[0.5]", FORMS),
        ("60 for 60%", 60, "60", 'Did you mean "60%"'),
        ("150%", "150%", "150%", "at most 100%"),
        ("0.5x", "0.5x", "0.5x", "at least 1x"),
    ]
]

MODELS: list[Case] = [
    ("model a string", lambda e: e.compress("resnet18"), ModelError, "a str", "torch.nn.Module"),
    ("model a class", lambda e: e.compress(type(toy())), ModelError, "a type", "call the class first"),
    (
        "model empty",
        lambda e: e.compress(nn.Sequential().eval()),
        ModelError,
        "Sequential has no parameters",
        "nothing",
    ),
    ("model without conv", lambda e: e.compress(flat()), ModelError, "no convolution", "nothing to merge"),
    (
        "one conv alone",
        lambda e: e.compress(nn.Conv2d(3, 4, 1).eval(), realize=("compose",)),
        InfeasibleBudget,
        "Conv2d",
        "See",
    ),
    ("training mode", lambda e: e.compress(toy().train()), ModelError, "training mode", "model.eval()"),
    ("a norm in training mode", lambda e: e.compress(half_awake()), ModelError, "blocks.1.norm", "model.eval()"),
    ("NaN weight", lambda e: e.compress(weird(math.nan)), ModelError, "stem.weight", "check training"),
    ("infinite weight", lambda e: e.compress(weird(math.inf, "head.bias")), ModelError, "head.bias", "check training"),
    (
        "NaN in a norm's buffer",
        lambda e: e.compress(weird(math.nan, "blocks.0.norm.running_var")),
        ModelError,
        "blocks.0.norm.running_var",
        "check training",
    ),
    (
        "huge weights",
        lambda e: e.compress(weird(3e38)),
        ModelError,
        "NaN or infinite values on the example",
        "check its",
    ),
    (
        "meta device",
        lambda e: e.compress(toy().to("meta")),
        ModelError,
        "stem.weight is on the meta",
        "load the weights",
    ),
    ("half on a CPU", lambda e: e.compress(toy().half(), X.half()), ModelError, "float16", "model.float()"),
    ("bfloat16", lambda e: e.compress(toy().bfloat16(), X.bfloat16()), ModelError, "bfloat16", "model.float()"),
    ("mixed dtypes", lambda e: e.compress(mixed()), ModelError, "float32, float64", "convert it to one"),
    (
        "complex",
        lambda e: e.compress(Complex().eval()),
        ModelError,
        "phase is complex",
        "which no conv of a runtime is",
    ),
    ("TorchScript", lambda e: e.compress(scripted()), ModelError, "TorchScript", "pass the eager model"),
    ("output an int", lambda e: e.compress(Forward(lambda y: 3).eval()), ModelError, "it gives int", "return"),
    ("output a string", lambda e: e.compress(Forward(lambda y: "cat").eval()), ModelError, "it gives str", "return"),
    ("output a scalar", lambda e: e.compress(Forward(torch.sum).eval()), ModelError, "shape ()", "batch"),
    (
        "forward raises",
        lambda e: e.compress(Forward(fails).eval()),
        InputError,
        "the cat is on the keyboard",
        "Pass an",
    ),
    ("not to be copied", lambda e: e.compress(Uncopyable(torch.relu).eval()), ModelError, "_thread.lock", "deepcopy"),
    (
        "forward depends on data",
        lambda e: e.compress(Forward(lambda y: y[y > 0]).eval()),
        ModelError,
        "no batch dimension",
        "magnitude",
    ),
]

EXAMPLES: list[Case] = [
    ("too many channels", lambda e: e.compress(example=images(1, channels=4)), InputError, "(1, 4, 12, 12)", "Pass an"),
    ("too small", lambda e: e.compress(nn.Conv2d(3, 4, 5).eval(), X[..., :2]), InputError, "(1, 3, 12, 2)", "Pass an"),
    ("no batch dimension", lambda e: e.compress(example=X[0]), InputError, "(3, 12, 12)", "batch dimension"),
    (
        "no batch dimension, convs alone",
        lambda e: e.compress(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), X[0]),
        InputError,
        "(3, 12, 12)",
        "batch dimension",
    ),
    ("example in float64", lambda e: e.compress(example=X.double()), InputError, "float64", "convert one of them"),
    ("example in integers", lambda e: e.compress(example=X.long()), InputError, "Net does not run", "Pass an input"),
    ("example NaN", lambda e: e.compress(example=X * math.nan), InputError, "NaN", "pass real data"),
    ("example on meta", lambda e: e.compress(example=X.to("meta")), DeviceError, "the meta device", "move it"),
    ("example an empty tuple", lambda e: e.compress(example=()), InputError, "()", "pass a tensor"),
    ("example an empty dict", lambda e: e.compress(example={}), InputError, "{}", "pass a tensor"),
    ("example None", lambda e: e.compress(example=None), InputError, "NoneType", "pass a tensor"),
    ("example a string", lambda e: e.compress(example="cat.jpg"), InputError, "str", "pass a tensor"),
    ("example holds nothing", lambda e: e.compress(example=X[:0]), InputError, "(0, 3, 12, 12)", "at least one image"),
    ("example too many", lambda e: e.compress(example=(X, X)), InputError, "Net does not run", "Pass an input"),
    ("example of unknown names", lambda e: e.compress(example={"y": X}), InputError, "'y'", "Pass an input"),
]

OPTIONS: list[Case] = [
    ("backend unknown", lambda e: e.compress(latency="coreml"), OptionError, "'coreml'", "choose one of onnxruntime"),
    ("backend a class", lambda e: e.compress(latency=RooflineBackend), OptionError, "class", "RooflineBackend()"),
    ("backend a number", lambda e: e.compress(latency=3), OptionError, "a int is not", "one of onnxruntime"),
    ("backend's option unknown", lambda e: get_backend("roofline", peak=3), OptionError, "peak", "peak_gflops"),
    ("backend's option wrong", lambda e: get_backend("torch", threads=0), OptionError, "0", "positive integer"),
    ("estimator unknown", lambda e: e.compress(importance="taste"), OptionError, "'taste'", "choose one of"),
    ("estimator a class", lambda e: e.compress(importance=Reconstruction), OptionError, "class", "Reconstruction()"),
    ("estimator's option", lambda e: lmfx.score(e.ready.graph, probes=0), OptionError, "probes=0", "from 1"),
    (
        "estimator's option unknown",
        lambda e: lmfx.score(e.ready.graph, depth=3),
        OptionError,
        "'depth'",
        "importance='reconstruction'",
    ),
    ("include matches nothing", lambda e: e.compress(include=("stm*",)), OptionError, "'stm*'", "the modules are stem"),
    ("exclude matches nothing", lambda e: e.compress(exclude=("x.*",)), OptionError, "'x.*'", "the modules are stem"),
    ("include a string", lambda e: e.compress(include="stem"), OptionError, "include='stem'", "pass a tuple"),
    ("exclude a number", lambda e: e.compress(exclude=3), OptionError, "exclude=3", "pass a tuple"),
    ("exclude numbers", lambda e: e.compress(exclude=(3,)), OptionError, "exclude=(3,)", "pass a tuple"),
    ("exclude everything", lambda e: e.compress(exclude=("*",)), InfeasibleBudget, "excluded", "See lmfx.spans"),
    ("kernel 0", lambda e: e.compress(max_kernel_size=0), OptionError, "max_kernel_size=0", "from 1"),
    ("kernel -1", lambda e: e.compress(max_kernel_size=-1), OptionError, "max_kernel_size=-1", "from 1"),
    ("kernel 2.5", lambda e: e.compress(max_kernel_size=2.5), OptionError, "max_kernel_size=2.5", "whole number"),
    ("kernel True", lambda e: e.compress(max_kernel_size=True), OptionError, "max_kernel_size=True", "whole number"),
    ("span of 0 convs", lambda e: e.compress(max_span_convs=0), OptionError, "max_span_convs=0", "from 1"),
    (
        "span of many convs",
        lambda e: e.compress(max_span_convs="12"),
        OptionError,
        "max_span_convs='12'",
        "whole number",
    ),
    ("realize unknown", lambda e: e.compress(realize=("melt",)), OptionError, "melt", "'compose', 'fit'"),
    ("realize empty", lambda e: e.compress(realize=()), OptionError, "realize=()", "'compose', 'fit'"),
    ("realize a string", lambda e: e.compress(realize="fit"), OptionError, "realize='fit'", "('fit',)"),
    ("surrogate unknown", lambda e: e.compress(surrogate="cubic"), OptionError, "'cubic'", "use 'affine'"),
    ("executor a number", lambda e: e.compress(executor=4), OptionError, "executor", "ThreadPoolExecutor"),
    ("spans option unknown", lambda e: lmfx.spans(e.ready.graph, depth=3), OptionError, "depth", "max_kernel_size"),
    ("rounds 0", lambda e: get_backend("roofline").measure_interleaved([], 0), OptionError, "0", "positive integer"),
]

CALIBRATION: list[Case] = [
    (f"calibration {name}", lambda e, c=value: e.compress(calibration=c() if callable(c) else c), InputError, seen, do)
    for name, value, seen, do in [
        ("empty", X[:0], "empty", "pass a tensor of images"),
        ("an empty loader", [], "empty", "pass a tensor of images"),
        ("of wrong shape", images(4, size=8), "(4, 3, 8, 8)", "must agree"),
        ("without a batch", X[0], "(3, 12, 12)", "must agree"),
        ("of wrong dtype", images(4).double(), "float64", "convert one of them"),
        ("with NaN", images(4) * math.nan, "NaN", "clean it"),
        ("of strings", strings, "a str", "expected a tensor"),
        ("a number", 64, "int", "pass a tensor"),
        ("a string", "images/", "a str", "expected a tensor"),
        ("a dict of two that fit", {"y": X, "z": X}, "more than one", "pass the input alone"),
        ("a dict of nothing that fits", {"y": X[0]}, "none of them fits", "pass the input alone"),
        ("a scalar", torch.tensor(1.0), "()", "must agree"),
    ]
] + [
    (
        "calibration lacks an input",
        lambda e: e.compress(TwoInputs().eval(), {"image": X, "depth": X}, calibration={"image": X}),
        InputError,
        "['depth']",
        "it has ['image']",
    ),
    (
        "calibration of unequal lengths",
        lambda e: e.compress(TwoInputs().eval(), (X, X), calibration=(images(4), images(3))),
        InputError,
        "[4, 3]",
        "as many",
    ),
    (
        "calibration not of tensors",
        lambda e: e.compress(TwoInputs().eval(), (X, X), calibration=[(images(4), "depth.png")]),
        InputError,
        "str",
        "expected a tensor",
    ),
]

DEVICES: list[Case] = [
    ("no CUDA for torch", lambda e: get_backend("torch", device="cuda"), DeviceError, "'cuda'", "device='cpu'"),
    (
        "no CUDA to profile",
        lambda e: lmfx.profile(e.ready.graph, "torch", device="cuda"),
        DeviceError,
        "'cuda'",
        "device='cpu'",
    ),
    (
        "no CUDA for onnxruntime",
        lambda e: get_backend("onnxruntime", provider="cuda"),
        DeviceError,
        "CUDAExecutionProvider",
        "onnxruntime-gpu",
    ),
]

EXTRAS: list[Case] = [
    (
        "onnxruntime is missing",
        lambda e: (e.without("onnxruntime"), e.compress(latency="onnxruntime")),
        MissingExtra,
        "onnxruntime",
        "pip install",
    ),
    (
        "onnx is missing",
        lambda e: (e.without("onnx"), lmfx.export_onnx(e.watch(e.ready.net), X, e.folder / "net.onnx")),
        MissingExtra,
        "onnx",
        "pip install",
    ),
    (
        "onnxscript is missing",
        lambda e: (e.without("onnxscript"), lmfx.export_onnx(e.watch(e.ready.net), X, e.folder / "net.onnx")),
        MissingExtra,
        "onnxscript",
        "pip install",
    ),
    (
        "matplotlib is missing",
        lambda e: (
            e.without("matplotlib", "matplotlib.figure"),
            lmfx.solve(e.ready.graph, e.ready.latency, e.ready.scores).plot(e.folder / "frontier.png"),
        ),
        MissingExtra,
        "matplotlib",
        "pip install",
    ),
    (
        "torchvision is missing",
        lambda e: (e.without("torchvision"), load_model("torchvision:resnet18")),
        MissingExtra,
        "torchvision",
        "pip install",
    ),
    (
        "timm is missing",
        lambda e: (e.without("timm"), load_model("timm:resnet18")),
        MissingExtra,
        "timm",
        "pip install",
    ),
]

PLANS: list[Case] = [
    (
        "plan of another model",
        lambda e: rewrite_with(e, plan_of(e), e.trace(toy(width=4), X)),
        PlanError,
        "the plan was made for graph",
        "trace the same model",
    ),
    ("plan a dict", lambda e: rewrite_with(e, {"candidates": []}), PlanError, "a dict", "frontier.at(0.6)"),
    ("rewrite of no graph", lambda e: rewrite_with(e, plan_of(e), toy()), InputError, "Net", "lmfx.trace"),
    (
        "plan truncated",
        lambda e: load_plan(e.given("plan.json", (e.saved() / "plan.json").read_bytes()[:200])),
        PlanError,
        "is damaged",
        "compress again",
    ),
    (
        "plan foreign",
        lambda e: load_plan(e.given("plan.json", json.dumps({"name": "x"}))),
        PlanError,
        "is not a plan",
        "lmfx.save",
    ),
    ("plan not there", lambda e: load_plan(e.folder / "plan.json"), PlanError, "does not exist", "lmfx.save"),
    ("load truncated plan", lambda e: damaged_save(e, "plan.json", lambda b: b[:99]), PlanError, "damaged", "compress"),
    ("load other JSON", lambda e: damaged_save(e, "plan.json", lambda b: b"[1]"), PlanError, "not a plan", "lmfx.save"),
    (
        "load truncated weights",
        lambda e: damaged_save(e, "model.safetensors", lambda b: b[:-9]),
        PlanError,
        "safetensors",
        "again",
    ),
    (
        "load flipped weights",
        lambda e: damaged_save(e, "model.safetensors", flip),
        PlanError,
        "digest",
        "compress again",
    ),
    (
        "load with another model",
        lambda e: lmfx.load(e.saved(), e.watch(toy(width=4))),
        PlanError,
        "was saved for another model",
        "Pass the model",
    ),
    ("load with no model", lambda e: lmfx.load(e.saved(), "toy"), InputError, "str", "the model that was compressed"),
    (
        "load from nowhere",
        lambda e: lmfx.load(e.folder / "no", e.watch(toy())),
        PlanError,
        "does not exist",
        "lmfx.save",
    ),
    (
        "save into a file",
        lambda e: lmfx.save(e.watch(e.ready.net), e.given("out", "mine")),
        PlanError,
        "it is a file",
        "give a folder",
    ),
    (
        "save of a plain module",
        lambda e: lmfx.save(e.watch(toy()), e.folder / "out"),
        InputError,
        "Net",
        "lmfx.compress",
    ),
    ("report of a plain module", lambda e: lmfx.report(e.watch(toy())), InputError, "Net", "lmfx.compress"),
    ("report of nothing", lambda e: lmfx.report(None), InputError, "NoneType", "lmfx.compress"),
    ("merge of a plain module", lambda e: lmfx.merge(e.watch(toy())), InputError, "a Net", "lmfx.rewrite"),
    ("spans of a plain module", lambda e: lmfx.spans(e.watch(toy())), InputError, "a Net", "call lmfx.trace"),
    ("profile of a plain module", lambda e: lmfx.profile(e.watch(toy()), "roofline"), InputError, "Net", "lmfx.trace"),
    ("score of a plain module", lambda e: lmfx.score(e.watch(toy())), InputError, "Net", "lmfx.trace"),
]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


FILES: list[Case] = [
    (
        "store is text",
        lambda e: e.compress(cache_dir=e.given("cache/rows", b"hello world, " * 20).parent),
        StoreError,
        "cannot make the folder",
        "choose another cache_dir",
    ),
    (
        "cache_dir a file",
        lambda e: e.compress(cache_dir=e.given("cache", "mine")),
        StoreError,
        "cannot make the folder",
        "choose another cache_dir",
    ),
    ("cache_dir a number", lambda e: e.compress(cache_dir=3), OptionError, "cache_dir=3", "a folder"),
    (
        "export of no module",
        lambda e: lmfx.export_onnx("net", X, e.folder / "n.onnx"),  # type: ignore[arg-type]
        InputError,
        "a str",
        "torch.nn.Module",
    ),
    (
        "export without inputs",
        lambda e: lmfx.export_onnx(e.watch(e.ready.net), (), e.folder / "n.onnx"),
        InputError,
        "tuple",
        "must be a tensor",
    ),
    (
        "export to no folder",
        lambda e: lmfx.export_onnx(e.watch(e.ready.net), X, e.folder / "no" / "n.onnx"),
        ExportError,
        "does not exist",
        "make it first",
    ),
    (
        "export into a file's folder",
        lambda e: lmfx.export_onnx(e.watch(e.ready.net), X, e.given("out", "mine") / "n.onnx"),
        ExportError,
        "out does not exist",
        "make it first",
    ),
    (
        "weights of another model",
        lambda e: load_model("torchvision:squeezenet1_1", weights=e.saved() / "model.safetensors"),
        ModelError,
        "model.safetensors",
        "",
    ),
    (
        "weights that are text",
        lambda e: load_model("torchvision:squeezenet1_1", weights=e.given("w.safetensors", "hello")),
        ModelError,
        "w.safetensors",
        "safetensors",
    ),
    ("model name unknown", lambda e: load_model("torchvision:resnet19"), ModelError, "'resnet19'", "resnet18"),
]

TABLES: list[Case] = [
    (
        "table of another graph",
        lambda e: lmfx.solve(e.ready.graph, other_table(), e.ready.scores),
        TableError,
        "another graph",
        "profile this",
    ),
    (
        "table of a smaller graph",
        lambda e: lmfx.solve(e.trace(toy(width=4), X), e.ready.latency, e.ready.scores),
        TableError,
        "another graph",
        "profile this",
    ),
    (
        "scores of another graph",
        lambda e: lmfx.solve(
            e.ready.graph, e.ready.latency, lmfx.score(lmfx.trace(toy(width=4), X), "magnitude", progress=False)
        ),
        TableError,
        "another graph",
        "score this",
    ),
    (
        "backend that measures NaN",
        lambda e: e.compress(latency=Broken(math.nan)),
        TableError,
        "nan",
        "measure it again",
    ),
    (
        "backend that measures 0",
        lambda e: e.compress(latency=Broken(0.0)),
        DeviceError,
        "0.0 ms",
        "measure with another",
    ),
    ("backend that measures -1", lambda e: e.compress(latency=Broken(-1.0)), TableError, "-1.0", "measure it again"),
    (
        "estimator that gives NaN",
        lambda e: e.compress(importance=Tastes(math.nan)),
        TableError,
        "nan",
        "measure it again",
    ),
    ("table a dict", lambda e: lmfx.solve(e.ready.graph, {}, e.ready.scores), TableError, "a dict", "lmfx.profile"),
    ("distill on nothing", lambda e: distilling(e, []), InputError, "no batches", "pass a list"),
    ("distill on NaN", lambda e: distilling(e, [X * math.nan]), InputError, "nan", "check the images"),
    ("distill on strings", lambda e: distilling(e, ["a.jpg"]), InputError, "a str", "pass a list"),
    ("distill no epochs", lambda e: distilling(e, [X], epochs=0), OptionError, "epochs=0", "at least one epoch"),
    ("distill on other shapes", lambda e: distilling(e, [X[:, :2]]), InputError, "(1, 2, 12, 12)", "the model takes"),
    (
        "distill a plain function",
        lambda e: lmfx.distill(torch.relu, e.watch(toy()), [X]),  # type: ignore[arg-type]
        InputError,
        "builtin_function_or_method",
        "lmfx.compress",
    ),
]

CASES = BUDGETS + MODELS + EXAMPLES + OPTIONS + CALIBRATION + DEVICES + EXTRAS + PLANS + FILES + TABLES


@pytest.mark.parametrize(
    ("act", "error", "seen", "do"),
    [pytest.param(*c[1:], id=c[0], marks=[NO_CUDA] if c in DEVICES else []) for c in CASES],
)
def test_says_what_was_seen_and_what_to_do_and_leaves_nothing_behind(
    act: Callable[[Env], Any],
    error: type[LmfxError],
    seen: str,
    do: str,
    ready: Ready,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    env = Env(tmp_path, ready, monkeypatch)
    with pytest.raises(LmfxError) as caught:
        act(env)
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {caught.value}"
    text = str(caught.value)
    assert seen in text, text
    assert do in text, text
    for model, before in env.models:
        assert whole_state(model) == before, "the caller's model was changed"
    found = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == env.files, "files were left or changed"


def test_there_are_at_least_45_cases() -> None:
    names = [c[0] for c in CASES]
    assert len(names) >= 45 and len(set(names)) == len(names)


@pytest.mark.parametrize("budget", ["0.0001ms", "1e-9 s", 1e-6, "1e9x"])
def test_a_budget_that_cannot_be_reached_gives_the_fastest_that_was(budget: Any) -> None:
    model = toy()
    before = whole_state(model)
    with pytest.raises(InfeasibleBudget, match="Ask for that or more") as caught:
        roofline_compress(model, X, budget, calibration=images(8))
    assert 0 < caught.value.latency < math.inf
    assert f"{caught.value.latency:.4g} ms" in str(caught.value)
    assert whole_state(model) == before


def test_a_budget_just_above_the_fastest_that_was_reported_is_reached() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        roofline_compress(toy(), X, "1e-9ms", calibration=images(8))
    net = roofline_compress(toy(), X, f"{caught.value.latency * 1.001}ms", calibration=images(8))
    assert lmfx.result_of(net).measured == pytest.approx(caught.value.latency)


@pytest.mark.filterwarnings("ignore:the row:RuntimeWarning")
def test_rows_of_no_bytes_as_a_machine_without_power_leaves_them_are_made_again(tmp_path: Path) -> None:
    roofline_compress(toy(), X, 0.7, cache_dir=tmp_path)
    with Store.open(tmp_path) as store:
        rows = store.count("latency")
        for path in store.files("latency"):
            path.write_bytes(b"")
    net = roofline_compress(toy(), X, 0.7, cache_dir=tmp_path)
    assert lmfx.result_of(net).ratio <= 0.7  # type: ignore[operator]
    with Store.open(tmp_path) as store:
        assert store.count("latency") == rows > 5


def test_a_block_alone_is_a_model_too() -> None:
    net = roofline_compress(Block(8).eval(), images(1, channels=8), 0.9)
    assert lmfx.result_of(net).ratio <= 0.9  # type: ignore[operator]
