"""The mapping `lmfx.passes` -> passes/ holds in a wheel, in an sdist, when installed editable, and in a checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Torch comes from the environment that runs the tests; it would be gigabytes to install again.
SITE = next(Path(path) for path in sys.path if (Path(path) / "torch" / "__init__.py").exists())
CHECK = """
import lmfx, lmfx.passes.ir, lmfx.passes.errors, lmfx.budget
assert lmfx.passes.errors.BudgetError is lmfx.budget.BudgetError
assert lmfx.Budget.parse("2x").resolve(3.0) == 1.5
print(lmfx.__file__, lmfx.passes.ir.__file__)
"""


def checkout(target: Path) -> Path:
    """A clean copy of the working tree, with its symlink, so that a build leaves nothing here."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignored))


def python(*arguments: str | Path, executable: str | Path = sys.executable, cwd: Path) -> str:
    """Runs Python away from this checkout, and shows what it printed if it failed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(executable), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip_wheel(source: Path, target: Path) -> Path:
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source, cwd=source.parent)
    (wheel,) = target.glob("lmfx-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return pip_wheel(checkout(folder / "lmfx"), folder / "dist")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = checkout(folder / "lmfx")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    python("-c", build, folder, cwd=source)
    (archive,) = folder.glob("lmfx-*.tar.gz")
    return archive


def modules(names: list[str]) -> list[str]:
    return sorted(name for name in names if not re.match(r"lmfx-[^/]*\.dist-info/", name))


def expected() -> list[str]:
    """Every Python file of the two folders, where a wheel must have it, and the marker for type checkers."""
    own = [path.relative_to(ROOT) for path in (ROOT / "lmfx").rglob("*.py")]
    passes = [Path("lmfx") / path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")]
    own = [path for path in own if path.parts[:2] != ("lmfx", "passes")]
    templates = [p.relative_to(ROOT) for p in (ROOT / "lmfx" / "report" / "templates").iterdir()]
    return sorted([path.as_posix() for path in own + passes + templates] + ["lmfx/py.typed"])


def test_the_symlink_is_committed_as_a_symlink() -> None:
    link = ROOT / "lmfx" / "passes"
    assert link.is_symlink(), "git must have core.symlinks"
    assert os.readlink(link) == "../passes"


def test_the_wheel_has_every_file_once_and_no_package_called_passes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert modules(names) == expected()


def test_the_wheel_is_pure_and_names_its_version_licence_command_and_dependencies(wheel: Path) -> None:
    version = re.search(r'"(.+)"', (ROOT / "lmfx" / "_version.py").read_text().split("__version__")[1])
    assert version is not None
    assert wheel.name == f"lmfx-{version[1]}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"lmfx-{version[1]}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "lmfx = lmfx.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert b"Copyright 2026 the lmfx authors" in archive.read(f"{info}/licenses/LICENSE")
    assert "License-Expression: Apache-2.0" in metadata
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==).*$", metadata, re.MULTILINE)
    assert sorted(required) == ["filelock", "numpy", "safetensors", "torch", "tqdm"]
    assert set(re.findall(r"^Provides-Extra: ([\w-]+)$", metadata, re.MULTILINE)) == {
        "onnx",
        "ort",
        "trt",
        "trt-rtx",
        "vision",
        "cli",
        "html",
        "plot",
        "dask",
        "train",
        "pruning",
        "docs",
        "dev",
    }


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (source / "passes" / "ir.py").exists()
    rebuilt = pip_wheel(source, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert modules(second.namelist()) == modules(first.namelist())
        for name in modules(first.namelist()):
            assert first.read(name) == second.read(name), name


def test_a_checkout_works_uninstalled(tmp_path: Path) -> None:
    source = checkout(tmp_path / "elsewhere")
    assert str(source) in python("-c", CHECK, cwd=source)


def test_everything_that_the_development_extra_asks_for_is_pinned() -> None:
    names = re.findall(r"^([A-Za-z][\w.-]*)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in names}
    for name in ("torch", "torchvision", "numpy", "safetensors", "tqdm", "onnx", "onnxscript", "onnxruntime"):
        assert name in pinned
    for name in ("pytest", "hypothesis", "ruff", "mypy", "scikit-learn", "matplotlib", "build", "setuptools"):
        assert name in pinned


def test_what_develops_lmfx_has_every_extra_but_what_needs_a_gpu(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        required = re.findall(
            r'^Requires-Dist: (.+?) ?;.*extra == "([\w-]+)"', archive.read(name).decode(), re.MULTILINE
        )
    development = {requirement for requirement, extra in required if extra == "dev"}
    assert {requirement for requirement, extra in required if extra not in ("dev", "trt")} < development
    assert any(
        requirement.startswith("mkdocs-material") for requirement in development
    )  # the site is built in the tests


def test_the_oldest_torch_that_is_taken_was_run_and_is_named() -> None:
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert found is not None
    assert f"torch {found[1]} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\d+\.\d+)\.\d+, \S+ \| 3\.", (ROOT / "docs" / "testing.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert min(rows, key=lambda version: tuple(map(int, version.split(".")))) == found[1]


def test_warnings_are_errors_and_the_default_run_needs_no_device() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["filterwarnings"][0] == "error"
    assert "not gpu and not tensorrt and not slow" in options["addopts"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "sdist", "editable"])
def test_an_install_in_a_fresh_environment_works(way: str, wheel: Path, sdist: Path, tmp_path: Path) -> None:
    python("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    fresh = tmp_path / "venv" / "bin" / "python"
    library = python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=fresh, cwd=tmp_path)
    # Torch, pip and setuptools are found after the fresh environment's own packages. The .pth files over there are not
    # read, so an lmfx that is installed editable there does not leak in.
    (Path(library.strip()) / "torch-from-outside.pth").write_text(f"{SITE}\n")
    if way == "editable":
        source = checkout(tmp_path / "source")
        what: list[str | Path] = ["--no-build-isolation", "-e", source]
        home = source
    else:
        what = ["--no-build-isolation", wheel if way == "wheel" else sdist]
        home = Path(library.strip())
    python("-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", *what, executable=fresh, cwd=tmp_path)
    for file in python("-c", CHECK, executable=fresh, cwd=tmp_path).split():
        assert Path(file).is_relative_to(home)
    nothing = "import importlib.util, sys; sys.exit(importlib.util.find_spec('passes') is not None)"
    python("-c", nothing, executable=fresh, cwd=tmp_path)
    done = subprocess.run([fresh.parent / "lmfx", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_the_wheel_has_the_templates_of_pages(wheel: Path) -> None:
    here = {f"lmfx/report/templates/{p.name}" for p in (ROOT / "lmfx" / "report" / "templates").iterdir()}
    assert len(here) == 4 and here <= set(zipfile.ZipFile(wheel).namelist())
