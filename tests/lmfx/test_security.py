"""What a file of somebody else's may do: nothing is imported, called, allocated without a bound or recursed into."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmfx
from lmfx.cli import main
from lmfx.environment.bounded_reading import DEEPEST, parse_json, printable, read_bounded
from lmfx.latency import LatencyTable, Store
from lmfx.planning.saved_files import example_of
from lmfx.store.row_files import _seal
from lmfx.store.transfer import _digest, import_rows
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")
HUGE = 10**12


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    options: dict[str, Any] = {"latency": "roofline", "importance": "magnitude", "progress": False}
    net = lmfx.compress(network(), torch.randn(1, 3, 8, 8), 0.9, cache_dir=tmp_path / "cache", **options)
    return lmfx.save(net, tmp_path / "out")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "plan.json").read_text())
    change(document)
    (folder / "plan.json").write_text(json.dumps(document))


@pytest.mark.parametrize("spec", ["other:make", "os:getcwd", "timm:hf-hub:a/b", "torchvision:../x", "timm:", "x"])
def test_export_imports_nothing_that_a_folder_names(
    folder: Path, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("raise SystemExit('foreign code ran')\n")
    edit(folder, lambda d: d["save"].update(model=spec))
    assert main(["export", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "a file does not decide what is imported" in said and "MODEL" in said
    assert "other" not in sys.modules


def test_export_takes_the_name_of_a_zoo_from_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    edit(folder, lambda d: d["save"].update(model="torchvision:resnet_of_nobody"))
    assert main(["export", str(folder)]) == 2
    assert "torchvision has no model 'resnet_of_nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["conv"].update(out_channels=HUGE),
        lambda c: c["conv"].update(out_channels=2**20),
        lambda c: c["conv"].update(in_channels=2**20),
        lambda c: c["conv"].update(kernel_size=[HUGE, 1]),
        lambda c: c["conv"].update(padding=[[HUGE, 0], [0, 0]]),
        lambda c: c["conv"].update(stride=[HUGE, 1]),
        lambda c: c["span"].update(stop=HUGE),
        lambda c: c["span"].update(stop=2**20),
    ],
    ids=["channels", "many channels", "inputs", "kernel", "padding", "stride", "span", "long span"],
)
def test_no_size_in_a_plan_is_believed(folder: Path, change: Callable[[Any], object]) -> None:
    edit(folder, lambda d: change(d["plan"]["candidates"][0]))
    edit(folder, lambda d: d["save"].update(result=None))
    with pytest.raises(lmfx.PlanError):
        lmfx.load(folder, network())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"shape": [HUGE, 3, 8, 8], "dtype": "float32"}, "more than"),
        ({"shape": [1] * 100, "dtype": "float32"}, "more than"),
        ({"shape": [1, 3], "dtype": "load"}, "is no tensor"),
        ({"shape": [1, 3], "dtype": "_dynamo"}, "is no tensor"),
        ({"shape": [-1, 3], "dtype": "float32"}, "is no tensor"),
    ],
    ids=["huge", "dimensions", "function", "module", "negative"],
)
def test_the_example_of_a_folder_is_bounded_and_only_a_tensor(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example_of({"positional": [spec], "keyword": {}})


def test_inputs_that_are_small_one_by_one_are_bounded_together() -> None:
    with pytest.raises(ValueError, match="more than"):
        example_of({"positional": [{"shape": [2**27], "dtype": "int8"}] * 100, "keyword": {}})


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)])
def test_deep_json_is_refused_before_it_is_parsed(text: str) -> None:
    with pytest.raises(ValueError, match="levels deep"):
        parse_json(text)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", "1e999", "[-1e400]"])
def test_numbers_that_json_does_not_have_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_json(text)


def test_json_as_deep_as_allowed_and_brackets_in_strings_are_read() -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(deep) == json.loads(deep)
    words = json.dumps({"a": "[" * 1000, 'quo"te\\': ["\\", '"[{' * 100, {}]})
    assert parse_json(words) == json.loads(words)


def test_a_file_that_never_ends_or_is_too_large_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_text(" " * 101)
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_bounded(tmp_path / name)
    with pytest.raises(ValueError, match="101 bytes"):
        read_bounded(tmp_path / "large", most=100)
    assert len(read_bounded(tmp_path / "large", most=101)) == 101


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": NaN}', '{"format": "lmfx-latency-table", "x": 1e999}'])
def test_tables_exports_and_plans_refuse_such_files_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(lmfx.TableError, match="foreign.json is damaged"):
        LatencyTable.load(path)
    with Store.open(tmp_path) as store, pytest.raises(lmfx.StoreError, match="foreign.json is damaged"):
        import_rows(store, path)
    with pytest.raises(lmfx.PlanError, match="foreign.json is damaged"):
        lmfx.load_plan(path)


@pytest.mark.parametrize("field", ["ms", "spread", "n", "device", "quality", "conditions"])
@pytest.mark.parametrize("value", [-1.5, "boom", None, [1], True])
def test_a_row_of_a_table_has_the_types_of_a_measurement(tmp_path: Path, field: str, value: Any) -> None:
    if field == "device" and value == "boom":
        return
    path = LatencyTable({"a": lmfx.latency.Measurement(1.0)}, {"backend": "b"}).save(tmp_path / "table.json")
    body = json.loads(path.read_text())
    body["rows"]["a"][field] = value
    path.write_text(json.dumps(body))
    with pytest.raises(lmfx.TableError, match="is damaged"):
        LatencyTable.load(path)


# --- rows of the store ------------------------------------------------------------------------------------------------

WHERE = ("importance", {"estimator": "a"}, "k")


@pytest.fixture
def row(tmp_path: Path) -> Path:
    """The file of a row, in the store below `tmp_path`."""
    with Store.open(tmp_path) as store:
        store.put(*WHERE, 1.0)
        (path,) = store.files()
    return path


def endless(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sealed(body: str) -> Callable[[Path], None]:
    """A row with the checksum that belongs to it, as anybody can make one."""

    def write(path: Path) -> None:
        path.write_text(f"lmfx-row 3 {_seal(3, body)}\n{body}")

    return write


def large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**26 + 1)  # sparse


@pytest.mark.parametrize(
    "change",
    [
        endless,
        device,
        large,
        sealed("[" * 100_000 + "]" * 100_000),
        sealed('{"value": NaN}'),
        sealed('{"value": 1e999}'),
        sealed("[]"),
        sealed('{"kind": "importance", "__class__": "x"}'),
    ],
    ids=["fifo", "device", "large", "deep", "nan", "infinite", "list", "fields"],
)
def test_a_row_that_lmfx_did_not_write_is_put_aside_and_not_followed(
    tmp_path: Path, row: Path, change: Callable[[Path], None]
) -> None:
    change(row)
    with Store.open(tmp_path) as store:
        with pytest.warns(RuntimeWarning, match="is damaged"):
            assert store.get(*WHERE) is None
        assert store.count() == 0
        store.put(*WHERE, 2.0)
        assert store.get(*WHERE) == 2.0


@pytest.mark.parametrize("hashed", ["../../../outside", "/tmp/outside", "..", "a/b", ""])
def test_no_row_is_put_outside_of_the_store(tmp_path: Path, hashed: str) -> None:
    with Store.open(tmp_path / "cache") as store:
        with pytest.raises(lmfx.StoreError, match="cannot be stored"):
            store.put("sentinel", hashed, "reference", 1.0)
        body: dict[str, Any] = {
            "format": "lmfx-cache",
            "version": 1,
            "identities": {},
            "rows": [{"kind": "sentinel", "identity": hashed, "key": "reference", "value": 1.0, "time": 1.0}],
        }
        (tmp_path / "rows.json").write_text(json.dumps({**body, "digest": _digest(body)}))
        with pytest.raises(lmfx.StoreError, match="cannot be stored"):
            import_rows(store, tmp_path / "rows.json")
    assert {p.name for p in tmp_path.rglob("*")} == {"cache", "rows", "rows.json"}


# --- terminals --------------------------------------------------------------------------------------------------------


def test_escape_codes_are_written_out() -> None:
    assert printable("a\x1b[31mred\x07\u202eb\nline\ttab ü 中") == "a\\x1b[31mred\\x07\\u202eb\nline\ttab ü 中"


def test_an_error_about_a_file_holds_no_escape_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, lambda d: d["plan"].update({"\x1b]0;title\x07": 1}))
    assert main(["export", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b]0;title\\x07" in said


def test_an_older_plan_with_notes_is_read(folder: Path) -> None:
    before = lmfx.load_plan(folder / "plan.json")
    edit(folder, lambda d: d["plan"].update(notes={"gap": 0.5}))
    assert lmfx.load_plan(folder / "plan.json") == before
