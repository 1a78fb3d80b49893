"""A whole system whose tasks are pods: real worker, control worker, gateway and beat here, pods on the cluster."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.support.cluster import Namespace, kubeconfig
from tests.support.host import host_address
from tests.support.ports import free_port
from tests.support.process import ManagedProcess
from tests.support.system import ROOT, System
from tests.support.tcp_proxy import TcpProxy

#: So that a test sees in seconds what takes minutes in production.
QUICK: dict[str, object] = {
    "MAINTENANCE_INTERVAL_SECONDS": 2,
    "MAINTENANCE_STAGING_INTERVAL_SECONDS": 2,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.2,
    "MAINTENANCE_MAX_RELAUNCHES": 1,
    "KUBERNETES_PENDING_TIMEOUT_SECONDS": 15,
    "KUBERNETES_STARTUP_PATIENCE_SECONDS": 10,
    "KUBERNETES_FINISHED_GRACE_SECONDS": 2,
}


class KubernetesSystem(System):
    """Its k8s worker has the deployed Role's rights, and reaches the API server through ``api_proxy``.

    With ``exchanges`` pods hold no token; the gateway then has its own rights, and its own way, ``gateway_proxy``.
    """

    def __init__(
        self,
        directory: Path,
        broker_url: str,
        database_url: str,
        namespace: Namespace,
        exchanges: bool = False,
        **overrides: object,
    ) -> None:
        self.namespace = namespace
        worker = namespace.worker_kubeconfig()
        self.api_proxy, path = self._proxied(worker, directory / "kubeconfig")
        self.gateway_proxy: TcpProxy | None = None
        self._gateway_env: dict[str, str] = {}
        if exchanges:
            self.gateway_proxy, own = self._proxied(namespace.gateway_kubeconfig(), directory / "gateway.kubeconfig")
            self._gateway_env["LEOFLOW_KUBERNETES_KUBECONFIG"] = str(own)
            overrides["KUBERNETES_AGENT_TOKEN"] = "exchange"
        address = f"{host_address()}:{free_port(host_address())}"
        values = {
            "EXECUTOR_TYPE": "kubernetes",
            "GATEWAY_LISTEN": address,
            "CONTROL_PLANE_ADDR": address,
            "KUBERNETES_KUBECONFIG": path,
            **QUICK,
            **overrides,
        }
        super().__init__(directory, broker_url, database_url, **values)

    def _proxied(self, source: Path, path: Path) -> tuple[TcpProxy, Path]:
        """A way to the API server that a test can cut, and ``path``, a kubeconfig like ``source`` that takes it."""
        server = urlsplit(yaml.safe_load(source.read_text())["clusters"][0]["cluster"]["server"])
        proxy = TcpProxy((str(server.hostname), server.port or 443), is_tls=server.scheme == "https")
        config = kubeconfig(source, self.namespace.name, server=f"{server.scheme}://127.0.0.1:{proxy.port}")
        config["clusters"][0]["cluster"].setdefault("tls-server-name", str(server.hostname))
        path.write_text(yaml.safe_dump(config))
        return proxy, path

    def start(self, name: str, *command: str | Path, env: Mapping[str, str] | None = None) -> ManagedProcess:
        """See ``System``; the gateway has credentials of its own where it needs some."""
        return super().start(name, *command, env={**(self._gateway_env if name == "gateway" else {}), **(env or {})})

    def start_all(self) -> None:
        """Gateway, the two workers and beat."""
        self.start_gateway()
        self.start_workers("workers.k8s", "workers.control")
        self.start_beat()

    def run_dag(self, dag: dict[str, Any], run_id: str, directory: Path) -> ManagedProcess:
        """``leoflow run`` of a DAG, as a process that was just started."""
        path = directory / f"{dag['dag_id']}.json"
        path.write_text(json.dumps({"schema_version": "1.0", "dag_version": "1", **dag}))
        return self.start(
            f"run-{dag['dag_id']}",
            *(sys.executable, "-m", "leoflow_celery.cli", "run", path, "--run-id", run_id),
            env={"COLUMNS": "120"},
        )

    def close(self) -> None:
        proxies = [one for one in (self.api_proxy, self.gateway_proxy) if one is not None]
        for proxy in proxies:
            proxy.resume_if_stopped()
        super().close()
        for proxy in proxies:
            proxy.close()


@contextlib.contextmanager
def image_with(files: dict[str, str], base: str, tag: str, directory: Path) -> Iterator[str]:
    """An image of a DAG: ``base`` with these files in /app, gone when the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "Dockerfile").write_text(f"FROM {base}\nCOPY {' '.join(files)} /app/\n")
    done = subprocess.run(["docker", "build", "--quiet", "--tag", tag, directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    try:
        yield tag
    finally:
        subprocess.run(["docker", "image", "rm", "--force", tag], capture_output=True, cwd=ROOT, check=False)


def call(url: str) -> str:
    """A shell command that calls a URL and prints the answer: a witness outside that user code ran."""
    program = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=170).read().decode())"
    return f'python -c "{program}"'
