"""What the Engine is asked to create, as a function of launch and settings."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.core import attempt_in
from leoflow_celery.executors.docker.archive import launch_archive
from leoflow_celery.executors.docker.container import build_container, build_environment
from leoflow_celery.executors.docker.labels import deadline_of, system_name
from leoflow_celery.settings import BrokerSettings, DockerSettings


def launch(**fields) -> LaunchSpec:
    request = TaskRequest(
        **{
            "task_instance_id": "TI ü",
            "dag_id": "Sales Daily",
            "run_id": "manual__2026-01-31T10:00:00+00:00",
            "task_id": "extract",
            "operator": "bash",
            "entrypoint": "true",
            "image": "img:1",
            "agent_token": "t0ken",
            "control_plane_addr": "gw:9090",
            **fields,
        }
    )
    return LaunchSpec(request, AttemptId(request.task_instance_id, 2, 3))


def build(settings: DockerSettings | None = None, **fields):
    settings = settings or DockerSettings()
    spec = launch(**fields)
    return build_container(spec, settings, build_environment(spec, settings), "system", cpus=4)


def host_config(settings: DockerSettings | None = None, **fields):
    return build(settings, **fields)["HostConfig"]


def test_the_attempt_can_be_rebuilt_from_the_labels():
    labels = build()["Labels"]
    assert attempt_in(labels) == launch().attempt
    assert labels["leoflow.io/dag-id"] == "Sales Daily"
    assert labels["leoflow.io/system"] == "system"


@pytest.mark.parametrize("labels", [{}, {"leoflow.io/task-instance-id": "a", "leoflow.io/try-number": "x"}])
def test_labels_of_others_are_no_attempt(labels):
    assert attempt_in(labels) is None


def test_nobody_gains_anything():
    config = host_config()
    assert config["CapDrop"] == ["ALL"]
    assert config["SecurityOpt"] == ["no-new-privileges:true"]
    assert (config["Privileged"], config["AutoRemove"], config["RestartPolicy"]) == (False, False, {"Name": "no"})
    assert config["PidsLimit"] == 4_096
    assert config["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "2"}
    assert "ReadonlyRootfs" not in config


def test_token_and_variables_are_not_in_the_open():
    environment = build_environment(launch(env={"A": "1"}), DockerSettings())
    assert environment.secret == {"A": "1", "LEOFLOW_AGENT_TOKEN": "t0ken"}
    assert environment.open["LEOFLOW_ATTEMPT_NAME"] == launch().name
    assert environment.open["LEOFLOW_AGENT_LEAVE_INTERRUPTION"] == "true"
    assert "t0ken" not in json.dumps(build())


def test_plain_is_plain():
    environment = build_environment(launch(env={"A": "1"}), DockerSettings(agent_environment="plain"))
    assert environment.secret == {}
    assert (environment.open["A"], environment.open["LEOFLOW_AGENT_TOKEN"]) == ("1", "t0ken")
    assert "LEOFLOW_AGENT_ENV_FILE" not in environment.open


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, {}),
        ({"limits": {"cpu": "500m"}}, {"NanoCpus": 500_000_000}),
        ({"limits": {"cpu": "64"}}, {"NanoCpus": 4_000_000_000}),
        ({"limits": {"cpu": "1m"}}, {"NanoCpus": 10_000_000}),
        ({"limits": {"memory": "1Gi"}}, {"Memory": 1 << 30, "MemorySwap": 1 << 30}),
        ({"requests": {"cpu": "250m", "memory": "64Mi"}}, {"CpuShares": 256, "MemoryReservation": 64 << 20}),
        ({"requests": {"cpu": "0"}}, {"CpuShares": 2}),
        ({"requests": {"cpu": "300", "memory": "8Ei"}}, {"CpuShares": 262_144, "MemoryReservation": 2**63 - 1}),
        ({"limits": {"memory": "8Ei"}}, {"Memory": 2**63 - 1, "MemorySwap": 2**63 - 1}),
        (
            {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}},
            {"Memory": 1 << 30, "MemorySwap": 1 << 30, "MemoryReservation": 1 << 30},
        ),
    ],
)
def test_resources(resources, expected):
    config = host_config(resources=resources)
    names = ("NanoCpus", "CpuShares", "Memory", "MemorySwap", "MemoryReservation")
    assert {name: config[name] for name in names if name in config} == expected


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("", ("default", ["host.docker.internal:host-gateway"])),
        ("tasks", ("tasks", ["host.docker.internal:host-gateway"])),
        ("host", ("host", ["host.docker.internal:127.0.0.1"])),
        ("none", ("none", None)),
    ],
)
def test_networks(network, expected):
    config = host_config(DockerSettings(network=network))
    assert (config["NetworkMode"], config.get("ExtraHosts")) == expected


def test_the_deadline_is_the_timeout_and_an_allowance():
    assert deadline_of(build(timeout_seconds=100)["Labels"]) == 160
    assert deadline_of(build()["Labels"]) == 0


@pytest.mark.parametrize(
    ("execution", "expected", "told"),
    [({}, 30, "25"), ({"termination_grace_seconds": 0}, 0, "0"), ({"termination_grace_seconds": 600}, 600, "595")],
)
def test_the_grace_of_a_stop_is_the_requests_and_the_agent_knows(execution, expected, told):
    config = build(execution=execution)
    assert config["StopTimeout"] == expected
    assert f"LEOFLOW_AGENT_KILL_GRACE_SECONDS={told}" in config["Env"]


def test_mounts():
    settings = DockerSettings(secrets_dir="/srv/secrets/", read_only_root=True)
    config = host_config(
        settings,
        staging_claim="claim",
        agent_tls_ca_config_map="ca",
        task_secret_name="warehouse",
        task_secret_mount_path="/etc/warehouse",
    )
    assert config["Mounts"] == [
        {"Type": "volume", "Target": "/run/leoflow"},
        {"Type": "volume", "Source": "claim", "Target": "/staging"},
        {"Type": "bind", "Source": "/srv/secrets/ca", "Target": "/etc/leoflow/tls", "ReadOnly": True},
        {"Type": "bind", "Source": "/srv/secrets/warehouse", "Target": "/etc/warehouse", "ReadOnly": True},
    ]
    assert config["ReadonlyRootfs"] is True
    assert list(config["Tmpfs"]) == ["/tmp"]


@pytest.mark.parametrize(
    ("settings", "fields", "reason", "words"),
    [
        ({}, {"image": ""}, FailureReason.INVALID_IMAGE, "image: is empty"),
        (
            {},
            {"task_secret_name": "s", "task_secret_mount_path": "/s"},
            FailureReason.UNKNOWN_SECRET,
            "task_secret_name: 's' cannot be mounted",
        ),
        (
            {"secrets_dir": "/s"},
            {"task_secret_name": "../etc", "task_secret_mount_path": "/s"},
            FailureReason.UNKNOWN_SECRET,
            "is not the name",
        ),
        ({"secrets_dir": "/s"}, {"agent_tls_ca_config_map": ".."}, FailureReason.UNKNOWN_SECRET, "is not the name"),
        (
            {},
            {"secrets": [{"name": "DB", "source": "k8s_secret", "reference": "a/b"}]},
            FailureReason.UNKNOWN_SECRET,
            "needs the kubernetes executor",
        ),
    ],
)
def test_what_no_container_can_have_is_refused(settings, fields, reason, words):
    with pytest.raises(PermanentLaunchError, match=words) as caught:
        build(DockerSettings(**settings), **fields)
    assert caught.value.reason == reason


def entries(*args, **kwargs) -> tuple[str, dict[str, int]]:
    archive = launch_archive(*args, **kwargs)
    with tarfile.open(fileobj=BytesIO(archive.content)) as tar:
        return archive.path, {one.name: one.mode for one in tar.getmembers()}


def test_the_archive_has_the_environment_and_makes_staging_writable():
    assert entries({"A": "1"}, staging=True, read_only_root=False) == (
        "/",
        {
            "run/leoflow": 0o755,
            "staging": 0o777,
            "run/leoflow/attempt": 0o777,
            "run/leoflow/attempt/environment.json": 0o644,
        },
    )


def test_into_a_read_only_root_goes_only_what_its_volume_takes():
    expected = {"attempt": 0o777, "attempt/environment.json": 0o644}
    assert entries({"A": "1"}, staging=True, read_only_root=True) == ("/run/leoflow", expected)


def test_the_systems_name_is_that_of_the_broker_whatever_its_password():
    one = system_name("", BrokerSettings(url="redis://:pw@broker:6379/0"))
    assert one == system_name("", BrokerSettings(url="redis://:rotated@broker:6379/0"))
    others = [
        BrokerSettings(url="redis://broker:6379/1"),
        BrokerSettings(url="redis://elsewhere:6379/0"),
        BrokerSettings(url="redis://broker:6379/0", key_prefix="b:"),
        BrokerSettings(url="redis+socket:///run/a.sock"),
        BrokerSettings(url="redis+socket:///run/b.sock"),
    ]
    assert len({one, *(system_name("", other) for other in others)}) == 6
    assert system_name("named", others[0]) == "named"
