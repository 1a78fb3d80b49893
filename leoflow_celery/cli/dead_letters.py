"""``leoflow dead-letters``: messages that a worker refused, and attempts that could not be launched."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leoflow_celery.cli.output import echo_json, iso, note, table
from leoflow_celery.cli.target import JsonOption
from leoflow_celery.errors import InvalidRequest

if TYPE_CHECKING:
    from leoflow_celery.queueing.dead_letters import DeadLetter, DeadLetters
    from leoflow_celery.settings import Settings

app = typer.Typer(help="Messages that were refused, and attempts that could not be launched.", no_args_is_help=True)
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The id that 'leoflow dead-letters list' shows.")]


@contextmanager
def _opened() -> Iterator[tuple[DeadLetters, Settings]]:
    from leoflow_celery.queueing.dead_letters import DeadLetters
    from leoflow_celery.settings import Settings

    settings = Settings.load()
    letters = DeadLetters(settings)
    try:
        yield letters, settings
    finally:
        letters.close()


def _json(letter: DeadLetter) -> dict[str, Any]:
    return {**asdict(letter), "at": iso(letter.at)}


@app.command("list")
def list_letters(as_json: JsonOption = False) -> None:
    """List the dead letters, the newest first."""
    with _opened() as (letters, _):
        found = letters.all()
    if as_json:
        echo_json([_json(letter) for letter in found])
        return
    rows = [(one.id, str(iso(one.at)), one.queue, one.kind, one.task, one.sentence) for one in found]
    table(f"{len(found)} dead letters", ("id", "at", "queue", "kind", "task", "why"), _printable(rows))


def _printable(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Who can write to the broker can write a letter: of bounded length."""
    from leoflow_celery.domain.fields import printable

    return [tuple(printable(cell, 1_000) for cell in row) for row in rows]


@app.command()
def show(
    letter_id: IdArgument,
    body: Annotated[
        bool, typer.Option("--body", help="Print the message itself, with whatever secrets it holds. Needs the keys.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter: all that is known, and nothing that may be secret unless --body asks for it."""
    with _opened() as (letters, _):
        letter = letters.get(letter_id)
        if body:
            from leoflow_celery.domain.fields import printable

            body_text = letters.message(letter)
            # Exact for a file or a pipe; a terminal gets nothing that it obeys.
            is_shown = sys.stdout.isatty()
            typer.echo(printable(body_text.decode(errors="replace"), keep="\n\t") if is_shown else body_text)
            return
    if as_json:
        echo_json(_json(letter))
        return
    known = [(name, str(value)) for name, value in _json(letter).items() if value not in ("", 0)]
    table(f"dead letter {letter.id}", ("field", "value"), _printable(known))


@app.command()
def resend(letter_id: IdArgument) -> None:
    """Send it again, once: a message as it was to its queue, an attempt that was given up as the next try.

    A message that is still wrong becomes a dead letter again.
    """
    from leoflow_celery.queueing.dead_letters import GIVEN_UP

    with _opened() as (letters, settings):
        letter = letters.get(letter_id)
        if letter.kind == GIVEN_UP:
            note(_try_again(letter, settings))
            letters.drop(letter.id)
            return
        letters.send_again(letter)
    note(f"sent again to queue {letter.queue!r}")


def _try_again(letter: DeadLetter, settings: Settings) -> str:
    """Submit the request of a try that was given up as the next one: what has ended stays as it ended."""
    from leoflow_celery.client import Client
    from leoflow_celery.domain.reasons import NOT_LAUNCHED
    from leoflow_celery.queueing.messages import open_request

    with Client(settings) as client:
        view = client.task_instance(letter.task_instance_id)
        if view.try_number != letter.try_number or view.reason not in NOT_LAUNCHED:
            raise InvalidRequest(
                f"dead letter {letter.id}: task instance {view.task_instance_id!r} is at try {view.try_number}, state "
                f"{view.state}, and needs no other one for this letter; drop it",
                "id",
            )
        request = open_request(client.services.keys, view.sealed_request)
        # A token of the sender's own was for the try that ended.
        handle = client.submit(request.evolve(try_number=view.try_number + 1, agent_token=""))
    return (
        f"submitted {view.dag_id}.{view.task_id} again as try {handle.attempt.try_number}; "
        f"try {view.try_number} stays {view.state}"
    )


@app.command()
def drop(
    letter_id: Annotated[str | None, typer.Argument(metavar="ID", help="Which one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Drop a dead letter, or all of them."""
    if (letter_id is None) is not every:
        raise typer.BadParameter("name one dead letter, or give --all")
    with _opened() as (letters, _):
        if letter_id is None:
            note(f"dropped {letters.drop_all()} dead letters")
        else:
            letters.drop(letter_id)
            note(f"dropped {letter_id}")
