"""compose.yaml from nothing to a finished run of docker tasks, and away again without a trace."""

from __future__ import annotations

import json
import os
import secrets
import stat
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.attempt import staging_claim_name
from tests.images.build import STAND_INS, build_when_missing
from tests.support.browser import browsing
from tests.support.compose import MAKE_SECRETS, ROOT, Compose, compose_command, docker
from tests.support.flower import FlowerSite
from tests.support.images import require_docker, system_image, task_image
from tests.support.ports import free_port
from tests.support.waiting import wait_until

SALES = ROOT / "examples/sales"
SERVICES = {"redis", "postgres", "gateway", "worker-control", "worker-inline", "worker-docker", "beat", "flower"}
READ_METRICS = (
    "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9100/metrics', timeout=20).read().decode())"
)


@pytest.fixture
def sales_image() -> Iterator[str]:
    image = f"leoflow-sales:test-{secrets.token_hex(4)}"
    docker("build", "--quiet", f"--build-arg=BASE_IMAGE={task_image()}", f"--tag={image}", str(SALES))
    yield image
    docker("image", "rm", image)


@pytest.fixture
def project(tmp_path: Path, sales_image: str) -> Iterator[Compose]:
    """A project whose containers are gone afterwards, whatever happened."""
    compose_command()
    for image in STAND_INS:
        build_when_missing(image)
    dag = json.loads((SALES / "dag.json").read_text())
    (tmp_path / "dags/sales").mkdir(parents=True)
    (tmp_path / "dags/sales/dag.json").write_text(json.dumps({**dag, "image": sales_image}))
    (tmp_path / "settings.env").write_text(
        "LEOFLOW_DOCKER_FINISHED_GRACE_SECONDS=5\nLEOFLOW_MAINTENANCE_STAGING_INTERVAL_SECONDS=10\n"
    )
    name = f"lf{secrets.token_hex(4)}"
    settings = {
        "LEOFLOW_SYSTEM_IMAGE": system_image(),
        "LEOFLOW_TASK_NETWORK": f"{name}-tasks",
        "LEOFLOW_FLOWER_BIND": f"127.0.0.1:{free_port()}",
        "LEOFLOW_GATEWAY_BIND": f"127.0.0.1:{free_port()}",
        "LEOFLOW_SETTINGS_FILE": str(tmp_path / "settings.env"),
        "LEOFLOW_DAGS": str(tmp_path / "dags"),
    }
    compose = Compose(tmp_path, name, settings)
    yield compose
    for container in task_containers(compose):
        docker("rm", "--force", container, check=False)
    compose.down()


def task_containers(project: Compose) -> list[str]:
    """The containers in the tasks' network that are none of the project's own."""
    own = {one["Id"] for one in project.containers().values()}
    listed = docker("ps", "-aq", "--no-trunc", f"--filter=network={project.project}-tasks", check=False).split()
    return [container for container in listed if container not in own]


def test_nothing_starts_without_secrets(tmp_path: Path) -> None:
    require_docker()
    empty = tmp_path / "empty.env"
    empty.touch()
    command = [*compose_command(), "--env-file", str(empty), "config"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("LEOFLOW_")}
    refused = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "run deploy/compose/make-secrets first" in refused.stderr


def test_a_container_without_its_secret_is_not_created(tmp_path: Path) -> None:
    require_docker()
    build_when_missing("redis:7")
    compose = Compose(tmp_path, f"lf{secrets.token_hex(4)}", {})
    (compose.secrets_dir / "redis_auth").unlink()
    try:
        refused = compose.run("up", "-d", "redis", check=False)
        assert refused.returncode != 0
        assert f"{compose.secrets_dir}/redis_auth" in refused.stderr
        assert not any(one["State"]["Running"] for one in compose.containers().values())
    finally:
        compose.down()


def test_secrets_are_fresh_private_and_kept(tmp_path: Path) -> None:
    def make(name: str) -> dict[str, str]:
        directory = tmp_path / name
        env = {**os.environ, "LEOFLOW_DOCKER_SOCKET": os.environ.get("LEOFLOW_TEST_SOCKET", "/var/run/docker.sock")}
        subprocess.run([MAKE_SECRETS, directory, tmp_path / f"{name}.env"], env=env, check=True, capture_output=True)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        return {path.name: path.read_text() for path in directory.iterdir()}

    require_docker()
    one, other = make("one"), make("other")
    assert not set(one.values()) & set(other.values())
    assert make("one") == one


@pytest.mark.timeout(900)
def test_from_nothing_to_a_finished_run_and_away_again(project: Compose, tmp_path: Path) -> None:
    project.run("--profile=example", "up", "-d", "--quiet-pull")
    wait_until(lambda: set(project.containers()) >= SERVICES, 60, lambda: str(project.health()))
    project.wait_until_healthy()
    assert "FAIL" not in project.cli("doctor").stdout

    no_container_runs_as_root_or_shows_a_secret(project)

    ran = project.cli("run", "/dags/sales/dag.json", "--run-id", project.project)
    values = dict(line.split(" = ", 1) for line in ran.stdout.splitlines() if " = " in line)
    assert json.loads(values["convert.return_value"])["total"] == 251.34
    assert json.loads(values["archive.return_value"]) > 10
    shown = json.loads(project.cli("status", "sales", project.project, "--json").stdout)
    tries = {view["task_id"]: (view["executor"], view["try_number"]) for view in shown["task_instances"]}
    assert tries.pop("fetch_orders") == ("inline", 1)
    assert tries.pop("exchange_rate") == ("inline", 2)
    assert set(tries.values()) == {("docker", 1)}
    logs = project.cli("logs", "sales", project.project, "report").stdout
    assert "sales report: " in logs

    flower_shows_the_run_and_no_secret(project, shown["task_instances"], tmp_path)
    flower_remembers_after_a_restart(project)
    for service in ("gateway", "worker-control", "worker-inline", "worker-docker"):
        assert "# TYPE leoflow_claims_total" in project.execute(service, "python", "-c", READ_METRICS), service

    # The run succeeded: its containers go after their grace, its staging volume with the next collection.
    volume = staging_claim_name("sales", project.project)
    wait_until(lambda: not task_containers(project), 120, lambda: docker("ps", "-a"), 1)
    wait_until(lambda: volume not in docker("volume", "ls", "-q").split(), 180, f"{volume} to be deleted", 1)
    the_system_survives_its_servers(project)
    project.down()
    assert project.left_behind() == []


def the_system_survives_its_servers(project: Compose) -> None:
    """Redis and PostgreSQL come back with their data, and everybody finds them again without being restarted."""
    before = {name: one["State"]["StartedAt"] for name, one in project.containers().items()}
    project.run("restart", "redis", "postgres")
    project.wait_until_healthy()
    call = {"task_instance_id": "after", "dag_id": "d", "run_id": "r", "task_id": "after", "operator": "http_api"}
    request = {**call, "http_request": {"method": "GET", "url": "http://127.0.0.1:8765/orders"}}
    (Path(project.settings["LEOFLOW_DAGS"]) / "request.json").write_text(json.dumps(request))
    assert "success" in project.cli("submit", "--wait", "/dags/request.json").stdout
    assert "success" in project.cli("status", "sales", project.project).stdout
    after = {name: one["State"]["StartedAt"] for name, one in project.containers().items()}
    assert {name for name, at in after.items() if at != before[name]} == {"redis", "postgres"}


def no_container_runs_as_root_or_shows_a_secret(project: Compose) -> None:
    for service, container in project.containers().items():
        for name, secret in project.secrets.items():
            assert secret not in json.dumps(container), f"docker inspect of {service} shows {name}"
        if container["State"]["Running"]:
            assert project.execute(service, "id", "-u").strip() != "0", service
            assert container["HostConfig"]["CapDrop"] == ["ALL"], service


def flower_of(project: Compose) -> FlowerSite:
    address = project.containers()["flower"]["NetworkSettings"]["Ports"]["5555/tcp"][0]
    user, _, password = project.secrets["flower_basic_auth"].partition(":")
    return FlowerSite(f"http://127.0.0.1:{address['HostPort']}", user, password)


def flower_remembers_after_a_restart(project: Compose) -> None:
    flower = flower_of(project)
    before = {uuid for uuid, task in flower.tasks().items() if "'executor': 'docker'" in (task["kwargs"] or "")}
    project.run("restart", "flower")
    flower.wait_until_up()
    assert before <= flower.tasks().keys()


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def flower_shows_the_run_and_no_secret(project: Compose, tries: list[dict[str, Any]], tmp_path: Path) -> None:
    flower = flower_of(project)
    assert flower.status_without_password("/tasks") == 401
    for view in tries:
        task = flower.wait_for_state(view["celery_task_id"], "SUCCESS")
        assert task["name"] == f"{view['dag_id']}.{view['task_id']}"
        assert task["runtime"] == pytest.approx(seconds(view["ended_at"]) - seconds(view["started_at"]), abs=1.0)
    with browsing(flower.user, flower.password) as browser:
        browser.open(f"{flower.url}/tasks")
        for view in tries:
            if view["executor"] == "docker":
                browser.wait_for("table tbody tr", view["celery_task_id"])
        browser.screenshot(Path(os.environ.get("LEOFLOW_TEST_SCREENSHOTS") or tmp_path) / "flower-compose.png")
    forbidden = set(project.secrets.values())
    assert [path for path, text in flower.everything() if any(secret in text for secret in forbidden)] == []
