"""GetVariables and GetConnections: providers, channels, TLS."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.gateway.harness import Agent, World, refused
from tests.support.waiting import wait_until


def variables(agent: Agent) -> dict[str, str]:
    return dict(agent.call("GetVariables", pb.GetVariablesRequest()).variables)


def connections(agent: Agent) -> dict[str, str]:
    return dict(agent.call("GetConnections", pb.GetConnectionsRequest()).connection_uris)


def registered(world: World) -> Agent:
    agent = world.agent(world.submit())
    agent.register()
    return agent


def test_plain_text_is_refused_unless_allowed(make_world: Callable[..., World], tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    agent = registered(make_world(variables_path=tmp_path / "variables"))
    for ask in (variables, connections):
        error = refused(ask, agent)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "LEOFLOW_GATEWAY_ALLOW_INSECURE_SECRETS" in error.details()


def test_a_directory_as_kubernetes_mounts_it(make_world: Callable[..., World], tmp_path: Path) -> None:
    mount, old, new = (tmp_path / name for name in ("mount", "mount/..2026_1", "mount/..2026_2"))
    for path, value in ((old, "eu-1\n"), (new, "eu-2\n\n")):
        path.mkdir(parents=True)
        (path / "region").write_text(value)
    (mount / "..data").symlink_to(old.name)
    (mount / "region").symlink_to("..data/region")
    (mount / "binary").write_bytes(b"\xff\xfe")
    world = make_world(variables_path=mount, allow_insecure_secrets=True)
    agent = registered(world)
    assert variables(agent) == {"region": "eu-1"}
    (mount / "..tmp").symlink_to(new.name)
    (mount / "..tmp").replace(mount / "..data")
    assert variables(agent) == {"region": "eu-2\n"}


def test_a_json_file_read_again_when_it_changed(make_world: Callable[..., World], tmp_path: Path) -> None:
    path = tmp_path / "connections.json"
    path.write_text(json.dumps({"db": "postgres://u:p@h/d", "api": {"conn_type": "http"}}))
    world = make_world(connections_path=path, allow_insecure_secrets=True)
    agent = registered(world)
    assert connections(agent) == {"db": "postgres://u:p@h/d", "api": '{"conn_type": "http"}'}
    assert variables(agent) == {}
    path.write_text('{"db": "hunter2')
    assert connections(agent)["db"] == "postgres://u:p@h/d"
    path.write_text('{"db": "postgres://new"}')
    assert connections(agent) == {"db": "postgres://new"}


def test_values_that_were_never_readable_are_unavailable(make_world: Callable[..., World], tmp_path: Path) -> None:
    path = tmp_path / "variables.json"
    path.write_text('["hunter2"]')
    error = refused(variables, registered(make_world(variables_path=path, allow_insecure_secrets=True)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "LEOFLOW_GATEWAY_VARIABLES_PATH" in error.details()
    assert "hunter2" not in error.details()


def test_only_a_holder_is_told(make_world: Callable[..., World]) -> None:
    world = make_world(allow_insecure_secrets=True)
    agent = world.agent(world.submit())
    assert refused(variables, agent).code() is grpc.StatusCode.ABORTED


def test_a_unix_socket_counts_as_secure(make_world: Callable[..., World], tmp_path: Path) -> None:
    world = make_world(listen=f"unix:{tmp_path / 'gateway.sock'}")
    assert variables(registered(world)) == {}


def test_agents_without_a_session_share_no_holder_on_a_unix_socket(
    make_world: Callable[..., World], tmp_path: Path
) -> None:
    world = make_world(listen=f"unix:{tmp_path / 'gateway.sock'}")
    request = world.submit()
    first, second = world.agent(request, session=None), world.agent(request, session=None)
    first.register()
    assert refused(second.register).code() is grpc.StatusCode.FAILED_PRECONDITION
    assert first.report(pb.TASK_STATE_SUCCESS).acknowledged


class TestTls:
    @staticmethod
    def certificate(directory: Path, name: str) -> tuple[Path, Path]:
        cert, key = directory / f"{name}.crt", directory / f"{name}.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"]  # type: ignore[list-item]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run(command, check=True, capture_output=True)
        return cert, key

    @staticmethod
    def agent(world: World, root: bytes) -> Agent:
        assert world.gateway is not None
        request = world.submit()
        token = world.tokens.mint(request, request.attempt)
        agent = Agent(world.gateway.address, token, "one", grpc.ssl_channel_credentials(root))
        world._agents.append(agent)
        return agent

    def test_secrets_travel_on_tls_and_a_renewed_certificate_is_served(
        self, make_world: Callable[..., World], tmp_path: Path
    ) -> None:
        cert, key = self.certificate(tmp_path, "first")
        first = cert.read_bytes()
        world = make_world(tls_cert=cert, tls_key=key)
        agent = self.agent(world, first)
        agent.register()
        assert variables(agent) == {}
        new_cert, new_key = self.certificate(tmp_path, "second")
        new_key.replace(key)
        new_cert.replace(cert)
        self.agent(world, cert.read_bytes()).register()
        assert variables(agent) == {}, "open connections go on"
        late = self.agent(world, first)
        error = refused(lambda: late.call("Register", pb.RegisterRequest(), timeout=2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "the old certificate is not served any more"

    def test_a_plain_text_agent_does_not_get_through(self, make_world: Callable[..., World], tmp_path: Path) -> None:
        cert, key = self.certificate(tmp_path, "only")
        world = make_world(tls_cert=cert, tls_key=key)
        agent = world.agent(world.submit())
        error = refused(lambda: agent.call("Register", pb.RegisterRequest(), timeout=1))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    def test_half_of_it_is_a_configuration_error(self, make_world: Callable[..., World], tmp_path: Path) -> None:
        cert, _ = self.certificate(tmp_path, "half")
        with pytest.raises(ConfigurationError, match="LEOFLOW_GATEWAY_TLS_KEY"):
            make_world(tls_cert=cert)

    def test_files_that_cannot_be_used_are_named(self, make_world: Callable[..., World], tmp_path: Path) -> None:
        cert, key = self.certificate(tmp_path, "pair")
        with pytest.raises(ConfigurationError, match=r"LEOFLOW_GATEWAY_TLS_CERT=.*No such file"):
            make_world(tls_cert=tmp_path / "none", tls_key=key)
        key.write_text("nothing")
        with pytest.raises(ConfigurationError, match="LEOFLOW_GATEWAY_TLS_KEY"):
            make_world(tls_cert=cert, tls_key=key)


def test_a_path_that_does_not_exist_is_a_configuration_error(make_world: Callable[..., World], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="LEOFLOW_GATEWAY_SECRETS_PATH"):
        make_world(secrets_path=tmp_path / "nowhere")


def test_an_address_in_use_is_a_configuration_error(make_world: Callable[..., World]) -> None:
    world = make_world()
    assert world.gateway is not None
    with pytest.raises(ConfigurationError, match="LEOFLOW_GATEWAY_LISTEN"):
        make_world(listen=world.gateway.address)
    wait_until(lambda: registered(world), 5)
