"""73,421 real ratings over HTTP, while the processes that carry them are killed.

Data: tests/data/insteval.csv.gz; see tests/data/README.md.
"""

import csv
import gzip
import http.client
import itertools
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import pytest

from molva.ratings.ledger import open_ledger
from tests.conftest import MolvaProcess, StartMolva

FILE = Path(__file__).parent.parent / "data" / "insteval.csv.gz"
ROWS = 73_421
WINDOW = 10
# Rows of the file that are imported once more, as one that has not grown so far.
AGAIN = 20_000
# Ratings from one kill to the next, at least and at most: some thirty kills in all.
BETWEEN_KILLS = 1_000, 4_000

Rates = dict[str, list[int]]


def rates_by_lecturer() -> Rates:
    found: Rates = defaultdict(list)
    with gzip.open(FILE, "rt", newline="") as file:
        for row in csv.DictReader(file):
            found[row["d"]].append(int(row["y"]))
    return found


def beginning(folder: Path) -> Path:
    """Return a file of the first rows, from which their ids are made as from all of it."""
    path = folder / "beginning.csv"
    with gzip.open(FILE, "rt", newline="") as file, path.open("w", newline="") as some:
        some.writelines(itertools.islice(file, 1 + AGAIN))
    return path


def importing(molva: MolvaProcess, path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            # Nothing here has a time to keep, unlike tests beside it, which it would hold up.
            *("nice", "-n", "10"),
            *(sys.executable, "-m", "molva", "import", str(path), "--to", molva.url),
            *("--rate-column", "y", "--item-column", "d"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Killer(threading.Thread):
    """Kills the HTTP process or a worker whenever so many more ratings were counted.

    By ratings and not by the clock: then a slow machine sees as many kills as a fast one, all
    over the file, and none dies so soon after it was started that nothing goes on.
    """

    def __init__(self, molva: MolvaProcess, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills: Counter[str] = Counter()
        self._molva = molva
        self._random = random.Random(seed)
        self._enough = threading.Event()

    def run(self) -> None:
        due = 0
        while not self._enough.wait(0.2):
            try:
                if self._molva.total().get("count", 0) < due:
                    continue
            except (OSError, http.client.HTTPException):  # it was killed just now
                continue
            due += self._random.randrange(*BETWEEN_KILLS)
            children = self._molva.children()
            if children:
                name = self._random.choice(sorted(children))
                try:
                    children[name].kill()
                except psutil.NoSuchProcess:
                    continue
                self.kills[name] += 1

    def stop(self) -> None:
        self._enough.set()
        self.join()


@pytest.mark.timeout(600)
async def test_every_rating_counts_once_through_kills_and_a_second_import(
    start_molva: StartMolva, tmp_path: Path
) -> None:
    expected = rates_by_lecturer()
    molva = start_molva("--workers", "2")
    killer = Killer(molva, seed=20_26)

    first = importing(molva, FILE)
    killer.start()
    output, _ = first.communicate()
    killer.stop()
    assert first.returncode == 0, output + molva.log
    molva.wait_counted(ROWS)
    again = importing(molva, beginning(tmp_path))
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert f"{AGAIN:,} ratings are stored" in output
    await_quiet(molva)

    assert killer.kills["serve"] >= 5, "the HTTP process was hardly killed: proves nothing"
    assert killer.kills["work"] >= 5, "the workers were hardly killed: proves nothing"
    assert molva.total()["count"] == ROWS
    for lecturer, rates in expected.items():
        total = molva.total(f"?item={lecturer}")
        assert total["count"] == len(rates), lecturer
        assert total["distribution"] == {str(r): n for r, n in Counter(rates).items()}, lecturer
        assert molva.total(f"?item={lecturer}&n={len(rates)}")["average"] == sum(rates) / len(rates)
        # An item's rows stayed in order, so its window is the file's.
        last = rates[-WINDOW:]
        assert total["average"] == sum(last) / len(last), lecturer
    await check_windows_against_the_ledger(molva)
    assert molva.stop() == 0


def await_quiet(molva: MolvaProcess) -> None:
    deadline = time.monotonic() + 30
    while molva.total()["pending"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert molva.total()["pending"] == 0


async def check_windows_against_the_ledger(molva: MolvaProcess) -> None:
    """Fold the entries themselves, and compare every number that the service gives."""
    ledger = await open_ledger(f"sqlite://{molva.data}/ledger.db")
    try:
        assert [difference async for difference in ledger.verify()] == []
        rates: list[int] = []
        seqs: list[int] = []
        async for entry in ledger.entries("default"):
            seqs.append(entry.seq)
            assert entry.rate is not None
            rates.append(entry.rate)
    finally:
        await ledger.close()
    assert seqs == list(range(1, ROWS + 1))
    for n in (1, 10, 1_000, ROWS):
        assert molva.total(f"?n={n}")["average"] == sum(rates[-n:]) / n
    for as_of in (1, 9, 10, 12_345, ROWS):
        last = rates[max(0, as_of - WINDOW) : as_of]
        assert molva.total(f"?as_of={as_of}")["average"] == sum(last) / len(last)
