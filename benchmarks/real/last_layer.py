"""What a smaller input alone keeps, as it is and with its last layer fitted ("A smaller input", docs/quality.md).

    REAL=... python benchmarks/real/last_layer.py --networks efficientnet-lite0 --sizes 192 160

Of each size: the original on smaller images; the same with the scale of its scores set; and with what its last layer
reads brought to what it reads at its own size (`lmfx.quality.last_layer_fit`). Inputs that nothing saw judge. A network
whose package is not there is left out by name.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import lmfx
from benchmarks.real.real import NETWORKS, subjects
from benchmarks.real.subjects import Subject
from lmfx.calibration.images import Calibration, as_calibration
from lmfx.passes.model.model_copy import deep_copy
from lmfx.planning.scaled_images import scaled, scaled_example, size_of, usual_sizes
from lmfx.quality import Judge
from lmfx.quality.last_layer_fit import fit_last_layers
from lmfx.quality.output_scale import set_scale


def figures(subject: Subject, heights: list[int]) -> list[dict[str, Any]]:
    """A row of agreement and loss for each size and way."""
    images = as_calibration(subject.images("cal", subject.calibration, subject.size), subject.example)
    graph, roles = lmfx.trace(subject.model(), subject.example), images.roles()
    held = Judge(graph, as_calibration(subject.images("held", subject.held, subject.size), subject.example))
    choose, own = Judge(graph, roles.choose), size_of(images)
    rows = []
    for size in [(h, h) for h in heights] or usual_sizes(graph, own):
        small = lmfx.trace(subject.model(), scaled_example(subject.example, own, size))
        seen = scaled(roles.choose, size)
        scale, fit = deep_copy(small), deep_copy(small)
        set_scale(scale, choose, outputs=choose.outputs_of(scale, seen))
        fit_last_layers(fit, graph, scaled(roles.fit, size), roles.fit, choose, partial(_outputs, choose, seen))
        for way, net in (("as it is", small), ("scale of the scores", scale), ("last layer fitted", fit)):
            quality = held.of(held.outputs_of(net, scaled(held.images, size)))
            row = {"network": subject.name, "size": size[0], "way": way, "divergence": quality.divergence}
            row |= {"kept": quality.kept, "kl": quality.kl}
            print(f"{subject.name} {size[0]:4d}  {way:20}  {quality}", flush=True)
            rows.append(row)
    return rows


def _outputs(judge: Judge, images: Calibration, net: fx.GraphModule) -> list[Tensor]:
    return judge.outputs_of(net, images)


def main() -> None:
    """Print the figures of each network and size, as they are ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["efficientnet-lite0"], choices=list(NETWORKS))
    parser.add_argument("--sizes", nargs="*", type=int, default=[], help="heights; those that suit the network")
    parser.add_argument("--results", type=Path, help="append a line of JSON a network, size and way")
    args = parser.parse_args()
    torch.manual_seed(0)
    for subject in subjects(args.networks).values():
        rows = figures(subject, args.sizes)
        if args.results is not None:
            with args.results.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
