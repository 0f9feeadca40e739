"""compress measures what it returns, on images that nothing else saw, and says so."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from benchmarks.shared.random_plans import randomise_norms
from lmfx.planning.keeping import parse_keep
from lmfx.quality.measures import Quality, measure_output
from lmfx.quality.outputs import Output


def network() -> nn.Module:
    """A small classifier: the second and third ReLU hardly do anything, so that merging over them loses little."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 8, 8, 8, 8):
        layers += [nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    body = randomise_norms(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())).eval()
    head = nn.Linear(8, 5)
    for place in (4, 7):
        norm = body[place]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.constant_(norm.bias, 3.0)
    with torch.no_grad():  # logits that differ from image to image
        features = body(IMAGES)
        head.weight /= features.std(0).clamp_min(1e-2 * features.std(0).max())
        head.bias -= head(features).mean(0)
    return nn.Sequential(*body, head).eval()


IMAGES = torch.randn(64, 3, 12, 10, generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.cat([IMAGES[3::8], IMAGES[7::8]])
MODEL = network()


def compress(*args: Any, **options: Any) -> Any:
    options = {"calibration": IMAGES, "latency": "roofline", "progress": False, **options}
    return lmfx.compress(MODEL, IMAGES[:1], *args, **options)


def agreement(net: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == MODEL(images).argmax(1)).double().mean())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compress(0.6, cache_dir=tmp_path_factory.mktemp("cache"))


def test_the_quality_is_that_of_the_images_that_nothing_else_saw(half: Any) -> None:
    quality = lmfx.result_of(half).quality
    assert quality is not None and quality.held_out and quality.images == 8
    assert quality.agreement == pytest.approx(agreement(half, IMAGES[7::8]))


def test_the_report_and_the_saved_network_have_it(half: Any, tmp_path: Path) -> None:
    quality = lmfx.result_of(half).quality
    assert f"{quality.agreement:.1%}" in lmfx.report(half)
    assert "8 images that no fit saw" in lmfx.report(half)
    lmfx.save(half, tmp_path / "net")
    assert lmfx.result_of(lmfx.load(tmp_path / "net", MODEL)).quality == quality


def test_few_images_judge_though_the_fits_saw_them() -> None:
    quality = lmfx.result_of(compress(0.8, calibration=None)).quality
    assert quality is not None and not quality.held_out
    assert quality.images == 1


def test_a_network_that_is_unchanged_keeps_everything() -> None:
    quality = lmfx.result_of(compress(1.0)).quality
    assert quality is not None and quality.agreement == 1.0


def test_a_collapsed_network_is_said_loudly(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = compress(0.35, realize=("compose",), surrogate="identity", cache_dir=tmp_path)
    assert lmfx.result_of(net).quality.collapsed
    (warning,) = [w for w in caught if w.category is lmfx.QualityWarning]
    line = Path(__file__).read_text().splitlines()[warning.lineno - 1]
    assert "lmfx.compress(MODEL" in line
    assert "no longer does what the original did" in str(warning.message)
    assert Path(warning.filename).name == Path(__file__).name
    assert "COLLAPSED" in lmfx.report(net)


def test_keep_gives_a_faster_network_that_keeps_so_much() -> None:
    net = compress(keep=0.8)
    result = lmfx.result_of(net)
    assert result.budget is None and result.keep == 0.8
    assert result.predicted is not None and result.original is not None and result.predicted < result.original
    assert agreement(net, HELD_OUT) >= 0.8
    stricter = lmfx.result_of(compress(keep=0.999))
    assert stricter.predicted >= result.predicted
    assert "to keep 0.8" in lmfx.report(net)


def test_what_is_kept_is_kept_though_a_refit_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def turned(student: Any, *others: Any) -> Any:
        """A refit that says the same of each image."""
        found = copy.deepcopy(student)
        for parameter in found.parameters():
            parameter.data.zero_()
        asked.append(found)
        return found

    monkeypatch.setattr("lmfx.planning.compression.refit_layers", turned)
    net = compress(keep=0.8)
    assert len(asked) == 1 and agreement(asked[0], HELD_OUT) < 0.7 and agreement(net, HELD_OUT) >= 0.8


def test_a_budget_that_keeps_too_little_is_an_error_that_says_what_would_be_kept() -> None:
    with pytest.raises(lmfx.QualityError, match=r"keeps \d.*% of what the original does, and keep=0.999"):
        compress(0.35, keep=0.999, realize=("compose",), surrogate="identity")


@pytest.mark.parametrize("bad", [0, 1.5, "no", "-3%", True, None])
def test_what_is_no_share_is_refused(bad: Any) -> None:
    with pytest.raises(lmfx.OptionError, match="keep="):
        parse_keep(bad)


def test_a_share_is_written_as_a_number_or_in_percent() -> None:
    assert parse_keep("98%") == parse_keep(0.98) == parse_keep("0.98") == 0.98


def test_neither_budget_nor_share_is_an_error() -> None:
    with pytest.raises(lmfx.BudgetError, match="keep=0.98"):
        compress()


def test_keep_needs_images_to_measure_on() -> None:
    with pytest.raises(lmfx.OptionError, match="at least 16 calibration images"):
        compress(keep=0.9, calibration=IMAGES[:8])


def test_an_unknown_quality_is_refused() -> None:
    with pytest.raises(lmfx.OptionError, match="quality='best'"):
        compress(0.5, quality="best")


def test_the_same_call_gives_the_same_plan(half: Any, tmp_path: Path) -> None:
    again = compress(0.6, cache_dir=tmp_path)
    assert lmfx.result_of(again).plan == lmfx.result_of(half).plan


def test_the_chosen_plan_is_no_worse_than_that_of_the_importances(half: Any, tmp_path: Path) -> None:
    plain = compress(0.6, quality=None, cache_dir=tmp_path)
    graph = lmfx.trace(MODEL, IMAGES[:1])
    choosing = IMAGES[3::8]
    assert lmfx.compare(half, graph, choosing).loss() <= lmfx.compare(plain, graph, choosing).loss() + 1e-6


def test_recover_trains_for_a_time_and_gives_nothing_worse(half: Any, tmp_path: Path) -> None:
    net = compress(0.6, recover="3s", cache_dir=tmp_path)
    before, after = lmfx.result_of(half), lmfx.result_of(net)
    assert after.plan == before.plan and after.quality is not None
    graph, choosing = lmfx.trace(MODEL, IMAGES[:1]), IMAGES[3::8]
    assert lmfx.compare(net, graph, choosing).loss() <= lmfx.compare(half, graph, choosing).loss() + 1e-6


def test_what_recover_makes_of_the_student_is_what_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recover(student: Any, graph: Any, images: Any, *, minutes: Any, progress: bool) -> None:
        asked.append((len(images), minutes))
        for parameter in student.parameters():
            parameter.data.zero_()

    monkeypatch.setattr("lmfx.planning.compression.recover_student", recover)
    net = compress(0.6, recover="3s")
    assert asked == [(64, "3s")] and not bool(net(IMAGES).any())


def test_a_plan_that_loses_nothing_is_neither_refitted_nor_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr("lmfx.planning.compression.recover_student", never)
    monkeypatch.setattr("lmfx.planning.compression.refit_layers", never)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1), nn.ReLU(), nn.Conv2d(3, 8, 3)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    options: dict[str, Any] = {"calibration": IMAGES, "latency": "roofline", "progress": False}
    net = lmfx.compress(model, IMAGES[:1], 0.95, recover="3s", **options)
    assert [c.exact for c in lmfx.result_of(net).plan.candidates] == [True]


@pytest.mark.parametrize("bad", ["soon", -1, 0])
def test_a_time_that_is_none_is_refused_at_once(bad: Any) -> None:
    with pytest.raises(lmfx.OptionError, match="minutes"):
        compress(0.6, recover=bad)


def test_refit_mends_what_composed_convs_lose(tmp_path: Path) -> None:
    nets = [compress(0.6, realize=("compose",), refit=refit, cache_dir=tmp_path) for refit in (True, False)]
    graph, choosing = lmfx.trace(MODEL, IMAGES[:1]), IMAGES[3::8]
    assert lmfx.result_of(nets[0]).plan == lmfx.result_of(nets[1]).plan
    mended, plain = (lmfx.compare(net, graph, choosing).loss() for net in nets)
    assert mended < 0.1 * plain


@pytest.mark.parametrize(
    ("agreement", "images", "share"), [(1.0, 64, 1.0), (63 / 64, 64, 0.9688), (505 / 512, 512, 0.9811), (0.5, 4, 0.25)]
)
def test_an_agreement_is_kept_with_its_standard_error_to_spare(agreement: float, images: int, share: float) -> None:
    y = torch.eye(4, dtype=torch.float64).repeat(images // 4, 1)
    z = y.clone()
    wrong = round((1 - agreement) * images)
    z[:wrong] = z[:wrong].roll(1, 1)
    output = measure_output(Output("y", 0, "scores"), y, z)
    assert output.agreement == agreement
    assert Quality((output,), images).surely_kept == pytest.approx(share, abs=1e-4)
    assert Quality((replace(output, agreement=None),), images).surely_kept == max(0.0, 1 - output.divergence)
