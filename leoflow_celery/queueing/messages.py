"""What our processes tell each other: each message a typed value, sealed whole with its purpose and its time.

The key says who speaks. A launch worker holds the key of its own queue: what is sealed with that was said by the
control plane to the workers of this queue, or by one of them. ``purpose`` keeps the one from being taken for the other,
and a message of one kind for another kind.

==================  ==================  ==========  =====================================================
message            from → to           scope       task, or where it rests
==================  ==================  ==========  =====================================================
``Launch``         control → launch    its queue   ``leoflow.execute.<executor>``
``LaunchInline``   control → inline    control     ``leoflow.execute.inline``
``Stop``           control → launch    its queue   ``leoflow.stop.<executor>``
``Reconcile``      control → launch    its queue   ``leoflow.reconcile.<executor>``
``CollectStaging`` control → launch    its queue   ``leoflow.staging.<executor>``
``AttemptLaunched`` launch → control    its queue   the hash of launch notes (``queueing.launch_notes``)
``AttemptEnded``   launch → control    its queue   ``leoflow.results.record``
``StagingDeleted`` launch → control    its queue   ``leoflow.results.staging_deleted``
``Present``        launch → control    its queue   ``leoflow.results.present``
``AdvanceTry``     control → control   control     ``leoflow.results.advance``
``Cancel``         any → control       cancel      ``leoflow.results.cancel``
==================  ==================  ==========  =====================================================

Beat holds no key. It sends the maintenance tasks without content, and they look at SQL by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

from pydantic import ValidationError

from leoflow_celery.clock import broker_clock
from leoflow_celery.domain.attempt import AttemptId, LaunchReport, text_in
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.clear import KeptDag, RunGraph
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.fields import SEALED
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import TaskRequest, check_size, invalid_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.domain.states import TERMINAL
from leoflow_celery.errors import DecryptionFailed, MessageExpired, StoredRequestInvalid
from leoflow_celery.security import KeyRing, Scope

#: The scope of the launch workers of an executor. The inline worker is part of the control plane.
SCOPE_OF: dict[ExecutorType, Scope] = {
    ExecutorType.KUBERNETES: Scope.KUBERNETES,
    ExecutorType.DOCKER: Scope.DOCKER,
    ExecutorType.SUBPROCESS: Scope.SUBPROCESS,
    ExecutorType.INLINE: Scope.CONTROL,
}
#: The executor whose launch workers speak with a scope's key.
EXECUTOR_OF: dict[str, ExecutorType] = {
    scope: executor for executor, scope in SCOPE_OF.items() if executor is not ExecutorType.INLINE
}
#: By the broker's clock, on both sides. Minutes, for a process that could not read it yet: what is older was sent again
#: by somebody else.
_MAX_AGE_SECONDS = 600.0
_MAX_LOG_TAIL_LINES = 200


class Message(Protocol):
    """One kind of message. ``max_age_seconds`` is None for one that is harmless however late it comes."""

    purpose: ClassVar[str]
    max_age_seconds: ClassVar[float | None]

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self: ...


M = TypeVar("M", bound=Message)


def seal_message(keys: KeyRing, scope: str, message: Message, good_for_seconds: float | None = None) -> str:
    """A message as only the holders of the scope's key can read or make it.

    ``good_for_seconds``: it is said again by then, and worth nothing afterwards.
    """
    now = broker_clock.time()
    content = {"purpose": message.purpose, "at": now, "message": message.to_json()}
    if good_for_seconds is not None:
        content["until"] = now + good_for_seconds
    return keys.sealer(scope).seal(content)


def open_message(keys: KeyRing, scope: str, kind: type[M], sealed: object) -> M:
    """The message again.

    Raises:
        DecryptionFailed: it is not sealed with the scope's key, is of another kind, is too old, or is of a version that
            this process does not know.
        MessageExpired: it was good for some time, by the broker's clock on both sides.
    """
    if not isinstance(sealed, str):
        raise DecryptionFailed(f"a message for {kind.purpose!r} is not sealed")
    content = keys.sealer(scope).open(sealed)
    if content.get("purpose") != kind.purpose:
        raise DecryptionFailed(f"a sealed message is not for {kind.purpose!r}")
    try:
        age = broker_clock.time() - float(content["at"])
        if kind.max_age_seconds is not None and not abs(age) <= kind.max_age_seconds:  # an age that is no number too
            raise DecryptionFailed(
                f"a message for {kind.purpose!r} is {age:.0f} s old, {kind.max_age_seconds:.0f} s are allowed; "
                "it was sent again, or a clock is wrong"
            )
        if broker_clock.time() > float(content.get("until", math.inf)):
            raise MessageExpired(f"a message for {kind.purpose!r} is {age:.0f} s old")
        return kind.from_json(content["message"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DecryptionFailed(
            f"a message for {kind.purpose!r} is not of this version; upgrade the process that reads it"
        ) from error


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an attempt. ``tried_since``: when its first start failed, by the broker's clock."""

    purpose: ClassVar[str] = "launch"
    max_age_seconds: ClassVar[float | None] = None

    attempt: AttemptId
    request: TaskRequest
    tried_since: float | None = None

    def to_json(self) -> dict[str, Any]:
        request = self.request.model_dump(mode="json", exclude_defaults=True)
        return {"attempt": self.attempt.to_json(), "request": request, "tried_since": self.tried_since}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        since = data.get("tried_since")
        request = TaskRequest.model_validate(data["request"], context=SEALED)
        return cls(AttemptId.from_json(data["attempt"]), request, None if since is None else float(since))


@dataclass(frozen=True, slots=True)
class LaunchInline:
    """Make the HTTP call of an attempt; its request is in the row that the worker claims."""

    purpose: ClassVar[str] = "launch_inline"
    max_age_seconds: ClassVar[float | None] = None

    attempt: AttemptId

    def to_json(self) -> dict[str, Any]:
        return self.attempt.to_json()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(AttemptId.from_json(data))


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop one attempt by its external name."""

    purpose: ClassVar[str] = "stop"
    max_age_seconds: ClassVar[float | None] = _MAX_AGE_SECONDS

    name: str
    grace_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "grace_seconds": self.grace_seconds}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(str(data["name"]), float(data["grace_seconds"]))


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Compare what exists with what SQL expects."""

    purpose: ClassVar[str] = "reconcile"
    max_age_seconds: ClassVar[float | None] = _MAX_AGE_SECONDS

    expectation: Expectation

    def to_json(self) -> dict[str, Any]:
        return {**self.expectation.to_json(), "said_at": broker_clock.time()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        expectation = Expectation.from_json(data)
        if "said_at" not in data:  # by the version before
            return cls(expectation)
        return cls(replace(expectation, age_seconds=max(0.0, broker_clock.time() - float(data["said_at"]))))


@dataclass(frozen=True, slots=True)
class CollectStaging:
    """Delete staging volumes."""

    purpose: ClassVar[str] = "collect_staging"
    max_age_seconds: ClassVar[float | None] = _MAX_AGE_SECONDS

    plan: StagingPlan

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), "said_at": broker_clock.time()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        plan = StagingPlan.from_json(data)
        if plan.age_seconds is None:  # by the version before
            return cls(plan)
        on_its_way = max(0.0, broker_clock.time() - float(data["said_at"]))
        return cls(replace(plan, age_seconds=plan.age_seconds + on_its_way))


@dataclass(frozen=True, slots=True)
class AttemptLaunched:
    """An executor started an attempt."""

    purpose: ClassVar[str] = "launched"
    max_age_seconds: ClassVar[float | None] = None

    report: LaunchReport

    def to_json(self) -> dict[str, Any]:
        return self.report.to_json()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(LaunchReport.from_json(data))


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt ended without its agent saying so, or could not be started.

    ``unclaimed`` limits it to one that no agent has claimed. ``return_value`` is JSON text that the agent could not
    push. ``host`` is the Docker host that says it; empty where an executor has one back end.
    """

    purpose: ClassVar[str] = "ended"
    max_age_seconds: ClassVar[float | None] = None

    attempt: AttemptId
    outcome: Outcome
    unclaimed: bool = False
    return_value: str | None = None
    host: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt.to_json(),
            "outcome": self.outcome.to_json(),
            "unclaimed": self.unclaimed,
            "return_value": self.return_value,
            "host": self.host,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        outcome = Outcome.from_json(data["outcome"])
        if outcome.state not in TERMINAL:
            raise ValueError(f"{outcome.state} is no end of an attempt")
        value = data["return_value"]
        if not isinstance(value, str | None):
            raise TypeError(f"return_value is {type(value).__name__}, not JSON text")
        return cls(
            AttemptId.from_json(data["attempt"]),
            outcome.evolve(log_tail=outcome.log_tail[-_MAX_LOG_TAIL_LINES:]),
            bool(data["unclaimed"]),
            value,
            text_in(data["host"], "host"),
        )


@dataclass(frozen=True, slots=True)
class StagingDeleted:
    """Staging volumes of a back end are gone, name → reason."""

    purpose: ClassVar[str] = "staging_deleted"
    max_age_seconds: ClassVar[float | None] = _MAX_AGE_SECONDS

    back_end: BackEnd
    claims: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"back_end": str(self.back_end), "claims": self.claims}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        claims = {text_in(name, "claim"): text_in(reason, "reason", 64) for name, reason in data["claims"].items()}
        return cls(BackEnd.parse(text_in(data["back_end"], "back_end")), claims)


@dataclass(frozen=True, slots=True)
class Present:
    """A worker holds this back end now."""

    purpose: ClassVar[str] = "present"
    max_age_seconds: ClassVar[float | None] = _MAX_AGE_SECONDS

    back_end: BackEnd

    def to_json(self) -> dict[str, Any]:
        return {"back_end": str(self.back_end)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(BackEnd.parse(text_in(data["back_end"], "back_end")))


@dataclass(frozen=True, slots=True)
class AdvanceTry:
    """Look at a try now: complete it when it has ended, send its next launch when that is due."""

    purpose: ClassVar[str] = "advance"
    max_age_seconds: ClassVar[float | None] = None

    task_instance_id: str
    try_number: int

    def to_json(self) -> dict[str, Any]:
        return {"task_instance_id": self.task_instance_id, "try_number": self.try_number}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        one = AttemptId.from_json(data)
        return cls(one.task_instance_id, one.try_number)


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the try that a Celery id belongs to, queued or running: the try's own id, or that of its dispatch."""

    purpose: ClassVar[str] = "cancel"
    max_age_seconds: ClassVar[float | None] = _MAX_AGE_SECONDS

    celery_id: str

    def to_json(self) -> dict[str, Any]:
        return {"celery_id": self.celery_id}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(text_in(data["celery_id"], "celery_id"))


def seal_request(keys: KeyRing, request: TaskRequest) -> str:
    """A request as it rests in SQL.

    Raises:
        RequestTooLarge: it is too large for a broker message.
    """
    content = b'{"request":%b}' % request.model_dump_json(exclude_defaults=True).encode(errors="surrogatepass")
    check_size(len(content))
    return keys.sealer(Scope.REQUEST).seal_json(content)


def open_request(keys: KeyRing, sealed: str) -> TaskRequest:
    """The request again.

    Raises:
        DecryptionFailed: sealed with a key this process does not have, or by a version whose requests it does not know.
        StoredRequestInvalid: it breaks a rule of this version.
    """
    try:
        return TaskRequest.model_validate(keys.sealer(Scope.REQUEST).open(sealed)["request"], context=SEALED)
    except ValidationError as error:
        text = f"the request was stored by another version and breaks a rule of this one: {invalid_request(error)}"
        raise StoredRequestInvalid(f"{text}; submit it anew, or upgrade the process that reads it") from error
    except (KeyError, ValueError) as error:
        raise DecryptionFailed("a sealed request is not of this version; upgrade the process that reads it") from error


def seal_dag(keys: KeyRing, dag: RunGraph) -> str:
    """A DAG as it rests in SQL beside its run: its tasks' environment and headers may hold secrets."""
    content = b'{"dag":%b}' % dag.model_dump_json(exclude_unset=True).encode(errors="surrogatepass")
    return keys.sealer(Scope.REQUEST).seal_json(content)


def open_dag(keys: KeyRing, sealed: str) -> KeptDag:
    """The DAG again.

    Raises:
        DecryptionFailed: sealed with a key this process does not have, or by a version whose DAGs it does not know.
    """
    try:
        return KeptDag(keys.sealer(Scope.REQUEST).open(sealed)["dag"])
    except (KeyError, ValueError) as error:
        raise DecryptionFailed("a sealed DAG is not of this version; give its dag.json again") from error
