"""The page itself: it asks for nothing, runs its own script only, and holds what users chose as data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from dataclasses import replace

import pytest

from leoflow_celery.domain.states import TaskState
from leoflow_celery.report.data import Found, build
from leoflow_celery.report.page import render
from tests.support.reports import HOSTILE, T0, large, run_view, view


def page_of(found: Found, dag_id: str = "sales") -> str:
    return render(build("default", dag_id, "r1", found))


@pytest.fixture
def hostile() -> str:
    """A page in which everything that users choose is hostile."""
    one = replace(view(HOSTILE), state=TaskState.FAILED, reason=HOSTILE, message=HOSTILE, hostname=HOSTILE)
    specs = {HOSTILE: {"task_id": HOSTILE, "type": HOSTILE, "trigger_rule": HOSTILE, "depends_on": []}}
    earlier = [run_view(HOSTILE, at=-100)]
    found = Found(
        run_view(dag_version=HOSTILE), [one], T0, specs, xcoms=[(HOSTILE, HOSTILE, 3)], earlier=earlier,
        tail_of=lambda _: [HOSTILE, "{{data}} {{policy}}"],
    )  # fmt: skip
    return page_of(found, HOSTILE)


def test_what_users_chose_ends_no_script_and_begins_no_element(hostile: str) -> None:
    assert hostile.count("</script>") == 2
    assert "<img" not in hostile
    assert "\x1b" not in hostile
    assert "\u202e" not in hostile
    [data] = re.findall(r'id="data">(.*?)</script>', hostile)
    parsed = json.loads(data)
    assert parsed["tasks"][0]["id"] == "</script><img src=x onerror=alert(1)>\\x1b[2J\\u202egnp"
    assert parsed["tasks"][0]["tries"][0]["log"][1] == "{{data}} {{policy}}"


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(hostile: str) -> None:
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', hostile)
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives.pop("default-src") == "'none'"
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", hostile, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert directives == {"base-uri": "'none'", "form-action": "'none'"}


def test_it_names_nothing_to_load() -> None:
    page = page_of(large(3))
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(\S+)", page) == []
    assert set(re.findall(r"https?://\S+?(?=\")", page)) == {"http://www.w3.org/2000/svg"}


def test_a_thousand_tasks_are_made_in_two_seconds_and_a_few_megabytes() -> None:
    found = large(1_000)
    before = time.process_time()
    page = page_of(found)
    assert time.process_time() - before < 2.0
    assert len(page) < 4_000_000
