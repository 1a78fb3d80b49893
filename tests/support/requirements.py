"""Services a test needs. One that is missing skips the test on a desk and fails it where it was promised.

``LEOFLOW_TEST_REQUIRE=docker,kubernetes`` names what must be there.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def required_services() -> frozenset[str]:
    """The services that may not be missing in this run."""
    return frozenset(part.strip() for part in os.environ.get("LEOFLOW_TEST_REQUIRE", "").split(",") if part.strip())


def require(service: str, reason: str) -> NoReturn:
    """Skip the running test because ``service`` is missing, or fail it when the run promised that service.

    Call it once the service was looked for and not found; ``reason`` says what was found instead.
    """
    text = f"needs {service}: {reason}"
    if service in required_services():
        pytest.fail(f"{text} (LEOFLOW_TEST_REQUIRE names it)", pytrace=False)
    pytest.skip(text)
