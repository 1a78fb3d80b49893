"""Flower as we deploy it: it cannot change anything, and does not remember the host of every attempt for ever."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]


def of_compose(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(Path, "read_text", lambda _: "ops:password")
    found = runpy.run_path(str(ROOT / "deploy/compose/flowerconfig.py"))
    return {name: str(value).lower() for name, value in found.items()}


def of_kubernetes(_: pytest.MonkeyPatch) -> dict[str, str]:
    deployment = next(yaml.safe_load_all((ROOT / "deploy/kubernetes/system/flower.yaml").read_text()))
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    return {one["name"].removeprefix("FLOWER_").lower(): str(one.get("value", "")) for one in container["env"]}


@pytest.mark.parametrize("deployed", [of_compose, of_kubernetes])
def test_flower_has_a_password_changes_nothing_and_forgets_ended_hosts(deployed, monkeypatch) -> None:
    settings = deployed(monkeypatch)
    assert "basic_auth" in settings
    assert settings["read_only"] == "true"
    assert int(settings["purge_offline_workers"]) == 300
