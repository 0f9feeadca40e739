"""Keeps the module names of before the folders: `import lmfx.profiling` finds `lmfx.latency.profiling`.

Until commit 9f219ea `lmfx/` and `passes/` were flat. Programs written then say `from lmfx.search import find_plan`; the
public names of lmfx never moved, but many of the modules did. `MOVED` is the table of the old modules:

    the module is no more    `sys.modules` has an `OldModule` by its name, which holds nothing and looks names up
    it is a package now,     the module itself gets a `__getattr__` for the names that moved out of it
    or lost names

A name is looked up in the new homes in their order, and imported then, not before. What is set on an old module is set
in the home of the name, so that a test may still patch it. Nothing of lmfx itself may import an old name
(`tests/lmfx/test_moved.py`), and no name that is given here hides one that is there.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import fx

__all__ = ["MOVED", "NAMES", "OldModule", "install"]

# Old module -> where its names are now, in the order of the search; below `lmfx.`.
MOVED: dict[str, tuple[str, ...]] = {
    "averaging": ("training.moving_average",),
    "calibration": ("calibration.images", "calibration.example_frame", "calibration.batch_reader"),
    "carried": ("latency.carried_table",),
    "checks": ("calibration.model_checks",),
    "cli.main": ("cli.command_line",),
    "cli_cache": ("cli.cache",),
    "cli_inputs": ("cli.inputs",),
    "cli_options": ("cli.options",),
    "distill": ("training.distillation", "training.option_checks"),
    "export.atomic": ("environment.atomic_files",),
    "fitting": ("calibration.fitting", "calibration.plan_fits"),
    "frontier": ("planning.frontier",),
    "importance.change": ("calibration.divergence",),
    "latency.base": ("latency.backend",),
    "latency.cache": ("store.transfer", "store.rows"),
    "latency.claims": ("store.claims",),
    "latency.cuda": ("latency.backends.cuda",),
    "latency.gpu": ("latency.backends.gpu_state",),
    "latency.host": ("environment.host",),
    "latency.layout": ("latency.blocked_layout",),
    "latency.onnxruntime": ("latency.backends.onnxruntime",),
    "latency.roofline": ("latency.backends.roofline",),
    "latency.rounds": ("latency.sampling",),
    "latency.share": ("store.shared_rows",),
    "latency.store": ("store.rows", "store.row_files", "store.claims"),
    "latency.store_file": ("store.row_files",),
    "latency.store_schema": ("store.row_files",),
    "latency.tensorrt": ("latency.backends.tensorrt",),
    "latency.torch_backend": ("latency.backends.torch_backend",),
    "models": ("cli.models",),
    "objectives": ("training.losses", "importance.objective"),
    "on_demand": ("importance.on_demand",),
    "plan_json": ("planning.plan_file",),
    "profiling": ("latency.profiling",),
    "progress": ("environment.progress",),
    "report.text": ("report.words",),
    "search": ("planning.search",),
    "store": ("planning.saved_networks", "planning.saved_files"),
    "surrogates": ("calibration.surrogates",),
    "training_state": ("training.checkpoints",),
    "values": ("calibration.recording",),
    "wholes": ("latency.whole_networks",),
    "workloads": ("latency.candidate_workloads",),
    "passes.after": ("passes.rewrite.added_activations",),
    "passes.arithmetic": ("passes.canonical.arithmetic",),
    "passes.bare": ("passes.graph.tensor_inputs",),
    "passes.canonical": ("passes.canonical.canonical_form", "passes.graph.raw_nodes", "passes.graph.graph_edit"),
    "passes.canonical.inplace": ("passes.trace.inplace",),
    "passes.cats": ("passes.canonical.cats",),
    "passes.cg": ("passes.fit.conjugate_gradients",),
    "passes.configs": ("passes.graph.conv_configs",),
    "passes.copies": ("passes.model.model_copy", "passes.model.computed_weights"),
    "passes.exported": ("passes.trace.exported",),
    "passes.fit": (
        *("passes.fit.closed_form", "passes.fit.gram", "passes.fit.normal_equations"),
        "passes.fit.conjugate_gradients",
    ),
    "passes.fold": ("passes.canonical.constants",),
    "passes.functional": ("passes.canonical.functional",),
    "passes.gram": ("passes.fit.gram",),
    "passes.inplace": ("passes.trace.inplace",),
    "passes.interface": ("passes.model.interface",),
    "passes.layers": ("passes.spans.layers",),
    "passes.layouts": ("passes.canonical.layouts",),
    "passes.linear": ("passes.algebra.linear", "passes.algebra.linear_op", "passes.graph.shapes"),
    "passes.linear_op": ("passes.algebra.linear_op",),
    "passes.linear_span": ("passes.algebra.linear_span",),
    "passes.modules": ("passes.graph.modules",),
    "passes.nodes": ("passes.graph.raw_nodes",),
    "passes.norms": ("passes.spans.moved_norms",),
    "passes.observed": ("passes.graph.map_shapes",),
    "passes.ops": ("passes.graph.ops", "passes.graph.modules"),
    "passes.pareto": ("passes.solve.pareto",),
    "passes.placing": ("passes.graph.graph_edit",),
    "passes.reduction": ("passes.graph.reduction",),
    "passes.regions": ("passes.spans.regions",),
    "passes.rewrite": ("passes.rewrite.trainable", "passes.rewrite.span_modules", "passes.algebra.linear_span"),
    "passes.selections": ("passes.canonical.selections", "passes.canonical.moved_positions"),
    "passes.shape_tracer": ("passes.trace.shape_tracer",),
    "passes.shapes": ("passes.graph.shapes",),
    "passes.siblings": ("passes.rewrite.siblings",),
    "passes.sides": ("passes.algebra.side_vectors",),
    "passes.solve": ("passes.solve.dynamic_program",),
    "passes.spans": ("passes.spans.enumeration", "passes.spans.span_options"),
    "passes.states": ("passes.spans.pruning",),
    "passes.systems": ("passes.fit.normal_equations",),
    "passes.trace": ("passes.trace.tracing", "passes.trace.annotation", "passes.identity.fingerprint"),
    "passes.tracers": ("passes.trace.tracers", "passes.trace.proxies"),
    "passes.transposed": ("passes.canonical.transposed", "passes.graph.ops"),
    "passes.verify": ("passes.graph.verify",),
}


def weights_digest(gm: fx.GraphModule) -> str:
    """What a graph is with all its values, as text; that of a graph of which it is not certain is like no other."""
    from lmfx.importance.base import weights_identity

    identity = weights_identity(gm)
    return identity.digest if identity.certain else f"{identity.digest}-{uuid.uuid4().hex}"


# Old module and name -> the module and the name of now, or what stands for it.
NAMES: dict[str, tuple[str, str] | Callable[..., Any]] = {
    "checks.check_graph": ("calibration.model_checks", "check_traced"),
    "importance.base.weights_digest": weights_digest,
    "latency.Calibration": ("latency.table", "CalibrationLine"),
    "latency.table.Calibration": ("latency.table", "CalibrationLine"),
    "plan_json.dumps": ("planning.plan_file", "document_text"),
    "plan_json.plan_to_dict": ("planning.plan_file", "make_document"),
    "values.placeholder_values": ("calibration.recording", "arguments_of"),
    "passes.linear_span.Chain": ("passes.algebra.linear_span", "AffineChain"),
    "passes.solve.Frontier": ("passes.solve.dynamic_program", "ParetoFrontier"),
}


class OldModule(ModuleType):
    """Stands by the name of a module that is no more, and gives what its new homes have."""

    def __init__(self, name: str) -> None:
        super().__init__(f"lmfx.{name}", f"The names that were here are in {', '.join(_homes(name))}.")
        self.__spec__ = ModuleSpec(self.__name__, None, origin="lmfx.moved")

    def __getattr__(self, name: str) -> Any:
        return _find(self.__name__.removeprefix("lmfx."), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            place = _home_of(self.__name__.removeprefix("lmfx."), name)
            self.__dict__.setdefault(f"__before_{name}", getattr(*place))
            setattr(*place, value)

    def __delattr__(self, name: str) -> None:
        """Puts back what was there before another value was set: so patches are undone."""
        place = _home_of(self.__name__.removeprefix("lmfx."), name)
        setattr(*place, self.__dict__.pop(f"__before_{name}"))

    def __dir__(self) -> list[str]:
        homes = [importlib.import_module(home) for home in _homes(self.__name__.removeprefix("lmfx."))]
        return sorted({name for home in homes for name in dir(home)})


def install() -> None:
    """Makes the old names known; called once, when all of lmfx that a caller imports by its name is there."""
    for old in MOVED:
        if f"lmfx.{old}" not in sys.modules:
            sys.modules[f"lmfx.{old}"] = OldModule(old)
    holders = {"", *MOVED, *(name.rpartition(".")[0] for name in (*MOVED, *NAMES))}
    for name in holders:
        module = sys.modules.get(f"lmfx.{name}" if name else "lmfx")
        if module is not None and not isinstance(module, OldModule):
            module.__dict__["__getattr__"] = _attributes_of(name)


def _attributes_of(module: str) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        found = sys.modules.get(f"lmfx.{module}.{name}" if module else f"lmfx.{name}")
        return found if isinstance(found, OldModule) else _find(module, name)

    return find


def _homes(module: str) -> list[str]:
    return [f"lmfx.{home}" for home in MOVED.get(module, ())]


def _find(module: str, name: str) -> Any:
    stands = NAMES.get(f"{module}.{name}")
    return stands if callable(stands) else getattr(*_home_of(module, name))


def _home_of(module: str, name: str) -> tuple[ModuleType, str]:
    """The module that has a name today, and the name there."""
    renamed = NAMES.get(f"{module}.{name}")
    if isinstance(renamed, tuple):
        return importlib.import_module(f"lmfx.{renamed[0]}"), renamed[1]
    if not name.startswith("__"):
        for home in _homes(module):
            found = importlib.import_module(home)
            if name in vars(found):
                return found, name
    where = f": look into {', '.join(_homes(module))}" if _homes(module) else ""
    raise AttributeError(f"module {f'lmfx.{module}'.rstrip('.')!r} has no attribute {name!r}{where}")
