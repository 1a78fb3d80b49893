"""The file of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from leoflow_celery.environment import parse_env_file
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import Settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "settings.env"
    monkeypatch.setenv("LEOFLOW_ENV_FILE", str(path))
    # What is read from the file goes with the test.
    for name in ("LEOFLOW_BROKER_URL", "LEOFLOW_JWT_SECRET", "LEOFLOW_XCOM_BACKEND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return path


def test_lines_of_every_usual_form_are_read(file: Path) -> None:
    file.write_text(
        "# a remark\n\nexport LEOFLOW_JWT_SECRET='it is $ecret # all of it'\n"
        'LEOFLOW_BROKER_URL="redis://h/0"\n LEOFLOW_XCOM_BACKEND=redis \nPATH=/nowhere\nLEOFLOW_ENV_FILE=/other\n'
    )
    assert parse_env_file(file) == {
        "LEOFLOW_JWT_SECRET": "it is $ecret # all of it",
        "LEOFLOW_BROKER_URL": "redis://h/0",
        "LEOFLOW_XCOM_BACKEND": "redis",
    }


def test_settings_come_from_the_file_and_the_environment_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("LEOFLOW_BROKER_URL=redis://of-the-file/0\nLEOFLOW_XCOM_BACKEND=redis\n")
    monkeypatch.setenv("LEOFLOW_XCOM_BACKEND", "sql")
    loaded = Settings.load()
    assert (loaded.broker.url, loaded.xcom.backend) == ("redis://of-the-file/0", "sql")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LEOFLOW_JWT_SECRET", r"settings.env: line 1 is not NAME=value"),
        ("\nLEOFLOW_JWT_SECRET='canary", r"settings.env: line 2: a quote is not closed"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_without_its_value(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=said) as refused:
        Settings.load()
    assert "canary" not in str(refused.value)


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"LEOFLOW_ENV_FILE .*settings.env: No such file or directory; name"):
        Settings.load()
