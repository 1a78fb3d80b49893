"""``leoflow-agent``, also ``python -m leoflow_celery.agent``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

from leoflow_celery.agent import linux
from leoflow_celery.agent.client import ControlPlane, open_channel
from leoflow_celery.agent.config import AgentConfig, absorb_environment_file
from leoflow_celery.agent.deadline import StopRequest
from leoflow_celery.agent.lifecycle import Agent
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import ConfigurationError

log = logging.getLogger("leoflow_celery.agent")

#: What a program is told for other reasons: a fault of its own, job control, a child, a pipe or file it cannot write.
_NO_STOP_SIGNALS = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS),
        *(signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
        *(signal.SIGCHLD, signal.SIGURG, signal.SIGPIPE, signal.SIGXFSZ),
    }
)


def command() -> NoReturn:
    """``main`` as a process. It ends at once: taking the interpreter down would cost more than all that it did."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main() -> int:
    """Run the attempt that the environment describes and return the exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="leoflow-agent: %(levelname)s %(message)s")
    try:
        absorb_environment_file(os.environ)
        config = AgentConfig.from_environment(os.environ)
        linux.adopt_orphans()
        linux.hide_from_our_user()
        return asyncio.run(run_agent(config, os.environ))
    except ConfigurationError as error:
        log.error("%s", error)  # noqa: TRY400 - one line is what an operator wants
        return 1


async def run_agent(config: AgentConfig, environ: Mapping[str, str]) -> int:
    """One agent in a fresh event loop of the main thread."""
    stop = StopRequest()
    async with open_channel(config) as channel:
        agent = Agent(config, ControlPlane(channel, config), stop, environ)
        _stop_on_signals(agent, stop)
        return await agent.run()


def stop_signals() -> list[int]:
    """Every signal that may mean stop. An image says itself which one it is (STOPSIGNAL), and the agent cannot know it.

    A terminal sends SIGWINCH for another reason.
    """
    not_stops = _NO_STOP_SIGNALS | ({signal.SIGWINCH} if _has_terminal() else set())
    return sorted(int(number) for number in signal.valid_signals() if number not in not_stops)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def signal_name(number: int) -> str:
    """As STOPSIGNAL and kill have it: SIGQUIT, SIGRTMIN+3."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _stop_on_signals(agent: Agent, stop: StopRequest) -> None:
    loop = asyncio.get_running_loop()

    def interrupt(name: str) -> None:
        stop.ask(FailureReason.INTERRUPTED, f"the agent received {name}")
        agent.beat_now()

    for number in stop_signals():
        with contextlib.suppress(RuntimeError):  # a C library may keep some for itself
            loop.add_signal_handler(number, interrupt, signal_name(number))


if __name__ == "__main__":
    command()
