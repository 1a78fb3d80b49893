"""A migrated, empty store over each database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.store import Store
from tests.contract.store.rows import settings_for


@pytest.fixture
def store(migrated_database_url: str, tmp_path: Path) -> Iterator[Store]:
    """Everything durable over one fresh database."""
    made = Store(settings_for(migrated_database_url, tmp_path))
    yield made
    made.close()
