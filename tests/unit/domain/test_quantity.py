"""Quantities mean what the Kubernetes API server and its Python client take them for."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity as client_parse_quantity

from leoflow_celery.domain.quantity import parse_quantity

UNITS = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
numbers = st.from_regex(r"[0-9]{1,6}(\.[0-9]{1,3})?|\.[0-9]{1,3}", fullmatch=True)


@given(numbers, st.sampled_from(UNITS))
def test_it_agrees_with_the_client_library(number: str, unit: str) -> None:
    assert parse_quantity(number + unit) == client_parse_quantity(number + unit)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", "0.5"),
        ("2", "2"),
        ("+2", "2"),
        ("1.5", "1.5"),
        ("2.", "2"),
        ("128Mi", str(128 * 1024**2)),
        ("1e3", "1000"),
        ("1E3", "1000"),
        ("1e-3", "0.001"),
        ("1E", "1000000000000000000"),
        ("0", "0"),
    ],
)
def test_every_form_of_the_grammar(text: str, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


REFUSED = (
    *("", " ", "-1", "-500m", "1 Gi", " 1", "1\n", "1gi", "1GB", "1Kb", "1K", "abc", ".", "m", "1e", "1mm", "0x10"),
    *("١", "1_000", "Infinity", "NaN", "1e3Mi", "1e1000"),
)


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a Kubernetes quantity; write for example 500m, 2, 128Mi or 1Gi"):
        parse_quantity(text)
