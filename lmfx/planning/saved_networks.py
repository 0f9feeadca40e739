"""`save` and `load`: a compressed network as a folder of two files, never a pickle.

    out/plan.json           the plan and the result: what was done, for which graph, with which latency
    out/model.safetensors   every weight in its own dtype, and in the header a copy of plan.json

The network's code is not saved: `load` traces the model again, rewrites it by the plan, and fills in the weights. Two
files cannot be replaced in one step; because the weights carry their own copy of the plan, replacing them is the step
that counts, and a save that is killed at any moment leaves the older save or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from lmfx.environment.bounded_reading import parse_json
from lmfx.environment.caller_state import entry
from lmfx.made_of import MadeOf, made_of, set_made_of
from lmfx.passes.algebra.linear_span import LinearSpan
from lmfx.passes.errors import InputError, LmfxError, PlanError
from lmfx.passes.identity.fingerprint import Origin, fingerprint, is_of
from lmfx.passes.ir import MergePlan
from lmfx.passes.model.trace_facts import note, noted
from lmfx.passes.rewrite.trainable import merge, rewrite
from lmfx.passes.spans.layers import Network
from lmfx.passes.trace.tracing import trace
from lmfx.planning.plan_file import damaged, decode, document_text, encode, make_document, parse_document, read_json
from lmfx.result import Result

__all__ = ["example_of", "is_merged", "load", "model_spec", "save"]

PLAN, WEIGHTS = "plan.json", "model.safetensors"
MOST_VALUES, MOST_DIMENSIONS = 2**28, 16  # of the example that a folder asks for
# By name and not by getattr: what a file says is never looked up in a module.
DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


@dataclasses.dataclass(frozen=True)
class _Save:
    """What plan.json of a folder holds besides the plan."""

    merged: bool
    inputs: dict[str, Any]  # positional and keyword specs of the example
    digest: str  # of the weights
    shared: dict[str, str]  # weights that are another one's memory, and which
    result: Result | None
    model: str | None  # the command line's MODEL, if it made this
    origin: Origin | None = dataclasses.field(default=None, metadata={"optional": True})  # of what model it was made


# --- save -------------------------------------------------------------------------------------------------------------


@entry
def save(net: fx.GraphModule, directory: str | os.PathLike[str], *, model: str | None = None) -> Path:
    """Write a network that `compress`, `rewrite` or `merge` made to `directory`, and return its path.

    Both forms can be saved, trained further or not. Other files in the folder stay; an older save in it is replaced as
    a whole or not at all. `model` is the command line's name of the model, for `lmfx export`.

    Raises `InputError` for a network that lmfx did not make, `PlanError` if it cannot be written.
    """
    plan, result, inputs = _provenance(net)
    merged = is_merged(net)
    if result is not None:
        result = dataclasses.replace(result, merged=merged)
    tensors, shared = _tensors(net)
    made = made_of(net)
    origin = None if made is None else made.origin
    document = make_document(plan, encode(_Save(merged, inputs, _digest(tensors), shared, result, model, origin)))
    text = document_text(document)
    target = Path(directory)
    try:
        if target.exists() and not target.is_dir():
            raise PlanError(f"cannot save to {target}: it is a file; give a folder")
        where = target if target.is_dir() else target.absolute().parent
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lmfx-", dir=where) as temporary:
            new = Path(temporary) / "save"
            new.mkdir()
            (new / PLAN).write_text(text, encoding="utf-8")
            safetensors.torch.save_file(tensors, new / WEIGHTS, {"format": "pt", "lmfx": json.dumps(document)})
            (new / WEIGHTS).chmod((new / PLAN).stat().st_mode)  # safetensors lets nobody else read it
            if target.is_dir():
                os.replace(new / WEIGHTS, target / WEIGHTS)
                os.replace(new / PLAN, target / PLAN)
            else:
                os.rename(new, target)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, LmfxError):
            raise
        raise PlanError(f"cannot save to {target}: {error}; give another folder") from error
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


def _tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the weights, each on the CPU in memory of its own; names whose weight is another name's)."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    memory: set[int] = set()
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            raise PlanError(
                f"{name} is a {type(value).__name__}, not a tensor, and cannot be saved without a pickle: save the "
                "network before it is quantized, or keep what the module needs in buffers"
            )
        if value.is_meta:
            raise PlanError(f"{name} is on the meta device and has no values: load the weights first")
        same = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and same in first:
            shared[name] = first[same]
            continue
        first[same] = name
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in memory or storage.nbytes() != own.nbytes:
            own = own.clone()  # a view of memory that another weight lies in
        memory.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    return tensors, shared


def _digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


# --- load -------------------------------------------------------------------------------------------------------------


@entry
def load(directory: str | os.PathLike[str], model: nn.Module) -> fx.GraphModule:
    """The network that `save` wrote, on the device of `model`, in eval mode; its outputs are those it had, bit for bit.

    `model` is the network that was compressed, with any weights; it is not changed.

    Raises `PlanError` if the folder is damaged, or was made for another model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"load needs the model that was compressed, an nn.Module, not a {type(model).__name__}")
    folder = Path(directory)
    plan, saved, tensors = _read(folder)
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
    set_made_of(net, MadeOf(plan, saved.origin, saved.result))
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
    _, saved = _parse(read_json(folder / PLAN), str(folder / PLAN))
    return saved.model, saved.inputs


def example_of(inputs: dict[str, Any], device: torch.device | None = None) -> tuple[list[Any], dict[str, Any]]:
    """(positional, keyword) values with saved specs: standard normal, or zeros for integers. Raises `ValueError`."""
    generator, left = torch.Generator().manual_seed(0), [MOST_VALUES]

    def value(spec: Any) -> Any:
        if isinstance(spec, dict) and set(spec) == {"dict"} and isinstance(spec["dict"], dict):
            return {k: value(v) for k, v in spec["dict"].items()}
        for kind in (tuple, list):
            if isinstance(spec, dict) and set(spec) == {kind.__name__} and isinstance(spec[kind.__name__], list):
                return kind(value(v) for v in spec[kind.__name__])
        if not (isinstance(spec, dict) and set(spec) == {"shape", "dtype"}):
            return spec
        dtype, shape = DTYPES.get(str(spec["dtype"])), spec["shape"]
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if dtype is None or not sizes:
            raise ValueError(f"the input {spec} is no tensor")
        left[0] -= prod(shape)
        if left[0] < 0 or len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"the inputs have more than {MOST_VALUES} values: {str(shape)[:60]}")
        floating = dtype.is_floating_point or dtype.is_complex
        made = torch.randn(shape, generator=generator) if floating else torch.zeros(shape)
        return made.to(device, dtype)

    if not isinstance(inputs.get("positional"), list) or not isinstance(inputs.get("keyword"), dict):
        raise ValueError("save.inputs needs positional and keyword")
    return [value(s) for s in inputs["positional"]], {k: value(s) for k, s in inputs["keyword"].items()}


def _read(folder: Path) -> tuple[MergePlan, _Save, dict[str, Tensor]]:
    """The plan and the weights of one and the same save."""
    if not folder.is_dir():
        raise PlanError(
            f"{folder} is not a folder that lmfx.save wrote: "
            + ("it is a file" if folder.exists() else "it does not exist")
        )
    plan, saved = _parse(read_json(folder / PLAN), str(folder / PLAN))
    path = folder / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lmfx")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except FileNotFoundError as error:
        raise PlanError(f"{path} does not exist: restore it from a copy, or compress again") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise damaged(str(path), error) from error
    if text is None:
        raise PlanError(f"{path} is not of lmfx, its header has no plan: give what lmfx.save wrote")
    digest = _digest(tensors)
    if digest != saved.digest:
        # A save that was killed between its two files: the plan in the weights' header is the one that goes with them.
        with contextlib.suppress(ValueError):
            plan, saved = _parse(parse_json(text), str(path))
        if digest != saved.digest:
            raise damaged(str(path), f"its weights have the digest {digest[:12]}, {saved.digest[:12]} was saved")
    return plan, saved, tensors


def _parse(document: Any, source: str) -> tuple[MergePlan, _Save]:
    plan, save = parse_document(document, source)
    if save is None:
        raise PlanError(f"{source} is a plan alone: load it with lmfx.load_plan, or give a folder that lmfx.save wrote")
    try:
        saved = decode(_Save, save, "save")
    except ValueError as error:
        raise damaged(source, error) from error
    if saved.result is not None and saved.result.plan != plan:
        raise damaged(source, "its result has another plan")
    return plan, saved


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
            f"this {type(model).__name__} does not run on the inputs of {folder} ({_describe(inputs)}): "
            f"{type(error).__name__}: {text[0] if text else ''}. Pass the model that was compressed"
        ) from error


def _describe(inputs: dict[str, Any]) -> str:
    specs = [*inputs["positional"], *inputs["keyword"].values()]
    return ", ".join(str(s["shape"]) if isinstance(s, dict) and "shape" in s else repr(s) for s in specs)


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
