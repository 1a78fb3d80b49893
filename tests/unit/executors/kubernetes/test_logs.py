"""How much of a log travels with an outcome."""

from __future__ import annotations

from leoflow_celery.executors.kubernetes.reconcile import _READ_BYTES, _read, tail_of


def test_the_last_lines() -> None:
    assert tail_of("a\nb\nc\n", 2) == ("b", "c")
    assert tail_of("", 2) == ()


def test_fewer_lines_are_asked_for_when_the_kubelet_would_cut_off_the_last() -> None:
    asked: list[int] = []
    log = [f"{number} {'x' * 100_000}" for number in range(50)]

    def ask(lines: int) -> str:
        asked.append(lines)
        return "\n".join(log[-lines:])[:_READ_BYTES]

    assert tail_of(_read(ask, 50), 50)[-1].endswith("x" * 100)
    assert _read(ask, 50).splitlines() == log[-6:]
    assert asked == [50, 6] * 2
    asked.clear()
    assert len(_read(lambda lines: asked.append(lines) or "é" * _READ_BYTES, 50)) == _READ_BYTES
    assert asked == [50, 6, 1]


def test_long_lines_are_left_out_from_the_front_and_a_single_one_is_cut() -> None:
    assert tail_of(f"{'x' * 30_000}\n{'y' * 30_000}\n", 50) == ("y" * 30_000,)
    (cut,) = tail_of("é" * 40_000, 50)
    assert cut == "…" + "é" * 16_384
