"""Writes docs/capabilities.md from what the drivers say of themselves.

    python scripts/generate_capabilities.py

A test holds the page to it, so that the manual cannot promise what no driver does.
"""

from pathlib import Path
from typing import Final

from generated_table import row

from molva.messaging.driver import ALL_FEATURES, Capabilities
from molva.messaging.url import BrokerURL, known_schemes, load_driver

PAGE: Final = Path(__file__).parent.parent / "docs" / "capabilities.md"


def page() -> str:
    """Return the page."""
    columns: list[tuple[str, Capabilities]] = []
    drivers: list[object] = []
    for scheme in known_schemes():
        driver = load_driver(BrokerURL.parse(f"{scheme}://x"))
        if driver in drivers:
            continue  # the same over TLS
        drivers.append(driver)
        for kind in ("topic", "queue"):
            best = getattr(driver, f"{kind.upper()}_CAPABILITIES", None)
            if best is not None:
                columns.append((f"`{scheme}://` {kind}", best))
    lines = [
        "# Capabilities",
        "",
        "What each broker can do, at best; `capabilities` of what you opened says what it can do",
        "as it was opened. Ask for a feature with `require=` when opening, or in the URL",
        "(`?require=power,per-key`): what is missing is then an `UnsupportedFeatureError` that",
        "names the drivers that have it, before any message is sent.",
        "",
        "This page is generated from the code (`scripts/generate_capabilities.py`); the shared",
        "suite holds every driver to it.",
        "",
        row("feature", "what it is", *(name for name, _ in columns)),
        row(*["---"] * (2 + len(columns))),
    ]
    for feature, meaning in ALL_FEATURES.items():
        marks = ["yes" if feature in best.features else "–" for _, best in columns]
        lines.append(row(f"`{feature}`", meaning.replace("``", "`"), *marks))
    lines += ["", row("", *(name for name, _ in columns)), row(*["---"] * (1 + len(columns)))]
    for field, meaning in {
        "survives": "survives",
        "ordering": "order of a key",
        "capacity": "capacity",
        "holding": "what was handed over is held by",
        "attempts": "count of attempts",
        "starts": "a new subscription can begin with",
        "stat": "count of what waits",
        "max_body_bytes": "largest body in bytes",
    }.items():
        shown = [
            # Only subscriptions begin anywhere.
            "–" if field == "starts" and name.endswith("queue") else _shown(getattr(best, field))
            for name, best in columns
        ]
        lines.append(row(meaning, *shown))
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "nothing"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
