"""Describes a value or a module as one text: equal for equal content, different for different content.

    3, "same", (1, 2), torch.float32     themselves
    a tensor                             shape, dtype and a hash of its bytes; of a weight, where asked, the shape alone
    nn.LeakyReLU(0.1)                    LeakyReLU(negative_slope=0.1), where torch or lmfx has the code
    a module of anybody else             class, code, every attribute, hook, buffer and submodule (see `code_text`)

Keys of all that is stored are made of these texts. What has no content that can be read (a closure, an open file, an
object whose only name is its address, what changes while it runs) is noted in `unsure`: its text has its type and what
can be seen of it, good enough to compare what a person names, and never good enough to serve a stored row.

What does nothing in eval mode (`inplace`, `momentum`, `training`) is left out, and a subclass that overrides nothing is
what it is derived from, so that the same network in another spelling has the same text.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import ops
from .code_text import Code

__all__ = ["Describer", "Weights", "digest_of", "is_foreign", "shortened"]

Weights = Literal["shapes", "types", "values"]
"""What is said of parameters and persistent buffers: shape; shape and dtype; shape, dtype and values."""

MOST_SEEN = 1000  # attributes of objects that nobody knows: one may lead to all there is
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, range)
_NAMED = (*_PLAIN, torch.layout, type(Ellipsis), torch.SymInt, torch.SymFloat, torch.SymBool)
_KINDS = (
    *ops.CONVS,
    *ops.AFFINE,
    *ops.ACTIVATIONS,
    *ops.MAX_POOLS,
    *ops.IDENTITIES,
    nn.Linear,
    nn.GroupNorm,
    nn.LayerNorm,
)
_NORMS = (*ops.BATCH_NORMS, *ops.INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm)
_POOLS = (*ops.AVG_POOLS, *ops.MAX_POOLS)
_SILENT = frozenset({"inplace", "momentum", "training", "track_running_stats", "name"})
_OURS = (__package__ or "passes.identity").rpartition(".")[0] + "."  # of whatever folder of passes/
# What every nn.Module has; hooks and tensors are described by themselves.
_MACHINERY = frozenset(vars(nn.Module())) | {"_version", "_backward_hooks", "_load_state_dict_post_hooks"}


def digest_of(lines: Iterable[str], length: int = 16) -> str:
    """A short hash of texts."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:length]


def shortened(text: str, length: int = 160) -> str:
    """The text, or its beginning and a hash of the whole."""
    return text if len(text) <= length else f"{text[:length]}...#{digest_of([text], 12)}"


def is_foreign(module: nn.Module) -> bool:
    """Whether neither torch nor lmfx says what a module computes: it has a class of others, hooks, or a new forward, or
    something in it has."""
    return any(_is_foreign(m) for m in module.modules())


def _is_foreign(module: nn.Module) -> bool:
    if ops.has_hooks(module) or "forward" in vars(module):
        return True
    return not _known(type(module)) and _kind(module) is None


def _known(kind: type) -> bool:
    return kind.__module__.startswith(("torch.nn.", _OURS))


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The torch.nn class, of those that lmfx knows, that a module is plainly one of."""
    if type(module) in _KINDS:
        return type(module)
    found = [k for k in _KINDS if isinstance(module, k) and ops.is_plain(module, k)]
    return max(found, key=lambda k: len(k.__mro__)) if found and not _known(type(module)) else None


class Describer:
    """Makes texts, and notes in `unsure` what it could not tell apart.

    `weights` says what is told of parameters and persistent buffers. `code` adds the code of foreign classes and
    functions, which is only comparable within one version of Python, `versions` the versions of the packages that have
    theirs. `timing` leaves out what changes values but no time (a norm's eps). `volatile` are paths of attributes that
    change while the network runs: they are left out.
    """

    def __init__(
        self,
        weights: Weights = "shapes",
        *,
        code: bool = False,
        versions: bool = True,
        timing: bool = False,
        volatile: Iterable[str] = (),
    ) -> None:
        self.weights, self.code, self.timing = weights, code, timing
        self.versions = versions
        self.volatile = frozenset(volatile)
        self.unsure: list[str] = []
        self._tensors: dict[int, tuple[int, Tensor]] = {}  # which parameter is which, so that shared ones are seen
        self._left = MOST_SEEN
        self._open: list[int] = []  # what is being described: a cycle is told by its depth
        self._code = Code(self)

    # --- values -------------------------------------------------------------------------------------------------------

    def value(self, value: Any, where: str = "") -> str:
        """The text of any value. `where` names it for `unsure`."""
        if type(value) in _NAMED or isinstance(value, torch.layout):
            return repr(value)
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return self.array(value, where)
        if id(value) in self._open:
            return f"<the one {len(self._open) - self._open.index(id(value))} above>"
        self._open.append(id(value))
        try:
            return self._held(value, where)
        finally:
            self._open.pop()

    def _held(self, value: Any, where: str) -> str:
        kind = type(value)
        if isinstance(value, nn.Module):
            return self.module(value, where)
        if isinstance(value, enum.Enum):
            return f"{kind.__qualname__}.{value.name}"
        if isinstance(value, slice):
            return f"slice({self.items((value.start, value.stop, value.step), where)})"
        if isinstance(value, (tuple, list)) and not (kind is not tuple and hasattr(value, "_fields")):
            known = kind in (tuple, list, torch.Size) or kind.__module__.startswith("torch.")  # immutable_list of fx
            text = f"({self.items(value, where)})" if isinstance(value, tuple) else f"[{self.items(value, where)}]"
            return text if known else self.unknown(value, where) + text
        if kind in (set, frozenset):
            return "{" + ", ".join(sorted(self.value(v, where) for v in value)) + "}"
        if (
            kind in (dict, collections.OrderedDict, types.MappingProxyType)
            or kind.__module__ == "torch.fx.immutable_collections"
        ):
            return (
                "{"
                + ", ".join(f"{self.value(k, where)}: {self.value(v, f'{where}.{k}')}" for k, v in value.items())
                + "}"
            )
        if isinstance(value, tuple):  # with names
            return f"{self._code.kind(kind, where)}({self.items(value, where)})"
        if isinstance(value, types.SimpleNamespace) and kind is types.SimpleNamespace:
            return f"namespace{self.value(vars(value), where)}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            held = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
            return f"{self._code.kind(kind, where)}{self.value({**vars_of(value), **held}, where)}"
        if kind is functools.partial:
            return f"partial({self.value(value.func, where)}, {self.value((value.args, value.keywords), where)})"
        if callable(value):
            return self._code.function(value, where)
        return self.unknown(value, where)

    def items(self, values: Iterable[Any], where: str) -> str:
        """The texts of several values."""
        return ", ".join(self.value(v, where) for v in values)

    def unknown(self, value: Any, where: str, why: str = "") -> str:
        """A value's type, and what can be seen of its attributes: it may tell two apart, but is not sure."""
        kind = value if isinstance(value, type) else type(value)
        self.unsure.append(
            f"{where or 'a value'}: {why or f'a {kind.__qualname__} has no content that can be compared'}"
        )
        return f"<{kind.__module__}.{kind.__qualname__}>{self._seen(value, where)}"

    def _seen(self, value: Any, where: str) -> str:
        if isinstance(value, (type, types.ModuleType, types.FunctionType, Tensor)):
            return ""
        slots = [n for k in type(value).__mro__ for n in _texts(vars(k).get("__slots__", ()))]
        held = {n: getattr(value, n) for n in slots if n not in ("__dict__", "__weakref__") and hasattr(value, n)}
        held |= vars_of(value)
        self._left -= len(held)
        if not held or self._left < 0:
            return ""
        return "{" + ", ".join(f"{k}: {self.value(v, f'{where}.{k}')}" for k, v in held.items()) + "}"

    def array(self, value: Any, where: str = "", weights: Weights = "values") -> str:
        """Shape, dtype and bytes of a tensor or array, as far as `weights` asks for them."""
        if not isinstance(value, Tensor):
            if value.dtype.hasobject:
                return self.unknown(value, where)
            return f"numpy{value.shape}:{value.dtype}#{_hash(np.ascontiguousarray(value).tobytes())}"
        shape = f"{list(value.shape)}"
        if weights == "shapes":
            return shape
        text = f"{shape}:{str(value.dtype).removeprefix('torch.')}"
        if (
            type(value) not in (Tensor, nn.Parameter, nn.Buffer)
            or value.layout is not torch.strided
            or value.is_quantized
        ):
            return self.unknown(value, where) + text
        if weights == "types":
            return text
        if value.is_meta:
            return self.unknown(value, where, "a tensor on the meta device has no values") + text
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return f"{text}#{_hash(plain.reshape(-1).view(torch.uint8).numpy())}"

    # --- modules ------------------------------------------------------------------------------------------------------

    def module(self, module: nn.Module, path: str = "") -> str:
        """What a module computes in eval mode."""
        if not _is_foreign(module):
            kind = _kind(module) or type(module)
            constants: Any = getattr(kind, "__constants__", ()) if kind.__module__.startswith("torch.") else ()
            plain = {n: getattr(module, n) for n in constants} if kind in _KINDS and constants else vars(module)
            return self._module(kind.__name__, module, self._told(module, plain), path)
        held = {k: v for k, v in vars(module).items() if k not in _MACHINERY}
        hooks: list[Any] = [list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())]
        hooks += [len(module._forward_pre_hooks_with_kwargs), len(module._forward_hooks_with_kwargs)]
        more = ", ".join(f"{k}={self.attribute(v, path, k)}" for k, v in sorted(held.items()))
        if any(hooks):
            more += f", hooks={self.value(hooks, f'{path} (a hook)')}"
        return self._module(self._code.kind(type(module), path), module, more, path)

    def _told(self, module: nn.Module, held: dict[str, Any]) -> str:
        """The attributes of a module whose code is known, without those that say nothing."""
        silent = _SILENT | {"eps"} if self.timing and isinstance(module, _NORMS) else _SILENT
        shown = {k: v for k, v in held.items() if not k.startswith("_") and k not in silent}
        if isinstance(module, _POOLS):
            shown = {k: _whole(v) for k, v in shown.items()}
        return ", ".join(f"{k}={self.value(v, k)}" for k, v in sorted(shown.items()))

    def _module(self, name: str, module: nn.Module, attributes: str, path: str) -> str:
        """The text with the module's own tensors and its submodules."""
        parts = [attributes] if attributes else []
        skip = "num_batches_tracked" if isinstance(module, nn.modules.batchnorm._NormBase) else ""
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or key == skip:
                continue
            if key in module._non_persistent_buffers_set:
                parts.append(f"{key}~{self.attribute(tensor, path, key)}")
            else:
                parts.append(f"{key}:{self.weight(tensor, f'{path}.{key}')}")
        for key, child in module._modules.items():
            if child is not None:
                parts.append(f"{key}/{self.value(child, f'{path}.{key}'.lstrip('.'))}")
        return f"{name}({', '.join(parts)})"

    def weight(self, tensor: Tensor, where: str) -> str:
        """A parameter or persistent buffer; one that was met before says which it is."""
        if self.timing:
            return self.array(tensor, where, self.weights)
        number, _ = self._tensors.setdefault(id(tensor), (len(self._tensors), tensor))
        return f"t{number}{self.array(tensor, where, self.weights)}"

    def attribute(self, value: Any, path: str, name: str) -> str:
        """One attribute of a foreign module, or a buffer that is not saved."""
        where = f"{path}.{name}".lstrip(".")
        if where in self.volatile:
            self.unsure.append(f"{where}: it changes while the network runs")
            return "..."
        return self.value(value, where)


def _texts(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def vars_of(value: Any) -> dict[str, Any]:
    """What an object holds in its `__dict__`, if it has one."""
    return dict(getattr(value, "__dict__", {}))


def _whole(value: Any) -> Any:
    """(3, 3) as 3: pools take both."""
    if isinstance(value, (tuple, list)) and value and all(v == value[0] for v in value):
        return value[0]
    return value


def _hash(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
