"""What only the Redis back end has: keys others can read, expiry by the server, addresses and sockets."""

from __future__ import annotations

import pytest
import redis

from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import ConfigurationError, DatabaseUnavailable
from leoflow_celery.settings import BrokerSettings, Settings, XComSettings
from leoflow_celery.store.xcom.redis import RedisXComStore
from tests.support.ports import free_port

KEY = XComKey("default", "sales", "manual:1", "extract", "rows")
PASSWORD = "correct-horse-battery"


def test_the_documented_key_expires_with_the_setting(redis_url: str) -> None:
    settings = Settings(broker=BrokerSettings(key_prefix="p:"), xcom=XComSettings(ttl_seconds=700))
    RedisXComStore(redis_url, settings).put([(KEY, XComValue(b"1"))])
    client = redis.Redis.from_url(redis_url)
    assert client.hget("p:xcom:default:sales:manual:1:extract:rows", "value") == b"1"
    lifetimes = {client.ttl(name) for name in client.scan_iter(match="p:*")}
    client.close()
    assert lifetimes <= {699, 700}


def test_an_expired_value_leaves_the_rest_of_its_run(redis_url: str) -> None:
    settings = Settings(broker=BrokerSettings(key_prefix="q:"))
    store = RedisXComStore(redis_url, settings)
    other = XComKey("default", "sales", "manual:1", "load", "rows")
    store.put([(KEY, XComValue(b"1")), (other, XComValue(b"2"))])
    client = redis.Redis.from_url(redis_url)
    client.delete("q:" + KEY.redis_key())
    client.close()
    assert [key for key, _ in store.of_run("default", "sales", "manual:1")] == [other]


def test_a_server_that_is_away_is_named_without_its_password() -> None:
    port = free_port()
    store = RedisXComStore(f"redis://leo:{PASSWORD}@127.0.0.1:{port}/0", Settings())
    for call in (lambda: store.get(KEY), lambda: store.put([(KEY, XComValue(b"1"))])):
        with pytest.raises(DatabaseUnavailable) as away:
            call()
        assert f"127.0.0.1:{port}" in str(away.value)
        assert PASSWORD not in str(away.value)


def test_a_url_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEOFLOW_XCOM_REDIS_URL", f"http://:{PASSWORD}@nowhere")
    with pytest.raises(ConfigurationError, match="LEOFLOW_XCOM_REDIS_URL") as wrong:
        Settings.load()
    assert PASSWORD not in str(wrong.value)


def test_celerys_spelling_of_a_socket_is_understood(tmp_path) -> None:
    store = RedisXComStore(f"redis+socket://{tmp_path}/no.sock?virtual_host=3", Settings())
    with pytest.raises(DatabaseUnavailable, match=r"no\.sock"):
        store.get(KEY)
