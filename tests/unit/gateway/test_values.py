from __future__ import annotations

import json
import logging

import pytest

from leoflow_celery.gateway.values import open_provider


def test_names_and_values_that_no_process_takes_are_left_out_with_a_word(tmp_path, caplog):
    path = tmp_path / "variables.json"
    bad = {"a=canary": "1", "b\0": "1", "c": "canary\0", "d": "canary\ud800", "": "1"}
    path.write_text(json.dumps({**bad, "region": "eu"}))
    with caplog.at_level(logging.WARNING):
        assert open_provider(path, "LEOFLOW_GATEWAY_VARIABLES_PATH").values() == {"region": "eu"}
    assert sorted(record.args[1] for record in caplog.records) == ["", "a=", "b\0", "c", "d"]
    assert "LEOFLOW_GATEWAY_VARIABLES_PATH: 'a=' is left out" in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.parametrize("name", ["a=b", "=x"])
def test_the_same_of_a_directory(tmp_path, name):
    (tmp_path / name).write_text("1")
    (tmp_path / "region").write_text("eu\n")
    assert open_provider(tmp_path, "LEOFLOW_GATEWAY_VARIABLES_PATH").values() == {"region": "eu"}
