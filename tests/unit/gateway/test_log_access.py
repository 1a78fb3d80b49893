"""Who may write to a log, as a table."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TaskState
from leoflow_celery.gateway.log_access import Access, log_access
from leoflow_celery.store.claims import Claim

NOW = 1_000.0
ATTEMPT = AttemptId("ti", 1, 2)


def claim(holder: str | None, lease_until: float | None = NOW + 60, launch: int = 2, state: str = "running") -> Claim:
    return Claim(AttemptId("ti", 1, launch), TaskState(state), holder, lease_until)


@pytest.mark.parametrize(
    ("found", "holder", "expected"),
    [
        (claim("me"), "me", Access.GRANTED),
        (claim("me", NOW - 1), "me", Access.GRANTED),
        (claim("me", state="failed"), "me", Access.GRANTED),
        (claim("other"), "me", Access.REFUSED),
        (claim("other"), "", Access.REFUSED),
        (claim("other", NOW - 1), "me", Access.WAIT),
        (claim(None, None), "me", Access.WAIT),
        (claim(None, None), "", Access.WAIT),
        (None, "me", Access.WAIT),
        (claim("me", launch=3), "me", Access.REFUSED),
        (claim("me", launch=1), "me", Access.WAIT),
    ],
)
def test_access(found: Claim | None, holder: str, expected: Access) -> None:
    assert log_access(found, ATTEMPT, holder, NOW) is expected
