"""8 bits in ONNX Runtime: the original, the best float plan and the best int8 plan, each as a Q/DQ file.

    REAL=... python benchmarks/runtimes/int8.py [--networks drawn-resnet ...] [--budgets 0.7 0.5] [--out FILE.jsonl]

Files of a network, measured in turn (CPU time of one thread) beside its float original, and judged on inputs that
calibration never saw; files that an earlier run made are taken as they are (`--folder`):

    original            float32
    original static     onnxruntime.quantization.quantize_static of the original's file, by channel and by tensor
    original int8       lmfx.quantize: weights by their Gram, or the nearest; by channel and by tensor
    float plan          compress at a budget, in float; and its int8 files as above
    int8 plan           compress(precision="int8") for the latency that the float plan has in 8 bits

`torchvision-NAME` has random weights (`benchmarks/real/untrained.py`): its latencies are those of a trained network,
what is left of it is not.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lmfx
from benchmarks.real.exported import latencies, outputs
from benchmarks.real.packages import Absent
from benchmarks.real.real import NETWORKS, version
from benchmarks.real.subjects import Subject
from benchmarks.real.untrained import UNTRAINED, untrained

FORMS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, nearest": {"weights": "nearest"},
    "int8 by tensor": {"per_channel": False},
    "int8 by tensor, nearest": {"per_channel": False, "weights": "nearest"},
}
BYTES = {"": True, " by tensor": False}
SUBJECTS = NETWORKS | {f"torchvision-{n}": partial(untrained, n) for n in UNTRAINED}


def static(source: Path, images: Tensor, target: Path, per_channel: bool) -> None:
    """onnxruntime's own: its defaults but for what they say is best on a CPU with VNNI, uint8 times int8, Q/DQ."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {name: image[None].numpy()}

    ready = target.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()


def plan_file(net: nn.Module, example: Any, facts: dict[str, Any], target: Path) -> dict[str, Any]:
    """Writes the file of a plan, and says what is known of it."""
    return {**facts, "wrote": lmfx.export_onnx(net, example, target).name}


def files_of(
    subject: Subject, budgets: list[float], folder: Path, quick: bool, plans: Sequence[str] = ("float", "int8")
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every file with what is to be said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    model, example = subject.model(), subject.example
    images = subject.images("cal", subject.calibration, subject.size)
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def place(name: str) -> Path:
        return folder / (name.replace(" ", "-").replace(",", "") + ".onnx")

    def there(name: str) -> bool:
        """Takes a file that an earlier run has made."""
        told = place(name).with_suffix(".json")
        if told.exists():
            made[name] = place(name), json.loads(told.read_text())
        return told.exists()

    def timed(name: str, write: Callable[[Path], Any]) -> None:
        if there(name):
            return
        target, start = place(name), time.process_time()
        told = write(target)
        facts: dict[str, Any] = {"seconds": round(time.process_time() - start, 1)}
        if isinstance(told, lmfx.Quantized):
            worst = max(told.layers, key=lambda x: (x.error == x.error, x.error))
            facts |= {"divergence": told.divergence, "worst layer": [worst.name, worst.error, worst.nearest_error]}
            facts["warnings"] = list(told.warnings)
        if isinstance(told, dict):
            facts |= told
        made[name] = target, facts
        target.with_suffix(".json").write_text(json.dumps(facts))
        print(f"{subject.name}: {name} {facts}", flush=True)

    def quantized(base: str, net: Any) -> None:
        for form, options in FORMS.items():
            if not quick or "nearest" in form or form == "int8":
                timed(f"{base} {form}", partial(lmfx.quantize, net, images, progress=False, **options))

    timed("original", partial(lmfx.export_onnx, model, example))
    for text, per_channel in BYTES.items():
        timed(f"original static{text}", partial(static, made["original"][0], images[:128], per_channel=per_channel))
    quantized("original", made["original"][0])
    for budget in budgets:
        for kind in plans:
            precision = "fp32" if kind == "float" else kind
            name = f"{kind} plan {budget}"
            if there(name):
                if precision == "fp32":
                    quantized(name, made[name][0])
                continue
            start = time.process_time()
            share = budget
            if precision == "int8":  # as fast as the float plan is in 8 bits
                share = latencies(made["original int8"][0], [made[f"float plan {budget} int8"][0]])[0].ratio
            try:
                net = lmfx.compress(
                    model,
                    example,
                    share,
                    calibration=images,
                    latency="onnxruntime",
                    precision=precision,
                    progress=False,
                )
            except lmfx.InfeasibleBudget as error:
                print(f"{subject.name}: {precision} plan {budget}: {error}", flush=True)
                continue
            result = lmfx.result_of(net)
            facts: dict[str, Any] = {"asked": share, "compressed": round(time.process_time() - start, 1)}
            facts |= {"predicted": result.predicted, "measured": result.measured, "of original": result.ratio}
            facts["quality"] = str(result.quality)
            if result.int8 is not None:
                facts |= {"ms": result.int8.ms, "pays": result.int8.pays}
                left = result.int8.quantized.float_layers if result.int8.quantized else ()
                facts["stay float"] = [f"{n}: {w}" for n, w in left]
            timed(name, partial(plan_file, net, example, facts))
            if precision == "fp32":
                quantized(name, made[name][0])
    return made


def main() -> None:
    """Makes, measures and judges all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["drawn-resnet", "drawn-mobilenet"], choices=list(SUBJECTS))
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.7, 0.5])
    parser.add_argument("--held", type=int, default=None, help="inputs to judge on (default: the benchmark's)")
    parser.add_argument("--folder", type=Path, default=Path("out/int8"))
    parser.add_argument("--quick", action="store_true", help="no files by tensor of weights by their Gram")
    parser.add_argument("--plans", nargs="+", default=["float", "int8"], choices=["float", "int8"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in args.networks:
        try:
            subject = SUBJECTS[name]()
            made = files_of(subject, args.budgets, args.folder / name, args.quick, args.plans)
        except Absent as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        original = made["original"][0]
        held = subject.images("held", args.held or subject.held, subject.size)
        reference = outputs(original, held)
        times = latencies(original, [f for f, _ in made.values()])
        with args.out.open("a") as file:
            for (what, (path, facts)), ms in zip(made.items(), times, strict=True):
                judged = subject.judge(outputs(path, held), reference)
                row = {"network": name, "file": what, "ratio": ms.ratio, "spread": ms.spread, "ms": ms.ms, **judged}
                file.write(json.dumps({**row, **facts, "commit": version()}) + "\n")
                figures = ", ".join(f"{k} {v:.4g}" for k, v in judged.items())
                print(f"{name:18} {what:34} {ms.ms:8.3f} ms {ms.ratio:6.3f}   {figures}", flush=True)


if __name__ == "__main__":
    main()
