"""Calibration images from whatever a caller has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lmfx.calibration.images import Calibration, as_calibration
from lmfx.passes.errors import InputError
from tests.toys import images

X = images(1)


def loader(sizes: tuple[int, ...], labels: bool = False) -> list[Any]:
    batches = [images(n, seed=i) for i, n in enumerate(sizes)]
    return [(b, torch.zeros(len(b), dtype=torch.long)) for b in batches] if labels else list(batches)


def test_the_example_stands_in_when_there_is_nothing_else() -> None:
    found = as_calibration(None, X)
    assert len(found) == 1 and torch.equal(found.tensors[0], X)


@pytest.mark.parametrize("labels", [False, True], ids=["images", "images and labels"])
def test_a_loader_gives_its_images_in_order_and_labels_are_ignored(labels: bool) -> None:
    found = as_calibration(loader((3, 4, 1), labels), X)
    assert len(found.tensors) == 1
    assert torch.equal(found.tensors[0], torch.cat(loader((3, 4, 1))))


def test_a_torch_loader_is_one_too() -> None:
    data = torch.utils.data.TensorDataset(images(6), torch.zeros(6))
    found = as_calibration(torch.utils.data.DataLoader(data, batch_size=4), X)
    assert torch.equal(found.tensors[0], images(6))


def test_an_endless_generator_is_read_to_the_limit_and_no_further() -> None:
    drawn = 0

    def endless() -> Iterator[Tensor]:
        nonlocal drawn
        while True:
            drawn += 1
            yield images(4)

    assert len(as_calibration(endless(), X, limit=10)) == 10
    assert drawn == 3


@pytest.mark.parametrize("values, read", [(None, 2048), (48 * 1000, 1000), (48 * 10, 512)])
def test_of_small_images_more_are_read(values: int | None, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if values is not None:
        monkeypatch.setattr("lmfx.calibration.images.MAX_VALUES", values)
    assert len(as_calibration(torch.zeros(2100, 3, 4, 4), torch.zeros(1, 3, 4, 4))) == read


def test_several_inputs_come_as_tuples_or_by_name() -> None:
    a, b = images(5, seed=1), images(5, seed=2)
    for source in ((a, b), [(a[:2], b[:2]), (a[2:], b[2:])], [(a, b, torch.zeros(5))]):
        found = as_calibration(source, (X, X))
        assert torch.equal(found.tensors[0], a) and torch.equal(found.tensors[1], b)
    example = {"image": X, "depth": X}
    for named in ({"depth": b, "image": a}, [{"depth": b[:1], "image": a[:1]}, {"depth": b[1:], "image": a[1:]}]):
        found = as_calibration(named, example)
        assert found.names == ("image", "depth")
        assert torch.equal(found.tensors[0], a) and torch.equal(found.tensors[1], b)


def test_batches_hold_every_image_once_up_to_the_limit() -> None:
    data = Calibration((images(7),))
    assert [len(b[0]) for b in data.batches(3)] == [3, 3, 1]
    assert [len(b[0]) for b in data.batches(3, limit=4)] == [3, 1]
    assert torch.equal(torch.cat([b[0] for b in data.batches(2)]), images(7))


def test_the_judged_images_are_others_than_the_fitted_ones() -> None:
    data = Calibration((torch.arange(10.0)[:, None],))
    fitted, judged = data.split(16)
    assert sorted([*fitted.tensors[0].flatten().tolist(), *judged.tensors[0].flatten().tolist()]) == list(range(10))
    assert len(judged) == 2 and len(data.split(1)[1]) == 1


def test_few_images_serve_for_both() -> None:
    data = Calibration((images(3),))
    assert data.split(16) == (data, data)


def test_the_digest_follows_values_shapes_and_types() -> None:
    seen = {
        Calibration((t,)).digest()
        for t in (images(2), images(2) + 1e-6, images(2).double(), images(2).reshape(1, 6, 12, 12), images(2)[:1])
    }
    assert len(seen) == 5
    assert Calibration((images(2),)).digest() == Calibration((images(2).clone(),)).digest()
    assert Calibration((images(4)[::2],)).digest() == Calibration((images(4)[::2].contiguous(),)).digest()


def test_the_callers_tensor_keeps_its_gradient_flag_and_is_not_written_to() -> None:
    mine = images(4).requires_grad_()
    found = as_calibration(mine, X)
    assert not found.tensors[0].requires_grad and mine.requires_grad
    before = mine.detach().clone()
    found.tensors[0].add_(1)
    assert torch.equal(mine.detach(), before)


@pytest.mark.parametrize(
    ("source", "example", "text"),
    [
        ([images(2), images(2, size=8)], X, "all but the first dimension"),
        ([images(2), images(2).half()], X, "float16"),
        ([(torch.zeros(2), images(2))], X, "all but the first dimension"),
        ([images(2), images(2) / 0], X, "NaN or infinite"),
        ([(images(2),)], (X, X), "has 1 inputs, the example has 2"),
        ([3, 4], X, "a calibration batch is a int"),
        ([()], X, "a calibration batch is a tuple"),
        (images(2), (3, torch.tensor(3.0)), "int, a tensor without dimensions"),
    ],
)
def test_data_that_does_not_fit_is_refused(source: Any, example: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        as_calibration(source, example)


def test_an_error_of_the_loader_is_the_callers_own() -> None:
    def broken() -> Iterator[Tensor]:
        yield images(1)
        raise KeyError("corrupt record")

    with pytest.raises(KeyError, match="corrupt record"):
        as_calibration(broken(), X)
