"""leoflow_runtime in this process; the agent's integration tests run it for real."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import leoflow_runtime
from leoflow_runtime.arguments import arguments_for
from leoflow_runtime.entrypoint import load_callable
from leoflow_runtime.errors import InvalidResult, RuntimeFailure
from leoflow_runtime.runner import encode_result, main

SOURCES = sorted(Path(leoflow_runtime.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_parses_on_python_3_8_and_imports_the_standard_library_only(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    # What a DAG file of the Airflow Task SDK has imported before.
    further = {"airflow"} if path.name == "airflow_sdk.py" else set()
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "leoflow_runtime", *further}
    above = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not further or "airflow" not in ast.unparse(ast.Module(above, []))


def test_positional_only_parameters_and_defaults():
    def f(a, b=2, /, c=3, *, d=4):
        return a, b, c, d

    positional, named = arguments_for(f, {"LEOFLOW_CALL_ARGS_JSON": '{"a": 1, "d": 5}'})
    assert f(*positional, **named) == (1, 2, 3, 5)


def test_parameter_names_match_whatever_their_case():
    def f(myParam):  # noqa: N803
        return myParam

    assert arguments_for(f, {"LEOFLOW_XCOM_MYPARAM": "1"}) == ([], {"myParam": 1})


def test_keywords_keep_the_declared_spelling():
    def f(**kwargs):
        return kwargs

    environ = {"LEOFLOW_XCOM_ROWCOUNT": "1", "LEOFLOW_XCOM_PARAMS": '["rowCount"]'}
    assert arguments_for(f, environ) == ([], {"rowCount": 1})
    assert arguments_for(f, {"LEOFLOW_XCOM_ROWCOUNT": "1"}) == ([], {"rowcount": 1})


def test_an_xcom_from_a_file(tmp_path):
    (tmp_path / "x").write_text('["é"]', encoding="utf-8")
    assert arguments_for(lambda rows: rows, {"LEOFLOW_XCOMFILE_ROWS": str(tmp_path / "x")})[1] == {"rows": ["é"]}


def test_an_xcom_that_fits_no_parameter_is_ignored_with_a_word(capsys):
    assert arguments_for(lambda: None, {"LEOFLOW_XCOM_OTHER": "1"}) == ([], {})
    assert "'other'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({}, "'a'"),
        ({"LEOFLOW_CALL_ARGS_JSON": '{"a": 1, "z": 2}'}, "'z' fits no parameter"),
        ({"LEOFLOW_CALL_ARGS_JSON": "[1]"}, "not a JSON object"),
        ({"LEOFLOW_CALL_ARGS_JSON": "{"}, "LEOFLOW_CALL_ARGS_JSON is not JSON"),
        ({"LEOFLOW_XCOM_A": "{"}, "XCom input of parameter 'a' is not JSON"),
        ({"LEOFLOW_XCOMFILE_A": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_what_cannot_be_called_is_one_clear_line(environ, text):
    with pytest.raises(RuntimeFailure, match=text):
        arguments_for(lambda a: a, environ)


@pytest.mark.parametrize("entrypoint", ["json", "json:", ":dumps", "json:dumps.no", "no.such:f"])
def test_entry_points_that_do_not_exist(entrypoint):
    with pytest.raises(RuntimeFailure):
        load_callable(entrypoint)


def test_a_nested_attribute_is_found():
    assert load_callable("pathlib:Path.cwd")() == Path.cwd()


def test_a_missing_import_inside_the_module_is_the_users_traceback(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_callable("half_broken:f")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, object(), b"x"])
def test_what_is_not_json(value):
    with pytest.raises(InvalidResult, match="not JSON"):
        encode_result(value)


def test_a_circular_result_is_not_json():
    loop: list = []
    loop.append(loop)
    with pytest.raises(InvalidResult):
        encode_result(loop)


def test_text_is_utf_8_and_a_lone_surrogate_is_escaped():
    assert encode_result("é") == '"é"'.encode()
    assert encode_result("\ud800") == b'"\\ud800"'


def test_usage(capsys):
    assert main([]) == 2
    assert "module:callable" in capsys.readouterr().err
