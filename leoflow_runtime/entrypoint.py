"""Finding the callable that ``module:callable`` names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from leoflow_runtime.airflow_sdk import TASK, task_function
from leoflow_runtime.errors import ImportExited, NotCallable


def load_callable(entrypoint: str) -> Callable[..., Any]:
    """The plain function behind an entry point; a decorated one carries it as ``.function`` (Airflow Task SDK).

    Raises:
        NotCallable: the text is no entry point, the module or the attribute does not exist, or it is not callable.
        ImportExited: the module called ``sys.exit``.
    """
    module_name, colon, path = entrypoint.partition(":")
    if not (module_name and colon and path):
        raise NotCallable(f"entry point {entrypoint!r} is not 'module:callable', for example 'dag:extract'")
    if path.startswith(TASK):
        return _undecorated(task_function(module_name, path), entrypoint)
    target = _import_module(module_name)
    for name in path.split("."):
        try:
            target = getattr(target, name)
        except AttributeError:
            raise NotCallable(f"module {module_name!r} has no attribute {path!r}") from None
    return _undecorated(target, entrypoint)


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the module asked for (or a parent of it) is our line; a missing import inside it is the user's traceback.
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise NotCallable(f"no module named {name!r}: is it on PYTHONPATH or in the working directory?") from None
        raise
    except SystemExit as error:
        raise ImportExited(
            f"module {name!r} ended with sys.exit({error.code!r}) while it was imported; nothing was called"
        ) from None


def _undecorated(target: Any, entrypoint: str) -> Callable[..., Any]:
    inner = getattr(target, "function", None)
    while callable(inner):
        target, inner = inner, getattr(inner, "function", None)
    if not callable(target):
        raise NotCallable(f"{entrypoint!r} is a {type(target).__name__}, not a callable")
    return target  # type: ignore[no-any-return]
