"""Notes of launches: a launch worker leaves one before it acknowledges its message, the control plane collects them.

A message of its own for each launch would cost the control plane more than what it says. So a note is one field of
one Redis hash, named after the attempt: leaving it again changes nothing, who collects reads a group of them, records
them in one transaction and removes them afterwards. A process that dies in between leaves notes that are collected
again, which changes nothing either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.errors import DecryptionFailed
from leoflow_celery.queueing.depths import broker_errors_mapped
from leoflow_celery.queueing.messages import EXECUTOR_OF, AttemptLaunched, open_message, seal_message
from leoflow_celery.security import KeyRing
from leoflow_celery.settings import BrokerSettings

_KEY = "launched"
_SEPARATOR = b" "
#: How many are collected at once, about.
GROUP_SIZE = 200


@dataclass(frozen=True, slots=True)
class LaunchNote:
    """A note as it lies in Redis: ``field`` names it there."""

    field: bytes
    content: bytes

    @property
    def scope(self) -> str:
        """Whose key it claims to be sealed with."""
        return self.content.partition(_SEPARATOR)[0].decode("ascii", "replace")

    def report(self, keys: KeyRing) -> LaunchReport:
        """What the note says.

        Raises:
            DecryptionFailed: nobody who may say so said it, or it lies under another attempt's name.
        """
        if self.scope not in EXECUTOR_OF:
            raise DecryptionFailed("a note of a launch does not name the queue of its launch worker")
        sealed = self.content.partition(_SEPARATOR)[2].decode("ascii", "replace")
        report = open_message(keys, self.scope, AttemptLaunched, sealed).report
        if self.field != _field(report.attempt):
            raise DecryptionFailed("a note of a launch lies under the name of another attempt")
        return report


class LaunchNotes:
    """The notes of one broker. ``client`` is a Redis client."""

    def __init__(self, client: Any, settings: BrokerSettings, keys: KeyRing) -> None:
        self._client, self._settings, self._keys = client, settings, keys
        self._key = f"{settings.key_prefix}{_KEY}"

    def leave(self, scope: str, report: LaunchReport) -> None:
        """Leave a note, sealed with the key of the launch worker's queue.

        Raises:
            BrokerUnavailable: the broker did not take it.
        """
        content = f"{scope} {seal_message(self._keys, scope, AttemptLaunched(report))}"
        with broker_errors_mapped(self._settings):
            self._client.hset(self._key, _field(report.attempt), content)

    def waiting(self) -> int:
        """How many notes nobody has collected.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        with broker_errors_mapped(self._settings):
            return int(self._client.hlen(self._key))

    def group(self) -> list[LaunchNote]:
        """Some of the notes, in no order; none when there are none.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        with broker_errors_mapped(self._settings):
            if not self._client.hlen(self._key):
                return []
            cursor, found = self._client.hscan(self._key, count=GROUP_SIZE)
            while not found and cursor:
                cursor, found = self._client.hscan(self._key, cursor, count=GROUP_SIZE)
        return [LaunchNote(field, content) for field, content in found.items()]

    def of(self, attempt: AttemptId) -> list[LaunchNote]:
        """The note of one attempt, if there is one.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        with broker_errors_mapped(self._settings):
            content = self._client.hget(self._key, _field(attempt))
        return [] if content is None else [LaunchNote(_field(attempt), content)]

    def remove(self, notes: Iterable[LaunchNote]) -> None:
        """Remove notes that were recorded.

        Raises:
            BrokerUnavailable: the broker did not answer; they are collected again.
        """
        fields = [note.field for note in notes]
        if fields:
            with broker_errors_mapped(self._settings):
                self._client.hdel(self._key, *fields)


def _field(attempt: AttemptId) -> bytes:
    return str(attempt).encode(errors="surrogatepass")
