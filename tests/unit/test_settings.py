"""Settings: where they come from, what wins, and what a wrong one says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import Settings


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def test_defaults_need_no_environment() -> None:
    settings = Settings.load()
    assert settings.broker.url == "redis://127.0.0.1:6379/0"
    assert settings.dispatch.executor_type == "kubernetes"
    assert settings.inline.max_duration == 300
    assert settings.xcom.max_bytes == 262_144
    assert settings.maintenance.heartbeat_timeout_seconds == 90


@pytest.mark.parametrize(
    ("variable", "text", "path", "value"),
    [
        ("LEOFLOW_BROKER_URL", "redis://r/1", "broker.url", "redis://r/1"),
        ("LEOFLOW_GATEWAY_LISTEN", "unix:/run/g", "gateway.listen", "unix:/run/g"),
        ("LEOFLOW_GATEWAY_TLS_CERT", "/c.pem", "gateway.tls_cert", Path("/c.pem")),
        ("LEOFLOW_EXECUTOR_TYPE", "docker", "dispatch.executor_type", "docker"),
        ("LEOFLOW_DISPATCH_EXECUTOR_TYPE", "subprocess", "dispatch.executor_type", "subprocess"),
        ("LEOFLOW_DISPATCH_QUEUE_LIMITS", "k8s=1000, docker=5", "dispatch.queue_limits", {"k8s": 1000, "docker": 5}),
        ("LEOFLOW_INLINE_HTTP_MAX_DURATION", "60", "inline.max_duration", 60),
        ("LEOFLOW_LITE_VENVS_ROOT", "/venvs", "subprocess.venvs_root", "/venvs"),
        ("LEOFLOW_SUBPROCESS_AGENT_PATH", "/bin/agent", "subprocess.agent_path", "/bin/agent"),
        ("LEOFLOW_CONTROL_PLANE_ADDR", "gateway:1", "agent.control_plane_addr", "gateway:1"),
        ("LEOFLOW_XCOM_BACKEND", "redis", "xcom.backend", "redis"),
        ("LEOFLOW_LOGS_ROOT", "/logs", "logs.root", Path("/logs")),
        ("LEOFLOW_MAINTENANCE_MAX_RELAUNCHES", "0", "maintenance.max_relaunches", 0),
        ("LEOFLOW_METRICS_PORT", "9100", "metrics.port", 9100),
    ],
)
def test_a_variable_decides_its_setting(
    environ: pytest.MonkeyPatch, variable: str, text: str, path: str, value: object
) -> None:
    environ.setenv(variable, text)
    group, _, field = path.partition(".")
    assert getattr(getattr(Settings.load(), group), field) == value


def test_every_setting_is_read_under_a_leoflow_name() -> None:
    """A setting without the prefix would be decided by whatever else runs in the environment."""
    for field in Settings.model_fields.values():
        group = field.annotation
        assert group is not None
        assert isinstance(group, type)
        assert issubclass(group, BaseSettings)
        assert re.fullmatch(r"LEOFLOW_([A-Z]+_)*", str(group.model_config["env_prefix"]))


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("LEOFLOW_INLINE_HTTP_MAX_DURATION", "soon", "valid integer"),
        ("LEOFLOW_EXECUTOR_TYPE", "nomad", "'kubernetes', 'docker' or 'subprocess'"),
        ("LEOFLOW_DISPATCH_QUEUE_LIMITS", "k8s=many", "valid integer"),
        ("LEOFLOW_XCOM_BACKEND", "s3", "'sql' or 'redis'"),
    ],
)
def test_a_value_that_cannot_be_is_a_configuration_error_that_names_the_variable(
    environ: pytest.MonkeyPatch, variable: str, text: str, said: str
) -> None:
    environ.setenv(variable, text)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load()
    assert variable in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["JWT_SECRET", "SEAL_KEYS", "DATABASE_URL", "BROKER_URL"])
def test_a_secret_may_come_from_a_file(environ: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    path = tmp_path / "secret"
    path.write_text("redis://from-the-file\n")
    environ.setenv(f"LEOFLOW_{name}_FILE", str(path))
    settings = Settings.load()
    values = {
        "JWT_SECRET": settings.security.jwt_secret.get_secret_value(),
        "SEAL_KEYS": settings.security.seal_keys.get_secret_value(),
        "DATABASE_URL": settings.database.url.get_secret_value(),
        "BROKER_URL": settings.broker.url,
    }
    assert values[name] == "redis://from-the-file"


def test_the_variable_itself_wins_over_its_file(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ.setenv("LEOFLOW_JWT_SECRET", "direct")
    environ.setenv("LEOFLOW_JWT_SECRET_FILE", str(tmp_path / "missing"))
    assert Settings.load().security.jwt_secret.get_secret_value() == "direct"


def test_a_secret_file_that_is_missing_is_named(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ.setenv("LEOFLOW_SEAL_KEYS_FILE", str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match=r"LEOFLOW_SEAL_KEYS_FILE=.*missing: No such file or directory"):
        Settings.load()


def test_secrets_are_not_in_the_printed_settings(environ: pytest.MonkeyPatch) -> None:
    for name in ("JWT_SECRET", "SEAL_KEYS", "DATABASE_URL"):
        environ.setenv(f"LEOFLOW_{name}", "c4n4ry")
    assert "c4n4ry" not in repr(Settings.load())


def test_settings_cannot_be_changed() -> None:
    settings = Settings.load()
    with pytest.raises(ValueError, match="frozen"):
        settings.broker.url = "redis://elsewhere"


def test_logs_live_in_the_users_state_directory(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environ.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Settings.load().logs.root == tmp_path / "leoflow" / "logs"
