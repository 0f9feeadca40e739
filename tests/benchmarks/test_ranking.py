"""The benchmarks of importance: what is compared with what, and on which network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmfx
from benchmarks.paper import importance
from benchmarks.shared import short_training
from benchmarks.shared.short_training import ShortTraining
from benchmarks.shared.small_networks import SmallMobileNetV2, classifier
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


def test_agreement_is_that_with_both_trainings() -> None:
    papers = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 4.0, 3.0])
    rows = {importance.PAPER: papers[0], importance.AGAIN: papers[1], "same": papers[0], "other": -papers[0]}
    found = importance.agreement(rows)
    assert list(found) == [importance.AGAIN, "same", "other"]
    assert found[importance.AGAIN] == pytest.approx((4 / 6, -1.0))  # one of six pairs is turned round
    assert found["same"] == pytest.approx(((1 + 4 / 6) / 2, 0.0))
    assert found["other"] == pytest.approx((-(1 + 4 / 6) / 2, 0.0))


def test_where_tells_which_kind_is_ranked_too_high() -> None:
    graph = lmfx.trace(SmallMobileNetV2(4).eval(), torch.randn(1, 3, 16, 16))
    chosen = [c for c in lmfx.spans(graph) if c.realization in ("fit", "drop")][:40]
    drops = np.array([c.realization == "drop" for c in chosen])
    assert 0 < drops.sum() < len(chosen)
    # For finetune all drops are the worst, for reconstruction the best.
    paper = np.where(drops, -10.0, 0.0) + np.arange(len(chosen)) / 100
    rows = {importance.PAPER: paper, importance.AGAIN: paper, "reconstruction, exact": np.where(drops, 10.0, 0.0)}
    by_kind = importance.where(chosen, rows)["realization"]
    share = float(drops.mean())
    assert by_kind["drop"] == (pytest.approx(1 - share), int(drops.sum()))
    assert by_kind["fit"][0] == pytest.approx(-share)


def test_a_network_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import digits

    few = digits.Digits(*(v[:200] for v in vars(digits.load(0)).values()))
    monkeypatch.setattr(digits, "load", lambda seed: few)
    short_training.data_of.cache_clear()
    task = ShortTraining("digits", steps=1, batch=8, network="mobilenet")
    first = task.model(4, 1, str(tmp_path))
    monkeypatch.setattr(digits, "train", None)
    again: Any = task.model(4, 1, str(tmp_path))
    assert isinstance(again, SmallMobileNetV2) and not again.training
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "mobilenet" in task.key and task.key != ShortTraining("digits", steps=1, batch=8).key
    assert task.loss(again) > 0 and 0 <= task.accuracy(again) <= 1
    short_training.data_of.cache_clear()


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown network 'vgg': use 'resnet' or 'mobilenet'"):
        classifier(None, None, "vgg", 8)
