from __future__ import annotations

import grpc
import pytest

from leoflow_celery.agent.client import CallRefused, map_error
from leoflow_celery.agent.config import AgentConfig
from leoflow_celery.errors import ClaimRefused, ConfigurationError, Fenced, GatewayUnavailable, InvalidToken, NotFound

ENVIRON = {"LEOFLOW_CONTROL_PLANE_ADDR": "a:1", "LEOFLOW_AGENT_TOKEN": "t", "LEOFLOW_TASK_INSTANCE_ID": "ti"}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_an_error_of_ours(code):
    expected = {
        "UNAUTHENTICATED": InvalidToken, "FAILED_PRECONDITION": CallRefused, "ABORTED": Fenced, "NOT_FOUND": NotFound,
        "PERMISSION_DENIED": CallRefused, "UNIMPLEMENTED": CallRefused, "INVALID_ARGUMENT": CallRefused,
        "OUT_OF_RANGE": CallRefused, "ALREADY_EXISTS": CallRefused,
    }  # fmt: skip
    assert type(map_error(code, "details", {})) is expected.get(code.name, GatewayUnavailable)


def test_a_refused_claim_says_why():
    error = map_error(grpc.StatusCode.FAILED_PRECONDITION, "text", {"x-leoflow-refused": "terminal"})
    assert type(error) is ClaimRefused
    assert error.why == "terminal"


def test_defaults_and_tls():
    config = AgentConfig.from_environment(ENVIRON)
    assert (config.insecure, config.heartbeat_seconds, config.report_deadline_seconds) == (True, 15, 600)
    assert AgentConfig.from_environment({**ENVIRON, "LEOFLOW_AGENT_INSECURE": "False"}).insecure is False


def test_every_agent_is_another_holder():
    assert AgentConfig.from_environment(ENVIRON).session != AgentConfig.from_environment(ENVIRON).session


@pytest.mark.parametrize("name", sorted(ENVIRON))
def test_a_missing_variable_is_named(name):
    with pytest.raises(ConfigurationError, match=name):
        AgentConfig.from_environment({**ENVIRON, name: ""})


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_bad_number_is_named_with_its_value(value):
    with pytest.raises(ConfigurationError, match="LEOFLOW_AGENT_HEARTBEAT_SECONDS='" + value):
        AgentConfig.from_environment({**ENVIRON, "LEOFLOW_AGENT_HEARTBEAT_SECONDS": value})
