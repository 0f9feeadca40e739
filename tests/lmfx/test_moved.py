"""Module names of before the folders still lead to what they named, and no new code uses them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.moved import MOVED, NAMES, OldModule

ROOT = Path(__file__).resolve().parents[2]
# The modules below lmfx/ at commit 9f219ea that are no more today: `git ls-tree -r --name-only 9f219ea lmfx passes`.
OLD = (
    "averaging calibration carried checks cli cli_cache cli_inputs cli_options distill fitting frontier models "
    "objectives on_demand plan_json profiling progress search store surrogates training_state values wholes "
    "workloads export.atomic latency.base latency.cache latency.claims latency.cuda latency.gpu latency.host "
    "latency.layout latency.onnxruntime latency.roofline latency.rounds latency.share latency.store "
    "latency.store_file latency.store_schema latency.tensorrt latency.torch_backend passes.after "
    "passes.arithmetic passes.bare passes.canonical passes.cats passes.cg passes.configs passes.copies "
    "passes.exported passes.fit passes.fold passes.functional passes.gram passes.inplace passes.interface "
    "passes.layers passes.layouts passes.linear passes.linear_op passes.linear_span passes.modules passes.nodes "
    "passes.norms passes.observed passes.ops passes.pareto passes.placing passes.reduction passes.regions "
    "passes.rewrite passes.selections passes.shape_tracer passes.shapes passes.siblings passes.sides passes.solve "
    "passes.spans passes.states passes.systems passes.trace passes.tracers passes.transposed passes.verify"
)
# A name of each kind: alone, of several homes, renamed, of a module that is a package now, private, a method's class.
FOUND = {
    "profiling": ("profile_spans", "lmfx.latency.profiling"),
    "search": ("find_plan", "lmfx.planning.search"),
    "wholes": ("_key", "lmfx.latency.whole_networks"),
    "latency.roofline": ("RooflineBackend", "lmfx.latency.backends.roofline"),
    "latency.store": ("identity_hash", "lmfx.store.row_files"),
    "latency.table": ("Calibration", "lmfx.latency.table"),
    "latency": ("Calibration", "lmfx.latency.table"),
    "calibration": ("as_calibration", "lmfx.calibration.images"),
    "store": ("save", "lmfx.planning.saved_networks"),
    "distill": ("distill", "lmfx.training.distillation"),
    "cli": ("main", "lmfx.cli.command_line"),
    "cli.main": ("main", "lmfx.cli.command_line"),
    "importance.change": ("Judging", "lmfx.calibration.divergence"),
    "passes.layers": ("Network", "lmfx.passes.spans.layers"),
    "passes.trace": ("fingerprint", "lmfx.passes.identity.fingerprint"),
    "passes.rewrite": ("merge", "lmfx.passes.rewrite.trainable"),
    "passes.solve": ("Frontier", "lmfx.passes.solve.dynamic_program"),
    "passes.fit": ("solve", "lmfx.passes.fit.closed_form"),
}


def test_every_module_of_before_the_folders_can_be_imported() -> None:
    assert {name for name in OLD.split() if name != "cli"} <= MOVED.keys()
    for name in OLD.split():
        assert importlib.import_module(f"lmfx.{name}").__name__ == f"lmfx.{name}"


def test_every_home_exists_and_has_names() -> None:
    for home in sorted({home for homes in MOVED.values() for home in homes}):
        assert importlib.import_module(f"lmfx.{home}").__all__, home
    for stands in NAMES.values():
        if isinstance(stands, tuple):
            assert hasattr(importlib.import_module(f"lmfx.{stands[0]}"), stands[1])


@pytest.mark.parametrize("module", sorted(FOUND))
def test_a_name_of_an_old_module_is_the_one_of_today(module: str) -> None:
    name, home = FOUND[module]
    found = getattr(importlib.import_module(f"lmfx.{module}"), name)
    assert found.__module__ == home


def test_an_old_module_is_found_below_its_package_without_an_import_of_its_own() -> None:
    code = "import lmfx; print(lmfx.profiling.digest.__module__, lmfx.passes.layers.Network.__module__)"
    told = run(code + "; from lmfx.latency import cache; print(cache.prune.__module__)")
    assert told.split() == ["lmfx.latency.profiling", "lmfx.passes.spans.layers", "lmfx.store.transfer"]


def test_an_old_name_that_warns_nobody_works_where_every_warning_is_an_error() -> None:
    assert run("import lmfx.search; print(lmfx.search.find_plan.__name__)", "-W", "error") == "find_plan\n"


def test_importing_lmfx_imports_nothing_for_the_sake_of_old_names() -> None:
    code = "import sys, lmfx; print('lmfx.cli.models' in sys.modules, 'lmfx.latency.backends.cuda' in sys.modules)"
    assert run(code) == "False False\n"


def run(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_what_is_patched_in_an_old_module_is_patched_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    search = importlib.import_module("lmfx.planning.search")
    before = search.ACCEPT
    with monkeypatch.context() as patched:
        patched.setattr("lmfx.search.ACCEPT", 0.5)
        assert search.ACCEPT == 0.5
    assert before == search.ACCEPT


@pytest.mark.parametrize("module", ["search", "passes.trace", "latency", "passes", ""])
def test_a_name_that_never_was_is_no_attribute(module: str) -> None:
    found = importlib.import_module(f"lmfx.{module}".rstrip("."))
    with pytest.raises(AttributeError, match="no_such_name"):
        found.no_such_name  # noqa: B018
    assert not hasattr(found, "__no_such_thing__")


def test_a_name_that_is_no_more_says_where_its_neighbours_are() -> None:
    with pytest.raises(AttributeError, match=r"lmfx\.passes\.graph\.verify"):
        importlib.import_module("lmfx.passes.verify").check_equivalent  # noqa: B018


def test_no_public_name_is_hidden_by_an_old_module_of_that_name() -> None:
    importlib.import_module("lmfx.distill")
    assert callable(lmfx.distill) and not isinstance(lmfx.distill, OldModule)
    assert not any(isinstance(getattr(lmfx, name), OldModule) for name in lmfx.__all__)
    assert not {"profiling", "search", "wholes"} & set(dir(lmfx))


def test_an_old_module_lists_the_names_of_its_homes() -> None:
    assert {"find_plan", "ACCEPT"} <= set(dir(importlib.import_module("lmfx.search")))


def test_nothing_in_the_project_uses_an_old_name() -> None:
    gone = {f"lmfx.{name}" for name in MOVED if isinstance(sys.modules.get(f"lmfx.{name}"), OldModule)}
    assert len(gone) > 70
    gone -= {"lmfx.cli.main"}  # `from lmfx.cli import main` takes the function of that name
    used = []
    for path in (p for folder in ("lmfx", "benchmarks", "examples", "tests") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used += [(path.name, alias.name) for alias in node.names if alias.name in gone]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                used += [(path.name, name) for name in names & gone]
    assert used == []


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.pow(self.conv(x), self.factor)


def test_the_facts_of_a_graph_can_be_asked_for_by_their_names() -> None:
    facts: Any = lmfx.trace(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.zeros(1, 3, 8, 8)).meta["lmfx"]
    assert facts["tracer"] == facts.tracer == "symbolic" and facts["opaque"] == {}
    with pytest.raises(KeyError, match="result_of"):
        facts["result"]
    with pytest.raises(KeyError):
        facts["__class__"]


def test_digests_of_weights_tell_graphs_apart() -> None:
    digest = importlib.import_module("lmfx.importance.base").weights_digest
    torch.manual_seed(0)
    model = Scale(2.0).eval()
    graph = lmfx.trace(model, torch.rand(1, 3, 8, 8))
    model.factor = 3.0
    other = lmfx.trace(model, torch.rand(1, 3, 8, 8))
    assert digest(graph) == digest(graph) != digest(other)
