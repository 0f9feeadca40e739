"""The store keeps every row that was made, and never touches a file that is not its own."""

from __future__ import annotations

import copy
import signal
import sqlite3
import threading
from pathlib import Path

import pytest

from lmfx.passes.errors import StoreError
from lmfx.store.rows import APPLICATION_ID, Store, default_cache_dir, identity_hash
from tests.store_processes import start

HERE = {"backend": "b", "threads": 1}


def test_a_row_is_found_again_by_kind_identity_and_key(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.put("latency", HERE, "a", {"ms": 1.5})
        store.put("importance", HERE, "a", -0.25)
    with Store(tmp_path / "lmfx.sqlite") as store:
        assert store.get("latency", HERE, "a") == {"ms": 1.5}
        assert store.get("importance", {"threads": 1, "backend": "b"}, "a") == -0.25
        assert store.get("latency", HERE, "b") is None
        assert store.get("latency", {**HERE, "threads": 2}, "a") is None
        assert store.count() == 2 and store.count("latency") == 1 and store.count("latency", {"x": 1}) == 0


def test_many_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for i in range(1200):
            store.put("latency", "hash", f"k{i}", i)
        wanted = [f"k{i}" for i in reversed(range(1200))]
        found = store.get_many("latency", "hash", [*wanted, "missing"])
        assert list(found.items()) == [(k, int(k[1:])) for k in wanted]
        assert len(store.get_many("latency", "hash")) == 1200
        assert store.get_many("latency", "other") == {}


def test_a_row_may_be_replaced_and_the_log_shows_it(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for value in (1, 2):
            store.put("latency", HERE, "a", value)
        store.put("latency", HERE, "b", 3)
        assert store.get("latency", HERE, "a") == 2
        assert store.times_put("latency", HERE) == {"a": 2, "b": 1}


def test_the_identity_hash_depends_on_values_and_not_on_order() -> None:
    assert identity_hash({"a": 1, "b": (2, 3)}) == identity_hash({"b": [2, 3], "a": 1})
    assert identity_hash({"a": 1}) != identity_hash({"a": 2})


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMFX_CACHE_DIR", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    with Store.open() as store:
        assert store.path == tmp_path / "here" / "lmfx.sqlite"


def foreign_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()


def newer(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def older(path: Path) -> None:
    """Of no version that was ever released: a store of ours, of a lower version and with other tables."""
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE rows DROP COLUMN checksum")
        db.execute("PRAGMA user_version = 1")
    db.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.write_bytes(b"hello, this is a text file"), "not an sqlite file"),
        (lambda p: p.write_bytes(b"S" + b"x" * 5000), "not an sqlite file"),
        (foreign_sqlite, "another program"),
        (newer, "version 99"),
        (older, "version 1, and this lmfx reads version 2"),
    ],
    ids=["text", "bytes", "foreign", "newer", "older"],
)
def test_a_file_of_others_or_of_another_version_is_refused_and_left_alone(
    tmp_path: Path, make: object, reason: str
) -> None:
    path = tmp_path / "lmfx.sqlite"
    make(path)  # type: ignore[operator]
    before = path.read_bytes()
    with pytest.raises(StoreError, match=reason) as error:
        Store(path)
    assert str(path) in str(error.value) and "choose another cache_dir" in str(error.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["lmfx.sqlite"]


def test_a_folder_in_the_place_of_the_file_or_the_reverse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lmfx.sqlite").mkdir()
    with pytest.raises(StoreError, match="is a folder"):
        Store.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder"):
        Store.open(tmp_path / "file")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get("latency", HERE, "a")


def test_a_value_that_is_not_json_is_not_stored(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        with pytest.raises(ValueError, match="JSON"):
            store.put("latency", HERE, "a", float("nan"))
        assert store.count() == 0


def test_a_lock_held_too_long_is_an_error_and_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmfx.store.rows.BUSY_SECONDS", 0.05)
    with Store.open(tmp_path) as store:
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            store.put("latency", HERE, "a", 1)
        other.execute("ROLLBACK")
        other.close()
        store.put("latency", HERE, "a", 1)
        assert store.count() == 1


def test_threads_may_share_a_store_and_copies_open_their_own(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        threads = [
            threading.Thread(target=lambda n=n: [store.put("latency", HERE, f"{n}.{i}", i) for i in range(20)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.count() == 80
        with copy.copy(store) as other:  # what pickle does too
            assert other is not store and other.count() == 80


WRITER = """
with Store(sys.argv[1]) as store:
    for i in range(int(sys.argv[3])):
        store.put("latency", {"b": 1}, f"{sys.argv[2]}.{i}", i)
        print(i, flush=True)
"""


def test_several_processes_make_and_fill_one_store(tmp_path: Path) -> None:
    writers = [start(WRITER, tmp_path / "lmfx.sqlite", n, 40) for n in range(3)]
    for process in writers:
        process.communicate()
        assert process.returncode == 0
    with Store.open(tmp_path) as store:
        assert store.count() == 120 and set(store.times_put().values()) == {1}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is a POSIX thing")
def test_every_row_that_was_reported_survives_a_kill(tmp_path: Path) -> None:
    process = start(WRITER, tmp_path / "lmfx.sqlite", 0, 10**6)
    assert process.stdout is not None
    for _ in range(30):
        seen = int(process.stdout.readline())
    process.kill()
    rest = process.communicate()[0].splitlines()
    seen = int(rest[-1]) if rest and rest[-1].isdigit() else seen
    with Store.open(tmp_path) as store:
        assert store.count() >= min(seen, 29) + 1
        store.put("latency", HERE, "after", 1)


def test_a_maker_that_was_killed_leaves_a_file_that_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "lmfx.sqlite"
    path.touch()
    with Store(path) as store:
        store.put("latency", HERE, "a", 1)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    db.close()
