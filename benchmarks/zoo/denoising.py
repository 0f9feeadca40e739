"""The denoising network of DDIM's public code in its CIFAR-10 configuration (Song, Meng, Ermon, ICLR 2021).

LayerMerge's diffusion experiments run on it; no package has it, so it is written down here: 89 convs, group norms,
attention of 1 x 1 convs at 16 x 16, a time embedding added in every block, and long skips that are concatenated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DenoisingNet"]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _time_embedding(timesteps: Tensor, width: int) -> Tensor:
    half = width // 2
    steps = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * steps[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.temb_proj = nn.Linear(width, outer)
        self.norm2, self.dropout, self.conv2 = _norm(outer), nn.Dropout(0.1), nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(_swish(self.norm1(x)))
        h = h + self.temb_proj(_swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(_swish(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        b, c, height, wide = q.shape
        weights = torch.bmm(q.reshape(b, c, height * wide).permute(0, 2, 1), k.reshape(b, c, height * wide))
        weights = F.softmax(weights * int(c) ** -0.5, dim=2).permute(0, 2, 1)
        mixed = torch.bmm(v.reshape(b, c, height * wide), weights).reshape(b, c, height, wide)
        return x + self.proj_out(mixed)


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="constant", value=0))


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stage(nn.Module):
    """The blocks of one size, each with its attention or none, and what changes the size at the end."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], resample: nn.Module | None) -> None:
        super().__init__()
        self.block, self.attn, self.resample = nn.ModuleList(blocks), nn.ModuleList(attention), resample

    def attend(self, i: int, h: Tensor) -> Tensor:
        mixed: Tensor = self.attn[i](h) if len(self.attn) else h
        return mixed


class DenoisingNet(nn.Module):
    """forward(images (n, 3, s, s), timesteps (n,)) -> noise (n, 3, s, s)."""

    def __init__(self, channels: int = 128, factors: tuple[int, ...] = (1, 2, 2, 2), attention: int = 1) -> None:
        super().__init__()
        self.channels, self.blocks = channels, 2
        width = 4 * channels
        self.dense = nn.ModuleList([nn.Linear(channels, width), nn.Linear(width, width)])
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        skips, now = [channels], channels
        stages = []
        for level, factor in enumerate(factors):
            blocks: list[nn.Module] = []
            for _ in range(self.blocks):
                blocks.append(_Block(now, channels * factor, width))
                now = channels * factor
                skips.append(now)
            last = level == len(factors) - 1
            attentions: list[nn.Module] = [_Attention(now) for _ in blocks if level == attention]
            stages.append(_Stage(blocks, attentions, None if last else _Down(now)))
            skips += [] if last else [now]
        self.down = nn.ModuleList(stages)
        self.mid = nn.ModuleList([_Block(now, now, width), _Attention(now), _Block(now, now, width)])
        stages = []
        for level, factor in reversed(list(enumerate(factors))):
            blocks = []
            for _ in range(self.blocks + 1):
                blocks.append(_Block(now + skips.pop(), channels * factor, width))
                now = channels * factor
            attentions = [_Attention(now) for _ in blocks if level == attention]
            stages.append(_Stage(blocks, attentions, _Up(now) if level else None))
        self.up = nn.ModuleList(stages)
        self.norm_out, self.conv_out = _norm(now), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise in `x` at the steps `t`."""
        temb = _time_embedding(t, self.channels).to(x.dtype)
        temb = self.dense[1](_swish(self.dense[0](temb)))
        skips = [self.conv_in(x)]
        for stage in self.down:
            assert isinstance(stage, _Stage)
            for i, block in enumerate(stage.block):
                skips.append(stage.attend(i, block(skips[-1], temb)))
            if stage.resample is not None:
                skips.append(stage.resample(skips[-1]))
        h = self.mid[2](self.mid[1](self.mid[0](skips[-1], temb)), temb)
        for stage in self.up:
            assert isinstance(stage, _Stage)
            for i, block in enumerate(stage.block):
                h = stage.attend(i, block(torch.cat([h, skips.pop()], dim=1), temb))
            if stage.resample is not None:
                h = stage.resample(h)
        result: Tensor = self.conv_out(_swish(self.norm_out(h)))
        return result
