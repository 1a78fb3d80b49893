"""An attribute that is built once, by the first of any number of threads that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

Value = TypeVar("Value")


class once(Generic[Value]):  # noqa: N801 - a decorator, like functools.cached_property
    """``functools.cached_property`` for threads: from Python 3.12 on, that one may build a value twice.

    The owner has one reentrant ``_lock`` for all of them, since building one may ask for another.
    """

    def __init__(self, build: Callable[[Any], Value]) -> None:
        self._build, self._name = build, build.__name__
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...

    @overload
    def __get__(self, owner: object, kind: type) -> Value: ...

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self
        with owner._lock:
            if self._name not in owner.__dict__:
                owner.__dict__[self._name] = self._build(owner)
            return owner.__dict__[self._name]
