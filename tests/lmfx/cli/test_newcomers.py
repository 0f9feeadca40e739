"""What a newcomer types wrong, and what is said: each message names what was seen and what was probably meant."""

from __future__ import annotations

import argparse
import io
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lmfx.budget import Budget
from lmfx.cli import main
from lmfx.cli.models import load
from lmfx.cli.next_steps import default_output, say_next
from lmfx.passes.errors import ModelError

NET = """
from torch import nn

def factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )
"""
COMPRESS = ("compress", "newcomers_net:factory")
ENOUGH = (*COMPRESS, "--budget", "0.6")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "newcomers_net.py").write_text(NET)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("newcomers_net", None)


@pytest.fixture
def photos(folder: Path) -> Path:
    """24 pictures of two classes, one of them damaged, in the sizes and colours that cameras and scanners have."""
    random = np.random.default_rng(0)
    for i in range(24):
        shape = ((20, 30, 3), (33, 18), (16, 16, 4))[i % 3]
        path = folder / "photos" / ("cats", "dogs")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    (folder / "photos" / "dogs" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    return folder / "photos"


def told(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> str:
    """What is said of a command that must fail with exit code 2 and print nothing else."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(str(stop.code))
    seen = capsys.readouterr()
    assert code == 2
    assert seen.out == ""
    assert "Traceback" not in seen.err
    return seen.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "lmfx compress torchvision:resnet18 --images FOLDER --budget 0.6"),
        (("compres",), "did you mean compress?"),
        (("resnet18",), "A command comes first: lmfx compress resnet18"),
        (("cache", "lst"), "did you mean list?"),
        (
            (*COMPRESS, "--bugdet", "0.6"),
            "compress: error: unrecognized arguments: --bugdet 0.6: did you mean --budget?",
        ),
        ((*ENOUGH, "--imagse", "photos"), "did you mean --images?"),
        (("doctor", "--jsn"), "lmfx doctor: error: unrecognized arguments: --jsn: did you mean --json?"),
        (("cache", "list", "--jsn"), "lmfx cache list: error: unrecognized arguments: --jsn: did you mean --json?"),
        ((*COMPRESS, "0.6"), "did you mean --budget 0.6?"),
        ((*ENOUGH, "empty"), "did you mean --images empty?"),
        ((*ENOUGH, "what"), "unrecognized arguments: what\n"),
        (COMPRESS, "compress needs --budget, how fast, or --keep"),
        ((*ENOUGH, "--backend", "ort"), "did you mean onnxruntime?"),
        ((*ENOUGH, "--backend", "trt"), "did you mean tensorrt?"),
        ((*ENOUGH, "--images", "a", "--calibration", "b"), "not allowed with argument --images"),
        ((*ENOUGH, "--mean", "grey"), "'grey' are no numbers; write 0.485,0.456,0.406"),
        ((*ENOUGH, "--max-images", "few"), "'few' is no number of pictures; write 256"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_word_is_told_by_the_command_it_was_given_to(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in told(capsys, argv)


def test_a_long_usage_does_not_stand_before_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = told(capsys, (*ENOUGH, "--bugdet", "0.6")).splitlines()
    assert first == "usage: lmfx compress MODEL [options]     (all of them: lmfx compress --help)"
    assert len(rest) == 1 and "did you mean --budget?" in rest[0]
    assert "[--json]" in told(capsys, ("doctor", "--jsn"))  # a short one is shown


@pytest.mark.parametrize(
    ("shape", "meant"), [("224", None), ("96,80", "1,3,96,80"), ("3,96,80", "1,3,96,80"), ("5,96,80", None)]
)
def test_a_shape_that_is_none_of_pictures_is_told_with_what_was_meant(
    shape: str, meant: str | None, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(capsys, (*ENOUGH, "--images", str(photos), "--shape", shape))
    assert (f"did you mean --shape {meant}? If not, give --calibration" in said) == (meant is not None)
    assert "did you mean" not in said or meant is not None


def test_a_value_that_is_like_no_other_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, (*ENOUGH, "--backend", "abacus"))
    assert "tensorrt" in said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("60", 'Did you mean "60%", "60ms" or "60x"?'),
        ("0.6x", "Did you mean 0.6 (a fraction)"),
        ("0,6", "Did you mean 0.6?"),
        ("4,5ms", "Did you mean 4.5ms?"),
        ("half", "'half' is not understood. Write 0.6"),
        ("-0.6", "is not positive"),
        ("0", "is not positive"),
        ("120%", "at most 100%"),
        ("5 fps", "unknown unit 'fps'"),
    ],
)
def test_a_wrong_budget_is_told_before_anything_is_read(
    budget: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(capsys, ("compress", "no_such_module:net", "--budget", budget, "--images", "nowhere"))
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "did you mean torchvision:resnet18 or timm:resnet18?"),
        ("torchvision.resnet18", "did you mean torchvision:resnet18?"),
        ("torchvision.models.resnet18", "did you mean torchvision:resnet18?"),
        ("timm/resnet18", "did you mean timm:resnet18?"),
        ("Torchvision::ResNet18", "did you mean torchvision:resnet18?"),
        ("model.pth", "a file of weights does not say which network it is of: name the network"),
        ("newcomers_net.py", "did you mean newcomers_net:NAME"),
        ("newcomers_net", "did you mean newcomers_net:NAME, with the name of a function in newcomers_net.py"),
        ("newcomers_net.py:factory", "is a file; write its module, newcomers_net:factory"),
        ("./sub/net.py:factory", "write its module, sub.net:factory"),
        ("newcomer_net:factory", "did you mean newcomers_net:factory?"),
        ("newcomers_net:factroy", "did you mean factory?"),
    ],
)
def test_a_model_that_is_named_wrongly_gets_the_name_that_was_meant(
    spec: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in told(capsys, ("compress", spec, "--budget", "0.6", "--quiet"))


@pytest.mark.parametrize("name", ["ResNet18", "resnet-18", "resnet_18"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_model_of_a_library_is_found_in_spite_of_case_and_dashes(library: str, name: str) -> None:
    with pytest.raises(ModelError, match="did you mean .*resnet18"):
        load(f"{library}:{name}", "random")


def test_a_model_like_no_other_gets_examples_of_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"no model 'qqqqqqqqq': it has alexnet, .*, \.\.\."):
        load("torchvision:qqqqqqqqq", "random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere"), "--images nowhere: there is no such folder"),
        (("--images", "empty"), "--images empty: no pictures there (it is empty)"),
        (("--images", "newcomers_net.py"), "is a file: give the folder that it lies in"),
        (("--calibration", "empty"), "--calibration empty is a folder: pictures are read with --images empty"),
        (("--max-images", "9"), "--max-images is about the pictures of --images FOLDER: name the folder"),
        (("--weights", "net.pth"), "reads safetensors only"),
        (("--weights", "net.safetensors"), "there is no such file; give one, or one of auto, pretrained, random"),
        (("--recover", "3 minutes"), "use minutes, or a text like '3min'"),
        (("-o", "newcomers_net.py"), "is a file; give a folder"),
        (("-o", "newcomers_net.py/below"), "cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_there_is_told_before_the_work_is_done(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compress was called")

    monkeypatch.setattr("lmfx.cli.commands.compress", refuse)
    assert message in told(capsys, (*ENOUGH, "--quiet", *options))


def test_pictures_and_an_example_of_several_inputs_do_not_go_together(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("x.npy", np.zeros((1, 3, 8, 8), np.float32))
    said = told(capsys, (*ENOUGH, "--quiet", "--images", str(photos), "--example", "x.npy"))
    assert "with --example give --calibration" in said


def test_clips_are_not_pictures(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("compress", "torchvision:r3d_18", "--budget", "0.6", "--weights", "random", "--images", str(photos), "-q")
    assert "is shown clips, not pictures" in told(capsys, argv)


# --- what works -------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_all_that_compress_needs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*ENOUGH, "--images", "photos", "--shape", "1,3,16,16", "--backend", "roofline")
    assert main(argv) == 0
    seen = capsys.readouterr()
    lines = seen.out.splitlines()
    assert "1 of 25 pictures in photos cannot be read (dogs/broken.jpg" in seen.err
    said = next(line for line in lines if line.startswith("calibrated on "))
    assert said.startswith("calibrated on 24 pictures of photos, assumed, since newcomers_net:factory does not say")
    made = Path("out/factory-0.6")
    assert f"wrote {made / 'plan.json'} and {made / 'model.safetensors'}" in lines
    assert sorted(p.name for p in made.iterdir()) == ["model.safetensors", "plan.json", "report.html"]
    after = lines[lines.index(f"wrote {made / 'report.html'}") + 1 :]
    assert after[0].startswith(f"next: lmfx export {made} newcomers_net:factory ")
    assert f"lmfx recover {made} newcomers_net:factory --images photos --minutes 3" in after[1]
    assert after[-1].split("  # ")[0].split() == [str(made / "report.html")]
    for step in (
        "making newcomers_net:factory ...",
        "tracing the network ...",
        "latencies of ",
        "judging the result ...",
    ):
        assert step in seen.err


def test_the_next_commands_that_are_printed_work(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*ENOUGH, "--images", "photos", "--shape", "1,3,16,16", "--backend", "roofline", "--quiet")
    assert main(argv) == 0
    lines = [line[6:].split("  # ")[0].split() for line in capsys.readouterr().out.splitlines() if "  # " in line]
    export, recover = lines[0], lines[1]
    assert main(export[1:]) == 0
    recover[recover.index("--minutes") + 1] = "1s"
    assert main([*recover[1:], "--quiet"]) == 0
    assert Path("out/factory-0.6-recovered/plan.json").exists()


def test_a_warning_is_a_line_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warns(args: Any) -> None:
        warnings.warn("of something", UserWarning, stacklevel=1)

    monkeypatch.setattr("lmfx.cli.command_line.doctor_command", warns)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "lmfx doctor: warning: of something\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("spec", "budget", "keep", "expected"),
    [
        ("timm:resnet18.a1_in1k", "60%", None, "out/resnet18.a1_in1k-0.6"),
        ("a.b:c.d", "4.5ms", None, "out/c.d-4.5ms"),
        ("a:make", None, 0.98, "out/make-keep0.98"),
    ],
)
def test_the_folder_says_what_is_in_it(spec: str, budget: str | None, keep: float | None, expected: str) -> None:
    assert default_output(spec, None if budget is None else Budget.parse(budget), keep) == expected


def printed_next(capsys: pytest.CaptureFixture[str], exported: bool = False, **given: Any) -> list[str]:
    args = argparse.Namespace(**{"command": "compress", "recover": None, "images": "photos", "weights": "auto"} | given)
    say_next(args, Path("out/x"), "timm:resnet18", exported)
    return [line[6:].split("  #")[0].rstrip() for line in capsys.readouterr().out.splitlines()]


def test_the_next_commands_are_those_that_are_still_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    export, recover = "lmfx export out/x", "lmfx recover out/x --images photos --minutes 3 -o out/x-recovered"
    python = 'net = lmfx.load("out/x", model)'
    assert printed_next(capsys) == [export, recover, python]
    assert printed_next(capsys, exported=True) == [recover, python]
    assert printed_next(capsys, recover="3min") == [export, python]
    assert printed_next(capsys, command="simplify") == [export, python]
    assert "--images photos --weights w.safetensors --minutes" in printed_next(capsys, weights="w.safetensors")[1]
    assert "--calibration YOUR_IMAGES.npy" in printed_next(capsys, images=None, calibration=None)[1]


# --- weights ----------------------------------------------------------------------------------------------------------


def _no_network(*args: Any, **kwargs: Any) -> None:
    raise OSError("Name or service not known")


def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _no_network)
    monkeypatch.setattr("urllib.request.urlopen", _no_network)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_that_cannot_be_had_are_random_and_that_is_said(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _without_network(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    loaded = load(f"{library}:resnet18", "auto")
    assert loaded.random
    assert loaded.missing
    with pytest.raises(ModelError, match=r"pretrained weights .* cannot be had .*--weights random"):
        load(f"{library}:resnet18", "pretrained")


def test_the_commands_say_that_weights_are_random(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _without_network(monkeypatch)
    assert main(["simplify", "torchvision:squeezenet1_1", "--shape", "1,3,64,64", "-o", "out"]) == 0
    err = capsys.readouterr().err
    assert (
        "the pretrained weights of torchvision:squeezenet1_1 cannot be had (OSError: Name or service not known)" in err
    )
    assert "latencies hold, outputs mean nothing" in err


@pytest.mark.parametrize("reached", [True, False])
def test_without_a_network_the_client_of_timm_looks_into_its_cache_alone(
    reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    seen = []

    def create(name: str, pretrained: bool) -> nn.Module:
        if pretrained:
            seen.append((constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()))
            raise OSError("not in the cache")
        return nn.Identity()

    _without_network(monkeypatch)
    if reached:
        monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("timm.create_model", create)
    before = socket.getdefaulttimeout()
    assert load("timm:resnet18", "auto").missing == "OSError: not in the cache"
    assert seen == [(not reached, 10)]
    assert (constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()) == (False, before)


def test_random_weights_are_random_to_the_backbone_and_fetch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert load("torchvision:lraspp_mobilenet_v3_large", "random").random


def test_published_weights_are_loaded_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    published = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published)
    loaded = load("torchvision:resnet18", "auto")
    assert loaded.weights == "ResNet18_Weights.IMAGENET1K_V1 of torchvision"
    assert not loaded.random
    assert all(torch.equal(t, published[n]) for n, t in loaded.model.state_dict().items())


def test_a_model_of_timm_without_published_weights_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    name = next(n for n in ("resnet10t", *timm.list_models("resnet*")) if not timm.models.is_model_pretrained(n))
    assert load(f"timm:{name}", "auto").missing == "timm has none for it"


def test_what_only_needs_latencies_asks_for_no_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert main(["spans", "torchvision:squeezenet1_1", "--shape", "1,3,64,64", "--realize", "compose", "--json"]) == 0


def test_a_model_is_shown_its_own_size_unless_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, ...]] = []

    def trace(model: nn.Module, x: torch.Tensor) -> None:
        seen.append(tuple(x.shape))
        raise ModelError("enough")

    monkeypatch.setattr("lmfx.cli.commands.trace", trace)
    for options in ((), ("--shape", "1,3,96,96")):
        told(capsys, ("spans", "torchvision:efficientnet_b1", *options))
    told(capsys, ("spans", "newcomers_net:factory"))
    assert seen == [(1, 3, 240, 240), (1, 3, 96, 96), (1, 3, 224, 224)]
