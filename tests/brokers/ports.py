"""Ports that stay ours while their server is down.

A port that ``bind`` to 0 hands out is one that any outgoing connection may get next. A server
that was killed would then find its port taken when it comes back; worse, a client that tries
the dead port again and again is one day given this very port as its own, and talks to
itself. So ports come from below the range that the system hands out.
"""

import os
import random
import socket
from pathlib import Path
from typing import Final

__all__ = ["free_ports"]

_FIRST, _LAST = 20_000, 29_999
# Parts of the range, of which each process of the tests that run side by side has one: a server
# that is down, or has not bound its port yet, does not hold it against another's.
_PARTS: Final = 16
# Dice of its own, as a test may load those of everybody.
_dice: Final = random.Random()
_given: Final[set[int]] = set()
_SYSTEM_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> tuple[int, ...]:
    """Return so many different free ports on 127.0.0.1."""
    last = _LAST
    if _SYSTEM_RANGE.exists():
        last = min(last, int(_SYSTEM_RANGE.read_text().split()[0]) - 1)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = [port for port in range(_FIRST, last + 1) if port % _PARTS == worker % _PARTS]
    # Those that were given before come last: their servers may be down.
    _dice.shuffle(mine)
    mine.sort(key=_given.__contains__)
    found: list[int] = []
    for port in mine:
        if len(found) == count:
            break
        if _is_free(port):
            found.append(port)
    _given.update(found)
    return tuple(found)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
