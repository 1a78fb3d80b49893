"""What setup.cfg promises: shipped files, commands, and requirements that can be installed together."""

from __future__ import annotations

import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import leoflow_celery

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_every_command_points_at_a_function(setup_cfg: configparser.ConfigParser) -> None:
    for line in lines(setup_cfg["options.entry_points"]["console_scripts"]):
        module, _, function = line.partition("=")[2].strip().partition(":")
        assert callable(getattr(importlib.import_module(module), function)), line


def test_data_files_that_the_code_opens_are_shipped(setup_cfg: configparser.ConfigParser) -> None:
    """A wheel holds Python files of packages, and else only what package_data names."""
    patterns = lines(setup_cfg["options.package_data"]["leoflow_celery"])
    package = ROOT / "leoflow_celery"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    kinds = {"py", "pyc", "so"}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix.lstrip(".") not in kinds}
    assert sorted(map(str, others - shipped)) == []


def test_every_folder_with_code_is_a_package() -> None:
    """find: skips a folder without __init__.py, and the wheel would miss it without a word."""
    for root in ("leoflow_celery", "leoflow_runtime"):
        for path in (ROOT / root).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


def test_the_client_libraries_that_exclude_each_other_are_pinned(setup_cfg: configparser.ConfigParser) -> None:
    """kubernetes 37.0.2 and celery 5.7 want different dateutils; unpinned, pip takes an older celery in silence."""
    extras = setup_cfg["options.extras_require"]
    worker = _by_name(extras["worker"])
    for name in ("celery", "kombu"):
        assert worker[name].specifier.contains("5.7.0")
        assert not worker[name].specifier.contains("5.6.3")
    for extra in ("kubernetes", "docker", "lite"):
        assert _by_name(extras[extra])["leoflow-celery"].extras == {"worker"}
    assert not _by_name(extras["kubernetes"])["kubernetes"].specifier.contains("37.0.2")


def test_a_client_installs_beside_other_versions_of_celery(setup_cfg: configparser.ConfigParser) -> None:
    """Airflow's Celery provider does not import with 5.7, and both must fit into one environment."""
    celery = _by_name(setup_cfg["options"]["install_requires"])["celery"]
    assert celery.extras == {"redis"}
    assert [version for version in ("5.4.0", "5.5.3", "5.6.3", "5.7.0", "5.8.0") if version in celery.specifier] == [
        "5.5.3",
        "5.6.3",
        "5.7.0",
    ]


def _by_name(text: str) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines(text))}


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/adr/README.md"])
def test_the_papers_of_the_project_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 500


def test_every_decision_is_in_the_index_and_has_its_three_parts() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    pages = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text()
        assert page.name in index
        for part in ("## Context", "## Decision", "## Consequences"):
            assert part in text, f"{page.name} has no {part}"


def test_what_is_built_is_whole_and_may_be_uploaded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "docs", "*.egg-info", "build", "dist"))
    run = partial(subprocess.run, cwd=source, capture_output=True, text=True, check=False)
    built = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist"])
    assert built.returncode == 0, built.stdout + built.stderr
    files = sorted(map(str, (tmp_path / "dist").iterdir()))
    assert [Path(file).suffix for file in files] == [".whl", ".gz"]
    checked = run([sys.executable, "-m", "twine", "check", "--strict", *files])
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with zipfile.ZipFile(files[0]) as wheel:
        held = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "leoflow_celery").rglob("*.py")}
    assert {"leoflow_celery/py.typed", "leoflow_runtime/py.typed", *modules} <= held
    top = {name.partition("/")[0] for name in held}
    assert {name for name in top if not name.endswith(".dist-info")} == {"leoflow_celery", "leoflow_runtime"}


def test_a_checkouts_entry_points_are_the_installed_ones(setup_cfg: configparser.ConfigParser) -> None:
    """What a checkout and the images start is what is installed, under a shorter name."""
    thin = [ROOT / "beat_schedule.py", *sorted((ROOT / "workers").glob("[a-z]*.py"))]
    installed = [ROOT / "leoflow_celery" / "beat_schedule.py", *(ROOT / "leoflow_celery" / "workers").glob("[a-z]*.py")]
    assert sorted(path.name for path in thin) == sorted(path.name for path in installed)
    for path in thin:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f"from leoflow_celery.{name} import app" in path.read_text().splitlines()


def test_the_version_is_said_in_one_place(setup_cfg: configparser.ConfigParser) -> None:
    version = setup_cfg["metadata"]["version"]
    assert leoflow_celery.__version__ == metadata.version("leoflow-celery")
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_metadata_the_makefile_and_ci_name_the_same_pythons(setup_cfg: configparser.ConfigParser) -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [line.strip() for line in lines(setup_cfg["metadata"]["classifiers"])]
    versions = [f"3.{line.removeprefix(prefix)}" for line in named if line.startswith(prefix)]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == versions
    makefile = (ROOT / "Makefile").read_text()
    assert " ".join(f"python{version}" for version in versions) in makefile


def test_the_workflows_of_the_repository_can_be_read() -> None:
    files = sorted((ROOT / ".github").rglob("*.yml"))
    assert {"ci.yml", "release.yml", "bug.yml"} <= {file.name for file in files}
    for file in files:
        assert yaml.safe_load(file.read_text()), file
