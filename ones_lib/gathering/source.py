"""A hash of the code of gathering methods that are not the library's own: an edited method must not pass for the old one."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from types import CodeType, ModuleType

from ones_lib.gathering.registry import GatheringMethod, method_function

OWN = frozenset(
    {
        *("sum", "average", "topk", "svd", "matched_average", "frequency_average", "contribution_topk", "whitened_svd"),
        *("expert_selection", "readout", "fit"),
    }
)
_INSTALLED = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, type(None))


def source_hash(method: str) -> str | None:
    """SHA-256 of the code of a registered method, and of the functions, classes and plain values that it uses: those of its own
    module, and of others that are neither installed nor this library's. Comments and layout do not count. None for the
    library's own methods."""
    return None if method in OWN else _hash(method_function(method))


@cache
def _hash(method: GatheringMethod) -> str:
    return hashlib.sha256("\n".join(sorted(set(_code(method, set())))).encode()).hexdigest()


def _code(found: object, seen: set[int]) -> Iterator[str]:
    """The code of a function, a class or something that is called like one, and of what it uses."""
    found = inspect.unwrap(getattr(found, "func", found))
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        found = type(found)
    if id(found) in seen:
        return
    seen.add(id(found))
    yield _source(found)
    for function in [f for f in vars(found).values() if inspect.isfunction(f)] if inspect.isclass(found) else [found]:
        for name, value in _used(function).items():
            if inspect.isfunction(value) or inspect.isclass(value):
                if value.__module__ == function.__module__ or not _is_installed(inspect.getmodule(value)):
                    yield from _code(value, seen)
            elif isinstance(value, _PLAIN):
                yield f"{name} = {value!r}"


def _used(function) -> dict[str, object]:
    """What a function takes from its module, from functions around it, and from modules that are not installed; by name."""
    names = _names(function.__code__)
    found = {name: function.__globals__[name] for name in names & set(function.__globals__)}
    found |= inspect.getclosurevars(function).nonlocals
    own = [value for value in found.values() if isinstance(value, ModuleType) and not _is_installed(value)]
    return found | {name: vars(module)[name] for module in own for name in names & set(vars(module))}


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(value) for value in code.co_consts if isinstance(value, CodeType)))


def _is_installed(module: ModuleType | None) -> bool:
    """Whether a module is Python's, an installed package's, or this library's."""
    if module is None or module.__name__.partition(".")[0] in sys.stdlib_module_names:
        return True
    file = getattr(module, "__file__", None)  # a notebook has none
    return file is not None and str(Path(file).resolve()).startswith(
        (*_INSTALLED, str(Path(__file__).resolve().parents[1]))
    )


def _source(found: object) -> str:
    try:
        return ast.unparse(ast.parse(dedent(inspect.getsource(found))))
    except (OSError, TypeError, SyntaxError):  # made without a file, or within an expression
        return _compiled(found.__code__) if inspect.isfunction(found) else found.__qualname__


def _compiled(code: CodeType) -> str:
    constants = [_compiled(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
