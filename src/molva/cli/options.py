"""Options that several commands share. Each is also an environment variable, MOLVA_…."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from molva.cli.exits import USAGE, fail

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = [
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "deployment_options",
    "existing_deployment_options",
    "http_options",
    "json_option",
    "plot_option",
    "processes_option",
    "spool_options",
    "workers_option",
]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8081

# Ratings that may wait for the workers. Some 200 MB of disk, and half a minute's work.
_DEFAULT_CAPACITY: Final = 1_000_000


# Ratings that a process keeps while the broker is away. Some 200 MB of disk, and an hour of 300
# a second.
_DEFAULT_SPOOL_LIMIT: Final = 1_000_000
# Hours for which they may wait. More, and a ledger on Redis must remember ids for longer than its
# default of 72 hours: 25 of them are for what comes again otherwise.
_DEFAULT_SPOOL_HOURS: Final = 24.0


def deployment_options(command: F) -> F:
    """Add the options that say where a deployment keeps what; pass on ``deployment``."""
    return _with_deployment(command, must_exist=False)


def existing_deployment_options(command: F) -> F:
    """Add the same, for a command that only reads: one without a ledger is refused."""
    return _with_deployment(command, must_exist=True)


def _with_deployment(command: F, *, must_exist: bool) -> F:
    @functools.wraps(command)
    def with_deployment(
        *,
        data: Path,
        broker: str | None,
        ledger: str | None,
        catalog: str | None,
        capacity: int,
        **rest: object,
    ) -> object:
        if must_exist and not ledger and not (data / "ledger.db").exists():
            fail(USAGE, f"{data} holds no ledger; is --data right?")
        if None in (broker, ledger, catalog):
            _make_folder(data)
        deployment = _deployment_class().in_folder(
            data, broker=broker, ledger=ledger, catalog=catalog, capacity=capacity
        )
        return command(deployment=deployment, data=data, **rest)

    for option in (
        click.option(
            "--data",
            envvar="MOLVA_DATA",
            type=click.Path(path_type=Path, file_okay=False),
            default="molva-data",
            show_default=True,
            help="Folder of the embedded queue, ledger and catalog.",
        ),
        click.option(
            "--broker",
            envvar="MOLVA_BROKER",
            metavar="URL",
            help="Where accepted ratings wait.  [default: sqlite in --data]",
        ),
        click.option(
            "--ledger",
            envvar="MOLVA_LEDGER",
            metavar="URL",
            help="Where ratings are counted.  [default: sqlite in --data]",
        ),
        click.option(
            "--catalog",
            envvar="MOLVA_CATALOG",
            metavar="URL",
            help="Where campaigns are kept.  [default: sqlite in --data]",
        ),
        click.option(
            "--capacity",
            envvar="MOLVA_CAPACITY",
            type=click.IntRange(min=1),
            default=_DEFAULT_CAPACITY,
            show_default=True,
            help="Ratings that may wait; beyond, /rate answers 503.",
        ),
    ):
        with_deployment = option(with_deployment)
    return with_deployment  # type: ignore[return-value]


def http_options(command: F) -> F:
    """Add --host, --port and --survive."""
    for option in (
        click.option(
            "--host",
            envvar="MOLVA_HOST",
            default=DEFAULT_HOST,
            show_default=True,
            help="Address to listen on.",
        ),
        click.option(
            "--port",
            envvar="MOLVA_PORT",
            type=click.IntRange(1, 65_535),
            default=DEFAULT_PORT,
            show_default=True,
            help="Port to listen on.",
        ),
        click.option(
            "--survive",
            envvar="MOLVA_SURVIVE",
            type=click.Choice(["kill", "power", "node"]),
            multiple=True,
            help="Refuse to start unless an accepted rating survives this.",
        ),
    ):
        command = option(command)
    return command


def spool_options(command: F) -> F:
    """Add what is done while the broker is away; put it into ``deployment``.

    Stands below ``deployment_options``.
    """

    @functools.wraps(command)
    def with_spool(
        *,
        deployment: "Deployment",
        data: Path,
        when_broker_down: str,
        spool_limit: int,
        spool_hours: float,
        **rest: object,
    ) -> object:
        if when_broker_down == "spool":
            from molva.ratings.spool import SpoolSettings

            _make_folder(data)
            settings = SpoolSettings(data.absolute() / "spool", spool_limit, spool_hours)
            deployment = dataclasses.replace(deployment, spool=settings)
        return command(deployment=deployment, data=data, **rest)

    for option in (
        click.option(
            "--when-broker-down",
            envvar="MOLVA_WHEN_BROKER_DOWN",
            type=click.Choice(["refuse", "spool"]),
            default="refuse",
            show_default=True,
            help="Answer /rate with 503, or keep ratings in --data until the broker is back.",
        ),
        click.option(
            "--spool-limit",
            envvar="MOLVA_SPOOL_LIMIT",
            type=click.IntRange(min=1),
            default=_DEFAULT_SPOOL_LIMIT,
            show_default=True,
            help="Ratings that each HTTP process may keep; beyond, /rate answers 503.",
        ),
        click.option(
            "--spool-hours",
            envvar="MOLVA_SPOOL_HOURS",
            type=click.FloatRange(min=0, min_open=True),
            default=_DEFAULT_SPOOL_HOURS,
            show_default=True,
            help="Hours for which they may wait; beyond, /rate answers 503.",
        ),
    ):
        with_spool = option(with_spool)
    return with_spool  # type: ignore[return-value]


def workers_option(command: F) -> F:
    """Add --workers."""
    return click.option(
        "--workers",
        envvar="MOLVA_WORKERS",
        type=click.IntRange(0, 64),
        default=1,
        show_default=True,
        help="Worker processes.",
    )(command)


def processes_option(command: F) -> F:
    """Add --processes."""
    return click.option(
        "--processes",
        envvar="MOLVA_PROCESSES",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="HTTP processes that share the port.",
    )(command)


def json_option(command: F) -> F:
    """Add --json, for programs that read the output."""
    return click.option(
        "--json", "as_json", is_flag=True, envvar="MOLVA_JSON", help="Print JSON, for programs."
    )(command)


def plot_option(command: F) -> F:
    """Add --plot, the file for a picture."""
    return click.option(
        "--plot",
        envvar="MOLVA_PLOT",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Draw it, too: a file that ends in .png, .svg or .txt.",
    )(command)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(USAGE, f"--data {folder} cannot be made ({error.strerror}); choose another folder")


def _deployment_class() -> "type[Deployment]":
    try:
        from molva.ratings.deployment import Deployment
    except ModuleNotFoundError as error:
        fail(USAGE, f"{error.name} is not installed: pip install 'molva[ratings]'")
    return Deployment
