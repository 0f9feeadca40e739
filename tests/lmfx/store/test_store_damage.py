"""A damaged row is moved aside with a warning and never gives a wrong number; all others stay."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from lmfx.passes.errors import StoreError
from lmfx.store.row_files import file_name, identity_hash
from lmfx.store.rows import Store
from tests.store_processes import go, start

HERE = {"backend": "b", "device": "a machine", "threads": 1}
OTHER = {"estimator": "e", "weights": "0123456789abcdef"}
ROWS = 30
WANTED = {
    "latency": {f"f32[1,8,{i},{i}];Conv2d<8,8,k3x3>": {"ms": i / 7, "spread": i / 100, "n": 5} for i in range(ROWS)},
    "importance": {f"0:{i}-{i + 2}:fit:3x3": -i / 13 for i in range(ROWS)},
    "sentinel": {"reference": 0.8125},
}
IDENTITY = {"latency": HERE, "importance": OTHER, "sentinel": HERE}


def fill(store: Store) -> None:
    for kind, rows in WANTED.items():
        for key, value in rows.items():
            store.put(kind, IDENTITY[kind], key, value)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "rows"
    with Store(path) as store:
        fill(store)
    return path


@pytest.fixture
def path(tmp_path: Path, healthy: Path) -> Path:
    """A copy of a healthy store, to be damaged."""
    return Path(shutil.copytree(healthy, tmp_path / "rows"))


def file_of(path: Path, kind: str, key: str) -> Path:
    return path / kind / identity_hash(IDENTITY[kind]) / file_name(key)


def some_file(path: Path, seed: int, kind: str = "*") -> Path:
    return random.Random(seed).choice(sorted(path.glob(f"{kind}/*/*.json")))


def flip(file: Path, at: int, mask: int = 0x55) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


def read(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All rows that a store gives out, and the warnings that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Store(path) as store:
            found = {kind: store.get_many(kind, IDENTITY[kind]) for kind in WANTED}
    return found, [str(w.message) for w in caught]


def asides(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if ".corrupt-" in p.name)


def check_never_wrong(path: Path) -> int:
    """Reads a damaged store; how many rows were put aside."""
    found, warned = read(path)
    for kind, rows in found.items():
        for key, value in rows.items():
            assert WANTED[kind].get(key) == value, f"{kind} {key!r} is {value}"
    moved = asides(path)
    assert len(warned) <= len(moved) and all(any(str(aside) in text for text in warned) for aside in moved)
    missing = {kind: set(rows) - set(found[kind]) for kind, rows in WANTED.items()}
    if missing["sentinel"]:
        assert missing.pop("latency") == set(WANTED["latency"]) and len(moved) == 2
        missing.pop("importance")
    assert sum(map(len, missing.values())) == len(warned), "a row is missing, and nobody was told; or a whole one is"
    with Store(path) as store:  # what is there now is a store like any other
        for kind, rows in WANTED.items():
            for key, value in rows.items():
                if key not in found[kind]:
                    store.put(kind, IDENTITY[kind], key, value)
    assert read(path) == (WANTED, [])
    return len(warned)


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_row_never_gives_a_wrong_number(path: Path, seed: int) -> None:
    file = some_file(path, seed)
    size = random.Random(seed).randrange(file.stat().st_size)
    with open(file, "r+b") as opened:
        opened.truncate(size)
    assert check_never_wrong(path) == 1, f"truncated to {size} bytes and not noticed"


@pytest.mark.parametrize("seed", range(20))
def test_rows_with_flipped_bytes_never_give_a_wrong_number(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice((1, 3, 10))
    for file in draw.sample(sorted(path.glob("[il]*/*/*.json")), count):
        flip(file, draw.randrange(file.stat().st_size), draw.randrange(1, 256))
    assert check_never_wrong(path) == count


def test_every_byte_of_a_row_may_be_damaged(path: Path) -> None:
    file = some_file(path, 0, "importance")
    data = file.read_bytes()
    with Store(path) as store:
        for at in range(len(data)):
            flip(file, at, 0x01)
            with pytest.warns(RuntimeWarning, match="is damaged"):
                assert len(store.get_many("importance", OTHER)) == ROWS - 1, f"byte {at} was changed and not noticed"
            file.write_bytes(data)
        assert store.get_many("importance", OTHER) == WANTED["importance"]


def test_a_number_that_was_changed_in_the_file_is_found_and_all_other_rows_stay(path: Path) -> None:
    key = list(WANTED["latency"])[7]
    file = file_of(path, "latency", key)
    text = b'"ms":' + str(7 / 7).encode()
    flip(file, file.read_bytes().index(text) + len(text) - 1, 0x01)  # another digit
    found, warned = read(path)
    assert len(warned) == 1 and "does not have its checksum" in warned[0]
    assert found["latency"] == {k: v for k, v in WANTED["latency"].items() if k != key}
    assert found["importance"] == WANTED["importance"]
    assert read(path)[1] == []


def test_latencies_are_believed_only_with_the_reference_that_they_are_relative_to(path: Path) -> None:
    with Store(path) as store:
        store.put("whole", {**HERE, "graph": "g"}, "original", 3.0)
    flip(file_of(path, "sentinel", "reference"), -5, 0x01)
    with Store(path) as store, pytest.warns(RuntimeWarning, match="relative to it"):
        assert store.get("latency", HERE, next(iter(WANTED["latency"]))) is None, "before the reference was asked for"
    found, _ = read(path)
    assert found["sentinel"] == found["latency"] == {}
    assert found["importance"] == WANTED["importance"]
    with Store(path) as store:
        assert store.count("whole") == 0 and store.count() == ROWS


@pytest.mark.parametrize("other", [False, True], ids=["of the same kind", "of another machine"])
def test_a_row_under_another_rows_name_is_not_believed(path: Path, other: bool) -> None:
    first, second = list(WANTED["latency"])[3:5]
    here = file_of(path, "latency", first)
    there = path / "latency" / identity_hash({**HERE, "threads": 2}) / here.name if other else here
    there.parent.mkdir(exist_ok=True)
    shutil.copy(here if other else file_of(path, "latency", second), there)
    with Store(path) as store, pytest.warns(RuntimeWarning, match="another row's"):
        assert store.get("latency", {**HERE, "threads": 2} if other else HERE, first) is None


def test_what_was_moved_is_what_was_there(path: Path) -> None:
    file = some_file(path, 0, "latency")
    flip(file, 21)
    before = file.read_bytes()
    _, warned = read(path)
    (aside,) = asides(path)
    assert aside.read_bytes() == before and str(aside) in warned[0] and str(file) in warned[0]
    assert not file.exists()


def test_an_older_damaged_row_that_was_kept_is_not_overwritten(path: Path) -> None:
    file = some_file(path, 0, "importance")
    data = file.read_bytes()
    for _ in range(3):
        file.write_bytes(data[:50])
        read(path)
    assert len(asides(path)) == 3


def test_damage_that_comes_while_the_store_is_open_is_met_by_the_next_call(path: Path) -> None:
    with Store(path) as store:
        assert len(store.get_many("latency", HERE)) == ROWS
        flip(some_file(path, 1, "latency"), 80)
        with pytest.warns(RuntimeWarning, match="moved to"):
            assert len(store.get_many("latency", HERE)) == ROWS - 1


def test_a_row_that_another_process_moved_is_not_there_for_this_one(path: Path) -> None:
    key = list(WANTED["latency"])[3]
    flip(file_of(path, "latency", key), 0, 0xFF)
    with Store(path) as first, Store(path) as second:
        with pytest.warns(RuntimeWarning, match="moved to"):
            assert first.get("latency", HERE, key) is None
        assert second.get("latency", HERE, key) is None
        second.put("latency", HERE, key, 2)
        assert first.get("latency", HERE, key) == 2 and len(asides(path)) == 1


def test_a_store_whose_folder_was_deleted_begins_a_new_one(path: Path) -> None:
    with Store(path) as store:
        shutil.rmtree(path)
        assert store.count() == 0 and store.get_many("latency", HERE) == {}
        assert store.claim("latency", HERE, ["a"]) == ["a"]
        store.put("latency", HERE, "a", 1)
        assert path.exists() and store.count() == 1


OPENER = """
import warnings
print("ready", flush=True)
sys.stdin.readline()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with Store(sys.argv[1]) as store:
        store.rows()
        store.put("latency", {"b": 1}, sys.argv[2], 1)
print(len(caught))
"""


def test_of_several_processes_that_find_the_damage_at_once_one_moves_the_row(path: Path) -> None:
    for seed in range(20):
        flip(some_file(path, seed, "latency"), 60, 1 + seed)
    damaged = {some_file(path, seed, "latency") for seed in range(20)}
    names = [str(n) for n in range(4)]
    processes = [start(OPENER, path, n) for n in names]
    go(*processes)
    warned = sum(int(process.communicate(timeout=200)[0]) for process in processes)
    assert {process.returncode for process in processes} == {0}
    assert warned == len(asides(path)) == len(damaged)
    with Store(path) as store:
        assert set(store.get_many("latency", {"b": 1})) == set(names)


def test_a_warning_that_is_an_error_leaves_a_store_behind_that_works(path: Path) -> None:
    file = some_file(path, 0, "importance")
    flip(file, 0)
    with Store(path) as store, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="damaged"):
            store.get_many("importance", OTHER)
        assert len(store.get_many("importance", OTHER)) == ROWS - 1
    assert not file.exists() and read(path)[1] == []


def test_a_damaged_row_that_cannot_be_moved_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError("not yours")

    file = some_file(path, 0, "importance")
    flip(file, 0)
    before = file.read_bytes()
    monkeypatch.setattr("os.rename", refuse)
    with Store(path) as store, pytest.raises(StoreError, match=r"cannot be moved aside \(not yours\); delete it"):
        store.get_many("importance", OTHER)
    assert file.read_bytes() == before


def test_a_log_that_is_damaged_costs_no_row(path: Path) -> None:
    for log in path.glob("*/*/log"):
        log.write_bytes(log.read_bytes()[:-3] + b"\xff[1]\n{}\n")
    with Store(path) as store:
        assert ROWS - 3 <= len(store.times_put("latency")) <= ROWS
    assert read(path) == (WANTED, [])
