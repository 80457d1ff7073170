"""The check of a rule: it is called as `rule(moments, omega)`, and its own parameters are set."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from typing import Any

import torch

_CHECKED: weakref.WeakSet[Callable] = weakref.WeakSet()


def rule(op: str, value: object) -> None:
    """Raise TypeError unless `value` can be called as `value(moments, omega)`.

    A function, or a partial of one, is checked once. The check reads the function's code, because `inspect.signature`
    takes longer than a kernel takes for a small sample. Another kind of callable raises when it is called.
    """
    if not callable(value):
        raise TypeError(f"{op}: `rule` is a {type(value).__name__}, expected a function of (moments, omega), see rules")
    if torch.compiler.is_compiling() or type(value) not in (types.FunctionType, functools.partial):
        return
    if value not in _CHECKED:
        _signature(op, value)
        _CHECKED.add(value)


def _signature(op: str, value: Callable) -> None:
    function: Callable = value
    given, named = 2, dict[str, Any]()
    if type(value) is functools.partial:
        function, given, named = value.func, 2 + len(value.args), value.keywords
        if "rule" in named:  # around another rule, as rescale
            rule(op, named["rule"])
    if type(function) is not types.FunctionType:
        return
    code, defaults = function.__code__, function.__defaults__ or ()
    count, accepted = code.co_argcount, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    parameters = ", ".join(accepted[2:]) or "none beside moments and omega"
    if given > count and not code.co_flags & CO_VARARGS:
        raise TypeError(
            f"{op}: `rule` {function.__name__} takes {count} arguments by position, expected (moments, omega) and, by "
            "keyword, parameters of its own"
        )
    for name in named:
        if name not in accepted[given:] and not code.co_flags & CO_VARKEYWORDS:
            raise TypeError(f"{op}: `rule` {function.__name__} has no parameter `{name}`, expected {parameters}")
    needed = accepted[given : count - len(defaults)] + accepted[count:]
    for name in needed:
        if name not in named and name not in (function.__kwdefaults__ or ()):
            raise TypeError(
                f"{op}: `rule` {function.__name__} lacks its parameter `{name}`, expected {parameters}; "
                f"functools.partial({function.__name__}, {name}=...) sets it"
            )
