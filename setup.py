"""Package metadata. Versions are wide here and exact in constraints.txt."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def version() -> str:
    """The version, read as text: importing the package would need torch."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "lmfx" / "_version.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit('lmfx/_version.py has no line __version__ = "..."')
    return found[1]


EXTRAS = {
    "onnx": ["onnx>=1.17", "onnxscript>=0.3"],
    "ort": ["onnx>=1.17", "onnxruntime>=1.20"],
    "trt": ["tensorrt>=10"],
    # builds engines without a GPU; there are wheels for these platforms only
    "trt-rtx": ["tensorrt_rtx>=1.2; platform_machine in 'x86_64 AMD64' and sys_platform in 'linux win32'"],
    "vision": ["pillow", "timm", "torchvision"],
    "plot": ["matplotlib"],
    "html": ["jinja2>=3.1"],
    "dask": ["distributed>=2024.1"],
    "pruning": ["torch-pruning>=1.5"],
    "train": ["accelerate>=1.0"],
    "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.27"],
}
# All of the command line on a machine without a GPU: models by name, pictures, ONNX Runtime, files, plots, pages.
CLI = ("html", "onnx", "ort", "plot", "vision")
EXTRAS["cli"] = sorted({requirement for name in CLI for requirement in EXTRAS[name]})
EXTRAS["dev"] = sorted(
    {requirement for name, extra in EXTRAS.items() if name != "trt" for requirement in extra}
    | {
        "build",
        "diffusers",
        "hypothesis",
        "mypy",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "scikit-learn",
        "setuptools>=77",
    }
)

# Every folder of lmfx/ and of passes/ is a package; a test compares this list with the folders.
PASSES = ("algebra", "canonical", "fit", "graph", "identity", "model", "rewrite", "solve", "spans", "trace")
FOLDERS = (
    *("calibration", "cli", "environment", "export", "importance", "int8", "latency", "latency.backends"),
    *("planning", "quality", "report", "store", "training"),
)
PACKAGES = ["lmfx", *(f"lmfx.{name}" for name in FOLDERS), "lmfx.passes", *(f"lmfx.passes.{name}" for name in PASSES)]

setup(
    name="lmfx",
    version=version(),
    description="A depth compiler for convolutional networks: fewer, merged convolutions within a latency budget",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=["filelock>=3.12", "numpy>=1.26", "safetensors>=0.4", "torch>=2.11", "tqdm"],
    extras_require=EXTRAS,
    # `passes/` is a top-level folder and a package only under the name lmfx.passes. The symlink lmfx/passes serves
    # runs without an install; it is never packaged, so each file is in the wheel once.
    packages=PACKAGES,
    package_dir={"lmfx.passes": "passes", **{f"lmfx.passes.{name}": f"passes/{name}" for name in PASSES}},
    package_data={"lmfx": ["py.typed"], "lmfx.report": ["templates/*"]},
    include_package_data=False,
    entry_points={"console_scripts": ["lmfx = lmfx.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        # those that were run: docs/testing.md
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
