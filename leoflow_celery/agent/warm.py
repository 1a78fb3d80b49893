"""User code in a fork of an interpreter that has imported its modules, instead of in a fresh one.

The fork server of an executor with ``LEOFLOW_SUBPROCESS_PRELOAD`` forks an agent ahead, and that forks a *spare*.
Neither the server nor the spare has ever read a request: the agent reads its own, so the user's code has no memory in
which a token was. The spare is the agent's child, as a started process would be, and waits for the one command.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any, NoReturn

from leoflow_celery.agent import linux

_LENGTH_BYTES = 8
_KEYBOARD_INTERRUPT_EXIT_CODE = 130


class WarmProcess:
    """A spare that runs a command; as much of ``subprocess.Popen`` as the agent uses."""

    def __init__(self, pid: int, stdin: IO[bytes] | None, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None


class Spare:
    """The agent's side: a process that may be used once."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self._pid, self._connection = pid, connection
        self._is_used = False

    @classmethod
    def fork(cls) -> Spare:
        """Fork it from this process, before this process knows anything that user code may not."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _wait_for_command(theirs)
        theirs.close()
        return cls(pid, ours)

    def fits(self, argv: Sequence[str]) -> bool:
        """Whether the command runs a module in the interpreter that this is."""
        return not self._is_used and list(argv[:2]) == [sys.executable, "-m"] and len(argv) > 2

    def start(self, argv: Sequence[str], env: Mapping[str, str], *, has_stdin: bool) -> WarmProcess:
        """Run the command. Raises OSError when the spare is gone: nothing was started."""
        self._is_used = True
        stdin = os.pipe() if has_stdin else (os.open(os.devnull, os.O_RDONLY), -1)
        stdout, stderr = os.pipe(), os.pipe()
        theirs, ours = (stdin[0], stdout[1], stderr[1]), (stdin[1], stdout[0], stderr[0])
        try:
            told = {"argv": list(argv), "env": dict(env), "cwd": os.getcwd(), "mark": linux.own_mark()}
            command = json.dumps(told).encode()
            with self._connection:
                socket.send_fds(self._connection, [len(command).to_bytes(_LENGTH_BYTES, "big")], list(theirs))
                self._connection.sendall(command)
        except OSError:
            for descriptor in filter(lambda one: one >= 0, ours):
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        writer = os.fdopen(ours[0], "wb", 0) if has_stdin else None
        return WarmProcess(self._pid, writer, os.fdopen(ours[1], "rb", 0), os.fdopen(ours[2], "rb", 0))


def _wait_for_command(connection: socket.socket) -> NoReturn:
    """In the spare: nothing of its parents stays open, and it ends with the agent when it is not needed."""
    code = 1
    try:
        number = connection.fileno()
        os.closerange(3, number)
        os.closerange(number + 1, os.sysconf("SC_OPEN_MAX"))
        header, files, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, 3)
        if not header:
            os._exit(0)
        with connection.makefile("rb") as reader:
            command = json.loads(reader.read(int.from_bytes(header, "big")))
        connection.close()
        code = _run(command, files)
    finally:
        os._exit(code)


def _run(command: dict[str, Any], files: Sequence[int]) -> int:
    os.setsid()
    linux.mark_descendants(command["mark"])
    linux.show_to_our_user()
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)
    for number in (signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through="PYTHONUNBUFFERED" in os.environ)  # type: ignore[union-attr]
    _set_path()
    module, arguments = command["argv"][2], command["argv"][3:]
    sys.argv = [module, *arguments]
    code = _exit_code(module)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code & 0xFF


def _set_path() -> None:
    """What a fresh interpreter would have in front: the working directory and PYTHONPATH."""
    own = [] if os.environ.get("PYTHONSAFEPATH") else [os.getcwd()]
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    front = [*own, *named]
    sys.path[:] = [*front, *(path for path in sys.path if path not in front)]


def _exit_code(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")
        return 1
    except KeyboardInterrupt:
        return _KEYBOARD_INTERRUPT_EXIT_CODE
    except BaseException:  # noqa: BLE001 - as an interpreter ends with any of them
        traceback.print_exc()
        return 1
    return 0
