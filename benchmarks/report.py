"""What a measurement says of itself, and where it is kept."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import apsw

from molva._base.sqlite_file import probe_fsync

__all__ = ["RESULTS", "Report"]

RESULTS: Final = Path(__file__).parent / "results"
_PACKAGES: Final = (
    *("molva", "apsw", "granian", "uvloop", "msgspec", "starlette", "fastapi", "uvicorn"),
    *("litequeue", "persist-queue", "confluent-kafka", "numpy", "numba"),
)


@dataclass
class Report:
    """The result of one measurement: a table of figures, and how they came about."""

    name: str
    title: str
    how: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)

    def ratio(self, what: str, ours: list[float], theirs: list[float], target: str) -> float:
        """Add the ratio of two medians that were taken in turns."""
        value = statistics.median(ours) / statistics.median(theirs)
        spread = [a / b for a, b in zip(ours, theirs, strict=True)]
        detail = (
            f"{statistics.median(ours):,.0f}/s against {statistics.median(theirs):,.0f}/s; "
            f"turn by turn {min(spread):.2f} to {max(spread):.2f}"
        )
        self.add(what, f"{value:.2f}", f"{detail}; asked for {target}")
        self.figures[what] = {"ratio": value, "ours": ours, "theirs": theirs, "target": target}
        return value

    def add(self, what: str, value: str, detail: str = "") -> None:
        """Add a line, and show it."""
        self.rows.append((what, value, detail))
        print(f"  {what:<58} {value:>12}  {detail}", flush=True)

    def write(self) -> Path:
        """Write the report as Markdown and JSON; return the former's path."""
        machine = _machine()
        lines = [f"# {self.title}", "", self.how, "", "| what | result | how |", "|---|---|---|"]
        lines += [f"| {what} | {value} | {detail} |" for what, value, detail in self.rows]
        lines += ["", "## On", ""] + [f"- {name}: {value}" for name, value in machine.items()]
        path = RESULTS / f"{self.name}.md"
        path.write_text("\n".join(lines) + "\n")
        document = {"name": self.name, "machine": machine, "rows": self.rows}
        document["figures"] = self.figures
        (RESULTS / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        return path


def _machine() -> dict[str, str]:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "CPU": f"{_processor()}, {os.cpu_count()} cores, shared with the load generator",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "SQLite": apsw.sqlite_lib_version(),
        "fsync": f"{probe_fsync('.', tries=51) * 1e6:.0f} µs (median)",
        "versions": ", ".join(versions),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    # The results of this very run are no change of what was measured.
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", changed" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
