"""Random classifiers that tell images apart."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.real.untrained import DEVIATION, settle


def network() -> nn.Module:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).double()


def test_a_settled_network_has_logits_that_differ_from_image_to_image() -> None:
    images = torch.randn(32, 3, 12, 12, dtype=torch.float64)
    model = settle(network(), images)
    with torch.no_grad():
        logits = model(images)
    assert torch.allclose(logits.mean(0), torch.zeros(10, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(logits.std(0), torch.full((10,), DEVIATION, dtype=torch.float64))
    assert logits.argmax(1).unique().numel() > 3


def test_its_norms_have_the_statistics_of_the_images_and_stay_in_eval_mode() -> None:
    images = torch.randn(32, 3, 12, 12, dtype=torch.float64)
    model = settle(network(), images)
    seen = model[0](images).transpose(0, 1).flatten(1)  # type: ignore[index]
    norm = model[1]  # type: ignore[index]
    assert not any(m.training for m in model.modules())
    assert torch.allclose(norm.running_mean, seen.mean(1)) and torch.allclose(norm.running_var, seen.var(1))
