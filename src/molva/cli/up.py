"""``molva up``: the whole service on one machine."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli import exits
from molva.cli.exits import translated_errors
from molva.cli.options import (
    deployment_options,
    http_options,
    processes_option,
    spool_options,
    workers_option,
)
from molva.cli.supervising import serving_children, supervise, worker_children

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["up"]


@click.command()
@deployment_options
@spool_options
@http_options
@processes_option
@workers_option
def up(
    deployment: "Deployment",
    data: Path,
    host: str,
    port: int,
    survive: tuple[str, ...],
    processes: int,
    workers: int,
) -> None:
    """Run the whole service on this machine: HTTP, workers, page.

    Ctrl-C or SIGTERM stops it: requests and the batch under way are finished first.
    """
    from molva.ratings.supervisor import FolderInUseError, locked_folder

    data.mkdir(parents=True, exist_ok=True)
    try:
        with (
            translated_errors(),
            locked_folder(data) as lock,
            serving_children(processes, host=host, port=port) as serving,
        ):
            code = supervise(
                [*serving, *worker_children(workers)],
                deployment,
                data=data,
                environment={"MOLVA_SURVIVE": " ".join(survive)},
                inherit=(lock,),
                on_ready=lambda: _welcome(host, port, data, workers),
            )
    except FolderInUseError as error:
        exits.fail(exits.IN_USE, str(error))
    sys.exit(code)


def _welcome(host: str, port: int, data: Path, workers: int) -> None:
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    text = f"""
  Molva is up, with {workers} worker{"" if workers == 1 else "s"}.

    open    {url}/
    rate    curl -X POST '{url}/rate?rate=7'
    total   curl {url}/total
    data    {data.absolute()}
    stop    Ctrl-C
"""
    try:
        click.echo(text)
    except BrokenPipeError:
        # Nobody reads us. What Python flushes as it ends must not fail for that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
