"""Which broker URLs are taken, and that no word of a wrong one is repeated."""

from __future__ import annotations

import ssl
import traceback
from pathlib import Path

import pytest

from leoflow_celery.app.config import celery_config
from leoflow_celery.broker_url import check_broker_url, redis_address
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
    assert redis_address("redis+socket:///run/r.sock?virtual_host=3").client_url == "unix:///run/r.sock?db=3"
    assert redis_address("rediss://h/0").client_url == "rediss://h/0"


def test_the_query_of_a_tls_url_becomes_options_that_everybody_takes(tmp_path: Path) -> None:
    for name in ("ca file.pem", "c.pem", "k.pem"):
        (tmp_path / name).write_text("")
    files = f"ssl_ca_certs={tmp_path}/ca%20file.pem&ssl_certfile={tmp_path}/c.pem&ssl_keyfile={tmp_path}/k.pem"
    address = redis_address(f"rediss://u:p%3Fw@h:6380/2?{files}")
    assert address.url == "rediss://u:p%3Fw@h:6380/2"
    assert address.tls == {
        "ssl_ca_certs": f"{tmp_path}/ca file.pem",
        "ssl_certfile": f"{tmp_path}/c.pem",
        "ssl_keyfile": f"{tmp_path}/k.pem",
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": True,
    }


@pytest.mark.parametrize(
    ("query", "needed", "checks_host"),
    [
        ("", ssl.CERT_REQUIRED, True),
        ("?ssl_cert_reqs=CERT_REQUIRED", ssl.CERT_REQUIRED, True),
        ("?ssl_cert_reqs=optional&ssl_check_hostname=False", ssl.CERT_OPTIONAL, False),
        ("?ssl_cert_reqs=none", ssl.CERT_NONE, False),
    ],
)
def test_a_certificate_is_checked_unless_the_url_says_otherwise(
    query: str, needed: ssl.VerifyMode, checks_host: bool
) -> None:
    url = check_broker_url(f"rediss://h/0{query}")
    assert redis_address(url).tls == {"ssl_cert_reqs": needed, "ssl_check_hostname": checks_host}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("ssl_cert_reqs=canary", "ssl_cert_reqs"),
        ("ssl_check_hostname=canary", "ssl_check_hostname"),
        ("ssl_keyfile=/canary", "without its ssl_certfile"),
        ("ssl_ca_certs=", "without a path"),
        ("ssl_canary=1", "has a query that it cannot have"),
    ],
)
def test_a_wrong_option_of_tls_is_named(query: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        check_broker_url(f"rediss://h/0?{query}")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("variable", ["LEOFLOW_BROKER_URL", "LEOFLOW_BROKER_RESULT_URL"])
def test_a_file_that_is_not_there_is_named_before_anybody_connects(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "rediss://:canary@h/0?ssl_ca_certs=/nowhere/ca.pem")
    with pytest.raises(ConfigurationError, match=f"^{variable}: ssl_ca_certs names /nowhere/ca.pem") as caught:
        celery_config(Settings.load())
    assert "canary" not in str(caught.value)
