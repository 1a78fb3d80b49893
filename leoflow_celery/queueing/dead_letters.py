"""What becomes of a message that was refused: its waiter hears why, and it is kept as a dead letter.

In Redis a dead letter is an entry of ``<prefix>dead-letters:entries`` (JSON, nothing secret) and, of a message, one of
``<prefix>dead-letters:raw`` (sealed); the list ``<prefix>dead-letters`` has their order, the newest first. A second
kind of dead letter is an attempt that was given up because it could not be launched: its request is in SQL.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

from celery import states
from kombu.utils.json import dumps

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId, is_try_id
from leoflow_celery.errors import (
    BrokerUnavailable,
    DecryptionFailed,
    InvalidRequest,
    LeoflowError,
    NotFound,
    RequestTooLarge,
)
from leoflow_celery.queueing.decoder import (
    About,
    Admitted,
    Kind,
    Limits,
    Refused,
    TaskRules,
    about_of,
    decode_broadcast,
    decode_held,
    decode_task,
    never_put_back,
    printable,
    put_back_again,
)
from leoflow_celery.queueing.depths import answered, redis_client
from leoflow_celery.security import KeyRing, Scope, Sealer
from leoflow_celery.settings import BrokerSettings, Settings

log = logging.getLogger(__name__)
R = TypeVar("R")
#: The kind of a dead letter that is an attempt.
GIVEN_UP = "given_up"
_PURPOSE = "dead-letter"
#: Where a message that a worker held is found that is none.
_UNACKED = "unacked"
#: Letters that wait for a broker which did not take them.
_MAX_UNKEPT = 100
#: The year 9999, the last that a clock can be asked for.
_LAST_SECOND = 250_000_000_000
#: Of the sentence about a message, which may quote it.
_MAX_WHY_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What anybody may know of a dead letter."""

    id: str
    queue: str
    kind: str
    sentence: str
    at: float
    task: str = ""
    celery_id: str = ""
    content_type: str = ""
    size_bytes: int = 0
    #: Bytes of it that are kept, sealed: fewer than it has when it is too large, none of an attempt.
    kept_bytes: int = 0
    #: Of an attempt that was given up.
    task_instance_id: str = ""
    try_number: int = 0
    launch: int = 0

    @classmethod
    def from_json(cls, text: bytes) -> DeadLetter | None:
        """The letter; None for an entry that is not one of ours."""
        try:
            value = json.loads(text)
            known = {field.name: field.type for field in fields(cls)}
            if not isinstance(value, dict) or value.keys() - known.keys():
                return None
            letter = cls(**value)
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"str": str, "float": int | float, "int": int}
        is_right = all(isinstance(getattr(letter, name), kinds[str(kind)]) for name, kind in known.items())
        return letter if is_right and 0 <= letter.at < _LAST_SECOND else None

    @property
    def is_whole(self) -> bool:
        """Whether the message can be put back."""
        return self.kind != GIVEN_UP and 0 < self.kept_bytes == self.size_bytes


#: Keeps a letter once, the newest first, and drops the oldest beyond the bound. Returns how many it dropped.
_KEEP = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[3], ARGV[1], ARGV[3]) end
local dropped = 0
while redis.call('LLEN', KEYS[1]) > tonumber(ARGV[4]) do
  local oldest = redis.call('RPOP', KEYS[1])
  redis.call('HDEL', KEYS[2], oldest)
  redis.call('HDEL', KEYS[3], oldest)
  dropped = dropped + 1
end
return dropped
"""
#: Takes a letter away and, with a fourth key, puts its message there: of two who try only one does. A key that is no
#: queue ends it at the put, and the letter stays.
_TAKE = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return 0 end
if KEYS[4] then redis.call('LPUSH', KEYS[4], ARGV[2]) end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('LREM', KEYS[1], 0, ARGV[1])
return 1
"""


def seal_letter(settings: Settings, letter_id: str, queue: str, raw: bytes) -> str:
    """A message as only who holds the keys can read it, bound to its letter and queue.

    Raises:
        LeoflowError: this process has no keys.
    """
    content = {"purpose": _PURPOSE, "id": letter_id, "queue": queue, "raw": base64.b64encode(raw).decode()}
    return _sealer(settings, queue).seal(content)


def open_letter(settings: Settings, letter: DeadLetter, sealed: str) -> bytes:
    """The message again.

    Raises:
        DecryptionFailed: it was sealed with another key, or is not that of this letter.
        ConfigurationError: this process has no keys.
    """
    content = _sealer(settings, letter.queue).open(sealed)
    if [content.get(name) for name in ("purpose", "id", "queue")] != [_PURPOSE, letter.id, letter.queue]:
        raise DecryptionFailed(f"dead letter {letter.id}: what is sealed belongs to another letter or queue; drop it")
    return base64.b64decode(content["raw"])


def _sealer(settings: Settings, queue: str) -> Sealer:
    """A launch worker holds the key of its own queue only; the control plane has that of every queue."""
    own = queue.partition(".")[0]
    scope = Scope(own) if own in (Scope.KUBERNETES, Scope.DOCKER, Scope.SUBPROCESS) else Scope.CONTROL
    return KeyRing(settings.security.seal_keys.get_secret_value()).sealer(scope)


class DeadLetters:
    """The dead letters of one broker. Every method raises BrokerUnavailable when it does not answer."""

    def __init__(self, settings: Settings, client: Any = None) -> None:
        """``client`` is a Redis client of the broker that the caller closes."""
        self._settings, self._given_client = settings, client
        prefix = settings.broker.key_prefix
        self._keys = [f"{prefix}dead-letters", f"{prefix}dead-letters:entries", f"{prefix}dead-letters:raw"]

    @cached_property
    def _client(self) -> Any:
        return self._given_client if self._given_client is not None else redis_client(self._settings.broker)

    def close(self) -> None:
        if self._given_client is None and "_client" in self.__dict__:
            self._client.close()

    def keep(self, letter: DeadLetter, raw: bytes = b"") -> DeadLetter:
        """Keep a letter, and as much of its message as may be; again is harmless."""
        head, sealed = raw[: self._settings.broker.dead_letter_max_bytes], ""
        if head:
            try:
                sealed = seal_letter(self._settings, letter.id, letter.queue, head)
            except LeoflowError as error:
                log.warning("dead_letter.without_message", extra={"letter": letter.id, "error": str(error)})
        kept = _with(letter, kept_bytes=len(head) if sealed else 0)
        bound = self._settings.broker.dead_letters
        dropped = self._run(_KEEP, self._keys, kept.id, json.dumps(asdict(kept)), sealed, bound)
        if dropped:
            metrics.record_dead_letters_dropped(dropped)
        return kept

    def count(self) -> int:
        return int(self._answer(lambda: self._client.llen(self._keys[0])))

    def all(self) -> list[DeadLetter]:
        """All letters, the newest first."""
        ids = self._answer(lambda: self._client.lrange(self._keys[0], 0, -1))
        texts = self._answer(lambda: self._client.hmget(self._keys[1], ids)) if ids else []
        letters = (DeadLetter.from_json(text) for text in texts if text is not None)
        return [letter for letter in letters if letter is not None]

    def get(self, letter_id: str) -> DeadLetter:
        """One letter.

        Raises:
            NotFound: there is none of this id.
        """
        text = self._answer(lambda: self._client.hget(self._keys[1], letter_id))
        letter = DeadLetter.from_json(text) if text is not None else None
        if letter is None or letter.id != letter_id:
            raise NotFound(f"there is no dead letter '{printable(letter_id)}'; 'leoflow dead-letters list' shows them")
        return letter

    def message(self, letter: DeadLetter) -> bytes:
        """What is kept of its message.

        Raises:
            NotFound: nothing is kept of it.
            DecryptionFailed: it was sealed with another key.
        """
        sealed = self._answer(lambda: self._client.hget(self._keys[2], letter.id))
        if sealed is None:
            raise NotFound(f"nothing is kept of the message of dead letter {letter.id}")
        return open_letter(self._settings, letter, sealed.decode("ascii", "replace"))

    def send_again(self, letter: DeadLetter) -> None:
        """Put a message back on its queue as it was, and drop its letter, in one step.

        Raises:
            InvalidRequest: it is not kept whole.
            NotFound: somebody else sent it again or dropped it.
            DecryptionFailed: it was sealed with another key.
        """
        if not letter.is_whole:
            raise InvalidRequest(
                f"dead letter {letter.id}: {letter.kept_bytes} of its {letter.size_bytes} bytes are kept, so it cannot "
                "be sent again; have its sender send it, and drop the letter",
                "id",
            )
        raw = self.message(letter)
        self._take(letter.id, [f"{self._settings.broker.key_prefix}{letter.queue}"], raw)

    def drop(self, letter_id: str) -> None:
        """Drop a letter.

        Raises:
            NotFound: there is none of this id.
        """
        self._take(letter_id, [])

    def drop_all(self) -> int:
        """Drop all letters; how many there were."""
        number = self.count()
        self._answer(lambda: self._client.delete(*self._keys))
        return number

    def _take(self, letter_id: str, target: list[str], *raw: bytes) -> None:
        if not self._run(_TAKE, [*self._keys, *target], letter_id, *raw):
            raise NotFound(f"there is no dead letter '{printable(letter_id)}' (any more)")

    def _run(self, script: str, keys: Sequence[str], *arguments: Any) -> int:
        return int(self._answer(lambda: self._client.eval(script, len(keys), *keys, *arguments)))

    def _answer(self, call: Callable[[], R]) -> R:
        """What the broker answers; a key that holds something else than letters is moved out of their way."""
        kinds = dict(zip(self._keys, (b"list", b"hash", b"hash"), strict=True))
        return answered(self._settings.broker, self._client, kinds, call)


def _with(letter: DeadLetter, **changes: Any) -> DeadLetter:
    return DeadLetter(**{**asdict(letter), **changes})


def given_up_letter(attempt: AttemptId, queue: str, task: str, celery_id: str, cause: str) -> DeadLetter:
    """The letter of an attempt that could not be launched. Its id is the attempt's, so there is one of each."""
    return DeadLetter(
        id=uuid.uuid5(uuid.UUID(int=0), f"{_PURPOSE}/{attempt}").hex[:16],
        queue=queue,
        kind=GIVEN_UP,
        sentence=cause,
        at=time.time(),
        task=task,
        celery_id=celery_id,
        task_instance_id=attempt.task_instance_id,
        try_number=attempt.try_number,
        launch=attempt.launch,
    )


def keep_refused(
    letters: DeadLetters,
    queue: str,
    why: str,
    task: str,
    *,
    kind: Kind = Kind.NOT_BELIEVED,
    celery_id: str = "",
    raw: bytes = b"",
    size_bytes: int = 0,
) -> None:
    """Count, log and keep a message that its task refused; ``raw`` is the message if it can be sent again."""
    why = printable(why, _MAX_WHY_CHARACTERS)
    letter = DeadLetter(
        id=uuid.uuid4().hex[:16],
        queue=printable(queue),
        kind=kind,
        sentence=why,
        at=time.time(),
        task=printable(task),
        celery_id=printable(celery_id),
        size_bytes=size_bytes or len(raw),
    )
    metrics.record_refused(letter.queue, kind)
    shown = {"queue": letter.queue, "task": letter.task, "celery_task_id": letter.celery_id, "letter": letter.id}
    log.warning("message.refused", extra={"kind": letter.kind, "why": why, **shown})
    try:
        letters.keep(letter, raw)
    except BrokerUnavailable as error:
        log.warning("dead_letter.not_kept", extra={"letter": letter.id, "error": str(error)})


def envelope_of(task: str, queue: str, request: Any) -> bytes:
    """The message of a running task, as its publisher could have put it on the queue."""
    # The decoder may have made dates and decimals of arguments: kombu writes them as it reads them.
    body = dumps([request.args or [], request.kwargs or {}, {}]).encode()
    headers = {"lang": "py", "task": task, "id": request.id, "root_id": request.root_id or request.id}
    delivery = {"exchange": "", "routing_key": queue}
    properties = {"correlation_id": request.id, "delivery_mode": 2, "delivery_info": delivery, "priority": 0}
    properties |= {"body_encoding": "base64", "delivery_tag": str(uuid.uuid4())}
    envelope = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
    }
    return json.dumps({**envelope, "headers": headers, "properties": properties}).encode()


class Door:
    """Stands between the broker and a worker: lets in what can be run, and sees to what cannot.

    Nothing that it meets in a message raises.
    """

    def __init__(self, app: Any) -> None:
        self._app, settings = app, app.settings
        broker: BrokerSettings = settings.broker
        self._limits = Limits(broker.max_message_bytes, broker.max_delay_seconds)
        self._max_deliveries = broker.max_deliveries
        self._all_commands = broker.remote_control == "all"
        self._letters = DeadLetters(settings)
        self._unkept: deque[tuple[DeadLetter, bytes]] = deque(maxlen=_MAX_UNKEPT)

    @cached_property
    def _rules(self) -> TaskRules:
        return TaskRules(self._app.tasks, self._limits)

    def admit(self, raw: bytes, queue: str) -> Admitted | None:
        """The message, or None when it was refused."""
        try:
            return decode_task(raw, queue, self._rules, time.time())
        except Refused as refused:
            self.refuse(refused, raw, queue)
        except Exception as error:  # noqa: BLE001 - no message ends a worker
            self.refuse(unexpected(error, About(len(raw))), raw, queue)
        return None

    def held(self, entry: bytes, *, counted: bool = True) -> tuple[dict[str, Any], str, str] | bool:
        """What a worker held, as it goes back to its queue: envelope, exchange and routing key.

        Or whether it is kept as a dead letter, because it cannot go back or, if ``counted``, did so too often.
        """
        try:
            envelope, exchange, routing_key = decode_held(entry, self._limits.max_bytes)
        except Refused as refused:
            return self.refuse(refused, entry, _UNACKED)
        try:
            envelope = put_back_again(envelope, self._max_deliveries) if counted else envelope
        except Refused as refused:
            raw = dumps(never_put_back(envelope)).encode()
            refused.about = replace(refused.about, size_bytes=len(raw))
            return self.refuse(refused, raw, routing_key)
        envelope["headers"]["redelivered"] = True
        return envelope, exchange, routing_key

    def broadcast(self, data: bytes) -> dict[str, Any] | None:
        """A remote control command that is obeyed, or None when it was refused."""
        try:
            return decode_broadcast(data, self._limits, all_commands=self._all_commands)
        except Refused as refused:
            metrics.record_refused("control", refused.kind)
            log.warning("control.refused", extra={"field": refused.field, "why": refused.sentence})
        except Exception as error:  # noqa: BLE001 - no message ends a worker
            metrics.record_refused("control", Kind.UNEXPECTED)
            log.warning("control.refused", extra={"error": type(error).__name__})
        return None

    @property
    def has_kept_all(self) -> bool:
        """Whether everything that was refused is a dead letter in Redis."""
        return not self._unkept

    def refuse(self, refused: Refused, raw: bytes, queue: str) -> bool:
        """Keep a message as a dead letter, tell its waiter, count it and log what may be said of it.

        Returns whether it is kept; if not, that is tried again with the next one.
        """
        about = refused.about
        letter = DeadLetter(
            id=uuid.uuid4().hex[:16],
            queue=queue,
            kind=refused.kind,
            sentence=refused.sentence,
            at=time.time(),
            task=printable(about.task),
            celery_id=printable(about.celery_id),
            content_type=printable(about.content_type),
            size_bytes=about.size_bytes,
        )
        metrics.record_refused(printable(queue), refused.kind)
        log.warning(
            "message.refused",
            extra={
                "kind": refused.kind.value,
                "field": printable(refused.field),
                "queue": printable(queue),
                "task": letter.task,
                "celery_task_id": letter.celery_id,
                "content_type": letter.content_type,
                "size_bytes": letter.size_bytes,
                "letter": letter.id,
            },
        )
        self._unkept.append((letter, raw))
        self._keep()
        if about.answered_id and not is_try_id(about.answered_id):
            self._tell(about.answered_id, refused)
        return self.has_kept_all

    def refuse_message(self, message: Any, error: Exception) -> bool:
        """The same for a message that came through, and that Celery cannot take.

        One that is not kept is forgotten here: it goes back to its queue, and is refused again.
        """
        raw, delivery = getattr(message, "_raw", None), message.delivery_info or {}
        try:
            data = json.dumps(raw).encode()
        except (ValueError, TypeError, RecursionError):
            data = b""
        if self.refuse(unexpected(error, about_of(raw, len(data))), data, str(delivery.get("routing_key", ""))):
            return True
        self._unkept.pop()
        return False

    def refuse_key(self, key: str, found: str, moved_to: str) -> None:
        """A key of the broker held another kind of value than a worker can read, and was moved."""
        self.refuse(wrong_type(key, found, moved_to), b"", key)

    def _keep(self) -> None:
        """Keep what was refused, also what the broker did not take before."""
        while self._unkept:
            letter, raw = self._unkept[0]
            try:
                self._letters.keep(letter, raw)
            except BrokerUnavailable as error:
                log.warning("dead_letter.not_kept", extra={"letter": letter.id, "error": str(error)})
                return
            self._unkept.popleft()

    def _tell(self, celery_id: str, refused: Refused) -> None:
        """FAILURE for who waits, unless there is a state of that id already: it is somebody else's then."""
        kind = RequestTooLarge if refused.kind is Kind.TOO_LARGE else InvalidRequest
        error = kind(refused.sentence, refused.field)
        backend = self._app.backend
        try:
            key = backend.get_key_for_task(celery_id)
            meta = {
                "status": states.FAILURE,
                "result": backend.prepare_exception(error),
                "traceback": None,
                "children": [],
                "date_done": self._app.now().isoformat(),
                "task_id": celery_id,
            }
            text = backend.encode(meta)
            if backend.client.set(key, text, nx=True, ex=backend.expires or None):
                backend.client.publish(key, text)
        except Exception as failure:  # noqa: BLE001 - the back end may be away in many ways
            log.warning(
                "refusal.not_told", extra={"celery_task_id": printable(celery_id), "error": type(failure).__name__}
            )


def unexpected(error: Exception, about: About) -> Refused:
    """What Celery, kombu or we ourselves stumbled over."""
    refused = Refused(
        Kind.UNEXPECTED,
        "message",
        f"message: cannot be read ({type(error).__name__}); send a message of the Celery task protocol 2",
    )
    refused.about = about
    return refused


def wrong_type(key: str, found: str, moved_to: str) -> Refused:
    """A key of the broker holds another kind of value than messages."""
    return Refused(
        Kind.WRONG_TYPE,
        "key",
        f"key '{printable(key)}' held a {printable(found)}, which no worker can read; it is now "
        f"'{printable(moved_to)}': look at it and delete it",
    )
