"""The broker and the result backend behind TLS, which asks for a certificate of the client too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.cli.doctor import check_broker
from leoflow_celery.domain.states import TaskState
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.tcp_proxy import TcpProxy
from tests.support.tls import ServerFiles, make_server_files


@pytest.fixture
def files(tmp_path: Path) -> ServerFiles:
    return make_server_files(tmp_path, "127.0.0.1")


@pytest.fixture
def encrypted(redis_server: RedisServer, files: ServerFiles) -> Iterator[TcpProxy]:
    """A port that speaks TLS only, to those who have a certificate of the authority, with a Redis behind it."""
    with TcpProxy(("127.0.0.1", redis_server.port), speaks=files.server_context(wants_client=True)) as proxy:
        yield proxy


def url(proxy: TcpProxy, database: int, *query: str) -> str:
    return f"rediss://127.0.0.1:{proxy.port}/{database}?{'&'.join(query)}"


def test_a_system_whose_redis_speaks_tls_only_works_like_another(
    tmp_path: Path, encrypted: TcpProxy, files: ServerFiles, target: HttpTarget
) -> None:
    options = (f"ssl_ca_certs={files.ca}", f"ssl_certfile={files.cert}", f"ssl_keyfile={files.key}")
    # The result backend names what Celery wants named, the broker does not.
    results = url(encrypted, 1, *options, "ssl_cert_reqs=required")
    with System(
        tmp_path,
        url(encrypted, 0, *options),
        BROKER_RESULT_URL=results,
        XCOM_BACKEND="redis",
        XCOM_REDIS_URL=url(encrypted, 2, *options),
        # The end of a task is told by the gateway, not found by a sweep.
        MAINTENANCE_INTERVAL_SECONDS=3600,
        MAINTENANCE_STAGING_INTERVAL_SECONDS=1,
    ) as system:
        found = check_broker(system.settings)
        assert found.ok, found.sentence
        system.start_gateway()
        system.start_workers("workers.subprocess", "workers.inline", "workers.control")
        system.start_beat()
        client = system.client
        code = {"operator": "python", "entrypoint": "dag:rows", "source": "def rows():\n    return [1, 2]\n"}
        rows = client.submit({**http_task("http://unused/"), "http_request": None, **code})
        call = client.submit(http_task(target.url("call")))
        assert rows.get(timeout=60) == [1, 2]
        call.get(timeout=60)
        for handle in (rows, call):
            assert handle.state() is TaskState.SUCCESS
        assert client.xcom("d", "r", rows.task_instance().task_id) == [1, 2]
        control = system.process("workers.control")
        control.wait_for_line("leoflow.maintenance.collect_staging.* succeeded", 60)
        assert "Traceback" not in system.output()


@pytest.mark.parametrize(
    ("broker", "results", "said"),
    [
        ((), None, "certificate verify failed"),
        (("ssl_cert_reqs=none",), None, ""),  # no certificate of ours; how that is said depends on the moment
        (("ca", "client"), (), "certificate verify failed"),
    ],
    ids=["authority unknown", "no certificate of ours", "the result backend's authority unknown"],
)
def test_doctor_says_what_a_worker_would_not_have(
    tmp_path: Path,
    encrypted: TcpProxy,
    files: ServerFiles,
    broker: tuple[str, ...],
    results: tuple[str, ...] | None,
    said: str,
) -> None:
    own = {"ca": f"ssl_ca_certs={files.ca}", "client": f"ssl_certfile={files.cert}&ssl_keyfile={files.key}"}
    wrong_results = "" if results is None else url(encrypted, 1, *results)
    broker_url = url(encrypted, 0, *(own.get(one, one) for one in broker))
    with System(tmp_path, broker_url, BROKER_RESULT_URL=wrong_results) as system:
        found = check_broker(system.settings)
    assert not found.ok
    assert said in found.sentence
    assert ("LEOFLOW_BROKER_URL" if results is None else "LEOFLOW_BROKER_RESULT_URL") in found.sentence
