"""``leoflow dag`` where no code is run: check, show, begin; the compiler itself has tests with the real SDK."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.cli.conftest import Cli


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    tasks: list[dict[str, Any]] = [
        {"task_id": "a", "type": "bash", "entrypoint": "true"},
        {"task_id": "b", "type": "python", "entrypoint": "dag:b", "depends_on": ["a"], "xcom_input": {"x": ["a"]}},
        {"task_id": "c", "type": "bash", "entrypoint": "true", "depends_on": ["a", "b"], "trigger_rule": "always"},
    ]
    path = tmp_path / "dag.json"
    path.write_text(json.dumps({"schema_version": "1.0", "dag_id": "flow", "dag_version": "1", "tasks": tasks}))
    return path


def test_show_puts_each_task_below_what_it_waits_for(cli: Cli, flow: Path) -> None:
    assert cli("dag", "show", str(flow)).out.splitlines() == [
        "DAG 'flow', 3 tasks",
        "  0 └─ a  bash",
        "  1 └─ b  python    ← a",
        "  2 └─ c  bash      ← a, b  [always]",
    ]


def test_show_as_mermaid_dot_and_svg(cli: Cli, flow: Path) -> None:
    mermaid = cli("dag", "show", str(flow), "--format", "mermaid").out
    assert mermaid.startswith("flowchart LR\n")
    assert "  t1 -->|always| t2" in mermaid
    dot = cli("dag", "show", str(flow), "--format", "dot").out
    assert '  "a" -> "b";' in dot
    assert '  "b" -> "c" [label="always"];' in dot
    svg = ElementTree.fromstring(cli("dag", "show", str(flow), "--format", "svg").out)  # noqa: S314 - our own
    names = [element.tag.rpartition("}")[2] for element in svg.iter()]
    assert (names.count("rect"), names.count("path")) == (3, 1 + 3)


def test_validate_tells_all_files_and_exits_2_for_a_wrong_one(cli: Cli, flow: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("schema_version: '1.0'\ndag_id: x\ndag_version: 1\ntasks: []\n")
    told = cli("dag", "validate", str(flow), str(wrong))
    assert told.code == 2
    assert f"{flow}: DAG 'flow', 3 tasks" in told.out
    assert f"{wrong}: " in told.err
    assert "dag_version" in told.err
    found = json.loads(cli("dag", "validate", str(flow), str(wrong), "--json").out)
    assert [one["valid"] for one in found] == [True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [\n", ":3: is not YAML"),
        ("a: 1\na: 2\n", ":2: key 'a' is given twice"),
        ("tasks: !!python/object:os.system {}\n", ":1: is not YAML"),
        ("- 1\n", "is not a JSON object"),
    ],
)
def test_yaml_that_is_none_says_where(cli: Cli, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text(text)
    assert words in cli("dag", "validate", str(path)).err


def test_compile_writes_yaml_as_json_and_never_over_its_source(cli: Cli, flow: Path, tmp_path: Path) -> None:
    path = tmp_path / "flow.yml"
    path.write_text(flow.read_text())  # JSON is YAML
    assert "DAG 'flow', 3 tasks" in cli("dag", "compile", str(path)).err
    assert json.loads((tmp_path / "flow.json").read_text()) == json.loads(flow.read_text())
    assert json.loads(cli("dag", "compile", str(path), "-o", "-").out)["dag_id"] == "flow"
    assert "is the file itself" in cli("dag", "compile", str(flow)).err


def test_init_refuses_a_name_that_no_dag_can_have(cli: Cli, tmp_path: Path) -> None:
    assert "cannot be the id of a DAG" in cli("dag", "init", str(tmp_path / "a b")).err
