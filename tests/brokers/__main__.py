"""The command behind ``scripts/brokers``."""

import dataclasses
import json
import sys

import click

from tests.brokers.errors import BrokersError
from tests.brokers.state import State, default_folder
from tests.brokers.table import KINDS

_names = click.argument("names", nargs=-1, type=click.Choice(list(KINDS)), metavar="[NAME…]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def brokers() -> None:
    """Real servers on loopback, for tests and for trying.

    NAME is one of kafka, redis, postgresql, rabbitmq and nats; without one, all of them.
    MOLVA_TEST_KAFKA and the like name a server that already runs; MOLVA_INSTALL=1 allows
    installing what is missing; MOLVA_BROKERS_DIR is where they live.
    """


@brokers.command()
@_names
def start(names: tuple[str, ...]) -> None:
    """Start servers, wait until they are ready, print their URLs."""
    state = State(default_folder())
    failed = False
    for name in names or KINDS:
        try:
            record = state.start(name)
        except BrokersError as error:
            click.echo(f"scripts/brokers: {error}", err=True)
            failed = True
        else:
            click.echo(f"{name} {record.url}")
    sys.exit(1 if failed else 0)


@brokers.command()
@_names
def stop(names: tuple[str, ...]) -> None:
    """Stop servers that start started, and remove their data."""
    state = State(default_folder())
    for name in names or KINDS:
        click.echo(f"{name} {'stopped' if state.stop(name) else 'was not running'}")


@brokers.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a line a server.")
@_names
def status(names: tuple[str, ...], as_json: bool) -> None:
    """Tell which servers run: name, source, version, process id, URL. Exit code 3: not all."""
    state = State(default_folder())
    missing = False
    for name in names or KINDS:
        record = state.find(name)
        missing = missing or record is None
        if as_json:
            fields = {"name": name} if record is None else dataclasses.asdict(record)
            click.echo(json.dumps({**fields, "running": record is not None}))
        elif record is None:
            click.echo(f"{name:<11} not running")
        else:
            where = f"pid {record.pid}" if record.pid else (record.container or "")[:12]
            version = record.version or "?"
            click.echo(f"{name:<11} {record.source:<12} {version:<8} {where:<12} {record.url}")
    sys.exit(3 if missing else 0)


@brokers.command()
@_names
def url(names: tuple[str, ...]) -> None:
    """Print what to put into Molva's options, a line a server. Exit code 3: not running."""
    state = State(default_folder())
    for name in names or KINDS:
        record = state.find(name)
        if record is None:
            click.echo(f"scripts/brokers: {name} is not running: start it first", err=True)
            sys.exit(3)
        click.echo(record.url)


if __name__ == "__main__":
    brokers(prog_name="scripts/brokers")
