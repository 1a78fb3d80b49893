"""A private system for a benchmark: Redis, a database, and the processes that are measured."""

from __future__ import annotations

import argparse
import http.server
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from cryptography.fernet import Fernet

from leoflow_celery.lite.redis_server import find_redis_server

ROOT = Path(__file__).resolve().parent.parent


class System:
    """Starts processes in a temporary directory and ends them all."""

    def __init__(self, database_url: str = "") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="leoflow-bench-"))
        self.socket = self.directory / "redis.sock"
        self.environment = {
            **os.environ,
            "LEOFLOW_BROKER_URL": f"redis+socket://{self.socket}",
            "LEOFLOW_DATABASE_URL": database_url or f"sqlite:///{self.directory}/leoflow.db",
            "LEOFLOW_JWT_SECRET": secrets.token_hex(32),
            "LEOFLOW_SEAL_KEYS": Fernet.generate_key().decode(),
            "LEOFLOW_LOGS_ROOT": str(self.directory / "logs"),
            "LEOFLOW_GATEWAY_LISTEN": f"unix:{self.directory}/gateway.sock",
            "LEOFLOW_CONTROL_PLANE_ADDR": f"unix:{self.directory}/gateway.sock",
            "LEOFLOW_EXECUTOR_TYPE": "subprocess",
            "LEOFLOW_DISPATCH_PERMITTED_EXECUTORS": "kubernetes,docker,subprocess,inline",
            # A benchmark tells workers which queue is theirs.
            "LEOFLOW_BROKER_REMOTE_CONTROL": "all",
            "LEOFLOW_SUBPROCESS_STATE_DIR": str(self.directory / "attempts"),
            "PYTHONPATH": str(ROOT),
        }
        os.environ.update({k: v for k, v in self.environment.items() if k.startswith("LEOFLOW_")})
        self._processes: list[subprocess.Popen[bytes]] = []
        self._by_name: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        self._processes.append(process)
        self._by_name[name] = process
        return process

    def named(self, *names: str) -> dict[str, psutil.Process]:
        """The running processes of these names."""
        return {name: psutil.Process(self._by_name[name].pid) for name in names}

    def start_redis(self) -> None:
        options = ("--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory))
        self.start("redis", find_redis_server(), *options)
        wait_for(self.socket.exists, "redis")

    def start_worker(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        """A Celery worker, ready to take tasks when this returns."""
        name = module.replace(".", "-")
        process = self.start(
            name, sys.executable, "-m", "celery", "-A", module, "worker", "-l", "INFO", "-n", f"{name}@%h", *options
        )
        output = self.directory / f"{name}.out"
        wait_for(lambda: b" ready." in output.read_bytes(), f"worker {module}", process)
        return process

    def listen_on(self, address: str) -> int:
        """Let the gateway listen where containers and pods reach it; the port."""
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
        for name in ("LEOFLOW_GATEWAY_LISTEN", "LEOFLOW_CONTROL_PLANE_ADDR"):
            self.environment[name] = os.environ[name] = f"{address}:{port}"
        return port

    def start_gateway(self, port: int = 0) -> None:
        """The gateway, listening when this returns: on its socket, or on ``port`` (see ``listen_on``)."""
        process = self.start("gateway", sys.executable, "-m", "leoflow_celery.cli", "gateway")
        output = self.directory / "gateway.out"
        wait_for(
            lambda: (
                b"gateway listening on" in output.read_bytes() if port else (self.directory / "gateway.sock").exists()
            ),
            "gateway",
            process,
        )

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> System:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for output in self.directory.glob("*.out"):
                print(f"--- {output.name}\n{output.read_text(errors='replace')[-2000:]}", file=sys.stderr)
        self.close()


def wait_for(
    ready: Callable[[], bool],
    what: str,
    process: subprocess.Popen[bytes] | None = None,
    seconds: float = 60,
    interval: float = 0.02,
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process is not None and process.poll() is not None:
            raise SystemExit(f"{what} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} is not ready after {seconds:.0f} s")
        time.sleep(interval)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    body = b'{"ok": true}'

    def do_GET(self) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(self.body)}\r\n\r\n"
        self.wfile.write(head.encode() + self.body)

    def log_message(self, *_: object) -> None:
        return


def serve_http() -> None:
    """The target of HTTP benchmarks, as a process of its own: prints its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextmanager
def http_target() -> Iterator[str]:
    """The URL of a small local server in its own process."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from bench.system import serve_http; serve_http()"], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def add_container_arguments(parser: argparse.ArgumentParser) -> None:
    """What a benchmark needs to know whose tasks run in containers or pods."""
    parser.add_argument("--image", default="leoflow-task-base:latest", help="a task image that is there (make images)")
    bridge = psutil.net_if_addrs().get("docker0", [])
    address = next((one.address for one in bridge if one.family is socket.AF_INET), "")
    help_text = f"this machine's address as containers reach it ({address or 'no docker0 here'})"
    parser.add_argument("--address", default=address, required=not address, help=help_text)


def report(name: str, ours: list[float], floor: list[float], unit: str, reach: str) -> None:
    """One line: both medians, their ratio and what was aimed at."""
    mine, theirs = statistics.median(ours), statistics.median(floor)
    print(f"{name}: {mine:.1f} {unit}, floor {theirs:.1f} {unit}, ratio {mine / theirs:.2f} (reach {reach})")
