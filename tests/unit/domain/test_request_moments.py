"""The times that a request may carry."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.request import parse_request
from leoflow_celery.errors import InvalidRequest

REQUEST = {"task_instance_id": "t", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash", "entrypoint": "x"}


@pytest.mark.parametrize(
    "text", ["2030-01-31T00:00:00+00:00", "2030-01-31T00:00:00.5Z", "2030-01-31 00:00:00-03:30", ""]
)
def test_a_time_with_an_offset_is_taken_as_it_is(text: str) -> None:
    assert parse_request({**REQUEST, "logical_date": text}).logical_date == text


@pytest.mark.parametrize(
    "text",
    ["2030-01-31", "2030-01-31T00:00:00", "20300131T000000Z", "2030-W05-4T00:00:00Z", "2030-01-31\x0000:00:00Z", "now"],
)
def test_what_is_no_rfc_3339_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^data_interval_end: is not a time with an offset"):
        parse_request({**REQUEST, "data_interval_end": text})
