"""Flower takes our columns and our app as the current one, and every word of its user before ours."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import sys
sys.argv = ["celery", "-A", "leoflow_celery.app", *sys.argv[1:]]
import celery.bin.celery, flower.command
from tornado.options import options
from celery import current_app
from leoflow_celery.app import app
flower.command.apply_env_options()
print(options.tasks_columns, current_app._get_current_object() is app)
"""


@pytest.mark.parametrize(
    ("words", "env", "printed"),
    [
        (("flower",), {}, "name,state,result,started,runtime,worker,kwargs,uuid True"),
        (("flower",), {"FLOWER_TASKS_COLUMNS": "uuid,name"}, "uuid,name True"),
        (("control", "ping"), {}, "name,uuid,state,received,runtime,worker False"),
    ],
)
def test_defaults_are_set_in_flowers_process_only(words: tuple[str, ...], env: dict[str, str], printed: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _CODE, *words], capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert result.stdout.strip() == printed, result.stderr
