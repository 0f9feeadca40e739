"""The notebook runs from its first cell to its last, and what its cells end in shows itself as HTML.

It is run without Jupyter: a notebook is JSON, and its cells are Python.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"
HTML = {"SpanSet", "LatencyTable", "ImportanceTable", "Frontier", "MergePlan", "Result", "Refusal"}


def sources() -> list[str]:
    """The code of the notebook, a text a cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(source: str, number: int, namespace: dict[str, Any]) -> Any:
    """Runs a cell as a notebook does: the value of its last expression is what it shows."""
    tree = ast.parse(source, f"{NOTEBOOK.name}, cell {number}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), f"{NOTEBOOK.name}, cell {number}", "eval"), namespace)


def test_the_notebook_runs_and_its_values_show_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMFX_CACHE_DIR", str(tmp_path / "cache"))
    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    shown = [run(source, i, namespace) for i, source in enumerate(sources())]
    seen = {type(value).__name__ for value in shown if hasattr(value, "_repr_html_")}
    assert seen >= HTML
    assert all("<" in value._repr_html_() for value in shown if type(value).__name__ in HTML)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )
    assert len({cell["id"] for cell in cells}) == len(cells)
