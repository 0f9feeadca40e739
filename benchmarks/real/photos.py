"""Cuts the photographs that `fetch.sh` got into crops: cal288.npy, held288.npy and held.txt in `$REAL`.

No photograph is in both files, and near-duplicates (an average hash of 64 bits that differs in at most three) are left
out. Three of four crops are a random piece of a photograph, a third to all of its area, sometimes mirrored; the fourth
is an object that was cut out of its photograph (tuxpaint's stamps) before a blurred one. Those with a label in their
name (foolbox) are held out. A module that `fetch.sh` runs.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.real.packages import root

SIZE, LARGEST, CALIBRATION, HELD = 288, 1400, 1024, 512
PHOTOGRAPHS = (  # below $REAL; drawings, screenshots and abstract wallpapers are not in it
    "debian/usr/share/backgrounds/mate/nature/*.jpg",
    "debian/usr/share/backgrounds/*_by_*.jpg",
    "debian/usr/share/wallpapers/{Autumn,DarkestHour,BytheWater,FallenLeaf,EveningGlow,ColorfulCups,Path,Kite,Canopee}/contents/images/1920x1080.jpg",
    "debian/usr/share/doc/opencv-doc/examples/data/{aloeL,apple,baboon,basketball1,board,building,butterfly,chicky_512,ela_original,fruits,graf1,home,leuvenA,licenseplate_motion,messi5,orange,plant,rubberwhale1,squirrel_cls,stuff}.*",
    "site/skimage/data/{astronaut,chelsea,coffee,motorcycle_left,rocket}.*",
    "pictures/foolbox/data/imagenet_*.jpg",
    "pictures/ultralytics/assets/*.jpg",
    "pictures/imgaug/quokka.jpg",
    "pictures/insightface/data/images/t1.jpg",
    "pictures/gradio/media_assets/images/{cheetah,lion,tower}.jpg",
)
RESOURCES = "debian/usr/share/gcompris-qt/rcc/{categorization,details,erase,explore_}*.rcc"
STAMPS = "debian/usr/share/tuxpaint/stamps/{animals,food,plants,vehicles,household,sports,hobbies,clothes}/**/*.png"
NOT_STAMPS = ("cartoon", "toys", "plastic", "mirror")


def found(patterns: tuple[str, ...]) -> list[Path]:
    """The files of some globs with {a,b}, sorted."""
    return sorted({path for pattern in patterns for one in _expanded(pattern) for path in root().glob(one)})


def _expanded(pattern: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    rests = _expanded(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in match[1].split(",") for rest in rests]


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures, none nearly like one before."""
    seen: list[np.ndarray] = []
    for name, image in (*((str(p), _opened(p)) for p in found(PHOTOGRAPHS)), *_inside(found((RESOURCES,)))):
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BILINEAR), dtype=float)
        bits = small > small.mean()
        if min(image.size) >= 160 and all((bits != other).sum() > 3 for other in seen):
            seen.append(bits)
            yield name, image


def _inside(files: list[Path]) -> Iterator[tuple[str, Image.Image]]:
    """The WebP pictures in Qt's resource files: RIFF, a length, WEBP."""
    for file in files:
        data = file.read_bytes()
        for match in re.finditer(rb"RIFF(....)WEBP", data, re.DOTALL):
            length = int.from_bytes(match[1], "little") + 8
            try:
                image = Image.open(io.BytesIO(data[match.start() : match.start() + length]))
                yield f"{file.name}@{match.start()}", _shown(image)
            except (OSError, ValueError):  # the four letters stood there by chance
                continue


def _opened(path: Path) -> Image.Image:
    return _shown(Image.open(path))


def _shown(image: Image.Image) -> Image.Image:
    """RGB on grey, at most `LARGEST` pixels a side."""
    image.draft("RGB", (2 * LARGEST, 2 * LARGEST))
    if image.mode in ("RGBA", "LA", "P"):
        grey = Image.new("RGBA", image.size, (127, 127, 127, 255))
        grey.alpha_composite(image.convert("RGBA"))
        image = grey
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image


def crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """A random piece, scaled to `SIZE`."""
    for _ in range(10):
        area, aspect = image.width * image.height * rng.uniform(0.35, 1), 2 ** rng.uniform(-0.4, 0.4)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= image.width and h <= image.height:
            break
    else:
        w = h = min(image.size)
    x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
    piece = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def composed(stamp: Path, image: Image.Image, rng: random.Random) -> Image.Image:
    """An object before a blurred photograph."""
    ground = crop(image, rng).filter(ImageFilter.GaussianBlur(2))
    cut = Image.open(stamp).convert("RGBA")
    scale = SIZE * rng.uniform(0.6, 0.9) / max(cut.size)
    cut = cut.resize((max(1, int(cut.width * scale)), max(1, int(cut.height * scale))), Image.Resampling.BICUBIC)
    ground.paste(cut, (rng.randint(0, SIZE - cut.width), rng.randint(0, SIZE - cut.height)), cut)
    return ground


def crops(
    images: list[tuple[str, Image.Image]], stamps: list[Path], count: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """`count` crops and where each is from; every photograph as often as any other, or once more."""
    rng = random.Random(seed)
    made, names, order = [], [], [*images]
    rng.shuffle(order)
    for i in range(count):
        name, image = order[i % len(order)]
        if i % 4 == 3 and stamps:
            stamp = stamps[i // 4 % len(stamps)]
            made.append(composed(stamp, image, rng))
            names.append(str(stamp))
        else:
            made.append(crop(image, rng))
            names.append(name)
    return np.stack([np.asarray(m, dtype=np.uint8) for m in made]), names


def main() -> None:
    """Write the three files."""
    images = list(photographs())
    if len(images) < 20:
        raise SystemExit(f"only {len(images)} photographs below {root()}: run benchmarks/real/fetch.sh first")
    stamps = [p for p in found((STAMPS,)) if not any(word in str(p) for word in NOT_STAMPS)]
    rng = random.Random(7)
    rng.shuffle(images)
    rng.shuffle(stamps)
    labelled = [i for i in images if "foolbox" in i[0]]
    others = [i for i in images if "foolbox" not in i[0]]
    few, third = round(0.4 * len(others)), round(0.3 * len(stamps))
    calibration, _ = crops(others[:few], stamps[:third], CALIBRATION, seed=11)
    held, names = crops(labelled + others[few:], stamps[third:], HELD, seed=12)
    np.save(root() / "cal288.npy", calibration)
    np.save(root() / "held288.npy", held)
    (root() / "held.txt").write_text("\n".join(names) + "\n")
    print(f"{len(images)} photographs, {len(stamps)} cut-out objects: {len(calibration)} and {len(held)} crops")
