"""What ``tests.unit.test_confined`` asks a confined process to do."""

from __future__ import annotations

import signal

from leoflow_celery.confined import serve


def answer(question: bytes) -> bytes:
    if question == b"burn":
        while True:
            pass
    if question == b"fill":
        return bytes(4 << 30)[:1]
    if question == b"wait":
        signal.pause()
    return question[::-1]


if __name__ == "__main__":
    serve(answer)
