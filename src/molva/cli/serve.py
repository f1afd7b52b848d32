"""``molva serve``: one HTTP process, or several that share a port and are kept running."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import translated_errors
from molva.cli.options import (
    deployment_options,
    http_options,
    processes_option,
    spool_options,
)
from molva.cli.running import run_until_signal, set_up_logging, tell_parent_ready
from molva.cli.supervising import serving_children, supervise

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["serve"]


@click.command()
@deployment_options
@spool_options
@http_options
@processes_option
def serve(
    deployment: "Deployment",
    data: Path,
    host: str,
    port: int,
    survive: tuple[str, ...],
    processes: int,
) -> None:
    """Serve HTTP. Any number may run; workers are started with `molva work`."""
    if processes != 1:
        with (
            translated_errors(),
            serving_children(processes, host=host, port=port) as children,
        ):
            sys.exit(
                supervise(
                    children,
                    deployment,
                    data=data,
                    environment={"MOLVA_SURVIVE": " ".join(survive)},
                )
            )
    from molva.ratings.server import serve as serve_http

    def ready(kept: list[str]) -> None:
        tell_parent_ready()
        shown = ", ".join(kept) or "nothing, not even the end of this process"
        where = f"[{host}]" if ":" in host else host
        click.echo(f"molva serve: http://{where}:{port}/  ratings survive: {shown}", err=True)

    async def main(stop: asyncio.Event) -> None:
        await serve_http(deployment, host=host, port=port, stop=stop, asked=survive, on_ready=ready)

    set_up_logging()
    with translated_errors():
        run_until_signal(main)
