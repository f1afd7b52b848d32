"""``molva model``: how a station A/B/n/q behaves under load, before it is built."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from molva.cli.exits import USAGE, fail
from molva.cli.figures import PERCENTILES, number_text, share_text, time_text
from molva.cli.options import json_option, plot_option

if TYPE_CHECKING:
    from molva.queueing import Flow, SteadyState

__all__ = ["model"]


@click.command()
@click.argument("spec", metavar="SPEC")
@click.option("--method", help="Analysis to use.  [default: the best there is]")
@click.option("--kendall", is_flag=True, help="Read A/B/c/K: K counts everybody in the system.")
@plot_option
@json_option
def model(spec: str, method: str | None, kendall: bool, plot: Path | None, as_json: bool) -> None:
    """Compute the steady state of SPEC, as 'M(8/s)/M(200ms)/2/inf'.

    SPEC is A/B/n/q: arrivals, service, servers, waiting places. Without q nobody can wait;
    'inf' lets all wait.
    """
    from molva.queueing import Model, ModelError, analyse

    try:
        state = analyse(Model.from_kendall(spec) if kendall else Model.parse(spec), method=method)
        document = _document(state)
        if plot is not None:
            from molva.queueing.plot import Plot

            Plot.of(state).save(plot)
    except ModelError as error:
        fail(USAGE, str(error))
    click.echo(json.dumps(document, ensure_ascii=False) if as_json else _table(state, document))


def _document(state: "SteadyState") -> dict[str, object]:
    """Return what --json prints. A new key here? Also docs/queueing.md, which a test compares."""
    return {
        "model": str(state.model),
        "road": state.road,
        "error": state.error,
        "method": state.method,
        "source": state.source,
        "utilisation": state.utilisation,
        "loss_probability": state.loss_probability,
        "probability_of_waiting": state.probability_of_waiting,
        "throughput_per_second": state.throughput,
        "mean_wait_seconds": state.mean_wait,
        "mean_time_in_system_seconds": state.mean_time_in_system,
        "mean_waiting": state.mean_waiting,
        "mean_in_system": state.mean_in_system,
        "wait_seconds": {name: state.wait_percentile(share) for name, share in PERCENTILES.items()},
        "time_in_system_seconds": {
            name: state.time_in_system_percentile(share) for name, share in PERCENTILES.items()
        },
        "output": _flow(state.output),
        "refusals": _flow(state.refusals),
    }


def _flow(flow: "Flow | None") -> dict[str, object] | None:
    if flow is None:
        return None
    return {
        "rate_per_second": flow.rate,
        "gap_scv": flow.scv,
        "peakedness": flow.peakedness,
        "is_poisson": flow.is_poisson,
    }


def _table(state: "SteadyState", document: dict[str, object]) -> str:
    waits, times = document["wait_seconds"], document["time_in_system_seconds"]
    assert isinstance(waits, dict)
    assert isinstance(times, dict)
    how = f"{state.road} ({state.error})" if state.error else state.road
    rows = [
        ("model", str(state.model)),
        ("road", how),
        ("source", state.source),
        ("utilisation", share_text(state.utilisation)),
        ("refused", share_text(state.loss_probability)),
        ("wait at all", share_text(state.probability_of_waiting)),
        ("throughput", f"{state.throughput:.6g}/s"),
        ("mean wait", time_text(state.mean_wait)),
        ("mean time in system", time_text(state.mean_time_in_system)),
        ("mean number waiting", number_text(state.mean_waiting)),
        ("mean number in system", number_text(state.mean_in_system)),
        ("wait", _percentiles(waits)),
        ("time in system", _percentiles(times)),
        ("output", _flow_text(state.output)),
        ("refusals", _flow_text(state.refusals)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows if value)


def _percentiles(values: dict[str, float | None]) -> str:
    return " · ".join(
        f"{name} {time_text(value)}" for name, value in values.items() if value is not None
    )


def _flow_text(flow: "Flow | None") -> str:
    if flow is None:
        return ""
    parts = [f"{flow.rate:.6g}/s"]
    if flow.is_poisson:
        parts.append("Poisson")
    elif flow.scv is not None:
        parts.append(f"scv of gaps {flow.scv:.5g}")
    if flow.peakedness is not None and not flow.is_poisson:
        parts.append(f"peakedness {flow.peakedness:.5g}")
    return ", ".join(parts)
