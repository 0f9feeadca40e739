"""The networks of the zoo by name, with random weights of a trained network's size and an example input that they take.

    tv/NAME              torchvision's builder           tv/NAME.backbone     the backbone of one of its detectors
    timm/NAME            timm's                          diffusers/NAME       a configuration of this file (`DIFFUSION`)
    ddpm/NAME            `zoo_ddpm`

The names are the first column of `benchmarks/results/zoo.csv`. Nothing is downloaded. Inputs are as small as a network
takes: the first of `SIZES` at which its forward runs, else the size it was made for.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.random_plans import randomise_norms
from benchmarks.zoo.denoising import DenoisingNet

__all__ = ["SIZES", "TABLE", "build", "examples", "families", "randomise"]

TABLE = Path(__file__).parents[1] / "results" / "zoo.csv"
SIZES = (96, 128, 160, 224, 256, 300)
VIDEO = {"r3d": (8, 64), "mc3": (8, 64), "r2plus1d": (8, 64), "s3d": (16, 224), "mvit": (16, 224), "swin3d": (8, 64)}

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nobody asks a server for weights


def families(table: Path = TABLE) -> dict[str, str]:
    """Model -> family, in the order of the committed table."""
    with table.open(encoding="utf-8") as file:
        return {row["model"]: row["family"] for row in csv.DictReader(file)}


def build(name: str) -> nn.Module:
    """The network `name` in eval mode with seeded random weights. Raises `KeyError` for a library that is not known."""
    library, _, rest = name.partition("/")
    torch.manual_seed(0)
    model: nn.Module = {"tv": _torchvision, "timm": _timm, "diffusers": _diffusers, "ddpm": _ddpm}[library](rest)
    return randomise(model).eval().requires_grad_(False)


def examples(name: str, model: nn.Module, odd: bool = False, sizes: tuple[int, ...] = SIZES) -> Iterator[Any]:
    """Inputs to try, smallest of `sizes` first; `odd` puts one of an odd size first."""
    library, _, rest = name.partition("/")
    if library == "ddpm":
        yield _NOISY()
        return
    if library == "diffusers":
        yield DIFFUSION[rest][1]()
        return
    if "raft" in rest:
        yield torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)
        return
    for prefix, (frames, size) in VIDEO.items():
        if rest.startswith(prefix):
            yield torch.randn(1, 3, frames, size, size)
            return
    if odd:
        yield torch.randn(1, 3, odd_size := sizes[0] * 3 // 4 + 1, odd_size)
    own = _own_size(model)
    fixed = getattr(model, "default_cfg", {}).get("fixed_input_size", False)
    for size in (own,) if fixed else sorted({own, *sizes}):
        yield torch.randn(1, 3, size, size)


def _own_size(model: nn.Module) -> int:
    if isinstance(size := getattr(model, "image_size", None), int):  # torchvision's transformers
        return size
    return int(getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1])


def randomise(model: nn.Module) -> nn.Module:
    """Norms of a trained network's size, and no parameter that hides what is before it; in place.

    Layer scales of 1e-6, gains of 0 and zero convs would make branches vanish, and with them every error in them.
    """
    randomise_norms(model)
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for parameter in model.parameters():
        value = parameter.data
        if id(parameter) in seen or not value.is_floating_point() or not value.numel():
            continue
        seen.add(id(parameter))
        if float(value.flatten()[0]) in (0.0,) or float(value.abs().max()) < 1e-3:
            constant = bool((value == value.flatten()[0]).all())
            if constant and value.dim() >= 2 and value.numel() > value.shape[0]:
                bound = 1 / math.sqrt(value.numel() / value.shape[0])
                value.copy_((torch.rand(value.shape, generator=generator) * 2 - 1) * bound)
            elif constant:
                value.copy_(torch.rand(value.shape, generator=generator) * 0.4 + 0.1)
    for module in model.modules():  # frozen norms keep all four as buffers
        if type(module).__name__.startswith("FrozenBatchNorm"):
            for name, low, high in (("running_mean", -0.5, 0.5), ("running_var", 0.5, 2.0), ("weight", 0.5, 1.5)):
                buffer: Tensor = getattr(module, name)
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * (high - low) + low)
    return model


def _torchvision(name: str) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    from lmfx.cli.models import load_model

    if name.endswith("_frozenbn"):
        from torchvision.ops.misc import FrozenBatchNorm2d

        whole: nn.Module = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
        return whole.get_submodule("body") if "body" in name else whole
    detector, _, part = name.partition(".")
    model = load_model(f"torchvision:{detector}")
    return model.get_submodule(part) if part else model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _diffusers(name: str) -> nn.Module:
    return DIFFUSION[name][0]()


def _ddpm(name: str) -> nn.Module:
    return DenoisingNet()


def _made(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, kind)(**options)
        return model

    return make


class _Sample(nn.Module):
    """A diffusion model that gives its tensor instead of the dataclass around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return self.model(sample, timestep, return_dict=False)[0]


class _EncodeDecode(nn.Module):
    """The two halves of an autoencoder without the sampling between them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.quant, self.post, self.decoder = (
            model.encoder,
            model.quant_conv,
            model.post_quant_conv,
            model.decoder,
        )

    def forward(self, x: Tensor) -> Any:
        mean, _ = torch.chunk(self.quant(self.encoder(x)), 2, dim=1)
        return self.decoder(self.post(mean))


def _tensors(*shapes: tuple[int, ...], timestep: bool = False) -> Callable[[], Any]:
    def draw() -> Any:
        drawn = [torch.randn(shape) for shape in shapes]
        if timestep:
            drawn.insert(1, torch.tensor([10]))
        return tuple(drawn) if len(drawn) > 1 else drawn[0]

    return draw


_TINY = {"norm_num_groups": 8, "block_out_channels": (32, 64), "layers_per_block": 2}
# The configuration of google/ddpm-cifar10-32.
_CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
_COND: dict[str, Any] = {
    **_TINY,
    "sample_size": 32,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
_VAE: dict[str, Any] = {
    **_TINY,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}
_NOISY = _tensors((1, 3, 32, 32), timestep=True)
DIFFUSION: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ddpm-cifar10-32": (lambda: _Sample(_made("UNet2DModel", **_CIFAR)()), _NOISY),
    "ddpm-cifar10-32-raw": (_made("UNet2DModel", **_CIFAR), _NOISY),
    "unet2d-tiny-noattn": (
        _made(
            "UNet2DModel",
            **_TINY,
            sample_size=32,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            add_attention=False,
        ),
        _NOISY,
    ),
    "unet2d-tiny-resnetblocks": (
        _made(
            "UNet2DModel",
            **_TINY,
            sample_size=32,
            down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
            add_attention=False,
        ),
        _NOISY,
    ),
    "unet2dcond-tiny": (
        _made("UNet2DConditionModel", **_COND, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        _tensors((1, 4, 32, 32), (1, 7, 32), timestep=True),
    ),
    "autoencoderkl-tiny": (_made("AutoencoderKL", **_VAE, latent_channels=4), _tensors((1, 3, 64, 64))),
    "autoencodertiny": (_made("AutoencoderTiny"), _tensors((1, 3, 64, 64))),
    "vqmodel-tiny": (
        _made("VQModel", **{**_VAE, "layers_per_block": 1}, latent_channels=4, num_vq_embeddings=64),
        _tensors((1, 3, 64, 64)),
    ),
    "autoencoderkl-encdec-only": (
        lambda: _EncodeDecode(_made("AutoencoderKL", **_VAE, latent_channels=4)()),
        _tensors((1, 3, 64, 64)),
    ),
    "controlnet-tiny": (
        _made(
            "ControlNetModel",
            **{k: v for k, v in _COND.items() if k != "sample_size"},
            conditioning_embedding_out_channels=(16, 32),
        ),
        _tensors((1, 4, 32, 32), (1, 7, 32), (1, 3, 64, 64), timestep=True),
    ),
}
