"""The execution layer of a workflow orchestrator, on Celery.

``submit`` hands a task instance over; ``Client`` observes it. See ``docs/architecture.md`` for the way it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leoflow_celery.client import Client, Handle

    __version__: str

__all__ = ["Client", "Handle", "submit"]

_default_client: Client | None = None


def submit(request: Any, *, link: Any = None, link_error: Any = None) -> Handle:
    """Submit one request with a client made from the environment; see ``Client.submit``."""
    global _default_client
    from leoflow_celery.client import Client

    if _default_client is None:
        _default_client = Client.from_environment()
    return _default_client.submit(request, link=link, link_error=link_error)


def __getattr__(name: str) -> Any:
    # An agent imports this package: it must not pay for Celery and SQLAlchemy.
    if name in ("Client", "Handle"):
        from leoflow_celery import client

        return getattr(client, name)
    if name == "__version__":
        from importlib import metadata

        return metadata.version("leoflow-celery")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
