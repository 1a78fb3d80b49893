"""What a request's docker_override gets, by the operator's policy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import ConfigurationError, PermanentLaunchError
from leoflow_celery.executors.docker.policy import DockerPolicy
from leoflow_celery.executors.policy import load_policy


def request(**override: object) -> TaskRequest:
    ids = dict.fromkeys(("task_instance_id", "dag_id", "run_id", "task_id", "entrypoint"), "x")
    return TaskRequest.model_validate(
        {
            **ids,
            "operator": "bash",
            "image": "python:3",
            "task_secret_name": "s",
            "task_secret_mount_path": "/etc/db",
            "docker_override": override,
        }
    )


NOTHING = DockerPolicy()
POLICY = DockerPolicy.model_validate(
    {
        "allow": {
            "gpus": 2,
            "ulimits": {"nofile": 4_096, "memlock": -1},
            "extra_hosts": ["*.corp.example", "db"],
            "mounts": [
                {"volume": "models"},
                {"volume": "scratch", "read_only": False},
                {"path": "/srv/data"},
            ],
        },
        "ceilings": {"memory": "1Gi"},
    }
)


def mount(source: str, target: str = "/m", **fields: object) -> dict[str, object]:
    return {"mounts": [{"source": source, "target": target, **fields}]}


def gpus(**fields: object) -> dict[str, object]:
    return {"device_requests": [fields]}


def ulimit(name: str, soft: int, hard: int | None = None) -> dict[str, object]:
    return {"ulimits": [{"name": name, "soft": soft, "hard": hard}]}


@pytest.mark.parametrize(
    ("override", "config"),
    [
        ({}, {}),
        ({"shm_size": "512Mi"}, {"ShmSize": 512 << 20}),
        (gpus(count=2), {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]], "Count": 2}]}),
        (
            gpus(device_ids=["0"], driver="nvidia", capabilities=[["gpu", "compute"]]),
            {"DeviceRequests": [{"Driver": "nvidia", "Capabilities": [["gpu", "compute"]], "DeviceIDs": ["0"]}]},
        ),
        (ulimit("nofile", 1_024), {"Ulimits": [{"Name": "nofile", "Soft": 1_024, "Hard": 1_024}]}),
        (ulimit("memlock", -1), {"Ulimits": [{"Name": "memlock", "Soft": -1, "Hard": -1}]}),
        ({"extra_hosts": {"db": "10.0.0.7"}}, {"ExtraHosts": ["db:10.0.0.7"]}),
        ({"extra_hosts": {"a.corp.example": "::1"}}, {"ExtraHosts": ["a.corp.example:::1"]}),
        (
            mount("models"),
            {"Mounts": [{"Type": "volume", "Source": "models", "Target": "/m", "ReadOnly": True}]},
        ),
        (
            mount("scratch"),
            {"Mounts": [{"Type": "volume", "Source": "scratch", "Target": "/m", "ReadOnly": False}]},
        ),
        (
            mount("scratch", read_only=True),
            {"Mounts": [{"Type": "volume", "Source": "scratch", "Target": "/m", "ReadOnly": True}]},
        ),
        (
            mount("/srv/data", type="bind"),
            {"Mounts": [{"Type": "bind", "Source": "/srv/data", "Target": "/m", "ReadOnly": True}]},
        ),
    ],
)
def test_what_the_operator_allows_is_asked_of_the_engine(
    override: dict[str, object], config: dict[str, object]
) -> None:
    assert POLICY.host_config(request(**override)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (gpus(count=3), "device_requests: 3 GPUs are more than the 2"),
        ({"device_requests": [{"count": 1}, {"device_ids": ["a", "b"]}]}, "device_requests: 3 GPUs are more"),
        (gpus(count=-1), r"device_requests.0.count: '-1 \(all GPUs\)' is not allowed"),
        (gpus(device_ids=["vendor.example/net=0"], driver="cdi"), "device_requests.0.driver: 'cdi' may stand for any"),
        (gpus(count=1, capabilities=[["gpu"], ["tpu"]]), "device_requests.0.capabilities: 'tpu' is none of a GPU"),
        (ulimit("nofile", 1_024, 8_192), "ulimits.0: nofile 1024:8192 is more than the 4096"),
        (ulimit("nofile", 1_024, -1), "ulimits.0: nofile 1024:-1 is more"),
        (ulimit("nproc", 1), "ulimits.0.name: 'nproc' is not allowed"),
        ({"extra_hosts": {"gateway": "10.0.0.7"}}, "extra_hosts: 'gateway' is not allowed"),
        ({"extra_hosts": {"host.docker.internal": "10.0.0.7"}}, "extra_hosts: 'host.docker.internal'"),
        (mount("other"), "mounts.0.source: 'other' is not allowed"),
        (mount("/srv/data"), "mounts.0.source: '/srv/data' is not allowed"),
        (mount("models", type="bind"), "mounts.0.source: 'models' is not allowed"),
        (mount("/srv/data/link", type="bind"), "mounts.0.source: '/srv/data/link' is not allowed"),
        (mount("/srv", type="bind"), "mounts.0.source: '/srv' is not allowed"),
        (mount("/var/run/docker.sock", type="bind"), "mounts.0.source: '/var/run/docker.sock'"),
        (mount("models", read_only=False), "mounts.0.read_only: .* for reading alone"),
        *(
            (mount("models", target), "mounts.0.target")
            for target in ("/", "/run", "/run/leoflow/attempt", "//staging", "/staging/", "/etc", "/etc/leoflow/tls")
        ),
        *(
            (mount("models", target), "mounts.0.target")
            for target in ("/proc", "/dev/shm", "/etc/db/x", "/opt/leoflow")
        ),
    ],
)
def test_what_nobody_allowed_is_refused_by_field_value_and_fix(override: dict[str, object], words: str) -> None:
    with pytest.raises(PermanentLaunchError, match=f"^docker_override.{words}") as caught:
        POLICY.host_config(request(**override))
    assert caught.value.reason == "forbidden"


def test_without_a_file_nothing_is_had_but_shared_memory() -> None:
    assert NOTHING.host_config(request(shm_size="2Gi")) == {"ShmSize": 2 << 30}
    for override in (
        gpus(count=1),
        ulimit("nofile", 1),
        {"extra_hosts": {"db": "::1"}},
        mount("v"),
        mount("/", type="bind"),
    ):
        with pytest.raises(PermanentLaunchError, match="LEOFLOW_DOCKER_POLICY"):
            NOTHING.host_config(request(**override))


def test_shared_memory_is_memory() -> None:
    with pytest.raises(PermanentLaunchError, match=r"docker_override\.shm_size: 2Gi is more than the 1Gi") as caught:
        POLICY.host_config(request(shm_size="2Gi"))
    assert caught.value.reason == "invalid_quantity"


def test_all_gpus_are_the_operators_to_give() -> None:
    policy = DockerPolicy.model_validate({"allow": {"gpus": "all"}})
    [device] = policy.host_config(request(**gpus(count=-1)))["DeviceRequests"]
    assert device["Count"] == -1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("allow: {privileged: true}", r"allow\.privileged: is not a known key"),
        ("allow: {gpus: -1}", r"allow\.gpus"),
        ("allow: {ulimits: {files: 1}}", r"allow\.ulimits\.files"),
        ("allow: {mounts: [{}]}", r"allow\.mounts\.0: name one of volume and path"),
        ("allow: {mounts: [{volume: a, path: /a}]}", "name one of volume and path"),
        ("allow: {mounts: [{path: /}]}", "not a plain absolute path"),
        ("allow: {mounts: [{path: /srv/../etc}]}", "not a plain absolute path"),
        ("allow: {mounts: [{path: srv}]}", "not a plain absolute path"),
        ("allow: {mounts: [{volume: leoflow-staging-a-b}]}", "not the name of a volume of the operator's own"),
    ],
)
def test_a_policy_that_cannot_be_meant_stops_the_worker(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"LEOFLOW_DOCKER_POLICY=.*policy\.yaml: .*{words}"):
        load_policy(path, "LEOFLOW_DOCKER_POLICY", DockerPolicy)


def test_what_the_pages_show_is_accepted() -> None:
    docs = Path(__file__).parents[4] / "docs"
    page = (docs / "docker.md").read_text()
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    policy = DockerPolicy.model_validate(yaml.safe_load(text))
    [override] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert policy.host_config(request(**json.loads(override))).keys() == {
        *("DeviceRequests", "ShmSize", "Ulimits", "ExtraHosts", "Mounts"),
    }
