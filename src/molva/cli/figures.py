"""How the numbers of a station are printed for people."""

from typing import Final

__all__ = ["PERCENTILES", "number_text", "share_text", "time_text"]

# Percentiles that are printed, by the key that JSON has for them.
PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}

# Units of a printed time, from the largest. A time below a nanosecond is printed in those.
_UNITS: Final = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def number_text(value: float | None) -> str:
    """Return a number, or nothing where there is none."""
    return "" if value is None else f"{value:.6g}"


def share_text(value: float | None) -> str:
    """Return a share as a percentage; a tiny one in powers of ten."""
    if value is None:
        return ""
    return f"{value:.4%}" if value == 0 or value >= 1e-4 else f"{value:.4g}"


def time_text(value: float | None) -> str:
    """Return a time with the unit that suits it."""
    if value is None:
        return ""
    if value == 0:
        return "0 s"
    size, unit = next(((s, u) for s, u in _UNITS if value >= s), _UNITS[-1])
    return f"{value / size:.5g} {unit}"
