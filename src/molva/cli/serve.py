"""``molva serve``: one HTTP process."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import translated_errors
from molva.cli.options import deployment_options, http_options
from molva.cli.running import run_until_signal, set_up_logging, tell_parent_ready

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["serve"]


@click.command()
@deployment_options
@http_options
def serve(
    deployment: "Deployment", data: Path, host: str, port: int, survive: tuple[str, ...]
) -> None:
    """Run one HTTP process. Any number may run; workers are started with `molva work`."""
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
