"""Writes the table of capabilities in docs/ledgers.md from what the ledgers say of themselves.

    python scripts/generate_ledgers.py

A test holds the page to it, so that the manual cannot promise what no ledger does.
"""

from pathlib import Path
from typing import Final

from generated_table import row, with_table

from molva.ratings.ledger import best_capabilities

PAGE: Final = Path(__file__).parent.parent / "docs" / "ledgers.md"

_ROWS: Final = {
    "survives": "survives, at best",
    "history": "totals at every `as_of`; `molva rebuild`",
    "window": "ratings of an item, and entries, kept one by one",
    "horizon_seconds": "seconds that ids are known for",
    "ids": "equal ids meet within one",
}


def page() -> str:
    """Return the page with the table as the code has it."""
    return with_table(PAGE, "generate_ledgers", _table())


def _table() -> list[str]:
    best = best_capabilities()
    lines = [row("", *(f"`{scheme}://`" for scheme in best)), row(*["---"] * (1 + len(best)))]
    for field, meaning in _ROWS.items():
        lines.append(row(meaning, *(_shown(getattr(found, field)) for found in best.values())))
    return lines


def _shown(value: object) -> str:
    match value:
        case frozenset():
            return ", ".join(fault for fault in ("kill", "power", "node") if fault in value)
        case bool():
            return "yes" if value else "–"
        case int() | float():
            return f"{value:,.0f}"
        case None:
            return "all"
        case _:
            return str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
