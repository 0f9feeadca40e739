"""Budgets in 8 bits: what was asked, predicted and promised, and what the exported files take.

    python benchmarks/promises/int8.py [--networks torchvision:resnet18 ...] [--budgets 0.7 0.5] [--size 224]
                                       [--out benchmarks/results/int8_budgets.jsonl]

Weights are random: latency does not depend on them. For each network and budget a row in `--out`: `asked` and
`measured` are shares of the original in 8 bits, `file` is the share that the exported Q/DQ file takes of the
original's, measured again in turn, `over` that over what was asked, `predicted` what the table said; `float` is the
time of the float original over that of the 8-bit one. `ms` has the network of the plan in float as well: where 8 bits
are slower, `pays` is false.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import lmfx
from benchmarks.real.exported import latencies
from benchmarks.real.real import version
from lmfx.cli.models import load_model

NETWORKS = tuple(f"torchvision:{n}" for n in ("resnet18", "mobilenet_v2", "mnasnet0_5", "resnet34", "regnet_x_400mf"))
TABLE = Path(__file__).parents[1] / "results" / "int8_budgets.jsonl"


def note(row: dict[str, Any], table: Path) -> None:
    """Prints a row, and adds it to the table."""
    line = json.dumps({**row, "commit": version()})
    print(line, flush=True)
    with table.open("a") as file:
        file.write(line + "\n")


def main() -> None:
    """One JSON line a network and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--folder", type=Path, default=Path("out/int8"))
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x = torch.rand(1, 3, args.size, args.size)
    images = torch.rand(4, 3, args.size, args.size)
    common: dict[str, Any] = {"calibration": images, "importance": "magnitude", "refit": False, "progress": False}
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        torch.manual_seed(0)
        model = load_model(name).eval()
        plain = lmfx.export_onnx(model, x, args.folder / "float.onnx")
        quantized = args.folder / "original.onnx"
        net = lmfx.compress(model, x, 1.0, precision="int8", **common)
        lmfx.export_onnx(net, x, quantized)
        facts = lmfx.result_of(net).int8
        base = {"network": name, "size": args.size}
        note({**base, "ms": facts.ms if facts else {}, "pays": bool(facts and facts.pays)}, args.out)
        for budget in args.budgets:
            start = time.process_time()
            try:
                net = lmfx.compress(model, x, budget, precision="int8", **common)
            except lmfx.InfeasibleBudget as error:
                note({**base, "asked": budget, "infeasible": str(error)[:200]}, args.out)
                continue
            result = lmfx.result_of(net)
            file = lmfx.export_onnx(net, x, args.folder / "plan.onnx")
            original, again = latencies(quantized, [plain, file])
            row = {**base, "asked": budget, "measured": result.ratio, "file": again.ratio}
            row |= {"over": again.ratio / budget, "predicted": (result.predicted or 0) / (result.original or 1)}
            row |= {"float": original.ratio, "seconds": round(time.process_time() - start, 1)}
            if result.int8 is not None:
                left = result.int8.quantized.float_layers if result.int8.quantized else ()
                row |= {"pays": result.int8.pays, "ms": result.int8.ms, "stay float": len(left)}
            note(row, args.out)


if __name__ == "__main__":
    main()
