"""What LEOFLOW_BROKER_URL and its siblings may be: one Redis. Every connection of ours to Redis is made of it here.

Celery, kombu and redis-py each read the query of a ``rediss://`` URL in a way of their own, and Celery wants names that
the others do not need. So the query is read once, and all of them are handed the same options of redis-py.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import AfterValidator

from leoflow_celery.errors import ConfigurationError

#: Files in PEM form that the query of a rediss:// URL may name.
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CERT_REQS = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
#: Celery's names of the same.
_CERT_REQS |= {f"CERT_{name.upper()}": value for name, value in _CERT_REQS.items()}
_CHECK_HOSTNAME = {"true": True, "false": False}
_TLS = frozenset((*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname"))
#: Scheme → names that its query may hold.
_QUERY_OF = {"redis": frozenset[str](), "rediss": _TLS, "redis+socket": frozenset(("virtual_host",))}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is, and how it is spoken to.

    ``url`` is Celery's spelling, without what ``tls`` says. ``tls`` are options of redis-py, which Celery takes as
    ``broker_use_ssl`` and ``redis_backend_use_ssl``; empty without TLS.
    """

    url: str
    tls: dict[str, Any] = field(default_factory=dict)

    @property
    def client_url(self) -> str:
        """``url`` as redis-py spells it: the socket of a URL, and its database, have other names in Celery."""
        return self.url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=", 1)


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
    query = _query(parts)
    if query.keys() - _QUERY_OF[scheme]:
        raise ValueError(
            f"has a query that it cannot have; rediss:// takes {', '.join(sorted(_TLS))}, redis+socket:// "
            "virtual_host, and a ? in a password or path is written as %3F"
        )
    if scheme == "rediss":
        _check_tls(query)
    return url


def _names_a_database(parts: SplitResult) -> bool:
    return parts.port != 0 and re.fullmatch(r"/?|/\d+", parts.path) is not None


def _names_a_socket(parts: SplitResult) -> bool:
    return not parts.netloc and len(parts.path) > 1


def _query(parts: SplitResult) -> dict[str, str]:
    return dict(parse_qsl(parts.query, keep_blank_values=True))


def _check_tls(query: dict[str, str]) -> None:
    if query.get("ssl_cert_reqs", "required") not in _CERT_REQS:
        raise ValueError("has an ssl_cert_reqs that is not required, optional or none")
    if query.get("ssl_check_hostname", "true").lower() not in _CHECK_HOSTNAME:
        raise ValueError("has an ssl_check_hostname that is not true or false")
    if bool(query.get("ssl_keyfile")) and not query.get("ssl_certfile"):
        raise ValueError("has an ssl_keyfile without its ssl_certfile; name both files, or none")
    if any(name in query and not query[name] for name in _TLS_FILES):
        raise ValueError(f"has one of {', '.join(_TLS_FILES)} without a path; name the file, or leave it out")


def _check_optional_url(url: str) -> str:
    return url and check_broker_url(url)


BrokerUrl = Annotated[str, AfterValidator(check_broker_url)]
#: Empty: another URL is meant.
OptionalBrokerUrl = Annotated[str, AfterValidator(_check_optional_url)]


def redis_address(url: str, variable: str = "LEOFLOW_BROKER_URL") -> RedisAddress:
    """A URL that ``check_broker_url`` took, taken apart. ``variable`` is where it came from.

    A rediss:// URL that says nothing else wants a certificate of the system's authorities, for the host it names.

    Raises:
        ConfigurationError: a file that it names cannot be read; names the variable, the option and the file.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return RedisAddress(url)
    query = _query(parts)
    needed = _CERT_REQS[query.get("ssl_cert_reqs", "required")]
    named = query.get("ssl_check_hostname", "true").lower()
    tls: dict[str, Any] = {name: _readable(query[name], name, variable) for name in _TLS_FILES if name in query}
    tls["ssl_cert_reqs"] = needed
    tls["ssl_check_hostname"] = _CHECK_HOSTNAME[named] and needed is not ssl.CERT_NONE
    return RedisAddress(url.partition("?")[0], tls)


def _readable(path: str, name: str, variable: str) -> str:
    try:
        with open(path, "rb"):
            return os.path.abspath(path)  # a worker may change its directory
    except OSError as error:
        raise ConfigurationError(f"{variable}: {name} names {path}, which cannot be read: {error.strerror}") from error
