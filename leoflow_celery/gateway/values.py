"""Variables, connections and secrets: names with values, mounted as Kubernetes mounts secrets, or in one JSON file."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from leoflow_celery.domain.fields import is_storable, is_variable_name
from leoflow_celery.errors import ConfigurationError, Unavailable

log = logging.getLogger(__name__)


class ValueProvider(Protocol):
    """Where values come from. Called from threads."""

    def values(self) -> Mapping[str, str]:
        """Every name with its value, as they are now.

        Raises:
            Unavailable: they cannot be read at the moment.
        """
        ...


class NoValues:
    """The provider of a system that has none."""

    def values(self) -> Mapping[str, str]:
        return {}


class DirectoryValues:
    """One file per name. Hidden files are none of ours: Kubernetes keeps its versions in them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def stamp(self) -> object:
        return tuple(sorted((path.name, _file_stamp(path)) for path in self._files()))

    def read(self) -> dict[str, str]:
        found = {}
        for path in self._files():
            try:
                found[path.name] = path.read_text("utf-8").removesuffix("\n")
            except UnicodeDecodeError:
                log.warning("%s is not UTF-8 text and is left out", path)
        return found

    def _files(self) -> list[Path]:
        return [path for path in self._path.iterdir() if not path.name.startswith(".") and path.is_file()]


class JsonFileValues:
    """One JSON object; a value that is no string is handed out as its JSON text."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def stamp(self) -> object:
        return _file_stamp(self._path)

    def read(self) -> dict[str, str]:
        data = json.loads(self._path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("is not a JSON object of names and values")  # noqa: TRY004 - one error for bad content
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in data.items()}


def _file_stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def usable(values: Mapping[str, str], setting: str) -> dict[str, str]:
    """The values that a process can be given; one bad name would keep every task from its start."""
    kept = {name: value for name, value in values.items() if is_variable_name(name) and is_storable(value)}
    for name in values.keys() - kept.keys():
        head, equals, _ = name.partition("=")  # what follows may well be the value
        log.warning(
            "%s: %r is left out: a name with '=' or a text with NUL cannot be a variable", setting, head + equals
        )
    return kept


class Refreshed:
    """Values of a source, read again when it changed. A source that breaks keeps the values it had."""

    def __init__(self, source: DirectoryValues | JsonFileValues, setting: str) -> None:
        self._source, self._setting = source, setting
        self._lock = threading.Lock()
        self._stamp: object = None
        self._values: dict[str, str] | None = None

    def values(self) -> Mapping[str, str]:
        with self._lock:
            try:
                stamp = self._source.stamp()
                if self._values is None or stamp != self._stamp:
                    self._values, self._stamp = usable(self._source.read(), self._setting), stamp
            except (OSError, ValueError) as error:
                # The text of a JSON error may quote the file; a place in it is enough.
                cause = error.strerror if isinstance(error, OSError) else "its content is not valid"
                if self._values is None:
                    raise Unavailable(f"{self._setting} cannot be read: {cause}") from error
                log.warning("%s cannot be read, the values read before are served: %s", self._setting, cause)
            return self._values


def open_provider(path: Path | None, setting: str) -> ValueProvider:
    """The provider of a setting: none, a directory or a JSON file.

    Raises:
        ConfigurationError: the path does not exist.
    """
    if path is None:
        return NoValues()
    if path.is_dir():
        return Refreshed(DirectoryValues(path), setting)
    if path.is_file():
        return Refreshed(JsonFileValues(path), setting)
    raise ConfigurationError(f"{setting}={path} is neither a directory nor a file; create it or unset the variable")
