"""keys, schema, db upgrade and doctor."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from leoflow_celery.cli import doctor
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.security import KeyRing, TokenIssuer
from leoflow_celery.settings import KubernetesSettings, Settings
from leoflow_celery.store import Store
from leoflow_celery.store.presence import Kind
from tests.unit.cli.conftest import Cli


def test_keys_are_export_lines_that_work_and_differ(cli: Cli) -> None:
    exported = [dict(shlex.split(line)[1].split("=", 1) for line in cli("keys").out.splitlines()) for _ in range(2)]
    assert exported[0] != exported[1]
    KeyRing(exported[0]["LEOFLOW_SEAL_KEYS"])
    TokenIssuer(exported[0]["LEOFLOW_JWT_SECRET"], 60)


def test_the_key_of_a_launch_worker_opens_what_is_sealed_for_its_queue_only(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = dict(shlex.split(line)[1].split("=", 1) for line in cli("keys").out.splitlines())["LEOFLOW_SEAL_KEYS"]
    monkeypatch.setenv("LEOFLOW_SEAL_KEYS", master)
    exported = dict(shlex.split(line)[1].split("=", 1) for line in cli("keys", "--for", "docker").out.splitlines())
    assert exported.keys() == {"LEOFLOW_SEAL_KEYS"}
    worker = KeyRing(exported["LEOFLOW_SEAL_KEYS"])
    assert worker.sealer("docker").open(KeyRing(master).sealer("docker").seal({"a": 1})) == {"a": 1}
    with pytest.raises(ConfigurationError, match="no key for 'k8s'"):
        worker.sealer("k8s")
    monkeypatch.setenv("LEOFLOW_SEAL_KEYS", exported["LEOFLOW_SEAL_KEYS"])
    assert "'control'" in cli("keys", "--for", "control").err


def test_schema_is_that_of_a_request_or_of_a_dag(cli: Cli) -> None:
    assert json.loads(cli("schema").out) == TaskRequest.model_json_schema()
    assert "depends_on" in cli("schema", "--dag").out


def test_db_upgrade_makes_the_tables_and_may_be_repeated(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", f"sqlite:///{tmp_path / 'new.db'}")
    assert "was upgraded from nothing" in cli("db", "upgrade").out
    assert "is up to date" in cli("db", "upgrade").out


def findings(cli: Cli, code: int = 1) -> dict[str, tuple[bool, str]]:
    result = cli("doctor", "--json")
    assert result.code == code
    return {item["check"]: (item["ok"], item["sentence"]) for item in json.loads(result.out)}


def test_doctor_finds_what_is_missing_and_names_the_setting(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.db"
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", f"sqlite:///{missing}")
    monkeypatch.setenv("LEOFLOW_SEAL_KEYS", "")
    monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_FILES", str(tmp_path / "missing"))
    found = findings(cli)
    assert found.pop("pods") == (True, mock.ANY)  # not asked
    assert not any(ok for ok, _ in found.values())
    assert "LEOFLOW_SEAL_KEYS" in found["keys"][1]
    assert "LEOFLOW_GATEWAY_SECRET_FILES" in found["secrets"][1]
    assert "LEOFLOW_DATABASE_URL" in found["database"][1]
    assert not missing.exists()
    assert "127.0.0.1:1" in found["broker"][1]
    assert "LEOFLOW_BROKER_URL" in found["broker"][1]
    assert "LEOFLOW_CONTROL_PLANE_ADDR" in found["gateway"][1]
    assert "s3cret" not in str(found)


def test_doctor_asks_every_back_end_of_secrets_and_shows_no_value(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = tmp_path / "values" / "tenants" / "default" / "variables" / "region"
    region.parent.mkdir(parents=True)
    region.write_text("canary")
    answer = tmp_path / "answer.json"
    answer.write_text('{"values": {"db": "canary"}}')
    monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_BACKENDS", "files,environment,command")
    monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_FILES", str(tmp_path / "values"))
    monkeypatch.setenv("LEOFLOW_VALUE_CONNECTION__default__db", "canary")
    monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_COMMAND", f"/bin/cat {answer}")
    result = cli("doctor", "--only", "secrets")
    assert (result.code, "canary" in result.out + result.err) == (0, False)
    sentence = doctor.check_secrets(Settings.load()).sentence
    assert "files has 1 variables and 0 connections, environment has 0 variables and 1 connections" in sentence

    answer.write_text("canary")
    failed = cli("doctor", "--only", "secrets")
    assert failed.code == 1
    assert "'command' cannot tell now: the command's output is not valid JSON" in " ".join(failed.out.split())
    assert "canary" not in failed.out + failed.err


def test_doctor_finds_a_directory_of_secrets_that_nobody_reads(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "values" / "tenants" / "acme corp").mkdir(parents=True)
    monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_FILES", str(tmp_path / "values"))
    finding = doctor.check_secrets(Settings.load())
    assert not finding.ok
    assert "the directory of 'acme corp' is acme%20corp" in finding.sentence


def test_doctor_tells_an_old_schema_from_none(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert findings(cli)["database"][0]
    (tmp_path / "empty.db").touch()
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", f"sqlite:///{tmp_path / 'empty.db'}")
    ok, sentence = findings(cli)["database"]
    assert not ok
    assert "has no tables" in sentence
    assert "leoflow db upgrade" in sentence


def test_doctor_in_words(cli: Cli, settings: Settings) -> None:
    lines = cli("doctor").out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "keys"],
        ["ok", "secrets"],
        ["ok", "database"],
        ["FAIL", "broker"],
        ["FAIL", "gateway"],
        ["FAIL", "workers"],
        ["FAIL", "backends"],
        ["FAIL", "clocks"],
        ["ok", "pods"],
    ]


def test_doctor_knows_who_announced_itself(cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor.check_back_ends(settings)
    assert not finding.ok
    assert "no kubernetes worker has announced itself for 60 s" in finding.sentence
    assert "celery -A leoflow_celery.workers.k8s worker" in finding.sentence
    store = Store(settings)
    store.presence.keep_present(Kind.BACK_END, "kubernetes")
    store.close()
    assert doctor.check_back_ends(settings) == doctor.Finding(
        "backends", True, "kubernetes announced within the last 60 s"
    )
    monkeypatch.setenv("LEOFLOW_EXECUTOR_TYPE", "docker")
    assert not doctor.check_back_ends(Settings.load()).ok
    monkeypatch.setenv("LEOFLOW_EXECUTOR_TYPE", "subprocess")
    assert doctor.check_back_ends(Settings.load()).ok


def test_doctor_looks_only_where_it_is_told(cli: Cli, settings: Settings) -> None:
    chosen = cli("doctor", "--only", "keys", "--only", "database")
    assert [line.split()[:2] for line in chosen.out.splitlines()] == [["ok", "keys"], ["ok", "database"]]
    assert chosen.code == 0
    assert cli("doctor", "--only", "broker").code == 1
    unknown = cli("doctor", "--only", "queues")
    assert unknown.code == 2
    assert "--only queues: no such check; there are keys, secrets, database" in unknown.err


@pytest.fixture
def health_servicer(settings: Settings) -> Iterator[health.HealthServicer]:
    """A gRPC server that answers health checks where agents are told to look."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_insecure_port(settings.agent.control_plane_addr)
        server.start()
        yield servicer
        server.stop(0).wait()


def test_doctor_asks_the_gateway_for_its_health(settings: Settings, health_servicer: health.HealthServicer) -> None:
    assert doctor.check_gateway(settings).ok
    health_servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    finding = doctor.check_gateway(settings)
    assert not finding.ok
    assert "NOT_SERVING" in finding.sentence


def test_doctor_wants_a_consumer_for_every_queue_of_a_standard_system(settings: Settings) -> None:
    assert doctor.needed_queues(settings) == ["k8s", "inline", "dispatch", "results", "maintenance"]


def test_doctor_asks_for_the_rights_to_exchange_tokens_where_pods_hold_none(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "not needed" in cli("doctor", "--only", "exchange").out
    exchanging = KubernetesSettings(agent_token="exchange", kubeconfig=tmp_path / "missing")
    elsewhere = doctor.check_exchange(settings.model_copy(update={"kubernetes": exchanging}))
    assert (elsewhere.ok, "ask where the gateway runs" in elsewhere.sentence) == (True, True)
    reviewer = SimpleNamespace(namespace="tasks", missing_rights=lambda: ["create x", "get y"], close=lambda: None)
    monkeypatch.setattr("leoflow_celery.gateway.exchange.open_reviewer", lambda _: reviewer)
    text = "the API server does not let this process create x or get y, as the gateway has to; grant it"
    assert doctor.check_exchange(settings) == doctor.Finding("exchange", False, text)
    reviewer.missing_rights = list
    assert doctor.check_exchange(settings).ok


def test_doctor_looks_for_held_pods_where_it_reaches_the_cluster(settings: Settings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"kubernetes": KubernetesSettings(kubeconfig=tmp_path / "missing")})
    found = doctor.check_held_pods(elsewhere)
    assert (found.ok, "ask where the k8s worker runs" in found.sentence) == (True, True)
