"""``app.control`` of our app: revoking a try's Celery id cancels the try.

Celery revokes by a broadcast: each worker that hears it drops the message when it comes, and stores REVOKED. SQL would
know nothing of that, and everybody who can write to the broker could say it. So our workers obey no such command
(``queueing.decoder``), and what comes through our app (``app.control.revoke``, ``AsyncResult.revoke``, Flower,
``celery control revoke``) is a sealed message to the control plane, the same as ``leoflow cancel``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.app import control

from leoflow_celery.domain.attempt import is_try_id
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.queueing.publisher import Publisher

log = logging.getLogger(__name__)
_REVOKING = ("revoke", "terminate")
#: What Celery's ``broadcast`` takes by name, too.
_ARGUMENTS = ("task_id", "terminate", "signal")


class Control(control.Control):
    """Celery's remote control, of which everything that revokes goes through ``broadcast``."""

    app: Any

    def broadcast(self, command: str, arguments: dict[str, Any] | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Send a command to workers, but what revokes tries to the control plane. Whom it names makes no difference.

        An id that nobody can tell from a user task's may be that of a ``leoflow.dispatch``: it goes both ways.

        Raises:
            BrokerUnavailable: the broker did not take it.
            ConfigurationError: this process holds no key to cancel with.
        """
        if command not in _REVOKING:
            return super().broadcast(command, arguments=arguments, **options)
        arguments = {**(arguments or {}), **{name: options.pop(name) for name in _ARGUMENTS if name in options}}
        named = arguments.get("task_id") or ()
        ids = [named] if isinstance(named, str) else [str(one) for one in named]
        for celery_id in ids:
            self._cancel(celery_id)
        others = [one for one in ids if not is_try_id(one)]
        if others:
            return super().broadcast(command, arguments={**arguments, "task_id": others}, **options)
        said = {"control plane": {"ok": f"asked to cancel {', '.join(ids)}"}}
        callback: Callable[[Any], Any] | None = options.get("callback")
        if callback is not None:
            callback(said)
        return [said] if options.get("reply") else None

    def _cancel(self, celery_id: str) -> None:
        try:
            Publisher(self.app, self.app.services).cancel(celery_id)
        except ConfigurationError as error:
            if is_try_id(celery_id):
                raise
            log.warning("cancel.without_key", extra={"celery_task_id": celery_id, "error": str(error)})
