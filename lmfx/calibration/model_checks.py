"""Checks a model and an example before anything is done with them. Nothing here changes either."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lmfx.passes.errors import DeviceError, InputError, ModelError, OptionError
from lmfx.passes.graph import ops
from lmfx.passes.graph.node_facts import shape_of
from lmfx.passes.model.interface import plain_output
from lmfx.passes.model.model_copy import eval_copy
from lmfx.passes.model.trace_facts import noted
from lmfx.passes.spans.enumeration import SpanOptions
from lmfx.passes.trace.tracing import example_arguments

__all__ = ["check_batched", "check_model", "check_run_options", "check_traced", "span_options"]


def span_options(**options: Any) -> SpanOptions:
    """`SpanOptions` from what a caller gave (lists will do for tuples). Raises `OptionError` with the option's name."""
    known = [f.name for f in fields(SpanOptions)]
    if unknown := [name for name in options if name not in known]:
        raise OptionError(f"spans have no option {', '.join(unknown)}; there are {', '.join(known)}")
    for name in ("realize", "include", "exclude"):
        value = options.get(name, ())
        if isinstance(value, str) or not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
            example = f"({value!r},)" if isinstance(value, str) else "('fit',)" if name == "realize" else "('head.*',)"
            raise OptionError(f"{name}={value!r}: pass a tuple of strings, like {example}")
        if name in options:
            options[name] = tuple(value)
    if not options.get("realize", ("fit",)):
        raise OptionError("realize=() leaves nothing to do: use some of 'compose', 'fit', 'drop'")
    for name in ("max_span_convs", "max_fit_convs", "max_fit_unknowns"):
        value = options.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise OptionError(f"{name}={value!r}: use a whole number from 1, or None")
    return SpanOptions(**options)


def check_run_options(executor: Any = None, cache_dir: Any = None) -> None:
    """Raises `OptionError` for an executor or a cache folder that is none."""
    known = executor is None or isinstance(executor, Executor) or callable(getattr(executor, "map", None))
    if isinstance(executor, type) or not (known or callable(executor)):
        raise OptionError(
            f"executor={executor!r} is a {type(executor).__name__}: pass a concurrent.futures.Executor, like "
            "ThreadPoolExecutor(4), or a function that makes one"
        )
    if cache_dir is not None and not isinstance(cache_dir, (str, os.PathLike)):
        raise OptionError(f"cache_dir={cache_dir!r} is a {type(cache_dir).__name__}: pass the path of a folder")


def check_traced(graph: Any, what: str) -> None:
    """Raises `InputError` for anything but a graph that `lmfx.trace` made."""
    if not isinstance(graph, fx.GraphModule) or noted(graph).example is None:
        raise InputError(f"{what} needs a graph from lmfx.trace, not a {type(graph).__name__}: call lmfx.trace first")


def check_batched(graph: fx.GraphModule) -> None:
    """Raises `InputError` if a conv sees a single image: torch takes one without a batch dimension, runtimes do not."""
    for node in graph.graph.nodes:
        module: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        shape = shape_of(source)
        kinds: tuple[type[nn.Module], ...] = (*ops.CONVS, *ops.TRANSPOSED)
        weight: Any = module.weight if isinstance(module, kinds) else None
        if weight is not None and shape is not None and len(shape) < weight.dim():
            raise InputError(
                f"{node.target} gets a value of shape {tuple(shape)}: pass an example with the batch dimension, like "
                "example[None]"
            )


def check_model(model: Any, example_input: Any) -> None:
    """Raises `ModelError`, `InputError` or `DeviceError` with what was seen and what to do, or returns."""
    if not isinstance(model, nn.Module):
        hint = "; call the class first: model = Model()" if isinstance(model, type) else ""
        raise ModelError(f"the model is a {type(model).__name__}, not a torch.nn.Module{hint}")
    if any(base.__name__ == "ScriptModule" for base in type(model).__mro__):
        raise ModelError("the model is TorchScript, which torch.fx cannot trace: pass the eager model")
    if isinstance(model, fx.GraphModule) and "eval" in vars(model):
        raise ModelError(
            "the model is what ExportedProgram.module() gives, which has no eval mode: pass the ExportedProgram itself"
        )
    if model.training:
        raise ModelError("the model is in training mode: call model.eval() first, so that its norms are constants")
    for name, module in model.named_modules():
        if module.training:
            raise ModelError(f"{name} is in training mode, the model is not: call model.eval() before compressing")
    args, kwargs = example_arguments(example_input)
    inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    _check_inputs(args, kwargs, inputs, example_input)
    _check_weights(model)
    _check_devices(model, inputs)
    _check_dtypes(model, inputs)
    model = _copied(model)  # some models keep things from a run
    kinds = (*ops.CONVS, *ops.TRANSPOSED)
    if not any(isinstance(m, kinds) for m in model.modules()) and not _calls_a_conv(model, args, kwargs):
        raise ModelError(
            f"{type(model).__name__} has no convolution, so there is nothing to merge: pass one with nn.Conv layers"
        )
    _check_run(model, args, kwargs, inputs)


def _check_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], example: Any) -> None:
    if not args and not kwargs:
        raise InputError(f"example_input={example!r} is empty: pass a tensor, a tuple of tensors or a dict")
    if not inputs:
        raise InputError(
            f"example_input is a {type(example).__name__} without a tensor: pass a tensor, a tuple or a dict of tensors"
        )
    for tensor in inputs:
        if tensor.is_meta:
            raise DeviceError("the example is on the meta device and has no values: move it with .to(...)")
        if tensor.numel() == 0:
            raise InputError(
                f"the example has shape {tuple(tensor.shape)}, which holds nothing: pass at least one image"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError("the example has NaN or infinite values: pass real data, or torch.randn of its shape")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return eval_copy(model)
    except Exception as error:  # an attribute of the user's may refuse in any way
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): lmfx works on a copy, so "
            "copy.deepcopy(model) must work; remove the attribute that it stops at"
        ) from error


def _check_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise ModelError(
                f"{name} is quantized ({kind.__name__}): compress the floating-point model and quantize the result"
            )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
            raise ModelError(
                f"{name} of a {type(owner).__name__} has no values yet: run the model once first, like model(example)"
            )
    if not tensors:
        raise ModelError(
            f"{type(model).__name__} has no parameters, so there is nothing to merge: pass one with nn.Conv layers"
        )
    for name, held in tensors:
        tensor = held.detach()
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device and has no values: load the weights first")
        if tensor.is_quantized:
            raise ModelError(f"{name} is quantized: compress the floating-point model and quantize the result")
        if tensor.is_complex():
            raise ModelError(
                f"{name} is complex ({tensor.dtype}), which no conv of a runtime is: compress a part without it"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{name} has NaN or infinite values: the model is broken before compression; check training"
            )


def _check_devices(model: nn.Module, inputs: list[Tensor]) -> None:
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise DeviceError(f"the model is spread over {sorted(devices)}: move it to one device with model.to(...)")
    for tensor in inputs:
        if devices and str(tensor.device) not in devices:
            raise DeviceError(
                f"the model is on {next(iter(devices))}, the example on {tensor.device}: move one of them with .to(...)"
            )


def _check_dtypes(model: nn.Module, inputs: list[Tensor]) -> None:
    # Numbers that tracing made a layer have the dtype of what they read, as they had in the model.
    made = {id(p) for m in model.modules() if isinstance(m, ops.ChannelAffine) for p in m.parameters()}
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in made}
    half = dtypes & {torch.float16, torch.bfloat16}
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if half and on_cpu:
        raise ModelError(
            f"the model is in {_names(half)} on the CPU: compress it in float32 (model.float()) and convert the result"
        )
    if len(dtypes) > 1:
        raise ModelError(f"the model mixes {_names(dtypes)}: convert it to one, with model.float() for example")
    floating = {t.dtype for t in inputs if t.is_floating_point()}
    if dtypes and floating and floating != dtypes:
        raise InputError(f"the model is in {_names(dtypes)}, the example in {_names(floating)}: convert one of them")


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def _calls_a_conv(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model calls a functional conv with a weight of its own."""
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        seen = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in ("conv1d", "conv2d", "conv3d"):
                self.seen = True
            return func(*args, **(kwargs or {}))

    try:
        with Watch() as watch, torch.no_grad():
            model(*_clones(args), **_clones(kwargs))
    except Exception:  # a model that does not run is reported by what checks the run
        return True
    return watch.seen


def _clones(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, values)


def _check_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in inputs]
    try:
        with torch.no_grad():
            output = model(*_clones(args), **_clones(kwargs))
    except Exception as error:  # any model may fail in any way on a wrong input
        text = str(error).strip().splitlines()
        raise InputError(
            f"{type(model).__name__} does not run on the example of shape {shapes}: {type(error).__name__}: "
            f"{text[0] if text else ''}. Pass an input as the model takes it, with the batch dimension"
        ) from error
    floating = [v for v in pytree.tree_leaves(plain_output(output)) if isinstance(v, Tensor) and v.is_floating_point()]
    if not floating:
        raise ModelError(
            f"{type(model).__name__} gives no floating-point tensor (it gives {type(output).__name__}): "
            "return what its last layer computes"
        )
    if not all(bool(v.isfinite().all()) for v in floating):
        raise ModelError(f"{type(model).__name__} gives NaN or infinite values on the example: check its weights")
