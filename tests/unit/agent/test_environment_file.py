"""The part of the environment that travels by file is read once and gone."""

from __future__ import annotations

import pytest

from leoflow_celery.agent.config import absorb_environment_file
from leoflow_celery.errors import ConfigurationError

NAME = "LEOFLOW_AGENT_ENV_FILE"


def test_the_variables_are_ours_and_the_file_is_gone(tmp_path):
    path = tmp_path / "environment.json"
    path.write_text('{"LEOFLOW_AGENT_TOKEN": "t", "A": "x\\ny"}')
    environ = {NAME: str(path), "B": "2"}
    absorb_environment_file(environ)
    assert environ == {"LEOFLOW_AGENT_TOKEN": "t", "A": "x\ny", "B": "2"}
    assert not path.exists()


def test_without_the_variable_nothing_happens():
    environ = {"A": "1"}
    absorb_environment_file(environ)
    assert environ == {"A": "1"}


def test_a_second_start_says_why_it_cannot_work(tmp_path):
    with pytest.raises(ConfigurationError, match="read and removed at the first start"):
        absorb_environment_file({NAME: str(tmp_path / "gone")})


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "environment.json"
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="environment"):
        absorb_environment_file({NAME: str(path)})
