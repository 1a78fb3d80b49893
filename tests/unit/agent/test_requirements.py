"""What goes into the task image beside the agent."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_agents_requirements_are_the_packages_own() -> None:
    """Two lists of versions would drift apart."""
    options = configparser.ConfigParser(interpolation=None)
    options.read(ROOT / "setup.cfg")
    all_lines = options["options"]["install_requires"].split("\n")
    lines = (ROOT / "requirements-agent.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted
    assert [line for line in wanted if line not in all_lines] == []
