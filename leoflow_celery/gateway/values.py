"""Back ends of variables, connections and task secrets: the interface, the ones that read files and the environment.

A back end is asked for one kind of value in the name of one task, and answers with what that task's tenant and DAG may
see. Scope is decided here and nowhere above: no caller filters afterwards.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

from leoflow_celery.errors import ConfigurationError, Unavailable
from leoflow_celery.settings import GatewaySettings

log = logging.getLogger(__name__)

#: The tenant of a system that has one tenant. The flat directories and files are this tenant's.
STANDARD_TENANT = "default"
#: Of one file.
MAX_FILE_BYTES = 1024 * 1024
_READS = 3
_CHANGING = "it changes all the time"


class Kind(StrEnum):
    """What is asked for."""

    VARIABLE = "variable"
    CONNECTION = "connection"
    SECRET = "secret"  # noqa: S105 - a kind, no password

    @property
    def directory(self) -> str:
        return f"{self.value}s"


@dataclass(frozen=True, slots=True)
class Query:
    """One question in the name of one task. ``names`` is None for everything that the task may see.

    ``run_id`` and ``task_id`` are for a back end's own records; the values belong to the tenant and the DAG.
    """

    kind: Kind
    tenant_id: str
    dag_id: str
    run_id: str = ""
    task_id: str = ""
    names: frozenset[str] | None = None

    def evolve(self, **changes: Any) -> Query:
        return replace(self, **changes)


class SecretBackend(Protocol):
    """Where values come from. Called from several threads at once."""

    def get(self, query: Query) -> Mapping[str, str]:
        """The values that the query's tenant and DAG may see. A name, tenant or DAG that is unknown is left out.

        Raises:
            Exception: the back end cannot tell now. The agent asks again; the text reaches no task and no log.
        """
        ...


class BackendFailed(Unavailable):
    """A back end of ours cannot tell now. The text holds no value, and tasks may read it."""


_warned: set[str] = set()
_MAX_WARNED = 1_000


def warn_once(place: str, what: str) -> None:
    """A task that asks in a loop fills no log."""
    if place not in _warned:
        if len(_warned) >= _MAX_WARNED:
            _warned.clear()
        _warned.add(place)
        log.warning("%s %s", place if place.isprintable() else repr(place), what)


# Files


class FileBackend:
    """Directories with one file per name, as Kubernetes mounts Secrets.

    ``<root>/tenants/<tenant>/dags/<dag>/<kind>s/<name>`` wins over ``<root>/tenants/<tenant>/<kind>s/<name>``, that
    over the flat path of the kind (the standard tenant's), that over ``<root>/shared/<kind>s/<name>``, which is
    everybody's.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises:
        ConfigurationError: a path does not exist.
        """
        self._root = settings.secret_files
        if self._root is not None and not self._root.is_dir():
            raise ConfigurationError(
                f"LEOFLOW_GATEWAY_SECRET_FILES={self._root} is not a directory; create it or unset the variable"
            )
        paths = {
            Kind.VARIABLE: (settings.variables_path, "LEOFLOW_GATEWAY_VARIABLES_PATH"),
            Kind.CONNECTION: (settings.connections_path, "LEOFLOW_GATEWAY_CONNECTIONS_PATH"),
            Kind.SECRET: (settings.secrets_path, "LEOFLOW_GATEWAY_SECRETS_PATH"),
        }
        self._flat = {kind: FlatPath(path, name) for kind, (path, name) in paths.items() if path is not None}

    def get(self, query: Query) -> Mapping[str, str]:
        kind, tenant = query.kind.directory, file_name(query.tenant_id)
        found = self._scoped("shared", kind)
        if query.tenant_id == STANDARD_TENANT and query.kind in self._flat:
            found |= self._flat[query.kind].values()
        found |= self._scoped("tenants", tenant, kind)
        found |= self._scoped("tenants", tenant, "dags", file_name(query.dag_id), kind)
        return found

    def _scoped(self, *parts: str) -> dict[str, str]:
        if self._root is None:
            return {}
        setting = "LEOFLOW_GATEWAY_SECRET_FILES"
        try:
            return _read_consistently(lambda root: read_scope(root, parts), self._root)
        except OSError as error:
            warn_once(str(self._root.joinpath(*parts)), f"cannot be read: {_cause(error)}")
            raise BackendFailed(f"{setting} cannot be read: {_cause(error)}") from error

    def problems(self) -> list[str]:
        """Directories that no tenant or DAG has the name of, so that their files are never read."""
        if self._root is None:
            return []
        tenants = _directories(self._root / "tenants")
        dags = [dag for tenant in tenants for dag in _directories(tenant / "dags")]
        return [
            f"{path} is read for no tenant and no DAG: the directory of {unquote(path.name)!r} is "
            f"{file_name(unquote(path.name))}"
            for path in (*tenants, *dags)
            if file_name(unquote(path.name)) != path.name
        ]


def file_name(identifier: str) -> str:
    """The one directory name of a tenant or DAG id: itself, with every character but ``A-Za-z0-9_.~-`` as %XX.

    No two ids have the same name, and none is hidden, has a slash or leads upwards.
    """
    name = quote(identifier, safe="", errors="surrogatepass")
    return f"%2E{name[1:]}" if name.startswith(".") else name


def read_scope(root: Path, parts: Sequence[str]) -> dict[str, str]:
    """The files of one directory below the root; nothing when it does not exist.

    Kubernetes' own links (``..data`` and what it names) are followed. A link to another scope or out of the root is
    not, whoever made it: one tenant's directory may be written by other people than another's.

    Raises:
        OSError: the root is not there, or something in it cannot be read.
    """
    real_root = os.path.realpath(root, strict=True)
    found = _read_below(real_root, parts)
    if os.path.realpath(root) != real_root:
        raise FileNotFoundError(errno.ENOENT, _CHANGING, str(root))
    return found


def _read_below(real_root: str, parts: Sequence[str]) -> dict[str, str]:
    path = real_root
    for part in parts:
        # Not by trying: a file system that ignores case would open the directory of another tenant.
        if not _is_directory(path) or part not in os.listdir(path):
            return {}
        path = os.path.join(path, part)
    real = os.path.realpath(path, strict=True)
    if _place(real, real_root) != tuple(parts):
        warn_once(path, "is a link to another place and is not read")
        return {}
    return read_directory(path, real, contained=True) if _is_directory(real) else {}


def read_directory(path: str, real: str, contained: bool) -> dict[str, str]:
    """Every file of the directory ``real``, which ``path`` led to, by its name.

    Hidden files are left out: Kubernetes keeps its versions in them. If it is ``contained``, files that lie elsewhere
    are left out too.

    Raises:
        OSError: something cannot be read. FileNotFoundError: it changed meanwhile, read again.
    """
    found = {}
    version = os.path.realpath(os.path.join(real, "..data"))
    for name in os.listdir(real):
        if name.startswith("."):
            continue
        entry = os.path.join(real, name)
        try:
            target = os.path.realpath(entry, strict=True)
        except FileNotFoundError:
            if os.path.islink(entry):
                continue  # to nothing
            raise
        if contained and len(_place(target, real)) != 1:
            warn_once(entry, "is a link to another place and is not read")
        elif (text := _read_text(target, entry)) is not None:
            found[name] = text
    # Else it is an old version, perhaps removed in parts, or values of two.
    if os.path.realpath(path) != real or os.path.realpath(os.path.join(real, "..data")) != version:
        raise FileNotFoundError(errno.ENOENT, _CHANGING, path)
    return found


def _is_directory(path: str) -> bool:
    """Not ``os.path.isdir``: a link to nothing is a mount that is not there yet, and an error."""
    return stat.S_ISDIR(os.stat(path).st_mode)


def _place(real: str, root: str) -> tuple[str, ...]:
    """Where a real path lies below a real root, without the directories in which Kubernetes keeps versions."""
    prefix = root.rstrip("/") + "/"
    if not real.startswith(prefix):
        return ()
    return tuple(part for part in real.removeprefix(prefix).split("/") if not part.startswith(".."))


def _read_text(real: str, shown: str) -> str | None:
    if not stat.S_ISREG(os.stat(real).st_mode):
        return None
    # No link, since the real path has none; non-blocking, should it have become a pipe meanwhile.
    file = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(file, "rb") as reader:
        data = reader.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        warn_once(shown, f"has more than {MAX_FILE_BYTES} bytes and is left out")
        return None
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        warn_once(shown, "is not UTF-8 text and is left out")
        return None


def _read_consistently(read: Callable[[Path], dict[str, str]], path: Path) -> dict[str, str]:
    """Read again when Kubernetes exchanged the files meanwhile: a name missing by chance would fail a task for good."""
    for again in range(_READS, 0, -1):
        try:
            return read(path)
        except FileNotFoundError:
            if again == 1:
                raise
    raise AssertionError("unreachable")


def _read_flat(path: Path) -> dict[str, str]:
    return read_directory(str(path), os.path.realpath(path, strict=True), contained=False)


class FlatPath:
    """A directory with one file per name, or one JSON object: a value that is not a text is its JSON.

    A directory is read with every call, a JSON file when it changed. A JSON file that breaks keeps the values it had.
    """

    def __init__(self, path: Path, setting: str) -> None:
        """Raises:
        ConfigurationError: the path does not exist.
        """
        if not path.is_dir() and not path.is_file():
            raise ConfigurationError(
                f"{setting}={path} is neither a directory nor a file; create it or unset the variable"
            )
        self._path, self._setting, self._is_directory = path, setting, path.is_dir()
        self._lock = threading.Lock()
        self._stamp: object = None
        self._values: dict[str, str] | None = None

    def values(self) -> dict[str, str]:
        """Every name with its value, as they are now.

        Raises:
            BackendFailed: they cannot be read at the moment.
        """
        try:
            if self._is_directory:
                return _read_consistently(_read_flat, self._path)
            with self._lock:
                return self._object()
        except (OSError, ValueError, RecursionError) as error:
            cause = _cause(error)
            if self._values is None:
                raise BackendFailed(f"{self._setting} cannot be read: {cause}") from error
            warn_once(f"{self._setting}={self._path}", f"cannot be read, the values read before are served: {cause}")
            return dict(self._values)

    def _object(self) -> dict[str, str]:
        status = self._path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._values is None or stamp != self._stamp:
            data = json.loads(self._path.read_bytes())
            if not isinstance(data, dict):
                raise ValueError("is not a JSON object of names and values")
            self._values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in data.items()}
            self._stamp = stamp
        return dict(self._values)


def _cause(error: BaseException) -> str:
    # The text of a JSON error may quote the file.
    return (error.strerror or "it failed") if isinstance(error, OSError) else "its content is not valid"


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


# The environment


class EnvironmentBackend:
    """Variables of the gateway's own environment, as they were at its start.

    ``<prefix>SHARED_<KIND>__<name>``, ``<prefix><KIND>__<tenant>__<name>`` and
    ``<prefix>DAG_<KIND>__<tenant>__<dag>__<name>``, with the ids written as ``environment_id`` does.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment`` is without the prefix."""
        self._values: dict[tuple[str, ...], dict[str, str]] = {}
        for variable, value in environment.items():
            marker, _, rest = variable.partition("__")
            ids = {"SHARED": 0, "DAG": 2}.get(marker.partition("_")[0], 1)
            # An id that is written as it should be neither holds two underscores nor ends with one.
            *scope, name = rest.split("__", ids)
            if len(scope) == ids and name:
                self._values.setdefault((marker, *scope), {})[name] = value

    def get(self, query: Query) -> Mapping[str, str]:
        kind, tenant, dag = query.kind.upper(), environment_id(query.tenant_id), environment_id(query.dag_id)
        scopes = ((f"SHARED_{kind}",), (kind, tenant), (f"DAG_{kind}", tenant, dag))
        return {name: value for scope in scopes for name, value in self._values.get(scope, {}).items()}


def environment_id(identifier: str) -> str:
    """The one way an id is written in a variable's name: every byte but ASCII letters and digits as ``_XX``.

    No two ids are written alike: ``acme-eu`` is ``acme_2Deu``, ``acme_eu`` is ``acme_5Feu``.
    """
    return "".join(
        chr(byte) if byte < 128 and chr(byte).isalnum() else f"_{byte:02X}"
        for byte in identifier.encode(errors="surrogatepass")
    )
