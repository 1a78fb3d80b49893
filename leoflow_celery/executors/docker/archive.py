"""Files that go into a container before it starts and come out of it after its end, as the Engine's tar archives.

What an agent must not show to everybody who may inspect containers goes in this way: a file that the agent reads and
removes before it starts the user's process.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

from leoflow_celery.executors.docker.errors import Unreachable

STAGING_DIR = "/staging"
#: A volume in containers with a read-only root: the only place below which the Engine then takes and gives files.
LEOFLOW_DIR = "/run/leoflow"
#: Any user of any image has to be able to write here and to remove what we put here. Nobody else is in there.
ATTEMPT_DIR = f"{LEOFLOW_DIR}/attempt"
ENVIRONMENT_FILE = f"{ATTEMPT_DIR}/environment.json"
TERMINATION_LOG = f"{ATTEMPT_DIR}/termination-log"
#: The request's ``source``, as ``dag.py``.
SOURCE_DIR = f"{ATTEMPT_DIR}/source"
_FOR_EVERYBODY = 0o777


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar to unpack at ``path``."""

    path: str
    content: bytes


def launch_archive(secrets: dict[str, str], *, staging: bool, read_only_root: bool, source: str = "") -> Archive:
    """The attempt's directory with the secret part of its environment, and with its source.

    A new volume belongs to root unless the image has a directory of its name: with ``staging`` it is made writable
    here. A read-only root leaves that to the image.
    """
    base = LEOFLOW_DIR if read_only_root else "/"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if not read_only_root:
            _add_directory(tar, LEOFLOW_DIR, base, 0o755)
            if staging:
                _add_directory(tar, STAGING_DIR, base, _FOR_EVERYBODY)
        _add_directory(tar, ATTEMPT_DIR, base, _FOR_EVERYBODY)
        if secrets:
            _add_file(tar, ENVIRONMENT_FILE, base, json.dumps(secrets).encode())
        if source:
            _add_directory(tar, SOURCE_DIR, base, _FOR_EVERYBODY)
            _add_file(tar, f"{SOURCE_DIR}/dag.py", base, source.encode())
    return Archive(base, buffer.getvalue())


def only_file(chunks: Iterable[bytes], limit: int) -> bytes:
    """The first ``limit`` bytes of the one file in an archive of the Engine; empty when it is no file.

    Raises:
        Unreachable: the archive is cut short.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
            member = tar.next()
            content = tar.extractfile(member) if member is not None and member.isfile() else None
            return content.read(limit) if content is not None else b""
    except tarfile.TarError as error:
        raise Unreachable(f"the Engine's archive is damaged: {error}") from error


def _add_directory(tar: tarfile.TarFile, path: str, base: str, mode: int) -> None:
    entry = _entry(path, base, mode)
    entry.type = tarfile.DIRTYPE
    tar.addfile(entry)


def _add_file(tar: tarfile.TarFile, path: str, base: str, content: bytes) -> None:
    entry = _entry(path, base, 0o644)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _entry(path: str, base: str, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path.removeprefix(base).lstrip("/"))
    entry.mode = mode
    return entry
