"""Several processes fill one store: no row is made twice, and a process that dies leaves nothing locked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmfx.latency import LatencyTable
from lmfx.store.claims import HUNG_SECONDS, STALE_SECONDS, Owner, is_live, start_of, this_place
from lmfx.store.rows import Store
from lmfx.store.shared_rows import Share, alone
from tests.store_processes import claimed_by, claims, go, start, wait_until

HERE = {"backend": "b", "threads": 1}
KEYS = ["a", "b", "c", "d"]
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="without /proc a process is known by its beat")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    with Store.open(tmp_path) as first, Store.open(tmp_path) as second:
        yield first, second


def test_a_claimed_row_is_left_to_its_owner_until_it_is_put_or_given_back(two: tuple[Store, Store]) -> None:
    first, second = two
    assert first.claim("latency", HERE, KEYS, 2) == ["a", "b"]
    assert second.claim("latency", HERE, KEYS) == ["c", "d"]
    assert first.claim("latency", HERE, KEYS) == []
    first.put("latency", HERE, "a", 1)
    second.release("latency", HERE, ["d"])
    assert claims(first, KEYS) == ["b", "c"]
    assert first.claim("latency", HERE, ["d"]) == ["d"]
    assert second.get("latency", HERE, "a") == 1


def test_claims_are_of_one_kind_and_identity(two: tuple[Store, Store]) -> None:
    first, second = two
    assert first.claim("latency", HERE, ["a"]) == ["a"]
    assert second.claim("importance", HERE, ["a"]) == ["a"]
    assert second.claim("latency", {**HERE, "threads": 2}, ["a"]) == ["a"]
    assert second.claim("latency", HERE, ["a"]) == []
    second.release("latency", HERE)
    assert first.claim("latency", HERE, ["a"]) == []


def test_a_share_gives_back_what_it_did_not_finish_whatever_happens(two: tuple[Store, Store]) -> None:
    first, second = two
    with pytest.raises(KeyboardInterrupt), Share(first, "latency", HERE) as share:
        assert share.take(KEYS, 3) == ["a", "b", "c"]
        raise KeyboardInterrupt
    assert Share(second, "latency", HERE).take(KEYS) == KEYS
    second.close()
    assert claims(first) == []


def test_rows_that_are_made_all_together_are_made_by_one_thread_at_a_time(two: tuple[Store, Store]) -> None:
    inside: list[int] = []

    def work(store: Store) -> None:
        with alone(store, "whole", HERE):
            inside.append(1)
            time.sleep(0.1)
            inside.append(-1)

    threads = [threading.Thread(target=work, args=(store,)) for store in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [1, -1, 1, -1]
    with alone(None, "whole", HERE):
        pass


def test_without_a_store_every_row_is_ones_own() -> None:
    with Share(None, "latency", HERE) as share:
        assert share.take([*KEYS, "a"], 3) == ["a", "b", "c"] and share.take(KEYS) == KEYS


def test_threads_that_share_a_store_do_not_take_the_same_rows(tmp_path: Path) -> None:
    keys = [str(i) for i in range(60)]
    taken: list[list[str]] = []
    with Store.open(tmp_path) as store:
        threads = [
            threading.Thread(target=lambda: taken.extend(store.claim("latency", HERE, keys, 5) for _ in range(4)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(k for some in taken for k in some) == sorted(keys)


# --- who is alive -----------------------------------------------------------------------------------------------------


@linux
def test_a_process_of_this_place_is_known_by_its_pid_and_its_start() -> None:
    me = Owner()
    now = 1e9
    assert me.place and me.started == start_of(os.getpid())
    assert is_live(me, now - HUNG_SECONDS + 1, now)
    assert not is_live(me, now - HUNG_SECONDS - 1, now), "it is there and does nothing"
    assert not is_live(replace(me, started=str(int(me.started) - 1)), now, now), "the pid belongs to another by now"
    assert not is_live(replace(me, pid=2**22 + 1), now, now)
    assert not is_live(replace(me, started=""), now, now)


@linux
def test_a_killed_child_that_nobody_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner(pid=child.pid, started=start_of(child.pid))
    assert is_live(owner, time.time(), time.time())
    child.kill()
    wait_until(lambda: not is_live(owner, time.time(), time.time()))
    assert not is_live(owner, time.time(), time.time())
    assert Path(f"/proc/{child.pid}").exists(), "it is a zombie still"
    child.communicate()


@pytest.mark.parametrize("place", ["", "another-host 0123 pid:[1]"])
def test_a_process_elsewhere_is_known_by_its_beat(place: str) -> None:
    other = Owner(place=place)
    assert place != this_place()
    assert is_live(other, 1000.0, 1000.0 + STALE_SECONDS - 1)
    assert not is_live(other, 1000.0, 1000.0 + STALE_SECONDS + 1)


@pytest.mark.parametrize(
    ("owner", "idle", "free"),
    [
        (Owner(place="elsewhere"), STALE_SECONDS - 10, False),
        (Owner(place="elsewhere"), STALE_SECONDS + 10, True),
        pytest.param(Owner(), 0, False, marks=linux),
        pytest.param(Owner(pid=2**22 + 1), 0, True, marks=linux),
        pytest.param(Owner(started="1"), 0, True, marks=linux),
    ],
    ids=["elsewhere", "stale", "alive", "dead", "recycled"],
)
def test_only_the_claims_of_the_dead_are_taken_over(tmp_path: Path, owner: Owner, idle: float, free: bool) -> None:
    with Store.open(tmp_path) as store:
        claimed_by(store, "latency", "hash", "a", owner, idle)
        assert store.claim("latency", "hash", ["a", "b"]) == (["a", "b"] if free else ["b"])


def test_claims_are_renewed_as_long_as_they_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmfx.store.claims.BEAT_SECONDS", 0.02)
    with Store.open(tmp_path) as store:
        store.claim("latency", HERE, ["a"])
        (claim,) = store.files(name="*.claim")
        first = claim.stat().st_mtime_ns
        wait_until(lambda: claim.stat().st_mtime_ns > first)
        assert claim.stat().st_mtime_ns > first


def test_a_claim_that_makes_no_sense_holds_nobody_up(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        claimed_by(store, "latency", "hash", "a", replace(Owner(), pid="not a number", started="x"))  # type: ignore[arg-type]
        assert store.claim("latency", "hash", ["a"]) == ["a"]


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_claims_of_its_own(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        assert store.claim("latency", HERE, ["a"]) == ["a"]
        child = os.fork()
        if child == 0:
            taken = store.claim("latency", HERE, ["a", "b"])
            store.put("latency", HERE, "b", 1)
            os._exit(0 if taken == ["b"] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.get("latency", HERE, "b") == 1 and claims(store, "ab") == ["a"]


WORKER = """
import time
keys = [str(i) for i in range(int(sys.argv[2]))]
with Store(sys.argv[1]) as store, Share(store, "latency", {"b": 1}) as share:
    left = dict.fromkeys(keys)
    print("ready", flush=True)
    sys.stdin.readline()
    while left:
        taken = share.take(left, 3)
        for key in store.get_many("latency", {"b": 1}, taken or left):
            left.pop(key)
        for key in taken:
            if key in left:
                time.sleep(float(sys.argv[3]))
                store.put("latency", {"b": 1}, key, int(key))
                left.pop(key)
        if not taken and left:
            share.wait()
"""


def test_processes_that_begin_together_share_the_rows(tmp_path: Path) -> None:
    workers = [start(WORKER, tmp_path / "rows", 60, 0.02) for _ in range(3)]
    go(*workers)
    for worker in workers:
        worker.communicate(timeout=200)
    assert {worker.returncode for worker in workers} == {0}
    with Store.open(tmp_path) as store:
        assert store.times_put() == {str(i): 1 for i in range(60)} and claims(store) == []
        pids = {pid for _, pid in store.log()}
    assert len(pids) >= 2, f"one process made everything: {pids}"


@linux
def test_what_a_killed_process_had_claimed_is_made_by_the_others(tmp_path: Path) -> None:
    victim = start(WORKER, tmp_path / "rows", 30, 300)
    go(victim)
    with Store.open(tmp_path) as store:
        wait_until(lambda: claims(store, "012") == ["0", "1", "2"])
        helper = start(WORKER, tmp_path / "rows", 30, 0)
        go(helper)
        wait_until(lambda: store.count() == 27)
        time.sleep(0.3)
        assert store.count() == 27 and helper.poll() is None, "the helper waits for the three that the victim has"
        victim.send_signal(signal.SIGKILL)
        helper.communicate(timeout=200)
        victim.communicate()
        assert helper.returncode == 0
        assert store.times_put() == {str(i): 1 for i in range(30)} and claims(store) == []


# --- profiling --------------------------------------------------------------------------------------------------------

PROFILE = """
import sys
from pathlib import Path
import torch
from tests.store_processes import wait_until
from tests.toys import images, toy
import lmfx
from lmfx.latency.sampling import Sampling
from lmfx.latency.backends.torch_backend import TorchBackend
from lmfx.store.shared_rows import Share

torch.manual_seed(0)  # one model: other weights prune other convs, which makes other whole networks
graph = lmfx.trace(toy(), images(1))

take = Share.take

def together(self, keys, most=None):
    keys, here = list(keys), Path(sys.argv[2]).with_suffix(".began")
    rows = take(self, keys, most)
    if rows and len(keys) > (most or len(keys)):  # some are left for the other
        here.touch()
        wait_until(lambda: len(list(here.parent.glob("*.began"))) >= int(sys.argv[4]))
    return rows

Share.take = together
backend = TorchBackend(sampling=Sampling(rounds=3, extra_rounds=1, min_ms=float(sys.argv[3]), batch_rows=12))
print("ready", flush=True)
sys.stdin.readline()
lmfx.profile(graph, backend, cache_dir=sys.argv[1], progress=True).save(sys.argv[2])
"""


def profiles(folder: Path, min_ms: float = 1.0, together: int = 1) -> list[Any]:
    """Two processes that will profile one model into one fresh store, and measure nothing before `together` of them
    have claimed rows."""
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROFILE, str(folder), str(folder / f"{n}.json"), str(min_ms), str(together)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for n in range(2)
    ]
    return started


def logged(folder: Path) -> dict[int, int]:
    """How many rows each process has put."""
    with Store.open(folder) as store:
        return dict(Counter(pid for _, pid in store.log()))


def test_two_processes_profile_one_model_into_one_store_and_get_the_same_table(tmp_path: Path) -> None:
    processes = profiles(tmp_path, together=2)
    go(*processes)
    errors = [process.communicate(timeout=250)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (LatencyTable.load(tmp_path / f"{n}.json") for n in range(2))
    assert first == second and len(first) > 20
    with Store.open(tmp_path) as store:
        assert set(store.times_put("latency").values()) == {1}
        assert store.times_put("sentinel") == {"reference": 1}
        assert first.calibration is not None and set(store.times_put("whole").values()) == {1}
        assert claims(store) == []
    assert len(logged(tmp_path)) == 2, "both have measured"


@linux
def test_a_profile_that_is_killed_is_finished_by_the_other_process(tmp_path: Path) -> None:
    victim, survivor = profiles(tmp_path, min_ms=10.0)
    go(victim)
    wait_until(lambda: logged(tmp_path).get(victim.pid, 0) >= 3)
    go(survivor)
    time.sleep(0.2)
    victim.kill()
    before = logged(tmp_path)[victim.pid]
    _, errors = survivor.communicate(timeout=250)
    victim.communicate()
    assert survivor.returncode == 0, errors
    assert victim.returncode == -signal.SIGKILL and not (tmp_path / "0.json").exists()
    table = LatencyTable.load(tmp_path / "1.json")
    assert len(table) > 20
    with Store.open(tmp_path) as store:
        assert set(store.times_put("latency").values()) == {1} and claims(store) == []
    assert logged(tmp_path).keys() == {victim.pid, survivor.pid} and before >= 3
