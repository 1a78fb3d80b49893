"""The database URL: what is taken, what is refused with the variable's name, and what is never shown."""

from __future__ import annotations

import builtins
import sys

import pytest

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import DatabaseSettings
from leoflow_celery.store.database import Database, batched, parse_url


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_spelling_of_postgresql_uses_one_driver(scheme: str) -> None:
    assert parse_url(f"{scheme}://u:p@h/db").drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "text", ["", "no url", "postgresql://h:port/db", "mysql://u:topsecret@h/db", "sqlite://", "sqlite:///:memory:"]
)
def test_what_cannot_work_names_the_variable(text: str) -> None:
    with pytest.raises(ConfigurationError, match="LEOFLOW_DATABASE_URL") as error:
        parse_url(text)
    assert "topsecret" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://leo:topsecret@db.example/leoflow",
        "postgresql://db.example/leoflow?user=leo&password=topsecret",
        "postgresql://db.example/leoflow?sslkey=k&sslpassword=topsecret",
    ],
)
def test_the_address_shows_the_host_and_no_password(text: str) -> None:
    database = Database(DatabaseSettings(url=text))
    database.close()
    assert "db.example" in database.address
    assert "topsecret" not in database.address


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_psycopg(name: str, *arguments: object, **more: object) -> object:
        if name.split(".")[0] == "psycopg":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)  # type: ignore[arg-type]

    for name in [name for name in sys.modules if name.split(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_psycopg)
    with pytest.raises(ConfigurationError, match=r"leoflow-celery\[postgres\]"):
        Database(DatabaseSettings(url="postgresql://h/db"))


def test_batched() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched([], 2)) == []
