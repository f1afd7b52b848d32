"""``molva import``: the rows of a CSV file, as ratings over HTTP."""

import sys
from pathlib import Path

import click

from molva.cli.exits import DIFFERENCE, UNAVAILABLE, USAGE, fail
from molva.cli.options import DEFAULT_HOST, DEFAULT_PORT

__all__ = ["import_"]


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--to",
    "url",
    metavar="URL",
    envvar="MOLVA_TO",
    default=f"http://{DEFAULT_HOST}:{DEFAULT_PORT}",
    show_default=True,
    help="Where the service is.",
)
@click.option("--campaign", default="default", show_default=True, help="Campaign of all rows.")
@click.option("--rate-column", default="rate", show_default=True, help="Column of the rate.")
@click.option("--item-column", help="Column of the item.")
@click.option("--comment-column", help="Column of the comment.")
@click.option(
    "--connections",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Connections to use; an item's rows share one.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds without success after which to give up.",
)
def import_(
    file: Path,
    url: str,
    campaign: str,
    rate_column: str,
    item_column: str | None,
    comment_column: str | None,
    connections: int,
    patience: float,
) -> None:
    """Send the rows of FILE, a CSV with a header, plain or gzip, as ratings.

    Safe to repeat: a row that was stored is not counted again, so an import that was
    interrupted is resumed by the same command. Exit code 1 where rows were refused, 3
    where the service cannot be reached.
    """
    try:
        from molva.ratings.importer import Columns, Importer, ImportFailedError, read_rows
    except ModuleNotFoundError as error:
        fail(USAGE, f"{error.name} is not installed: pip install 'molva[ratings]'")
    columns = Columns(rate_column, item_column, comment_column)
    try:
        importer = Importer(url, campaign=campaign, connections=connections, patience=patience)
        rows = read_rows(file, columns, campaign=campaign)
        with click.progressbar(length=file.stat().st_size, label=file.name, file=sys.stderr) as bar:
            report = importer.run(rows, lambda row: bar.update(row.position - bar.pos))
            bar.update(bar.length - bar.pos if bar.length else 0)
    except ImportFailedError as error:
        fail(UNAVAILABLE if error.unreachable else USAGE, str(error))
    except KeyboardInterrupt:
        fail(UNAVAILABLE, "interrupted; run the same command again to go on")
    for refusal in report.refusals:
        click.echo(f"molva: {refusal}", err=True)
    click.echo(
        f"{report.stored:,} ratings are stored, {report.refused:,} rows were refused"
        + (f", {report.repeated:,} requests were repeated" if report.repeated else "")
    )
    sys.exit(DIFFERENCE if report.refused else 0)
