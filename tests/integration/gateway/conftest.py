"""Worlds with a gateway: over both databases, or over SQLite for what does not depend on SQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateway.harness import World, settings_for
from tests.support.postgres_databases import migrate


@pytest.fixture
def world(migrated_database_url: str, tmp_path: Path) -> Iterator[World]:
    """A running gateway, once over each database."""
    made = World(settings_for(migrated_database_url, tmp_path))
    made.start()
    yield made
    made.close()


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Running gateways over one SQLite file, with gateway settings of the test's choice."""
    made: list[World] = []
    url = f"sqlite:///{tmp_path / 'leoflow.db'}"
    migrate(url)

    def make(**gateway: Any) -> World:
        world = World(settings_for(url, tmp_path, **gateway))
        made.append(world)
        world.start()
        return world

    yield make
    for world in made:
        world.close()


@pytest.fixture
def sqlite_world(make_world: Callable[..., World]) -> World:
    """A running gateway over SQLite."""
    return make_world()
