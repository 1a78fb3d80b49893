"""How much of a log travels with an outcome."""

from __future__ import annotations

from leoflow_celery.executors.kubernetes.logs import tail_of


def test_the_last_lines() -> None:
    assert tail_of("a\nb\nc\n", 2) == ("b", "c")
    assert tail_of("", 2) == ()


def test_long_lines_are_left_out_from_the_front_and_a_single_one_is_cut() -> None:
    assert tail_of(f"{'x' * 30_000}\n{'y' * 30_000}\n", 50) == ("y" * 30_000,)
    (cut,) = tail_of("é" * 40_000, 50)
    assert cut == "…" + "é" * 16_384
