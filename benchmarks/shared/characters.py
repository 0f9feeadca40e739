"""Drawn characters: a data set that is harder than digits, needs no download, and is drawn anew from its seed.

    python benchmarks/shared/characters.py                             out/characters.png, a contact sheet
    python benchmarks/shared/characters.py --train resnet mobilenet  train the small networks, print accuracy and CPU
    seconds

Each image is a letter or digit in a font that matplotlib or Pillow ships, at a random size, turned, sheared, stretched
and moved, in a random colour on a background of another colour with clouds, stripes and noise:

    image = background + mask (colour - background) + noise        mask = grid_sample(glyph, affine_grid(theta))

Every glyph is rendered once a font and a size; the distortion is done in batches. A split is a stream of random numbers
of its own, so no split shares an image with another. The face is that of `examples/digits.py`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.shared.small_networks import SmallMobileNetV2, SmallResNet

__all__ = ["NETWORKS", "Characters", "Classifier", "accuracy", "contact_sheet", "draw", "glyphs", "load", "train"]

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = (  # files that matplotlib ships; Pillow's own font is added to them
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)
SIZES = (26, 32, 38, 44)  # in pixels on the glyph's own canvas
CANVAS = 64
SPLITS = {"train": 0, "test": 1, "held": 2}
MEAN, DEVIATION = 0.5, 0.25
CHUNK = 2048


@dataclass(frozen=True)
class Characters:
    """Images are float32 `(n, 3, size, size)`, about -2 to 2; labels int64 `(n,)`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@functools.lru_cache(1)
def glyphs() -> Tensor:
    """Masks from 0 to 1 of every character: `(fonts, sizes, 62, 64, 64)`, centred."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

    def sized(size: int) -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
        return [*(ImageFont.truetype(str(folder / f), size) for f in FONTS), ImageFont.load_default(size)]

    def mask(character: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> np.ndarray:
        canvas = Image.new("L", (CANVAS, CANVAS))
        pen = ImageDraw.Draw(canvas)
        left, top, right, bottom = pen.textbbox((0, 0), character, font=font)
        at = ((CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2)
        pen.text(at, character, fill=255, font=font)
        return np.asarray(canvas, dtype=np.float32) / 255

    drawn = [[[mask(c, font) for c in ALPHABET] for font in sized(size)] for size in SIZES]
    return torch.from_numpy(np.array(drawn, dtype=np.float32)).transpose(0, 1).contiguous()


def draw(
    count: int, seed: int = 0, *, split: str = "train", classes: int = 36, size: int = 32
) -> tuple[Tensor, Tensor]:
    """`count` images, uint8 `(n, 3, size, size)`, and their labels, each class as often as any other (or once more).

    The same arguments give the same bytes. `classes` of 36 are the digits and the capitals, 62 small letters as well.
    """
    if split not in SPLITS or not 2 <= classes <= len(ALPHABET) or not 16 <= size <= CANVAS or count < 1 or seed < 0:
        raise SystemExit(
            f"draw(count={count}, seed={seed}, split={split!r}, classes={classes}, size={size}): split is one of "
            f"{', '.join(SPLITS)}, classes 2 to {len(ALPHABET)}, size 16 to {CANVAS}, count and seed are not negative"
        )
    # One stream a split: numpy's seed sequences are independent for different keys.
    key = np.random.SeedSequence([seed, SPLITS[split], classes, size]).generate_state(2, np.uint64)[0]
    random = torch.Generator().manual_seed(int(key) & (2**63 - 1))
    labels = (torch.arange(count) % classes)[torch.randperm(count, generator=random)]
    return torch.cat([_batch(part, size, random) for part in labels.split(CHUNK)]), labels


def _batch(labels: Tensor, size: int, random: torch.Generator) -> Tensor:
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=random) * (high - low) + low

    atlas = glyphs()
    font = torch.randint(atlas.shape[0], (n,), generator=random)
    pixels = torch.randint(atlas.shape[1], (n,), generator=random)
    # theta takes a place in the image to a place in the glyph: turn, shear, stretch, move.
    angle, shear = uniform(-0.35, 0.35), uniform(-0.25, 0.25)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], 1).view(n, 2, 2)
    linear = turned * uniform(0.75, 1.15, 2, 1)
    theta = torch.cat([linear, uniform(-0.18, 0.18, 2, 1)], 2)
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    mask = F.grid_sample(atlas[font, pixels, labels][:, None], grid, align_corners=False)

    colour, ground = uniform(0, 1, 3), uniform(0, 1, 3)
    # Where letter and ground are about as bright, the letter gets brighter or darker until it can be told apart.
    gap = (colour - ground).mean(1, keepdim=True)
    side = torch.where(ground.mean(1, keepdim=True) > 0.5, -1.0, 1.0)
    colour = (colour + torch.where(gap.abs() < 0.25, side * 0.45 - gap, 0.0)).clamp(0, 1)

    clouds = F.interpolate(uniform(-1, 1, 3, 4, 4), (size, size), mode="bicubic", align_corners=False)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    wave = uniform(0, 2 * math.pi, 1, 1)
    direction = uniform(0, math.pi, 1, 1)
    stripes = (uniform(4, 14, 1, 1) * (direction.cos() * x + direction.sin() * y) + wave).sin()[:, None]
    texture = clouds * uniform(0, 0.16, 1, 1, 1) + stripes * uniform(0, 0.09, 1, 1, 1)
    back = ground[:, :, None, None] + texture
    image = back + mask * (colour[:, :, None, None] - back)
    image = image + torch.randn(n, 3, size, size, generator=random) * uniform(0, 0.06, 1, 1, 1)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def normalised(images: Tensor) -> Tensor:
    """uint8 images as the networks take them."""
    return (images.float() / 255 - MEAN) / DEVIATION


def load(seed: int = 0, *, train: int = 18000, test: int = 3600, classes: int = 36, size: int = 32) -> Characters:
    """Images to train on and to test on, drawn from `seed`."""
    train_images, train_labels = draw(train, seed, classes=classes, size=size)
    test_images, test_labels = draw(test, seed, split="test", classes=classes, size=size)
    return Characters(normalised(train_images), train_labels, normalised(test_images), test_labels)


Classifier = SmallResNet
NETWORKS: dict[str, Callable[..., nn.Module]] = {"resnet": SmallResNet, "mobilenet": SmallMobileNetV2}


def train(
    model: nn.Module, data: Characters, *, epochs: int = 6, seed: int = 0, progress: bool = True, lr: float = 8e-3
) -> nn.Module:
    """Trains `model` in place with AdamW and one cycle of the learning rate, and returns it in eval mode."""
    size, random = 64, torch.Generator().manual_seed(seed)
    steps = epochs * (len(data.train_labels) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    model.train()
    with tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(data.train_labels), generator=random)
            for chosen in order[: len(order) // size * size].split(size):
                loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that `model` puts into the right class, from 0 to 1."""
    logits = torch.cat([model(batch) for batch in images.split(256)])
    return float((logits.argmax(1) == labels).float().mean())


def contact_sheet(file: Path, *, seed: int = 0, classes: int = 36, size: int = 32, columns: int = 18) -> None:
    """One PNG with ten rows of images."""
    images, _ = draw(10 * columns, seed, classes=classes, size=size)
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().numpy()).save(file)


def main() -> None:
    """Write the contact sheet, or train and print one line a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/characters.png"), help="the sheet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=36, help="36 or 62 (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels, 16 to 64 (default: %(default)s)")
    parser.add_argument("--count", type=int, default=18000, help="images to train on (default: %(default)s)")
    parser.add_argument("--train", nargs="*", choices=list(NETWORKS), default=[], help="networks to train")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    if not args.train:
        contact_sheet(args.out, seed=args.seed, classes=args.classes, size=args.size)
        print(f"written: {args.out}")
        return
    start = time.process_time()
    data = load(args.seed, train=args.count, classes=args.classes, size=args.size)
    total = len(data.train_labels) + len(data.test_labels)
    print(f"{total} images of {args.size} px, {args.classes} classes: {time.process_time() - start:.1f} s CPU time")
    for name in args.train:
        torch.manual_seed(args.seed)
        model = NETWORKS[name](args.width, args.classes)
        start = time.process_time()
        train(model, data, epochs=args.epochs, seed=args.seed)
        seconds = time.process_time() - start
        parameters = sum(p.numel() for p in model.parameters())
        found = accuracy(model, data.test_images, data.test_labels)
        print(f"{name:10} {found:6.1%}  {seconds:5.0f} s CPU time  {args.epochs} epochs  {parameters:,d} parameters")


if __name__ == "__main__":
    main()
