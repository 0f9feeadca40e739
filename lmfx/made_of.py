"""Keeps what a network was made of with the network, in `net.meta`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from lmfx.passes.identity.fingerprint import Origin
from lmfx.passes.ir import MergePlan

if TYPE_CHECKING:  # a result holds a frontier, and who builds networks needs none
    from lmfx.int8.compressed import Int8Form
    from lmfx.result import Result

__all__ = ["MadeOf", "made_of", "set_made_of", "weights_digest"]

_KEY = "lmfx_made"


@dataclass(frozen=True)
class MadeOf:
    """What a network was made of: a plan and the graph that it was made for; by `compress`, with a result."""

    plan: MergePlan
    origin: Origin | None  # None of a network that an older lmfx saved
    result: Result | None = None
    int8: Int8Form | None = None  # where its latency is that of a Q/DQ file


def made_of(net: Any) -> MadeOf | None:
    """What a network was made of; None of one that no plan made."""
    found = getattr(net, "meta", {}).get(_KEY) if isinstance(net, nn.Module) else None
    return found if isinstance(found, MadeOf) else None


def set_made_of(net: fx.GraphModule, made: MadeOf | None) -> None:
    """Says what a network was made of, or that no plan made it."""
    if made is None:
        net.meta.pop(_KEY, None)
    else:
        net.meta[_KEY] = made


def weights_digest(net: nn.Module) -> str:
    """A digest of all weights of a network."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
