"""The store keeps every row that was made, and never touches what is not its own."""

from __future__ import annotations

import copy
import signal
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from lmfx.passes.errors import StoreError
from lmfx.store.row_files import identity_hash
from lmfx.store.rows import Store, default_cache_dir
from tests.store_processes import start

HERE = {"backend": "b", "threads": 1}


def test_a_row_is_found_again_by_kind_identity_and_key(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.put("latency", HERE, "a", {"ms": 1.5})
        store.put("importance", HERE, "a", -0.25)
    with Store(tmp_path / "rows") as store:
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
        assert store.path == tmp_path / "here" / "rows"


@pytest.mark.parametrize("version", [1, 99])
def test_a_row_of_another_version_of_lmfx_is_refused_and_left_alone(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr("lmfx.store.row_files.VERSION", version)
            store.put("latency", HERE, "a", 1)
        (path,) = store.files()
        before = path.read_bytes()
        with pytest.raises(StoreError, match=f"version {version}, and this lmfx reads version 3") as error:
            store.get("latency", HERE, "a")
        assert str(path) in str(error.value) and "choose another cache_dir" in str(error.value)
        assert path.read_bytes() == before


def test_what_is_not_a_row_is_not_touched(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.put("latency", HERE, "a", 1)
        others = [store.path / "notes.txt", store.path / "latency" / "list.json", store.files()[0].with_name("x.csv")]
        (store.path / "my rows" / "of 2026").mkdir(parents=True)
        others.append(store.path / "my rows" / "of 2026" / "rows.json")
        for path in others:
            path.write_text("mine")
        assert [row.key for row in store.rows()] == ["a"] and store.count() == 1
        assert [path.read_text() for path in others] == ["mine"] * 4


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("rows", "file"):
        (tmp_path / name).write_text("mine")
    for cache_dir in (tmp_path, tmp_path / "file"):
        with pytest.raises(StoreError, match="cannot make the folder.*choose another cache_dir"):
            Store.open(cache_dir)
    assert (tmp_path / "rows").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    with Store.open(tmp_path) as store:
        store.put("latency", HERE, "a", 1)
        monkeypatch.setattr("os.replace", full)
        with pytest.raises(StoreError, match="No space left on device.*choose another cache_dir"):
            store.put("latency", HERE, "b", 2)
        assert store.get_many("latency", HERE) == {"a": 1}
        assert len(list(store.files()[0].parent.iterdir())) == 2, "the row and the log: nothing is left over"


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
    monkeypatch.setattr("lmfx.store.claims.BUSY_SECONDS", 0.05)
    with Store.open(tmp_path) as store:
        store.put("latency", HERE, "a", 1)
        with FileLock(store.folder("latency", HERE) / "claims.lock"):
            with pytest.raises(StoreError, match="locked"):
                store.claim("latency", HERE, ["b"])
            store.put("latency", HERE, "c", 1)  # rows need no lock
        assert store.claim("latency", HERE, ["b"]) == ["b"]
        assert store.count() == 2


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
    writers = [start(WRITER, tmp_path / "rows", n, 40) for n in range(3)]
    for process in writers:
        process.communicate()
        assert process.returncode == 0
    with Store.open(tmp_path) as store:
        assert store.count() == 120 and set(store.times_put().values()) == {1}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is a POSIX thing")
def test_every_row_that_was_reported_survives_a_kill(tmp_path: Path) -> None:
    process = start(WRITER, tmp_path / "rows", 0, 10**6)
    assert process.stdout is not None
    for _ in range(30):
        seen = int(process.stdout.readline())
    process.kill()
    rest = process.communicate()[0].splitlines()
    seen = int(rest[-1]) if rest and rest[-1].isdigit() else seen
    with Store.open(tmp_path) as store:
        assert store.count() >= min(seen, 29) + 1
        store.put("latency", HERE, "after", 1)
