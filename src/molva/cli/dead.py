"""``molva dead``: ratings that could not be counted, and why."""

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva._base.ids import format_id
from molva.cli.exits import translated_errors
from molva.cli.options import deployment_options, json_option

if TYPE_CHECKING:
    from molva.messaging import DeadLetter
    from molva.ratings.deployment import Deployment

__all__ = ["dead"]


@click.command()
@deployment_options
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Oldest first."
)
@json_option
def dead(deployment: "Deployment", data: Path, limit: int, as_json: bool) -> None:
    """Show ratings that were accepted and could not be counted, with the reason.

    Safe beside a running service: looking takes nothing from the workers.
    """
    from molva.ratings.deployment import SUBSCRIPTION

    async def read() -> "list[DeadLetter]":
        async with await deployment.open_topic() as topic:
            return await topic.dead_letters(SUBSCRIPTION, limit)

    with translated_errors():
        found = asyncio.run(read())
    for letter in found:
        died_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(letter.died_at_us / 1e6))
        id_ = format_id(letter.message.id)
        body = letter.message.body.decode("utf-8", "backslashreplace")
        if as_json:
            document = {"id": id_, "died_at": died_at, "reason": letter.reason, "body": body}
            click.echo(json.dumps(document))
        else:
            click.echo(f"{died_at}  {id_}  {letter.reason}  {body[:200]!a}")
    if not found and not as_json:
        click.echo("no dead letters")
