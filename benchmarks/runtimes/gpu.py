"""Measures on a CUDA device: tables, whole networks before and after, predictions, every runtime; a few minutes.

    python benchmarks/runtimes/gpu.py                    all parts, until --seconds are over; writes benchmarks/results/
    python benchmarks/runtimes/gpu.py --networks resnet50 --batches 1 --precisions fp16 --seconds 120
    python benchmarks/runtimes/gpu.py --quick                  one small network; without CUDA this is what a test runs

Needs torch, onnx and onnxruntime; no torchvision (`plain_networks`), and of TensorRT what can be imported. For each
network, batch and precision, the most interesting first:

    compress    a table of rows on torch's CUDA graphs, and the plan that holds the budget; magnitudes as importance
    check       trainable and merged form agree on the device, in float32
    frontier    plans along the frontier: predicted by the calibrated table against measured whole networks
    runtimes    original and merged network side by side: torch eager, CUDA graphs, ONNX Runtime, TensorRT, compiled

No part is begun after --seconds; what was left out or failed is listed by name with its reason. Without CUDA the same
parts run on torch's and ONNX Runtime's CPU backends at batch 1 in float32, and the CUDA parts are listed as skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import lmfx
from benchmarks.shared.plain_networks import NETWORKS
from lmfx.environment.atomic_files import atomic_write
from lmfx.export.tensorrt import PACKAGES
from lmfx.latency import Store, get_backend
from lmfx.latency.backends.gpu_state import monitor_of
from lmfx.latency.cache_state import suited
from lmfx.latency.sampling import Sampling
from lmfx.latency.table import kendall_tau
from lmfx.latency.whole_networks import timing_form
from lmfx.passes.graph.verify import relative_error

__all__ = ["main"]

RESULTS = Path(__file__).parents[1] / "results"
POINTS = 6
Case = dict[str, Any]


@dataclass
class Run:
    """What was found, what was left out, and how much time there is."""

    options: argparse.Namespace
    file: Path
    begin: float = field(default_factory=time.monotonic)
    cases: list[Case] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The result of one part with its seconds, or None with the reason in `left_out`. Any error is a reason."""
        taken = time.monotonic() - self.begin
        if taken > self.options.seconds:
            self.skip(name, f"not begun: {taken:.0f} s were over")
            return None
        try:
            found = work()
        except Exception as error:  # one runtime that fails must not cost the others' figures
            if self.options.raise_errors:
                raise
            self.skip(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return None
        found["seconds"] = round(time.monotonic() - self.begin - taken, 2)
        return found

    def skip(self, name: str, reason: str) -> None:
        self.left_out.append({"part": name, "reason": reason})
        print(f"  {name}: skipped: {reason}", flush=True)

    def write(self) -> None:
        body = {
            "machine": machine(),
            "options": {k: v for k, v in vars(self.options).items() if k != "output"},
            "cases": [{k: v for k, v in case.items() if not k.startswith("_")} for case in self.cases],
            "left_out": self.left_out,
            "seconds": round(time.monotonic() - self.begin, 1),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.file, json.dumps(body, indent=1).encode())


def machine() -> dict[str, Any]:
    """The device and the versions of everything that was found."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "lmfx": lmfx.__version__}
    if torch.cuda.is_available():
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": monitor_of(0).driver}
    for package in ("onnx", "onnxruntime", *PACKAGES):
        try:
            facts[package] = getattr(__import__(package), "__version__", "?")
        except Exception as error:  # broken installations raise many things
            facts[package] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return facts


def runtimes(precision: str) -> dict[str, Callable[[], Any]]:
    """Every runtime by its name, cheap ones first; what cannot be made says why when it is called."""
    if not torch.cuda.is_available():
        return {"torch cpu": lambda: get_backend("torch"), "onnxruntime cpu": lambda: get_backend("onnxruntime")}

    def torch_on(**options: Any) -> Callable[[], Any]:
        return lambda: get_backend("torch", device="cuda", precision=precision, **options)

    def tensorrt(package: str) -> Callable[[], Any]:
        return lambda: get_backend("tensorrt", package=package, precision=precision)

    def onnxruntime(provider: str) -> Callable[[], Any]:
        return lambda: get_backend("onnxruntime", provider=provider, precision=precision)

    return {
        "torch eager": torch_on(cuda_graph=False),
        "torch cuda graph": torch_on(),
        **{package: tensorrt(package) for package in PACKAGES},
        **{f"onnxruntime {p}": onnxruntime(p) for p in ("cuda", "tensorrt")},
        "torch.compile": torch_on(compile=True),
    }


def needs_cuda() -> list[str]:
    """The names of the parts that are not tried without CUDA."""
    return ["torch eager", "torch cuda graph", "torch.compile", *PACKAGES, "onnxruntime cuda", "onnxruntime tensorrt"]


def table_backend(precision: str, quick: bool) -> Any:
    """The backend whose table the plan is found with."""
    few = Sampling(rounds=2, extra_rounds=0, visits=3, extra_visits=0, min_ms=0.5)
    sampling = {"sampling": few} if quick else {}
    if torch.cuda.is_available():
        return get_backend("torch", device="cuda", precision=precision, **sampling)
    return get_backend("torch", **sampling)


def compress(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The table and the plan; keeps the networks in the case for the other parts."""
    torch.manual_seed(0)
    model = NETWORKS[case["network"]]().eval().requires_grad_(False)
    example = torch.randn(case["batch"], 3, options.size, options.size)
    graph = lmfx.trace(model, example)
    backend = suited(table_backend(case["precision"], options.quick), graph)
    with tempfile.TemporaryDirectory() as folder:
        net = lmfx.compress(
            model,
            example,
            options.budget,
            latency=backend,
            importance="magnitude",
            max_kernel_size=options.max_kernel_size,
            cache_dir=folder,
            progress=False,
        )
        with Store.open(folder) as store:
            stored = list(store.get_many("latency", backend.identity()).values())
    case |= {"_graph": graph, "_net": net, "_example": example, "_backend": backend}
    result = lmfx.result_of(net)
    full = [row for row in stored if row["quality"] in ("full", "noisy", "busy")]
    clocks = [mhz for row in full for mhz in row.get("conditions", {}).get("sm_mhz", ())]
    return {
        "convs": [count(graph), count(net)],
        "budget": options.budget,
        "predicted_ms": result.predicted,
        "measured_ms": result.measured,
        "original_ms": result.original,
        "ratio": result.ratio,
        "rows": {
            "measured": len(full),
            "pruned": len(stored) - len(full),
            "noisy": sum(row["quality"] != "full" for row in full),
            "relative_spread": statistics.median(row["spread"] / row["ms"] for row in full) if full else None,
            "graphs": sum(bool(row.get("conditions", {}).get("cuda_graph")) for row in full),
            "sm_mhz": [min(clocks), max(clocks)] if clocks else None,
            "throttle": sorted({r for row in full for r in row.get("conditions", {}).get("throttle", ())}),
        },
        "identity": backend.identity(),
    }


def count(net: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in net.modules())


def check(case: Case) -> dict[str, Any]:
    """The merged form against the trainable one, where they will run; TF32 off, which would be the larger error."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        student = lmfx.rewrite(case["_graph"], lmfx.result_of(case["_net"]).plan)
        merged = lmfx.merge(copy.deepcopy(student)).eval().to(device)
        x = case["_example"][:8].to(device)
        with torch.no_grad():
            error = relative_error(student.eval().to(device)(x), merged(x))
    finally:
        torch.backends.cudnn.allow_tf32 = before
    if not error <= 1e-3:
        raise ValueError(f"the merged network differs from its trainable form by {error:.1e} on {device}")
    return {"relative_error": error}


def frontier(case: Case, rounds: int) -> dict[str, Any]:
    """Plans spread over the frontier, as fractions of the original: by the calibrated table, and measured whole."""
    found = lmfx.result_of(case["_net"]).frontier
    assert found is not None
    low, high = float(found.latency[0]), float(found.latency[-1])
    wanted = [low + (high - low) * i / (POINTS - 1) for i in range(POINTS)]
    indices = sorted({min(range(len(found)), key=lambda i: abs(float(found.latency[i]) - w)) for w in wanted})
    nets = [timing_form(case["_graph"], found.plan(i)) for i in indices]
    whole = [(net, [case["_example"]]) for net in (case["_graph"], *nets)]
    original, *times = case["_backend"].measure_interleaved(whole, rounds)
    measured = [statistics.median(b / a for a, b in zip(original, row, strict=True)) for row in times]
    predicted = [float(found.latency[i]) / found.original for i in indices]
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    return {
        "predicted": predicted,
        "measured": measured,
        "mape": statistics.mean(errors),
        "worst": max(errors),
        "kendall_tau": kendall_tau(predicted, measured) if len(errors) > 1 else None,
    }


def side_by_side(case: Case, make: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Original and merged network in turn on one runtime."""
    backend = make()
    nets: list[fx.GraphModule] = [case["_graph"], case["_net"]]
    times = backend.measure_interleaved([(net, [case["_example"]]) for net in nets], rounds)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    ms = [statistics.median(row) for row in times]
    return {"original_ms": ms[0], "merged_ms": ms[1], "ratio": statistics.median(ratios), "ratios": ratios}


def show(case: Case) -> None:
    """The lines of one case in the short table."""
    made = case.get("compress")
    if made is not None:
        rows, seconds = made["rows"]["measured"], made["seconds"]
        print(
            f"  plan: {made['convs'][0]} -> {made['convs'][1]} convs, {rows} rows, {seconds:.1f} s; "
            f"predicted {made['predicted_ms']:.4g}, measured {made['measured_ms']:.4g} of {made['original_ms']:.4g} ms",
            flush=True,
        )
    points = case.get("frontier")
    if points is not None:
        plans = len(points["measured"])
        print(f"  {plans} plans: predicted is off by {points['mape']:.1%}, at worst {points['worst']:.1%}", flush=True)
    for name, found in case.get("runtimes", {}).items():
        print(
            f"  {name:22} {found['original_ms']:9.4f} -> {found['merged_ms']:9.4f} ms   {found['ratio']:6.3f}",
            flush=True,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; without CUDA and with --quick there is less to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "mobilenet_v2", "resnet34"], choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp32"], choices=["fp16", "fp32", "bf16"])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-kernel-size", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no new part after this")
    parser.add_argument(
        "--output", type=Path, help="the JSON file (default: in benchmarks/results, without CUDA in out)"
    )
    parser.add_argument("--quick", action="store_true", help="resnet18 at 32 x 32, few rounds")
    parser.add_argument("--raise-errors", action="store_true", help="stop at the first part that fails")
    options = parser.parse_args(arguments)
    if options.quick:
        options.networks, options.batches, options.precisions = ["resnet18"], [1], ["fp32"]
        options.size, options.rounds, options.max_kernel_size = 32, 3, 3
    if not torch.cuda.is_available():
        options.batches, options.precisions = [1], ["fp32"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part, print the short table, write the JSON; 1 if nothing could be compressed."""
    options = parse(arguments)
    cuda = torch.cuda.is_available()
    device = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower() if cuda else "cpu"
    folder = RESULTS if cuda else RESULTS.parents[1] / "out"
    run = Run(options, options.output or folder / f"gpu-{device}.json")
    torch.set_num_threads(1)
    print("  ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    if not cuda:
        for name in needs_cuda():
            run.skip(name, "torch sees no CUDA device")
    todo: Sequence[tuple[int, str]] = [(b, p) for b in options.batches for p in options.precisions]
    for batch, precision in todo:
        for network in options.networks:
            case: Case = {"network": network, "batch": batch, "precision": precision}
            title = f"{network} batch {batch} {precision}"
            print(title, flush=True)
            run.cases.append(case)
            examine(run, case, title)
            show(case)
            run.write()
    for case in run.cases:  # seconds for each network, so it comes last
        title = f"{case['network']} batch {case['batch']} {case['precision']}"
        for name, make in slow(case).items():
            found = run.part(f"{title}: {name}", lambda c=case, m=make: side_by_side(c, m, options.rounds))  # type: ignore[misc]
            if found is not None:
                case.setdefault("runtimes", {})[name] = found
                print(title, flush=True)
                show({"runtimes": {name: found}})
        run.write()
    print(f"{len(run.left_out)} parts left out; {time.monotonic() - run.begin:.0f} s; {run.file}")
    return int(not any("compress" in case for case in run.cases))


def examine(run: Run, case: Case, title: str) -> None:
    """The parts of one case but the slow ones."""
    made = run.part(f"{title}: compress", lambda: compress(case, run.options))
    if made is None:
        return
    case["compress"] = made
    for name, work in (("check", lambda: check(case)), ("frontier", lambda: frontier(case, run.options.rounds))):
        found = run.part(f"{title}: {name}", work)
        if found is not None:
            case[name] = found
    case["runtimes"] = {}
    for name, make in runtimes(case["precision"]).items():
        if name in slow(case):
            continue
        found = run.part(f"{title}: {name}", lambda m=make: side_by_side(case, m, run.options.rounds))  # type: ignore[misc]
        if found is not None:
            case["runtimes"][name] = found


def slow(case: Case) -> dict[str, Callable[[], Any]]:
    """The runtimes that are left for the end."""
    return {k: v for k, v in runtimes(case["precision"]).items() if k == "torch.compile" and "_net" in case}


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
