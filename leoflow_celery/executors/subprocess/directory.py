"""The directory of an attempt on this host, and the lock that says whether it is alive.

The executor takes the lock, hands the open file to the agent and closes its own copy: from then on the lock is held
exactly as long as the agent lives, whatever happens to the worker. An attempt holds its directory from its launch until
its end was settled, so directories also count how many run at once on this host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pwd
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from leoflow_celery.domain.attempt import AttemptId, attempt_suffix
from leoflow_celery.domain.termination import MAX_BYTES, TerminationRecord, decode, verified
from leoflow_celery.errors import ConfigurationError, HostFull
from leoflow_celery.executors.base import standard_max_running
from leoflow_celery.settings import SubprocessSettings

log = logging.getLogger(__name__)

_LOCK = "lock"
_PID = "pid"
_POLL_SECONDS = 0.01
#: A record and its signature.
_RECORD_BYTES = 2 * MAX_BYTES
#: Of a directory that others may pass through, and not look into.
_PASSABLE = 0o711
#: PEP 263.
_CODING = re.compile(r"^([ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+")
_BLANK = re.compile(r"^[ \t\f\r]*(#.*)?$")


def state_root(configured: str) -> Path:
    """The private directory that holds all attempts of this user on this host.

    Raises:
        ConfigurationError: it cannot be made, or belongs to somebody else.
    """
    root = Path(configured) if configured else Path(tempfile.gettempdir()) / f"leoflow-subprocess-{os.getuid()}"
    try:
        (root / "attempts").mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        raise ConfigurationError(f"LEOFLOW_SUBPROCESS_STATE_DIR {root}: {error.strerror}") from error
    if status.st_uid != os.getuid():
        raise ConfigurationError(
            f"LEOFLOW_SUBPROCESS_STATE_DIR {root}: belongs to another user; name another directory"
        )
    if not configured:
        root.chmod(0o700)
    return root


def system_id(root: Path) -> str:
    """The random id that tells this state directory's attempts from those of other systems on the host.

    Raises:
        ConfigurationError: it can be neither read nor made.
    """
    path = root / "system"
    try:
        if not path.exists():
            _create(path, secrets.token_hex(16))
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"LEOFLOW_SUBPROCESS_STATE_DIR {root}: cannot read {path}: {error}") from error
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise ConfigurationError(
            f"LEOFLOW_SUBPROCESS_STATE_DIR {root}: {path} does not hold 32 hexadecimal digits; "
            "delete it when no task of this system runs on this host"
        )
    return text


def _create(path: Path, text: str) -> None:
    """Create a file whole, unless somebody else is quicker: whoever sees it sees all of it."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)


@dataclass(frozen=True, slots=True)
class Account:
    """The user of this host that tasks run as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def of(cls, settings: SubprocessSettings) -> Account | None:
        """The one that the settings name; None when tasks run as the worker.

        Raises:
            ConfigurationError: there is none, or this worker cannot start anything as somebody else.
        """
        if not (name := settings.user):
            return None
        what = f"LEOFLOW_SUBPROCESS_USER={name}"
        if os.geteuid() != 0:
            raise ConfigurationError(
                f"{what}: a worker that is not root starts nothing as another user; start it as root, or unset it"
            )
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            raise ConfigurationError(
                f"{what}: this host has no such user; create it ('useradd --system {name}'), or name another"
            ) from None
        if found.pw_uid == 0:
            raise ConfigurationError(f"{what}: this is root, who may read everything; name another user")
        if settings.agent_path:
            raise ConfigurationError(
                f"{what}: only our own agent runs tasks as another user; unset LEOFLOW_SUBPROCESS_AGENT_PATH"
            )
        groups = tuple(os.getgrouplist(name, found.pw_gid))
        return cls(name, found.pw_uid, found.pw_gid, groups, found.pw_dir)

    def open_way(self, root: Path) -> None:
        """Let the user pass through the state directory to what is its own there.

        Raises:
            ConfigurationError: a directory above is closed to it.
        """
        for path in (root, root / "attempts"):
            path.chmod(_PASSABLE)
        enters = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(root / "attempts")]
        done = subprocess.run(
            enters, user=self.uid, group=self.gid, extra_groups=self.groups, check=False, capture_output=True
        )
        if done.returncode:
            raise ConfigurationError(
                f"LEOFLOW_SUBPROCESS_USER={self.name}: this user cannot pass through {root}; set "
                "LEOFLOW_SUBPROCESS_STATE_DIR to a directory below one that everybody may enter"
            )

    @property
    def environment(self) -> dict[str, str]:
        """What the agent and its task are told of it."""
        ids = f"{self.uid}:{self.gid}:{','.join(map(str, self.groups))}"
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "LEOFLOW_AGENT_RUN_AS": ids}


class AttemptDirectory:
    """The directory of one attempt while this object holds its lock."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self.lock = path, lock

    @classmethod
    def acquire(cls, path: Path) -> AttemptDirectory | None:
        """Make the directory and take its lock; None when somebody holds it: an agent, or for a moment one of us."""
        while True:
            path.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    return None
                # The directory may have been removed, and made again, between opening and locking.
                if _same_file(lock, path / _LOCK):
                    (path / _PID).unlink(missing_ok=True)
                    return cls(path, lock)
                os.close(lock)

    @classmethod
    def acquire_existing(cls, path: Path) -> AttemptDirectory | None:
        """As ``acquire``, but None also when there is no such directory."""
        return cls.acquire(path) if path.is_dir() else None

    @classmethod
    def acquire_unless_alive(
        cls, path: Path, acquire: Callable[[Path], AttemptDirectory | None], patience_seconds: float = 5.0
    ) -> AttemptDirectory | None:
        """As ``acquire``, which is called again until one of us lets go; None means that an agent lives.

        Raises:
            TimeoutError: somebody who is no agent holds the lock for longer than that.
        """
        deadline = time.monotonic() + patience_seconds
        while (directory := acquire(path)) is None and live_pid(path) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"attempt {path.name} is being settled")
            time.sleep(_POLL_SECONDS)
        return directory

    def prepare(self, attempt: AttemptId, source: str, account: Account | None = None) -> None:
        """Forget an earlier agent and write what the next one needs; ``account`` gets the source."""
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.path / "attempt.json").write_text(json.dumps(attempt.to_json()))
        if source:
            self.source_dir.mkdir(mode=0o700)
            (self.source_dir / "dag.py").write_bytes(as_utf8(source))
        if account is not None:
            self.path.chmod(_PASSABLE)
            for path in (self.source_dir / "dag.py", self.source_dir) if source else ():
                os.chown(path, account.uid, account.gid)

    @property
    def source_dir(self) -> Path:
        return self.path / "source"

    @property
    def termination_log(self) -> Path:
        return self.path / "termination.json"

    @property
    def agent_log(self) -> Path:
        return self.path / "agent.log"

    def attempt(self) -> AttemptId | None:
        """Whose directory it is, or None when its maker did not come that far."""
        try:
            attempt = AttemptId.from_json(json.loads((self.path / "attempt.json").read_text()))
            # User code can write here: the directory of an attempt speaks of that one and of no other.
            return attempt if self.path.name.endswith(f"-{attempt_suffix(attempt)}") else None
        except (OSError, ValueError, KeyError):
            return None

    def record(self, keys: Sequence[str] = ()) -> TerminationRecord | None:
        """What the agent left behind; with keys only what it signed: user code may write here."""
        try:
            with open(self.termination_log, "rb", opener=_open_regular) as file:
                data = file.read(_RECORD_BYTES)
        except OSError:
            return None
        record = verified(data, keys) if keys else data
        if record is None:
            log.warning("subprocess.record_not_signed", extra={"attempt_name": self.path.name})
        return None if record is None else decode(record)

    def write_pid(self, pid: int) -> None:
        (self.path / _PID).write_text(str(pid))

    def remove(self) -> None:
        """Delete it, lock last in effect: nobody can take it over in between."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Close our copy of the lock. An agent that has one goes on holding it."""
        os.close(self.lock)


def _open_regular(path: str, flags: int) -> int:
    """No link, pipe or device: whatever user code may have put there."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def as_utf8(source: str) -> bytes:
    """Source text as UTF-8, which its coding line, if it has one, then says."""
    lines = source.split("\n", 2)
    for number, line in enumerate(lines[:2]):
        if number and not _BLANK.match(lines[0]):
            break
        lines[number] = _CODING.sub(r"\g<1>utf-8", line)
    return "\n".join(lines).encode(errors="surrogatepass")


def live_pid(path: Path) -> int | None:
    """The process id of the attempt's agent while it lives. Whoever takes the lock after it forgets the id."""
    try:
        pid = int((path / _PID).read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def all_attempts(root: Path) -> Iterator[Path]:
    """Every attempt directory on this host."""
    with contextlib.suppress(FileNotFoundError):
        yield from (root / "attempts").iterdir()


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes() -> int:
    """Of the machine, or of the container that we are in when it has less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no limit
            found.append(int(Path(file).read_text()))
    return min(found)


class Slots:
    """The slots of a state directory, which all workers of this system on this host share. Thread-safe."""

    def __init__(self, root: Path, configured: int) -> None:
        self._root = root
        self.limit = configured or standard_max_running(len(os.sched_getaffinity(0)), host_memory_bytes())

    def free(self) -> int:
        """How many launches would find room."""
        return self.limit - sum(1 for _ in all_attempts(self._root))

    @contextmanager
    def admission(self, path: Path) -> Iterator[None]:
        """Inside, this attempt's directory may be made and nobody else's.

        Raises:
            HostFull: the host runs as many as it may, and this is none of them.
        """
        lock = os.open(self._root / "admission", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() and self.free() <= 0:
                raise HostFull(f"this host runs {self.limit} attempts, which is LEOFLOW_SUBPROCESS_MAX_RUNNING")
            yield
        finally:
            os.close(lock)
