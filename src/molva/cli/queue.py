"""``molva queue``: look into a queue or subscription, empty it, send dead letters back."""

import asyncio
import base64
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Final, TypeVar
from uuid import UUID

import click

from molva._base.ids import format_id
from molva.cli.exits import USAGE, fail, translated_errors
from molva.cli.options import json_option
from molva.messaging import (
    DeadLetter,
    Message,
    Queue,
    Subscription,
    open_queue,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.url import BrokerURL

__all__ = ["queue"]

T = TypeVar("T")

# Characters of a body that people are shown.
_SHOWN: Final = 200

limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many."
)


@click.group()
def queue() -> None:
    """Look into a queue or a subscription, empty it, send its dead letters back.

    URL names one: 'sqlite:///var/lib/app/queue.db?queue=mails', or '...?topic=orders&
    subscription=billing'. Nothing is made that is missing. A subscription is joined for the
    moment: other consumers may wait a quarter of a second for lanes that come back to them.
    """


@queue.command()
@click.argument("url")
@json_option
def stat(url: str, as_json: bool) -> None:
    """Show how much waits. With a topic's URL: in each of its subscriptions."""
    parsed = _parse(url)

    async def read() -> dict[str, dict[str, object]]:
        if parsed.queue is not None:
            async with await open_queue(_existing(url), require=("stat",)) as opened:
                found = await opened.stat()
                return {} if found is None else {opened.name: asdict(found)}
        async with await open_topic(_existing(url), require=("stat",)) as topic:
            of_topic = await topic.stat()
            if of_topic is None:
                return {}
            return {
                name: asdict(one)
                for name, one in of_topic.subscriptions.items()
                if parsed.subscription in (None, name)
            }

    with translated_errors():
        stats = asyncio.run(read())
    if as_json:
        click.echo(json.dumps(stats))
        return
    for name, values in stats.items():
        shown = "  ".join(f"{field} {_number(value)}" for field, value in values.items())
        click.echo(f"{name}  {shown}")
    if not stats:
        click.echo("nothing to show: no subscription", err=True)


@queue.command()
@click.argument("url")
@limit_option
@json_option
def peek(url: str, limit: int, as_json: bool) -> None:
    """Show waiting messages without taking them, next first."""
    found = _with_consumer(url, lambda opened: opened.peek(limit))
    for one in found:
        line: dict[str, object] = {
            "state": one.state,
            "attempts": one.attempts,
            "stored_at": _instant(one.stored_at_us),
        }
        _show(one.message, line, as_json)
    if not found and not as_json:
        click.echo("nothing waits")


@queue.command()
@click.argument("url")
@limit_option
@json_option
def dead(url: str, limit: int, as_json: bool) -> None:
    """Show dead letters, oldest first, with the reason of each."""
    parsed = _parse(url)

    async def read() -> list[DeadLetter]:
        if parsed.queue is not None:
            async with await open_queue(_existing(url)) as opened:
                return await opened.dead_letters(limit)
        if parsed.subscription is None:
            fail(USAGE, f"{parsed}: names no subscription; add &subscription=process")
        # From the sending side: looking takes nothing from those who consume.
        async with await open_topic(_existing(url)) as topic:
            return await topic.dead_letters(parsed.subscription, limit)

    with translated_errors():
        found = asyncio.run(read())
    for one in found:
        line: dict[str, object] = {
            "died_at": _instant(one.died_at_us),
            "attempts": one.attempts,
            "reason": one.reason,
            "origin": one.origin,
        }
        _show(one.message, line, as_json)
    if not found and not as_json:
        click.echo("no dead letters")


@queue.command()
@click.argument("url")
@click.option("--id", "id", multiple=True, help="Only this message; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, oldest first.")
def replay(url: str, id: tuple[str, ...], limit: int | None) -> None:
    """Send dead letters back, to be tried anew under the ids they always had."""
    try:
        wanted = [UUID(text).bytes for text in id] or None
    except ValueError:
        fail(USAGE, f"--id {' '.join(id)!r:.200}: write an id as `molva queue dead` shows it")
    number = _with_consumer(url, lambda opened: opened.replay(wanted, limit=limit or 2**62))
    click.echo(f"{number:,} dead letters wait again")


@queue.command()
@click.argument("url")
@click.option("--dead", is_flag=True, help="Dead letters instead of what waits.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(url: str, dead: bool, yes: bool) -> None:
    """Remove all that waits, or all dead letters. They are gone for good."""
    what = "dead letters" if dead else "waiting messages"
    if not yes:
        if not sys.stdin.isatty():
            fail(USAGE, f"purging removes all {what} for good; say --yes where nobody can be asked")
        click.confirm(f"Remove all {what} of {_parse(url)} for good?", abort=True)
    number = _with_consumer(url, lambda opened: opened.purge(dead=dead))
    click.echo(f"{number:,} {what} removed")


@queue.command()
@click.argument("url")
def remove(url: str) -> None:
    """Remove a subscription that nobody needs any more, and all that waits in it."""
    parsed = _parse(url)
    name = parsed.subscription
    if name is None:
        fail(USAGE, f"{parsed}: names no subscription; add ?topic=orders&subscription=billing")

    async def work() -> bool:
        async with await open_topic(_existing(url)) as topic:
            return await topic.remove_subscription(name)

    with translated_errors():
        removed = asyncio.run(work())
    if not removed:
        fail(USAGE, f"{parsed}: there is no subscription {name!r}")
    click.echo(f"subscription {name} removed")


def _with_consumer(url: str, work: Callable[[Queue | Subscription], Awaitable[T]]) -> T:
    parsed = _parse(url)

    async def run() -> T:
        opened: Queue | Subscription
        if parsed.queue is not None:
            opened = await open_queue(_existing(url))
        else:
            opened = await open_subscription(_existing(url))
        async with opened:
            return await work(opened)

    with translated_errors():
        return asyncio.run(run())


def _parse(url: str) -> BrokerURL:
    with translated_errors():
        return BrokerURL.parse(url)


def _existing(url: str) -> str:
    """Return the URL such that looking makes nothing."""
    return url if "create=" in url else with_options(url, create="never")


def _show(message: Message, line: dict[str, object], as_json: bool) -> None:
    id_ = format_id(message.id)
    if not as_json:
        shown = message.body[:_SHOWN].decode("utf-8", "backslashreplace")
        fields = "  ".join(str(value) for value in line.values())
        click.echo(f"{id_}  {fields}  {shown!a}")
        return
    try:
        body = {"body": message.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(message.body).decode()}
    document = {"id": id_, **line, "key": message.key, "headers": dict(message.headers), **body}
    click.echo(json.dumps(document))


def _instant(at_us: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_us / 1e6))


def _number(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
