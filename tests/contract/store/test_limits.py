"""Ids as large as a request may have them fit every key and index of both databases."""

from __future__ import annotations

import random

import pytest

from leoflow_celery.domain.fields import MAX_ID_BYTES
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.store import Store
from tests.contract.store.rows import claim, submit

LETTERS = {
    1: "abcdefghijklmnopqrstuvwxyz0123456789",
    2: "äöüßéèêçñøåæ",
    3: "日本語漢字仮名交文章",
    4: "🚀🌍🎉🔥🐍🦀🐘🦜",
}


@pytest.mark.parametrize("width", LETTERS)
def test_the_longest_ids_are_stored_or_refused_at_the_door(store: Store, width: int) -> None:
    """Random text, so that no database compresses it below its limit."""
    pick = random.Random(width)
    ids = ["".join(pick.choices(LETTERS[width], k=MAX_ID_BYTES // width)) for _ in range(6)]
    attempt = submit(store, ids[0], tenant_id=ids[1], dag_id=ids[2], run_id=ids[3], task_id=ids[4])
    guard = claim(store, attempt)
    key = XComKey(ids[1], ids[2], ids[3], ids[4], ids[5])
    store.runs.create(ids[1], ids[2], ids[3])
    store.attempts.finish(attempt, Outcome.success(), guard, [(key, XComValue(b"1"))])
    assert store.xcom.get(key) is not None
    [view] = store.runs.task_instances(ids[1], ids[2], ids[3])
    assert view.task_instance_id == ids[0]


@pytest.mark.parametrize("field", ["task_instance_id", "tenant_id", "dag_id", "run_id", "task_id"])
@pytest.mark.parametrize("width", LETTERS)
def test_one_more_byte_is_refused_by_name(field: str, width: int) -> None:
    longer = LETTERS[width][0] * (MAX_ID_BYTES // width + 1)
    fields = {"task_instance_id": "a", "dag_id": "d", "run_id": "r", "task_id": "t", field: longer}
    with pytest.raises(InvalidRequest, match=f"{field}: must have 1 to 512 bytes"):
        parse_request({**fields, "operator": "bash", "entrypoint": "true"})
