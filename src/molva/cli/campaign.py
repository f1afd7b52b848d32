"""``molva campaign``: list, add and change campaigns."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import USAGE, fail, translated_errors
from molva.cli.options import deployment_options, json_option

if TYPE_CHECKING:
    from molva.ratings.campaign import Campaign
    from molva.ratings.deployment import Deployment

__all__ = ["campaign"]


@click.group()
def campaign() -> None:
    """List, add and change campaigns."""


@campaign.command("list")
@deployment_options
@json_option
def list_(deployment: "Deployment", data: Path, as_json: bool) -> None:
    """List all campaigns."""

    async def read() -> "list[Campaign]":
        catalog = await deployment.open_catalog()
        try:
            return await catalog.campaigns()
        finally:
            await catalog.close()

    with translated_errors():
        found = asyncio.run(read())
    if as_json:
        fields = ("name", "question", "minimum", "maximum", "window")
        click.echo(json.dumps([{name: getattr(c, name) for name in fields} for c in found]))
        return
    width = max(len(c.name) for c in found) if found else 0
    for c in found:
        scale = f"{c.minimum} to {c.maximum}"
        click.echo(f"{c.name:<{width}}  {scale:>9}  last {c.window:>4}  {c.question}")


@campaign.command()
@deployment_options
@click.argument("name")
@click.option("--question", help="What the visitor is asked.")
@click.option("--scale", metavar="MIN-MAX", help="Lowest and highest rate: 1-5, for example.")
@click.option("--window", type=click.IntRange(min=1), help="How many last ratings are averaged.")
def put(
    deployment: "Deployment",
    data: Path,
    name: str,
    question: str | None,
    scale: str | None,
    window: int | None,
) -> None:
    """Add the campaign NAME, or change what is given of it.

    A running service follows within a second. The scale of a campaign can only become
    wider: ratings that were given must stay on it.
    """
    from molva.ratings.campaign import Campaign, check_campaign

    async def write() -> bool:
        catalog = await deployment.open_catalog()
        try:
            old = await catalog.campaign(name) or Campaign(name=name)
            minimum, maximum = _scale(scale) if scale is not None else (old.minimum, old.maximum)
            new = Campaign(
                name=name,
                question=question or old.question,
                minimum=minimum,
                maximum=maximum,
                window=window or old.window,
            )
            try:
                return await catalog.put_campaign(check_campaign(new))
            except ValueError as error:
                fail(USAGE, str(error))
        finally:
            await catalog.close()

    with translated_errors():
        created = asyncio.run(write())
    click.echo(f"campaign {name!r} was {'added' if created else 'changed'}")


def _scale(text: str) -> tuple[int, int]:
    # The hyphen that parts the two numbers is not the sign of the first.
    low, _, high = text[1:].partition("-")
    try:
        return int(text[0] + low), int(high)
    except (ValueError, IndexError):
        fail(USAGE, f"--scale {text!r} is refused; write the lowest and highest rate: 0-10, 1-5")
