"""Which system a command talks to: that of the environment, or an embedded one with its directory of state.

``--lite`` and ``--state-dir`` name an embedded one. It is also found without them: when there is one at the standard
place, and no setting in the environment says where a deployed one is.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from leoflow_celery.cli.output import note
from leoflow_celery.errors import BrokerUnavailable, ConfigurationError, DatabaseUnavailable, LeoflowError, NotFound

if TYPE_CHECKING:
    from leoflow_celery.lite.state import StateDirectory

#: Whoever sets one of these means a deployed system.
_DEPLOYED = ("LEOFLOW_DATABASE_URL", "LEOFLOW_BROKER_URL", "LEOFLOW_JWT_SECRET", "LEOFLOW_SEAL_KEYS")
#: Commands that look at a run or drive one; what sets a system up never looks for another.
_OF_A_SYSTEM = frozenset(
    {
        "run",
        "submit",
        "rerun",
        "retry",
        "runs",
        "tasks",
        "status",
        "watch",
        "report",
        "logs",
        "xcom",
        "cancel",
        "staging",
    }
)

#: Commands that make an embedded system where there is none yet.
_STARTING = frozenset({"run", "rerun", "retry", "lite"})


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embedded system that a command uses. ``option`` is how another command names it."""

    state: StateDirectory
    option: str
    #: Found without the flag.
    found: bool = False

    @property
    def up_option(self) -> str:
        """How 'leoflow lite' names it."""
        return "" if self.option == "--lite" else f" {self.option}"


#: A process is one command.
_used: Embedded | None = None


def find(command: str | None, lite: bool, state_dir: Path | None) -> StateDirectory | None:
    """The directory of the embedded system that a command uses, or None for the one that the environment names."""
    from leoflow_celery.lite.state import StateDirectory

    if lite or state_dir is not None:
        return StateDirectory.at(state_dir)
    if command not in _OF_A_SYSTEM or _is_deployed():
        return None
    state = StateDirectory.at(None)
    return state if state.keys_path.exists() else None


def choose(command: str | None, lite: bool, state_dir: Path | None) -> None:
    """Make this process part of the embedded system that the options name, or of the only system there is."""
    global _used
    _used = None
    state = find(command, lite, state_dir)
    if state is None:
        return
    if state.keys_path.exists() or command not in _STARTING:
        state.use()
    option = "--lite" if state_dir is None else f"--state-dir {shlex.quote(str(state_dir))}"
    _used = Embedded(state, option, found=not lite and state_dir is None)


def _is_deployed() -> bool:
    return any(os.environ.get(name) or os.environ.get(f"{name}_FILE") for name in _DEPLOYED)


def embedded() -> Embedded | None:
    """The embedded system of the running command, if it uses one."""
    return _used


def hint(*words: str, tenant: str = "default") -> str:
    """A command to give next, as one has to type it for the same system and tenant."""
    system = embedded()
    command = shlex.join([*words, *(("--tenant", tenant) if tenant != "default" else ())])
    return f"'leoflow {system.option} {command}'" if system else f"'leoflow {command}'"


def where(error: LeoflowError) -> str:
    """What an error is to say besides, about the system that was asked; empty for a system that the user named."""
    if isinstance(error, BrokerUnavailable) and _used is not None:
        return f"; start the system with 'leoflow lite up{_used.up_option}'"
    if isinstance(error, NotFound) and _used is not None and _used.found:
        return (
            f" (in the embedded system of {_used.state.path}; --env-file or LEOFLOW_DATABASE_URL name a deployed one)"
        )
    if isinstance(error, ConfigurationError | DatabaseUnavailable) and _used is None and not _is_deployed():
        return "; on one machine 'leoflow lite run DAG.json' needs no settings"
    return ""


@contextmanager
def at_work() -> Iterator[bool]:
    """A system that runs tasks; True when it is an embedded one, which this command may have to start and to stop."""
    system = embedded()
    if system is None:
        yield False
        return
    with own_or_running(system.state):
        yield True


@contextmanager
def own_or_running(state: StateDirectory) -> Iterator[None]:
    """The embedded system of a directory: started for us, or the one that 'leoflow lite up' runs there.

    Raises:
        InUse: another command runs it, and will stop it when it is done.
    """
    from leoflow_celery.lite.state import InUse
    from leoflow_celery.lite.system import running

    with ExitStack() as stack:
        try:
            stack.enter_context(running(state, "run", note))
        except InUse as error:
            if error.holder is None or error.holder.command != "up":
                raise
            note(f"using the system of 'leoflow lite up' (process {error.holder.pid})")
            state.use()
        yield
