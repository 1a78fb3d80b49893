"""What LEOFLOW_BROKER_URL may be: one Redis. Depths of queues and locks are asked of it directly."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import AfterValidator

#: Scheme → names that its query may hold.
_QUERY_OF = {"redis": "", "rediss": r"ssl_[a-z_]+", "redis+socket": "virtual_host"}


def check_broker_url(url: str) -> str:
    """The URL itself.

    Raises:
        ValueError: says what is wrong and never repeats the URL, which may hold a password.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _QUERY_OF:
        raise ValueError("must begin with redis://, rediss:// or redis+socket://; there is no other broker")
    try:
        parts = urlsplit(url)
        is_right = _names_a_socket(parts) if scheme == "redis+socket" else _names_a_database(parts)
    except ValueError:
        is_right = False
    if not is_right or "#" in url:
        raise ValueError(
            "is not a URL like redis://:PASSWORD@HOST:PORT/NUMBER or redis+socket:///PATH; "
            "write # / ? [ ] in a password or path as %23 %2F %3F %5B %5D"
        )
    if not all(re.fullmatch(_QUERY_OF[scheme], name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError(
            "has a query that it cannot have; rediss:// takes ssl_ca_certs and its like, redis+socket:// virtual_host, "
            "and a ? in a password or path is written as %3F"
        )
    return url


def _names_a_database(parts: SplitResult) -> bool:
    return parts.port != 0 and re.fullmatch(r"/?|/\d+", parts.path) is not None


def _names_a_socket(parts: SplitResult) -> bool:
    return not parts.netloc and len(parts.path) > 1


BrokerUrl = Annotated[str, AfterValidator(check_broker_url)]


def redis_url(broker_url: str) -> str:
    """The same as redis-py spells it: the socket of a URL, and its database, have other names in Celery."""
    return broker_url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=", 1)
