"""Starting an agent: executed afresh, or forked from a pre-imported one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leoflow_celery.executors.subprocess.environment import inherited
from leoflow_celery.executors.subprocess.processes import mark
from leoflow_celery.executors.subprocess.reaper import Reaper

#: The exit code of an agent, None when it could not be seen.
OnExit = Callable[[int | None], None]

_OWN_AGENT = [sys.executable, "-m", "leoflow_celery.agent"]
_FORK_SERVER = ["-m", "leoflow_celery.agent.forkserver"]
#: What a preloaded Airflow reads when it is imported.
_PRELOADED_ENVIRONMENT = "AIRFLOW_"
_MAX_PACKET_BYTES = 1 << 17
_ANSWER_SECONDS = 15.0
#: For the first answer of a server that imports modules of the user's code before it serves.
_PRELOAD_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class AgentStart:
    """One agent to start. It gets ``lock`` as an open file and must hold it while it lives.

    ``limit`` marks its processes.
    """

    env: Mapping[str, str]
    cwd: str
    log: Path
    lock: int
    limit: int


class Spawner(Protocol):
    """Starts agents in a session of their own. Thread-safe."""

    def start(self, start: AgentStart, on_exit: OnExit) -> int:
        """The process id. Raises OSError when it cannot be started."""
        ...

    def close(self) -> None:
        """Let go; started agents go on."""
        ...


class ExecSpawner:
    """Executes a program per task: any that speaks the agent protocol."""

    def __init__(self, reaper: Reaper, agent_path: str = "") -> None:
        self._reaper = reaper
        self._argv = [agent_path] if agent_path else _OWN_AGENT

    def start(self, start: AgentStart, on_exit: OnExit) -> int:
        with start.log.open("ab") as log:
            process = subprocess.Popen(
                self._argv,
                env=start.env,
                cwd=start.cwd or None,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(start.lock,),
            )
        pid = process.pid
        mark(pid, start.limit)
        # The reaper collects it by number. To Popen it must look finished, or it complains when it is forgotten.
        process.returncode = 0
        self._reaper.watch_process(pid, lambda: on_exit(_collect(pid)))
        return pid

    def close(self) -> None:
        """Nothing is held."""


def _collect(pid: int) -> int | None:
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status)


class ForkSpawner:
    """Asks a fork server (our own agent, pre-imported); starts it when there is none."""

    def __init__(self, reaper: Reaper, environ: Mapping[str, str], log: Path, preload: Sequence[str] = ()) -> None:
        """``preload``: modules that the interpreter of the user's code imports once; it then runs the server."""
        self._reaper, self._environ, self._log, self._preload = reaper, inherited(environ), log, tuple(preload)
        self._python = sys.executable
        if preload:
            self._python = environ.get("LEOFLOW_PYTHON") or sys.executable
            self._environ |= {name: text for name, text in environ.items() if name.startswith(_PRELOADED_ENVIRONMENT)}
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def start(self, start: AgentStart, on_exit: OnExit) -> int:
        server = self._connected()
        try:
            return server.start(start, on_exit)
        except TimeoutError:
            raise
        except OSError as error:
            if not (server.gone or isinstance(error, BrokenPipeError | ConnectionResetError)):
                raise
            # It died since the last task; nothing was started. That it is gone may not be noticed yet.
            return self._connected(dead=server).start(start, on_exit)

    def close(self) -> None:
        with self._lock:
            if self._server is not None:
                self._server.close()
                self._server = None

    def _connected(self, dead: _Server | None = None) -> _Server:
        with self._lock:
            if self._server is None or self._server.gone or self._server is dead:
                self._server = _Server(self._reaper, self._environ, self._log, self._python, self._preload)
            return self._server


class _Server:
    """One fork server process and the requests it has."""

    def __init__(
        self, reaper: Reaper, environ: Mapping[str, str], log: Path, python: str, preload: Sequence[str]
    ) -> None:
        self._reaper = reaper
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Not the worker's own output: the server may outlive it, and a supervisor waits for the end of that output.
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [python, *_FORK_SERVER, str(theirs.fileno()), *preload],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        self._patience = _PRELOAD_SECONDS if preload else _ANSWER_SECONDS
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[int]] = {}
        self._exits: dict[int, OnExit] = {}
        self._pids: dict[int, int] = {}
        self.gone = False
        reaper.watch(self._socket, self._receive)

    def start(self, start: AgentStart, on_exit: OnExit) -> int:
        number = next(self._numbers)
        answer: Future[int] = Future()
        self._answers[number], self._exits[number] = answer, on_exit
        packet: dict[str, Any] = {"id": number, "env": dict(start.env), "cwd": start.cwd, "log": str(start.log)}
        packet["mark"] = start.limit
        try:
            socket.send_fds(self._socket, [json.dumps(packet).encode()], [start.lock])
            return answer.result(self._patience)
        except TimeoutError:
            raise  # it may still start, and its end is ours to see
        except OSError:
            self._answers.pop(number, None)
            self._exits.pop(number, None)
            raise

    def close(self) -> None:
        """Hang up: the server ends with its last agent."""
        self._reaper.unwatch(self._socket)
        self._socket.close()
        self._forget_process()

    def _receive(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            packet = self._socket.recv(_MAX_PACKET_BYTES)
            if packet:
                self._handle(json.loads(packet))
                return
        self._lost()

    def _handle(self, message: dict[str, Any]) -> None:
        number = message["id"]
        self._patience = _ANSWER_SECONDS
        if "pid" in message:
            self._pids[number] = message["pid"]
            self._answers.pop(number).set_result(message["pid"])
        elif "error" in message:
            self._exits.pop(number, None)
            self._answers.pop(number).set_exception(OSError(message["error"], os.strerror(message["error"])))
        else:
            self._pids.pop(number, None)
            self._exits.pop(number)(message["exited"])

    def _lost(self) -> None:
        """The server died. Its agents live on; we see them end, but not how."""
        self.gone = True
        self._reaper.unwatch(self._socket)
        self._socket.close()
        self._process.wait()
        for answer in self._answers.values():
            answer.set_exception(ConnectionResetError("the fork server ended"))
        self._answers.clear()
        for number, pid in self._pids.items():
            on_exit = self._exits.pop(number)
            try:
                self._reaper.watch_process(pid, lambda on_exit=on_exit: on_exit(None))  # type: ignore[misc]
            except ProcessLookupError:
                on_exit(None)

    def _forget_process(self) -> None:
        """Without agents it ends at once; with some it may outlive this worker."""
        try:
            self._process.wait(None if not self._pids else 0)
        except subprocess.TimeoutExpired:
            self._process.returncode = 0
