from __future__ import annotations

import subprocess
import sys

import pytest

from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.executors import registry
from leoflow_celery.settings import Settings
from leoflow_celery.testing.stub import ScriptedExecutor

BACK_END = "def create(settings, reporter, _observer):\n    return settings, reporter\n"


def report(attempt, outcome):
    raise AssertionError("nothing was started")


def install(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.BACK_ENDS, ExecutorType.DOCKER, name)


def test_a_back_end_gets_settings_and_reporter(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "fine_back_end", BACK_END)
    settings = Settings()
    assert registry.create_executor(ExecutorType.DOCKER, settings, report) == (settings, report)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "needy_back_end", "import a_client_nobody_has\n")
    with pytest.raises(ConfigurationError, match=r"'a_client_nobody_has': pip install 'leoflow-celery\[docker\]'"):
        registry.create_executor(ExecutorType.DOCKER, Settings(), report)


def test_our_own_broken_import_is_not_hidden(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "broken_back_end", "import leoflow_celery.executors.nothing_here\n")
    with pytest.raises(ModuleNotFoundError):
        registry.create_executor(ExecutorType.DOCKER, Settings(), report)


def test_a_type_without_back_end_says_which_there_are(monkeypatch):
    monkeypatch.delitem(registry.BACK_ENDS, ExecutorType.KUBERNETES, raising=False)
    with pytest.raises(ConfigurationError, match=r"the kubernetes executor is not part of this version.*subprocess"):
        registry.create_executor(ExecutorType.KUBERNETES, Settings(), report)


def test_inline_is_none():
    with pytest.raises(ConfigurationError, match="inline executor starts nothing"):
        registry.create_executor(ExecutorType.INLINE, Settings(), report)


def test_importing_the_registry_imports_no_back_end():
    code = (
        "import sys, leoflow_celery.executors.registry as r\n"
        "assert not set(sys.modules) & {*r.BACK_ENDS.values(), 'requests', 'docker', 'kubernetes', 'grpc', 'celery'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stub_is_an_executor():
    from leoflow_celery.executors.base import Executor

    executor: Executor = ScriptedExecutor()
    executor.close()
