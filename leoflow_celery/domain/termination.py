"""The termination log: the outcome an agent leaves behind for whoever started it.

One JSON object of at most 4,096 bytes (Kubernetes cuts there). It is what makes a success stay a success when the
control plane was away at the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from leoflow_celery.domain.outcome import Outcome, exit_code_of
from leoflow_celery.domain.reasons import parse_reason
from leoflow_celery.domain.states import TERMINAL, TaskState

MAX_BYTES = 4_096
#: What is text in a record of ours.
_TEXTS = ("attempt", "reason", "message", "return_value")


@dataclass(frozen=True, slots=True)
class TerminationRecord:
    """How an attempt ended by its agent's own word.

    ``state`` NONE means that the agent ran nothing (its claim was refused), RUNNING that it holds the claim and has not
    come to an end; see ``ended``. ``claimed`` is False when it ended without ever having held the claim.
    ``return_value`` is JSON text that the control plane does not have yet.
    """

    attempt: str
    state: TaskState
    exit_code: int | None = None
    reason: str | None = None
    message: str = ""
    reported: bool = False
    return_value: str | None = None
    claimed: bool = True

    @property
    def ended(self) -> bool:
        """Whether this is an outcome at all."""
        return self.state in TERMINAL

    def outcome(self) -> Outcome:
        """The record as an outcome to report."""
        reason = parse_reason(self.reason) if self.reason or self.state is TaskState.FAILED else None
        return Outcome(self.state, reason, self.message, self.exit_code)


def encode(record: TerminationRecord) -> bytes:
    """The record as JSON of at most ``MAX_BYTES``: a long message is cut, a return value that does not fit left out."""
    data: dict[str, Any] = {
        "attempt": record.attempt,
        "state": record.state.value,
        "exit_code": record.exit_code,
        "reason": record.reason,
        "message": record.message,
        "reported": record.reported,
    }
    if not record.claimed:
        data["claimed"] = False
    if record.return_value is not None:
        whole = _dump({**data, "return_value": record.return_value})
        if len(whole) <= MAX_BYTES:
            return whole
    encoded = _dump(data)
    while len(encoded) > MAX_BYTES and data["message"]:
        data["message"] = data["message"][: -max(1, (len(encoded) - MAX_BYTES) // 6)]
        encoded = _dump(data)
    return encoded


def fits(record: TerminationRecord) -> bool:
    """Whether the record's return value survives encoding."""
    return record.return_value is None or b'"return_value"' in encode(record)


def decode(text: str | bytes) -> TerminationRecord | None:
    """The record in a termination log, or None when there is none (empty, cut short, another program's text)."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    try:
        data = json.loads(text)
        if not all(isinstance(data.get(name), str | None) for name in _TEXTS):
            return None
        return TerminationRecord(
            attempt=str(data["attempt"]),
            state=TaskState(data["state"]),
            exit_code=exit_code_of(data.get("exit_code")),
            reason=data.get("reason"),
            message=data.get("message") or "",
            reported=data.get("reported") is True,
            return_value=data.get("return_value"),
            claimed=data.get("claimed") is not False,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
