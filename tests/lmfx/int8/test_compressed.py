"""What the 8-bit form of a compressed network is judged on, and which backends have one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lmfx
from lmfx.calibration.images import as_calibration
from lmfx.int8.compressed import Int8Judge, int8_form
from lmfx.int8.quantize import float_form
from lmfx.latency import LatencyTable
from lmfx.passes.errors import ExportError
from lmfx.quality import Judge
from tests.helpers import one_thread as one_thread
from tests.lmfx.int8.test_quantize import pictures, small

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("batch", "count"), [(1, 5), (4, 6), (4, 8), (4, 3)])
def test_a_model_of_any_batch_is_judged_on_every_image_once(batch: int, count: int) -> None:
    example, images = pictures(batch), as_calibration(pictures(count), pictures(1))
    graph = lmfx.trace(small(), example)
    view, feeds = float_form(graph, example, images)
    judge = Judge(lmfx.trace(small(), pictures(1)), images)
    (given,) = Int8Judge(judge).outputs(bytes(view.model.SerializeToString()), feeds)
    (wanted,) = judge.reference
    assert given.shape == wanted.shape == (count, 5)
    assert torch.allclose(given, wanted, atol=1e-4)
    assert judge.of([given]).divergence < 1e-6


def test_a_table_has_no_choice_and_a_backend_without_an_8_bit_form_is_refused() -> None:
    images = as_calibration(pictures(8), pictures(1))
    graph = lmfx.trace(small(), pictures(1))
    source: Any = LatencyTable({}, {"backend": "onnxruntime", "precision": "int8"})
    form, facts, _ = int8_form(graph, images, pictures(1), source)
    assert form is not None and facts.pays and facts.ms == {} and facts.quantized is not None
    assert len(facts.quantized.layers) == 5 and form.shapes == ((1, 3, 21, 21),)
    with pytest.raises(ExportError, match="'roofline' have no 8-bit form: use onnxruntime"):
        int8_form(graph, images, pictures(1), LatencyTable({}, {"backend": "roofline"}))
