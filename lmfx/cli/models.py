"""Finds a model by its name, for the command line.

torchvision:NAME          torchvision's builder, random weights
timm:NAME                 timm's, random weights
package.module:factory    anything importable, also from the current folder, that gives an nn.Module
FILE.pt2                  what torch.export.save wrote; its example is the default one
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmfx.environment.caller_state import one_line
from lmfx.passes.errors import MissingExtra, ModelError
from lmfx.passes.model.quiet import quiet
from lmfx.passes.trace.programs import module_of_program

__all__ = ["PROGRAM", "call", "imported", "load_model", "load_program"]

FORMS = "write torchvision:NAME, timm:NAME, package.module:factory or FILE.pt2"
PROGRAM = ".pt2"


def load_model(spec: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The model that `spec` names, in eval mode.

    `weights` is a safetensors file with its state dict. Without it the model has what its factory gives it: random
    weights for torchvision and timm, which is all that a latency needs.

    Raises `ModelError` for a name that leads to no model (with the closest ones) and for weights that do not fit,
    `MissingExtra` if torchvision or timm is not installed.
    """
    if spec.endswith(PROGRAM):
        model: nn.Module = module_of_program(load_program(spec))
        if weights is not None:
            _load_weights(model, Path(weights), spec)
        return model
    library, colon, name = spec.partition(":")
    if not (library and colon and name):
        raise ModelError(f"the model {spec!r} is not understood: {FORMS}")
    if library == "torchvision":
        model = _torchvision(name)
    elif library == "timm":
        model = _timm(name)
    else:
        model = _factory(spec)
    if weights is not None:
        _load_weights(model, Path(weights), spec)
    return model.eval()


def load_program(path: str) -> torch.export.ExportedProgram:
    """The exported program in a file. Raises `ModelError`."""
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:  # what torch says of a file that is none, or of another version, is of many kinds
        raise ModelError(
            f"cannot read the exported program {path} ({type(error).__name__}: {one_line(error)}): give a file that "
            "torch.export.save wrote with this version of torch"
        ) from error


def _torchvision(name: str) -> nn.Module:
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtra(f'torchvision:{name} needs torchvision ({error}): pip install "lmfx[vision]"') from error
    known = torchvision.models.list_models()
    if name not in known:
        raise ModelError(f"torchvision has no model {name!r}: {_closest(name, known)}")
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # or the backbone's weights are downloaded
    try:
        try:  # some draw their weights slowly, and warn that they do, unless they are told not to
            model: nn.Module = builder(**options, init_weights=False)
        except TypeError as error:
            if "init_weights" not in str(error):
                raise
            model = builder(**options)
    except Exception as error:  # the builders of quantized models need an engine that may be missing
        raise ModelError(f"torchvision could not build {name!r}: {type(error).__name__}: {error}") from error
    return model


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra(f"timm:{name} needs timm ({error}): pip install timm") from error
    known = timm.list_models()
    if name not in known and not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}: {_closest(name, known)}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _factory(spec: str) -> nn.Module:
    made = imported(spec)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ModelError(f"{spec} is a {type(made).__name__}, neither a model nor a function that makes one")
        made = call(made, spec)
    if not isinstance(made, nn.Module):
        raise ModelError(f"{spec} gave a {type(made).__name__}, not a torch.nn.Module: return the model")
    return made


def imported(spec: str) -> Any:
    """What `package.module:name` names, also in the current folder. Raises `ModelError`."""
    path, _, name = spec.partition(":")
    with _current_folder():
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is not None and (path == error.name or path.startswith(error.name + ".")):
                raise ModelError(
                    f"{spec}: there is no module {error.name!r} on the path or in {Path.cwd()}; {FORMS}"
                ) from error
            raise ModelError(f"{spec}: importing {path} failed: {error}; install what it needs") from error
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ModelError(f"{spec}: importing {path} failed: {type(error).__name__}: {error}") from error
        try:
            return operator.attrgetter(name)(module)
        except AttributeError:
            public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ModelError(f"{spec}: {path} has no {name!r}; {_closest(name, public)}") from None


def call(function: Any, spec: str) -> Any:
    """What a function gives without arguments; anything else is returned as it is. Raises `ModelError`."""
    if not callable(function) or isinstance(function, nn.Module):
        return function
    with _current_folder():
        try:
            return function()
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{spec}: calling it without arguments failed: {type(error).__name__}: {error}; "
                "wrap it in a function that takes none"
            ) from error


def _closest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
    return f"did you mean {', '.join(close)}?" if close else "it has none"


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Modules of the current folder can be imported, as `python -m` has it."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _load_weights(model: nn.Module, path: Path, spec: str) -> None:
    import safetensors
    import safetensors.torch

    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"cannot read the weights {path}: {error}; give a safetensors file, made by "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(f"the weights {path} are not those of {spec}: {' '.join(lines[1:3])[:300]}") from error
