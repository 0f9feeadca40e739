"""Importance jobs on Dask: real worker processes, of which one is killed, give the table of one process."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmfx
from lmfx.calibration.images import Calibration
from lmfx.importance import Finetune
from lmfx.latency import Store
from tests import finetune_toys
from tests.helpers import one_thread as one_thread
from tests.toys import images, toy

distributed = pytest.importorskip("distributed")
# distributed closes sockets and loops of killed workers late, and says so as warnings in whichever thread it happens.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("one_thread"),
]
DATA = images(24)


@pytest.fixture
def client() -> Iterator[Any]:
    """Two worker processes with one thread each, and nothing that listens beyond this machine."""
    import dask

    with (
        warnings.catch_warnings(),
        dask.config.set({"distributed.admin.tick.limit": "60s", "distributed.comm.timeouts.connect": "60s"}),
    ):
        warnings.simplefilter("ignore")
        with (
            distributed.LocalCluster(
                2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1", silence_logs=50
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client


def test_two_worker_processes_of_which_one_is_killed_give_the_table_of_one_process(client: Any, tmp_path: Path) -> None:
    graph = lmfx.trace(toy(), DATA[:1])
    spans = lmfx.spans(graph)
    wanted = [c for c in spans if c.realization in ("compose", "fit")][:10]
    data = Calibration((DATA,))
    alone = Finetune(finetune_toys.train, finetune_toys.accuracy).score(spans, wanted, data)

    slow = finetune_toys.Slow(tmp_path / "pids", seconds=0.2)
    slow.folder.mkdir()
    killed: list[int] = []

    def kill() -> None:
        while not killed and time.monotonic() < deadline:
            pids = [int(p.name) for p in slow.folder.iterdir()]
            if len(pids) >= 2:  # both work
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])
            time.sleep(0.02)

    deadline = time.monotonic() + 200
    killer = threading.Thread(target=kill)
    killer.start()
    with Store.open(tmp_path) as store:
        finetune = Finetune(slow, finetune_toys.accuracy, key="a")
        table = finetune.score(spans, wanted, data, store, executor=client.get_executor())
        counts = store.times_put("importance")
    killer.join()
    assert killed and os.getpid() not in killed
    assert dict(table) == dict(alone)
    assert len(counts) == len(wanted) + 1 and set(counts.values()) == {1}
    others = {int(p.name) for p in slow.folder.iterdir()} - set(killed)
    assert others and os.getpid() not in others
