"""Notes of launches: a launch worker leaves one before it acknowledges its message, the control plane collects them.

A message of its own for each launch would cost the control plane more than what it says. So a note is one field of
one Redis hash, named after the attempt: leaving it again changes nothing, who collects reads a group of them, records
them in one transaction and removes them afterwards. A process that dies in between leaves notes that are collected
again, which changes nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.errors import DecryptionFailed
from leoflow_celery.queueing.depths import answered
from leoflow_celery.queueing.messages import EXECUTOR_OF, AttemptLaunched, open_message, seal_message
from leoflow_celery.security import KeyRing
from leoflow_celery.settings import BrokerSettings

_KEY = "launched"
_SEPARATOR = b" "
#: How many are collected at once, about.
GROUP_SIZE = 200
#: Twice what a launch worker writes at the most. Larger ones never leave Redis: 200 of them would end a worker.
_MAX_BYTES = 16 * 1024
#: A page of the hash: its cursor, fields and contents, and how large those were that it dropped for their size.
_PAGE = """
local page, notes, dropped = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2]), {}, {}
for i = 1, #page[2], 2 do
  local field, content = page[2][i], page[2][i + 1]
  local size = math.max(#field, #content)
  if size > tonumber(ARGV[3]) then
    redis.call('HDEL', KEYS[1], field)
    dropped[#dropped + 1] = size
  else
    notes[#notes + 1] = field
    notes[#notes + 1] = content
  end
end
return {page[1], notes, dropped}
"""
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LaunchNote:
    """A note as it lies in Redis: ``field`` names it there. One that was too large to be read has neither."""

    field: bytes
    content: bytes
    size_bytes: int

    @property
    def scope(self) -> str:
        """Whose key it claims to be sealed with."""
        return self.content.partition(_SEPARATOR)[0].decode("ascii", "replace")

    def report(self, keys: KeyRing) -> LaunchReport:
        """What the note says.

        Raises:
            DecryptionFailed: nobody who may say so said it, or it lies under another attempt's name.
        """
        if self.size_bytes > _MAX_BYTES:
            raise DecryptionFailed(
                f"a note of a launch has {self.size_bytes} bytes, more than any launch worker writes"
            )
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
        self._answer(lambda: self._client.hset(self._key, _field(report.attempt), content))

    def waiting(self) -> int:
        """How many notes nobody has collected.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        return int(self._answer(lambda: self._client.hlen(self._key)))

    def group(self) -> list[LaunchNote]:
        """Some of the notes, in no order; none when there are none.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        cursor, found = 0, list[LaunchNote]()
        if self.waiting():
            cursor, found = self._page(0)
        while not found and cursor:
            cursor, found = self._page(cursor)
        return found

    def _page(self, cursor: int) -> tuple[int, list[LaunchNote]]:
        def page() -> Any:
            return self._client.eval(_PAGE, 1, self._key, cursor, GROUP_SIZE, _MAX_BYTES)

        following, texts, dropped = self._answer(page)
        read = [
            LaunchNote(field, content, len(content)) for field, content in zip(texts[::2], texts[1::2], strict=True)
        ]
        return int(following), [*read, *(LaunchNote(b"", b"", size) for size in dropped)]

    def of(self, attempt: AttemptId) -> list[LaunchNote]:
        """The note of one attempt, if there is one.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        field = _field(attempt)
        if self._answer(lambda: self._client.hstrlen(self._key, field)) > _MAX_BYTES:
            return []  # the next page drops it
        content = self._answer(lambda: self._client.hget(self._key, field))
        return [] if content is None else [LaunchNote(field, content, len(content))]

    def remove(self, notes: Iterable[LaunchNote]) -> None:
        """Remove notes that were recorded.

        Raises:
            BrokerUnavailable: the broker did not answer; they are collected again.
        """
        fields = [note.field for note in notes]
        if fields:
            self._answer(lambda: self._client.hdel(self._key, *fields))

    def _answer(self, call: Callable[[], R]) -> R:
        """What the broker answers; a key that holds something else than notes is moved out of their way."""
        return answered(self._settings, self._client, {self._key: b"hash"}, call)


def _field(attempt: AttemptId) -> bytes:
    return str(attempt).encode(errors="surrogatepass")
