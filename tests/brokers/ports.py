"""Ports that stay ours while their server is down.

A port that ``bind`` to 0 hands out is one that any outgoing connection may get next. A server
that was killed would then find its port taken when it comes back; worse, a client that tries
the dead port again and again is one day given this very port as its own, and talks to
itself. So ports come from below the range that the system hands out.
"""

import random
import socket
from pathlib import Path

__all__ = ["free_ports"]

_FIRST, _LAST = 20_000, 29_999
_SYSTEM_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> tuple[int, ...]:
    """Return so many different free ports on 127.0.0.1."""
    last = _LAST
    if _SYSTEM_RANGE.exists():
        last = min(last, int(_SYSTEM_RANGE.read_text().split()[0]) - 1)
    found: list[int] = []
    for port in random.sample(range(_FIRST, last + 1), last + 1 - _FIRST):
        if len(found) == count:
            break
        if _is_free(port):
            found.append(port)
    return tuple(found)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
