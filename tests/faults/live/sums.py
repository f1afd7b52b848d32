"""What the runs of one kind amount to, however many there are."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from tests.faults.live.controller import Report

__all__ = ["Sums", "raise_to"]


@dataclass(slots=True, kw_only=True)
class Sums:
    """The sums, and the largest values, of live runs.

    Attributes:
        redelivered: Messages that the broker handed over again.
        violations: What was found, each with the seed under which it was.
        vacuous: Runs that proved nothing, likewise. They count for nothing else.
    """

    kills: int = 0
    accepted: int = 0
    offered: int = 0
    answers: "Counter[str]" = field(default_factory=Counter)
    unknown: int = 0
    faults: "Counter[str]" = field(default_factory=Counter)
    exits: "Counter[str]" = field(default_factory=Counter)
    dead_letters: int = 0
    duplicates: int = 0
    redelivered: int = 0
    reads: int = 0
    longest_recovery_seconds: float = 0.0
    longest_silence_seconds: float = 0.0
    longest_start_seconds: float = 0.0
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    vacuous: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def shown(self) -> dict[str, Any]:
        """Return them as a JSON object."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in found.items()
        }

    def add_run(self, report: Report, *, kind: str = "") -> None:
        """Add a live run; ``kind`` stands beside its seed."""
        self.blame(report.config.seed, kind, report.violations, report.vacuous)
        for name in (
            *("kills", "accepted", "offered", "unknown"),
            *("dead_letters", "duplicates", "redelivered", "reads"),
        ):
            setattr(self, name, getattr(self, name) + getattr(report, name))
        self.answers.update(report.results)
        self.faults.update(report.faults)
        self.exits.update(report.exits)
        self.longest_recovery_seconds = max(self.longest_recovery_seconds, report.recovery_seconds)
        self.longest_silence_seconds = max(self.longest_silence_seconds, report.silence_seconds)
        self.longest_start_seconds = max(self.longest_start_seconds, report.slowest_start_seconds)
        raise_to(self.peak_rss_bytes, report.peak_rss)

    def blame(self, seed: int, kind: str, violations: list[str], vacuous: list[str]) -> None:
        """Note what was found under a seed."""
        said = f"seed {seed} ({kind})" if kind else f"seed {seed}"
        self.violations += [f"{said}: {each}" for each in violations]
        self.vacuous += [f"{said}: {each}" for each in vacuous]


def raise_to(peaks: dict[str, int], found: dict[str, int]) -> None:
    """Raise each peak to what was found."""
    for name, value in found.items():
        peaks[name] = max(peaks.get(name, 0), value)
