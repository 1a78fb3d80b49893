"""An Engine that is away, hangs or restarts: nothing is concluded from that, and everything goes on afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import TransientLaunchError
from tests.integration.docker.conftest import Docker
from tests.support.images import base_image, require_docker
from tests.support.private_engine import PrivateEngine, private_engine

#: The SDK forgets to close a socket that it could not connect.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(scope="module")
def shared_private() -> Iterator[PrivateEngine]:
    require_docker()  # its image comes from there
    with private_engine() as engine:
        engine.load(base_image())
        yield engine


@pytest.fixture
def private(shared_private: PrivateEngine) -> Iterator[PrivateEngine]:
    yield shared_private
    shared_private.start_if_stopped()


@pytest.fixture
def own(private: PrivateEngine) -> Iterator[Docker]:
    client = private.client()
    system = Docker(client)
    yield system
    private.start_if_stopped()
    system.close()
    client.close()
    gc.collect()  # here, where the warning about it is expected


def away(own: Docker, executor) -> None:
    """Every call says that it may work later, and nothing was reported."""
    launch = own.launch("while-away")
    calls = [
        lambda: executor.host,
        lambda: executor.execute(launch),
        lambda: executor.cancel(launch.name, 1),
        lambda: executor.reconcile(own.expectation(launch, host="h")),
        lambda: executor.collect_staging(StagingPlan(0, {"v": "run_succeeded"})),
    ]
    for call in calls:
        with pytest.raises(TransientLaunchError, match="the Docker Engine does not answer") as caught:
            call()
        assert caught.value.reason == FailureReason.LAUNCH_FAILED
    assert own.reports == []


def test_a_restart_kills_containers_and_their_attempts_are_reported_as_lost(private: PrivateEngine, own: Docker):
    executor = own.executor(url=private.url, network="none")
    launch = own.launch()
    host = executor.host
    own.run_plain(launch, "sleep", "1000", NetworkMode="none", ExtraHosts=[])
    private.stop()
    away(own, executor)
    private.start()
    executor.reconcile(own.expectation(launch, host=host))
    assert own.outcome().reason == FailureReason.CONTAINER_LOST
    assert own.engine.status(launch.name) == "exited"
    assert executor.host == host
    assert executor.execute(own.launch(launch=2)).already is False


def test_a_worker_that_starts_before_its_engine_works_once_that_is_there(private: PrivateEngine, own: Docker):
    private.stop()
    executor = own.executor(url=private.url, network="none")
    away(own, executor)
    private.start()
    assert executor.execute(own.launch()).host == executor.host


def test_an_engine_that_hangs_is_away_after_the_timeout(private: PrivateEngine, own: Docker):
    executor = own.executor(url=private.url, network="none", request_timeout_seconds=2)
    assert executor.host
    private.hang()
    try:
        with pytest.raises(TransientLaunchError, match="does not answer"):
            executor.execute(own.launch())
        with pytest.raises(TransientLaunchError, match="does not answer"):
            executor.reconcile(own.expectation())
    finally:
        private.resume()
    launch = own.launch()
    own.executor(url=private.url, network="none").execute(launch)
    assert own.engine.wait(launch.name)["ExitCode"] == 0
