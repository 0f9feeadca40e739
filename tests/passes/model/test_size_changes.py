"""Which other sizes of an example are tried, and when two outputs are the same."""

from __future__ import annotations

import pytest
import torch

from lmfx.passes.model.differences import differs
from lmfx.passes.model.size_changes import Leaf, Trial, changes_alone, drawn, layouts, resized

IMAGE, MASK, TIME = torch.rand(2, 3, 64, 32), torch.rand(2, 1, 32, 16), torch.rand(2)


def leaves_of(trial: Trial) -> tuple[Leaf, ...]:
    return layouts([IMAGE, MASK, TIME, "flag"], ["x", "mask", "t", "flag"], 2, trial)[0]


def test_another_batch_changes_every_tensor_with_as_many_rows_as_the_images() -> None:
    leaves = leaves_of(Trial.BATCH)
    assert [leaf.name for leaf in leaves] == ["x", "mask", "t"] and not any(leaf.dims for leaf in leaves)
    assert resized(leaves[2], Trial.BATCH.changes[0], 3, leaves) == (3,)


def test_another_size_changes_maps_only_and_keeps_a_mask_at_half_the_size() -> None:
    leaves = leaves_of(Trial.SIZE)
    assert [leaf.name for leaf in leaves] == ["x", "mask"] and not any(leaf.batched for leaf in leaves)
    for change in Trial.SIZE.changes:
        image, mask = (resized(leaf, change, 0, leaves) for leaf in leaves)
        if image is not None and mask is not None:
            assert image[:2] == (2, 3) and image[2:] == tuple(2 * n for n in mask[2:])


def test_the_same_size_is_the_same_shape_with_other_values() -> None:
    leaves = leaves_of(Trial.SAME)
    assert all(resized(leaf, Trial.SAME.changes[0], 2, leaves) == leaf.shape for leaf in leaves)
    other = drawn(IMAGE, tuple(IMAGE.shape))
    assert other.shape == IMAGE.shape and not torch.equal(other, IMAGE)
    assert float(other.min()) >= float(IMAGE.min()) and float(other.max()) <= float(IMAGE.max())


@pytest.mark.parametrize("trial", [Trial.BATCH, Trial.ONE])
def test_what_has_no_images_has_no_other_batch(trial: Trial) -> None:
    assert layouts([torch.tensor(3.0), "flag"], ["a", "b"], 0, trial) == []


def test_a_vector_has_no_other_image_size() -> None:
    assert layouts([torch.rand(2, 8)], ["x"], 2, Trial.SIZE) == []


def test_an_input_alone_is_tried_as_a_single_image_and_at_another_batch() -> None:
    leaf = leaves_of(Trial.BATCH)[0]
    assert changes_alone(leaf, "batch", 2) == [[(1, 3, 64, 32)], [(3, 3, 64, 32)]]
    sized = leaves_of(Trial.SIZE)[0]
    assert changes_alone(sized, "size", 2)[0] == [(2, 3, 1, 1)]


def test_whole_numbers_are_drawn_from_those_that_are_there() -> None:
    labels = torch.tensor([[3, 5], [7, 3]])
    assert set(drawn(labels, (4, 3)).flatten().tolist()) == {3, 5, 7}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(3), torch.ones(4)),
        (torch.ones(3), torch.ones(3).double()),
        (torch.ones(3), torch.tensor([1.0, 1.0, 1.1])),
        (torch.ones(3), torch.tensor([1.0, 1.0, float("nan")])),
        ((torch.ones(3), 2), (torch.ones(3), 3)),
        ([torch.ones(3)], [torch.ones(3), torch.ones(3)]),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
    ],
)
def test_outputs_of_another_kind_or_value_differ(one: object, other: object) -> None:
    assert differs(one, other)


def test_rounding_is_no_difference_and_a_tolerance_may_be_given() -> None:
    value = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 1
    assert not differs((value, "a"), (value * (1 + 1e-5), "a"))
    assert differs(value.double(), value.double() * (1 + 1e-5))
    assert not differs(value, value * 1.04, tolerance=5e-2)
