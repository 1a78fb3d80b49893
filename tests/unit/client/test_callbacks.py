"""link and link_error of submit."""

from __future__ import annotations

import pytest
from celery import chain, signature

from leoflow_celery.client.client import signatures
from leoflow_celery.errors import InvalidRequest


def test_one_or_many_or_none():
    one = signature("user.note", args=(1,), queue="user")
    assert signatures("link", None) == []
    assert signatures("link", one) == signatures("link", [one])
    assert [item["task"] for item in signatures("link", (one, chain(one, one)))] == ["user.note", "celery.chain"]
    assert signatures("link", one)[0]["options"] == {"queue": "user"}


@pytest.mark.parametrize("given", ["user.note", 3, {}, {"task": None}, [None]])
def test_what_is_no_signature_is_refused_by_its_field(given: object):
    with pytest.raises(InvalidRequest, match=r"link_error: .*signature") as caught:
        signatures("link_error", given)
    assert caught.value.field == "link_error"


def test_a_signature_that_is_no_json_is_refused():
    with pytest.raises(InvalidRequest, match=r"'user\.note' is no JSON"):
        signatures("link", signature("user.note", args=(object(),)))
