"""What a successful call leaves: the answer, and the JSON that becomes the task's return_value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from email.message import Message
from typing import NoReturn

from leoflow_celery.errors import XComRejected


@dataclass(frozen=True, slots=True)
class HttpResult:
    """The accepted answer of an http_api task.

    ``target`` is method and URL without userinfo, query and fragment, which may hold secrets. ``truncated``: the body
    was longer than LEOFLOW_INLINE_HTTP_MAX_RESPONSE_BYTES and is cut there.
    """

    status_code: int
    body: bytes
    content_type: str
    truncated: bool
    http_attempts: int
    elapsed_seconds: float
    target: str = ""

    @property
    def summary(self) -> str:
        """One line for the task log, without any secret."""
        size = f"more than {len(self.body)}" if self.truncated else str(len(self.body))
        return (
            f"{self.target} answered {self.status_code} after {count_attempts(self.http_attempts)} "
            f"in {self.elapsed_seconds:.2f} s, {size} bytes"
        )

    def return_value(self) -> bytes | None:
        """The JSON that becomes the XCom: a JSON body as it is, other text as a JSON string, nothing for no body.

        Raises:
            XComRejected: payload_too_large for a body that was cut, which is not the task's result. A defect of our own
                is invalid_xcom: whatever happens after the answer, the call was made and is not made again.
        """
        if self.truncated:
            raise XComRejected(
                "payload_too_large",
                f"{self.target}: the response has more than {len(self.body)} bytes "
                "(LEOFLOW_INLINE_HTTP_MAX_RESPONSE_BYTES), too many for a return_value",
            )
        try:
            return json_of(self.body, self.content_type)
        except Exception as error:
            text = f"{self.target}: the response cannot become a return_value ({type(error).__name__})"
            raise XComRejected("invalid_xcom", text) from error


def count_attempts(number: int) -> str:
    """1 attempt, 2 attempts."""
    return "1 attempt" if number == 1 else f"{number} attempts"


def json_of(body: bytes, content_type: str) -> bytes | None:
    """The body as JSON in UTF-8.

    A scalar of a text type stays text: an order id must not change its type on the day it has digits only.
    """
    if not body:
        return None
    mime = content_type.partition(";")[0].strip().lower()
    text = _decode(body, content_type)
    if not mime.startswith("text/") or text.lstrip()[:1] in ("{", "["):
        try:
            json.loads(text, parse_constant=_refuse_constant)
            return text.encode()
        except (ValueError, RecursionError):
            pass
    return json.dumps(text, ensure_ascii=False).encode()


def _decode(body: bytes, content_type: str) -> str:
    """The body as text that UTF-8 takes, whatever the server calls a charset; one that is none reads as UTF-8."""
    header = Message()
    if "charset" in content_type.lower():
        header["Content-Type"] = content_type
    try:
        charset = header.get_content_charset("utf-8")
        text = body.decode("utf-8-sig" if charset == "utf-8" else charset, "replace")
    except (LookupError, ValueError):
        text = body.decode("utf-8-sig", "replace")
    return text.encode(errors="replace").decode()  # UTF-7 and Python's escapes can say half a surrogate pair


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
