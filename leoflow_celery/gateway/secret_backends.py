"""Back ends of variables, connections and task secrets: the interface, and files, environment and command behind it.

A back end is asked for one kind of value in the name of one task, and answers with what that task's tenant and DAG may
see. Scope is decided here and nowhere above: no caller filters afterwards.

A command is asked as kubectl asks its credential plugins: one JSON object on stdin, one on stdout, within a time limit
and an output limit. Whatever it started ends with it. Its answers are kept as long as it says.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import selectors
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import quote, unquote

from leoflow_celery.errors import ConfigurationError, Unavailable
from leoflow_celery.settings import GatewaySettings, environment_for_commands

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


MAX_OUTPUT_BYTES = 1024 * 1024
_MAX_ERROR_BYTES = 2_000
#: However long the command says.
MAX_TTL_SECONDS = 3_600.0
#: A failure is kept too: a task that asks in a loop starts one process a second.
FAILURE_SECONDS = 1.0
_MAX_KEPT, _MAX_KEPT_BYTES = 4_096, 32 * 1024 * 1024
_POLL_SECONDS = 0.02

_Scope = tuple[Kind, str, str, frozenset[str] | None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the command said about one scope: values, or why it failed. ``size`` is in bytes."""

    values: Mapping[str, str]
    ttl_seconds: float
    failure: str = ""
    size: int = 0

    def result(self) -> Mapping[str, str]:
        if self.failure:
            raise BackendFailed(self.failure)
        return self.values


class CommandBackend:
    """Asks the command, once at a time for each tenant, DAG and set of names."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Raises:
        ConfigurationError: there is no command, or it cannot be found.
        """
        self._argv = command_line(settings.secret_command)
        self._timeout, self._ttl = settings.secret_command_timeout_seconds, settings.secret_command_ttl_seconds
        self._environment = environment_for_commands()
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Scope, tuple[float, Answer]] = OrderedDict()
        self._kept_bytes = 0
        self._flights: dict[_Scope, Future[Answer]] = {}
        self._closed = threading.Event()

    def get(self, query: Query) -> Mapping[str, str]:
        scope = (query.kind, query.tenant_id, query.dag_id, query.names)
        with self._lock:
            if (kept := self._fresh(scope)) is not None:
                return kept.result()
            flight, leads = self._flights.get(scope), False
            if flight is None:
                flight, leads = self._flights.setdefault(scope, Future()), True
        if leads:
            return self._lead(scope, query, flight).result()
        answer = flight.result()  # ends with the leader, whose time is limited
        # An answer that may not be kept is for the run and task of the leader alone.
        return answer.result() if answer.ttl_seconds > 0 else self._ask(query).result()

    def _lead(self, scope: _Scope, query: Query, flight: Future[Answer]) -> Answer:
        answer = Answer({}, FAILURE_SECONDS, "it was interrupted")
        try:
            answer = self._ask(query)
        finally:
            with self._lock:
                self._keep(scope, answer)
                del self._flights[scope]
            flight.set_result(answer)
        return answer

    def _ask(self, query: Query) -> Answer:
        question = {
            "version": 1,
            "kind": query.kind.value,
            "tenant_id": query.tenant_id,
            "dag_id": query.dag_id,
            "run_id": query.run_id,
            "task_id": query.task_id,
            "names": None if query.names is None else sorted(query.names),
        }
        try:
            ran = run_command(self._argv, json.dumps(question).encode(), self._timeout, self._environment, self._closed)
        except BackendFailed as error:
            return Answer({}, FAILURE_SECONDS, str(error))
        answer = read_answer(ran.output, self._ttl)
        if ran.exit_code != 0:
            state = f"a signal ({-ran.exit_code})" if ran.exit_code < 0 else f"status {ran.exit_code}"
            failure = f"the command ended with {state}"
            said = safe_text(ran.errors, answer.values.values())
            log.warning(
                "secrets.command_failed", extra={"cause": failure, "stderr": said, "tenant_id": query.tenant_id}
            )
            return Answer({}, FAILURE_SECONDS, failure)
        return answer

    def _fresh(self, scope: _Scope) -> Answer | None:
        expires, answer = self._kept.get(scope, (0.0, None))
        if answer is not None and time.monotonic() >= expires:
            self._drop(scope)
            return None
        return answer

    def _keep(self, scope: _Scope, answer: Answer) -> None:
        if answer.ttl_seconds <= 0:
            return
        self._drop(scope)
        self._kept[scope] = (time.monotonic() + answer.ttl_seconds, answer)
        self._kept_bytes += answer.size
        while len(self._kept) > _MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, scope: _Scope) -> None:
        _, answer = self._kept.pop(scope, (0.0, None))
        self._kept_bytes -= answer.size if answer else 0

    def close(self) -> None:
        """End the commands that run."""
        self._closed.set()


def command_line(text: str) -> list[str]:
    """The words of the setting.

    Raises:
        ConfigurationError: it is empty, badly quoted, or names no program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"LEOFLOW_GATEWAY_SECRET_COMMAND has a quote without an end: {error}") from error
    if not words:
        raise ConfigurationError(
            "LEOFLOW_GATEWAY_SECRET_BACKENDS names 'command'; set LEOFLOW_GATEWAY_SECRET_COMMAND to the command to run"
        )
    program = words[0]
    if ("/" in program and not os.path.isabs(program)) or shutil.which(program) is None:
        raise ConfigurationError(
            f"LEOFLOW_GATEWAY_SECRET_COMMAND: {program!r} is not a program; give its absolute path, or its name if it "
            "is on PATH, and let the gateway's user execute it"
        )
    return words


def read_answer(output: bytes, standard_ttl: float) -> Answer:
    """The command's answer; one that breaks the form is a failure, and no part of it is used or quoted."""
    try:
        data = json.loads(output)
    except (ValueError, RecursionError):
        return Answer({}, FAILURE_SECONDS, "the command's output is not valid JSON")
    values = data.get("values") if isinstance(data, dict) else None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        return Answer({}, FAILURE_SECONDS, "the command's output has no object 'values' of names and texts")
    ttl = data.get("ttl_seconds", standard_ttl)
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not (ttl >= 0 and math.isfinite(ttl)):
        return Answer({}, FAILURE_SECONDS, "the command's 'ttl_seconds' is not a number of seconds, 0 or more")
    return Answer(values, min(float(ttl), MAX_TTL_SECONDS), size=len(output))


def safe_text(said: bytes, secrets: Iterable[str]) -> str:
    """The end of what a command said, for the log: no value that it answered with, no control characters."""
    text = said.decode(errors="replace")
    for secret in sorted((value for value in secrets if value), key=len, reverse=True):
        text = text.replace(secret, "***")
    return "".join(character if character.isprintable() else " " for character in text).strip()


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended by itself."""

    exit_code: int
    output: bytes
    errors: bytes


def run_command(
    argv: Sequence[str], document: bytes, timeout: float, environment: Mapping[str, str], closed: threading.Event
) -> Ran:
    """Run a command in a session of its own, and end whatever is left of it.

    Raises:
        BackendFailed: it cannot be started, takes too long, says too much, or ``closed`` was set.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
            cwd="/",
            bufsize=0,
        )
    except OSError as error:
        raise BackendFailed(f"the command cannot be started: {error.strerror}") from error
    try:
        output, errors = _converse(process, document, time.monotonic() + timeout, timeout, closed)
    finally:
        _kill_group(process.pid)
        exit_code = process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    return Ran(exit_code, output, errors)


def _converse(
    process: subprocess.Popen[bytes], document: bytes, deadline: float, timeout: float, closed: threading.Event
) -> tuple[bytes, bytes]:
    assert process.stdin is not None  # noqa: S101 - for the type checker: all three are pipes
    assert process.stdout is not None  # noqa: S101
    assert process.stderr is not None  # noqa: S101
    output, errors, unsent = bytearray(), bytearray(), memoryview(document)
    with selectors.DefaultSelector() as selector:
        for pipe, event in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
            (process.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, event)
        ended = False
        while True:
            if closed.is_set():
                raise BackendFailed("the gateway shuts down")
            if (left := deadline - time.monotonic()) <= 0:
                raise BackendFailed(f"the command did not answer within {timeout:g} s and was stopped")
            if not ended and _has_ended(process.pid):
                ended = True
                _kill_group(process.pid)  # children that stay would hold the pipes open
            ready = selector.select(0 if ended else min(left, _POLL_SECONDS))
            if ended and not any(key.fileobj is not process.stdin for key, _ in ready):
                return bytes(output), bytes(errors)
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    unsent = _write(process.stdin, unsent)
                    if not unsent:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif not (data := os.read(key.fd, 65_536)):
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output += data
                    if len(output) > MAX_OUTPUT_BYTES:
                        raise BackendFailed(f"the command printed more than {MAX_OUTPUT_BYTES} bytes and was stopped")
                else:
                    errors = (errors + data)[-_MAX_ERROR_BYTES:]


def _write(pipe: IO[bytes], unsent: memoryview) -> memoryview:
    try:
        return unsent[os.write(pipe.fileno(), unsent) :]
    except BlockingIOError:
        return unsent
    except OSError:  # it does not read its input, which is its right
        return unsent[len(unsent) :]


def _has_ended(pid: int) -> bool:
    """Whether the process ended. It is not reaped: until then no other group can have its number."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
