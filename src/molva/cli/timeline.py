"""``molva timeline``: the timing diagram of a station, job by job."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import USAGE, fail
from molva.cli.options import json_option, plot_option

if TYPE_CHECKING:
    from molva.queueing.simulate import Job
    from molva.queueing.timeline import Timeline

__all__ = ["timeline"]

# Columns of a drawing that goes to no terminal, and the most that one has: beyond, a reader
# loses the row.
_COLUMNS = 80
_MOST_COLUMNS = 160


@click.command()
@click.argument("spec", metavar="SPEC")
@click.option("--begin", metavar="TIME", default="0s", show_default=True, help="When to look.")
@click.option("--duration", metavar="TIME", help="How long.  [default: while some 8 jobs come]")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides what lots say.")
@click.option("--kendall", is_flag=True, help="Read A/B/c/K: K counts everybody in the system.")
@plot_option
@json_option
def timeline(
    spec: str,
    begin: str,
    duration: str | None,
    seed: int,
    kendall: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Draw what happens at SPEC, as '2*D(1ms)/D(0.5ms)/1/1', which is empty at 0 s."""
    from molva.queueing import Model, ModelError
    from molva.queueing.notation import parse_time
    from molva.queueing.timeline import Timeline

    try:
        found = Timeline.of(
            Model.from_kendall(spec) if kendall else Model.parse(spec),
            begin=parse_time(begin),
            duration=None if duration is None else parse_time(duration),
            seed=seed,
        )
        if plot is not None:
            found.save(plot)
    except ModelError as error:
        fail(USAGE, str(error))
    if as_json:
        click.echo(json.dumps(_document(found), ensure_ascii=False))
    else:
        columns = shutil.get_terminal_size((_COLUMNS, 24)).columns
        click.echo(found.text(min(columns, _MOST_COLUMNS)))


def _document(found: "Timeline") -> dict[str, object]:
    """Return what --json prints. A new key here? Also docs/queueing.md, which a test compares."""
    return {
        "model": str(found.model),
        "road": found.road,
        "begin_seconds": float(found.begin),
        "end_seconds": float(found.end),
        "arrived": len(found.arrivals),
        "refused": len(found.refusals),
        "gave_up": len(found.abandonments),
        "departed": len(found.departures),
        "busy_shares": [float(share) for share in found.busy_shares],
        "jobs": [_job(job) for job in found.present],
        "waits": [
            {
                "job": stay.job,
                "place": stay.place,
                "begin_seconds": float(stay.begin),
                "end_seconds": float(stay.end),
            }
            for stay in found.stays
        ],
    }


def _job(job: "Job") -> dict[str, object]:
    return {
        "number": job.index + 1,
        "fate": job.fate,
        "arrival_seconds": float(job.arrival),
        "start_seconds": None if job.start is None else float(job.start),
        "departure_seconds": None if job.departure is None else float(job.departure),
        "services": [
            {
                "server": part.server + 1,
                "begin_seconds": float(part.begin),
                "end_seconds": float(part.end),
            }
            for part in job.stretches
        ],
    }
