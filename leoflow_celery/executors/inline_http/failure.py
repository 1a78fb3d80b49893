"""What a failed attempt of a call means: whether another one may help, and the words for a human.

The texts of ``requests`` and urllib3 repeat the whole URL, so none of them is passed on.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

import requests
import urllib3.exceptions

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.executors.inline_http.errors import AnswerTooLong, CallStopped, RefusedAddress

#: A longer wish of a server is past every deadline.
MAX_RETRY_AFTER_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt of a call that did not succeed. ``text`` adds to the status, or says why there is none.

    ``retry_after_seconds`` is the server's own wish.
    """

    reason: FailureReason
    text: str
    transient: bool
    status: int | None = None
    retry_after_seconds: float = 0.0


def failed_status(status: int, retry_after: str | None) -> FailedAttempt:
    """An answer outside the success codes: 408, 429 and 5xx may pass, anything else is final."""
    transient = status in (408, 429) or 500 <= status <= 599
    wait = retry_after_seconds(retry_after, time.time()) if transient else 0.0
    return FailedAttempt(FailureReason.HTTP_STATUS, "", transient, status, wait)


def give_up(
    failed: FailedAttempt, wait_seconds: float, remaining_seconds: float, deadline_seconds: float, *, is_last: bool
) -> FailedAttempt | None:
    """The failure that ends the call, or None: try again after ``wait_seconds``."""
    if not failed.transient:
        return failed
    if remaining_seconds <= 0:
        text = f"the deadline of {deadline_seconds:g} s has passed"
        return replace(failed, reason=FailureReason.TIMEOUT, text=f"{failed.text}; {text}" if failed.text else text)
    if is_last:
        return failed
    if wait_seconds >= remaining_seconds:
        text = f"another attempt in {wait_seconds:.1f} s would be past the deadline of {deadline_seconds:g} s"
        return replace(failed, text=f"{failed.text}; {text}" if failed.text else text)
    return None


def retry_after_seconds(header: str | None, now: float) -> float:
    """Retry-After as seconds from ``now`` (epoch), in either form of RFC 9110; 0 for none and for nonsense."""
    if not header:
        return 0.0
    if header.strip().isdecimal():
        return min(float(header), MAX_RETRY_AFTER_SECONDS)
    try:
        return min(max(parsedate_to_datetime(header).timestamp() - now, 0.0), MAX_RETRY_AFTER_SECONDS)
    except (ValueError, OverflowError):
        return 0.0


def failed_exchange(error: Exception, host: str, limit_seconds: float) -> FailedAttempt:
    """An attempt that got no (whole) answer. ``limit_seconds`` is the time the attempt had."""
    chain = list(_chain(error))
    for link in chain:
        match link:
            case RefusedAddress():
                return FailedAttempt(FailureReason.HTTP_REFUSED_ADDRESS, str(link), transient=False)
            case CallStopped():
                return FailedAttempt(FailureReason.CANCELLED, "stopped on request", transient=False)
            case AnswerTooLong():
                return _permanent(f"the answer from {host} does not end")
            case ssl.SSLError() if not isinstance(link, ssl.SSLEOFError):
                return _permanent(f"TLS with {host} failed: {_tls_text(link)}")
    if any(isinstance(link, TimeoutError | requests.Timeout | urllib3.exceptions.TimeoutError) for link in chain):
        return _transient(f"no whole answer from {host} within {limit_seconds:.3g} s")
    for link in chain:
        if (text := _connection_text(link)) is not None:
            return _transient(f"{text} ({host})")
    return _other(error, host)


def _other(error: Exception, host: str) -> FailedAttempt:
    match error:
        case requests.exceptions.ContentDecodingError():
            return _permanent(f"the body from {host} does not fit its Content-Encoding")
        case requests.exceptions.TooManyRedirects():
            return _permanent("redirected too often")
        case requests.exceptions.InvalidSchema() | requests.exceptions.InvalidURL():
            return _permanent(f"redirected from {host} to a URL that cannot be called")
        case requests.ConnectionError() | requests.exceptions.ChunkedEncodingError():
            return _transient(f"lost the connection to {host}")
    return _permanent(f"the request to {host} cannot be sent ({type(error).__name__})")


def _connection_text(error: BaseException) -> str | None:
    match error:
        case socket.gaierror():
            return f"cannot resolve the host name: {error.strerror or 'no address'}"
        case http.client.RemoteDisconnected() | ssl.SSLEOFError():
            return "the server closed the connection without an answer"
        case http.client.IncompleteRead() | urllib3.exceptions.IncompleteRead():
            return "the server closed the connection in the middle of its answer"
        case http.client.HTTPException():
            return f"the answer is not HTTP: {type(error).__name__}"
        case OSError(errno=int(number)):
            return f"connection failed: {os.strerror(number)}"
    return None


def _tls_text(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted, {error.verify_message}"
    return (error.reason or "protocol error").replace("_", " ").lower()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything it wraps, each once: urllib3 keeps causes in args, ``reason`` and the chain alike."""
    seen: set[int] = set()
    open_links: list[BaseException] = [error]
    while open_links:
        link = open_links.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        wrapped = (*link.args, getattr(link, "reason", None), link.__cause__, link.__context__)
        open_links += [inner for inner in wrapped if isinstance(inner, BaseException)]


def _transient(text: str) -> FailedAttempt:
    return FailedAttempt(FailureReason.HTTP_ERROR, text, transient=True)


def _permanent(text: str) -> FailedAttempt:
    return FailedAttempt(FailureReason.HTTP_ERROR, text, transient=False)
