"""What was checked at the door and sealed since is not checked at a cost again by whoever reads it."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.fernet import Fernet

from leoflow_celery.domain import schema
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest, parse_request
from leoflow_celery.errors import Unavailable
from leoflow_celery.queueing.messages import Launch, open_message, open_request, seal_message, seal_request
from leoflow_celery.security import KeyRing

REQUEST: dict[str, Any] = {
    "task_instance_id": "ti-1",
    "dag_id": "sales",
    "run_id": "r1",
    "task_id": "load",
    "operator": "bash",
    "entrypoint": "true",
    "xcom_schema": {"type": "integer"},
}


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing(Fernet.generate_key().decode())


def test_the_schema_of_a_sealed_request_is_not_compiled_again(keys: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the slow schemas of one tenant hold every thread that reads requests, for all tenants."""
    request = parse_request(REQUEST)
    row, message = seal_request(keys, request), seal_message(keys, "k8s", Launch(AttemptId("ti-1", 1), request))

    def busy() -> Any:
        raise Unavailable("a schema is compiled")

    monkeypatch.setattr(schema, "_engine", busy)
    assert open_request(keys, row) == request
    assert open_message(keys, "k8s", Launch, message).request == request
    with pytest.raises(Unavailable):
        TaskRequest.model_validate({**REQUEST, "xcom_schema": {"type": "integer", "title": "another one"}})
