"""No architecture is known by name, because what the compiler does follows from the graph; and no name is taken twice.

A stem is a part of the names of architectures and of their classes. The long ones may occur nowhere, the short ones not
as words of their own (`raft` is in `draft`).
"""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "zoo.csv"
SOURCES = sorted(
    p for folder in ("passes", "lmfx") for p in (ROOT / folder).rglob("*.py") if "lmfx/passes" not in str(p)
)

LONG = """
    alexnet autoencoderkl autoencodertiny botnet botnext caformer coatnet controlnet convformer convmixer convnext
    csatv cspnet cspres darknet ddpm deeplab densenet diffusers edgenext efficientformer efficientnet efficientvim
    efficientvit faster_rcnn fasternet fasterrcnn fastvit fbnet focalnet gcresnet gernet ghostnet googlenet
    halonet hardcorenas hgnet hrnet iformer inception keypointrcnn lambda_resnet lambdaresnet lcnet lowformer
    lraspp mambaout maskrcnn maxvit mixnet mnasnet mobilenet mobileone mobilevit nasnet nextvit nf_regnet
    nf_resnet nfnet poolformer rdnet regnet repghost repvgg repvit res2net res2next resnest resnet resnext
    retinanet rexnet selecsls shufflenet shvit sknet skresnet spnasnet squeezenet ssdlite starnet swiftformer
    tiny_vit tinynet transformer2d tresnet unet visformer vovnet vqmodel yolo
"""
SHORT = """
    coat darts davit detr dla dpn fcn fcos levit mc3 mvit pvt r2plus1d r3d raft s3d ssd swin vae vgg vit xception
"""
# timm's and torchvision's own layer types may be named in one place, the table of what they are.
LAYER_TYPES = ("DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d", "FrozenBatchNorm2d")

LONG_NAME = re.compile("|".join(re.sub("_", "[_ -]?", stem) for stem in LONG.split()), re.IGNORECASE)
SHORT_NAME = re.compile(rf"(?<![a-z])(?:{'|'.join(SHORT.split())})(?![a-z])", re.IGNORECASE)


def architectures(text: str) -> list[str]:
    """The names of architectures in a text."""
    return [m.group() for pattern in (LONG_NAME, SHORT_NAME) for m in pattern.finditer(text)]


# The command line's examples and hints name models that one can have.
@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parent.name != "cli"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_architecture_is_named_in_the_compiler(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {f"{path.name}:{i}": names for i, line in enumerate(lines, 1) if (names := architectures(line))}
    assert found == {}
    assert architectures(path.stem) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layer_types_of_third_parties_are_named_in_one_table(path: Path) -> None:
    named = [name for name in LAYER_TYPES if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))]
    assert named == [] or path == ROOT / "passes" / "graph" / "ops.py"


def test_every_family_of_the_zoo_is_known_to_this_test() -> None:
    with TABLE.open(encoding="utf-8") as file:
        models = [row["model"] for row in csv.DictReader(file)]
    assert len(models) >= 325
    assert [m for m in models if not architectures(m.partition("/")[2].replace("_", " "))] == []


@pytest.mark.parametrize(
    "text",
    [
        "# as in a ResNet-18",
        "if name == 'mobilenet_v2':",
        "class MyUNet2D:",
        "VGG",
        "a vit_b block",
        "tiny ViT",
        "SSD300",
    ],
)
def test_a_name_is_found(text: str) -> None:
    assert architectures(text)


@pytest.mark.parametrize("text", ["a draft", "vital", "activation", "the coating", "regions of a network", "conv"])
def test_a_word_that_only_contains_a_short_name_is_not_one(text: str) -> None:
    assert architectures(text) == []


def test_no_two_classes_have_one_name() -> None:
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}
