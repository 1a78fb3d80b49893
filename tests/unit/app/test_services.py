"""One services object per app and process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery

from leoflow_celery.app import LeoflowCelery, create_app
from leoflow_celery.client import Client
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import Settings
from leoflow_celery.tasks.context import services_of


class Part:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def app() -> Iterator[LeoflowCelery]:
    with create_app(settings=Settings()) as made:
        yield made


def test_all_threads_get_the_same(app: LeoflowCelery) -> None:
    asked = threading.Barrier(8)

    def ask(_: int) -> object:
        asked.wait(5)
        return services_of(app)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {app.services}


def test_apps_share_nothing(app: LeoflowCelery) -> None:
    with create_app(settings=Settings()) as other:
        assert other.services is not app.services


def test_a_forked_child_builds_its_own_and_leaves_its_parents_alone(app: LeoflowCelery) -> None:
    before, part = app.services, app.services.part(Part, Part)
    child = os.fork()
    if child == 0:
        is_new = app.services is not before and app.services.part(Part, Part) is not part
        app.close_services()
        os._exit(0 if is_new and not part.closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert app.services is before


def test_a_child_that_never_asked_closes_nothing(app: LeoflowCelery) -> None:
    part = app.services.part(Part, Part)
    child = os.fork()
    if child == 0:
        app.close_services()
        os._exit(part.closed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_closing_the_app_closes_them_once(app: LeoflowCelery) -> None:
    part = app.services.part(Part, Part)
    assert app.services.part(Part, Part) is part
    app.close()
    app.close()
    assert part.closed == 1


def test_one_that_was_closed_is_built_again(app: LeoflowCelery) -> None:
    """A task that outlives its worker's end still records what it did."""
    before = app.services
    app.close_services()
    assert app.services is not before


def test_a_client_closes_the_app_that_it_made_and_no_other(app: LeoflowCelery) -> None:
    part = app.services.part(Part, Part)
    with Client(app=app) as client:
        assert client.services is app.services
        assert client.settings is app.settings
    assert part.closed == 0
    with Client(Settings()) as client:
        own = client.services.part(Part, Part)
    assert own.closed == 1


def test_a_strangers_app_has_none() -> None:
    with (
        Celery("theirs", set_as_current=False) as theirs,
        pytest.raises(ConfigurationError, match=r"'theirs'.*create_app"),
    ):
        services_of(theirs)
