"""``python -m examples.scaling_out``: a service of many processes, some of which are killed.

Three HTTP processes stand behind a round-robin, three workers behind the broker. Half way one
of each is killed with SIGKILL. Visitors do what any client should: a rating whose answer did
not come is sent again under the same id. In the end as many are counted as were accepted.

All processes are on this machine here. On several, give each the same three URLs.
"""

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from examples.scaling_out.fleet import Fleet
from examples.scaling_out.round_robin import RoundRobin
from examples.scaling_out.visitors import Visitors, total

from molva.messaging import with_options

# Of each role.
_PROCESSES: Final = 3
# Seconds in which all that was accepted has to be counted, once nobody rates any more. A
# worker that was killed is missed after ten, and what it held comes again.
_COUNTED: Final = 60.0


def main() -> int:
    """Run it as the command line says; return 0 where all that was accepted was counted."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.scaling_out", description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--broker", help="URL; default: the Kafka of scripts/brokers")
    parser.add_argument("--ledger", help="URL; default: the Redis of scripts/brokers")
    parser.add_argument("--catalog", help="URL; default: a file, since all is on one machine")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long visitors come")
    parser.add_argument("--rate", type=float, default=200.0, help="ratings a second")
    arguments = parser.parse_args()
    # A topic and a campaign of its own: what else lives in these servers is left alone.
    name = f"scaling-out-{secrets.token_hex(4)}"
    urls = {
        "MOLVA_BROKER": with_options(arguments.broker or _started("kafka"), topic=name),
        "MOLVA_LEDGER": arguments.ledger or _started("redis"),
    }
    if arguments.catalog:
        urls["MOLVA_CATALOG"] = arguments.catalog
    return asyncio.run(_run(urls, name, per_second=arguments.rate, seconds=arguments.seconds))


def _started(server: str) -> str:
    """Return the URL of a server that ``scripts/brokers start`` has started."""
    script = Path(__file__).parents[2] / "scripts" / "brokers"
    found = subprocess.run([script, "url", server], capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{server} is not running; start it: scripts/brokers start {server}")
    return found.stdout.strip()


async def _run(urls: Mapping[str, str], name: str, *, per_second: float, seconds: float) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="molva-scaling-out-") as folder,
        Fleet(Path(folder), urls) as fleet,
    ):
        await asyncio.to_thread(fleet.run, "campaign put", name)
        for _ in range(_PROCESSES):
            fleet.start("serve")
            fleet.start("work")
        await asyncio.to_thread(fleet.wait_ready)
        balancer = RoundRobin([("127.0.0.1", port) for port in fleet.ports])
        await balancer.start()
        print(f"{_PROCESSES} HTTP processes behind port {balancer.port}, {_PROCESSES} workers")

        visitors = Visitors(balancer.port, name)
        rating = asyncio.ensure_future(visitors.rate(per_second=per_second, seconds=seconds))
        await asyncio.sleep(seconds / 2)
        for role in ("work", "serve"):
            fleet.kill(role)
        await rating
        counted = await _counted(balancer.port, name, visitors.accepted)
        await balancer.close()

    for what, number in (
        ("offered", visitors.offered),
        ("accepted", visitors.accepted),
        ("unknown, sent again", visitors.unknown),
        ("processes killed", fleet.killed),
        ("counted", counted),
        ("difference", counted - visitors.accepted),
    ):
        print(f"{what:<20} {number:>8,}")
    return 0 if counted == visitors.accepted > 0 else 1


async def _counted(port: int, campaign: str, expected: int) -> int:
    """Return how many are counted, as soon as all are; and look once more for one too many."""
    deadline = time.monotonic() + _COUNTED
    counted = 0
    while counted < expected and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        try:
            counted = await total(port, campaign)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            continue
    await asyncio.sleep(1.0)
    return await total(port, campaign)


if __name__ == "__main__":
    sys.exit(main())
