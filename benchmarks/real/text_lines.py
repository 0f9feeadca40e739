"""A text recogniser (CRNN, EasyOCR's `english_g2`): are lines still read right?

Lines of 64 px are drawn with the fonts that matplotlib ships, dark on light or the other way round, a little turned,
blurred and noisy; (x - 0.5) / 0.5, the last column repeated to the right. `lines` is the share of lines whose text is
right to the letter, `characters` one less the edit distance over the length. Reading is greedy:
the best class of every step, repeats and blanks left out. A module, not a script.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

from benchmarks.real.packages import load_module, set_weights
from benchmarks.real.subjects import Outputs, Subject, agreement, share

__all__ = ["crnn", "draw", "read"]

ALPHABET = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
)
WORDS = """
    about account after again air among answer area army away back bank bear before began behind below between book
    bridge bring brother build business call carry cause centre change charge child city claim clear close coast
    colour common company corner country course cover cross dark daughter decide degree direct doctor door double
    during early earth east effort eight enough even event every example express family famous farm field figure final
    fire floor follow force foreign forest garden general glass gold great green ground group grow guard half happen
    harbour heart heavy history home horse hour house however hundred island join judge keep kind king knee lady lake
    large late laugh leave letter level light listen little machine market matter measure metal middle might minute
    modern moment money month morning mountain music nation nature never night north notice number object ocean office
    often order other paper party people perhaps person picture piece plain plant point poor power present problem
    public quarter question quick quiet railway reach ready reason record report river road royal school science
    season second sentence service seven several shape ship short silver simple sister small social soldier south
    spring square station stone story street strong subject summer support surface system table teacher thought
    thousand through together tower town trade train travel under union value village voice voyage walk wall water
    weather week west wheel white wide window winter woman wonder wood world write yellow young
""".split()  # noqa: SIM905
HEIGHT, WIDTH = 64, 384
SEEDS = {"cal": 101, "held": 202}


def crnn() -> Subject:
    """Seven convs, two bidirectional LSTMs; gray lines of 64 x 384."""
    return Subject(
        name="crnn-english",
        what="text recogniser, gray lines of 64 x 384 px: lines read right",
        model=_model,
        images=_images,
        judge=judge,
        figure="lines",
        size=HEIGHT,
        pinned=("Prediction",),
        smaller=(60, 56, 52, 48, 44, 40, 36, 32),
        held=256,
    )


def judge(outputs: Outputs, original: Outputs) -> dict[str, float]:
    """Lines and characters read right, and agreement with the original step by step (nan at another width)."""
    texts = draw("held", len(outputs[0]))[1]
    given = [read(scores) for scores in outputs[0]]
    errors = sum(_distance(a, b) for a, b in zip(given, texts, strict=True))
    same = outputs[0].shape == original[0].shape
    return {
        "lines": share([a == b for a, b in zip(given, texts, strict=True)]),
        "characters": max(0.0, 1 - errors / sum(map(len, texts))),
        "agreement": agreement(outputs[0], original[0]) if same else float("nan"),
    }


def read(scores: np.ndarray) -> str:
    """The text of one line from its scores, `(steps, 1 + letters)`; class 0 is the blank."""
    best = scores.argmax(-1)
    kept = best[np.insert(best[1:] != best[:-1], 0, True) & (best != 0)]
    return "".join(ALPHABET[i - 1] for i in kept)


@lru_cache(4)
def draw(kind: str, count: int) -> tuple[Tensor, tuple[str, ...]]:
    """Lines `(n, 1, 64, 384)` from -1 to 1, and their texts; "cal" and "held" share no random number."""
    made = [_line(random.Random(f"{SEEDS[kind]} {i}")) for i in range(count)]
    return torch.stack([image for image, _ in made]), tuple(text for _, text in made)


def _line(rng: random.Random) -> tuple[Tensor, str]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    while True:
        text = " ".join(_word(rng) for _ in range(rng.randint(1, 3)))
        font = ImageFont.truetype(str(folder / rng.choice(FONTS)), rng.randint(34, 44))
        left, top, right, bottom = (int(v) for v in font.getbbox(text))
        if right - left <= WIDTH - 24:
            break
    paper, ink = sorted((rng.randint(150, 255), rng.randint(0, 80)), reverse=rng.random() < 0.8)
    image = Image.new("L", (right - left + 20, HEIGHT), paper)
    pen = ImageDraw.Draw(image)
    pen.text((10 - left, (HEIGHT - bottom - top) // 2 + rng.randint(-4, 4)), text, fill=ink, font=font)
    image = image.rotate(rng.uniform(-1.2, 1.2), Image.Resampling.BICUBIC, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.0)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 8), (HEIGHT, image.width))
    pixels = (np.asarray(image, dtype=np.float32) + noise.astype(np.float32)).clip(0, 255) / 127.5 - 1
    return torch.from_numpy(np.pad(pixels, ((0, 0), (0, WIDTH - image.width)), mode="edge"))[None], text


def _word(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return str(rng.randint(0, 99999))
    word = rng.choice(WORDS)
    return rng.choice((word, word, word.capitalize(), word.upper()))


def _distance(a: str, b: str) -> int:
    """Edit distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _images(kind: str, count: int, size: int) -> Tensor:
    lines = draw(kind, count)[0]
    if size == HEIGHT:
        return lines
    shape = (size, round(WIDTH * size / HEIGHT))
    return nn.functional.interpolate(lines, size=shape, mode="bilinear", antialias=True)


class _Reader(nn.Module):
    """The network with the one input that it reads; its second one is for another kind of decoder."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, lines: Tensor) -> Tensor:
        return self.network(lines, None)


def _model() -> nn.Module:
    package = load_module("easyocr.model.vgg_model")
    network = package.Model(input_channel=1, output_channel=256, hidden_size=256, num_class=len(ALPHABET) + 1)
    return _Reader(set_weights(network, "easyocr_en_models/models/english_g2.pth")).eval()
