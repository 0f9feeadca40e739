"""Makes a module of a `torch.export.ExportedProgram`: a canonical graph under the names of the model it came from.

    program                                                      module
    %w = placeholder p_layer_conv_weight                         %c = call_module[layer.conv](%x)     nn.Conv2d
    %c = conv2d(%x, %w, None, [1, 1], [1, 1])           ->       %b = call_module[layer.bn](%c)       nn.BatchNorm2d
    %b = batch_norm(%c, ..., False, 0.1, 1e-05)

Parameters and buffers are the program's own tensors, not copies. Programs of torch's core ops (`run_decompositions`)
are put together again (`canonical.decomposed`). The module is compared with the program on the program's own example.

What the program refuses the module refuses as well, by a `SizeError` (`program_sizes`).

A program that was exported in training mode has no eval mode to go to, and is refused; so is control flow that depends
on data, and a program that is quantized.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..canonical.decomposed import recompose
from ..errors import ModelError, TraceError
from ..model.interface import Binding, Example, ModelCodeGen, strip
from ..model.quiet import quiet, tracing
from ..model.size_limits import set_conditions, set_limits
from ..model.trace_facts import note
from .exported import erase_checks, name_inputs, name_paths, rooted
from .program_sizes import LEAST, sizes_of_program
from .tracers import Traced, first_line
from .tracing import graph_of

__all__ = ["Model", "as_module", "example_of_program", "is_program", "module_of_program"]

Model = nn.Module | torch.export.ExportedProgram
"""What is compressed: a module, or what torch.export made of one."""

_NORMS = frozenset({"batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit"})
_TRAINING_NORMS = frozenset({"_native_batch_norm_legit_functional", "_batch_norm_with_update"})
_DROPOUTS = frozenset({"dropout", "native_dropout", "feature_dropout", "alpha_dropout"})


def is_program(value: Any) -> bool:
    """Whether a value is what torch.export.export gives."""
    kind = type(value)
    return kind.__name__ == "ExportedProgram" and kind.__module__.startswith("torch.export")


def as_module(model: Model) -> nn.Module:
    """A module as it is, and the one that an exported program is."""
    if isinstance(model, nn.Module):
        return model
    other: Any = module_of_program(model) if is_program(model) else model
    return other  # what is no model is for the caller to refuse


def module_of_program(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The module that computes what `program` computes, in eval mode, with the program's tensors and names.

    Raises `ModelError` for a program that cannot be compressed, `TraceError` if the module is not the same function.
    """
    _refuse(program)
    try:
        with quiet(), tracing(), torch.no_grad():
            bare = _without_guards(program)
            exported: Any = bare.run_decompositions({}).module()
            reference: Any = bare.module()
    except Exception as error:  # torch may fail in any way on what it exported, or what an older version saved
        raise ModelError(
            f"torch cannot make a module of this exported program ({type(error).__name__}: {first_line(error)}): "
            "export the model again with this version of torch, or pass the model itself"
        ) from error
    example = example_of_program(program)
    graph: fx.Graph = exported.graph
    erase_checks(graph)
    binding = _faced(graph, example, _names(exported), exported._out_spec)
    recompose(graph)
    name_paths(graph, {}, str)
    raw = fx.GraphModule(rooted(exported, graph, {}, ""), graph, _class_name(program))
    with quiet(), torch.no_grad():
        args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
        gm, _ = graph_of("export", Traced(raw, {}), example, reference(*args, **kwargs))
    gm.train(False)
    note(gm, None)  # it is a model like any other, that somebody may trace
    limits, conditions = sizes_of_program(program, binding)
    set_limits(gm, limits)
    set_conditions(gm, conditions)
    return gm


def _without_guards(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without its guards: text, from a file perhaps, that torch would run as it stands."""
    bare = copy.copy(program)
    if hasattr(bare, "_guards_code"):
        bare._guards_code = []
    return bare


# --- what is refused --------------------------------------------------------------------------------------------------


def _refuse(program: torch.export.ExportedProgram) -> None:
    for graph in (m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                space, _, name = node.target._schema.name.partition("::")
                if _trains(name, node):
                    raise ModelError(
                        f"the program was exported in training mode ({name} of {_place(node)}): "
                        "export it in eval mode, torch.export.export(model.eval(), ...)"
                    )
                if space.startswith("quantized"):
                    raise ModelError(
                        f"the program is quantized ({node.name}): compress the floating-point program and quantize the "
                        "result"
                    )
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                _refuse_higher(str(node.target), node)


def _refuse_higher(name: str, node: fx.Node) -> None:
    if name == "wrap_with_autocast":
        raise ModelError(
            f"the program has an autocast region ({node.name}): export the model without it, and run the result under "
            "torch.autocast instead"
        )
    if name != "wrap_with_set_grad_enabled":
        raise ModelError(
            f"the program has control flow of its own ({node.name}, {name}), which no runtime merges: export the part "
            "of the model without it"
        )


def _place(node: fx.Node) -> str:
    """The path of the module that a node came from, or the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or node.name


def _trains(name: str, node: fx.Node) -> bool:
    """Whether a node is what only a model in training mode computes."""
    if name in _TRAINING_NORMS:
        return True
    if name in _NORMS:  # a norm without running statistics uses the batch's in eval mode, too
        return len(node.args) > 5 and node.args[5] is True and node.args[3] is not None
    p: Any = node.args[1] if name in _DROPOUTS and len(node.args) > 1 else 0
    return bool(p) and len(node.args) > 2 and node.args[2] is True


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def example_of_program(program: torch.export.ExportedProgram) -> Example:
    """What the program was exported with, or noise of that form where a file does not have it."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return tuple(args), dict(kwargs)
    generator = torch.Generator().manual_seed(0)
    wanted = set(program.graph_signature.user_inputs)
    leaves = [
        _drawn(n.meta["val"], generator) for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted
    ]
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _drawn(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = [n if isinstance(n, int) else n.node.hint if n.node.has_hint() else LEAST for n in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype).to(value.device)
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


def _names(exported: Any) -> list[str]:
    """The names of the arguments, positional ones first."""
    return list(exported.graph._codegen.pytree_info.orig_args)


def _faced(graph: fx.Graph, example: Example, names: list[str], out_spec: Any) -> Binding:
    """Give a flat graph one placeholder for each argument, and its output in the model's own containers."""
    args, kwargs = example
    keyword = inspect.Parameter.KEYWORD_ONLY
    places = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names[: len(args)]]
    signature = inspect.Signature([*places, *(inspect.Parameter(n, keyword) for n in names[len(args) :])])
    given = dict(zip(names, (*args, *kwargs.values()), strict=True))
    leaves = pytree.tree_leaves(example)
    flat = [n for n in graph.nodes if n.op == "placeholder"]
    if len(flat) != len(leaves):
        raise TraceError(f"torch.export gave a graph of {len(flat)} inputs for {len(leaves)} values")
    for node, leaf in list(zip(flat, leaves, strict=True)):
        if not isinstance(leaf, Tensor):
            if node.users:
                raise ModelError(
                    f"the program takes the number {node.name} as an input: export it with this number as a constant"
                )
            graph.erase_node(node)
    tensors = [n for n, leaf in zip(flat, leaves, strict=True) if isinstance(leaf, Tensor)]
    fixed = name_inputs(graph, tensors, given)
    output = next(n for n in graph.nodes if n.op == "output")
    plain, structure = strip(pytree.tree_unflatten(list(output.args[0]), out_spec))
    output.args = (plain,)
    binding = Binding(signature, given, given, {})
    graph.set_codegen(ModelCodeGen(binding, fixed, structure))
    graph._tracer_cls = None  # unpickling would trace with it again, without a model
    return binding


def _class_name(program: torch.export.ExportedProgram) -> str:
    """The name of the class that was exported, which its ops came from."""
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = str(kind).rpartition(".")[2]
            if not path and name.isidentifier():
                return name
    return "ExportedProgram"
