"""An app in an environment with another Celery than the workers': it sends, and serves no queue."""

from __future__ import annotations

import celery
import kombu.transport
import pytest

from leoflow_celery.app import create_app
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import Settings


@pytest.fixture
def other_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celery, "__version__", "5.6.3")
    aliases = {**kombu.transport.TRANSPORT_ALIASES, "redis": "kombu.transport.redis:Transport"}
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", aliases)


@pytest.mark.usefixtures("other_celery")
def test_what_only_sends_leaves_the_process_as_it_is() -> None:
    app = create_app(settings=Settings())
    assert type(app.amqp).__module__ == "celery.app.amqp"
    assert kombu.transport.TRANSPORT_ALIASES["redis"] == "kombu.transport.redis:Transport"


@pytest.mark.usefixtures("other_celery")
def test_a_worker_says_what_it_needs() -> None:
    with pytest.raises(ConfigurationError, match=r"celery 5\.6\.3, kombu .*; pip install 'leoflow-celery\[worker\]'"):
        create_app("k8s", settings=Settings())
