"""Writes the table of measured throughput in docs/choosing-a-broker.md from the recorded results.

    python scripts/generate_measured.py

A test holds the page to it, so that the manual tells no figure that was not measured.
"""

import json
from pathlib import Path
from typing import Any, Final

from generated_table import row, with_table

_ROOT: Final = Path(__file__).parent.parent
PAGE: Final = _ROOT / "docs" / "choosing-a-broker.md"

_RESULTS: Final = {
    "Kafka": "scaled",
    "RabbitMQ": "scaled-rabbitmq",
    "NATS": "scaled-nats",
    "Redis": "scaled-redis",
}
_CONNECTIONS: Final = (5, 64, 256)


def page() -> str:
    """Return the page with the table as it was measured."""
    return with_table(PAGE, "generate_measured", _table())


def _table() -> list[str]:
    found = {broker: _figures(name) for broker, name in _RESULTS.items()}
    lines = [row("connections", "", *found), row(*["---"] * (2 + len(found)))]
    for connections in _CONNECTIONS:
        at = f" at {connections} connections"
        accepted = [_one(figures, "accepted / bare handler", at) for figures in found.values()]
        counted = [_one(figures, "accepted and counted", at) for figures in found.values()]
        lines += [
            row(str(connections), "bare handler", *(_rate(f["theirs"]) for f in accepted)),
            row("", "accepted", *map(_beside, accepted)),
            row("", "FastStream, FastAPI", *(_rate(f["theirs"]) for f in counted)),
            row("", "accepted and counted", *map(_beside, counted)),
        ]
    return lines


def _figures(name: str) -> dict[str, Any]:
    document = json.loads((_ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    figures: dict[str, Any] = document["figures"]
    return figures


def _one(figures: dict[str, Any], begins: str, ends: str) -> dict[str, Any]:
    [figure] = [f for what, f in figures.items() if what.startswith(begins) and what.endswith(ends)]
    return dict(figure)


def _rate(turns: list[float]) -> str:
    return f"{sorted(turns)[len(turns) // 2]:,.0f}/s"


def _beside(figure: dict[str, Any]) -> str:
    return f"{_rate(figure['ours'])}, {figure['ratio']:.1f} times"


if __name__ == "__main__":
    PAGE.write_text(page())
