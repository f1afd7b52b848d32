"""``molva total``, ``verify``, ``rebuild``: what the ledger says, and whether it is right."""

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import DIFFERENCE, USAGE, fail, translated_errors
from molva.cli.options import existing_deployment_options, json_option

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment
    from molva.ratings.ledger import Difference, Total

__all__ = ["rebuild", "total", "verify"]

# Differences that are shown; the count is of all.
_SHOWN = 20


@click.command()
@existing_deployment_options
@click.option("--campaign", default="default", show_default=True, help="Campaign to read.")
@click.option("--item", help="One item of it.  [default: all]")
@click.option("-n", "window", type=click.IntRange(min=1), help="Window.  [default: the campaign's]")
@click.option("--as-of", type=click.IntRange(min=1), help="Sequence number to read at.")
@json_option
def total(
    deployment: "Deployment",
    data: Path,
    campaign: str,
    item: str | None,
    window: int | None,
    as_of: int | None,
    as_json: bool,
) -> None:
    """Print the moving average of the last n ratings, read from the ledger itself."""

    async def read() -> "Total | None":
        catalog = await deployment.open_catalog()
        try:
            found = await catalog.campaign(campaign)
        finally:
            await catalog.close()
        if found is None:
            fail(USAGE, f"there is no campaign {campaign!r}; `molva campaign list` shows all")
        ledger = await deployment.open_ledger()
        try:
            return await ledger.total(campaign, item=item, n=window or found.window, as_of=as_of)
        finally:
            await ledger.close()

    with translated_errors():
        result = asyncio.run(read())
    if as_json:
        click.echo(json.dumps(_total_document(result)))
    elif result is None:
        click.echo("nothing to average yet", err=True)
    else:
        click.echo(f"{result.average:.2f}")


def _total_document(result: "Total | None") -> dict[str, object]:
    if result is None:
        return {"count": 0}
    return {
        "average": result.average,
        "n": result.n,
        "count": result.count,
        "distribution": {str(rate): count for rate, count in result.distribution.items()},
        "as_of": result.as_of,
    }


@click.command()
@existing_deployment_options
@json_option
def verify(deployment: "Deployment", data: Path, as_json: bool) -> None:
    """Recompute every number from the ledger's entries and compare.

    Exit code 1 where one differs. Safe beside a running service.
    """

    async def compare() -> "tuple[int, list[Difference]]":
        ledger = await deployment.open_ledger()
        count = 0
        shown: list[Difference] = []
        try:
            async for difference in ledger.verify():
                count += 1
                if len(shown) < _SHOWN:
                    shown.append(difference)
        finally:
            await ledger.close()
        return count, shown

    with translated_errors():
        count, shown = asyncio.run(compare())
    if as_json:
        document = {
            "differences": count,
            "first": [
                {
                    "campaign": d.campaign,
                    "where": d.where,
                    "kept": repr(d.kept),
                    "recomputed": repr(d.recomputed),
                }
                for d in shown
            ],
        }
        click.echo(json.dumps(document))
    else:
        for d in shown:
            click.echo(f"{d.campaign}: {d.where}: kept {d.kept!r}, recomputed {d.recomputed!r}")
        click.echo(f"{count:,} differences" if count else "every number is as its entries give it")
    sys.exit(DIFFERENCE if count else 0)


@click.command()
@existing_deployment_options
def rebuild(deployment: "Deployment", data: Path) -> None:
    """Recompute the ledger's derived tables from its entries, in one transaction."""

    async def run() -> None:
        ledger = await deployment.open_ledger()
        try:
            await ledger.rebuild()
        finally:
            await ledger.close()

    with translated_errors():
        asyncio.run(run())
    click.echo("rebuilt; `molva verify` compares")
