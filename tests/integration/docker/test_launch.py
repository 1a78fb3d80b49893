"""Containers on the real Engine: what they are given, what they cannot do, and launches that fail."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.errors import HostFull, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.docker.container import build_container, build_environment
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.settings import DockerSettings
from tests.integration.docker.conftest import bash, wait_for_output
from tests.support.images import base_image
from tests.support.waiting import wait_until


def succeeded(plane) -> bool:
    wait_until(plane.final, 120, interval=0.1)
    return plane.final().request.state == pb.TASK_STATE_SUCCESS


def test_a_task_runs_and_its_token_is_nowhere_to_be_seen(plane, engine, docker_system, executor):
    plane.spec = bash(
        "echo user=$(id -u) caps=$(grep CapEff /proc/self/status | cut -f2) nnp=$(grep NoNewPrivs /proc/self/status "
        "| cut -f2) host=$(hostname) mine=$MINE; ls -A /run/leoflow/attempt | grep -v ^leoflow-agent-; "
        "env | grep -c t0ken; getent hosts host.docker.internal > /dev/null && echo gateway known; "
        "echo ready; read -t 60 < /staging/go"
    )
    launch = docker_system.agent_launch(plane, env={"MINE": "canary"}, staging_claim=f"{docker_system.system}-v")
    launched = executor.execute(launch)
    assert (launched.external_name, launched.already, launched.host) == (launch.name, False, executor.host)
    wait_for_output(plane, "ready")
    inspected = json.dumps(engine.api.inspect_container(launch.name))
    assert "t0ken" not in inspected
    assert "canary" not in inspected
    assert plane.text("stdout") == [
        f"user=10001 caps=0000000000000000 nnp=1 host={launch.name} mine=canary",
        "termination-log",
        "0",
        "gateway known",
        "ready",
    ]
    register = next(call for call in plane.calls if call.name == "Register")
    assert register.metadata["authorization"] == "Bearer t0ken"
    assert register.request.hostname == launch.name
    labels = engine.api.inspect_container(launch.name)["Config"]["Labels"]
    assert labels["leoflow.io/task-instance-id"] == launch.attempt.task_instance_id
    assert labels["leoflow.io/run-id"] == launch.request.run_id


def test_limits_are_what_the_kernel_enforces(plane, docker_system, executor):
    plane.spec = bash(
        "C=/sys/fs/cgroup; cat $C/memory/memory.limit_in_bytes $C/memory.max 2>/dev/null; "
        "echo swap $(cat $C/memory/memory.memsw.limit_in_bytes $C/memory.swap.max 2>/dev/null); "
        "echo quota $(cat $C/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 $C/cpu.max)"
    )
    resources = {"requests": {"cpu": "250m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}}
    executor.execute(docker_system.agent_launch(plane, resources=resources))
    assert succeeded(plane)
    memory, swap, quota = plane.text("stdout")
    assert memory == str(128 << 20)
    assert swap in (f"swap {128 << 20}", "swap 0")
    assert quota == "quota 50000"


@pytest.mark.parametrize("read_only", [False, True])
def test_staging_is_shared_by_the_tasks_of_a_run(plane, docker_system, read_only):
    executor = docker_system.executor(read_only_root=read_only)
    claim = f"{docker_system.system}-staging"
    plane.spec = bash("echo from a > $LEOFLOW_STAGING_DIR/x && touch /tmp/y && echo ${HOME}; touch /app/z; echo $?")
    executor.execute(docker_system.agent_launch(plane, "a", staging_claim=claim))
    assert succeeded(plane)
    assert plane.text("stdout") == ["/tmp", "1" if read_only else "0"]
    plane.calls.clear()
    plane.lines.clear()
    plane.spec = bash("cat /staging/x")
    executor.execute(docker_system.agent_launch(plane, "b", staging_claim=claim))
    assert succeeded(plane)
    assert plane.text("stdout") == ["from a"]


def test_staging_is_writable_in_an_image_that_knows_nothing_of_it(engine, docker_system, executor):
    launch = docker_system.launch(staging_claim=f"{docker_system.system}-staging")
    executor.execute(launch)
    data, _ = engine.api.get_archive(launch.name, "/staging")
    data.close()
    [volume] = engine.volumes(docker_system.system)
    other = docker_system.launch("reader")
    command = ["sh", "-c", "stat -c %a /staging"]
    mounts = [{"Type": "volume", "Source": volume, "Target": "/staging"}]
    docker_system.run_plain(other, *command, Mounts=mounts)
    engine.wait(other.name)
    assert engine.api.logs(other.name).decode().strip() == "777"


def test_secret_and_ca_are_mounted_read_only(plane, docker_system, tmp_path: Path):
    (tmp_path / "warehouse").mkdir()
    (tmp_path / "warehouse" / "password").write_text("pw")
    for path in (tmp_path, tmp_path / "warehouse"):
        path.chmod(0o755)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    executor = docker_system.executor(secrets_dir=str(tmp_path))
    plane.spec = bash("cat /etc/warehouse/password; touch /etc/warehouse/x 2>/dev/null || echo read-only")
    executor.execute(
        docker_system.agent_launch(plane, task_secret_name="warehouse", task_secret_mount_path="/etc/warehouse")
    )
    assert succeeded(plane)
    assert plane.text("stdout") == ["pw", "read-only"] or plane.text("stdout") == ["pwread-only"]


def test_plain_environment_for_agents_that_know_no_file(engine, docker_system):
    executor = docker_system.executor(agent_environment="plain")
    launch = docker_system.launch(env={"MINE": "1"})
    executor.execute(launch)
    env = engine.api.inspect_container(launch.name)["Config"]["Env"]
    assert {"LEOFLOW_AGENT_TOKEN=t0ken", "MINE=1"} <= set(env)


# -- the same attempt again -----------------------------------------------------------------------------------------


def test_an_attempt_delivered_to_eight_threads_of_two_workers_is_one_container(engine, docker_system):
    executors = [docker_system.executor(), docker_system.executor()]
    launch = docker_system.launch()
    with ThreadPoolExecutor(8) as pool:
        launched = list(pool.map(lambda n: executors[n % 2].execute(launch), range(8)))
    assert sorted(one.already for one in launched) == [False] + [True] * 7
    assert len(engine.containers(docker_system.system)) == 1


def test_a_worker_killed_between_create_and_start_is_finished_by_the_next_delivery(
    plane, engine, docker_system, executor
):
    plane.spec = bash("echo $MINE")
    launch = docker_system.agent_launch(plane, env={"MINE": "whole"})
    settings = DockerSettings(system=docker_system.system)
    config = build_container(launch, settings, build_environment(launch, settings), docker_system.system, 2)
    engine.api.create_container_from_config(config, launch.name)
    assert engine.status(launch.name) == "created"
    assert executor.execute(launch).already is True
    assert succeeded(plane)
    assert plane.text("stdout") == ["whole"]


def test_an_ended_container_is_not_started_again(engine, docker_system, executor):
    launch = docker_system.launch()
    docker_system.run_plain(launch, "true")
    ended = engine.wait(launch.name)
    assert executor.execute(launch).already is True
    assert engine.state(launch.name)["StartedAt"] == ended["StartedAt"]


def test_a_foreign_container_of_that_name_is_not_taken_for_ours(engine, docker_system, executor):
    launch = docker_system.launch()
    foreign = {"Image": launch.request.image, "Labels": {"leoflow.io/system": docker_system.system}}
    engine.api.create_container_from_config(foreign, launch.name)
    with pytest.raises(PermanentLaunchError, match="is not of this attempt"):
        executor.execute(launch)


# -- launches that fail ---------------------------------------------------------------------------------------------


def refused(executor, launch) -> PermanentLaunchError:
    with pytest.raises(PermanentLaunchError) as caught:
        executor.execute(launch)
    return caught.value


def test_a_missing_image_with_policy_never_says_what_to_do(docker_system, executor):
    launch = docker_system.launch(image="leoflow-test/missing:1", image_pull_policy="Never")
    error = refused(executor, launch)
    assert error.reason == FailureReason.IMAGE_PULL_FAILED
    assert "pull it there first" in error.message


@pytest.mark.parametrize("policy", ["IfNotPresent", "Always"])
def test_a_registry_that_does_not_answer_is_tried_again(docker_system, executor, policy):
    launch = docker_system.launch(image="127.0.0.1:1/missing:1", image_pull_policy=policy)
    with pytest.raises(TransientLaunchError, match="cannot pull image") as caught:
        executor.execute(launch)
    assert caught.value.reason == FailureReason.IMAGE_PULL_FAILED


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"image": ""}, FailureReason.INVALID_IMAGE, "image: is empty"),
        ({"image": "bad image"}, FailureReason.INVALID_IMAGE, "invalid reference format"),
        (
            {"image": "https://registry/x", "image_pull_policy": "Always"},
            FailureReason.INVALID_IMAGE,
            "cannot contain a scheme",
        ),
        (
            {"image": "x@sha256:zz", "image_pull_policy": "Always"},
            FailureReason.INVALID_IMAGE,
            "invalid tag format",
        ),
        ({"resources": {"limits": {"memory": "1Mi"}}}, FailureReason.INVALID_QUANTITY, "memory"),
        (
            {"task_secret_name": "s", "task_secret_mount_path": "/s"},
            FailureReason.UNKNOWN_SECRET,
            "SECRETS_DIR is not set",
        ),
    ],
)
def test_a_request_that_cannot_work_is_refused_and_leaves_nothing(
    engine, docker_system, executor, fields, reason, words
):
    error = refused(executor, docker_system.launch(**fields))
    assert (error.reason, CLASS_OF[FailureReason(error.reason)]) == (reason, FailureClass.CONFIG)
    assert words in error.message
    assert engine.containers(docker_system.system) == []


def test_a_secret_that_this_host_does_not_have(docker_system, tmp_path):
    executor = docker_system.executor(secrets_dir=str(tmp_path))
    error = refused(executor, docker_system.launch(task_secret_name="absent", task_secret_mount_path="/s"))
    assert error.reason == FailureReason.UNKNOWN_SECRET
    assert "LEOFLOW_DOCKER_SECRETS_DIR" in error.message


def test_a_network_that_this_host_does_not_have_leaves_no_container(engine, docker_system):
    error = refused(docker_system.executor(network="leoflow-test-absent"), docker_system.launch())
    assert error.reason == FailureReason.CONTAINER_CREATE_FAILED
    assert "LEOFLOW_DOCKER_NETWORK" in error.message
    assert engine.containers(docker_system.system) == []


def test_an_image_whose_program_is_missing_leaves_no_container(engine, docker_system, executor):
    launch = docker_system.launch()
    labels = {"leoflow.io/system": docker_system.system}
    made = engine.api.create_container_from_config({"Image": launch.request.image, "Labels": labels})
    image = engine.api.commit(made["Id"], conf={"Entrypoint": ["/no/such/agent"]})["Id"]
    try:
        error = refused(executor, docker_system.launch(image=image))
        assert error.reason == FailureReason.COMMAND_NOT_FOUND
        assert {one["State"] for one in engine.containers(docker_system.system)} == {"created"}
        assert engine.status(launch.name) == "gone"
    finally:
        engine.api.remove_image(image, force=True)


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ("USER nosuch", FailureReason.INVALID_IMAGE, "unable to find user nosuch"),
        ("USER 0:nosuch", FailureReason.INVALID_IMAGE, "unable to find group nosuch"),
        ("USER 99999999999", FailureReason.INVALID_IMAGE, "uids and gids must be in range"),
        ('ENTRYPOINT ["/etc/passwd"]', FailureReason.COMMAND_NOT_FOUND, "permission denied"),
        ('ENTRYPOINT ["/tmp"]', FailureReason.COMMAND_NOT_FOUND, "exec: "),
        ('ENTRYPOINT ["no-such-program"]', FailureReason.COMMAND_NOT_FOUND, "executable file not found"),
    ],
)
def test_an_image_that_can_never_start_is_refused_at_once(engine, docker_system, executor, change, reason, words):
    with engine.image(base_image(), change) as image:
        error = refused(executor, docker_system.launch(image=image))
        assert (error.reason, CLASS_OF[FailureReason(error.reason)]) == (reason, FailureClass.CONFIG)
        assert words in error.message
        assert engine.containers(docker_system.system) == []


def test_user_code_that_empties_the_temporary_directory_keeps_its_result(plane, engine, docker_system):
    for read_only in (False, True):
        plane.calls.clear()
        plane.spec = bash("rm -rf /tmp/* /tmp/.[!.]*; echo '\"kept\"' > $LEOFLOW_RETURN_VALUE_PATH")
        executor = docker_system.executor(read_only_root=read_only)
        executor.execute(docker_system.agent_launch(plane, f"t{read_only}"))
        assert succeeded(plane)
        [pushed] = [call.request.value for call in plane.calls if call.name == "PushXCom"]
        assert pushed == b'"kept"'


@pytest.mark.parametrize("read_only", [False, True])
def test_source_is_imported_by_a_python_task(plane, docker_system, read_only):
    plane.spec = pb.TaskSpec(operator="python", entrypoint="dag:hello")
    source = "def hello():\n    print('from the request: ü')\n    return 42\n"
    fields = {"operator": "python", "entrypoint": "dag:hello", "source": source}
    docker_system.executor(read_only_root=read_only).execute(docker_system.agent_launch(plane, **fields))
    assert succeeded(plane)
    assert plane.text("stdout") == ["from the request: ü"]


def test_an_override_gets_what_the_operator_allows(plane, engine, docker_system, tmp_path):
    data, volume = tmp_path / "data", f"{docker_system.system}-models"
    data.mkdir()
    (data / "rows").write_text("rows of the host\n")
    for path in (*list(data.parents)[:-2], data):
        path.chmod(path.stat().st_mode | 0o055)
    engine.api.create_volume(volume, labels={"leoflow.io/system": docker_system.system})
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"allow: {{ulimits: {{nofile: 2048}}, extra_hosts: [db], mounts: [{{volume: {volume}}}, {{path: {data}}}]}}"
    )
    plane.spec = bash(
        "df -m /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; ulimit -Sn; ulimit -Hn; "
        "getent hosts db | cut -d' ' -f1; cat /data/rows; touch /data/x /models/x 2>&1 | grep -c Read-only; echo end"
    )
    override = {
        "shm_size": "128Mi",
        "ulimits": [{"name": "nofile", "soft": 1_024, "hard": 2_048}],
        "extra_hosts": {"db": "10.0.0.7"},
        "mounts": [
            {"type": "bind", "source": str(data), "target": "/data"},
            {"source": volume, "target": "/models"},
        ],
    }
    docker_system.executor(policy=policy).execute(docker_system.agent_launch(plane, docker_override=override))
    assert succeeded(plane)
    assert plane.text("stdout") == ["128", "1024", "2048", "10.0.0.7", "rows of the host", "2", "end"]


def test_a_host_runs_so_many_containers_and_no_more(engine, docker_system):
    executor = docker_system.executor(max_running=3)
    assert executor.room() == 3
    for number in range(2):
        docker_system.run_plain(docker_system.launch(f"t{number}"), "sleep", "1000")
    ended = docker_system.launch("ended")
    docker_system.run_plain(ended, "true")
    engine.wait(ended.name)
    assert executor.room() == 1
    with engine.image(base_image(), 'ENTRYPOINT ["sleep", "1000"]') as image:
        launches = [docker_system.launch(f"new-{number}", image=image) for number in range(6)]

        def started(launch) -> bool:
            try:
                return not executor.execute(launch).already
            except HostFull:
                return False

        with ThreadPoolExecutor(6) as pool:
            outcomes = list(pool.map(started, launches))
        assert (outcomes.count(True), executor.room()) == (1, 0)
        running = launches[outcomes.index(True)]
        assert executor.execute(running).already, "a second delivery needs no place"
        with pytest.raises(HostFull, match="LEOFLOW_DOCKER_MAX_RUNNING"):
            executor.execute(docker_system.launch("one-more"))
        engine.api.remove_container(running.name, force=True, v=True)
        assert executor.room() == 1


@pytest.mark.parametrize(
    "override",
    [
        {"mounts": [{"type": "bind", "source": "/", "target": "/host"}]},
        {"mounts": [{"type": "bind", "source": "/var/run/docker.sock", "target": "/var/run/docker.sock"}]},
        {"device_requests": [{"count": -1}]},
        {"ulimits": [{"name": "nproc", "soft": -1}]},
        {"extra_hosts": {"gateway": "10.0.0.7"}},
    ],
)
def test_an_override_gets_nothing_of_the_host_by_default(engine, docker_system, executor, override):
    error = refused(executor, docker_system.launch(docker_override=override))
    assert error.reason == FailureReason.FORBIDDEN
    assert "LEOFLOW_DOCKER_POLICY" in error.message
    assert engine.containers(docker_system.system) == []


def test_what_is_allowed_and_not_on_this_host_is_left_to_another_one(engine, docker_system, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"allow: {{gpus: 1, mounts: [{{path: {tmp_path}/absent}}]}}")
    executor = docker_system.executor(policy=policy)
    for override, words in (
        ({"device_requests": [{"count": 1}]}, "docker_override.device_requests: could not select device driver"),
        (
            {"mounts": [{"type": "bind", "source": f"{tmp_path}/absent", "target": "/a"}]},
            f"docker_override.mounts: '{tmp_path}/absent' is not on this host",
        ),
    ):
        error = refused(executor, docker_system.launch(docker_override=override))
        assert error.reason == FailureReason.CONTAINER_CREATE_FAILED
        assert error.message.startswith(words)
        assert engine.containers(docker_system.system) == []


def test_a_policy_bounds_images_and_resources(docker_system, engine, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("images: {refuse: [evil.example/]}\nceilings: {cpu: '1', memory: 64Mi}")
    executor = docker_system.executor(policy=policy)
    launch = docker_system.launch()
    executor.execute(launch)
    config = engine.api.inspect_container(launch.name)["HostConfig"]
    assert (config["NanoCpus"], config["Memory"], config["MemorySwap"]) == (10**9, 64 * 2**20, 64 * 2**20)
    for fields, words, reason in (
        ({"image": "evil.example/x:1"}, "image: 'evil.example/x:1'", "forbidden"),
        ({"resources": {"limits": {"memory": "1Gi"}}}, "limits.memory: 1Gi is more than the 64Mi", "invalid_quantity"),
    ):
        with pytest.raises(PermanentLaunchError, match=words) as caught:
            executor.execute(docker_system.launch(**fields))
        assert caught.value.reason == reason
