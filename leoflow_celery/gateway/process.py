"""The gateway as a process: signals, limits, exit code."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys
from typing import Any

import uvloop

from leoflow_celery import metrics
from leoflow_celery.app.logging import log_to_stderr
from leoflow_celery.gateway.rpc import bound_logs
from leoflow_celery.gateway.server import GatewayServer
from leoflow_celery.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, then shut down cleanly; the exit code. A second signal ends the grace.

    Raises:
        ConfigurationError: a setting is missing or cannot work, or the address cannot be listened on.
    """
    log_to_stderr()
    bound_logs()
    raise_open_files_limit()
    end_metrics = metrics.serve(settings.gateway.metrics_port)
    try:
        # grpc.aio goes through the loop six times for each call: a seventh more calls per core with this one.
        return uvloop.run(_serve(settings))
    finally:
        end_metrics()


async def _serve(settings: Settings) -> int:
    server = GatewayServer(settings)
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unhandled)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, signal.Signals(number).name)
    await server.start()
    # Whoever started this process on port 0 reads the port here.
    sys.stdout.write(f"gateway listening on {server.address}\n")
    sys.stdout.flush()
    log.info("%s: shutting down", await signals.get())
    stopping = asyncio.create_task(server.stop())
    impatient = asyncio.create_task(signals.get())
    await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        await server.abort()
    impatient.cancel()
    await stopping
    return 0


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a task of nobody raised. What grpc could not decode holds a stranger's bytes, and has had its line."""
    if not isinstance(context.get("exception"), UnicodeDecodeError):
        loop.default_exception_handler(context)


def raise_open_files_limit() -> None:
    """Allow as many open files as the system lets us: each agent costs a socket and a log file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            log.warning("the limit of open files stays %d; more agents than about half of it will be refused", soft)
