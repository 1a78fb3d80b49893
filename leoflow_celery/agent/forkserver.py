"""A pre-imported agent that forks one agent per task: ``python -m leoflow_celery.agent.forkserver FD``.

``… FD MODULE …`` also imports modules of the user's code and forks agents ahead, each with a process for that code
(``agent.warm``); this is then run by the interpreter of the user's code.

Interpreter start and imports are most of what a short task costs, and a fork pays them once. FD is a SOCK_SEQPACKET
socket to the executor; a packet is one line of JSON.

in   ``{"id", "env", "cwd", "log", "mark"}`` with one open file: the attempt's lock, which the agent
     holds while it lives
out  ``{"id", "pid"}`` at the start or ``{"id", "error"}``, then ``{"id", "exited": status}``

When the executor is gone (its end of the socket closed, however its process ended) the server stays until its agents
have ended, then exits. No gRPC object may be created here: they do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from typing import Any, NoReturn

from leoflow_celery.agent import linux, process
from leoflow_celery.agent.__main__ import main as agent_main
from leoflow_celery.agent.warm import Spare

MAX_PACKET_BYTES = 1 << 17


class ForkServer:
    """One socket, many children."""

    def __init__(self, connection: socket.socket, *, forks_ahead: bool = False) -> None:
        self._connection, self._forks_ahead = connection, forks_ahead
        #: The agent that takes the next request: its process id, and the socket over which it is told to.
        self._next: tuple[int, socket.socket] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        #: pidfd → (request id, pid)
        self._children: dict[int, tuple[int, int]] = {}
        self._open = True

    def run(self) -> None:
        """Serve until the executor and every child are gone."""
        # Everything imported so far is kept out of the children's collections, which would copy its pages.
        gc.collect()
        gc.freeze()
        self._fork_ahead()
        while self._open or self._children:
            for key, _ in self._selector.select():
                if key.fileobj is self._connection:
                    self._receive()
                else:
                    self._child_ended(key.fd)

    # -- agents that are forked ahead: they read their requests themselves ----------------------------------------

    def _fork_ahead(self) -> None:
        if not self._forks_ahead or not self._open:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become_next(theirs)
        theirs.close()
        self._next = (pid, ours)

    def _become_next(self, control: socket.socket) -> NoReturn:
        """In the child: fork the user's process to be, then wait for a request and become its agent."""
        try:
            process.spare = Spare.fork()
            if not control.recv(1):
                os._exit(0)
            packet, _, _, _ = socket.recv_fds(self._connection, MAX_PACKET_BYTES, 1)
            if not packet:
                control.send(b"closed")
                os._exit(0)
            request = json.loads(packet)
            control.send(str(request["id"]).encode())
            control.close()
        except BaseException as error:  # noqa: BLE001 - nothing may reach the server's own loop in a child
            sys.stderr.write(f"leoflow-agent: {type(error).__name__}: {error}\n")
            os._exit(1)
        self._become_agent(request)

    def _hand_over(self, pid: int, control: socket.socket) -> bool:
        """Let the next agent take the request that has come; False when it was killed meanwhile."""
        self._next = None
        with control:
            try:
                control.send(b"1")
                answer = control.recv(64)
            except OSError:
                answer = b""
        if answer in (b"", b"closed"):
            os.waitpid(pid, 0)
            if answer:
                self._close()
            return bool(answer)
        self._watch(int(answer), pid)
        return True

    def _receive(self) -> None:
        if self._next is not None and self._hand_over(*self._next):
            self._fork_ahead()
        else:
            self._receive_and_fork()

    def _receive_and_fork(self) -> None:
        packet, files, _, _ = socket.recv_fds(self._connection, MAX_PACKET_BYTES, 1)
        if not packet:
            self._close()
            return
        request = json.loads(packet)
        try:
            self._fork(request)
        except OSError as error:
            self._send({"id": request["id"], "error": error.errno})
        finally:
            for descriptor in files:
                os.close(descriptor)

    def _close(self) -> None:
        self._selector.unregister(self._connection)
        self._open = False
        if self._next is not None:
            pid, control = self._next
            self._next = None
            control.close()
            os.waitpid(pid, 0)

    def _fork(self, request: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_agent(request)
        self._watch(request["id"], pid)

    def _watch(self, request_id: int, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (request_id, pid)
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._send({"id": request_id, "pid": pid})

    def _become_agent(self, request: dict[str, Any]) -> NoReturn:
        """In the child: shed what is the server's, become what the request says. The file of the lock stays open."""
        code = 1
        try:
            os.setsid()
            linux.mark_descendants(request["mark"])
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            self._connection.close()
            for pidfd in self._children:
                os.close(pidfd)
            _redirect(request["log"])
            os.environ.clear()
            os.environ.update(request["env"])
            if request["cwd"]:
                os.chdir(request["cwd"])
            code = agent_main()
        except BaseException as error:  # noqa: BLE001 - nothing may reach the server's own loop in a child
            sys.stderr.write(f"leoflow-agent: {type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _child_ended(self, pidfd: int) -> None:
        request_id, pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        # An agent that was killed leaves its processes to us, the next who adopts; one that ended has left none.
        others = {pid for _, pid in self._children.values()} | ({self._next[0]} if self._next else set())
        linux.kill_descendants(spare=frozenset(others))
        self._send({"id": request_id, "exited": os.waitstatus_to_exitcode(status)})

    def _send(self, message: dict[str, Any]) -> None:
        if self._open:
            try:
                self._connection.send(json.dumps(message).encode())
            except OSError:
                return  # the executor is gone; reading will say so


def _redirect(log: str) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(out)


def main() -> int:
    """Serve the socket whose number is the only argument."""
    # A signal to the worker's group (Ctrl-C, a supervisor's stop) is not for running tasks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    linux.adopt_orphans()
    linux.hide_from_our_user()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    modules = sys.argv[2:]
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - the user's code says it better, when it needs the module
            sys.stderr.write(f"leoflow-agent: LEOFLOW_SUBPROCESS_PRELOAD: {name} cannot be imported: {error!r}\n")
    with contextlib.suppress(ImportError):
        # It finds its place when it is first asked, and not after the environment was replaced in a child.
        importlib.import_module("setproctitle").getproctitle()
    ForkServer(connection, forks_ahead=bool(modules)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
