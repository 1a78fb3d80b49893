"""Agent tokens: what they prove, and every way in which they do not."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import jwt
import pytest

from leoflow_celery.clock import ServerClock
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import Operator, TaskRequest
from leoflow_celery.domain.xcom import XComKey
from leoflow_celery.errors import ConfigurationError, InvalidToken
from leoflow_celery.security import TokenIssuer, holder_name, tokens

SECRET = "0123456789abcdef0123456789abcdef"
ATTEMPT = AttemptId("ti-1", 2, 3)
REQUEST = TaskRequest(
    task_instance_id="ti-1",
    tenant_id="acme",
    dag_id="sales",
    run_id="manual:1",
    task_id="load",
    try_number=2,
    operator=Operator.BASH,
    entrypoint="true",
    timeout_seconds=500,
)


@pytest.fixture
def issuer() -> TokenIssuer:
    return TokenIssuer(SECRET, ttl_seconds=100)


def claims(**changes: Any) -> dict[str, Any]:
    """What another program that knows the secret would sign; a claim of None is left out."""
    now = int(time.time())
    made = {
        "iss": "leoflow",
        "aud": ["leoflow-agent"],
        "sub": "ti-1",
        "tenant_id": "acme",
        "dag_id": "sales",
        "run_id": "manual:1",
        "task_id": "load",
        "try_number": 2,
        "iat": now,
        "exp": now + 60,
        **changes,
    }
    return {name: value for name, value in made.items() if value is not None}


def signed(secret: str = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    return jwt.encode(claims(**changes), secret, algorithm=algorithm)


def refused(issuer: TokenIssuer, token: str) -> InvalidToken:
    with pytest.raises(InvalidToken) as error:
        issuer.verify(token)
    return error.value


def test_a_token_proves_one_attempt_of_one_task(issuer: TokenIssuer) -> None:
    identity = issuer.verify(issuer.mint(REQUEST, ATTEMPT))
    assert identity.attempt == ATTEMPT
    assert (identity.tenant_id, identity.dag_id, identity.run_id, identity.task_id) == (
        "acme",
        "sales",
        "manual:1",
        "load",
    )
    assert identity.xcom_key() == XComKey("acme", "sales", "manual:1", "load", "return_value")
    assert identity.xcom_key("", "extract") == XComKey("acme", "sales", "manual:1", "extract", "return_value")
    assert identity.xcom_key("rows").key == "rows"


def test_the_claims_are_the_protocols_and_outlive_the_task(issuer: TokenIssuer) -> None:
    token = issuer.mint(REQUEST, ATTEMPT)
    decoded = jwt.decode(token, SECRET, algorithms=["HS256"], audience="leoflow-agent", issuer="leoflow")
    assert decoded["sub"] == "ti-1"
    assert decoded["aud"] == ["leoflow-agent"]
    assert decoded["exp"] - decoded["iat"] == 100 + 500
    assert decoded == {**claims(), "launch": 3, "iat": decoded["iat"], "exp": decoded["exp"]}


def test_a_scheduler_that_shares_the_secret_mints_tokens_for_the_first_launch(issuer: TokenIssuer) -> None:
    assert issuer.verify(signed()).attempt == AttemptId("ti-1", 2, 1)


def test_a_clock_that_is_ahead_does_not_matter(issuer: TokenIssuer) -> None:
    ahead = int(time.time()) + 30
    assert issuer.verify(signed(iat=ahead, exp=ahead + 60)).task_id == "load"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "somebody"}, "foreign"),
        ({"aud": ["leoflow-admin"]}, "foreign"),
        ({"aud": "leoflow"}, "foreign"),
        ({"exp": 1}, "expired"),
        ({"exp": int(time.time())}, "expired"),
        ({"try_number": "two"}, "malformed"),
        ({"try_number": [2]}, "malformed"),
        ({"exp": "soon"}, "malformed"),
        ({"sub": 7}, "malformed"),
    ],
)
def test_signed_tokens_that_prove_nothing_here(issuer: TokenIssuer, changes: dict[str, Any], reason: str) -> None:
    assert refused(issuer, signed(**changes)).reason == reason


@pytest.mark.parametrize("name", [name for name in claims() if name != "launch"])
def test_no_claim_may_be_missing(issuer: TokenIssuer, name: str) -> None:
    assert refused(issuer, signed(**{name: None})).reason in ("malformed", "foreign")


def test_a_token_of_another_secret_is_forged(issuer: TokenIssuer) -> None:
    assert refused(issuer, signed("another-secret-of-32-bytes-at-least")).reason == "forged"


def test_a_changed_token_is_forged(issuer: TokenIssuer) -> None:
    head, body, signature = issuer.mint(REQUEST, ATTEMPT).split(".")
    content = json.loads(base64.urlsafe_b64decode(body + "=="))
    content["task_id"] = "somebody-elses"
    changed = base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()
    assert refused(issuer, f"{head}.{changed}.{signature}").reason == "forged"


def test_the_algorithm_is_not_the_tokens_choice(issuer: TokenIssuer) -> None:
    unsigned = jwt.encode(claims(), None, algorithm="none")
    assert refused(issuer, unsigned).reason == "malformed"
    assert refused(issuer, signed(SECRET * 2, "HS512")).reason == "malformed"


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "Bearer x.y.z", "é\x00", "." * 10_000, "eyJ.eyJ."])
def test_what_is_no_token_at_all(issuer: TokenIssuer, token: str) -> None:
    assert refused(issuer, token).reason == ("malformed" if token else "missing")


def test_a_token_that_was_good_expires_although_it_is_remembered(
    issuer: TokenIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = issuer.mint(REQUEST, ATTEMPT)
    issuer.verify(token)
    later = time.time() + 601
    monkeypatch.setattr(time, "time", lambda: later)
    assert refused(issuer, token).reason == "expired"


@pytest.mark.parametrize("seconds_off", [-120, 120, 86_400])
def test_a_token_is_as_old_as_the_brokers_clock_says(
    seconds_off: float, issuer: TokenIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gateway renews a token, and another one, whose own clock is off, takes it."""
    broker, right = 1_800_000_000.0, ServerClock()
    short = TokenIssuer(SECRET, ttl_seconds=60, renewed_ttl_seconds=30)
    request = REQUEST.evolve(timeout_seconds=0)

    def on_a_host(off: float) -> None:
        monkeypatch.setattr(time, "time", lambda: broker + off)
        right.read(lambda: broker)

    monkeypatch.setattr(tokens, "broker_clock", right)
    on_a_host(0)
    token = short.mint(request, ATTEMPT)
    renewed = short.renew(short.verify(token), "holder")
    on_a_host(seconds_off)
    assert short.verify(token).attempt == short.verify(renewed).attempt == ATTEMPT
    of_that_host = short.mint(request, ATTEMPT)
    on_a_host(0)
    assert short.verify(of_that_host).attempt == ATTEMPT
    broker += 61
    on_a_host(seconds_off)
    assert refused(short, token).reason == refused(short, renewed).reason == "expired"


def test_a_short_secret_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigurationError, match="LEOFLOW_JWT_SECRET") as error:
        TokenIssuer("short-secret", 100)
    assert "short-secret" not in str(error.value)


def test_errors_never_repeat_the_token(issuer: TokenIssuer) -> None:
    token = signed("another-secret-of-32-bytes-at-least")
    assert token not in str(refused(issuer, token))
    assert token.split(".")[2] not in repr(refused(issuer, token))


def test_keys_rotate_newest_first() -> None:
    new, old = "n" * 40, "o" * 40
    before, rotating, after = (TokenIssuer(text, 100) for text in (old, f"{new}, {old}", new))
    token = rotating.mint(REQUEST, ATTEMPT)
    assert after.verify(token) == rotating.verify(token)
    assert rotating.verify(before.mint(REQUEST, ATTEMPT)).attempt == ATTEMPT
    assert refused(after, before.mint(REQUEST, ATTEMPT)).reason == "forged"
    assert refused(before, token).reason == "forged"


def test_a_secret_may_hold_a_comma_as_it_could_before_there_were_several() -> None:
    short, long = "a secret, thirty-two bytes or more", f"{'a' * 40},{'b' * 40}"
    for text in (short, long):
        token = jwt.encode(claims(), text, algorithm="HS256")
        assert TokenIssuer(text, 100).verify(token).task_id == "load"
    with pytest.raises(ConfigurationError, match="LEOFLOW_JWT_SECRET"):
        TokenIssuer("short,er", 100)


def test_a_renewed_token_is_short_and_names_its_holder(issuer: TokenIssuer) -> None:
    launch = issuer.verify(issuer.mint(REQUEST, ATTEMPT))
    assert (launch.holder, launch.renew_at) == ("", 0.0)
    holder = holder_name(ATTEMPT, "session", renews=True)
    renewed = issuer.verify(issuer.renew(launch, holder))
    assert (renewed.attempt, renewed.tenant_id, renewed.holder) == (ATTEMPT, "acme", holder)
    assert renewed.expires_at == pytest.approx(time.time() + 900, abs=30)
    assert renewed.renew_at == pytest.approx(time.time() + 300, abs=30)


def test_a_holder_is_another_one_for_each_attempt_launch_session_and_kind() -> None:
    names = {
        holder_name(ATTEMPT, "session"),
        holder_name(ATTEMPT, "session", renews=True),
        holder_name(ATTEMPT, "another"),
        holder_name(ATTEMPT.evolve(launch=ATTEMPT.launch + 1), "session"),
        holder_name(ATTEMPT.evolve(task_instance_id="other"), "session"),
    }
    assert len(names) == 5
    assert not [name for name in names if "session" in name]


@pytest.mark.parametrize("changes", [{"holder": 5}, {"exp": float("nan")}, {"exp": float("inf")}])
def test_a_signed_claim_of_the_wrong_kind_is_malformed(issuer: TokenIssuer, changes: dict[str, Any]) -> None:
    assert refused(issuer, signed(**changes)).reason == "malformed"
