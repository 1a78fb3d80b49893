"""A migrated, empty store over each database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.store import Store
from leoflow_celery.store.migrate import upgrade
from tests.contract.store.rows import settings_for


@pytest.fixture
def store(database_url: str, tmp_path: Path) -> Iterator[Store]:
    """Everything durable over one fresh database."""
    made = Store(settings_for(database_url, tmp_path))
    upgrade(made.database)
    yield made
    made.close()
