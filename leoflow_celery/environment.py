"""What of the environment is there before the settings: a file of settings, files of secrets, a user's own state.

A setting may also stand in a file of lines ``NAME=value``, which ``LEOFLOW_ENV_FILE`` or ``leoflow --env-file`` names,
as ``leoflow keys`` and ``leoflow lite env`` print them. A variable of the environment wins over it.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from leoflow_celery.errors import ConfigurationError

ENV_FILE = "LEOFLOW_ENV_FILE"
SECRET_VARIABLES = ("LEOFLOW_JWT_SECRET", "LEOFLOW_SEAL_KEYS", "LEOFLOW_DATABASE_URL", "LEOFLOW_BROKER_URL")
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)

#: Variables that were read from a file: value and file.
_read: dict[str, tuple[str, str]] = {}


def source_of(name: str) -> str:
    """Where a variable of this process comes from: ``default``, ``environment``, or the file it was read from."""
    if name not in os.environ:
        return "default"
    value, file = _read.get(name, (None, ""))
    return file if value == os.environ[name] else "environment"


def state_dir() -> Path:
    """Where a user's own state lives: ``$XDG_STATE_HOME/leoflow``."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "leoflow"


def read_env_file() -> None:
    """Take over what the file of settings says, where one is named. Again changes nothing.

    Raises:
        ConfigurationError: it cannot be read; names the file and the line, and never a value.
    """
    path = os.environ.get(ENV_FILE)
    for name, value in parse_env_file(Path(path)).items() if path else ():
        if name not in os.environ and f"{name}_FILE" not in os.environ:
            os.environ[name] = value
            _read[name] = (value, f"{ENV_FILE} {path}")


def read_files() -> None:
    """Take over what the file of settings and the files of secrets say. Again changes nothing.

    Raises:
        ConfigurationError: one cannot be read; names the variable and the file, and never a value.
    """
    read_env_file()
    for name in SECRET_VARIABLES:
        if (path := os.environ.get(f"{name}_FILE")) and name not in os.environ:
            try:
                os.environ[name] = Path(path).read_text().strip()
            except OSError as error:
                raise ConfigurationError(f"{name}_FILE={path}: {error.strerror}") from error
            _read[name] = (os.environ[name], f"{name}_FILE {path}")


def parse_env_file(path: Path) -> dict[str, str]:
    """The LEOFLOW_* variables of a file; others are left alone.

    Raises:
        ConfigurationError: it cannot be read, or a line is no ``NAME=value``; names file and line, and no value.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigurationError(f"{ENV_FILE} {path}: {why}; name a file of lines NAME=value") from error
    found = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ConfigurationError(f"{ENV_FILE} {path}: line {number} is not NAME=value; correct or remove it")
        if match[1].startswith("LEOFLOW_"):
            found[match[1]] = _unquoted(match[2], path, number)
    found.pop(ENV_FILE, None)
    return found


def _unquoted(text: str, path: Path, number: int) -> str:
    """A value as a shell would take it, but without substitutions: a ``$`` is a character."""
    if text[:1] not in ("'", '"'):
        return text.strip()
    try:
        [value] = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"{ENV_FILE} {path}: line {number}: a quote is not closed; close it") from error
    return value
