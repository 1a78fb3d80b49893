"""Who must not wait: what a client sends in a thread of its own, and calls that end after a limit."""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from leoflow_celery.errors import LeoflowError, Unavailable
from leoflow_celery.store.submissions import NewTry
from leoflow_celery.store.views import Submitted

log = logging.getLogger(__name__)
#: What is not sent by then, when a client is closed, is left to the control plane.
_CLOSING_SECONDS = 5.0
#: Calls without an answer, of one ``Within``: with so many under way another one is refused at once.
_MAX_UNANSWERED = 32

Work = Callable[[], object]


class Sender:
    """One daemon thread, started at first use, that does in turn what needs the broker. No failure ends it.

    Everything it does is done by the control plane as well, some seconds later, so what fails is logged and let go.
    """

    def __init__(self, send: Callable[[Sequence[NewTry], Sequence[Submitted]], None]) -> None:
        self._send = send
        self._work: queue.SimpleQueue[Work | tuple[Sequence[NewTry], Sequence[Submitted]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def send(self, tries: Sequence[NewTry], submitted: Sequence[Submitted]) -> None:
        """Send these tries soon, together with what else waits."""
        self._put((tries, submitted))

    def run(self, work: Work) -> None:
        self._put(work)

    def _put(self, item: Work | tuple[Sequence[NewTry], Sequence[Submitted]]) -> None:
        self._work.put(item)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # also in a forked child
                self._thread = threading.Thread(target=self._run, name="leoflow-sender", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            # Whatever waits goes together: while the broker is away, one timeout serves them all.
            items, is_closing = [self._work.get()], False
            while not self._work.empty():
                items.append(self._work.get())
            tries: list[NewTry] = []
            submitted: list[Submitted] = []
            for item in items:
                if item is None:
                    is_closing = True
                elif isinstance(item, tuple):
                    tries += item[0]
                    submitted += item[1]
                else:
                    _attempt(item)
            if tries:
                _attempt(functools.partial(self._send, tries, submitted))
            if is_closing:
                return

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            self._work.put(None)
            thread.join(_CLOSING_SECONDS)


def _attempt(work: Work) -> None:
    try:
        work()
    except LeoflowError as error:
        log.warning("client.send_delayed", extra={"error": str(error)})
    except Exception:
        log.exception("client.send_failed")


class Within:
    """Another object, whose methods raise Unavailable when they have no answer after ``seconds``."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds
        self._free = threading.Semaphore(_MAX_UNANSWERED)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return functools.wraps(found)(functools.partial(self._call, name, found)) if callable(found) else found

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._free.acquire(blocking=False):
            raise Unavailable(f"{name}: {_MAX_UNANSWERED} calls have no answer yet; a server is away, try again later")
        ended = threading.Event()
        answer: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(method(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                failure.append(error)
            finally:
                self._free.release()
                ended.set()

        threading.Thread(target=work, name=f"leoflow-{name}", daemon=True).start()
        if not ended.wait(self._seconds):
            raise Unavailable(
                f"{name} has no answer after {self._seconds:g} s; it may still be done, and repeating it is safe"
            )
        if failure:
            raise failure[0]
        return answer[0]
