"""Importances are scored by several processes as latencies are measured: no row twice, and the same table for all."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lmfx
from lmfx.store.claims import Owner
from lmfx.store.rows import Store
from tests.store_processes import claimed_by, claims
from tests.toys import images, toy

X, DATA = images(1), images(12)


@pytest.fixture(scope="module")
def graph() -> Any:
    return lmfx.trace(toy(), X)


@pytest.fixture(scope="module")
def alone(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The table of a process that has its store for itself."""
    return score(graph, tmp_path_factory.mktemp("alone"))


def score(graph: Any, folder: Path, executor: Any = None) -> Any:
    return lmfx.score(graph, calibration=DATA, cache_dir=folder, executor=executor, progress=False)


def identity_of(table: Any) -> dict[str, Any]:
    return {k: v for k, v in table.identity.items() if k != "graph"}


def test_two_that_score_at_once_score_no_row_twice(graph: Any, alone: Any, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:  # each with a store object of its own, as two processes have
        first, second = pool.map(lambda _: score(graph, tmp_path), range(2))
    assert first == second == alone
    with Store.open(tmp_path) as store:
        assert set(store.times_put("importance").values()) == {1}
        assert claims(store) == []


def test_what_another_process_works_on_is_waited_for(graph: Any, alone: Any, tmp_path: Path) -> None:
    key = next(k for k in alone if k.endswith("fit:3x3s1x1g1"))

    def other() -> None:
        time.sleep(1.0)
        store.put("importance", identity_of(alone), key, -123.0)

    with Store.open(tmp_path) as store:
        claimed_by(store, "importance", identity_of(alone), key, Owner(place="elsewhere"))
        thread = threading.Thread(target=other)
        thread.start()
        table = score(graph, tmp_path)
        thread.join()
        assert table[key] == -123.0 and store.times_put("importance")[key] == 1
    assert {k: v for k, v in table.items() if k != key}.keys() == {k for k in alone if k != key}


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor])
def test_what_a_dead_process_had_claimed_is_scored(graph: Any, alone: Any, tmp_path: Path, executor: Any) -> None:
    with Store.open(tmp_path) as store:
        for key in list(alone)[::3]:
            claimed_by(store, "importance", identity_of(alone), key, Owner(started="1"))
    pool = executor(2) if executor else None
    assert score(graph, tmp_path, pool) == alone
