"""What is known of a node's value: noted by tracing, kept by passes that put another node in its place."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import lmfx
from lmfx.passes.errors import VerifyError
from lmfx.passes.graph import node_facts as facts


def traced() -> fx.GraphModule:
    return lmfx.trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval(), torch.zeros(2, 3, 9, 7))


def node_of(gm: fx.GraphModule, target: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.target == target)


def test_a_traced_node_knows_its_shape_dtype_and_path() -> None:
    conv = node_of(traced(), "0")
    assert facts.shape_of(conv) == facts.tensor_shape(conv) == (2, 5, 7, 5)
    assert facts.dtype_of(conv) is facts.tensor_dtype(conv) is torch.float32
    assert facts.is_floating(conv) and facts.path_of(conv) == "0" and facts.known_value(conv)


def test_nothing_is_known_of_a_new_node_or_of_what_is_no_node() -> None:
    node = fx.Graph().placeholder("x")
    assert (facts.shape_of(node), facts.dtype_of(node), facts.path_of(node), facts.call_of(node)) == (None, None, "", 0)
    assert not facts.is_floating(node) and facts.is_floating(node, unknown=True)
    assert facts.shape_of(3) is None and facts.dtype_of((node,)) is None
    assert not facts.known_value(node) and not facts.gives_its_operand(node) and not facts.comes_from_leaf(node)


def test_asking_for_the_shape_of_what_is_no_tensor_is_a_bug_with_a_name() -> None:
    node = fx.Graph().placeholder("sizes")
    facts.note_value(node, [1, 2], same=True)
    assert not facts.gives_its_operand(node)
    with pytest.raises(VerifyError, match="shape of sizes"):
        facts.tensor_shape(node)
    with pytest.raises(VerifyError, match="dtype of sizes"):
        facts.tensor_dtype(node)


def test_an_integer_tensor_is_known_and_not_floating() -> None:
    node = fx.Graph().placeholder("x")
    facts.note_value(node, torch.zeros(4, dtype=torch.int64), same=False)
    assert facts.shape_of(node) == (4,) and not facts.is_floating(node, unknown=True)


def test_a_path_that_is_known_is_not_noted_again() -> None:
    node = fx.Graph().placeholder("x")
    other = fx.Graph().placeholder("y")
    facts.note_value(other, torch.zeros(1), same=False)
    facts.note_like(node, other, path="block.conv", call=1)
    facts.note_value(node, torch.zeros(2), same=False)
    assert facts.path_of(node) == "block.conv" and facts.call_of(node) == 1 and facts.shape_of(node) == (2,)


def test_a_node_like_another_one_has_its_facts_but_for_what_changed() -> None:
    conv = node_of(traced(), "0")
    new = fx.Graph().placeholder("new")
    facts.note_like(new, conv, shape=None, path="merged")
    assert facts.shape_of(new) is None and facts.path_of(new) == "merged" and facts.dtype_of(new) is torch.float32
    assert facts.shape_of(conv) == (2, 5, 7, 5) and not facts.same_kind(new, conv)
    facts.note_shape(new, facts.shape_of(conv))
    assert facts.same_kind(new, conv)


def test_only_facts_that_a_pass_may_change_are_changed() -> None:
    conv = node_of(traced(), "0")
    with pytest.raises(AssertionError):
        facts.note_like(fx.Graph().placeholder("new"), conv, floating=False)


def test_attributes_of_a_tensor_are_known_and_others_are_not() -> None:
    conv = node_of(traced(), "0")
    assert facts.attribute_of(conv, "shape") == (2, 5, 7, 5)
    assert facts.attribute_of(conv, "device") == torch.device("cpu")
    assert facts.attribute_of(conv, "path") is None and facts.attribute_of(conv, "T") is None
