"""A network becomes twice as fast without a training loop: train a digits classifier, compress it, compare.

    python examples/demo.py                  half the original's latency
    python examples/demo.py --budget 3x      another budget: 0.4, "60%", "0.5ms", "3x"

Prints one table and writes to out/: report.html (what became of the network, and what every other budget would have
cost), net.onnx (what is deployed), plan.json and model.safetensors (for `lmfx.load`), and frontier.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import digits
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import lmfx

CALIBRATION_IMAGES = 256


def interleaved_latency(onnx_files: list[Path], example: Tensor, rounds: int = 300) -> list[float]:
    """The median latency of each file in ms: CPU time of ONNX Runtime on one thread, all files in turn.

    In turn, so that whatever else the machine does falls on all of them alike; as CPU time, so that waiting for a
    processor is not counted.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]) for file in onnx_files
    ]
    feeds = [{session.get_inputs()[0].name: example.numpy()} for session in sessions]
    seen: list[list[float]] = [[] for _ in sessions]
    for turn in tqdm(range(rounds + 20), desc="measuring", unit="round"):
        for session, feed, times in zip(sessions, feeds, seen, strict=True):
            start = time.process_time_ns()
            session.run(None, feed)
            if turn >= 20:  # the first rounds warm up
                times.append((time.process_time_ns() - start) / 1e6)
    return [statistics.median(times) for times in seen]


def table(networks: dict[str, nn.Module], latency: list[float], data: digits.Digits) -> str:
    """One row a network. Latency is relative to the first."""
    lines = [f"{'':28} {'accuracy':>9} {'latency':>9} {'ratio':>7} {'convs':>6} {'parameters':>11}"]
    for (name, network), ms in zip(networks.items(), latency, strict=True):
        accuracy = digits.accuracy(network, data.test_images, data.test_labels)
        convs = sum(isinstance(module, nn.Conv2d) for module in network.modules())
        parameters = sum(parameter.numel() for parameter in network.parameters())
        lines.append(
            f"{name:28} {accuracy:8.1%} {ms:6.3f} ms {ms / latency[0]:6.2f}x {convs:6d} {parameters:11,d}".rstrip()
        )
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.5", help='0.5, "60%%", "0.5ms" or "2x" (default: %(default)s)')
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder to write (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of training the original (default: %(default)s)")
    parser.add_argument(
        "--distill-epochs", type=int, default=2, help="epochs of distilling the merged network (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the data split, weights and order (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Train, compress, distill, compare."""
    args = options()
    budget = lmfx.Budget.parse(args.budget)  # a mistake is told before the training, not after
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    data = digits.load(args.seed)
    model = digits.train(digits.Classifier(), data, epochs=args.epochs, seed=args.seed)
    example = data.test_images[:1]
    calibration = data.train_images[:CALIBRATION_IMAGES]  # no labels

    # All that lmfx needs: no labels, no training. `merge=False` gives the trainable form, which is merged in a moment.
    student = lmfx.compress(model, example, budget, calibration=calibration, cache_dir=args.out / "cache", merge=False)
    net = lmfx.merge(student)

    # Optional: a short fine-tuning against the original's outputs, still without labels.
    batches = list(data.train_images.split(64))
    distilled = lmfx.merge(lmfx.distill(student, model, batches, epochs=args.distill_epochs))

    networks: dict[str, nn.Module] = {"original": model, "merged": net, "merged, briefly distilled": distilled}
    files = [args.out / name for name in ("original.onnx", "net.onnx", "distilled.onnx")]
    for network, file in zip(networks.values(), files, strict=True):
        lmfx.export_onnx(network, example, file)
    lmfx.save(net, args.out)
    result = lmfx.result_of(net)
    if result.frontier is not None:  # every latency that could have been chosen, and what it was predicted to cost
        result.frontier.plot(args.out / "frontier.png", mark=budget)

    latency = interleaved_latency(files, example)
    report = lmfx.report(net)
    report.html(args.out / "report.html", title="digits")
    print(report)
    print()
    print(f"{len(data.test_labels)} held-out digits; ONNX Runtime, one thread, CPU time, median; budget {budget}")
    print(table(networks, latency, data))
    print(f"\nWritten to {args.out}/: report.html, net.onnx, plan.json, model.safetensors, frontier.png")


if __name__ == "__main__":
    main()
