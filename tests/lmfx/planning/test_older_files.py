"""Plans and folders that were saved before can be loaded: no class of a file asks for a field that older files lack."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lmfx
from lmfx.passes.ir import MergePlan
from lmfx.planning.saved_files import SavedNetwork

# What files of version 1 have always had. A new field has a default and metadata={"optional": True}.
ALWAYS = {
    "MergePlan": "candidates fingerprint importance latency surrogate",
    "Candidate": "all_convs conv convs kept realization span",
    "Span": "activation entry exit output series start stop",
    "ConvConfig": "dilation groups in_channels kernel_size out_channels padding padding_mode padding_value stride",
    "Cut": "channels conv of reader width",
    "SavedNetwork": "digest inputs merged model result shared",
    "Result": "backend budget candidates images inputs kept line measured merged names original plan predicted ratio "
    "refusals",
    "Budget": "kind value",
    "Refusal": "nodes reason",
    "CalibrationLine": "a b held_out kendall_tau mape plans worst",
    "Quality": "held_out images outputs",
    "OutputQuality": "agreement divergence kind kl name psnr scaled_kl",
    "Alternative": "quality ratio what",
    "ShapeTime": "measured original ratio shape weight",
    "Origin": "code lines python",
}


def classes(hint: Any, found: dict[str, type[Any]]) -> dict[str, type[Any]]:
    """The dataclasses that a value of this type may hold, by name."""
    if dataclasses.is_dataclass(hint) and hint.__name__ not in found:  # type: ignore[union-attr]
        found[hint.__name__] = typing.cast(type[Any], hint)  # type: ignore[union-attr]
        hints = typing.get_type_hints(hint)
        for f in dataclasses.fields(hint):
            if f.repr:
                classes(hints[f.name], found)
    for argument in typing.get_args(hint):
        classes(argument, found)
    return found


def test_no_class_of_a_file_asks_for_more_than_older_files_have() -> None:
    found = classes(SavedNetwork, classes(MergePlan, {}))
    assert found.keys() == ALWAYS.keys(), "a new class: write down what it asks for"
    for name, kind in found.items():
        asked = {f.name for f in dataclasses.fields(kind) if f.repr and not f.metadata.get("optional")}
        assert asked == set(ALWAYS[name].split()), name


def test_a_folder_without_the_fields_that_came_later_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(32, 3, 12, 12)
    net = lmfx.compress(model, x[:1], 0.7, calibration=x, latency="roofline")
    folder = lmfx.save(net, tmp_path / "saved")
    document = json.loads((folder / "plan.json").read_text())

    def older(value: Any) -> Any:
        if isinstance(value, list):
            return [older(v) for v in value]
        if not isinstance(value, dict):
            return value
        for kind in classes(SavedNetwork, classes(MergePlan, {})).values():
            if set(ALWAYS[kind.__name__].split()) <= value.keys():
                late = {f.name for f in dataclasses.fields(kind) if f.metadata.get("optional")}
                value = {k: v for k, v in value.items() if k not in late or (kind is SavedNetwork and k == "origin")}
        return {k: older(v) for k, v in value.items()}

    (folder / "plan.json").write_text(json.dumps(older(document)))
    assert "quality" not in older(document)["save"]["result"]
    again = lmfx.load(folder, model)
    torch.testing.assert_close(again(x), net(x))
