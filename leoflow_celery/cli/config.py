"""``leoflow config``: every setting with its value and where that comes from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leoflow_celery.cli.output import echo_json, note, table
from leoflow_celery.cli.system import embedded
from leoflow_celery.cli.target import JsonOption
from leoflow_celery.errors import InvalidRequest

if TYPE_CHECKING:
    from leoflow_celery.settings import Settings

_HIDDEN = "***"
_PASSWORD = re.compile(r"(?<=://)([^:@/;,]*):[^;,]*@")
_IN_QUERY = re.compile(r"([?&][^=&;]*(?:password|secret|token|key)[^=&;]*=)[^&;]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shown:
    """One setting as people may see it."""

    name: str
    value: str
    source: str


def config(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]...", help="Only settings whose name holds one of these.")
    ] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not the default.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every setting, its value and where that comes from. Secrets are masked."""
    from leoflow_celery.settings import Settings

    found = [
        one
        for one in settings_shown(Settings.load())
        if (not words or any(word.upper() in one.name for word in words)) and not (changed and one.source == "default")
    ]
    if words and not found and not changed:
        raise InvalidRequest(
            f"WORD: no setting's name holds {' or '.join(map(repr, words))}; 'leoflow config' lists all", "words"
        )
    if as_json:
        echo_json([asdict(one) for one in found])
        return
    if not found:
        note("every setting is the default")
        return
    table("settings", ("setting", "value", "source"), [(one.name, one.value, one.source) for one in found])


def settings_shown(settings: Settings) -> Iterator[Shown]:
    """Every setting under the variable that sets it."""
    from leoflow_celery.settings import variables

    for group_name in type(settings).model_fields:
        group = getattr(settings, group_name)
        for field, names in variables(type(group)).items():
            name = next((one for one in names if one in os.environ), names[0])
            yield Shown(name, masked(name, getattr(group, field)), _source(name))


def _source(name: str) -> str:
    from leoflow_celery.environment import source_of

    system = embedded()
    if system is not None and name in os.environ and os.environ[name] == system.state.environment().get(name):
        return f"embedded system {system.state.path}"
    return source_of(name)


def masked(name: str, value: Any) -> str:
    """A value without what is secret in it: of a URL its passwords, of a secret everything."""
    from pydantic import SecretStr

    if isinstance(value, SecretStr):
        text = value.get_secret_value()
        if name != "LEOFLOW_DATABASE_URL":
            return _HIDDEN if text else ""
        value = text
    if name == "LEOFLOW_GATEWAY_SECRET_COMMAND" and " " in value:
        return f"{value.split()[0]} {_HIDDEN}"  # whatever its arguments are
    if isinstance(value, str | Path):
        return _IN_QUERY.sub(rf"\1{_HIDDEN}", _PASSWORD.sub(rf"\1:{_HIDDEN}@", str(value)))
    if value is None:
        return ""
    if isinstance(value, frozenset | set):
        value = sorted(value)
    return json.dumps(value, default=str, ensure_ascii=False)
