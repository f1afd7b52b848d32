"""``molva migrate``: make the ledger and the catalog, or bring them to this version."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva._base.redaction import redact
from molva.cli.exits import translated_errors
from molva.cli.options import deployment_options

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["migrate"]


@click.command()
@deployment_options
def migrate(deployment: "Deployment", data: Path) -> None:
    """Make the ledger and the catalog, or bring them to this version.

    In PostgreSQL nothing else does so: stop the processes of the older version first. Files
    are brought along whenever they are opened; Redis needs no migration.
    """
    from molva.ratings.catalog import migrate_catalog
    from molva.ratings.ledger import migrate_ledger

    async def run() -> None:
        for what, url, bring in (
            ("ledger", deployment.ledger, migrate_ledger),
            ("catalog", deployment.catalog, migrate_catalog),
        ):
            click.echo(f"{what:<8} {redact(url)}: {_shown(await bring(url))}")

    with translated_errors():
        asyncio.run(run())


def _shown(versions: tuple[int, int] | None) -> str:
    if versions is None:
        return "in order"
    before, after = versions
    if before == after:
        return f"is of version {after} already"
    return f"made, version {after}" if before == 0 else f"version {before} became {after}"
