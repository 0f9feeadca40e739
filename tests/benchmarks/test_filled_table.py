"""The table that a script fills: what is there stays, what is missing is made, what failed says why."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shared.filled_table import fill_table
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = ("model", "family", "error", "note")
FAMILIES = {"a/one": "first", "b/two": "second", "b/three": "second"}


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def made(name: str) -> dict[str, Any]:
    return {"error": 0.5, "note": f"of\n  {name}"}


def filled(table: Path, row_of: Any, *options: str) -> list[dict[str, str]]:
    fill_table("", Path("elsewhere.csv"), FIELDS, FAMILIES, row_of, (ValueError,), ["--table", str(table), *options])
    return rows(table)


def test_a_table_has_a_row_for_each_network_with_its_family_and_a_note_in_one_line(tmp_path: Path) -> None:
    found = filled(tmp_path / "t.csv", made)
    assert [(r["model"], r["family"]) for r in found] == list(FAMILIES.items())
    assert found[0]["note"] == "of a/one" and found[0]["error"] == "0.5"


def test_a_row_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def row_of(name: str) -> dict[str, Any]:
        asked.append(name)
        return made(name)

    assert len(filled(tmp_path / "t.csv", row_of, "--models", "b/*")) == 2
    assert [r["model"] for r in filled(tmp_path / "t.csv", row_of)] == ["b/two", "b/three", "a/one"]
    assert asked == ["b/two", "b/three", "a/one"]


def test_a_network_that_fails_as_expected_has_its_error_as_a_note_and_the_others_go_on(tmp_path: Path) -> None:
    def row_of(name: str) -> dict[str, Any]:
        if name == "b/two":
            raise ValueError("too\nsmall")
        return made(name)

    found = filled(tmp_path / "t.csv", row_of)
    assert [r["note"] for r in found] == ["of a/one", "ValueError: too small", "of b/three"]
    assert found[1]["family"] == "second" and not found[1]["error"]


def test_an_error_that_nobody_expects_ends_it_and_the_rows_before_it_are_kept(tmp_path: Path) -> None:
    def row_of(name: str) -> dict[str, Any]:
        if name == "b/two":
            raise KeyError(name)
        return made(name)

    with pytest.raises(KeyError):
        filled(tmp_path / "t.csv", row_of)
    assert [r["model"] for r in rows(tmp_path / "t.csv")] == ["a/one"]
