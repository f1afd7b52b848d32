"""``python -m tests.faults.live``: the service in real processes, with real faults.

    run --seed 7 --seconds 120 --rate 500    one live run
    power --cuts 20 --seed 7                 power cuts, every variant
    queue --seed 7 --seconds 60              a queue with leases under faults
    long --minutes 30 --results FILE         until 300 kills, 100 cuts and 10⁶ ratings
    pairs --pair kafka-redis --seconds 720   scaled out, until 300 kills or the time is up

Exit code 0: everything was proved, and nothing found. 1: something was found, or a run
proved nothing. 2: what it needs is not there.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from tests.brokers import MissingServerError
from tests.faults.live.controller import Config, run, versions
from tests.faults.live.disk import can_mount
from tests.faults.live.faults import WEIGHTS
from tests.faults.live.long import Goal, long_run
from tests.faults.live.pair import PAIRS
from tests.faults.live.pairs import long_pair
from tests.faults.live.power import VARIANTS, PowerConfig, cut_power
from tests.faults.live.queues import QueueConfig, run_queue


def main() -> int:
    """Run what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.live", description="The service with real faults."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    live = commands.add_parser("run", help="one live run")
    live.add_argument("--seconds", type=float, default=120, help="how long it is under load")
    live.add_argument("--rate", type=float, default=500, help="ratings a second offered")
    live.add_argument("--every", type=float, default=2, help="mean seconds between faults")
    live.add_argument("--clients", type=int, default=32)
    live.add_argument("--workers", type=int, default=2)
    live.add_argument("--disk", choices=("image", "tmpfs", "folder"), default="image")
    live.add_argument("--faults", nargs="+", choices=tuple(WEIGHTS), default=tuple(WEIGHTS))
    power = commands.add_parser("power", help="power cuts")
    power.add_argument("--cuts", type=int, default=20, help="how many, over all variants")
    power.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    queue = commands.add_parser("queue", help="a queue with leases under faults")
    queue.add_argument("--seconds", type=float, default=30, help="how long faults strike")
    long = commands.add_parser("long", help="many runs, until the numbers convince")
    long.add_argument("--minutes", type=float, default=30, help="end after so long, whatever")
    long.add_argument("--kills", type=int, default=300)
    long.add_argument("--cuts", type=int, default=100)
    long.add_argument("--accepted", type=int, default=1_000_000)
    long.add_argument("--queue-rounds", type=int, default=10, help="rounds of a queue, 20 s each")
    long.add_argument("--results", type=Path, default=Path("faults-results.json"))
    pairs = commands.add_parser("pairs", help="scaled out, on a broker and a ledger")
    pairs.add_argument("--pair", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS))
    pairs.add_argument("--seconds", type=float, default=120, help="of each pair, at most")
    pairs.add_argument("--kills", type=int, default=300, help="of each pair; enough is enough")
    pairs.add_argument("--rate", type=float, default=300, help="ratings a second offered")
    pairs.add_argument("--every", type=float, default=1, help="mean seconds between faults")
    pairs.add_argument("--results", type=Path, help="a file of results, to be added to")
    for each in (live, power, queue, long, pairs):
        each.add_argument("--seed", type=int, default=1)
        each.add_argument("--folder", type=Path, help="where history and logs stay")
    arguments = parser.parse_args()
    # SIGTERM as Ctrl-C: what is mounted is unmounted, and every process ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="molva-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    _say(f"seed {arguments.seed}, {json.dumps(versions())}, in {folder}")
    if arguments.command == "run":
        return _run(arguments, folder)
    if arguments.command == "queue":
        config = QueueConfig(arguments.seed, arguments.seconds)
        report = asyncio.run(run_queue(config, folder / "queue"))
        print(json.dumps(report.shown(), indent=2))
        return 0 if report.good else 1
    if arguments.command == "pairs":
        return _pairs(arguments, folder)
    why_not = can_mount(folder)
    if why_not:
        _say(f"file systems cannot be mounted here, so there are no power cuts: {why_not}")
        return 2
    if arguments.command == "power":
        return _power(arguments, folder)
    goal = Goal(
        kills=arguments.kills,
        cuts=arguments.cuts,
        accepted=arguments.accepted,
        queue_rounds=arguments.queue_rounds,
        minutes=arguments.minutes,
    )
    results = long_run(
        goal, seed=arguments.seed, folder=folder, results=arguments.results, say=_say
    )
    for line in (*results.violations, *results.vacuous):
        _say(line)
    short = [
        f"{name}: {getattr(results, name):,} of {getattr(goal, name):,}"
        for name in ("kills", "cuts", "accepted", "queue_rounds")
        if getattr(results, name) < getattr(goal, name)
    ]
    if short:
        _say(f"the time was up before all was done: {', '.join(short)}")
    return 1 if results.violations or results.vacuous or short else 0


def _run(arguments: argparse.Namespace, folder: Path) -> int:
    config = Config(
        arguments.seed,
        arguments.seconds,
        rate=arguments.rate,
        every=arguments.every,
        clients=arguments.clients,
        workers=arguments.workers,
        kinds=tuple(arguments.faults),
        disk=arguments.disk,
    )
    report = asyncio.run(run(config, folder))
    document = report.shown()
    for planned in report.schedule:
        _say(json.dumps(planned.shown()))
    del document["schedule"], document["config"]
    print(json.dumps(document, indent=2))
    for kind, why in report.skipped.items():
        _say(f"NOT DONE HERE: {kind}: {why}")
    return 0 if report.good else 1


def _pairs(arguments: argparse.Namespace, folder: Path) -> int:
    bad = 0
    for name in arguments.pair:
        try:
            total = long_pair(
                PAIRS[name],
                kills=arguments.kills,
                seconds=arguments.seconds,
                seed=arguments.seed,
                rate=arguments.rate,
                every=arguments.every,
                folder=folder,
                results=arguments.results,
                say=_say,
            )
        except MissingServerError as missing:
            _say(f"{name} cannot be run here: {missing}")
            return 2
        for line in (*total.violations, *total.vacuous):
            _say(line)
        bad += bool(total.violations or total.vacuous)
    return 1 if bad else 0


def _power(arguments: argparse.Namespace, folder: Path) -> int:
    variants = arguments.variants
    bad = 0
    for number, variant in enumerate(variants):
        cuts = arguments.cuts // len(variants) + (number < arguments.cuts % len(variants))
        if cuts:
            report = asyncio.run(
                cut_power(PowerConfig(arguments.seed, cuts, variant=variant), folder / variant)
            )
            print(json.dumps(report.shown(), indent=2))
            bad += not report.good
    return 1 if bad else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
