"""``molva work``: one worker, or several that are kept running."""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva._base.collector import calm_collector
from molva.cli.exits import translated_errors
from molva.cli.options import deployment_options, workers_option
from molva.cli.running import run_until_signal, set_up_logging
from molva.cli.supervising import supervise, worker_children

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["work"]


@click.command()
@deployment_options
@workers_option
def work(deployment: "Deployment", data: Path, workers: int) -> None:
    """Run workers: they take ratings from the broker and count them in the ledger.

    Any number may run; they share the ratings.
    """
    if workers != 1:
        sys.exit(
            supervise(
                worker_children(workers),
                deployment,
                data=data,
                environment={},
            )
        )
    from molva.ratings.deployment import check_shared
    from molva.ratings.worker import Worker

    async def main(stop: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            ledger = await deployment.open_ledger()
            stack.push_async_callback(ledger.close)
            catalog = await deployment.open_catalog()
            stack.push_async_callback(catalog.close)
            subscription = await deployment.open_subscription()
            stack.push_async_callback(subscription.close)
            check_shared(subscription.capabilities, deployment.broker)
            worker = Worker(
                subscription=subscription,
                ledger=ledger,
                catalog=catalog,
                clock=deployment.clock,
            )
            calm_collector()
            click.echo("molva work: taking ratings", err=True)
            working = asyncio.ensure_future(worker.run())
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            worker.stop()
            await working

    set_up_logging()
    with translated_errors():
        run_until_signal(main)
