"""Which broker URLs are taken, and that no word of a wrong one is repeated."""

from __future__ import annotations

import traceback

import pytest

from leoflow_celery.broker_url import check_broker_url, redis_url
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import Settings


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://h",
        "redis://h/",
        "redis://:p%23w@h:6379/0",
        "redis://u:a@b@[::1]:6379/15",
        "rediss://h/0?ssl_cert_reqs=required&ssl_ca_certs=%2Fca.pem",
        "redis+socket:///run/redis.sock",
        "redis+socket:///run/redis.sock?virtual_host=3",
    ],
)
def test_what_reaches_a_redis_is_taken_as_it_is(url: str) -> None:
    assert check_broker_url(url) == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must begin with redis://"),
        ("canary", "must begin with redis://"),
        ("canary:6379", "must begin with redis://"),
        ("amqp://u:canary@h//", "must begin with redis://"),
        ("redis://:canary#1@h:6379/0", "write # / ? "),
        ("redis://:6379#canary@h/0", "write # / ? "),
        ("redis://:canary/1@h:6379/0", "write # / ? "),
        ("redis://:canary?1@h:6379/0", "write # / ? "),
        ("redis://:1?canary@h:6379/0", "as %3F"),
        ("redis://:[canary@h/0", "write # / ? "),
        ("redis://canary:port/0", "is not a URL like"),
        ("redis://canary:99999/0", "is not a URL like"),
        ("redis://[::1/canary", "is not a URL like"),
        ("redis://h/canary", "is not a URL like"),
        ("redis://h/0?canary=1", "has a query that it cannot have"),
        ("redis+socket://canary.sock", "is not a URL like"),
        ("redis+socket:///canary#.sock", "is not a URL like"),
    ],
)
def test_a_wrong_one_names_the_variable_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    monkeypatch.setenv("LEOFLOW_BROKER_URL", url)
    with pytest.raises(ConfigurationError, match=r"^LEOFLOW_BROKER_URL: ") as caught:
        Settings.load()
    assert said in str(caught.value)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_the_client_is_told_of_a_socket_and_its_database_in_its_own_words() -> None:
    assert redis_url("redis+socket:///run/r.sock?virtual_host=3") == "unix:///run/r.sock?db=3"
    assert redis_url("rediss://h/0") == "rediss://h/0"
