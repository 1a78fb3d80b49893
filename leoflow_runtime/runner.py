"""The run itself: load, fill, call, write the result."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from typing import Any

from leoflow_runtime.arguments import arguments_for
from leoflow_runtime.entrypoint import load_callable
from leoflow_runtime.errors import InvalidResult, RuntimeFailure

#: An exception of this name (Airflow's) means: not failed, skipped.
_SKIP_EXCEPTION = "AirflowSkipException"
_RESCHEDULE_EXCEPTION = "AirflowRescheduleException"
_SKIP_NOTE = "leoflow_skipped"
#: What the agent reads of a reason file is 8 KiB.
_MAX_SENTENCE_CHARACTERS = 2_000


def main(argv: list[str], environ: Mapping[str, str] | None = None) -> int:
    """Run one callable and return the exit code (see the package's docstring)."""
    # A copy: user code may clear or change the environment, and is not asked how it is told from then on.
    environ = dict(os.environ if environ is None else environ)
    if len(argv) != 1:
        sys.stderr.write("usage: python -m leoflow_runtime module:callable\n")
        return RuntimeFailure.exit_code
    try:
        _run(argv[0], environ)
    except RuntimeFailure as failure:
        _leave_reason(environ, failure.reason, str(failure))
        sys.stderr.write(f"leoflow_runtime: {failure}\n")
        return failure.exit_code
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        return _user_exception(error, environ)
    return 0


def _run(entrypoint: str, environ: Mapping[str, str]) -> None:
    source = environ.get("LEOFLOW_SOURCE_DIR")
    if source:
        sys.path.insert(0, source)
    function = load_callable(entrypoint)
    positional, named = arguments_for(function, environ)
    result = function(*positional, **named)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    path = environ.get("LEOFLOW_RETURN_VALUE_PATH")
    if result is not None and path:
        _write_atomically(path, encode_result(result))


def encode_result(result: Any) -> bytes:
    """A result as JSON bytes.

    Raises:
        InvalidResult: it is not JSON; NaN and Infinity are not.
    """
    try:
        text = json.dumps(result, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidResult(f"the result is not JSON: {error}") from None
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A lone surrogate has no UTF-8 form, but JSON can escape it.
        return json.dumps(result, allow_nan=False, separators=(",", ":")).encode()


def _write_atomically(path: str, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".return_value-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def _leave_reason(environ: Mapping[str, str], reason: str, sentence: str = "") -> None:
    path = environ.get("LEOFLOW_REASON_PATH")
    if path and (reason or sentence):
        try:
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(f"{reason}\n{sentence[:_MAX_SENTENCE_CHARACTERS]}" if sentence else reason)
        except OSError as error:
            sys.stderr.write(f"leoflow_runtime: the reason cannot be written: {error.strerror}\n")


def _sentence(error: Exception) -> str:
    """``ValueError: bad row``, as the last line of a traceback says it."""
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__")
    name = kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - somebody else's __str__
        text = "<its text cannot be shown>"
    return f"{name}: {text}" if text else name


def _user_exception(error: Exception, environ: Mapping[str, str]) -> int:
    at = getattr(error, "reschedule_date", None)
    if at is not None and any(cls.__name__ == _RESCHEDULE_EXCEPTION for cls in type(error).__mro__):
        _leave_reason(environ, "up_for_reschedule", at.isoformat() if at.tzinfo else at.astimezone().isoformat())
        return 0
    if any(cls.__name__ == _SKIP_EXCEPTION for cls in type(error).__mro__):
        sys.stderr.write(f"skipped: {error}\n")
        if environ.get("LEOFLOW_REASON_PATH"):
            _leave_reason(environ, "skipped")
        elif path := environ.get("LEOFLOW_RETURN_VALUE_PATH"):
            # An agent that is not ours asks for no reason; the gateway knows this value.
            _write_atomically(path, encode_result({_SKIP_NOTE: str(error)[:_MAX_SENTENCE_CHARACTERS]}))
        return 0
    _leave_reason(environ, "", _sentence(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == "leoflow_runtime":
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)
    return 1
