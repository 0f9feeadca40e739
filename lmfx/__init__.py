"""lmfx: a depth compiler for convolutional networks.

    net = lmfx.compress(model, example_input, 0.6)     # merged, and measured to be within 60 % of the latency
    print(lmfx.report(net))

Importing lmfx imports torch and numpy and no optional backend.
"""

from lmfx import moved as _moved
from lmfx._version import __version__
from lmfx.budget import Budget
from lmfx.compress import compress
from lmfx.export import build_engine, export_onnx, export_program
from lmfx.importance import Finetune, ImportanceTable
from lmfx.importance.on_demand import OnDemand, score_on_demand
from lmfx.int8.quantize import quantize
from lmfx.int8.report import Int8Facts, Quantized
from lmfx.latency import LatencyTable, Measurement
from lmfx.passes.errors import (
    BudgetError,
    DeviceError,
    ExportError,
    InfeasibleBudget,
    InputError,
    LmfxError,
    MissingExtra,
    ModelError,
    OptionError,
    PlanError,
    QualityError,
    SizeError,
    StoreError,
    TableError,
    TraceError,
    VerifyError,
)
from lmfx.passes.ir import Candidate, MergePlan, Refusal
from lmfx.planning.alternatives import alternative
from lmfx.planning.frontier import Frontier
from lmfx.planning.plan_file import load_plan, save_plan
from lmfx.planning.saved_networks import load, save
from lmfx.quality import Quality, QualityWarning, compare
from lmfx.report import report
from lmfx.result import Alternative, Result, result_of
from lmfx.simplify import simplify
from lmfx.stages import merge, merge_siblings, profile, rewrite, score, solve, spans, trace
from lmfx.training.distillation import distill
from lmfx.training.recovery import recover

__all__ = [
    "Alternative",
    "Budget",
    "BudgetError",
    "Candidate",
    "DeviceError",
    "ExportError",
    "Finetune",
    "Frontier",
    "ImportanceTable",
    "InfeasibleBudget",
    "InputError",
    "Int8Facts",
    "LatencyTable",
    "LmfxError",
    "Measurement",
    "MergePlan",
    "MissingExtra",
    "ModelError",
    "OnDemand",
    "OptionError",
    "PlanError",
    "Quality",
    "QualityError",
    "QualityWarning",
    "Quantized",
    "Refusal",
    "Result",
    "SizeError",
    "StoreError",
    "TableError",
    "TraceError",
    "VerifyError",
    "__version__",
    "alternative",
    "build_engine",
    "compare",
    "compress",
    "distill",
    "export_onnx",
    "export_program",
    "load",
    "load_plan",
    "merge",
    "merge_siblings",
    "profile",
    "quantize",
    "recover",
    "report",
    "result_of",
    "rewrite",
    "save",
    "save_plan",
    "score",
    "score_on_demand",
    "simplify",
    "solve",
    "spans",
    "trace",
]

_moved.install()
