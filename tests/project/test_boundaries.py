"""Who may import whom, and which names are public. These are promises of the layout, kept by machine."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSES = sorted((ROOT / "passes").rglob("*.py"))
# A folder imports only folders before it. `errors`, `html_text` and `ir` stand before all.
STAGES = ("model", "graph", "identity", "algebra", "fit", "canonical", "trace", "spans", "solve", "rewrite")
OPTIONAL = (
    "accelerate",
    "dask",
    "diffusers",
    "distributed",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torch_pruning",
    "torchvision",
)

# Every public function and the parameters that a caller may rely on, from the design's public face.
PUBLIC = {
    "build_engine": {"onnx_path", "engine_path", "target"},
    "compress": {
        "model",
        "example_input",
        "budget",
        "calibration",
        "latency",
        "importance",
        "realize",
        "max_kernel_size",
        "include",
        "exclude",
        "executor",
        "cache_dir",
        "merge",
        "progress",
    },
    "distill": {"student", "teacher", "batches", "epochs", "lr", "progress"},
    "export_onnx": {"example_input", "dynamic_batch", "dynamic_shapes"},
    "export_program": {"example_input", "dynamic_batch", "dynamic_shapes"},
    "load": {"model"},
    "merge": set(),
    "merge_siblings": set(),
    "profile": {"graph", "backend"},
    "recover": {"student", "model", "images", "minutes", "steps", "progress"},
    "report": set(),
    "rewrite": {"graph", "plan"},
    "save": set(),
    "score": {"graph", "estimator", "calibration"},
    "simplify": {"model", "example_input", "include", "exclude"},
    "solve": {"graph"},
    "spans": set(),
    "trace": {"model", "example_input"},
}
CLASSES = ("Budget", "BudgetError", "Candidate", "InfeasibleBudget", "LmfxError", "MergePlan", "Refusal")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import in a file, also those inside functions; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


# What `note_value` and its like write into `node.meta`: read and written through `passes/graph/node_facts.py` alone.
NODE_FACTS = {"shape", "dtype", "device", "floating", "same", "path", "leaf", "call"}


def node_facts_touched(source: str) -> list[int]:
    """The lines that read or write a node fact by its key, or by a key that is not plain to see."""

    def is_meta(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "meta"

    def is_fact(key: ast.AST | None) -> bool:
        if isinstance(key, ast.Constant):
            return key.value in NODE_FACTS
        return not (isinstance(key, ast.Name) and key.id.isupper())  # a constant of the file: the key of a graph

    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and is_meta(node.value):
            keys: list[ast.AST | None] = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_meta(node.func.value):
            keys = list(node.args[:1])
        elif isinstance(node, ast.Assign) and any(is_meta(t) for t in node.targets):
            keys = [k for d in ast.walk(node.value) if isinstance(d, ast.Dict) for k in d.keys if k is not None]
        else:
            continue
        lines += [node.lineno for key in keys if is_fact(key)]  # type: ignore[attr-defined]
    return sorted(lines)


def closure(path: Path, seen: set[Path]) -> set[Path]:
    """The file and every file of passes/ that it imports, directly or not."""
    if path not in seen and path.exists():
        seen.add(path)
        for level, module in imports(path):
            if level:
                target = path.parents[level - 1].joinpath(*module.split("."))
                closure(target.with_suffix(".py"), seen)
                closure(target / "__init__.py", seen)
    return seen


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.mark.parametrize("path", PASSES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pass_imports_only_torch_numpy_the_standard_library_and_its_siblings(path: Path) -> None:
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    for level, module in imports(path):
        depth = len(path.relative_to(ROOT).parts)
        assert level < depth, f"{path.name} reaches out of passes/ with a relative import of {module}"
        if level == 0:
            assert module.split(".")[0] in allowed, f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", STAGES)
def test_a_stage_imports_only_stages_before_it(folder: str) -> None:
    files = sorted((ROOT / "passes" / folder).glob("*.py"))
    assert 2 <= len(files) <= 16, f"passes/{folder} has {len(files)} files"
    for path in files:
        for level, module in imports(path):
            if level == 2 and (first := module.split(".")[0]) in STAGES:
                assert STAGES.index(first) < STAGES.index(folder), f"{folder}/{path.name} imports {module}"


def test_every_stage_is_a_folder_and_every_folder_a_stage() -> None:
    assert sorted(STAGES) == sorted(p.name for p in (ROOT / "passes").iterdir() if (p / "__init__.py").exists())
    assert {p.name for p in (ROOT / "passes").glob("*.py")} == {"__init__.py", "errors.py", "html_text.py", "ir.py"}


@pytest.mark.parametrize(
    "line", ['n.meta["shape"]', 'n.meta.get("path", "")', "n.meta.get(key)", 'n.meta = {**o.meta, "call": 1}']
)
def test_a_node_fact_that_is_read_or_written_by_its_key_is_seen(line: str) -> None:
    assert node_facts_touched(f"x = 1\n{line}\n") == [2]


@pytest.mark.parametrize(
    "line", ['gm.meta.get("lmfx_spans")', "gm.meta[_KEY]", "made.meta = {**gm.meta}", 'n.meta["val"]']
)
def test_what_is_known_of_a_graph_is_no_node_fact(line: str) -> None:
    assert node_facts_touched(line) == []


def test_only_one_file_knows_the_keys_of_node_facts() -> None:
    files = [*PASSES, *(p for p in (ROOT / "lmfx").rglob("*.py") if "passes" not in p.relative_to(ROOT / "lmfx").parts)]
    files += sorted((ROOT / "benchmarks").rglob("*.py"))
    touched = {str(p.relative_to(ROOT)): node_facts_touched(p.read_text(encoding="utf-8")) for p in files}
    assert touched.pop("passes/graph/node_facts.py")
    assert len(touched) > 250
    assert {path: lines for path, lines in touched.items() if lines} == {}


def test_the_solver_and_all_that_it_imports_know_no_torch() -> None:
    for path in closure(ROOT / "passes" / "solve" / "dynamic_program.py", set()):
        assert "torch" not in {module.split(".")[0] for _, module in imports(path)}, path.name
    assert closure(ROOT / "passes" / "solve" / "dynamic_program.py", set()), "passes/solve/dynamic_program.py is gone"


def test_importing_lmfx_imports_no_optional_dependency() -> None:
    loaded = set(json.loads(run("import lmfx, json, sys; print(json.dumps(list(sys.modules)))")))
    assert "torch" in loaded
    assert not loaded.intersection(OPTIONAL)


def test_importing_every_module_imports_no_optional_dependency_and_hides_no_public_name() -> None:
    # `lmfx.report` is a function and a package: the import of a submodule must not put the package in its place.
    code = """
import importlib, json, pkgutil, sys
import lmfx
for module in pkgutil.walk_packages(lmfx.__path__, "lmfx."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps([list(sys.modules), [name for name in lmfx.__all__ if isinstance(getattr(lmfx, name), type(sys))]]))
"""
    loaded, modules = json.loads(run(code))
    assert not set(loaded).intersection(OPTIONAL)
    assert modules == []


def test_importing_lmfx_prints_and_warns_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lmfx", "-c", "import lmfx"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == ""
    assert done.stderr == ""


def test_the_public_names_are_there_and_documented() -> None:
    lmfx = importlib.import_module("lmfx")
    for name in (*PUBLIC, *CLASSES):
        assert name in lmfx.__all__, f"lmfx.{name} is not in __all__"
        assert inspect.getdoc(getattr(lmfx, name)), f"lmfx.{name} has no docstring"
    assert isinstance(lmfx.__version__, str)


def test_all_names_that_are_announced_exist() -> None:
    lmfx = importlib.import_module("lmfx")
    assert [name for name in lmfx.__all__ if not hasattr(lmfx, name)] == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_function_takes_what_the_design_says(name: str) -> None:
    function = getattr(importlib.import_module("lmfx"), name)
    assert callable(function)
    missing = PUBLIC[name] - set(inspect.signature(function).parameters)
    assert not missing, f"lmfx.{name} lacks {sorted(missing)}"


def test_every_error_is_an_lmfx_error_and_public() -> None:
    lmfx = importlib.import_module("lmfx")
    errors = importlib.import_module("lmfx.passes.errors")
    made = {n for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == errors.__name__}
    assert made == set(errors.__all__) and len(made) > 10
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), lmfx.LmfxError)
        assert name in lmfx.__all__, f"a caller cannot catch lmfx.{name}"


def test_passes_is_one_package_with_one_name() -> None:
    # Imported twice, under two names, a class would not be equal to itself.
    assert importlib.util.find_spec("lmfx.passes") is not None
    names = {module.name for module in pkgutil.iter_modules([str(ROOT / "passes")])}
    assert {"ir", "errors"} <= names
    assert (ROOT / "lmfx" / "passes").resolve() == ROOT / "passes"
