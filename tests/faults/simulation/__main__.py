"""``python -m tests.faults.simulation SEED``: what happened in a run, line by line.

``python -m tests.faults.simulation FIRST LAST`` runs many, and shows those that break a promise.
``--mutant NAME`` breaks the code first; ``tests/faults/mutants.py`` has the names.
"""

import argparse
import contextlib
import sys
import time
from collections import Counter

from tests.faults.mutants import MUTANTS
from tests.faults.simulation.run import Report, simulate


def main() -> int:
    """Run what the command line asks for; return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulation", description=__doc__)
    parser.add_argument("first", type=int, metavar="SEED")
    parser.add_argument("last", type=int, nargs="?", metavar="LAST")
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    arguments = parser.parse_args()
    broken = MUTANTS[arguments.mutant].put if arguments.mutant else contextlib.nullcontext
    with broken():
        if arguments.last is None:
            return _show(simulate(arguments.first))
        return _many(range(arguments.first, arguments.last + 1))


def _show(report: Report) -> int:
    print(report.plan)
    print(report.trace, end="")
    for violation in report.violations:
        print("BROKEN", violation)
    return bool(report.violations)


def _many(seeds: range) -> int:
    counts: Counter[str] = Counter()
    broken = 0
    began = time.monotonic()
    for seed in seeds:
        report = simulate(seed)
        counts += report.counts
        for violation in report.violations:
            print(seed, violation)
        broken += bool(report.violations)
    print(f"{len(seeds) / (time.monotonic() - began):.0f} seeds/s, {broken} broken; {counts}")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
