"""Gets a model of torchvision or timm with its published weights, or says why that is not to be.

pretrained    the weights that the library names as its default for the model; an error where they cannot be had
random        none: latencies hold, outputs mean nothing
auto          the published ones where they can be had, else random ones and a line that says so

The libraries download by themselves, into their own caches. timm's client tries for minutes where there is no network,
so that is found out first, and then only its cache is looked at.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lmfx.passes.errors import MissingExtra, ModelError

__all__ = ["MODES", "Unreachable", "timm_model", "torchvision_model"]

MODES = ("auto", "pretrained", "random")
TIMEOUT = 10  # seconds without a byte


class Unreachable(Exception):
    """The published weights cannot be had; the text says why."""


def torchvision_model(name: str, pretrained: bool, closest: Callable[[str, list[str]], str]) -> tuple[nn.Module, str]:
    """(the model, its weights in words). Raises `ModelError`, `MissingExtra`, and `Unreachable` without the weights."""
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtra(f'torchvision:{name} needs torchvision ({error}): pip install "lmfx[vision]"') from error
    known = torchvision.models.list_models()
    if name not in known:
        raise ModelError(f"torchvision has no model {name!r}: {closest(name, known)}")
    builder = torchvision.models.get_model_builder(name)
    if pretrained:
        weights = next(iter(torchvision.models.get_model_weights(name)), None)
        if weights is None:
            raise Unreachable("torchvision has none for it")
        weights = torchvision.models.get_model_weights(name).DEFAULT
        with _patience():
            try:
                return builder(weights=weights), f"{weights} of torchvision"
            except (OSError, RuntimeError) as error:  # no network; a file that is damaged
                raise Unreachable(_reason(error)) from error
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # or the backbone's weights are downloaded
    try:
        try:  # some draw their weights slowly, and warn that they do, unless they are told not to
            return builder(**options, init_weights=False), "random"
        except TypeError as error:
            if "init_weights" not in str(error):
                raise
            return builder(**options), "random"
    except Exception as error:  # the builders of quantized models need an engine that may be missing
        raise ModelError(f"torchvision could not build {name!r}: {type(error).__name__}: {error}") from error


def timm_model(name: str, pretrained: bool, closest: Callable[[str, list[str]], str]) -> tuple[nn.Module, str]:
    """(the model, its weights in words). Raises `ModelError`, `MissingExtra`, and `Unreachable` without the weights."""
    try:
        import timm
    except ImportError as error:
        raise MissingExtra(f'timm:{name} needs timm ({error}): pip install "lmfx[vision]"') from error
    known = timm.list_models()
    if name not in known and not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}: {closest(name, known)}")
    try:
        if not pretrained:
            return timm.create_model(name, pretrained=False), "random"
        if not timm.models.is_model_pretrained(name):
            raise Unreachable("timm has none for it")
        with _patience(), _cache_only_without_network():
            try:
                model = timm.create_model(name, pretrained=True)
            except Exception as error:  # the hub's client and what it is built on raise errors of a dozen classes
                raise Unreachable(_reason(error)) from error
    except RuntimeError as error:  # a tag that is not there
        raise ModelError(f"timm could not build {name!r}: {error}") from error
    config = getattr(model, "pretrained_cfg", None) or {}
    return model, f"{config.get('architecture', name)}.{config.get('tag', '')} of timm".replace(". of", " of")


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A connection that says nothing is given up."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _cache_only_without_network() -> Iterator[None]:
    """Without a way to the hub its client only looks into its cache within."""
    from huggingface_hub import constants

    if getattr(constants, "HF_HUB_OFFLINE", True) or _answers(os.environ.get("HF_ENDPOINT", constants.ENDPOINT)):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:  # an answer
        return True
    except (OSError, ValueError):
        return False
    return True


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
