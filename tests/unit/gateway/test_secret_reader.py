"""The back ends in a row, and the reader that keeps their slowness from everybody else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

import pytest

from leoflow_celery.errors import ConfigurationError, Unavailable
from leoflow_celery.gateway import secret_backends, secrets
from leoflow_celery.gateway.rpc import NotPossible
from leoflow_celery.gateway.secret_backends import BackendFailed, Kind, Query
from leoflow_celery.gateway.secrets import MAX_QUESTIONS_OF_A_TENANT, Backends, SecretReader, open_backends
from leoflow_celery.settings import GatewaySettings, Settings
from tests.support.secret_backend import install


@pytest.fixture(autouse=True)
def every_warning_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_backends, "_warned", set())


class Scripted:
    """A back end that answers with what a test says, and remembers its questions."""

    def __init__(self, answer: Mapping[str, str] | Callable[[Query], Mapping[str, str]]) -> None:
        self.answer, self.asked = answer, []

    def get(self, query: Query) -> Mapping[str, str]:
        self.asked.append(query)
        return self.answer(query) if callable(self.answer) else self.answer


def raises(error: BaseException) -> Callable[[Query], Mapping[str, str]]:
    def answer(_: Query) -> Mapping[str, str]:
        raise error

    return answer


def query(tenant: str = "acme", dag: str = "sales", names: set[str] | None = None, task: str = "load") -> Query:
    return Query(Kind.VARIABLE, tenant, dag, "run", task, None if names is None else frozenset(names))


class TestInARow:
    def test_the_first_that_knows_a_name_wins(self):
        first, second = Scripted({"a": "1", "b": "1"}), Scripted({"b": "2", "c": "2"})
        backends = Backends({"first": first, "second": second})
        assert backends.get(query()) == {"a": "1", "b": "1", "c": "2"}
        assert backends.get(query(names={"b", "c", "d"})) == {"b": "1", "c": "2"}
        assert second.asked[-1].names == {"c", "d"}
        assert backends.get(query(names={"a"})) == {"a": "1"}
        assert len(second.asked) == 2, "nothing was left to ask for"

    def test_no_later_one_stands_in_for_one_that_fails(self):
        later = Scripted({"a": "another value"})
        backends = Backends({"first": Scripted(raises(BackendFailed("it is sealed"))), "later": later})
        with pytest.raises(Unavailable, match="secret back end 'first' cannot tell now: it is sealed"):
            backends.get(query())
        assert later.asked == []

    def test_an_earlier_answer_needs_no_later_one(self):
        later = Scripted(raises(BackendFailed("it is sealed")))
        assert Backends({"first": Scripted({"a": "1"}), "later": later}).get(query(names={"a"})) == {"a": "1"}

    def test_names_that_were_not_asked_for_go_no_further(self):
        assert Backends({"x": Scripted({"a": "1", "b": "2"})}).get(query(names={"a"})) == {"a": "1"}

    @pytest.mark.parametrize(
        "answer",
        [
            raises(RuntimeError("canary")),
            raises(SystemExit("canary")),
            raises(KeyboardInterrupt("canary")),
            raises(KeyError("canary")),
            raises(Unavailable("canary")),
            ["canary"],
            {"canary": 1},
            {1: "canary"},
            None,
        ],
    )
    def test_whatever_it_does_the_agent_hears_to_come_again_and_nobody_a_value(self, answer, caplog):
        with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable) as caught:
            Backends({"theirs": Scripted(answer)}).get(query())
        assert "secret back end 'theirs' cannot tell now" in str(caught.value)
        assert caught.value.__cause__ is None
        shown = [str(vars(record)) for record in caplog.records]
        assert "secrets.backend_failed" in str(shown)
        assert "canary" not in str(caught.value) + str(shown)

    def test_an_outage_is_a_line_now_and_then(self, caplog):
        backends = Backends({"theirs": Scripted(raises(RuntimeError()))})
        for _ in range(50):
            with pytest.raises(Unavailable):
                backends.get(query())
        assert len(caplog.records) == 1

    def test_names_and_values_that_no_process_takes_are_left_out_with_a_word(self, caplog):
        bad = {"a=canary": "1", "b\0": "1", "c": "canary\0", "d": "canary\ud800", "": "1"}
        for _ in range(3):
            assert Backends({"theirs": Scripted({**bad, "region": "eu"})}).get(query()) == {"region": "eu"}
        assert len(caplog.records) == len(bad)
        assert "theirs: variable 'a=' of tenant 'acme' is left out" in caplog.text
        assert "canary" not in caplog.text
        assert "\0" not in caplog.text

    def test_more_than_one_answer_takes_is_said(self):
        backends = Backends({name: Scripted({name: "x" * 3_000_000}) for name in "ab"})
        with pytest.raises(NotPossible, match=r"the variables of tenant 'acme' have 6000002 bytes"):
            backends.get(query())


class TestOpened:
    def test_a_package_adds_a_back_end(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(install(tmp_path / "site"))
        (tmp_path / "flat").mkdir()
        (tmp_path / "flat" / "who").write_text("file")
        settings = GatewaySettings(secret_backends=("files", "vault"), variables_path=tmp_path / "flat")
        backends = open_backends(settings)
        assert list(backends.by_name) == ["files", "vault"]
        assert backends.get(query("default")) == {"who": "file", "password": "of default"}
        assert backends.get(query("acme"))["who"] == "acme/sales/variable"
        assert backends.get(query(names={"password", "other"})) == {"password": "of acme"}
        for dag in ("broken", "exits", "list"):
            with pytest.raises(Unavailable) as caught:
                backends.get(query(dag=dag))
            assert "canary" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("valt", "there is no back end 'valt'; there are files, environment, command, vault, vault-fails"),
            ("vault-fails", "(somebodys_vault:fails) cannot be made: ValueError at "),
            ("vault-missing", "cannot be made: No module named 'somebodys_missing_module'"),
            ("vault-none", "(somebodys_vault:NoBackend) has no method get(query)"),
        ],
    )
    def test_one_that_cannot_work_stops_the_start(self, tmp_path, monkeypatch, name, says):
        monkeypatch.syspath_prepend(install(tmp_path / "site"))
        with pytest.raises(ConfigurationError) as caught:
            open_backends(GatewaySettings(secret_backends=(name,)))
        assert "LEOFLOW_GATEWAY_SECRET_BACKENDS" in str(caught.value)
        assert says in str(caught.value)
        assert "canary" not in str(caught.value)

    def test_the_setting_is_a_list(self, monkeypatch, tmp_path):
        assert open_backends(GatewaySettings()).by_name == {}, "no path is set: there is nothing to ask"
        monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_FILES", str(tmp_path))
        assert list(open_backends(GatewaySettings()).by_name) == ["files"]
        monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_BACKENDS", "environment, files")
        assert list(open_backends(GatewaySettings()).by_name) == ["environment", "files"]
        monkeypatch.delenv("LEOFLOW_GATEWAY_SECRET_FILES")
        monkeypatch.setenv("LEOFLOW_GATEWAY_SECRET_BACKENDS", "")
        assert open_backends(GatewaySettings()).by_name == {}

    @pytest.mark.parametrize("name", ["SECRET_FILES", "VARIABLES_PATH", "CONNECTIONS_PATH", "SECRETS_PATH"])
    def test_an_empty_path_is_none_and_not_the_working_directory(self, monkeypatch, name):
        monkeypatch.setenv(f"LEOFLOW_GATEWAY_{name}", "")
        assert open_backends(GatewaySettings()).by_name == {}

    def test_what_is_set_up_and_not_named_stops_the_start(self, tmp_path):
        for settings, says in (
            (GatewaySettings(secret_backends=("files", "files")), "names a back end twice"),
            (GatewaySettings(secret_command="/bin/true"), "LEOFLOW_GATEWAY_SECRET_COMMAND is set, and"),
            (GatewaySettings(secret_backends=(), secrets_path=tmp_path), "LEOFLOW_GATEWAY_SECRETS_PATH is set, and"),
        ):
            with pytest.raises(ConfigurationError, match=says):
                open_backends(settings)

    def test_the_environment_is_that_of_the_start_with_the_prefix(self, monkeypatch):
        monkeypatch.setenv("SITE_VARIABLE__acme__region", "eu")
        monkeypatch.setenv("LEOFLOW_VALUE_VARIABLE__acme__region", "us")
        backends = open_backends(GatewaySettings(secret_backends=("environment",)))
        assert backends.get(query()) == {"region": "us"}
        settings = GatewaySettings(secret_backends=("environment",), secret_environment_prefix="SITE_")
        assert open_backends(settings).get(query()) == {"region": "eu"}


class Gate:
    """A back end in which the questions of some tenants hang until the test lets them go."""

    def __init__(self, *hanging: str) -> None:
        self.hanging, self.opened = hanging, threading.Event()
        self.running, self.most, self.asked = 0, 0, 0
        self._lock = threading.Lock()

    def get(self, query: Query) -> Mapping[str, str]:
        with self._lock:
            self.asked += 1
            self.running += 1
            self.most = max(self.most, self.running)
        if query.tenant_id in self.hanging:
            self.opened.wait(60)
        with self._lock:
            self.running -= 1
        return {"tenant": query.tenant_id}


def reader_test(gate: Gate, body: Callable[[SecretReader], object], threads: int = 4, timeout: float = 0.3) -> None:
    async def run() -> None:
        reader = SecretReader(Backends({"gate": gate}), threads, timeout)
        try:
            await body(reader)
        finally:
            gate.opened.set()
            await reader.close()
            assert not reader._running
            await asyncio.sleep(0)
            assert (reader._flights, reader._questions) == ({}, {})

    asyncio.run(run())


async def failures(*asks: object) -> list[str]:
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers), answers
    return [str(answer) for answer in answers]


def test_a_tenant_whose_questions_hang_takes_half_of_the_threads_and_no_more():
    gate = Gate("evil")

    async def body(reader: SecretReader) -> None:
        said = await failures(*(reader.get(query("evil", task=f"t{number}")) for number in range(20)))
        assert set(said) == {"no secret back end answered within 0.3 s; ask again"}
        assert gate.running == 2
        assert await reader.get(query("good")) == {"tenant": "good"}
        assert await reader.get(query("good", task="other")) == {"tenant": "good"}
        await failures(reader.get(query("evil", task="more")))
        assert gate.most == 3

    reader_test(gate, body)


def test_a_question_asked_in_a_loop_is_one_question():
    gate = Gate("evil")

    async def body(reader: SecretReader) -> None:
        for _ in range(3):
            await failures(*(reader.get(query("evil")) for _ in range(100)))
        assert gate.asked == 1
        gate.opened.set()
        assert await reader.get(query("evil")) == {"tenant": "evil"}

    reader_test(gate, body)


def test_what_waited_too_long_is_not_asked_any_more():
    gate = Gate("evil")

    async def body(reader: SecretReader) -> None:
        await failures(*(reader.get(query("evil", task=f"t{number}")) for number in range(50)))
        gate.opened.set()
        while reader._flights:  # noqa: ASYNC110 - what we wait for is that nothing happens
            await asyncio.sleep(0.01)
        assert gate.asked == 2

    reader_test(gate, body)


def test_a_tenant_has_a_bounded_number_of_questions():
    gate = Gate("evil")

    async def body(reader: SecretReader) -> None:
        asks = [reader.get(query("evil", task=f"t{number}")) for number in range(MAX_QUESTIONS_OF_A_TENANT + 5)]
        said = await failures(*asks)
        assert sum("asks for more than 1024 things at a time" in text for text in said) == 5
        assert await reader.get(query("good")) == {"tenant": "good"}

    reader_test(gate, body)


def test_the_event_loop_goes_on_while_back_ends_hang():
    gate = Gate("evil")

    async def body(reader: SecretReader) -> None:
        asked = asyncio.gather(*(failures(reader.get(query("evil", task=f"t{n}"))) for n in range(50)))
        turns, began = 0, time.monotonic()
        while not asked.done():
            await asyncio.sleep(0.005)
            turns += 1
        assert time.monotonic() - began < 5
        assert turns >= 10
        await asked

    reader_test(gate, body)


def test_a_caller_that_goes_away_takes_nobodys_answer():
    gate = Gate("slow")

    async def body(reader: SecretReader) -> None:
        leaves, stays = asyncio.create_task(reader.get(query("slow"))), asyncio.create_task(reader.get(query("slow")))
        await asyncio.sleep(0)
        leaves.cancel()
        gate.opened.set()
        assert await stays == {"tenant": "slow"}

    reader_test(gate, body, timeout=10)


def test_a_thread_that_hangs_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(secrets, "_CLOSE_SECONDS", 0.1)
    gate = Gate("evil")

    async def run() -> None:
        reader = SecretReader(Backends({"gate": gate}), 2, 0.1)
        await failures(reader.get(query("evil")))
        await reader.close()

    asyncio.run(run())
    assert gate.running == 1
    assert "secrets.threads_left" in caplog.text
    gate.opened.set()


def test_settings_that_cannot_work_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SECRET_THREADS", "0"), ("SECRET_TIMEOUT_SECONDS", "0"), ("SECRET_COMMAND_TTL_SECONDS", "-1")):
        monkeypatch.setenv(f"LEOFLOW_GATEWAY_{name}", value)
        with pytest.raises(ConfigurationError, match=f"LEOFLOW_GATEWAY_{name}"):
            Settings.load()
        monkeypatch.delenv(f"LEOFLOW_GATEWAY_{name}")
