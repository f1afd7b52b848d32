"""``molva up``: the whole service on one machine."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli import exits
from molva.cli.options import deployment_options, http_options
from molva.cli.running import PARENT_PIPE, READY_PIPE

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["up"]


@click.command()
@deployment_options
@http_options
@click.option(
    "--workers",
    envvar="MOLVA_WORKERS",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    help="Worker processes.",
)
def up(
    deployment: "Deployment",
    data: Path,
    host: str,
    port: int,
    survive: tuple[str, ...],
    workers: int,
) -> None:
    """Run the whole service on this machine: HTTP, workers, page.

    Ctrl-C or SIGTERM stops it: what was accepted is finished first.
    """
    from molva.ratings.supervisor import Child, FolderInUseError, Supervisor, locked_folder

    data.mkdir(parents=True, exist_ok=True)
    children = [Child("serve", ["serve"])]
    children += [Child(f"work {number}", ["work"]) for number in range(1, workers + 1)]
    fatal = {exits.USAGE, exits.IN_USE, exits.INCOMPATIBLE, exits.UNMET_PROMISE}
    try:
        with locked_folder(data) as lock:
            parent_reader, _parent_writer = os.pipe()
            ready_reader, ready_writer = os.pipe()
            supervisor = Supervisor(
                children,
                inherit=(lock, parent_reader, ready_writer),
                # Not as arguments: a URL may hold a password, and arguments are public.
                environment={
                    PARENT_PIPE: str(parent_reader),
                    READY_PIPE: str(ready_writer),
                    "MOLVA_DATA": str(data.absolute()),
                    "MOLVA_BROKER": deployment.broker,
                    "MOLVA_LEDGER": deployment.ledger,
                    "MOLVA_CATALOG": deployment.catalog,
                    "MOLVA_HOST": host,
                    "MOLVA_PORT": str(port),
                    "MOLVA_SURVIVE": " ".join(survive),
                },
                fatal=frozenset(fatal),
            )
            code = supervisor.run(
                ready=ready_reader, on_ready=lambda: _welcome(host, port, data, workers)
            )
    except FolderInUseError as error:
        exits.fail(exits.IN_USE, str(error))
    sys.exit(code)


def _welcome(host: str, port: int, data: Path, workers: int) -> None:
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    url = f"http://{shown}:{port}"
    click.echo(
        f"""
  Molva is up, with {workers} worker{"" if workers == 1 else "s"}.

    open    {url}/
    rate    curl -X POST '{url}/rate?rate=7'
    total   curl {url}/total
    data    {data.absolute()}
    stop    Ctrl-C
"""
    )
