"""What an agent is told by whatever starts it: its environment, read once.

A part of it may travel by file: what nobody who inspects a container may see.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from leoflow_celery.errors import ConfigurationError

_KUBERNETES_TERMINATION_LOG = "/dev/termination-log"
_KIB = 1024


@dataclass(frozen=True, slots=True)
class RunAs:
    """Another user of this host: ids of it, its group and its further groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> RunAs | None:
        """``UID:GID:GROUP,GROUP``; None for nothing.

        Raises:
            ConfigurationError: it is something else, or root.
        """
        if not text:
            return None
        match = re.fullmatch(r"([1-9]\d*):(\d+):((?:\d+(?:,\d+)*)?)", text)
        if match is None:
            raise ConfigurationError(f"LEOFLOW_AGENT_RUN_AS={text!r} must be UID:GID:GROUP,GROUP, and not of root")
        uid, gid, groups = match.groups()
        return cls(int(uid), int(gid), tuple(int(one) for one in groups.split(",") if one))

    def give(self, directory: Path) -> None:
        """Make it the owner of a directory of ours and of all in it. Raises OSError."""
        for path, names, files in os.walk(directory):
            for name in (*names, *files):
                os.chown(os.path.join(path, name), self.uid, self.gid, follow_symlinks=False)
        os.chown(directory, self.uid, self.gid)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Where the control plane is, who we are, and the agent's limits."""

    address: str
    #: Empty: it is exchanged for what ``token_path`` holds.
    token: str = field(repr=False)
    task_instance_id: str
    #: A file with a token of the pod's service account, which the kubelet replaces from time to time.
    token_path: str = ""
    insecure: bool = True
    tls_ca: str = ""
    #: Interpreter of python tasks.
    python: str = sys.executable
    #: Empty: no termination log is written.
    termination_log: str = ""
    #: Signs it, where user code could write it, too.
    record_key: str = field(default="", repr=False)
    #: Whom the user's process runs as; None: as we do.
    run_as: RunAs | None = None
    #: Where the agent's private directory is made; None means the system's temporary one.
    work_dir: str | None = None
    #: How long registering and reporting are tried before giving up.
    report_deadline_seconds: float = 600
    #: Between SIGTERM and SIGKILL.
    kill_grace_seconds: float = 10
    heartbeat_seconds: float = 15
    #: Log bytes kept on disk while the control plane is slow or away.
    spool_bytes: int = 64 * _KIB * _KIB
    #: Whether the user's lines also appear on the agent's own output: what ``docker logs`` and ``kubectl logs`` show.
    echo: bool = False
    #: Whether an interruption that is no cancellation is left to the executor to report: it sees why (an eviction, …).
    leave_interruption: bool = False
    #: What the image runs by itself, for a task that names no command; empty: nobody knows.
    image_command: tuple[str, ...] = ()
    #: The holder of the claim: one per agent process, the same in every call.
    session: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> AgentConfig:
        """Read the environment.

        Raises:
            ConfigurationError: a variable is missing, no number or neither true nor false; the text names it.
        """
        path = environ.get("LEOFLOW_AGENT_TOKEN_PATH", "").strip()
        return cls(
            address=_required(environ, "LEOFLOW_CONTROL_PLANE_ADDR"),
            token=environ.get("LEOFLOW_AGENT_TOKEN", "").strip() if path else _required(environ, "LEOFLOW_AGENT_TOKEN"),
            task_instance_id=_required(environ, "LEOFLOW_TASK_INSTANCE_ID"),
            token_path=path,
            insecure=environ.get("LEOFLOW_AGENT_INSECURE", "").strip().lower() != "false",
            tls_ca=environ.get("LEOFLOW_AGENT_TLS_CA", ""),
            python=environ.get("LEOFLOW_PYTHON") or sys.executable,
            termination_log=_termination_log(environ),
            record_key=environ.get("LEOFLOW_AGENT_RECORD_KEY", ""),
            run_as=RunAs.parse(environ.get("LEOFLOW_AGENT_RUN_AS", "")),
            work_dir=environ.get("LEOFLOW_AGENT_WORK_DIR") or None,
            report_deadline_seconds=_number(environ, "LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS", 600),
            kill_grace_seconds=_number(environ, "LEOFLOW_AGENT_KILL_GRACE_SECONDS", 10),
            heartbeat_seconds=_number(environ, "LEOFLOW_AGENT_HEARTBEAT_SECONDS", 15),
            spool_bytes=int(_number(environ, "LEOFLOW_AGENT_SPOOL_BYTES", 64 * _KIB * _KIB, at_least=64 * _KIB)),
            echo=_flag(environ, "LEOFLOW_AGENT_ECHO"),
            leave_interruption=_flag(environ, "LEOFLOW_AGENT_LEAVE_INTERRUPTION"),
            image_command=_command(environ, "LEOFLOW_AGENT_IMAGE_COMMAND"),
        )


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise ConfigurationError(f"{name} is not set; an executor sets it for the agent it starts")
    return value


def _number(environ: Mapping[str, str], name: str, default: float, at_least: float = 0) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ConfigurationError(f"{name}={text!r} is not a number") from None
    if not at_least <= value < float("inf"):
        raise ConfigurationError(f"{name}={text!r} must be at least {at_least:g}")
    return value


def _flag(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(name, "").strip().lower()
    if text not in ("", "true", "false"):
        raise ConfigurationError(f"{name}={text!r} must be true or false")
    return text == "true"


def _command(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        found = json.loads(environ.get(name) or "[]")
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ConfigurationError(f"{name} is not a JSON list of strings")
    return tuple(found)


def _termination_log(environ: Mapping[str, str]) -> str:
    path = environ.get("LEOFLOW_TERMINATION_LOG", "")
    return path or (_KUBERNETES_TERMINATION_LOG if os.path.exists(_KUBERNETES_TERMINATION_LOG) else "")


VARIABLE = "LEOFLOW_AGENT_ENV_FILE"


def absorb_environment_file(environ: MutableMapping[str, str]) -> None:
    """Add the variables of the file, a JSON object, and remove the file: the user's process finds neither.

    Raises:
        ConfigurationError: the file cannot be read or removed; it is there for the first start only.
    """
    path = environ.pop(VARIABLE, "")
    if not path:
        return
    try:
        variables = json.loads(Path(path).read_bytes())
        os.unlink(path)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{VARIABLE}={path}: there is none; it was read and removed at the first start"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{VARIABLE}={path}: {error}") from error
    environ.update(variables)
