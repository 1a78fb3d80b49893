"""Executors against a real cluster, and a control plane that listens where pods reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.settings import KubernetesSettings, Settings
from tests.integration.agent.control_plane import ControlPlane
from tests.support.cluster import Cluster, Namespace
from tests.support.host import host_address

MakeExecutor = Callable[..., KubernetesExecutor]


def _nothing_ends(*_: object) -> None:
    raise AssertionError("a launch reports nothing")


@pytest.fixture(scope="module")
def module_namespace(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """One namespace for the tests of a module: every launch has names of its own."""
    with cluster.namespace(tmp_path_factory.mktemp("namespace")) as made:
        yield made


@pytest.fixture
def make_executor(module_namespace: Namespace) -> Iterator[MakeExecutor]:
    """An executor of the module's namespace, as an administrator unless ``kubeconfig`` says otherwise."""
    made: list[KubernetesExecutor] = []

    def make(kubeconfig: Path | None = None, **settings: Any) -> KubernetesExecutor:
        path = kubeconfig or module_namespace.admin_kubeconfig()
        kubernetes = KubernetesSettings(kubeconfig=path, **settings)
        made.append(KubernetesExecutor(Settings(kubernetes=kubernetes), _nothing_ends))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


@pytest.fixture
def executor(make_executor: MakeExecutor) -> KubernetesExecutor:
    return make_executor()


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    control_plane = ControlPlane(host=host_address()).start()
    yield control_plane
    control_plane.close()
