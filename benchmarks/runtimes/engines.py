"""TensorRT engines, ahead of time and without a GPU: does every network build, before and after merging?

    python benchmarks/runtimes/engines.py                            the networks below, for SM89 and SM120
    python benchmarks/runtimes/engines.py --models 'timm/*' --targets sm89 --precision fp16
    python benchmarks/runtimes/engines.py --models zoo               the networks of tests/lmfx/test_zoo.py

Each network is traced and compressed to `--budget` of its latency on the roofline of a GPU, on which a kernel costs
something however small it is (magnitudes as importance, so no data). Both forms are written by `lmfx.export_onnx` and
built by tensorrt_rtx. Layers are those that TensorRT reads from the file; what it fuses them to is only told where a
GPU is. Each network has a process of its own; a row is a line of `--rows`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one thread a process

import torch
from torch import nn

import lmfx
from benchmarks.shared.plain_networks import NETWORKS
from benchmarks.zoo.models import build, examples, families
from benchmarks.zoo.runner import Row, read_rows, run_all
from lmfx.export.tensorrt import import_tensorrt, network_layers
from lmfx.latency import get_backend

__all__ = ["examine", "main"]

ROOT = Path(__file__).resolve().parents[2]
ACCEPTANCE = ("resnet18", "resnet50", "mobilenet_v2", "unet", "diffusers/unet2d-tiny-noattn")
FORMS = ("original", "merged")
GPU = {"peak_gflops": 40_000.0, "bandwidth_gbs": 1000.0, "overhead_us": 5.0}


def network(name: str) -> tuple[nn.Module, Any]:
    """The network and an example input: a name of `plain_networks`, or of the zoo."""
    if name in NETWORKS:
        torch.manual_seed(0)
        size = 64 if name == "unet" else 224
        return NETWORKS[name]().eval().requires_grad_(False), torch.randn(1, 3, size, size)
    model = build(name)
    failure: Exception | None = None
    for example in examples(name, model):
        try:
            with torch.no_grad():
                model(*example) if isinstance(example, tuple) else model(example)
        except Exception as error:  # models refuse sizes in many ways
            failure = error
        else:
            return model, example
    raise failure or ValueError(f"no input for {name}")


def examine(name: str, targets: Sequence[str] = ("sm89",), budget: float = 0.6, precision: str = "fp32") -> Row:
    """Layers, convolutions, megabytes and seconds of both forms; what failed is in the cell of its step."""
    row: Row = {"model": name, "precision": precision}
    model, example = network(name)
    graph = lmfx.trace(model, example)
    nets: dict[str, nn.Module] = {"original": graph}
    options: dict[str, Any] = {"latency": get_backend("roofline", **GPU), "importance": "magnitude", "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        try:
            nets["merged"] = lmfx.compress(model, example, budget, cache_dir=folder, **options)
        except (lmfx.InfeasibleBudget, lmfx.ModelError) as error:
            row["merged"] = {"compress": f"{type(error).__name__}: {error}"}
        for form, net in nets.items():
            row[form] = engines(net, example, Path(folder), targets, precision)
    return row


def engines(net: nn.Module, example: Any, folder: Path, targets: Sequence[str], precision: str) -> Row:
    """One form of a network through ONNX, TensorRT's parser and its builder."""
    cell: Row = {}
    try:
        file = lmfx.export_onnx(net, example, folder / "net.onnx", check=False)
    except lmfx.LmfxError as error:
        return {"onnx": f"{type(error).__name__}: {error}"[:400]}
    try:
        layers = network_layers(import_tensorrt("tensorrt_rtx"), file.read_bytes())
        cell |= {"layers": layers.total(), "convs": layers["CONVOLUTION"] + layers["DECONVOLUTION"]}
        for target in targets:
            begin = time.perf_counter()
            engine = lmfx.build_engine(file, folder / "net.engine", target, precision=precision, package="tensorrt_rtx")
            cell[target] = {
                "mb": round(engine.stat().st_size / 1e6, 2),
                "seconds": round(time.perf_counter() - begin, 2),
            }
    except lmfx.LmfxError as error:
        cell["error"] = f"{type(error).__name__}: {error}"[:400]
    return cell


def names(patterns: Sequence[str]) -> list[str]:
    """Names and globs; "zoo" stands for the networks of the test zoo."""
    known = [*NETWORKS, *families()]
    found: list[str] = []
    for pattern in patterns:
        if pattern == "zoo":
            found += list(importlib.import_module("tests.lmfx.test_zoo").NETWORKS)
        else:
            found += fnmatch.filter(known, pattern)
    return list(dict.fromkeys(found))


def line(row: Row, targets: Sequence[str]) -> str:
    """A row of the table: layers and convolutions before -> after, and MB before -> after for each target."""
    if "error" in row:
        return f"{row['model']:34} {row['error'][:100]}"
    cells = [row.get(form, {}) for form in FORMS]
    text = f"{row['model']:34}"
    for key, width in (("layers", 5), ("convs", 4)):
        text += f" {cells[0].get(key, '-'):>{width}} -> {cells[1].get(key, '-'):<{width}}"
    for target in targets:
        mb, seconds = ([cell.get(target, {}).get(k, "-") for cell in cells] for k in ("mb", "seconds"))
        text += f" {mb[0]:>7} -> {mb[1]:<7} {seconds[0]:>6} {seconds[1]:<6}"
    problems = [
        f"{f}: {v}" for f, cell in zip(FORMS, cells, strict=True) for k, v in cell.items() if isinstance(v, str)
    ]
    return text + ("  " + "; ".join(problems)[:160] if problems else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a network; 1 if an exported network did not build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ACCEPTANCE), metavar="GLOB")
    parser.add_argument("--targets", nargs="+", default=["sm89", "sm120"])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=300, help="limit of one network")
    parser.add_argument("--rows", type=Path, default=ROOT / "out" / "engines.jsonl")
    options = parser.parse_args(arguments)
    wanted = names(options.models)
    if not wanted:
        parser.error("no network matches")
    version = import_tensorrt("tensorrt_rtx").__version__
    torch.set_num_threads(1)
    print(f"tensorrt_rtx {version}, {options.precision}, merged to {options.budget:g} of the roofline's latency")
    head = "".join(f" {'MB ' + t:>10} -> after  {'s':>6} after" for t in options.targets)
    print(f"{'':34} {'layers':>5} -> after {'convs':>4} -> after{head}", flush=True)
    source = f"{version} {GPU} {options.precision} {options.budget} {' '.join(options.targets)}"
    done = read_rows(options.rows, source)
    for name in wanted:
        if name in done:
            print(line(done[name], options.targets), flush=True)
    rows = run_all(
        [n for n in wanted if n not in done],
        lambda name: examine(name, options.targets, options.budget, options.precision),
        options.rows,
        source,
        jobs=options.jobs,
        seconds=options.seconds,
        tick=lambda row: print(line(row, options.targets), flush=True),
    )
    rows = {n: done.get(n) or rows[n] for n in wanted}
    built = sum("error" not in row and all("error" not in row.get(f, {}) for f in FORMS) for row in rows.values())
    print(f"{built} of {len(rows)} networks: no build failed")
    return int(built < len(rows))


if __name__ == "__main__":
    sys.exit(main())
