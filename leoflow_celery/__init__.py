"""The execution layer of a workflow orchestrator, on Celery.

``submit`` hands a task instance over; ``Client`` observes it. See ``docs/architecture.md`` for the way it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leoflow_celery.client import Client, Handle, wait
    from leoflow_celery.domain.reasons import FailureReason
    from leoflow_celery.domain.request import TaskRequest
    from leoflow_celery.domain.states import RunState, TaskState
    from leoflow_celery.errors import (
        AtCapacity,
        BrokerUnavailable,
        ConfigurationError,
        DatabaseUnavailable,
        InvalidDag,
        InvalidRequest,
        LeoflowError,
        NotFound,
        TaskFailed,
        Unavailable,
    )
    from leoflow_celery.store.events import EventView
    from leoflow_celery.store.views import RunView, TaskInstanceView

    __version__: str

__all__ = [
    "AtCapacity",
    "BrokerUnavailable",
    "Client",
    "ConfigurationError",
    "DatabaseUnavailable",
    "EventView",
    "FailureReason",
    "Handle",
    "InvalidDag",
    "InvalidRequest",
    "LeoflowError",
    "NotFound",
    "RunState",
    "RunView",
    "TaskFailed",
    "TaskInstanceView",
    "TaskRequest",
    "TaskState",
    "Unavailable",
    "submit",
    "wait",
]

_default_client: Client | None = None


def submit(request: Any, *, link: Any = None, link_error: Any = None) -> Handle:
    """Submit one request with a client made from the environment; see ``Client.submit``."""
    global _default_client
    from leoflow_celery.client import Client

    if _default_client is None:
        _default_client = Client.from_environment()
    return _default_client.submit(request, link=link, link_error=link_error)


#: Module → the public names it holds. An agent imports this package: it must not pay for Celery and SQLAlchemy.
_HOMES = {
    "leoflow_celery.client": ("Client", "Handle", "wait"),
    "leoflow_celery.domain.reasons": ("FailureReason",),
    "leoflow_celery.domain.request": ("TaskRequest",),
    "leoflow_celery.domain.states": ("RunState", "TaskState"),
    "leoflow_celery.store.events": ("EventView",),
    "leoflow_celery.store.views": ("RunView", "TaskInstanceView"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("leoflow-celery")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "leoflow_celery.errors")
    return getattr(import_module(home), name)
