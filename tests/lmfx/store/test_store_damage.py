"""A damaged store is moved aside with a warning and never gives a wrong number; a foreign file is never touched."""

from __future__ import annotations

import random
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmfx.passes.errors import StoreError
from lmfx.store.rows import Store
from lmfx.store.store_file import folder_lock
from tests.store_processes import start

HERE = {"backend": "b", "device": "a machine", "threads": 1}
OTHER = {"estimator": "e", "weights": "0123456789abcdef"}
WANTED = {
    "latency": {f"f32[1,8,{i},{i}];Conv2d<8,8,k3x3>": {"ms": i / 7, "spread": i / 100, "n": 5} for i in range(200)},
    "importance": {f"0:{i}-{i + 2}:fit:3x3": -i / 13 for i in range(200)},
    "sentinel": {"reference": 0.8125},
}
IDENTITY = {"latency": HERE, "importance": OTHER, "sentinel": HERE}


def fill(store: Store) -> None:
    for kind, rows in WANTED.items():
        for key, value in rows.items():
            store.put(kind, IDENTITY[kind], key, value)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "lmfx.sqlite"
    with Store(path) as store:
        fill(store)
    return path


@pytest.fixture
def path(tmp_path: Path, healthy: Path) -> Iterator[Path]:
    """A copy of a healthy store, to be damaged."""
    shutil.copy(healthy, tmp_path / "lmfx.sqlite")
    yield tmp_path / "lmfx.sqlite"


def flip(path: Path, at: int, mask: int = 0x55) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def read(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All rows that a store gives out, and the warnings that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Store(path) as store:
            found = {kind: store.get_many(kind, IDENTITY[kind]) for kind in WANTED}
    return found, [str(w.message) for w in caught]


def asides(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.iterdir() if ".corrupt-" in p.name and not p.name.endswith(("-wal", "-shm")))


def check_never_wrong(path: Path) -> bool:
    """Opens a damaged store; whether something was moved aside. A newer version is refused, by name."""
    try:
        found, warned = read(path)
    except StoreError as error:
        assert "has version" in str(error) and str(path) in str(error)
        return False
    for kind, rows in found.items():
        for key, value in rows.items():
            assert WANTED[kind].get(key) == value, f"{kind} {key!r} is {value}"
    moved = asides(path)
    assert len(warned) == len(moved) <= 1
    for text, aside in zip(warned, moved, strict=True):
        assert str(path) in text and str(aside) in text
    assert moved or found == WANTED, "rows are missing, and nobody was told"
    with Store(path) as store:  # what is there now is a store like any other
        store.put("latency", HERE, "new", 1.0)
        assert store.get("latency", HERE, "new") == 1.0
    return bool(moved)


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_store_never_gives_a_wrong_number(path: Path, seed: int) -> None:
    size = random.Random(seed).randrange(1, path.stat().st_size)
    with open(path, "r+b") as file:
        file.truncate(size)
    assert check_never_wrong(path), f"truncated to {size} bytes and not noticed"


@pytest.mark.parametrize("seed", range(20))
def test_a_store_with_flipped_bytes_never_gives_a_wrong_number(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 3, 10))):
        flip(path, draw.randrange(path.stat().st_size), draw.randrange(1, 256))
    check_never_wrong(path)


@pytest.mark.parametrize("at", [*range(0, 100, 3), 103, 108])
def test_every_byte_of_the_header_may_be_damaged(path: Path, at: int) -> None:
    flip(path, at)
    check_never_wrong(path)


def test_a_number_that_was_changed_in_the_file_is_found_and_all_other_rows_are_rescued(path: Path) -> None:
    text = b'{"ms":' + str(7 / 7).encode()
    at = path.read_bytes().index(text) + len(text) - 1
    flip(path, at, 0x01)  # another digit: sqlite sees nothing wrong
    found, warned = read(path)
    assert "does not have its checksum" in warned[0]
    key = list(WANTED["latency"])[7]
    assert found["latency"] == {k: v for k, v in WANTED["latency"].items() if k != key}
    assert found["importance"] == WANTED["importance"]
    assert "with the 400 rows" in warned[0]
    assert read(path)[1] == []


def test_latencies_are_rescued_only_with_the_reference_that_they_are_relative_to(path: Path) -> None:
    flip(path, path.read_bytes().rindex(b"reference0.8125") + 12, 0x01)
    found, _ = read(path)
    assert found["sentinel"] == found["latency"] == {}
    assert found["importance"] == WANTED["importance"]


def test_a_row_under_another_rows_name_is_not_believed(path: Path) -> None:
    db = sqlite3.connect(path)
    first, second = list(WANTED["latency"])[3:5]
    db.execute("DELETE FROM rows WHERE key = ?", (first,))
    db.execute("UPDATE rows SET key = ? WHERE key = ?", (first, second))
    db.commit()
    db.close()
    found, warned = read(path)
    assert first not in found["latency"] and len(warned) == 1


def test_what_was_moved_is_what_was_there_with_its_sidecars(path: Path) -> None:
    flip(path, 21)
    path.with_name("lmfx.sqlite-wal").write_bytes(b"not a log")
    before = path.read_bytes()
    _, warned = read(path)
    (aside,) = asides(path)
    assert aside.read_bytes() == before and str(aside) in warned[0]
    assert aside.with_name(aside.name + "-wal").exists()
    assert not path.with_name("lmfx.sqlite-wal").exists()


def test_an_older_damaged_file_that_was_kept_is_not_overwritten(path: Path, healthy: Path) -> None:
    for _ in range(3):
        shutil.copy(healthy, path)
        flip(path, 5000, 0xFF)
        with open(path, "r+b") as file:
            file.truncate(9000)
        read(path)
    assert len(asides(path)) == 3


def test_damage_that_comes_while_the_store_is_open_is_met_by_the_next_call(path: Path) -> None:
    with Store(path) as store:
        assert len(store.get_many("latency", HERE)) == 200
        data = path.read_bytes()
        path.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))  # the same file
        store.run(lambda db: db.execute("PRAGMA shrink_memory"))
        with pytest.warns(RuntimeWarning, match="moved to"):
            store.put("latency", HERE, "new", 1)
        assert store.get("latency", HERE, "new") == 1
        assert set(store.get_many("latency", HERE)) <= {"new", *WANTED["latency"]}


def test_a_store_whose_file_another_process_moved_goes_on_with_the_new_one(path: Path) -> None:
    with Store(path) as first:
        first.put("latency", HERE, "a", 1)
        flip(path, 0, 0xFF)
        with pytest.warns(RuntimeWarning, match="moved to"), Store(path) as second:
            assert len(asides(path)) == 1
            first.put("latency", HERE, "b", 2)
            assert second.get("latency", HERE, "b") == 2
            second.put("latency", HERE, "c", 3)
            assert first.get("latency", HERE, "c") == 3
    with Store(path) as store:
        assert {"b", "c"} <= set(store.get_many("latency", HERE))


def test_a_store_whose_file_was_deleted_begins_a_new_one(path: Path) -> None:
    with Store(path) as store:
        path.unlink()
        assert store.count() == 0
        store.put("latency", HERE, "a", 1)
        assert path.exists() and store.count() == 1


OPENER = """
import warnings
sys.stdin.readline()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with Store(sys.argv[1]) as store:
        store.put("latency", {"b": 1}, sys.argv[2], 1)
print(len(caught))
"""


def test_of_several_processes_that_find_the_damage_at_once_one_moves_the_file(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))
    names = [str(n) for n in range(4)]
    processes = [start(OPENER, path, n) for n in names]
    with folder_lock(path.parent, 1):  # nobody opens before all are there
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
    warned = sum(int(process.communicate(timeout=200)[0]) for process in processes)
    assert {process.returncode for process in processes} == {0}
    assert warned == len(asides(path)) == 1
    with Store(path) as store:
        assert set(store.get_many("latency", {"b": 1})) == set(names)


def test_a_warning_that_is_an_error_leaves_a_store_behind_that_works(path: Path) -> None:
    flip(path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="damaged"):
            Store(path)
    assert read(path) == (WANTED, [])


def test_a_damaged_file_that_can_not_be_moved_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError("not yours")

    flip(path, 0)
    before = path.read_bytes()
    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(StoreError, match=r"cannot be moved aside \(not yours\); delete the file"):
        Store(path)
    assert path.read_bytes() == before


# --- other versions ---------------------------------------------------------------------------------------------------


def test_a_header_of_another_version_than_its_tables_is_damage(path: Path) -> None:
    flip(path, 63, 0x03)  # 2 becomes 1
    found, warned = read(path)
    assert found == WANTED and "tables are not those of its version" in warned[0]
