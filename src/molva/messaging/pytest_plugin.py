"""The pytest plugin: a broker for the tests of applications, and what the suite has to say.

pytest imports this wherever Molva is installed, so it imports nothing of Molva until it is
used: ``molva_broker`` is asked for, or a driver runs ``molva.messaging.conformance``. Of
each driver the suite then ends with a line: how many tests passed, which features it does
not have, how often messages came more often than they should.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from molva.messaging.testing import MemoryBroker

__all__ = ["molva_broker", "pytest_terminal_summary"]

# The suite's asserts show what they compared, as those of a test file do.
pytest.register_assert_rewrite("molva.messaging.conformance")


@pytest.fixture
def molva_broker() -> "Iterator[MemoryBroker]":
    """A fresh broker in memory: its ``url``, what it was ``sent``, its ``dead_letters``."""
    from molva.messaging.testing import MemoryBroker

    broker = MemoryBroker()
    yield broker
    broker.forget()


@dataclass
class _Tally:
    """What became of the suite's tests with one kind of one driver."""

    passed: int = 0
    failed: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    not_offered: set[str] = field(default_factory=set)
    offered: set[str] = field(default_factory=set)
    bounds: set[str] = field(default_factory=set)
    duplicates: Counter[str] = field(default_factory=Counter)

    def add(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped and report.when == "setup":
            # Where it was skipped, and why: "Skipped: by capability: no 'delay' (...)".
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            if "not offered" in why:
                self.not_offered.add(why.rpartition(": ")[2])
            elif "by capability: " in why:
                feature = why.partition("by capability: ")[2].partition(" (")[0].partition(",")[0]
                self.missing[feature] += 1
        elif report.passed and report.when == "call":
            self.passed += 1
        if report.when == "teardown":  # by then a test has recorded all that it will
            for name, value in report.user_properties:
                if name == "molva duplicates":
                    number, _, reason = str(value).partition(" ")
                    self.duplicates[reason] += int(number)
                elif name == "molva idle bound":
                    self.bounds.add(f"an idle consumer may take {value} s")
                elif name == "molva offers":
                    self.offered.add(str(value))

    def line(self) -> str:
        parts = [f"{self.passed} passed"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.missing:
            what = ", ".join(name.replace("'", "") for name in sorted(self.missing))
            parts.append(f"{self.missing.total()} skipped by capability ({what})")
        why = f" ({', '.join(sorted(+self.duplicates))})" if self.duplicates.total() else ""
        duplicates = self.duplicates.total()
        parts.append(f"{duplicates} duplicate{'' if duplicates == 1 else 's'}{why}")
        if not self.failed:
            parts[-1] += ", none beyond what is declared"
        if self.offered:
            parts.append(f"offered: {', '.join(sorted(self.offered))}")
        if self.not_offered:
            parts.append(f"not offered: {', '.join(sorted(self.not_offered))}")
        return "; ".join([", ".join(parts), *sorted(self.bounds)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each kind of each driver that ran the suite."""
    tallies: dict[str, _Tally] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                what = dict(report.user_properties).get("molva")
                if what is not None:
                    tallies.setdefault(str(what), _Tally()).add(report)
    if tallies:
        terminalreporter.section("conformance")
        for what, tally in sorted(tallies.items()):
            terminalreporter.line(f"{what}: {tally.line()}")
