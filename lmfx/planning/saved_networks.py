"""`save` and `load`: a compressed network as a folder of two files, never a pickle (`saved_files`).

The network's code is not saved: `load` traces the model again, rewrites it by the plan, and fills in the weights.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lmfx.environment.caller_state import entry
from lmfx.made_of import MadeOf, made_of, set_made_of, weights_digest
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import InputError, LmfxError, PlanError
from lmfx.passes.identity.fingerprint import Origin, fingerprint, is_of
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.programs import Model, as_module
from lmfx.passes.trace.tracing import trace
from lmfx.planning.plan_file import damaged, encode, make_document, read_json
from lmfx.planning.saved_files import (
    PLAN,
    WEIGHTS,
    SavedNetwork,
    describe_inputs,
    digest_of,
    example_of,
    parse_saved,
    read_folder,
    tensors_of,
    write_folder,
)
from lmfx.planning.saved_int8 import read_form, write_form
from lmfx.result import Result

__all__ = ["is_merged", "load", "model_spec", "save"]

# --- save -------------------------------------------------------------------------------------------------------------


@entry
def save(net: fx.GraphModule, directory: str | os.PathLike[str], *, model: str | None = None) -> Path:
    """Write a network that `compress`, `rewrite` or `merge` made to `directory`, and return its path.

    Both forms can be saved, trained further or not; of one in 8 bits the Q/DQ file as well. Other files in the folder
    stay; an older save in it is replaced as a whole or not at all. `model` is the command line's name of the model, for
    `lmfx export`.

    Raises `InputError` for a network that lmfx did not make, `PlanError` if it cannot be written.
    """
    plan, result, inputs = _provenance(net)
    merged = is_merged(net)
    if result is not None:
        result = dataclasses.replace(result, merged=merged)
    tensors, shared = tensors_of(net)
    made = made_of(net)
    origin = None if made is None else made.origin
    saved = SavedNetwork(merged, inputs, digest_of(tensors), shared, result, model, origin)
    target = Path(directory)
    write_folder(target, make_document(plan, encode(saved)), tensors)
    if made is not None and made.int8 is not None and made.int8.weights == weights_digest(net):
        write_form(target, made.int8)
    return target


def is_merged(net: nn.Module) -> bool:
    """Whether a network is the deploy form. `merge` keeps the result of what it merged, so that does not say it."""
    return not any(isinstance(m, LinearSpan) for m in net.modules())


def _provenance(net: Any) -> tuple[MergePlan, Result | None, dict[str, Any]]:
    """(plan, result if `compress` made it, input specs) that travel with a network."""
    made = made_of(net)
    if made is not None and made.result is not None:
        return made.plan, made.result, made.result.inputs
    if made is not None:
        return made.plan, None, noted(net).inputs
    raise InputError(
        f"this {type(net).__name__} carries no plan of lmfx, so it cannot be saved: pass what lmfx.compress, "
        "lmfx.rewrite or lmfx.merge returned"
    )


# --- load -------------------------------------------------------------------------------------------------------------


@entry
def load(directory: str | os.PathLike[str], model: Model) -> fx.GraphModule:
    """The network that `save` wrote, on the device of `model`, in eval mode; its outputs are those it had, bit for bit.

    `model` is the network that was compressed, with any weights; it is not changed.

    Raises `PlanError` if the folder is damaged, or was made for another model.
    """
    model = as_module(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"load needs the model that was compressed, an nn.Module, not a {type(model).__name__}")
    folder = Path(directory)
    plan, saved, tensors = read_folder(folder)
    with torch.random.fork_rng(devices=[]):  # new convs draw random weights, which are replaced at once
        graph = _trace(model, saved.inputs, folder)
        _check_origin(graph, plan, saved.origin, folder, type(model).__name__)
        weights = tensors | {name: tensors[source] for name, source in saved.shared.items()}
        net = _build(graph, plan, saved.merged, weights, folder)
    for name, target in net.state_dict(keep_vars=True).items():
        # Sets the saved dtype, and keeps ties. What safetensors gives lies unaligned in the memory of the file, where
        # convolutions add up in another order, so it is copied into memory of torch's own.
        target.data = weights[name].to(target.device, copy=True)
    if saved.result is not None:
        note(net, noted(net).of_result())
    set_made_of(net, MadeOf(plan, saved.origin, saved.result, read_form(folder, net)))
    return net.eval()


def _check_origin(graph: fx.GraphModule, plan: MergePlan, origin: Origin | None, folder: Path, name: str) -> None:
    """Raises `PlanError` if the graph is not the one that was compressed: in its ops, constants, attributes or code."""
    advice = "Pass the model that was compressed, in any state of its weights"
    differs = "" if origin is None else origin.differs(graph)
    if plan.fingerprint and not is_of(plan.fingerprint, graph):
        seen = f"its graph is {plan.fingerprint}, that of this {name} is {fingerprint(graph)}"
        raise PlanError(f"{folder} was saved for another model: {seen}{f' ({differs})' if differs else ''}. {advice}")
    if differs:
        raise PlanError(f"{folder} was saved for another model than this {name}: {differs}. {advice}")


def model_spec(directory: str | os.PathLike[str]) -> tuple[str | None, Any]:
    """(the MODEL that the command line compressed or None, the example's specs) of a saved folder."""
    folder = Path(directory)
    _, saved = parse_saved(read_json(folder / PLAN), str(folder / PLAN))
    return saved.model, saved.inputs


def _trace(model: nn.Module, inputs: dict[str, Any], folder: Path) -> fx.GraphModule:
    first = next(model.parameters(), None)
    try:
        args, kwargs = example_of(inputs, None if first is None else first.device)
    except (ValueError, RuntimeError) as error:
        raise damaged(str(folder / PLAN), error) from error
    if args and kwargs:
        raise damaged(str(folder / PLAN), "save.inputs has both positional and keyword")
    try:
        return trace(model, kwargs or tuple(args))
    except Exception as error:  # a model that does not take the saved inputs may fail in any way
        text = str(error).strip().splitlines()
        raise PlanError(
            f"this {type(model).__name__} does not run on the inputs of {folder} ({describe_inputs(inputs)}): "
            f"{type(error).__name__}: {text[0] if text else ''}. Pass the model that was compressed"
        ) from error


def _build(
    graph: fx.GraphModule, plan: MergePlan, merged: bool, weights: dict[str, Tensor], folder: Path
) -> fx.GraphModule:
    """The network of the plan, with places for just these weights."""
    # What stands for a removed activation is only visible in the weights of the trainable form.
    choices = (_identity_surrogates(graph), None) if plan.surrogate == "affine" and not merged else (None,)
    problem = ""
    for surrogates in choices:
        try:
            net = rewrite(graph, plan, surrogates)
            net = merge(net) if merged else net
            _add_biases(net, weights)
        except LmfxError:
            raise
        except Exception as error:  # a plan that was edited by hand may break the rewrite anywhere
            raise damaged(str(folder / PLAN), f"{type(error).__name__}: {error}") from error
        problem = _mismatch(net, weights)
        if not problem:
            return net
    raise PlanError(f"the weights in {folder / WEIGHTS} are not those of the plan: {problem}. Save the network again")


def _add_biases(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give layers the bias that a refit gave them."""
    for name in [n for n in weights if n.endswith(".bias")]:
        owner = name.removesuffix(".bias")
        layer: Any = dict(net.named_modules()).get(owner)
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(weights[name], device=layer.weight.device))


def _identity_surrogates(graph: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Scale 1 and bias 0 for each activation, which makes the modules that the affine surrogates had."""
    network = Network(graph)
    acts = [lay.activation for s in network.series.values() for lay in s.layers if lay.activation is not None]
    channels = {name: network.shape(name)[1] for name in acts}
    return {name: (torch.ones(n), torch.zeros(n)) for name, n in channels.items()}


def _mismatch(net: nn.Module, weights: dict[str, Tensor]) -> str:
    """How the names and shapes of the weights differ from what the network has; empty if they do not."""
    here = net.state_dict()
    shapes = [
        f"{n} has shape {tuple(weights[n].shape)} for {tuple(here[n].shape)}"
        for n in here
        if n in weights and weights[n].shape != here[n].shape
    ]
    found = {"missing": [n for n in here if n not in weights], "unexpected": [n for n in weights if n not in here]}
    parts = [f"{what} {', '.join(names[:4])} ({len(names)})" for what, names in found.items() if names]
    return "; ".join([*parts, *shapes[:4]])
