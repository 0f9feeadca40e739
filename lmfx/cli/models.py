"""Finds a model by its name, for the command line.

torchvision:NAME          torchvision's builder
timm:NAME                 timm's
package.module:factory    anything importable, also from the current folder, that gives an nn.Module
FILE.pt2                  what torch.export.save wrote; its example is the default one

The weights of the first two are the published ones or random (`lmfx.cli.pretrained`), those of a factory as it makes
them; a safetensors file may take their place.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import operator
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmfx.cli.pretrained import MODES, Unreachable, timm_model, torchvision_model
from lmfx.environment.caller_state import one_line
from lmfx.passes.errors import ModelError
from lmfx.passes.model.quiet import quiet
from lmfx.passes.trace.programs import module_of_program

__all__ = ["PROGRAM", "Loaded", "call", "check_spec", "imported", "load", "load_model", "load_program", "of_zoo"]

FORMS = "write torchvision:NAME, timm:NAME, package.module:factory or FILE.pt2"
PROGRAM = ".pt2"
ZOOS = {"torchvision": torchvision_model, "timm": timm_model}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its weights in words, and why they are random where the published ones were looked for."""

    model: nn.Module
    weights: str
    missing: str | None = None

    @property
    def random(self) -> bool:
        """Whether outputs mean nothing."""
        return self.weights == "random"


def load_model(spec: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The model that `spec` names, in eval mode; see `load`. Without `weights` those of torchvision and timm are
    random, which is all that a latency needs."""
    return load(spec, "random" if weights is None else weights).model


def load(spec: str, weights: str | os.PathLike[str]) -> Loaded:
    """The model that `spec` names, in eval mode, with its weights: "pretrained", "random", "auto" (see
    `lmfx.cli.pretrained`), or a safetensors file with its state dict. What a factory makes stays as it is otherwise.

    Raises `ModelError` for a name that leads to no model (with the closest ones) and for weights that do not fit or
    cannot be had, `MissingExtra` if torchvision or timm is not installed.
    """
    check_spec(spec)
    mode = str(weights) if str(weights) in MODES else None
    if spec.endswith(PROGRAM):
        loaded = Loaded(module_of_program(load_program(spec)), "those of the program")
    elif not of_zoo(spec):
        loaded = Loaded(_factory(spec), "as the factory makes them")
    else:
        loaded = _zoo_model(spec, mode or "random")
    if mode is None:
        _load_weights(loaded.model, Path(weights), spec)
        loaded = Loaded(loaded.model, str(weights))
    if not spec.endswith(PROGRAM):  # which is what it was exported as
        loaded.model.eval()
    return loaded


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


def check_spec(spec: str) -> None:
    """Raises `ModelError` for what does not have the form of a model's name."""
    if spec.endswith(PROGRAM):
        return
    library, colon, name = spec.partition(":")
    misspelt = library not in ZOOS and (library.lower() in ZOOS or name.startswith(":"))
    if not (library and colon and name) or misspelt:
        raise ModelError(f"the model {spec!r} is not understood: {_meant(spec)}{FORMS}")
    if library.endswith(".py") or "/" in library:
        dotted = library.removesuffix(".py").strip("./").replace("/", ".")
        raise ModelError(f"{spec}: {library} is a file; write its module, {dotted}:{name}")


def of_zoo(spec: str) -> bool:
    """Whether it names a model of torchvision or timm."""
    return spec.partition(":")[0] in ZOOS


def _zoo_model(spec: str, mode: str) -> Loaded:
    library, _, name = spec.partition(":")
    missing = None
    if mode != "random":
        try:
            return Loaded(*ZOOS[library](name, True, _closest))
        except Unreachable as error:
            missing = str(error)
        if mode == "pretrained":
            raise ModelError(
                f"the pretrained weights of {spec} cannot be had ({missing}): give a file, --weights FILE.safetensors, "
                "or --weights random, whose latencies hold and whose outputs mean nothing"
            )
    return Loaded(*ZOOS[library](name, False, _closest), missing)


def _meant(spec: str) -> str:
    """What was probably meant by a name that is none."""
    for wrong in ("/", ":", "."):  # timm/resnet18, TIMM::resnet18, torchvision.resnet18
        library, found, name = spec.partition(wrong)
        if found and library.lower() in ZOOS:
            return f"did you mean {library.lower()}:{name.lower().removeprefix('models.').lstrip('/:')}? "
    path = Path(spec)
    if Path(f"{spec}.py").is_file():
        path = Path(f"{spec}.py")
    if path.suffix in PICKLES or path.suffix == ".safetensors":
        return (
            "a file of weights does not say which network it is of: name the network, and give the file to --weights; "
        )
    if path.suffix == ".py":
        return f"did you mean {path.stem}:NAME, with the name of a function in {path} that makes the model? "
    if spec.isidentifier():
        return f"did you mean torchvision:{spec} or timm:{spec}? "
    return ""


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
                near = difflib.get_close_matches(path, [file.stem for file in Path.cwd().glob("*.py")], n=1, cutoff=0.6)
                meant = f"did you mean {near[0]}:{name}? " if near else ""
                raise ModelError(
                    f"{spec}: there is no module {error.name!r} on the path or in {Path.cwd()}; {meant}{FORMS}"
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
    lower = {n.lower(): n for n in names}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"it has {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "it has none"


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

    if path.suffix in PICKLES:
        raise ModelError(
            f"the weights {path} are a pickle, and lmfx reads safetensors only, which run no code. Make such a file: "
            f'python -c "import torch; from safetensors.torch import save_file; save_file({{k: v.clone() for k, v in '
            f"torch.load('{path}', map_location='cpu', weights_only=True).items()}}, "
            f"'{path.with_suffix('.safetensors')}')\""
        )
    if not path.exists():
        choices = ", ".join(MODES)
        raise ModelError(f"cannot read the weights {path}: there is no such file; give one, or one of {choices}")
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
