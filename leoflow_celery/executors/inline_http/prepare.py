"""From an ``HttpRequest`` to what goes over the wire, and what a redirect makes of it."""

from __future__ import annotations

import json
from urllib.parse import urljoin, urlsplit

import requests
from requests.utils import requote_uri

from leoflow_celery.domain.attempt import AttemptId, celery_task_id
from leoflow_celery.domain.fields import printable
from leoflow_celery.domain.http_call import TemplateError, check_headers, check_url
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import HttpRequest
from leoflow_celery.executors.inline_http.errors import HttpTaskError

REDIRECT_STATUS_CODES = frozenset({301, 302, 303, 307, 308})
#: What another host may see of the task's headers. Any other one may be a credential.
_HEADERS_FOR_OTHER_HOSTS = frozenset(
    {"accept", "accept-encoding", "accept-language", "content-length", "content-type", "idempotency-key", "user-agent"}
)


def idempotency_key(attempt: AttemptId) -> str:
    """The same for all attempts of the call and all launches of the try; the scheduler's next try gets another one."""
    return celery_task_id(attempt.task_instance_id, attempt.try_number)


def describe(request: HttpRequest) -> str:
    """Method, scheme and host for messages; the path, which may hold a token, only when the request says so."""
    try:
        parts = urlsplit(request.url)
    except ValueError:
        return f"{request.method} <not a URL>"
    path = parts.path if request.show_path else ""
    return printable(f"{request.method} {parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}")


def prepare(request: HttpRequest, key: str, user_agent: str) -> requests.PreparedRequest:
    """The request as ``requests`` sends it: body encoded, headers filled in where the task set none.

    Raises:
        HttpTaskError: invalid_spec for a URL, header or body that cannot be sent; never repeats a header's value.
    """
    target = describe(request)
    try:
        body, content_type = _encode(request)
    except ValueError as error:
        raise HttpTaskError(FailureReason.INVALID_SPEC, f"{target}: body is not JSON: {error}") from error
    try:
        check_headers(request.headers)
        check_url(request.url)
    except TemplateError as error:
        raise HttpTaskError(FailureReason.INVALID_SPEC, f"{target}: {error}") from None
    except ValueError:
        raise HttpTaskError(FailureReason.INVALID_SPEC, f"{target}: the url is not valid") from None
    prepared = requests.PreparedRequest()
    try:
        prepared.prepare(method=request.method, url=request.url, headers=request.headers, data=body)
    except (requests.RequestException, UnicodeError, ValueError):
        # The original text repeats the whole URL.
        raise HttpTaskError(FailureReason.INVALID_SPEC, f"{target}: the url is not valid") from None
    for name, value in _default_headers(key, user_agent, content_type):
        prepared.headers.setdefault(name, value)
    return prepared


def _encode(request: HttpRequest) -> tuple[bytes | None, str]:
    match request.body:
        case None:
            return None, ""
        case str() as text:
            return text.encode("utf-8", "surrogatepass"), ""
        case value:
            return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), "application/json"


def _default_headers(key: str, user_agent: str, content_type: str) -> list[tuple[str, str]]:
    defaults = [
        ("User-Agent", user_agent),
        ("Accept", "*/*"),
        ("Accept-Encoding", "gzip, deflate"),
        ("Idempotency-Key", key),
    ]
    return [*defaults, ("Content-Type", content_type)] if content_type else defaults


def redirected(
    rules: requests.Session, prepared: requests.PreparedRequest, response: requests.Response
) -> requests.PreparedRequest | None:
    """The request that follows a redirect, by the rules of ``requests``; None when the answer is no redirect.

    Another host gets no header of the task that could be a credential.

    Raises:
        requests.RequestException: the new URL is none.
    """
    if response.status_code not in REDIRECT_STATUS_CODES:
        return None
    location, old_url = rules.get_redirect_target(response), prepared.url or ""
    if not location:
        return None
    following = prepared.copy()
    new_url = requote_uri(urljoin(old_url, location))
    if urlsplit(new_url).scheme.lower() not in ("http", "https"):
        raise requests.exceptions.InvalidSchema("redirects to an address that is not http or https")
    following.prepare_url(new_url, None)
    rules.rebuild_method(following, response)
    if response.status_code not in (307, 308) and following.method != prepared.method:
        following.body = None
        for name in ("Content-Length", "Content-Type", "Transfer-Encoding"):
            following.headers.pop(name, None)
    following.headers.pop("Host", None)
    if rules.should_strip_auth(old_url, following.url or ""):  # type: ignore[no-untyped-call]
        for name in [name for name in following.headers if name.lower() not in _HEADERS_FOR_OTHER_HOSTS]:
            del following.headers[name]
    return following
