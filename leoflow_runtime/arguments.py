"""Filling a callable's parameters from call arguments, then XCom inputs (XCom wins)."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from leoflow_runtime.errors import RuntimeFailure

_XCOM = "LEOFLOW_XCOM_"
_XCOM_FILE = "LEOFLOW_XCOMFILE_"
_NAMES = "LEOFLOW_XCOM_PARAMS"


def arguments_for(function: Callable[..., Any], environ: Mapping[str, str]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments of the call.

    Raises:
        RuntimeFailure: a parameter without default has no value, a call argument fits no parameter, or a value is not
            JSON. The text names the parameter.
    """
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    values = _call_arguments(environ)
    unknown = sorted(set(values) - set(named))
    if unknown and not takes_all:
        raise RuntimeFailure(f"call argument {unknown[0]!r} fits no parameter of {_name(function)}({', '.join(named)})")
    values.update(_xcom_inputs(environ, list(named), takes_all))
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in values]
    if missing:
        raise RuntimeFailure(
            f"parameter {missing[0]!r} of {_name(function)} has no value: neither a call argument nor an XCom input"
        )
    return _split(named, values)


def _split(named: Mapping[str, inspect.Parameter], values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional-only parameters by position (defaults in between filled in), everything else by name."""
    only = [p for p in named.values() if p.kind is p.POSITIONAL_ONLY]
    while only and only[-1].name not in values:
        only.pop()
    positional = [values.pop(p.name, p.default) for p in only]
    return positional, values


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some builtins have no signature: hand them whatever there is.
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _call_arguments(environ: Mapping[str, str]) -> dict[str, Any]:
    path = environ.get("LEOFLOW_CALL_ARGS_FILE")
    text = _read(path) if path else environ.get("LEOFLOW_CALL_ARGS_JSON", "")
    if not text.strip():
        return {}
    values = _parse(text, "LEOFLOW_CALL_ARGS_JSON")
    if not isinstance(values, dict):
        raise RuntimeFailure("LEOFLOW_CALL_ARGS_JSON is not a JSON object of parameter → value")
    return values


def _xcom_inputs(environ: Mapping[str, str], parameters: list[str], takes_all: bool) -> dict[str, Any]:
    spelled = {name.upper(): name for name in [*_declared(environ), *parameters]}
    values = {}
    for key, text in _xcom_texts(environ).items():
        name = spelled.get(key, key.lower())
        if name in parameters or takes_all:
            values[name] = _parse(text, "the XCom input of parameter " + repr(name))
        else:
            sys.stderr.write(f"leoflow_runtime: XCom input {name!r} fits no parameter, ignored\n")
    return values


def _xcom_texts(environ: Mapping[str, str]) -> dict[str, str]:
    texts = {key[len(_XCOM) :]: text for key, text in environ.items() if key.startswith(_XCOM) and key != _NAMES}
    for key, path in environ.items():
        if key.startswith(_XCOM_FILE):
            texts[key[len(_XCOM_FILE) :]] = _read(path)
    return texts


def _declared(environ: Mapping[str, str]) -> list[str]:
    names = _parse(environ.get(_NAMES) or "[]", _NAMES)
    return [str(name) for name in names] if isinstance(names, list) else []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise RuntimeFailure(f"cannot read {path}: {error.strerror}") from None


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RuntimeFailure(f"{what} is not JSON: {error}") from None
