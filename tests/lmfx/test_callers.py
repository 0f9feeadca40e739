"""Whatever state a caller is in, public functions do the same, and leave it as it was."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.environment.caller_state import entry, is_entry, one_line
from lmfx.importance import ESTIMATORS, Reconstruction
from lmfx.latency.backend import TimedBackend
from lmfx.passes.model.quiet import quiet


def convs(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = [m for i in (3, 6, 6) for m in (nn.Conv2d(i, 6, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def compressed(model: nn.Module, x: Any, **options: Any) -> Any:
    return lmfx.compress(model, x, 0.8, latency="roofline", progress=False, **options)


X, IMAGES = torch.randn(1, 3, 11, 9), torch.randn(8, 3, 11, 9)


@contextlib.contextmanager
def dtype(kind: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "cpu device": lambda: torch.device("cpu"),
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "deterministic": deterministic,
}


def test_every_public_function_is_an_entry() -> None:
    functions = [getattr(lmfx, n) for n in lmfx.__all__ if inspect.isfunction(getattr(lmfx, n))]
    assert {f.__name__ for f in functions if not is_entry(f)} == set()
    assert is_entry(importlib.import_module("lmfx.cli.command_line")._run)
    assert not is_entry(convs)


# Accessors that compute with Python's numbers alone and are called thousands of times, and what an entry calls.
PLAIN = {"Budget.parse", "Budget.resolve", "Candidate.each", "LatencyTable.ms", "LatencyTable.kept"}
PLAIN |= {
    "Finetune.no_change",
    "Finetune.measure",
    "Finetune.jobs",
    "Reconstruction.resolved",
    "Reconstruction.session",
    "Quality.loss",
}


def test_every_method_of_a_public_class_that_does_work_is_an_entry() -> None:
    public = [v for n in lmfx.__all__ if inspect.isclass(v := getattr(lmfx, n)) and not issubclass(v, Exception)]
    methods = {
        f"{c.__name__}.{name}": getattr(value, "__func__", value)
        for c in (*public, *ESTIMATORS.values())
        for name, value in vars(c).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)))
    }
    assert {name for name, f in methods.items() if not is_entry(f)} == PLAIN
    assert all(is_entry(getattr(TimedBackend, name)) for name in ("measure", "measure_interleaved"))


@pytest.mark.parametrize("state", ["inference mode", "autocast", "meta device", "float64"])
def test_estimators_that_are_called_directly_do_the_same_in_any_state(state: str) -> None:
    spans = lmfx.spans(lmfx.trace(convs(), X))
    data = as_calibration(IMAGES, X)
    plain = Reconstruction().score(spans, list(spans), data)
    with STATES[state]():
        assert dict(Reconstruction().score(spans, list(spans), data)) == dict(plain)


def test_a_plot_into_a_folder_that_is_not_there_says_so(tmp_path: Any) -> None:
    graph = lmfx.trace(convs(), X)
    table = lmfx.profile(graph, "roofline", cache_dir=tmp_path, progress=False)
    frontier = lmfx.solve(graph, table, lmfx.score(graph, "magnitude", cache_dir=tmp_path, progress=False))
    pytest.importorskip("matplotlib")
    with pytest.raises(lmfx.LmfxError, match="nowhere"):
        frontier.plot(tmp_path / "nowhere" / "plot.png")


@pytest.mark.parametrize("state", STATES)
def test_all_stages_do_the_same_in_any_state_of_the_caller(state: str, tmp_path: Any) -> None:
    model = convs()
    plain = compressed(model, X, calibration=IMAGES, cache_dir=tmp_path / "a")
    with STATES[state]():
        net = compressed(model, X, calibration=IMAGES, cache_dir=tmp_path / "b")
        student = compressed(model, X, calibration=IMAGES, cache_dir=tmp_path / "b", merge=False)
        lmfx.distill(student, model, [IMAGES], progress=False)
        lmfx.merge(student)
        lmfx.save(net, tmp_path / "net")
        loaded = lmfx.load(tmp_path / "net", model)
        assert "merged" in str(lmfx.report(loaded))
    assert lmfx.result_of(net).plan == lmfx.result_of(plain).plan
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in (*net.parameters(), *student.parameters()))
    torch.testing.assert_close(net(IMAGES), plain(IMAGES))
    torch.testing.assert_close(loaded(IMAGES), net(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_profiles_are_those_of_full_precision_under_autocast(backend: str, tmp_path: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = lmfx.trace(convs(), X)
        table = lmfx.profile(graph, backend, cache_dir=tmp_path, progress=False, calibrate=False)
    assert {n.meta["dtype"] for n in graph.graph.nodes if n.op == "call_module"} == {torch.float32}
    assert len(table) > 0


def test_tensors_made_in_inference_mode_can_be_compressed() -> None:
    with torch.inference_mode():
        model, x, images = convs(), torch.randn(1, 3, 11, 9), torch.randn(8, 3, 11, 9)
    net = compressed(model, x, calibration=images)
    assert not any(p.is_inference() for p in net.parameters())


def settings() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        logging.root.manager.disable,
        list(warnings.filters),
    )


CHANGES: dict[str, Callable[[], Any]] = {
    "torch's random numbers": lambda: torch.rand(3),
    "numpy's random numbers": lambda: np.random.rand(3),
    "Python's random numbers": random.random,
    "a seed": lambda: (torch.manual_seed(5), np.random.seed(5), random.seed(5)),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "matmul": lambda: torch.set_float32_matmul_precision("medium"),
    "filters of warnings": lambda: warnings.simplefilter("ignore"),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_public_function_changes_is_put_back(change: str, fails: bool) -> None:
    @entry
    def stage() -> None:
        CHANGES[change]()
        if fails:
            raise lmfx.OptionError("no")

    def state() -> tuple[Any, ...]:
        return (*settings(), np.random.get_state()[1].tolist())

    before = state()
    with contextlib.suppress(lmfx.OptionError):
        stage()
    assert state() == before


def test_random_numbers_and_settings_are_as_they_were(tmp_path: Any) -> None:
    before = settings()
    compressed(convs_kept := convs_of(before), X, calibration=IMAGES, cache_dir=tmp_path)
    assert settings() == before
    with pytest.raises(lmfx.LmfxError):
        compressed(convs_kept, torch.randn_like(X, dtype=torch.float64))
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    assert settings() == before


def convs_of(before: tuple[Any, ...]) -> nn.Module:
    model = convs()
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    return model


def test_what_an_entry_changes_is_put_back_after_an_exception_too() -> None:
    @entry
    def careless(fail: bool) -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        warnings.simplefilter("ignore")
        if fail:
            raise lmfx.InputError("seen")

    before = settings()
    careless(False)
    assert settings() == before
    with pytest.raises(lmfx.InputError):
        careless(True)
    assert settings() == before


def side_by_side(*actions: Callable[[], Any]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(action: Callable[[], Any]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(a,)) for a in actions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return errors


def test_two_threads_compress_side_by_side_and_leave_everything_as_it_was(tmp_path: Any) -> None:
    models = [convs(i) for i in range(2)]
    before = settings()
    nets: dict[int, Any] = {}

    def run(i: int) -> None:
        nets[i] = compressed(models[i], X, calibration=IMAGES, cache_dir=tmp_path / str(i))

    assert side_by_side(*(lambda i=i: run(i) for i in range(2))) == []  # type: ignore[misc]
    assert settings() == before
    for i, model in enumerate(models):
        alone = compressed(model, X, calibration=IMAGES, cache_dir=tmp_path / f"alone {i}")
        torch.testing.assert_close(nets[i](IMAGES), alone(IMAGES))


def test_silence_is_of_one_thread_and_ends_in_any_order(caplog: pytest.LogCaptureFixture) -> None:
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    filters = list(warnings.filters)

    def first() -> None:
        with quiet():
            first_in.set()
            assert second_in.wait(10)
            logging.getLogger("some").error("unheard")
            warnings.warn("unheard", stacklevel=1)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with quiet():
            second_in.set()
            assert first_out.wait(10)

    def third() -> None:
        assert second_in.wait(10)
        logging.getLogger("some").error("heard")

    assert side_by_side(first, second, third) == []
    assert [r.message for r in caplog.records] == ["heard"]
    assert list(warnings.filters) == filters
    logging.getLogger("some").error("and after")
    assert caplog.records[-1].message == "and after"
    with pytest.warns(UserWarning, match="loud"):
        warnings.warn("loud", stacklevel=1)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_of_a_library_becomes_one_of_lmfx_without_colours() -> None:
    with pytest.raises(lmfx.LmfxError, match=r"softmax stopped.*IndexError.*Dimension") as seen:
        entry(F.softmax)(torch.zeros(2), dim=9)
    assert isinstance(seen.value.__cause__, IndexError)
    assert one_line(RuntimeError("\n\x1b[96mred\x1b[0m\nmore")) == "red"


def test_an_error_of_a_library_that_a_module_of_lmfx_called_is_no_error_of_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = lmfx.trace(convs(), X)
    table = lmfx.profile(graph, "roofline", progress=False)
    monkeypatch.setattr("lmfx.planning.frontier.solve_chains", math.sqrt)
    with pytest.raises(lmfx.LmfxError, match=r"solve stopped.*TypeError"):
        lmfx.solve(graph, table, lmfx.score(graph, "magnitude", progress=False))


def test_what_the_callers_own_code_raises_is_passed_on() -> None:
    def batches() -> Iterator[Tensor]:
        yield IMAGES
        raise ZeroDivisionError("the caller's")

    with pytest.raises(ZeroDivisionError, match="the caller's"):
        compressed(convs(), X, calibration=batches())
    with pytest.raises(TypeError, match="example_input"):
        lmfx.trace(convs())  # type: ignore[call-arg]


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.flatten(2))


def test_an_op_that_onnx_does_not_have_is_named_with_its_module(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convs()[:3]
            self.head = nn.ModuleDict({"spectrum": Spectrum()})

        def forward(self, x: Tensor) -> Tensor:
            return self.head["spectrum"](self.body(x))

    place = r"_linalg_svd.*, which head.spectrum\b.* computes .*latency='torch'"
    with pytest.raises(lmfx.ExportError, match=place) as seen:
        lmfx.compress(Net().eval(), X, 0.8, importance="magnitude", progress=False)
    assert "\x1b" not in str(seen.value)
    with pytest.raises(lmfx.ExportError, match=place):
        lmfx.export_onnx(Net().eval(), X, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


# --- models -----------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Three convs, and a last step that the test gives."""

    def __init__(self, last: Callable[[nn.Module, Tensor], Any], seed: int = 0) -> None:
        super().__init__()
        self.body, self.last = convs(seed)[:5], last
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Any:
        return self.last(self, self.body(x))


def test_an_autocast_region_is_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convs()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y: Tensor = self.body(x)
            return y.float()

    net = compressed(Net().eval(), X, calibration=IMAGES)
    assert {n.meta.get("dtype") for n in lmfx.trace(Net().eval(), X).graph.nodes} - {None} == {torch.float32}
    assert net(IMAGES).dtype == torch.float32
    torch.testing.assert_close(lmfx.trace(Net().eval(), X)(IMAGES), convs()(IMAGES))


def test_a_forward_that_draws_random_numbers_is_refused_by_the_op() -> None:
    with pytest.raises(lmfx.ModelError, match=r"different outputs.*dropout.*self\.training"):
        lmfx.trace(Head(lambda _, y: F.dropout(y, 0.2)).eval(), X)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(lmfx.ModelError, match=r"different outputs.*randn"):
        lmfx.trace(Head(lambda _, y: y + torch.randn(1, generator=GENERATOR)).eval(), X)
    with pytest.raises(lmfx.ModelError, match=r"different outputs.*numpy"):
        lmfx.trace(Head(lambda _, y: y * float(np.random.rand())).eval(), X)
    assert generator.initial_seed() == 0
    lmfx.trace(Head(lambda m, y: F.dropout(y, 0.2, m.training)).eval(), X)


GENERATOR = torch.Generator().manual_seed(0)


def test_modules_that_never_ran_or_are_quantized_are_refused_by_name() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConv2d(4, 3)).eval()
    with pytest.raises(lmfx.ModelError, match=r"0\.weight of a LazyConv2d has no values yet: run the model once"):
        lmfx.trace(lazy, X)
    lazy(X)
    lmfx.trace(lazy, X)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_head_is_refused_by_name() -> None:
    model = torch.ao.quantization.quantize_dynamic(convs(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(lmfx.ModelError, match=r"8 is quantized \(Linear\): compress the floating-point"):
        lmfx.trace(model.eval(), X)


def test_images_in_bytes_are_timed_by_onnx_runtime(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convs()

        def forward(self, image: Tensor) -> Any:
            return self.body(image.float() / 255)

    image = torch.randint(0, 256, (1, 3, 11, 9), dtype=torch.uint8)
    graph = lmfx.trace(Net().eval(), image)
    table = lmfx.profile(graph, "onnxruntime", cache_dir=tmp_path, progress=False)
    assert table.calibration is not None


OUTPUTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "a scale beside the rows": lambda m, y: (y.mean((2, 3)), m.scale.exp()),
    "constant anchors": lambda m, y: {"y": y.flatten(2), "anchors": torch.arange(12.0).reshape(4, 3)},
    "time first": lambda m, y: y.mean(2).permute(2, 0, 1).log_softmax(-1),
    "flattened over the batch": lambda m, y: y.permute(0, 2, 3, 1).reshape(-1, 6),
    "a list": lambda m, y: [y.mean((2, 3)), y.amax((2, 3))],
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("exact", [True, False])
def test_outputs_that_are_no_row_an_image_are_scored(kind: str, exact: bool) -> None:
    images = torch.randn(4 * 5, 3, 11, 9)
    graph = lmfx.trace(Head(OUTPUTS[kind]).eval(), X)
    scores = lmfx.score(graph, calibration=images, exact=exact, images=3, progress=False)
    assert any(v < 0 for v in scores.rows.values())


def test_a_constant_output_changes_no_importance() -> None:
    alone = lmfx.trace(Head(lambda m, y: y.mean((2, 3))).eval(), X)
    beside = lmfx.trace(Head(OUTPUTS["a scale beside the rows"]).eval(), X)
    a, b = (lmfx.score(g, calibration=IMAGES, exact=True, progress=False).rows for g in (alone, beside))
    assert sorted(a.values()) == pytest.approx(sorted(b.values()))


def test_outputs_that_all_ignore_the_batch_are_refused() -> None:
    graph = lmfx.trace(Head(lambda m, y: y.mean()).eval(), X)
    with pytest.raises(lmfx.ModelError, match="has no batch dimension"):
        lmfx.score(graph, calibration=IMAGES, progress=False)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_the_one_entry_of_a_dict_that_fits_is_the_image() -> None:
    loader = [{"image": IMAGES, "label": torch.zeros(8)}, {"image": IMAGES[:3], "label": torch.zeros(3)}]
    net = compressed(convs(), X, calibration=loader)
    assert lmfx.result_of(net).images == 11
    student = compressed(convs(), X, calibration=loader, merge=False)
    seen: list[int] = []

    def loss(output: Tensor, label: Tensor) -> Tensor:
        seen.append(len(label))
        return output.square().mean()

    lmfx.distill(student, convs(), loader, loss=loss, norms="frozen", progress=False)
    assert seen == [8, 3]


def test_a_dict_in_which_two_entries_fit_or_none_is_refused_with_what_to_write() -> None:
    with pytest.raises(lmfx.InputError, match=r"more than one \('image', 'mask'\).*batch\['image'\] for batch in"):
        compressed(convs(), X, calibration=[{"image": IMAGES, "mask": IMAGES}])
    with pytest.raises(lmfx.InputError, match="none of them fits"):
        compressed(convs(), X, calibration=[{"label": torch.zeros(8)}])
    student = compressed(convs(), X, merge=False)
    with pytest.raises(lmfx.InputError, match="2 of them fit"):
        lmfx.distill(student, convs(), [{"image": IMAGES, "mask": IMAGES}], progress=False)


class OfDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convs()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.body(batch["image"])}


@pytest.mark.parametrize("batch", [({"image": IMAGES},), {"image": IMAGES}, {"image": IMAGES, "label": 1}])
def test_a_model_of_one_dict_takes_batches_with_and_without_the_tuple(batch: Any) -> None:
    model = OfDict().eval()
    student = compressed(model, ({"image": X},), calibration=[batch], merge=False)
    assert lmfx.result_of(student).images == 8
    lmfx.distill(student, model, [batch], progress=False)


def test_a_batch_of_names_of_files_is_refused() -> None:
    student = compressed(convs(), X, merge=False)
    with pytest.raises(lmfx.InputError, match="a batch holds a str"):
        lmfx.distill(student, convs(), [("a.png",)], progress=False)
