"""``Engine``: the few calls we make of a Docker Engine, by the SDK's pooled client. The only file that knows the SDK.

The client is made when it is first needed and again after the Engine was away: a worker starts without it, and finds a
newer Engine's API version. Its session is shared by all threads, as ``requests`` allows for calls that set no cookies.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import docker
import requests
import urllib3
from docker import auth
from docker.utils import kwargs_from_env, parse_repository_tag

from leoflow_celery.clock import ServerClock
from leoflow_celery.domain.attempt import digest, sanitise
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors.docker.archive import Archive, only_file
from leoflow_celery.executors.docker.errors import (
    Conflict,
    EngineError,
    ImageMissing,
    NotFound,
    PullFailed,
    Unreachable,
)
from leoflow_celery.settings import DockerSettings

Json = dict[str, Any]
_HOST_NAME_CHARACTERS = 40
#: A stop goes on in the Engine when nobody listens any more: we stay long enough to hear that it was refused.
_STOP_LISTEN_SECONDS = 2
_NOT_RUNNING = 304


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the Engine says of itself: its name for queues and records, its CPUs and its memory in bytes."""

    host: str
    cpus: int
    memory_bytes: int


class Engine:
    """One Docker Engine. Thread-safe. Every method raises EngineError, see ``errors``."""

    def __init__(self, settings: DockerSettings) -> None:
        """Calls no server."""
        self._settings = settings
        #: What the Engine's own times are compared with.
        self.clock = ServerClock()
        self._lock = threading.Lock()
        self._connected: docker.APIClient | None = None
        self._facts: EngineFacts | None = None

    def facts(self) -> EngineFacts:
        """What does not change while the Engine is there."""
        found = self._facts
        if found is None:
            with self._calling() as client:
                info = client.info()
            host = self._settings.host or _host_name(str(info["Name"]), str(info["ID"]))
            found = self._facts = EngineFacts(host, int(info["NCPU"]), int(info["MemTotal"]))
        return found

    def ping(self) -> None:
        """Whether it answers."""
        with self._calling() as client:
            client.ping()

    # -- containers ----------------------------------------------------------------------------------------------

    def create(self, name: str, config: Json) -> str:
        """The id of a new container; ImageMissing, or Conflict when the name is taken."""
        with self._calling() as client:
            return str(client.create_container_from_config(config, name)["Id"])  # type: ignore[no-untyped-call]

    def put(self, container: str, archive: Archive) -> None:
        """Unpack an archive in a container."""
        with self._calling() as client:
            client.put_archive(container, archive.path, archive.content)

    def start(self, container: str) -> None:
        """Start it; one that runs is left alone."""
        with self._calling() as client:
            client.start(container)

    def stop(self, container: str, grace_seconds: int | None = None) -> None:
        """SIGTERM now, SIGKILL after the grace (the container's own unless given).

        Returns within seconds, and the Engine goes on by itself.
        """
        with self._calling() as client:
            try:
                response = client.post(
                    _url(client, f"/containers/{container}/stop"),
                    params={} if grace_seconds is None else {"t": str(grace_seconds)},
                    timeout=(self._settings.request_timeout_seconds, _STOP_LISTEN_SECONDS),
                )
            except requests.ReadTimeout:
                return
            if response.status_code != _NOT_RUNNING:
                _check(response)

    def remove(self, container: str) -> None:
        """Kill it when it runs, and delete it with its anonymous volumes."""
        with self._calling() as client:
            client.remove_container(container, v=True, force=True)

    def inspect(self, container: str) -> Json:
        with self._calling() as client:
            found: Json = client.inspect_container(container)
            return found

    def list_containers(self, **filters: str | list[str]) -> list[Json]:
        """All containers, running or not, that fit: ``label="a=b"``, ``volume="name"``, ``status=["created"]``."""
        with self._calling() as client:
            found: list[Json] = client.containers(all=True, filters=filters)
            return found

    def read(self, container: str, path: str, limit: int) -> bytes:
        """The first ``limit`` bytes of a file in it; empty when there is no such file."""
        with self._calling() as client:
            response = client.get(
                _url(client, f"/containers/{container}/archive"),
                params={"path": path},
                stream=True,
                timeout=self._settings.request_timeout_seconds,
            )
            with response:
                try:
                    _check(response)
                except NotFound:
                    return b""
                return only_file(_first(response.iter_content(65_536), limit), limit)

    def log_tail(self, container: str, lines: int) -> list[str]:
        """The last lines of its output."""
        with self._calling() as client:
            output: bytes = client.logs(container, tail=lines)
        return output.decode("utf-8", "replace").splitlines()

    def events(self, container: str, since: float, until: float) -> list[Json]:
        """What the Engine remembers of a container between two moments of its own clock, oldest first.

        It keeps the last 256 events of everything, and none from before its own start. Returns at ``until``.
        """
        with self._calling() as client:
            found = client.events(
                since=int(since), until=math.ceil(until), filters={"container": [container]}, decode=True
            )
            return sorted(found, key=lambda one: int(one["timeNano"]))

    # -- images --------------------------------------------------------------------------------------------------

    def image(self, image: str) -> Json:
        """What the Engine knows of an image that it has; raises ImageMissing."""
        with self._calling() as client:
            found: Json = client.inspect_image(image)  # type: ignore[no-untyped-call]
            return found

    def pull(self, image: str) -> None:
        """Fetch an image with the credentials that the docker command would use; raises PullFailed."""
        repository, tag = parse_repository_tag(image)
        try:
            registry, _ = auth.resolve_repository_name(repository)
        except docker.errors.InvalidRepository as error:
            raise EngineError(400, f"invalid reference format: {error}") from error
        deadline = time.monotonic() + self._settings.pull_timeout_seconds
        with self._calling() as client:
            header = auth.get_config_header(client, registry)
            try:
                with client.post(
                    _url(client, "/images/create"),
                    params={"fromImage": repository, "tag": tag or "latest"},
                    headers={"X-Registry-Auth": header} if header else {},
                    stream=True,
                    timeout=(self._settings.request_timeout_seconds, self._settings.pull_timeout_seconds),
                ) as response:
                    _check_pull(image, response)
                    for line in response.iter_lines():
                        _check_progress(image, line, deadline)
            except requests.ReadTimeout as error:
                raise PullFailed(0, f"cannot pull image {image!r}: {error}") from error

    # -- volumes -------------------------------------------------------------------------------------------------

    def create_volume(self, name: str, labels: dict[str, str]) -> Json:
        """A named volume as it is now; one that exists is left as it is."""
        with self._calling() as client:
            found: Json = client.create_volume(name, labels=labels)
            return found

    def list_volumes(self, label: str) -> list[Json]:
        with self._calling() as client:
            return client.volumes({"label": label})["Volumes"] or []

    def has_volume(self, name: str) -> bool:
        with self._calling() as client:
            try:
                client.inspect_volume(name)
            except docker.errors.NotFound:
                return False
            return True

    def remove_volume(self, name: str) -> None:
        """Raises Conflict while a container, running or not, has it."""
        with self._calling() as client:
            client.remove_volume(name)

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            client, self._connected = self._connected, None
        if client is not None:
            client.close()

    # -- the client ----------------------------------------------------------------------------------------------

    @contextmanager
    def _calling(self) -> Iterator[docker.APIClient]:
        """The client, and its errors as ours."""
        client = self._client()
        try:
            yield client
        except docker.errors.APIError as error:
            raise _engine_error(int(error.status_code or 0), str(error.explanation or error)) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            self._forget(client)
            raise Unreachable(f"the Docker Engine does not answer: {error}") from error

    def _client(self) -> docker.APIClient:
        with self._lock:
            if self._connected is None:
                self._connected = self._connect()
            return self._connected

    def _connect(self) -> docker.APIClient:
        environment = {**os.environ, **({"DOCKER_HOST": self._settings.url} if self._settings.url else {})}
        try:
            client = docker.APIClient(
                version="auto",
                timeout=self._settings.request_timeout_seconds,
                max_pool_size=self._settings.max_connections,
                **kwargs_from_env(environment),
            )
        except docker.errors.DockerException as error:
            if isinstance(error.__cause__, requests.RequestException | urllib3.exceptions.HTTPError | OSError):
                raise Unreachable(f"the Docker Engine does not answer: {error.__cause__}") from error
            where = environment.get("DOCKER_HOST", "")
            raise ConfigurationError(
                f"LEOFLOW_DOCKER_URL={where!r} (or DOCKER_HOST): {error}; write unix:///path or tcp://host:port"
            ) from error
        client.hooks["response"].append(self._read_clock)
        return client

    def _read_clock(self, response: requests.Response, **_: object) -> None:
        self.clock.read_date(response.headers.get("Date"), time.monotonic() - response.elapsed.total_seconds())

    def _forget(self, client: docker.APIClient) -> None:
        """Whatever answers next may be another version of the Engine."""
        with self._lock:
            if self._connected is client:
                self._connected = self._facts = None
        client.close()


def _host_name(name: str, engine_id: str) -> str:
    """For queue names and records; the id tells cloned machines apart, and outlives restarts and new host names."""
    return f"{sanitise(name)[:_HOST_NAME_CHARACTERS].strip('-')}-{digest(engine_id, length=6)}".lstrip("-")


def _url(client: docker.APIClient, path: str) -> str:
    return f"{client.base_url}/v{client.api_version}{path}"


def _engine_error(status: int, message: str) -> EngineError:
    if status == 404:
        return ImageMissing(status, message) if "no such image" in message.lower() else NotFound(status, message)
    return Conflict(status, message) if status == 409 else EngineError(status, message)


def _check(response: requests.Response) -> None:
    """Raise what an answer of a call that we made without the SDK's methods says."""
    if response.status_code >= 300:
        raise _engine_error(response.status_code, _message(response))


def _message(response: requests.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip() or f"HTTP status {response.status_code}"


def _check_pull(image: str, response: requests.Response) -> None:
    if response.status_code == 400:
        _check(response)  # not about the registry: the reference itself is wrong
    if response.status_code >= 300:
        raise PullFailed(response.status_code, f"cannot pull image {image!r}: {_message(response)}")


def _check_progress(image: str, line: bytes, deadline: float) -> None:
    """An error after the first byte of the answer is one of its lines."""
    if time.monotonic() > deadline:
        raise PullFailed(0, f"cannot pull image {image!r} in LEOFLOW_DOCKER_PULL_TIMEOUT_SECONDS")
    event = json.loads(line) if line.strip() else {}
    if "error" in event:
        raise PullFailed(0, f"cannot pull image {image!r}: {event['error']}")


def _first(chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Enough of a tar for one file of ``limit`` bytes: user code may have put there what it likes."""
    taken = 0
    for chunk in chunks:
        yield chunk
        taken += len(chunk)
        if taken > limit + 65_536:
            return
