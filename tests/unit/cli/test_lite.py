"""What a one-machine system keeps, whose it is, and who may run it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.lite.state import _FOREIGN, _PATHS, Holder, InUse, StateDirectory, exclusive
from leoflow_celery.settings import Settings
from tests.unit.cli.conftest import Cli

DAG = json.dumps(
    {
        "schema_version": "1.0",
        "dag_id": "d",
        "dag_version": "1",
        "image": "",
        "tasks": [{"task_id": "a", "type": "bash", "entrypoint": "true"}],
    }
)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    found = StateDirectory.at(tmp_path / "lite")
    found.create()
    return found


def test_keys_are_made_once_and_are_their_owners_alone(state: StateDirectory) -> None:
    before = state.environment()
    state.create()
    assert state.environment() == before
    assert stat.S_IMODE(state.keys_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
    assert sorted(path.name for path in state.path.iterdir()) == ["keys.json"]


def test_the_environment_makes_a_whole_system(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in state.environment().items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert settings.database.url.get_secret_value() == f"sqlite:///{state.path}/leoflow.db"
    assert settings.broker.url == f"redis+socket://{state.path}/redis/redis.sock"
    assert settings.gateway.listen == settings.agent.control_plane_addr == f"unix:{state.path}/gateway.sock"
    assert settings.gateway.allow_insecure_secrets
    assert settings.dispatch.executor_type == "subprocess"
    assert settings.logs.root == state.path / "logs"


def test_settings_of_a_deployed_system_do_not_leak_in_but_the_users_own_stay(state: StateDirectory) -> None:
    environ = {
        "LEOFLOW_DATABASE_URL": "postgresql://elsewhere/x",
        "LEOFLOW_DATABASE_URL_FILE": "/run/secrets/url",
        "LEOFLOW_GATEWAY_TLS_CERT": "/cert",
        "LEOFLOW_XCOM_BACKEND": "redis",
        "LEOFLOW_DISPATCH_QUEUE_LIMITS": "subprocess=1",
        "LEOFLOW_INLINE_HTTP_MAX_DURATION": "7",
        "LEOFLOW_MAINTENANCE_INTERVAL_SECONDS": "1",
    }
    state.use(environ)
    assert environ["LEOFLOW_DATABASE_URL"].startswith("sqlite:///")
    assert not {name for name in environ if name.endswith("_FILE") or "TLS" in name or "XCOM" in name}
    assert "LEOFLOW_DISPATCH_QUEUE_LIMITS" not in environ
    assert environ["LEOFLOW_INLINE_HTTP_MAX_DURATION"] == "7"
    assert environ["LEOFLOW_MAINTENANCE_INTERVAL_SECONDS"] == "1"


def test_relative_paths_are_meant_from_where_the_command_was_given(
    state: StateDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {
        "LEOFLOW_LITE_VENVS_ROOT": "./venvs",
        "LEOFLOW_GATEWAY_VARIABLES_PATH": "vars",
        "LEOFLOW_GATEWAY_SECRETS_PATH": "/run/secrets",
        "LEOFLOW_GATEWAY_CONNECTIONS_PATH": "",
    }
    state.use(environ)
    assert environ["LEOFLOW_LITE_VENVS_ROOT"] == f"{tmp_path}/venvs"
    assert environ["LEOFLOW_GATEWAY_VARIABLES_PATH"] == f"{tmp_path}/vars"
    assert environ["LEOFLOW_GATEWAY_SECRETS_PATH"] == "/run/secrets"
    assert environ["LEOFLOW_GATEWAY_CONNECTIONS_PATH"] == ""


def test_every_path_of_the_settings_is_known_to_lite() -> None:
    """A new one would be read in the state directory, where nobody looks for it."""
    decided_by_lite = {"LEOFLOW_LOGS_ROOT", *_FOREIGN}
    elsewhere = ("LEOFLOW_KUBERNETES_", "LEOFLOW_DOCKER_")
    for group in (field.annotation for field in Settings.model_fields.values()):
        assert group is not None
        for name, field in group.model_fields.items():
            variable = f"{group.model_config['env_prefix']}{name}".upper()
            if "Path" in str(field.annotation) and not variable.startswith(elsewhere):
                assert variable in {*_PATHS, *decided_by_lite}


def test_the_standard_directory_is_below_xdg_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert StateDirectory.at(None).path == tmp_path / "leoflow" / "lite"


@pytest.mark.parametrize("name", ["q?x", "a#b", "100%", "a;b"])
def test_a_directory_that_no_url_can_name_is_refused(cli: Cli, tmp_path: Path, name: str) -> None:
    for command in (("lite", "run", "dag.json"), ("lite", "up"), ("lite", "env")):
        (tmp_path / "dag.json").write_text(DAG)
        arguments = [str(tmp_path / part) if part == "dag.json" else part for part in command]
        result = cli(*arguments, "--state-dir", str(tmp_path / name))
        assert result.code == 2
        assert f"/{name}: its path holds" in result.err
        assert not (tmp_path / name).exists()


def test_a_directory_that_was_never_used_is_an_error(cli: Cli, tmp_path: Path) -> None:
    result = cli("--state-dir", str(tmp_path), "status", "d", "r")
    assert result.code == 2
    assert "no one-machine system at" in result.err
    assert "leoflow lite run" in result.err


def test_keys_that_cannot_be_used_are_an_error(state: StateDirectory) -> None:
    for content in ("", "[]", "{}"):
        state.keys_path.write_text(content)
        with pytest.raises(ConfigurationError, match=r"keys\.json cannot be used"):
            state.environment()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="--state-dir"):
        StateDirectory.at(tmp_path / "file" / "lite").create()


def test_lite_with_the_general_option_says_where_the_option_belongs(cli: Cli, tmp_path: Path) -> None:
    result = cli("--state-dir", str(tmp_path), "lite", "up")
    assert result.code == 2
    assert "behind its own command" in " ".join(result.err.replace("│", " ").split())


def test_env_prints_settings_for_a_shell(cli: Cli, state: StateDirectory) -> None:
    script = cli("lite", "env", "--state-dir", str(state.path)).out + "\nenv -0"
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    seen = dict(item.split("=", 1) for item in shell.stdout.split("\0") if "=" in item)
    assert state.environment().items() <= seen.items()


def test_one_system_per_directory(state: StateDirectory) -> None:
    with exclusive(state.lock_path, "up"), pytest.raises(InUse) as caught, exclusive(state.lock_path, "run"):
        pass
    assert caught.value.holder == Holder(os.getpid(), "up")
    assert f"'leoflow lite up' (process {os.getpid()})" in str(caught.value)
    with exclusive(state.lock_path, "run"):
        pass


def test_a_killed_holder_leaves_no_lock(state: StateDirectory) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from leoflow_celery.lite.state import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1]), 'up'):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(state.lock_path)], check=False)
    assert json.loads(state.lock_path.read_text())["command"] == "up"
    with exclusive(state.lock_path, "run"):
        pass


@pytest.mark.parametrize("given", ["", " ", "a\x1b[2J"])
def test_a_directory_that_is_not_a_path_is_refused(cli: Cli, given: str) -> None:
    for command in (
        ["--state-dir", given, "runs"],
        ["lite", "env", "--state-dir", given],
        ["--env-file", given, "runs"],
    ):
        refused = cli(*command)
        assert refused.code == 2
        assert "is not a path" in refused.err
        assert "\x1b[2J" not in refused.err
