"""A credential plugin that hangs holds nobody up, and is ended."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from leoflow_celery.errors import TransientLaunchError
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.connection import Connection
from leoflow_celery.executors.kubernetes.errors import Unreachable
from leoflow_celery.settings import KubernetesSettings
from tests.support.waiting import wait_until

#: Says its process id, and hangs in a child of its own as long as the file says so.
PLUGIN = """#!/bin/sh
echo $$ >> "{pids}"
if [ -e "{hangs}" ]; then sleep 300; fi
echo '{{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
 "status": {{"token": "t0ken", "expirationTimestamp": "2001-01-01T00:00:00Z"}}}}'
"""


class Plugin:
    def __init__(self, directory: Path) -> None:
        self.pids, self.hangs = directory / "pids", directory / "hangs"
        script = directory / "plugin"
        script.write_text(PLUGIN.format(pids=self.pids, hangs=self.hangs))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(script)}}
        self.kubeconfig = directory / "kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "current-context": "a",
                    "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}],
                    "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
                    "users": [{"name": "a", "user": user}],
                }
            )
        )

    def settings(self, **more: Any) -> KubernetesSettings:
        return KubernetesSettings(kubeconfig=self.kubeconfig, credential_timeout_seconds=0.5, **more)

    def running(self) -> list[int]:
        pids = [int(pid) for pid in self.pids.read_text().split()]
        return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def test_one_that_hangs_at_the_start_is_ended_and_tried_again_later(plugin: Plugin) -> None:
    plugin.hangs.touch()
    with pytest.raises(TransientLaunchError, match=r"did not answer within 0\.5 s and was ended.*CREDENTIAL_TIMEOUT"):
        KubernetesApi.from_settings(plugin.settings())
    wait_until(lambda: not plugin.running(), 10, "the plugin is gone")
    plugin.hangs.unlink()
    KubernetesApi.from_settings(plugin.settings().model_copy(update={"credential_timeout_seconds": 20})).close()


def test_threads_do_not_wait_for_it_one_after_the_other(plugin: Plugin) -> None:
    connection = Connection(plugin.settings().model_copy(update={"credential_timeout_seconds": 20}), 1)
    connection._limit_seconds = 0.5
    assert connection.credentials() == {"Authorization": "Bearer t0ken"}
    connection._token_until = 0.0
    plugin.hangs.touch()
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            connection.credentials()
        except Unreachable as error:
            errors.append(error)

    began, threads = time.monotonic(), [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 8
    assert time.monotonic() - began < 8 * 0.5 + 2
    assert sum("hung a moment ago" in str(error) for error in errors) == 7
    wait_until(lambda: not plugin.running(), 10, "the plugin is gone")
    connection.close()
