"""The images under test, built once per content of the sources.

An image is tagged with a hash of what goes into it, so a test never runs an outdated one, and asking again costs a
look at the files.
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.images import DEFAULT_BASE, REPOSITORIES, ROOT, BuildFailed, build, fetch, locked
from tests.support.requirements import require

#: What the Dockerfile copies for each target; a folder stands for all of its files.
_SHARED = ("Dockerfile", ".dockerignore", "setup.cfg", "pyproject.toml", "leoflow_runtime")
_TASK_BASE = (
    "requirements-agent.txt",
    "leoflow_celery/__init__.py",
    "leoflow_celery/errors.py",
    "leoflow_celery/broker_url.py",
    "leoflow_celery/settings.py",
    "leoflow_celery/background.py",
    "leoflow_celery/confined.py",
    "leoflow_celery/environment.py",
    "leoflow_celery/domain",
    "leoflow_celery/protocol",
    "leoflow_celery/agent",
    "leoflow_celery/executors/__init__.py",
    "leoflow_celery/executors/inline_http",
)
_SOURCES = {
    "task-base": (*_SHARED, *_TASK_BASE),
    "agent": (*_SHARED, *_TASK_BASE, "scripts/bundle.py"),
    "system": (*_SHARED, "beat_schedule.py", "leoflow_celery", "workers"),
}
#: Images of older sources: some may still run in somebody else's test on this machine.
_KEPT_IMAGES = 6


def base_image() -> str:
    """The image that both derive from: ``LEOFLOW_TEST_BASE_IMAGE``, or the Dockerfile's own."""
    return os.environ.get("LEOFLOW_TEST_BASE_IMAGE") or DEFAULT_BASE


def task_image() -> str:
    """The name of an up-to-date ``leoflow-task-base``; built when it is not there, under a minute."""
    return _image("task-base")


def agent_image() -> str:
    """The name of an up-to-date ``leoflow-agent``."""
    return _image("agent")


def system_image() -> str:
    """The name of an up-to-date ``leoflow-system``."""
    return _image("system")


@functools.cache
def _image(target: str) -> str:
    require_docker()
    tag = f"test-{_content_hash(target)}"
    image = f"{REPOSITORIES[target]}:{tag}"
    with _clock_stopped(), locked():
        if not _exists(image):
            if problem := _fetch_problem():
                require("docker", problem)
            build(target, tag, base_image())
            _remove_old(REPOSITORIES[target])
    return image


@contextmanager
def _clock_stopped() -> Iterator[None]:
    """A build takes minutes on a slow machine, and is no part of the test that asks first: pytest-timeout waits."""
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)


@functools.cache
def _fetch_problem() -> str:
    """Why an image cannot be built here: a machine without a network is no fault of the Dockerfile."""
    try:
        fetch(base_image())
    except BuildFailed as error:
        return f"cannot get what its images are made of: {str(error).splitlines()[-1]}"
    return ""


def require_docker() -> None:
    """Skip the running test, or fail it where Docker was promised, when no Engine answers."""
    if reason := _engine_problem():
        require("docker", reason)


@functools.cache
def _engine_problem() -> str:
    try:
        answer = subprocess.run(["docker", "version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"docker version: {error}"
    return "" if answer.returncode == 0 else f"docker version: {answer.stderr.strip()}"


def _content_hash(target: str) -> str:
    digest = hashlib.sha256(base_image().encode())
    for path in _files(target):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _files(target: str) -> Iterator[Path]:
    for name in _SOURCES[target]:
        path = ROOT / name
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (one for one in found if one.is_file() and "__pycache__" not in one.parts)


def _exists(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0


def _remove_old(repository: str) -> None:
    """All but the newest images of earlier sources. One that a container uses is refused, and goes another time."""
    command = [
        "docker",
        "image",
        "ls",
        "--format",
        "{{.Repository}}:{{.Tag}}",
        f"--filter=reference={repository}:test-*",
    ]
    newest_first = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    for image in newest_first[_KEPT_IMAGES:]:
        subprocess.run(["docker", "image", "rm", image], capture_output=True)
