"""A small network of each family as a Q/DQ file: ONNX Runtime runs it, and tensorrt_rtx reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.promises.int8_zoo import row_of
from tests.helpers import one_thread as one_thread
from tests.lmfx.test_zoo import NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"timm/test_resnet", "timm/test_efficientnet", "timm/lcnet_050", "tv/squeezenet1_1"}
FAR = 0.6  # of the size of the outputs of networks that nobody trained


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NETWORKS])
def test_a_network_of_the_zoo_runs_in_8_bits(name: str, tmp_path: Path) -> None:
    row = row_of(name, tmp_path)
    assert row["layers"] and row["error"] < FAR  # which NaN is not either
    assert row["rtx"] == "absent" or row["quantizers"] > 0
