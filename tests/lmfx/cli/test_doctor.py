"""`lmfx doctor`: what is tried, what is said of what is missing or broken, and that nothing that is tried ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmfx.cli.doctor
from lmfx.cli import main
from lmfx.cli.checkups import CHECKS, Absent, Check, result
from lmfx.cli.doctor import examined, healthy
from lmfx.latency import BACKENDS
from lmfx.passes.errors import DeviceError, ExportError

FIELDS = {"name", "group", "state", "needed", "versions", "detail", "fix", "seconds"}


def tried(trial: Any = lambda: "it worked", packages: tuple[str, ...] = (), extra: str = "ort") -> dict[str, Any]:
    return result(Check("thing", "extras", packages, extra, trial))


def raising(error: BaseException) -> Any:
    def trial() -> str:
        raise error

    return trial


def test_what_works_is_ok_with_its_versions() -> None:
    found = tried(packages=("numpy", "torch"))
    assert (found["state"], found["detail"], found["fix"]) == ("ok", "it worked", None)
    assert set(found["versions"]) == {"numpy", "torch"}
    assert set(found) == FIELDS


def test_what_is_not_installed_is_missing_with_the_command_and_is_not_tried() -> None:
    found = tried(raising(AssertionError("tried")), ("numpy", "no-such-package-at-all"), "train")
    assert (found["state"], found["detail"]) == ("missing", "not installed: no-such-package-at-all")
    assert found["fix"] == 'pip install "lmfx[train]"'


def test_a_device_that_is_not_there_is_absent_and_nothing_to_mend() -> None:
    for error in (DeviceError("no GPU"), Absent("no GPU")):
        found = tried(raising(error))
        assert (found["state"], found["detail"], found["fix"]) == ("absent", "no GPU", None)


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: x"), ExportError("no engine"), RuntimeError("a\nb"), SystemExit(3)]
)
def test_what_is_installed_and_fails_is_broken_and_is_installed_anew(error: BaseException) -> None:
    found = tried(raising(error), ("numpy",))
    assert found["state"] == "broken"
    assert "\n" not in found["detail"]
    assert found["fix"] == 'pip install --upgrade --force-reinstall "lmfx[ort]"'


def test_what_no_package_mends_has_no_command() -> None:
    found = tried(raising(RuntimeError("the folder cannot be written to")), extra="")
    assert (found["state"], found["fix"]) == ("broken", None)


def test_a_package_without_an_extra_comes_with_lmfx_itself() -> None:
    assert tried(raising(RuntimeError("no")), ("torch",), "")["fix"] == "pip install --upgrade --force-reinstall lmfx"


def test_a_module_of_another_distribution_or_of_a_folder_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("doctored", "doctored_too"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')\n")
    info = tmp_path / "doctored_gpu-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doctored-gpu\nVersion: 1.5\n")
    (info / "top_level.txt").write_text("doctored\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = tried(packages=("doctored", "doctored-too"))
    assert (found["state"], found["versions"]) == ("ok", {"doctored": "1.5", "doctored-too": "unknown"})


def test_of_aotinductor_only_the_compiler_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", refuse)
    compiler = tmp_path / "a-compiler"
    compiler.write_text("#!/bin/sh\necho a compiler 9.0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = result(CHECKS["aotinductor"])
    assert found["state"] == "ok", found["detail"]
    assert found["detail"].startswith("a compiler 9.0 is there; nothing was compiled")


def test_without_a_compiler_nothing_is_broken_and_what_to_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = result(CHECKS["aotinductor"])
    assert (found["state"], found["fix"]) == ("absent", None)
    assert "none of g++, clang++, c++ is on the path: install one" in found["detail"]


def test_every_backend_and_every_extra_is_tried() -> None:
    assert set(BACKENDS) <= set(CHECKS)
    setup = (Path(__file__).resolve().parents[3] / "setup.py").read_text()
    for check in CHECKS.values():
        for extra in filter(None, check.extra.split(",")):
            assert f'"{extra}": [' in setup, f"{check.name} names the extra {extra}"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({}, True),
        ({"core": "broken"}, False),
        ({"store": "broken"}, False),
        ({"tensorrt": "missing", "dask": "missing", "gpu": "absent"}, True),
        ({"timm": "broken"}, False),
        ({name: "missing" for name in BACKENDS}, False),
    ],
)
def test_only_what_is_needed_or_broken_makes_a_machine_unwell(states: dict[str, str], expected: bool) -> None:
    results = [
        {"name": c.name, "group": c.group, "needed": c.needed, "state": states.get(c.name, "ok")}
        for c in CHECKS.values()
    ]
    assert healthy(results) is expected


# --- processes --------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
for name in sys.argv[1:]:
    print(json.dumps({"begun": name}), flush=True)
    if name == "timm":
        os.abort()
    if name == "plots":
        time.sleep(600)
    if name == "dask":
        os._exit(3)
    print(json.dumps({"name": name, "state": "ok"}), flush=True)
"""


def test_what_crashes_hangs_or_exits_costs_only_its_own_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_checkups.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("core", "timm", "store", "dask", "plots", "gpu")
    found = {r["name"]: r for r in examined(names, timeout=10, module="fake_checkups")}
    assert list(found) == list(names)
    assert {n for n, r in found.items() if r["state"] == "ok"} == {"core", "store", "gpu"}
    assert found["timm"]["detail"] == "the process crashed (SIGABRT)"
    assert found["dask"]["detail"] == "the process ended with exit code 3"
    assert found["plots"]["detail"] == "no answer within 10 s"
    assert all(set(found[n]) == FIELDS for n in ("timm", "dask", "plots"))
    assert {found[n]["state"] for n in ("timm", "dask", "plots")} == {"broken"}
    assert found["timm"]["fix"] == 'pip install --upgrade --force-reinstall "lmfx[vision]"'


def test_whoever_reads_no_further_does_not_wait_for_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_checkups.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []
    real = subprocess.Popen

    def watched(*args: Any, **kwargs: Any) -> Any:
        started.append(real(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr("lmfx.cli.doctor.subprocess.Popen", watched)
    results = examined(("core", "plots"), timeout=200, module="fake_checkups")
    assert next(results)["name"] == "core"
    results.close()
    (process,) = started
    assert process.returncode == -9  # it was at `plots`, which takes 600 s


def test_a_process_that_does_not_start_is_told_for_each_check(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(examined(("core", "store"), timeout=20, module="no_such_module_at_all"))
    assert [r["state"] for r in found] == ["broken", "broken"]
    assert "exit code 1" in found[0]["detail"]


def test_modules_of_the_current_folder_are_not_taken_for_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('mine')\n")
    monkeypatch.chdir(tmp_path)
    (found,) = examined(("store",))
    assert found["state"] == "ok", found["detail"]


def test_what_checks_print_does_not_mix_with_their_results() -> None:
    code = (
        "import lmfx.cli.checkups as c, os\n"
        "def loud():\n    print('noise'); os.write(1, b'more noise'); return 'done'\n"
        "c.CHECKS['loud'] = c.Check('loud', 'extras', (), '', loud)\n"
        "c.main(['loud'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"begun": "loud"}
    assert (lines[1]["state"], lines[1]["detail"]) == ("ok", "done")
    assert "noise" in done.stderr


def _fake(monkeypatch: pytest.MonkeyPatch, **states: str) -> None:
    def examined(names: Any) -> Any:
        for name in names:
            state = states.get(name, "ok")
            check = CHECKS[name]
            fix = 'pip install "lmfx[x]"' if state in ("missing", "broken") else None
            yield {
                **{"name": name, "group": check.group, "state": state, "needed": check.needed, "fix": fix},
                **{"versions": {"a": "1.0"}, "detail": "seen", "seconds": 0.1},
            }

    monkeypatch.setattr(lmfx.cli.doctor, "examined", examined)


def test_a_well_machine_ends_with_the_command_to_type_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(monkeypatch, tensorrt="missing", gpu="absent")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("ready. Next: lmfx compress torchvision:resnet18 --images FOLDER --budget 0.6")
    assert '-> pip install "lmfx[x]"' in out
    assert "  ok       onnxruntime " in out


def test_a_broken_part_is_named_at_the_end_and_in_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(monkeypatch, timm="broken")
    assert main(["doctor"]) == 1
    assert "broken: timm. The lines with -> mend that" in capsys.readouterr().out.splitlines()[-1]


def test_without_the_extra_of_the_command_line_it_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(monkeypatch, torchvision="missing")
    assert main(["doctor"]) == 0
    assert 'pip install "lmfx[cli]"' in capsys.readouterr().out.splitlines()[-1]


def test_machines_read_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, dask="broken")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"lmfx", "ok", "machine", "checks"}
    assert found["ok"] is False
    assert {c["name"] for c in found["checks"]} == set(CHECKS)
    assert found["machine"]["python"]


@pytest.mark.parametrize("name", ["core", "store", "roofline", "torch"])
def test_what_the_tests_need_anyway_works_on_this_machine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMFX_CACHE_DIR", str(tmp_path))
    found = result(CHECKS[name])
    assert found["state"] == "ok", found["detail"]


@pytest.mark.parametrize(
    "name",
    ["onnxruntime", "onnx export", "torchvision", "timm", "pictures", "plots", "pages", "onnxruntime providers",
     "several GPUs", "dask", "pruning"],
)  # fmt: skip
def test_an_extra_that_is_installed_is_really_tried(name: str) -> None:
    found = result(CHECKS[name])
    assert found["state"] == "ok", found["detail"]
