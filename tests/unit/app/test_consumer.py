"""Acknowledgements are kept by the worker's holder until Redis heard them."""

from __future__ import annotations

from leoflow_celery.app.transport import Holder


def test_what_redis_may_not_have_heard_is_said_again() -> None:
    holder, woken = Holder(20), list[bool]()
    holder.wake = lambda: woken.append(True)
    holder.held = {"a", "b"}
    holder.done("a")
    assert (holder.take_done(), holder.held, woken) == (["a"], {"b"}, [True])
    holder.not_done(["a"])
    assert holder.take_done() == ["a"]
    assert not holder.has_done


def test_after_a_lost_connection_only_what_somebody_works_on_is_renewed() -> None:
    holder = Holder(20)
    holder.held = {"running", "reserved", "ended"}
    holder.done("ended")
    holder.keep_only({"running"})
    assert holder.held == {"running", "ended"}
    assert holder.take_done() == ["ended"]
