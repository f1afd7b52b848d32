"""``molva simulate``: how a station A/B/n/q behaves under load, played job by job."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from molva.cli.exits import USAGE, fail
from molva.cli.figures import PERCENTILES, number_text, share_text, time_text
from molva.cli.options import json_option, plot_option

if TYPE_CHECKING:
    from molva.queueing import Estimate, Simulation
    from molva.queueing.simulate import SimulatedFlow

__all__ = ["simulate"]

# Steps of the progress bar. A terminal shows no more.
_STEPS: Final = 100


@click.command()
@click.argument("spec", metavar="SPEC")
@click.option("--jobs", type=int, help="Arrivals to play.  [default: 1,000,000]")
@click.option(
    "--precision", type=float, help="Play until the mean wait is known so well: 0.01 is ±1 %."
)
@click.option("--of", metavar="NAME", help="What is to be so precise.  [default: mean_wait]")
@click.option(
    "--most-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Where --precision gives up, and says how far it came.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all numbers."
)
@click.option("--replications", type=int, default=4, show_default=True, help="Independent runs.")
@click.option("--warm-up", type=int, help="Arrivals not counted.  [default: ten relaxation times]")
@click.option("--kendall", is_flag=True, help="Read A/B/c/K: K counts everybody in the system.")
@plot_option
@json_option
def simulate(
    spec: str,
    jobs: int | None,
    precision: float | None,
    of: str | None,
    most_seconds: float,
    seed: int,
    replications: int,
    warm_up: int | None,
    kendall: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Simulate SPEC, as 'E2(2/s)/LN(mean=1s,scv=1.5)/2/5'; every number has its interval.

    SPEC is A/B/n/q: arrivals, service, servers, waiting places, and then, if wanted, who is
    next (lifo, random, priority(3,7), preemptive(3,7)) and patience(M(2s)).
    """
    from molva.queueing import Model, ModelError
    from molva.queueing import simulate as simulated

    try:
        model = Model.from_kendall(spec) if kendall else Model.parse(spec)
        with _progress_bar() as progress:
            result = simulated(
                model,
                jobs=jobs,
                precision=precision,
                of=of,
                most_seconds=most_seconds,
                seed=seed,
                replications=replications,
                warm_up=warm_up,
                progress=progress,
            )
        if plot is not None:
            from molva.queueing.plot import Plot

            Plot.of(result).save(plot)
    except ModelError as error:
        fail(USAGE, str(error))
    text = json.dumps(_document(result), ensure_ascii=False) if as_json else _table(result)
    click.echo(text)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[float], None] | None]:
    """Show how far a run is, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=_STEPS, label="simulating", file=sys.stderr) as bar:
        yield lambda share: bar.update(max(0, round(share * _STEPS) - bar.pos))


def _document(result: "Simulation") -> dict[str, object]:
    """Return what --json prints. A new key here? Also docs/queueing.md, which a test compares."""
    return {
        "model": str(result.model),
        "road": result.road,
        "source": result.source,
        "jobs": result.jobs,
        "warm_up_jobs": result.warm_up,
        "replications": result.replications,
        "batches": result.batches,
        "seed": result.seed,
        "reached": result.reached,
        "notes": list(result.notes),
        "utilisation": _interval(result.utilisation),
        "loss_probability": _interval(result.loss_probability),
        "abandonment_probability": _interval(result.abandonment_probability),
        "probability_of_waiting": _interval(result.probability_of_waiting),
        "throughput_per_second": _interval(result.throughput),
        "mean_wait_seconds": _interval(result.mean_wait),
        "mean_time_in_system_seconds": _interval(result.mean_time_in_system),
        "mean_waiting": _interval(result.mean_waiting),
        "mean_in_system": _interval(result.mean_in_system),
        "wait_seconds": {
            name: _interval(result.wait_percentile(share)) for name, share in PERCENTILES.items()
        },
        "time_in_system_seconds": {
            name: _interval(result.time_in_system_percentile(share))
            for name, share in PERCENTILES.items()
        },
        "output": _flow(result.output),
        "refusals": _flow(result.refusals),
        "classes": [
            {"share": each.share, "mean_wait_seconds": _interval(each.mean_wait)}
            for each in result.classes
        ],
    }


def _interval(estimate: "Estimate | None") -> dict[str, float] | None:
    if estimate is None:
        return None
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _flow(flow: "SimulatedFlow | None") -> dict[str, object] | None:
    if flow is None:
        return None
    return {"rate_per_second": _interval(flow.rate), "gap_scv": _interval(flow.scv)}


def _table(result: "Simulation") -> str:
    def rate(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}/s"

    played = f"{result.jobs:,} in {result.replications} replications, seed {result.seed}"
    rows = [
        ("model", str(result.model)),
        ("road", result.road),
        ("source", result.source),
        ("jobs", f"{played}; the first {result.warm_up:,} not counted"),
        ("utilisation", _text(result.utilisation, share_text)),
        ("refused", _text(result.loss_probability, share_text)),
        ("out of patience", _text(result.abandonment_probability, share_text)),
        ("wait at all", _text(result.probability_of_waiting, share_text)),
        ("throughput", _text(result.throughput, rate)),
        ("mean wait", _text(result.mean_wait, time_text)),
        *(
            (f"  class {rank}", _text(each.mean_wait, time_text))
            for rank, each in enumerate(result.classes, start=1)
        ),
        ("mean time in system", _text(result.mean_time_in_system, time_text)),
        ("mean number waiting", _text(result.mean_waiting, number_text)),
        ("mean number in system", _text(result.mean_in_system, number_text)),
    ]
    for what, percentile in (
        ("wait", result.wait_percentile),
        ("time in system", result.time_in_system_percentile),
    ):
        rows += [
            (f"{what}, {name}", _text(percentile(share), time_text))
            for name, share in PERCENTILES.items()
        ]
    rows += [("output", _flow_text(result.output)), ("refusals", _flow_text(result.refusals))]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows if value]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def _text(estimate: "Estimate | None", shown: Callable[[float | None], str]) -> str:
    if estimate is None:
        return ""
    if estimate.low == estimate.high:
        return shown(estimate.value)
    return f"{shown(estimate.value)}  ({shown(estimate.low)} to {shown(estimate.high)})"


def _flow_text(flow: "SimulatedFlow | None") -> str:
    if flow is None:
        return ""
    text = f"{flow.rate.value:.6g}/s"
    return text if flow.scv is None else f"{text}, scv of gaps {flow.scv.value:.5g}"
