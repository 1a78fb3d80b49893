"""What goes into the task image beside the agent."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
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


def test_what_the_image_copies_is_all_that_the_agent_imports(tmp_path: Path) -> None:
    stage = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").partition("AS task-code")[2].partition("\nFROM")[0]
    sources = [name for line in re.findall(r"^COPY (.+) \S+$", stage, re.MULTILINE) for name in line.split()]
    copied = [ROOT / name for name in sources if name.startswith("leoflow_")]
    assert ROOT / "leoflow_celery/agent" in copied
    for source in copied:
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    # An editable installation answers for every module that the copy lacks: where each came from is what counts.
    program = (
        "import sys, leoflow_celery.agent.__main__, leoflow_celery.executors.inline_http.__main__;"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('leoflow_')), sep='\\n')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    files = done.stdout.split()
    assert str(tmp_path / "leoflow_celery/__init__.py") in files, done.stderr
    assert [file for file in files if not file.startswith(str(tmp_path))] == []
