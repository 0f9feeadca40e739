"""`lmfx cache`: what the store holds is listed, carried to another machine, and pruned."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmfx.cli import main
from lmfx.passes.errors import OptionError, StoreError
from lmfx.store.rows import Store
from lmfx.store.transfer import EVERYTHING, Imported, Selection, entries, export_rows, import_rows, prune

CPU = {
    "backend": "onnxruntime",
    "version": "1.30.0",
    "device": "Fast CPU (family 6)",
    "threads": 1,
    "layout": "network",
}
OLD = {**CPU, "version": "1.20.0"}
GPU = {"backend": "torch", "version": "2.14.1", "device": "Big GPU", "threads": 1}
SCORES = {"estimator": "reconstruction", "version": 3, "weights": "0123456789abcdef"}
DAY = 86400.0


def latency(ms: float) -> dict[str, Any]:
    return {"ms": ms, "spread": 0.01, "n": 5, "device": "", "backend": "", "quality": "full", "conditions": {}}


def filled(folder: Path) -> Store:
    """Three days ago 2 rows of another version, now 3 of a CPU, 2 of a GPU and 4 scores."""
    store = Store.open(folder)
    for identity, name, count in ((OLD, "old", 2), (CPU, "cpu", 3), (GPU, "gpu", 2)):
        store.put("sentinel", identity, "reference", 0.5)
        for i in range(count):
            store.put("latency", identity, f"{name}{i}", latency(i + 0.5))
    for i in range(4):
        store.put("importance", SCORES, f"score{i}", -float(i))
    for row in store.rows():
        if row.about == OLD:
            store.add(replace(row, made=row.made - 3 * DAY))
    return store


def everything(store: Store) -> dict[tuple[str, str], Any]:
    return {(row.kind, row.key): row.value for row in store.rows() if row.kind != "sentinel"}


def test_what_the_store_holds_is_listed_by_identity_newest_first(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        listed = entries(store)
        assert [(e.kind, e.identity, e.rows) for e in listed] == [
            ("importance", SCORES, 4),
            ("latency", GPU, 2),
            ("latency", CPU, 3),
            ("latency", OLD, 2),
        ]
        assert all(e.bytes > 0 and e.oldest <= e.newest <= time.time() for e in listed)
        assert time.time() - listed[-1].newest > 2.9 * DAY


@pytest.mark.parametrize(
    ("selection", "keys"),
    [
        (EVERYTHING, {"old0", "old1", "cpu0", "cpu1", "cpu2", "gpu0", "gpu1", "score0", "score1", "score2", "score3"}),
        (Selection(backend="onnxruntime"), {"old0", "old1", "cpu0", "cpu1", "cpu2"}),
        (Selection(backend="onnxruntime", version="1.30.0"), {"cpu0", "cpu1", "cpu2"}),
        (Selection(device="big"), {"gpu0", "gpu1"}),
        (Selection(kind="importance"), {"score0", "score1", "score2", "score3"}),
        (Selection(backend="reconstruction", version="3"), {"score0", "score1", "score2", "score3"}),
        (Selection(older_than=2), {"old0", "old1"}),
        (Selection(older_than=2, kind="importance"), set()),
        (Selection(backend="tensorrt"), set()),
    ],
)
def test_a_selection_is_what_is_listed_exported_and_pruned(
    tmp_path: Path, selection: Selection, keys: set[str]
) -> None:
    with filled(tmp_path) as store:
        before = everything(store)
        assert sum(e.rows for e in entries(store, selection)) == len(keys)
        if keys:
            export_rows(store, tmp_path / "rows.json", selection)
            exported = json.loads((tmp_path / "rows.json").read_text())
            assert {row["key"] for row in exported["rows"] if row["kind"] != "sentinel"} == keys
            assert set(exported["identities"]) == {row["identity"] for row in exported["rows"]}
        else:
            with pytest.raises(StoreError, match="no such rows"):
                export_rows(store, tmp_path / "rows.json", selection)
        assert prune(store, selection, dry_run=True) == (len(keys), 0) and everything(store) == before
        assert prune(store, selection)[0] == len(keys)
        assert everything(store) == {k: v for k, v in before.items() if k[1] not in keys}


def test_an_exported_store_is_the_same_after_import_in_another_place(tmp_path: Path) -> None:
    with filled(tmp_path) as store, Store.open(tmp_path / "there") as there:
        assert export_rows(store, tmp_path / "rows.json") == 14
        assert import_rows(there, tmp_path / "rows.json") == Imported(14, 0, 0)
        assert everything(there) == everything(store)
        assert [e for e in entries(there)] == entries(store)
        assert there.get("sentinel", CPU, "reference") == 0.5
        assert there.get_many("latency", CPU) == store.get_many("latency", CPU) != {}
        assert there.times_put() == {}, "nothing was measured there"
        assert import_rows(there, tmp_path / "rows.json") == Imported(0, 14, 0)


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        export_rows(store, tmp_path / "rows.json", Selection(backend="torch"))
        store.put("latency", GPU, "gpu0", latency(9.0))
        prune(store, Selection(kind="importance"))
        assert import_rows(store, tmp_path / "rows.json") == Imported(0, 3, 1)
        assert store.get("latency", GPU, "gpu0") == latency(9.0)


def test_the_reference_goes_with_the_last_row_that_is_relative_to_it(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        prune(store, Selection(version="1.20.0"))
        assert store.get("sentinel", OLD, "reference") is None
        assert store.get("sentinel", CPU, "reference") == 0.5
        store.put("whole", {**GPU, "graph": "g"}, "original", 3.0)
        prune(store, Selection(backend="onnxruntime"))
        assert store.get("sentinel", CPU, "reference") == 0.5, "a whole network may be relative to it"
        assert prune(store, Selection(kind="latency"))[0] == 3
        assert store.count("sentinel") == 0 and store.count() == 4


def test_pruning_gives_space_back(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for i in range(300):
            store.put("importance", SCORES, f"{i}", {"text": "x" * 500})
        rows, freed = prune(store, EVERYTHING)
        assert rows == 300 and freed > 100_000
        assert sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file()) < 100_000
    with Store.open(tmp_path) as store:
        assert store.count() == 0 and entries(store) == []


@pytest.mark.parametrize("days", [-1.0, float("nan"), "x"])
def test_an_age_that_is_none_is_refused(days: Any) -> None:
    with pytest.raises(OptionError, match="number of days"):
        Selection(older_than=days)


# --- exported files that cannot be believed --------------------------------------------------------------------------


def changed(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **values})


def sealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    """A change with the digest that belongs to it."""

    def apply(text: str) -> str:
        from lmfx.store.transfer import _digest

        body = json.loads(text)
        change(body)
        return json.dumps({**body, "digest": _digest(body)})

    return apply


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "cut": (lambda text: text[: len(text) // 2], "damaged or no JSON"),
    "text": (lambda text: "hello", "damaged or no JSON"),
    "list": (lambda text: "[1]", "not an export of a store"),
    "foreign": (changed(format="other"), "not an export of a store"),
    "table": (changed(format="lmfx-latency-table"), "use it with --table"),
    "newer": (changed(version=2), "has version 2"),
    "another number": (lambda text: text.replace("1.5", "1.4", 1), "does not have its digest"),
    "no digest": (changed(digest=None), "does not have its digest"),
    "nan": (lambda text: text.replace("1.5", "NaN", 1), "has the number NaN"),
    "no rows": (sealed(lambda b: b.pop("rows")), "damaged ('rows')"),
    "identity": (sealed(lambda b: next(iter(b["identities"].values())).update(threads=2)), "does not have its hash"),
    "no latency": (sealed(lambda b: b["rows"][-4].update(kind="latency", value={"x": 1})), "damaged"),
    "less than nothing": (sealed(lambda b: b["rows"][4].update(kind="latency", value={"ms": -1.0})), "-1.0 ms"),
    "boom": (sealed(lambda b: b["rows"][0].update(kind="importance", value="boom")), "'boom', no score"),
    "yes": (sealed(lambda b: b["rows"][0].update(kind="importance", value=True)), "'True', no score"),
    "a training": (
        sealed(lambda b: b["rows"][0].update(kind="importance", value={"performance": "x"})),
        "no performance",
    ),
    "a text": (sealed(lambda b: b["rows"][0].update(kind="latency", value={"ms": 1.0, "device": 3})), "device=3"),
    "a quality": (sealed(lambda b: b["rows"][0].update(kind="latency", value={"ms": 1.0, "quality": "x"})), "'x'"),
    "a field": (sealed(lambda b: b["rows"][0].update(kind="latency", value={"ms": 1.0, "z": 3})), "unknown z"),
    "a kind": (sealed(lambda b: b["rows"][0].update(kind="other")), "unknown kind 'other'"),
    "a number": (sealed(lambda b: b["rows"][0].update(key=7)), "a row is named"),
    "nobody's": (sealed(lambda b: b["rows"][0].update(kind="whole", value=1.0, identity="x")), "has no identity"),
    "no time": (sealed(lambda b: b["rows"][0].update(time=None)), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_can_not_be_believed_is_refused_as_a_whole(tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    path = tmp_path / "rows.json"
    with filled(tmp_path) as store:
        export_rows(store, path)
    path.write_text(change(path.read_text()))
    with Store.open(tmp_path / "there") as there:
        with pytest.raises(StoreError) as error:
            import_rows(there, path)
        assert message in str(error.value) and str(path) in str(error.value)
        assert there.count() == 0


def test_a_row_of_the_store_that_is_no_score_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    from lmfx.importance.base import stored_scores

    with Store.open(tmp_path) as store:
        store.put("importance", {"a": 1}, "good", -0.5)
        store.put("importance", {"a": 1}, "trained", {"performance": "-inf", "seconds": 1.0})
        assert stored_scores(store, {"a": 1}, ["good", "trained"]) == {"good": -0.5, "trained": float("-inf")}
        store.put("importance", {"a": 1}, "bad", "boom")
        with pytest.raises(StoreError, match="'boom', no score.*delete the file"):
            stored_scores(store, {"a": 1}, ["good", "bad"])


@pytest.mark.parametrize("value", [{"ms": 1.0}, {"ms": 0, "n": 0, "quality": "bound", "conditions": {"clock": 1}}])
def test_a_measurement_may_leave_out_all_but_its_ms(value: dict[str, Any]) -> None:
    from lmfx.store.row_values import check_value

    assert check_value("latency", "a", value) is value


# --- the command line -------------------------------------------------------------------------------------------------


def out(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["cache", *argv]) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["cache", *argv]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.startswith("lmfx cache: ") and "Traceback" not in seen.err
    return seen.err


def test_the_list_is_a_table_and_as_json_has_whole_identities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path).close()
    here = ("--cache-dir", str(tmp_path))
    text = out(capsys, "list", *here)
    assert str(tmp_path / "rows") in text and "11 rows" in text
    (line,) = [line for line in text.splitlines() if "onnxruntime 1.20.0" in line]
    assert "Fast CPU" in line and "3 d ago" in line and "layout network" in line
    listed = json.loads(out(capsys, "list", "--json", "--kind", "importance", *here))
    assert [e["identity"] for e in listed["entries"]] == [SCORES]
    assert listed["bytes"] > 0 and listed["entries"][0]["newest"].startswith("20")


def test_rows_are_carried_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "a").close()
    a, b = ("--cache-dir", str(tmp_path / "a")), ("--cache-dir", str(tmp_path / "b"))
    file = str(tmp_path / "rows.json")
    assert out(capsys, "export", file, "--device", "fast", *a) == f"wrote {file}: 7 rows\n"
    assert "7 new rows of 7" in out(capsys, "import", file, *b)
    assert "0 new rows of 7" in out(capsys, "import", file, *b)
    assert "2 rows would be deleted" in out(capsys, "prune", "--older-than", "48h", "--dry-run", *b)
    assert "2 rows deleted" in out(capsys, "prune", "--older-than", "2d", *b)
    assert "3 rows deleted" in out(capsys, "prune", "--all", *b)
    assert out(capsys, "path", *b) == f"{tmp_path / 'b' / 'rows'}\n"
    assert "14 rows, all whole" in out(capsys, "check", *a)


@pytest.mark.parametrize("name", ["list", "export", "prune", "check"])
def test_looking_for_a_store_does_not_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    further = {"export": [str(tmp_path / "x.json")], "prune": ["--all"]}.get(name, [])
    assert "there is no store at" in failure(capsys, name, *further, "--cache-dir", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_pruning_everything_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path).close()
    assert "say what to delete" in failure(capsys, "prune", "--cache-dir", str(tmp_path))
    with Store.open(tmp_path) as store:
        assert store.count() == 14


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path).close()
    file = str(tmp_path / "no" / "rows.json")
    assert "cannot write" in failure(capsys, "export", file, "--cache-dir", str(tmp_path))
    assert "cannot read" in failure(capsys, "import", file, "--cache-dir", str(tmp_path))


@pytest.mark.filterwarnings("ignore:the row:RuntimeWarning")
def test_a_damaged_store_is_listed_without_what_was_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path).close()
    (path,) = [p for p in tmp_path.rglob("*.json") if b'"ms":2.5' in p.read_bytes()]
    path.write_bytes(path.read_bytes().replace(b'"ms":2.5', b'"ms":2.4'))
    assert "10 rows" in out(capsys, "list", "--cache-dir", str(tmp_path))
    assert any(".corrupt-" in p.name for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("argv", [["cache"], ["cache", "melt"], ["cache", "prune", "--older-than", "soon"]])
def test_what_is_not_understood_ends_with_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "usage: lmfx cache" in capsys.readouterr().err
