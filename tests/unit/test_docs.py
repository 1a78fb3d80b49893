"""The README and docs/ agree with the code: every block, every command, every setting, every file that they name."""

from __future__ import annotations

import ast
import configparser
import doctest
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from leoflow_celery.cli.main import app
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.lite.dag import Dag
from tests.support.markdown import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"sh", "text", "python", "json", "yaml", "toml", "ini", "dockerfile"}
#: A prefix behind which operators choose the name.
CHOSEN_BY_OPERATORS = "LEOFLOW_VALUE_"
#: What a path on a page may be relative to.
BASES = (ROOT, ROOT / "leoflow_celery", ROOT / "deploy" / "kubernetes")


def name_of(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def of(*languages: str) -> Any:
    return pytest.mark.parametrize("block", [one for one in BLOCKS if one.language in languages], ids=name_of)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    """What is printed, and what is not for typing, is ``text``."""
    assert [name_of(one) for one in BLOCKS if one.page == page and one.language not in LANGUAGES] == []


@of("python")
def test_python_compiles(block: Block) -> None:
    examples = doctest.DocTestParser().get_examples(block.text)
    source = "".join(one.source for one in examples) if examples else block.text
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leoflow_celery"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@of("json")
def test_json_is_what_it_says(block: Block) -> None:
    value = json.loads(block.text)
    if "schema_version" in value:
        Dag.model_validate(value)
    elif "operator" in value:
        TaskRequest.model_validate(value)


@of("yaml")
def test_yaml_can_be_read(block: Block) -> None:
    assert list(yaml.safe_load_all(block.text))


@of("toml")
def test_toml_can_be_read(block: Block) -> None:
    assert tomllib.loads(block.text)


@of("sh")
def test_a_shell_can_read_it_and_its_commands_exist(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in block.text.replace("\\\n", " ").splitlines():
        check_commands(line)


def check_commands(line: str) -> None:
    """Commands of ours, targets of the Makefile, modules of ``celery -A``, and scripts: all of them are there."""
    for part in re.split(r"&&|\|\|?|;|>>?|\$\(|<", line.partition(" #")[0]):
        try:
            words = shlex.split(part.strip(" )\"'"), comments=True)
        except ValueError:  # half of a quoted text
            continue
        while words and re.fullmatch(r"\w+=.*|export|exec|sudo", words[0]):
            words = words[1:]
        match words:
            case ["leoflow", *rest]:
                check_leoflow(rest)
            case ["make", *targets]:
                for target in targets:
                    assert "=" in target or re.search(rf"(?m)^{target}:|{target}", makefile()), f"make {target}"
            case ["celery", "-A", module, *_]:
                assert importlib.util.find_spec(module) is not None, module
            case [script, *_] if script.startswith("deploy/"):
                assert (ROOT / script).exists(), script


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def check_leoflow(words: list[str]) -> None:
    """The command exists and knows its options.

    Raises:
        AssertionError: names the word that it does not know.
    """
    command: Any = typer.main.get_command(app)
    said = "leoflow"
    for word in words:
        if word.startswith("-") and not word.startswith("-…"):
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            known |= {"--help", "-h", "--install-completion"}
            assert word.partition("=")[0] in known, f"{said}: {word}"
        elif word in getattr(command, "commands", {}):
            command, said = command.commands[word], f"{said} {word}"
        elif getattr(command, "commands", None):
            previous = words[words.index(word) - 1] if words.index(word) else ""
            assert previous.startswith("-") or not re.fullmatch(r"[a-z-]+", word), f"{said}: {word!r} is not a command"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_sentence_exists(page: Path) -> None:
    if page.parent.name == "adr":
        return  # decisions are not edited
    for text in re.findall(r"`(leoflow [^`]*)`", prose(page)):
        words = re.sub(r"[\[\]…()]", " ", " ".join(text.split())).split()
        check_leoflow([word for word in words[1:] if word not in ("|",)])


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())


@cache
def code() -> str:
    """Everything in which a variable may be read."""
    folders = ("leoflow_celery", "leoflow_runtime", "tests", "deploy", "examples", "bench")
    files: Iterator[Path] = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    kinds = {".py", ".yaml", ".yml", ".env", ".proto", ".sh", ""}
    texts = [path.read_text(errors="ignore") for path in files if path.suffix in kinds and path.name != "test_docs.py"]
    return "\n".join([*texts, *((ROOT / name).read_text() for name in ("compose.yaml", "Makefile", ".env.example"))])


@cache
def settings_variables() -> set[str]:
    from leoflow_celery.settings import Settings, variables

    groups: list[Any] = [field.annotation for field in Settings.model_fields.values()]
    return {name for group in groups for names in variables(group).values() for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_variable_that_a_page_names_is_read_somewhere(page: Path) -> None:
    if page.parent.name == "adr":
        return
    known = settings_variables()
    for name in set(re.findall(r"LEOFLOW_[A-Z0-9_]*[A-Z0-9]", page.read_text())):
        plain = name.removesuffix("_FILE")
        assert (
            plain in known
            or name in code()
            or any(one.startswith(name) for one in known)
            or name.startswith(CHOSEN_BY_OPERATORS)
        ), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    if page.parent.name == "adr":
        return
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|proto|yaml|md|json))\b", page.read_text())
    missing = [name for name in named if not any((base / name).exists() for base in BASES)]
    assert [name for name in missing if not name.startswith(("/", "./"))] == []


def test_every_page_has_a_place_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert {name for name in pages if name not in text and not re.match(r"adr/\d", name)} == set()


def test_the_layers_on_the_page_are_the_contract() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    contract = parser["importlinter:contract:layers"]["layers"].split("\n")
    page = next(one for one in BLOCKS if one.page.name == "architecture.md" and "leoflow_celery.errors" in one.text)
    told = [line.replace("workers, beat_schedule", "workers") for line in page.text.splitlines()]
    assert told == [line.strip() for line in contract if line.strip()]
