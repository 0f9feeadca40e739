"""`export_program`: a network as a `torch.export.ExportedProgram` that has been run and compared at three sizes.

    net ── torch.export.export(dynamic_shapes=) ── program ── run beside net on the example and two other sizes

It is what torch.compile, AOTInductor, torch_tensorrt and ExecuTorch take, and lmfx itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmfx.environment.caller_state import entry, one_line
from lmfx.export.free_sizes import Dynamic, FreeSizes, dimension, free_sizes
from lmfx.export.specs import eval_mode
from lmfx.passes.errors import ExportError, InputError
from lmfx.passes.model.interface import Example, plain_face, plain_output
from lmfx.passes.model.quiet import quiet, tracing
from lmfx.passes.trace.tracing import example_arguments

__all__ = ["export_program"]

# What torch.export says of a network that branches on the number of images (`if len(x) >= 64`).
BATCH_OF_A_RANGE = "Constraints violated (batch)"


@entry
def export_program(
    net: nn.Module,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    dynamic_batch: bool = False,
    dynamic_shapes: Dynamic = False,
    tolerance: float = 1e-4,
) -> torch.export.ExportedProgram:
    """`net` in eval mode as an exported program; `torch.export.save(program, "net.pt2")` writes it.

    `example_input`, `dynamic_batch` and `dynamic_shapes` are those of `lmfx.export_onnx`: what is free, and where it is
    tried. A network that branches on the number of images has a program for those on the example's side of the branch,
    which refuses others. Outputs at each size may differ from the network's by `tolerance`, relative to the largest
    entry. The training mode of `net` is restored.

    Raises `ExportError` for a network that torch.export cannot export, that is right at one size only, or whose program
    gives something else.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"export_program takes a torch.nn.Module, not a {type(net).__name__}")
    example = example_arguments(example_input)
    with eval_mode(net), torch.no_grad():
        free = free_sizes(net, example, dynamic_batch, dynamic_shapes) or FreeSizes(shown=example)
        args, kwargs = free.shown

        def exported(of_dim: Callable[[str], Any]) -> torch.export.ExportedProgram:
            specs = free.specs(of_dim) if free.dims else None
            with quiet(), tracing():
                return torch.export.export(plain_face(net), args, kwargs, dynamic_shapes=specs, strict=False)

        try:
            try:
                program = exported(dimension)
            except Exception as error:
                if BATCH_OF_A_RANGE not in str(error):
                    raise
                program = exported(lambda name: torch.export.Dim.DYNAMIC)  # as many as the network takes alike
        except Exception as error:  # torch.export raises many kinds, all of them about this network
            raise ExportError(
                f"torch.export could not export {type(net).__name__}: {type(error).__name__}: {one_line(error)}; "
                "free fewer sizes, or export with lmfx.export_onnx"
            ) from error
        _compare(net, program.module(), [("the example", example), *free.trials], tolerance)
    return program


def _compare(net: nn.Module, module: Any, tried: Sequence[tuple[str, Example]], tolerance: float) -> None:
    """Raises `ExportError` where a program is not the network. Its guards may refuse all but two of the sizes: what
    they refuse nobody gets wrong."""
    refused = []
    for what, example in tried:
        expected = _run(net, example)
        try:
            seen = _run(module, example)
        except AssertionError as error:
            refused.append(f"{what}: {one_line(error)}")
            continue
        if len(expected) != len(seen) or any(_differ(a, b, tolerance) for a, b in zip(expected, seen, strict=True)):
            raise ExportError(
                f"the exported program and {type(net).__name__} differ on {what} by more than {tolerance:g} (relative)"
                ": please report this"
            )
    if len(tried) - len(refused) < min(2, len(tried)):
        raise ExportError(f"the exported program takes too few of the sizes that were tried ({'; '.join(refused)})")


def _run(net: Any, example: Example) -> list[Tensor]:
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    return [v for v in pytree.tree_leaves(plain_output(net(*args, **kwargs))) if isinstance(v, Tensor)]


def _differ(expected: Tensor, seen: Tensor, tolerance: float) -> bool:
    if expected.shape != seen.shape or expected.dtype != seen.dtype:
        return True
    if not expected.numel():
        return False
    a, b = expected.double(), seen.double()
    return not float((a - b).abs().max()) <= tolerance * (float(a.abs().max()) or 1.0)
