"""The termination log: the outcome an agent leaves behind for whoever started it.

One JSON object of at most 4,096 bytes. It is what makes a success stay a success when the control plane was away at the
end. A kubelet keeps 12 KiB of all containers of a pod together: of six it leaves each 2,048 bytes, the first ones. So
what decides comes first, in a few hundred bytes, and a reader takes what is whole of an object that was cut.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from leoflow_celery.domain.outcome import Outcome, exit_code_of
from leoflow_celery.domain.reasons import parse_reason
from leoflow_celery.domain.states import TERMINAL, TaskState

MAX_BYTES = 4_096
#: What is left of a record in a pod of a dozen containers: what fits is written as it is, a longer value packed.
_SMALL_BYTES = 1_024
#: No value that an agent leaves unpacks to more.
_MAX_VALUE_BYTES = 16 * 1024 * 1024
#: What is text in a record of ours.
_TEXTS = ("attempt", "reason", "message", "return_value", "packed_value")
_KEY = re.compile(r'[{,]\s*"(?P<key>\w+)"\s*:\s*')
_ENDS_VALUE = re.compile(r"\s*[,}]")
_TEXT_START = re.compile(r'"(?P<text>(?:[^"\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*)')


@dataclass(frozen=True, slots=True)
class TerminationRecord:
    """How an attempt ended by its agent's own word.

    ``state`` NONE means that the agent ran nothing (its claim was refused), RUNNING that it holds the claim and has not
    come to an end; see ``ended``. ``claimed`` is False when it ended without ever having held the claim.
    ``return_value`` is JSON text that the control plane does not have yet, ``value_characters`` its length: with that
    and without a value, the record was cut.
    """

    attempt: str
    state: TaskState
    exit_code: int | None = None
    reason: str | None = None
    message: str = ""
    reported: bool = False
    return_value: str | None = None
    claimed: bool = True
    value_characters: int = 0

    @property
    def lost_value(self) -> bool:
        """Whether there was a return value that cannot be read any more."""
        return self.value_characters > 0 and self.return_value is None

    @property
    def ended(self) -> bool:
        """Whether this is an outcome at all."""
        return self.state in TERMINAL

    def outcome(self) -> Outcome:
        """The record as an outcome to report."""
        reason = parse_reason(self.reason) if self.reason or self.state is TaskState.FAILED else None
        message = self.message
        if self.lost_value and self.state is TaskState.SUCCESS:
            message = (
                f"the return value ({self.value_characters} characters) is lost: the gateway was away, and the cluster "
                "keeps less of the termination message; return less, or run fewer containers in the pod"
            )
        return Outcome(self.state, reason, message, self.exit_code)


def encode(record: TerminationRecord) -> bytes:
    """The record as JSON of at most ``MAX_BYTES``: a long message is cut, a return value that does not fit left out.

    What says how the attempt ended comes first. A value that makes the record long is compressed.
    """
    data: dict[str, Any] = {
        "attempt": record.attempt,
        "state": record.state.value,
        "exit_code": record.exit_code,
        "reason": record.reason,
        "reported": record.reported,
    }
    if not record.claimed:
        data["claimed"] = False
    if record.return_value is not None:
        data["value_characters"] = len(record.return_value)
    data["message"] = record.message
    if record.return_value is not None:
        whole = _dump({**data, "return_value": record.return_value})
        if len(whole) > _SMALL_BYTES:
            whole = min(whole, _dump({**data, "packed_value": _pack(record.return_value)}), key=len)
        if len(whole) <= MAX_BYTES:
            return whole
    encoded = _dump(data)
    while len(encoded) > MAX_BYTES and data["message"]:
        data["message"] = data["message"][: -max(1, (len(encoded) - MAX_BYTES) // 6)]
        encoded = _dump(data)
    return encoded


def signed(data: bytes, key: str) -> bytes:
    """A record with a last line that only a holder of the key can make, for where user code can write the file."""
    return data + b"\n" + _signature(data, key)


def verified(data: bytes, keys: Iterable[str]) -> bytes | None:
    """The record again; None when none of the keys signed it."""
    record, _, signature = data.rstrip().rpartition(b"\n")
    return record if any(hmac.compare_digest(_signature(record, key), signature) for key in keys) else None


def _signature(data: bytes, key: str) -> bytes:
    return hmac.new(key.encode(), data, hashlib.sha256).hexdigest().encode()


def fits(record: TerminationRecord) -> bool:
    """Whether the record's return value survives encoding."""
    found = decode(encode(record))
    return found is not None and not found.lost_value


def decode(text: str | bytes) -> TerminationRecord | None:
    """The record in a termination log, or None when there is none (empty, cut too short, another program's text)."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    try:
        data = _object(text)
        if not all(isinstance(data.get(name), str | None) for name in _TEXTS):
            return None
        value, size = data.get("return_value"), data.get("value_characters")
        return TerminationRecord(
            attempt=str(data["attempt"]),
            state=TaskState(data["state"]),
            exit_code=exit_code_of(data.get("exit_code")),
            reason=data.get("reason"),
            message=data.get("message") or "",
            reported=data.get("reported") is True,
            return_value=_unpack(data["packed_value"]) if data.get("packed_value") else value,
            claimed=data.get("claimed") is not False,
            value_characters=size if isinstance(size, int) and 0 < size <= _MAX_VALUE_BYTES else len(value or ""),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _object(text: str) -> dict[str, Any]:
    """The JSON object; of one that was cut, the values that are whole, and as much of its message as is there."""
    try:
        data: dict[str, Any] = json.loads(text)
    except ValueError:
        return dict(_whole_pairs(text.strip()))
    return data


def _whole_pairs(text: str) -> Iterator[tuple[str, Any]]:
    position, decoder = 0, json.JSONDecoder()
    while (found := _KEY.match(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, found.end())
        except ValueError:
            value, position = None, len(text)
        if _ENDS_VALUE.match(text, position):  # what comes right before the cut may go on
            yield found["key"], value
        elif found["key"] == "message" and (rest := _TEXT_START.match(text, found.end())) is not None:
            yield "message", json.loads(f'"{rest["text"]}"', strict=False) + "…"


def _pack(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(errors="surrogatepass"), 9)).decode()


def _unpack(packed: str) -> str | None:
    """The value again; None when it was cut, or is not one that an agent packed."""
    try:
        unpacker = zlib.decompressobj()
        value = unpacker.decompress(base64.b64decode(packed, validate=True), _MAX_VALUE_BYTES)
        return value.decode(errors="surrogatepass") if unpacker.eof else None
    except (binascii.Error, zlib.error, ValueError):
        return None


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
