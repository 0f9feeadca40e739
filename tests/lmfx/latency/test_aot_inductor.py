"""The AOTInductor backend: what is compiled once, what tells its rows from others, what it says without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from lmfx.latency import Store, Workload, get_backend
from lmfx.latency.backends import aot_inductor
from lmfx.passes.errors import MissingExtra, OptionError
from tests.helpers import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = ((1, 4, 6, 6), torch.float32)


def workload(kernel: int = 3) -> Workload:
    chain = nn.Sequential(nn.Conv2d(4, 4, kernel, padding=kernel // 2), nn.ReLU())
    return Workload.of(fx.symbolic_trace(chain), IMAGE)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled, in place of compiling it: a package is the program's own file."""
    seen: list[Any] = []

    def package(program: Any, package_path: str) -> str:
        seen.append(program)
        torch.export.save(program, package_path)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())
    monkeypatch.setattr(aot_inductor, "_PACKAGES", {})
    monkeypatch.setattr(aot_inductor, "_compiler", lambda: "c++")
    return seen


def test_a_workload_is_compiled_once_and_its_row_is_kept(compiled: list[Any], tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        rows = get_backend("aotinductor").measure([workload(), workload(), workload(5)], store, rounds=1)
        assert len(rows) == 2 and all(m.ms > 0 and m.backend == "aotinductor" for m in rows.values())
        count = len(compiled)
        assert count == 4  # both, the sentinel, and what does nothing
        again = get_backend("aotinductor").measure([workload(), workload(5)], store, rounds=1)
        assert again == rows and len(compiled) == count


def test_the_original_that_is_measured_beside_each_plan_is_compiled_once(compiled: list[Any]) -> None:
    net = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU()))
    x = torch.randn(IMAGE[0])
    backend = get_backend("aotinductor")
    for _ in range(2):
        times = backend.measure_interleaved([(net, [x]), (net, [x])], repeats=2)
        assert len(times) == 2 and all(t > 0 for row in times for t in row)
    assert len(compiled) == 1


def test_what_cannot_be_told_from_others_is_compiled_each_time(compiled: list[Any]) -> None:
    whole = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval()  # no graph, so nothing says what it computes
    for _ in range(2):
        get_backend("aotinductor").measure_interleaved([(whole, [torch.randn(IMAGE[0])])], repeats=1)
    assert len(compiled) == 2


def test_rows_of_other_settings_and_backends_are_not_mixed(compiled: list[Any]) -> None:
    made = [
        get_backend("aotinductor", **o) for o in ({}, {"threads": 2}, {"precision": "bf16"}, {"channels_last": True})
    ]
    identities = [b.identity() for b in (*made, get_backend("torch"))]
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])
    assert identities[0]["compiler"]


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtra, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        get_backend("aotinductor")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(MissingExtra, match="CXX=/no/such/compiler"):
        get_backend("aotinductor")


def test_what_cannot_be_compiled_names_another_backend(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(OptionError, match="latency='torch'"):
        get_backend("aotinductor").prepare(workload())


@pytest.mark.slow
def test_a_compiled_network_gives_what_torch_gives_and_takes_time() -> None:
    try:
        backend = get_backend("aotinductor")
    except MissingExtra as error:
        pytest.skip(str(error))
    made = workload()
    x = torch.randn(IMAGE[0])
    run = backend._callable(made.build().eval(), [x], made)  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(run(x), made.build()(x), rtol=1e-4, atol=1e-5)
    assert backend.prepare(made).time(3) > 0
