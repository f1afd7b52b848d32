"""``python -m examples.adder``: sums that travel through a queue and back.

    python -m examples.adder work  &        # as many as you like, on any machine
    python -m examples.adder serve &
    curl 'http://127.0.0.1:8090/add?a=2&b=3'    # {"sum":5}

``run`` starts both, three workers of them, lets clients ask for sums, kills a worker half way,
and counts: every answer is its own request's sum, or a clear 504.

The broker is a SQLite file in ``adder-data`` unless ``--broker`` names another one.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from examples.adder.run import run
from examples.adder.service import serve
from examples.adder.worker import work


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.adder", description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("role", choices=("serve", "work", "run"))
    parser.add_argument("--broker", help="URL; a password is better put into ADDER_BROKER")
    parser.add_argument("--port", type=int, default=8090, help="of serve; default 8090")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one sum")
    parser.add_argument("--work", type=float, default=0.02, help="seconds that adding takes")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long run asks for sums")
    arguments = parser.parse_args()
    broker = arguments.broker or os.environ.get("ADDER_BROKER") or _file()
    if arguments.role == "serve":
        asyncio.run(serve(broker, port=arguments.port, timeout=arguments.timeout))
        return 0
    if arguments.role == "work":
        asyncio.run(work(broker, seconds=arguments.work))
        return 0
    return asyncio.run(
        run(broker, work=arguments.work, timeout=arguments.timeout, seconds=arguments.seconds)
    )


def _file() -> str:
    folder = Path("adder-data").absolute()
    folder.mkdir(exist_ok=True)
    return f"sqlite://{folder}/adder.db"


if __name__ == "__main__":
    sys.exit(main())
