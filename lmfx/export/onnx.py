"""`export_onnx`: a network as one ONNX file that has been run and compared before it gets its name.

The file is written by `torch.onnx.export` to a temporary name beside the target, run by ONNX Runtime on the example
input, on one random input and where sizes are free on two other sizes (`free_sizes`), compared with torch, and only
then renamed: a failed export leaves no file.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lmfx.environment.atomic_files import atomic_write
from lmfx.environment.caller_state import entry, one_line
from lmfx.export.builder import PROTO_LIMIT, require_onnx
from lmfx.export.free_sizes import Dynamic, FreeSizes, dimension, free_sizes
from lmfx.export.op_place import place_of
from lmfx.export.specs import eval_mode
from lmfx.made_of import made_of, weights_digest
from lmfx.passes.errors import ExportError, InputError, MissingExtra
from lmfx.passes.graph.tensor_inputs import bare
from lmfx.passes.model.interface import Example, plain_face, plain_output
from lmfx.passes.model.quiet import quiet, tracing

__all__ = ["export_onnx", "quiet_export"]


@entry
def export_onnx(
    net: nn.Module,
    example_input: torch.Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    check: bool = True,
    tolerance: float = 1e-3,
    dynamic_batch: bool = False,
    dynamic_shapes: Dynamic = False,
) -> Path:
    """Writes `net` in eval mode as one self-contained ONNX file and returns its path.

    `example_input` is a tensor, a tuple of positional inputs or a dict of keyword inputs; its shapes are the file's.
    `dynamic_batch` frees the number of images, `dynamic_shapes=True` the height and width of maps; a tuple of "batch",
    "height" and "width", or {"x": (0, 2, 3)}, frees just those. The file is then run at two other sizes as well, and
    refused for a network that has such a size as a number. With `check`, every output of ONNX Runtime may differ from
    torch's by `tolerance`, relative to the largest entry of that output. The training mode of `net` is restored. Of a
    network that was compressed with precision="int8" it is the Q/DQ file that its latency and quality were measured
    with, which is not compared again.

    Raises `ExportError` (the target is then as it was), `MissingExtra` without onnx, onnxscript or onnxruntime.
    """
    if not isinstance(net, nn.Module):
        raise InputError(
            f"export_onnx takes a torch.nn.Module, such as lmfx.compress gives, not a {type(net).__name__}"
        )
    onnx = require_onnx()
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {target}: the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise ExportError(f"cannot write {target}: it is a folder; give a file name such as net.onnx")
    args, kwargs = _arguments(example_input)
    if (quantized := _int8_file(net, args, kwargs, opset, dynamic_batch or bool(dynamic_shapes))) is not None:
        return atomic_write(target, quantized)
    if isinstance(net, fx.GraphModule) and not all(isinstance(v, torch.Tensor) for v in (*args, *kwargs.values())):
        net, tensors = bare(net, (args, kwargs))  # numbers and flags are constants of the file
        args, kwargs = tuple(tensors), {}
    with eval_mode(net), tempfile.TemporaryDirectory(prefix=".lmfx-", dir=target.parent) as folder:
        free = free_sizes(net, (args, kwargs), dynamic_batch, dynamic_shapes) or FreeSizes(shown=(args, kwargs))
        program = quiet_export(net, *free.shown, opset=opset, free=free)
        model = program.model_proto
        _name_sizes(model, free)
        if model.ByteSize() > PROTO_LIMIT:
            raise ExportError(
                f"the network takes {model.ByteSize() / 1e9:.1f} GB, and one ONNX file holds 2 GB; export it in half "
                "precision or use torch.onnx.export(external_data=True)"
            )
        temporary = Path(folder) / target.name
        try:
            onnx.save(model, temporary)
        except OSError as error:
            raise ExportError(f"cannot write {target}: {error}; give another file") from error
        if check:
            _check(net, args, kwargs, temporary, tolerance, free.trials)
        os.replace(temporary, target)
    return target


def _int8_file(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int | None, dynamic_batch: bool
) -> bytes | None:
    """The Q/DQ file of a network that `compress(precision="int8")` made, None of another.

    Raises `ExportError` where the network or what is asked for is no longer what it was made for.
    """
    made = made_of(net)
    form = None if made is None else made.int8
    if form is None:
        return None
    remedy = "write it anew with lmfx.quantize(net, images, path)"
    if weights_digest(net) != form.weights:
        raise ExportError(f"the weights of this network changed after its 8-bit form was made: {remedy}")
    shapes = tuple(tuple(v.shape) for v in _leaves((*args, *kwargs.values())))
    if shapes != form.shapes or dynamic_batch or opset is not None:
        raise ExportError(
            f"the 8-bit form of this network takes inputs of the shapes {form.shapes}, in its own opset, and "
            f"{'a free size' if dynamic_batch else shapes} was asked for: {remedy} and another example_input"
        )
    return form.model


def quiet_export(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    opset: int | None = None,
    free: FreeSizes | None = None,
) -> torch.onnx.ONNXProgram:
    """`torch.onnx.export(dynamo=True)` in eval mode, without prints. Raises `ExportError`, `MissingExtra`."""
    try:
        import onnxscript  # noqa: F401  (torch.onnx.export needs it)
    except ImportError as error:
        raise MissingExtra(
            f'torch.onnx.export needs onnxscript, which cannot be imported ({error}); pip install "lmfx[onnx]"'
        ) from error
    dynamic = free.specs(dimension) if free is not None and free.dims else None
    try:
        with (
            eval_mode(net),
            torch.no_grad(),
            quiet(),
            tracing(),  # torch.onnx.export traces with torch.export
        ):
            program = torch.onnx.export(
                plain_face(net),
                args,
                kwargs=kwargs or None,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=dynamic,
            )
    except Exception as error:  # torch.onnx raises many kinds, all of them about this model
        raise ExportError(_export_failure(net, args, kwargs or {}, error)) from error
    if program is None:
        raise ExportError(f"torch.onnx.export gave nothing for {type(net).__name__}: please report this")
    return program


def _export_failure(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> str:
    """What torch.onnx.export stopped at; it names the op at the end of a long text, or in the error's cause."""
    name = type(net).__name__
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    found = next((m for e in reversed(chain) for m in _OP.finditer(str(e))), None)
    if found is None:
        return (
            f"torch.onnx.export could not export {name}: {type(chain[-1]).__name__}: {one_line(chain[-1])}; try a "
            "newer torch, another opset, or a runtime that needs no ONNX (latency='torch')"
        )
    op = found[1] or found[2]
    place = place_of(net, args, kwargs, op)
    where = f", which {place} computes" if place else ""
    return (
        f"torch.onnx.export could not export {name}: ONNX has no {op}{where} ({one_line(chain[-1])}). Compress it with "
        f"latency='torch', which needs no ONNX, or take what computes {op} out of the model"
    )


_OP = re.compile(r"OpOverload\(op='([\w.:]+)'|target=torch\.ops\.([\w.]+)\]")


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping) and example:
        return (), dict(example)
    if isinstance(example, (tuple, list)) and example:
        return tuple(example), {}
    raise InputError(f"example_input must be a tensor, a tuple or a dict of tensors, not {type(example).__name__}")


def _name_sizes(model: Any, free: FreeSizes) -> None:
    """Free sizes by the names that a person knows, in place of the exporter's symbols."""

    def sizes(value: Any) -> list[str]:
        return [d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim]

    shapes = [sizes(v) for v in model.graph.input]
    for n, d, name in ((n, d, name) for n, dims in free.dims.items() for d, name in dims.items()):
        if shapes[n][d].isdecimal():
            raise ExportError(
                f"torch.export takes the {name} of input {model.graph.input[n].name} for the number {shapes[n][d]}: "
                "something in the network depends on it (how many parts a split has, say). Export it without that size"
            )
    symbols = free.renamed(shapes) if free.dims else {}
    symbols = {old: new for old, new in symbols.items() if old.isidentifier() and old != new}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output) if symbols else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), dim.dim_param)


def _check(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    file: Path,
    tolerance: float,
    others: Sequence[tuple[str, Example]] = (),
) -> None:
    """Runs ONNX Runtime on the example, on a random input and on `others`, inputs of other sizes; raises `ExportError`
    with the worst difference."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            f"checking the exported file needs onnxruntime, which cannot be imported ({error}); "
            'pip install "lmfx[ort]", or pass check=False'
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot load the exported network: {one_line(error)}; pass check=False for another runtime"
        ) from error
    generator = torch.Generator().manual_seed(0)
    random = tuple(_redraw(a, generator) for a in args), {k: _redraw(v, generator) for k, v in kwargs.items()}
    for what, (new_args, new_kwargs) in [("the example input", (args, kwargs)), ("a random input", random), *others]:
        with torch.no_grad():
            expected = _leaves(net(*new_args, **new_kwargs))
        # constants that are not tensors are baked into the graph, so inputs are matched among the tensors
        named = {i.name for i in session.get_inputs()}
        feed = {k: v for k, v in new_kwargs.items() if k in named}
        rest = [n.name for n in session.get_inputs() if n.name not in feed]
        positional = [t for t in _leaves((*new_args, *(v for k, v in new_kwargs.items() if k not in feed)))]
        if len(rest) != len(positional):
            raise ExportError(
                f"the exported network takes inputs {sorted(named)}, and {len(positional)} were given: report this"
            )
        feed |= dict(zip(rest, positional, strict=True))
        try:
            got = session.run(None, {k: v.detach().cpu().numpy() for k, v in feed.items()})
        except Exception as error:  # ONNX Runtime has errors of its own, all of them about this file
            raise ExportError(
                f"ONNX Runtime cannot run the exported network on {what}: {one_line(error)}; no file was written. "
                "Pass check=False for another runtime"
            ) from error
        if len(got) != len(expected):
            raise ExportError(f"the exported network has {len(got)} outputs, torch {len(expected)}: please report this")
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            error_seen = _relative(a, b.detach().cpu().double().numpy())
            if not error_seen <= tolerance:
                raise ExportError(
                    f"ONNX Runtime and torch differ by {error_seen:.3g} (relative) in output {i} on {what}, more than "
                    f"the tolerance {tolerance:g}; no file was written. Raise `tolerance` if the network is "
                    "ill-conditioned, or report this"
                )


def _redraw(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator).to(value)


def _leaves(value: Any) -> list[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(plain_output(value))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _relative(got: Any, expected: Any) -> float:
    got = np.asarray(got, dtype=np.float64)
    if got.shape != expected.shape:
        return float("inf")
    if not got.size:
        return 0.0
    scale = float(np.abs(expected).max())
    return float(np.abs(got - expected).max()) / (scale if scale > 0 else 1.0)
