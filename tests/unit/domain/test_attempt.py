"""Names derived from an attempt: legal everywhere, the same for the same attempt, different for any other."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.domain.attempt import (
    MAX_NUMBER,
    AttemptId,
    attempt_name,
    celery_task_id,
    is_try_id,
    label_value,
    sanitise,
    staging_claim_name,
)

DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
#: From apimachinery's validation of label values.
LABEL = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")

texts = st.text(max_size=200) | st.text("aA0-_. é", max_size=80)
storable = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=128)
attempts = st.builds(AttemptId, texts, st.integers(1, 1_000_000), st.integers(1, 1_000))


@given(attempts, texts, texts)
def test_an_attempt_name_is_a_dns_label(attempt: AttemptId, dag_id: str, task_id: str) -> None:
    assert DNS_LABEL.fullmatch(attempt_name(attempt, dag_id, task_id))


def test_an_attempt_name_never_changes() -> None:
    """Pods and containers of the previous release carry it: another name would start the same attempt twice."""
    name = attempt_name(AttemptId("7f9c", 2, 1), "Sales_EU", "load.orders")
    assert name == "leoflow-sales-eu-load-orders-2-90ff56b46e"


@given(st.sets(attempts, min_size=2, max_size=2), texts, texts)
def test_two_attempts_never_share_a_name(pair: set[AttemptId], dag_id: str, task_id: str) -> None:
    first, second = pair
    assert attempt_name(first, dag_id, task_id) != attempt_name(second, dag_id, task_id)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (AttemptId("a_b"), AttemptId("a-b")),
        (AttemptId("A"), AttemptId("a")),
        (AttemptId("a", 1, 11), AttemptId("a", 11, 1)),
        (AttemptId("a", 1, 1), AttemptId("a", 1, 2)),
        (AttemptId("x" * 300 + "1"), AttemptId("x" * 300 + "2")),
    ],
)
def test_ids_that_sanitise_alike_have_their_own_names(first: AttemptId, second: AttemptId) -> None:
    assert attempt_name(first, "dag", "task") != attempt_name(second, "dag", "task")


@given(texts)
def test_a_label_value_is_legal(text: str) -> None:
    value = label_value(text)
    assert len(value) <= 63
    assert LABEL.fullmatch(value)


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_a_label_value_that_is_legal_already_stays_readable(text: str) -> None:
    assert label_value(text) == text


@given(texts, texts)
def test_label_values_of_different_texts_differ(first: str, second: str) -> None:
    assert (label_value(first) == label_value(second)) == (first == second)


@given(texts.filter(bool), texts.filter(bool))
def test_a_staging_claim_name_is_a_dns_label(dag_id: str, run_id: str) -> None:
    assert DNS_LABEL.fullmatch(staging_claim_name(dag_id, run_id))


hyphenated = st.text("ab-", min_size=1, max_size=6)


@given(st.tuples(hyphenated, hyphenated), st.tuples(hyphenated, hyphenated))
def test_two_runs_never_share_a_staging_volume(first: tuple[str, str], second: tuple[str, str]) -> None:
    assert (staging_claim_name(*first) == staging_claim_name(*second)) == (first == second)


def test_a_staging_claim_name_reads_well_when_it_can() -> None:
    assert staging_claim_name("sales", "manual-2026-01-01") == "leoflow-staging-sales-manual-2026-01-01"
    assert staging_claim_name("a", "b-c") != staging_claim_name("a-b", "c")


def test_two_tenants_never_share_a_staging_volume() -> None:
    names = {staging_claim_name("sales", "one", tenant) for tenant in ("default", "a", "b")}
    assert len(names) == 3
    assert all(DNS_LABEL.fullmatch(name) for name in names)


@given(texts)
def test_sanitising_twice_changes_nothing(text: str) -> None:
    assert sanitise(sanitise(text)) == sanitise(text)


def test_the_celery_id_belongs_to_the_try() -> None:
    assert uuid.UUID(celery_task_id("ti", 1)).version == 5
    assert celery_task_id("ti", 1) == celery_task_id("ti", 1)
    assert celery_task_id("ti", 1) != celery_task_id("ti", 2)
    assert celery_task_id("ti1", 1) != celery_task_id("ti", 11)


@given(texts, st.integers(1, 1_000))
def test_the_celery_id_of_a_try_can_be_told_from_any_other(task_instance_id: str, try_number: int) -> None:
    assert is_try_id(celery_task_id(task_instance_id, try_number))
    assert not is_try_id(str(uuid.uuid5(uuid.NAMESPACE_URL, task_instance_id)))


@given(storable, st.integers(1, MAX_NUMBER), st.integers(1, 1_000))
def test_an_attempt_survives_json(identity: str, number: int, launch: int) -> None:
    attempt = AttemptId(identity, number, launch)
    assert AttemptId.from_json(attempt.to_json()) == attempt


@pytest.mark.parametrize("number", [0, -1, 10**30, float("inf"), float("nan"), 1.5, "1", True, None, []])
def test_what_no_column_takes_is_no_attempt(number: object) -> None:
    for name in ("try_number", "launch"):
        with pytest.raises(ValueError, match=f"{name} is not a whole number in 1..1000000"):
            AttemptId.from_json({"task_instance_id": "ti", "try_number": 1, name: number})


@pytest.mark.parametrize("identity", ["", "a\0", "\ud800", "a" * 513, "é" * 257, 1, None, ["a"]])
def test_what_is_no_id_is_no_attempt(identity: object) -> None:
    with pytest.raises(ValueError, match=r"task_instance_id|surrogates"):
        AttemptId.from_json({"task_instance_id": identity, "try_number": 1})


def test_an_attempt_of_a_sender_that_knows_no_launches_is_the_first() -> None:
    assert AttemptId.from_json({"task_instance_id": "ti", "try_number": 3}) == AttemptId("ti", 3, 1)
    assert str(AttemptId("ti", 3).evolve(launch=2)) == "ti/3.2"
