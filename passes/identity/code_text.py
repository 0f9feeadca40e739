"""Describes functions and classes as texts: by name where a library has them, by bytecode where they are the user's.

    torch.relu, operator.add, math.sqrt       relu, add, math.sqrt
    timm.layers.Mlp                           its name and the version of the package
    def swish(x): return x * torch.sigmoid(BETA * x)
                                              arguments, bytecode, constants, what it reads of its module: BETA, torch

A function that reads the values of an enclosing one (a closure), a dynamic one, or one that reaches for the outside
world (`open`, `os`, `random`) cannot be told apart by its text, and is noted as such.
"""

from __future__ import annotations

import builtins
import dis
import functools
import site
import sys
import sysconfig
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .content import Describer

__all__ = ["Code", "library_name"]

_STANDARD = frozenset(
    {
        "__future__",
        "abc",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "inspect",
        "itertools",
    }
    | {"logging", "math", "numbers", "operator", "re", "string", "types", "typing", "warnings", "_operator"}
)
_DYNAMIC = frozenset({"open", "eval", "exec", "compile", "__import__", "globals", "locals", "input", "id", "hash"})
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_NAMESPACES = ("torch", "_operator", "operator")  # one name means one operation in all of these
_OURS = (__package__ or "passes").partition(".")[0]


@functools.cache
def _package_folders() -> tuple[str, ...]:
    paths = [sysconfig.get_paths()[k] for k in ("purelib", "platlib")]
    return tuple(dict.fromkeys([*paths, *site.getsitepackages()]))


@functools.cache
def _version(top: str) -> str | None:
    """The version of an installed package; None for what is none: the user's own code may change at any moment."""
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None) or ""
    if not file.startswith(_package_folders()):
        return None
    found = getattr(module, "__version__", None)
    return found if isinstance(found, str) else None


@functools.cache
def _dispatched() -> dict[int, str]:
    """Functions of torch.nn.functional that another function made, whose own name says nothing."""
    spaces = (torch.nn.functional, torch)
    found = [(n, f) for s in spaces for n, f in vars(s).items() if isinstance(f, types.FunctionType)]
    return {id(f): n for n, f in found if "<locals>" in f.__qualname__}


def library_name(item: Any) -> str | None:
    """The name of a function, class or module of torch, the standard library or an installed package, else None."""
    if isinstance(item, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.{item}"
    if isinstance(item, types.ModuleType):
        module, name = item.__name__, ""
    elif not isinstance(item, _NAMED):
        return None  # of an object only its class has a name
    elif isinstance(item, (type, types.FunctionType)) and id(item) not in _dispatched() and not _found(item):
        return None
    else:
        owner = getattr(item, "__objclass__", None)  # of a method descriptor
        module = getattr(item, "__module__", None) or getattr(owner, "__module__", None) or ""
        name = _dispatched().get(id(item)) or str(item.__qualname__)
    top = str(module).partition(".")[0]
    if not module and isinstance(item, types.BuiltinFunctionType):
        top, module = "torch", "torch"  # a method of a class in C
    if top in _NAMESPACES:
        module = "torch"
    elif top in sys.stdlib_module_names or top == "builtins":
        if top not in _STANDARD and top != "builtins":
            return None
    elif top == _OURS:
        pass
    else:
        version = _version(top)
        if version is None:
            return None
        module = f"{module}@{version}"
    if "<locals>" in name or (name.startswith("<") and name):
        return None
    return f"{module}.{name}" if name else str(module)


def _found(item: Any) -> bool:
    """Whether the name of a function or class leads to it, and not to another one."""
    value: Any = sys.modules.get(item.__module__)
    for part in item.__qualname__.split("."):
        value = getattr(value, part, None)
    return value is item


class Code:
    """The texts of functions and classes for one `Describer`, which describes the values that they read."""

    def __init__(self, describer: Describer) -> None:
        self.describer = describer
        self._known: dict[int, tuple[str, Any]] = {}  # what was described already, or is being described

    def function(self, function: Any, where: str) -> str:
        """Any callable that is no module."""
        name = library_name(function)
        owner = getattr(function, "__self__", None)
        if isinstance(function, types.BuiltinFunctionType) and owner is not None and not _is_space(owner):
            return f"{function.__name__} of {self.describer.value(owner, where)}"
        if name is not None:
            return self._versioned(name)
        if isinstance(function, type):
            return self.kind(function, where)
        if isinstance(function, types.MethodType):
            return f"{self.function(function.__func__, where)} of {self.describer.value(owner, where)}"
        if isinstance(function, types.FunctionType):
            text = f"{function.__module__}.{function.__qualname__}"
            if "<lambda>" in text or "<locals>" in text:
                text = text.rpartition(".")[2]
            return f"{text}{self._python(function, where) if self._looks() else ''}{self._cells(function, where)}"
        if type(function).__name__ == "ScriptFunction":  # its graph has all that it does
            return f"script {function.inlined_graph.str(False)}"
        return self.describer.unknown(function, where)

    def kind(self, kind: type, where: str) -> str:
        """A class: its name, and the code of all that it and its bases define."""
        name = library_name(kind)
        if name is not None:
            return self._versioned(name)
        text = f"{kind.__module__}.{kind.__qualname__}"
        if not self._looks():
            return kind.__qualname__
        return f"{text}{self._once(kind, lambda: self._members(kind, where))}"

    def _looks(self) -> bool:
        return self.describer.code

    def _versioned(self, name: str) -> str:
        """Versions of packages count where code does."""
        before, at, after = name.partition("@")
        return name if not at or (self._looks() and self.describer.versions) else f"{before}.{after.rpartition('.')[2]}"

    def _once(self, item: Any, make: Any) -> str:
        """The text of something the first time that it is met, afterwards which it was."""
        if id(item) in self._known:
            return f"<{self._known[id(item)][0]}>"
        self._known[id(item)] = (f"code {len(self._known)}", item)
        return str(make())

    def _members(self, kind: type, where: str) -> str:
        found = []
        for base in kind.__mro__:
            if base in (object, nn.Module):
                continue
            if (name := library_name(base)) is not None:
                found.append(name)
                continue
            for key, value in sorted(vars(base).items(), key=lambda item: item[0]):
                if key in ("__init__", "__doc__", "__module__", "__dict__", "__weakref__", "__repr__", "_abc_impl"):
                    continue  # what __init__ did is in the attributes
                if key.startswith("__") and not isinstance(value, types.FunctionType):
                    continue
                found.append(f"{key}={self._member(value, where)}")
        return "{" + "; ".join(found) + "}"

    def _member(self, value: Any, where: str) -> str:
        if isinstance(value, property):
            return f"property({', '.join(self._member(f, where) for f in (value.fget, value.fset))})"
        if isinstance(value, (staticmethod, classmethod)):
            return f"{type(value).__name__} {self._member(value.__func__, where)}"
        if isinstance(value, types.FunctionType) and library_name(value) is None:
            return f"{self._python(value, where)}{self._cells(value, where)}"
        if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            return "slot"
        return self.describer.value(value, where)

    def _python(self, function: types.FunctionType, where: str) -> str:
        return self._once(function, lambda: self._body(function, where))

    def _body(self, function: types.FunctionType, where: str) -> str:
        place = f"{where}: {function.__qualname__}".removeprefix(": ")
        given = self.describer.value((function.__defaults__, function.__kwdefaults__), place)
        return f"[{self._code(function.__code__, function.__globals__, place)} {given}]"

    def _cells(self, function: types.FunctionType, where: str) -> str:
        """What a closure reads of the function around it: to be seen, not to be sure of."""
        found = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name == "__class__" or not _filled(cell):
                continue
            kind = type(cell.cell_contents).__name__
            place = f"{where}: {function.__qualname__}".removeprefix(": ")
            self.describer.unsure.append(f"{place}: it is a closure, which reads {name} (a {kind})")
            found.append(f"{name}={self.describer.value(cell.cell_contents, place)}")
        return f" of ({', '.join(found)})" if found else ""

    def _code(self, code: types.CodeType, space: dict[str, Any], where: str) -> str:
        """Bytecode, constants, and what is read of the module in which the function stands."""
        parts = [f"py{sys.version_info[0]}.{sys.version_info[1]}", code.co_code.hex(), repr(code.co_names)]
        parts.append(f"{code.co_argcount},{code.co_posonlyargcount},{code.co_kwonlyargcount},{code.co_flags}")
        parts.append(repr(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]))
        for constant in code.co_consts:
            inner = isinstance(constant, types.CodeType)
            parts.append(self._code(constant, space, where) if inner else self.describer.value(constant, where))
        listed = list(dis.get_instructions(code))
        attributes = {str(i.argval) for i in listed if i.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")}
        read = [str(i.argval) for i in listed if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")]
        for name in dict.fromkeys(read):
            imported = any(i.opname == "IMPORT_NAME" and i.argval == name for i in listed)
            value = sys.modules.get(name) if imported else space.get(name, _NOTHING)
            parts.append(f"{name}={self._global(name, value, attributes, where)}")
        return " ".join(parts)

    def _global(self, name: str, value: Any, attributes: set[str], where: str) -> str:
        if value is _NOTHING:
            if name in _DYNAMIC or not hasattr(builtins, name):
                self.describer.unknown(name, where, f"it reads {name}, which may be anything")
            return "builtin"
        if isinstance(value, types.ModuleType):
            if (known := library_name(value)) is not None:
                return known
            if value.__name__.partition(".")[0] in sys.stdlib_module_names:
                return self.describer.unknown(value, where, f"it reads the module {value.__name__}")
            held = {a: getattr(value, a) for a in sorted(attributes) if hasattr(value, a)}
            return self._once(value, lambda: self.describer.value(held, f"{where}: {name}"))
        return self.describer.value(value, f"{where}: {name}")


_NOTHING = object()


def _is_space(owner: Any) -> bool:
    """Whether what a builtin is bound to is a module or a class, not an object."""
    return isinstance(owner, (types.ModuleType, type))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not _NOTHING
    except ValueError:
        return False
